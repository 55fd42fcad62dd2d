"""The study by its command on tiny data: what is paired, what is disjoint, and what a kill costs."""

import json
import math
import signal
import subprocess
import sys
import time
from statistics import fmean, stdev

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import torch
from texts import make_checkpoint, make_wordnet

from snell.bench.memory import num_trained
from snell.cli import main
from snell.study import classify, comparison, text, training
from snell.study.comparison import CHOOSING, FIRST_JUDGING, Comparison, OutOfTime
from snell.study.journal import Journal
from snell.study.methods import GRID, Method, parse
from snell.study.tasks import SHARES, Task, divided
from snell.study.training import Setting, built

METHODS = ("lora", "snell", "full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    make_checkpoint(folder / "checkpoint")
    make_wordnet(folder / "wordnet")
    return folder


@pytest.fixture(scope="module")
def task(folder):
    return text.load("wordnet", folder / "wordnet", 1, folder / "checkpoint")


@pytest.fixture(autouse=True)
def few_examples(monkeypatch):
    monkeypatch.setitem(comparison.SIZES, "validation", 20)
    monkeypatch.setitem(comparison.SIZES, "test", 40)


def command(folder, out, methods=METHODS, *more):
    words = ["study", "classify", "--data", f"wordnet={folder / 'wordnet'}", "--checkpoint", folder / "checkpoint"]
    words += ["--out", out, "--labels", 32, "--steps", 2, "--layers", 1, "--rank", 2, "--draws", 2, *more]
    return [*map(str, words), *(word for method in methods for word in ("--methods", method))]


def runs(out):
    return [json.loads(line) for line in (out / "classify-wordnet.jsonl").read_text().splitlines()]


def outcomes(out):
    """What does not depend on the machine's load."""
    return [(entry["run"], entry["result"]["accuracy"], entry["result"]["trained"]) for entry in runs(out)]


@pytest.fixture(scope="module")
def undisturbed(folder):
    """A study from beginning to end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(comparison.SIZES, "validation", 20)
        patch.setitem(comparison.SIZES, "test", 40)
        result = CliRunner().invoke(main, command(folder, folder / "whole"), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "whole"


def test_every_method_is_chosen_and_judged_by_different_draws_and_parts(undisturbed):
    for method in METHODS:
        of_method = [entry["run"] for entry in runs(undisturbed) if entry["run"]["method"] == method]
        choosing = {(run["judge"], run["draw"]) for run in of_method if run["draw"] in CHOOSING}
        judging = [run for run in of_method if run["draw"] not in CHOOSING]
        assert {judge for judge, _ in choosing} == {"validation:20"}
        assert [(run["judge"], run["draw"]) for run in judging] == [("test:40", FIRST_JUDGING + i) for i in range(2)]
        assert len({run["rate"] for run in judging}) == 1


def test_the_report_repeats_the_paired_difference(undisturbed):
    document = json.loads((undisturbed / "classify-wordnet.json").read_text())
    [one] = document["comparisons"]
    assert one["complete"]
    lora, snell, _ = one["rows"]
    differences = [a - b for a, b in zip(snell["test"], lora["test"], strict=True)]
    assert snell["difference"] == pytest.approx(differences)
    shown = f"{fmean(differences):+.2f} ± {stdev(differences) / 2**0.5:.2f}"
    [line] = [line for line in classify.report(document).splitlines() if line.startswith("| SNELL 0.9 soft |")]
    assert shown in line
    assert (undisturbed / "classify-wordnet.png").stat().st_size > 5_000


def test_after_a_kill_the_study_goes_on_and_ends_with_the_same_runs(folder, undisturbed, tmp_path):
    # Sizes of the parts are set in this process alone, so the child is told by code.
    code = "import sys; from snell.study import comparison; comparison.SIZES.update(validation=20, test=40); "
    code += "from snell.cli import main; main(sys.argv[1:])"
    child = subprocess.Popen([sys.executable, "-c", code, *command(folder, tmp_path)], stderr=subprocess.DEVNULL)
    path = tmp_path / "classify-wordnet.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_text().count("\n") >= 2) and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = len(runs(undisturbed))
    done = path.read_text().count("\n")
    assert 2 <= done < before, "the kill came too late to test anything"
    with path.open("a") as file:  # as if it had come in the middle of a line
        file.write('{"run": {"vers')
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "train_and_judge", lambda *a: calls.append(a) or training.train_and_judge(*a))
        result = CliRunner().invoke(main, command(folder, tmp_path), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert outcomes(tmp_path) == outcomes(undisturbed)
    assert len(calls) == before - done


def test_out_of_time_it_reports_what_it_has(folder, undisturbed, tmp_path):
    result = CliRunner().invoke(main, command(folder, tmp_path, METHODS, "--max-minutes", 0), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert runs(tmp_path) == []
    # With all runs of LoRA in the journal, its row is whole and the others are missing.
    lines = (undisturbed / "classify-wordnet.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "classify-wordnet.jsonl").write_text("".join(line for line in lines if '"lora"' in line))
    CliRunner().invoke(main, command(folder, tmp_path, METHODS, "--max-minutes", 0), catch_exceptions=False)
    [one] = json.loads((tmp_path / "classify-wordnet.json").read_text())["comparisons"]
    assert [row["method"] for row in one["rows"]] == ["lora"]
    assert not one["complete"]


def test_a_finer_study_has_a_results_file_of_its_own(folder, undisturbed, tmp_path):
    (tmp_path / "classify-wordnet.jsonl").write_text((undisturbed / "classify-wordnet.jsonl").read_text())
    CliRunner().invoke(main, command(folder, tmp_path, ["lora"], "--finer"), catch_exceptions=False)
    assert not (tmp_path / "classify-wordnet.json").exists()
    [one] = json.loads((tmp_path / "classify-wordnet-finer.json").read_text())["comparisons"]
    assert set(one["rows"][0]["rates"]) - set(GRID)


def test_a_second_study_of_the_same_file_is_refused(tmp_path):
    with Journal(tmp_path / "a.jsonl"), pytest.raises(Exception, match="another study is writing"):
        Journal(tmp_path / "a.jsonl")
    Journal(tmp_path / "a.jsonl").__exit__(None, None, None)


def test_missing_data_say_what_to_install(folder, tmp_path):
    (tmp_path / "wordnet").mkdir()
    words = command(tmp_path, tmp_path)
    words[words.index("--checkpoint") + 1] = str(folder / "checkpoint")
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "wordnet-base" in result.output


def test_the_parts_share_no_text(task):
    parts = [set(map(tuple, task.inputs(task.parts[name])["input_ids"].tolist())) for name in SHARES]
    sizes = [len(task.parts[name]) for name in SHARES]
    assert sum(sizes) == len(task.labels)
    # Padded alike, a text is its tokens. The data hold some definitions twice.
    assert len(set.union(*parts)) == sum(map(len, parts)) == sum(sizes)
    overlapping = {**task.parts, "test": torch.cat([task.parts["test"], task.parts["pool"][:1]])}
    with pytest.raises(ValueError, match="share no example"):
        Task(task.labels, task.inputs, task.backbone, overlapping, None, {})


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_draw_trains_on_the_pool_alone_and_is_the_same_at_every_call(task, part):
    draw = task.draw(7, 64, None, 5, 32, f"{part}:15")
    assert set(draw.order.tolist()) <= set(task.parts["pool"].tolist())
    assert set(draw.judge.tolist()) <= set(task.parts[part].tolist())
    assert (len(draw.order), len(draw.judge)) == (160, 15)
    # Two epochs of 64 and a half: every label twice, or three times.
    assert set(draw.order.bincount()[draw.order].tolist()) <= {2, 3}
    again, other = task.draw(7, 64, None, 5, 32, f"{part}:15"), task.draw(8, 64, None, 5, 32, f"{part}:15")
    assert all(a.equal(b) for a, b in zip(draw, again, strict=True))
    assert not draw.order.equal(other.order)


def test_labels_a_class_are_the_same_number_of_each(task):
    draw = task.draw(0, None, 8, 1, 16, "test:1")
    assert task.labels[draw.order].bincount().tolist() == [8, 8]
    with pytest.raises(ValueError, match="labels must be at most"):
        task.draw(0, 10_000, None, 1, 16, "test:1")


def test_methods_start_from_the_same_head_and_train_as_many_parameters(task):
    backbone = task.backbone()
    models = {
        name: built(backbone, 2, parse(name), 2, draw=5)
        for name in ("lora", "rslora", "shira", "snell", "snell:sparsity=0,gate=hard", "dora", "full", "red", "probe")
    }
    heads = [
        next(p for name, p in model.named_parameters() if p.requires_grad and "head" in name and p.ndim == 2)
        for model in models.values()
    ]
    assert all(head.equal(heads[0]) for head in heads)
    counts = {name: num_trained(model) for name, model in models.items()}
    of_lora = counts["lora"]
    linears = [m for m in backbone.modules() if isinstance(m, torch.nn.Linear)]
    assert of_lora == counts["probe"] + sum(2 * (m.in_features + m.out_features) for m in linears)
    assert all(counts[name] == of_lora for name in ("rslora", "shira", "snell", "snell:sparsity=0,gate=hard"))
    assert counts["dora"] == of_lora + sum(m.out_features for m in linears)
    assert counts["red"] == counts["probe"] + sum(2 * m.out_features for m in linears)
    settings = {name: models[name].peft_config["default"] for name in ("lora", "rslora", "dora")}
    assert all((config.r, config.lora_alpha) == (2, 4) for config in settings.values())
    assert [name for name, config in settings.items() if config.use_rslora] == ["rslora"]
    assert [name for name, config in settings.items() if config.use_dora] == ["dora"]
    assert counts["full"] == sum(p.numel() for p in models["full"].parameters())


def test_an_identity_start_is_drawn_anew_in_every_draw(task):
    models = [built(task.backbone(), 2, parse("snell:init_weights=identity"), 2, draw) for draw in (5, 5, 6)]
    factors = [[p for name, p in model.named_parameters() if "snell_A" in name] for model in models]
    assert factors[0]
    assert all(map(torch.equal, factors[0], factors[1]))
    assert not any(map(torch.equal, factors[0], factors[2]))


class MadeUp(Comparison):
    """Accuracies with one peak over the rates, and a constant lead on LoRA."""

    def __init__(self, peak, noise=0.0, finer=False):
        self.peak, self.noise, self.finer, self.calls, self.error = peak, noise, finer, [], 0.3

    def run(self, setting, method, rate, draw, part):
        self.calls.append((str(method), rate, draw, part))
        accuracy = 80 - 4 * abs(math.log(rate / self.peak)) + draw % 3
        accuracy += method.name != "lora" and 1 + self.noise * (-1) ** draw
        return {"accuracy": accuracy, "trained": 1, "seconds": 1.0}


SETTING = Setting("made up", 1, 2, 1, None, 1)


@pytest.mark.parametrize("peak", [1e-5, 5e-4, 1e-2, 0.5])
def test_rates_are_extended_until_the_best_has_a_neighbour_on_each_side(peak):
    rate, tried = MadeUp(peak).choose(SETTING, Method("lora"))
    assert rate == peak
    assert {GRID[GRID.index(peak) - 1], GRID[GRID.index(peak) + 1]} <= set(tried)


@pytest.mark.parametrize(("peak", "between"), [(0.0019, {0.0014, 0.0032}), (0.0034, {0.0032, 0.0071})])
def test_finer_rates_lie_between_the_best_and_its_neighbours(peak, between):
    rate, tried = MadeUp(peak, finer=True).choose(SETTING, Method("lora"))
    assert set(tried) - set(GRID) == between
    assert rate == min(tried, key=lambda rate: abs(math.log(rate / peak)))


def test_draws_end_when_the_error_is_small_and_go_on_when_it_is_not():
    for noise, draws in ((0.0, comparison.FEWEST), (5.0, 12)):
        study = MadeUp(1e-3, noise)
        (lora, snell), complete = study.rows(SETTING, [Method("snell"), Method("lora")], 12)
        assert complete
        assert (lora["method"], len(lora["test"]), len(snell["test"])) == ("lora", 12, draws)
        assert fmean(snell["difference"]) == pytest.approx(1)


def test_out_of_time_before_a_second_draw_there_is_no_row():
    class Stopped(MadeUp):
        def run(self, *key):
            if sum(part == "test" for *_, part in self.calls) == 1:
                raise OutOfTime
            return super().run(*key)

    assert Stopped(1e-3).rows(SETTING, [Method("lora")], 12) == ([], False)


def test_methods_are_written_as_they_are_read():
    method = parse("snell:sparsity=0.5,gate=hard,init_weights=identity")
    assert dict(method.settings) == {"sparsity": 0.5, "gate": "hard", "init_weights": "identity"}
    assert parse(str(method)) == method
    assert method.label == "SNELL 0.5 hard, identity start"
    for wrong in ("lorra", "snell:sparsity"):
        with pytest.raises(Exception, match=r"no method|key=value"):
            parse(wrong)


def test_divided_is_a_partition():
    parts = divided(101)
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(101))
