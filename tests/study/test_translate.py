"""Translation within budgets: what may not leak, what is stored, what a kill costs, and how claims are answered."""

import json
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
pytest.importorskip("sacrebleu")

import torch
import transformers as tf
from catalogues_made_up import make_catalogues, translated, write_mo

from snell.cli import main
from snell.study import parent, translate, translation
from snell.study.catalogues import Sentences, catalogues, cleaned, part_of, text_files
from snell.study.claims import Estimate, answered, pooled

TINY = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SIZES = {"validation": 4, "test": 6}
PRETRAINED, NEAR, FAR = "fr", "gl", "hu"


def few(patch):
    for name, size in TINY.items():
        patch.setitem(parent.SIZES, name, size)
    for name, size in SIZES.items():
        patch.setitem(translation.Translation.sizes, name, size)
    patch.setattr(parent, "TOKENS", 12)
    patch.setattr(translation, "TOKENS", 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translate")
    make_catalogues(folder / "mo", (PRETRAINED, NEAR, FAR))
    return folder


def command(folder, out, *more, methods=("lora", "full"), pairs=("--near", NEAR, "--far", FAR)):
    words = ["study", "translate", "--catalogues", folder / "mo", "--languages", PRETRAINED, *pairs, "--out", out]
    words += ["--pretraining", 2, "--budgets", 3, "--budgets", 10, "--sentences", 8, "--steps", 1, "--draws", 2, *more]
    return [*map(str, words), *(word for method in methods for word in ("--methods", method))]


def run(*words):
    with pytest.MonkeyPatch.context() as patch:
        few(patch)
        result = CliRunner().invoke(main, command(*words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def undisturbed(folder):
    run(folder, folder / "whole")
    return folder / "whole"


def outcomes(out):
    """What does not depend on the machine's load."""
    entries = [json.loads(line) for line in (out / "translate.jsonl").read_text().splitlines()]
    return [(entry["run"], entry["result"]["chrf"], entry["result"]["bleu"]) for entry in entries]


def test_scores_of_identical_files_are_100_and_signed():
    texts = ["Save the current image first.", "Open a file in another window"]
    found = translation.scores(texts, texts, "gl")
    assert found["bleu"] == pytest.approx(100)
    assert found["chrf"] == pytest.approx(100)
    assert "tok:13a" in found["bleu_signature"]
    assert "tok:zh" in translation.scores(texts, texts, "zh_CN")["bleu_signature"]
    assert found["chrf_signature"].startswith("nrefs:1")
    assert translation.scores(texts[::-1], texts, "gl")["bleu"] < 50


def test_no_translation_of_a_test_source_is_trained_on_in_any_language(folder):
    found = catalogues(folder / "mo", [PRETRAINED, NEAR, FAR])
    of_part = {
        part: {s for one in found.values() for s in one[part].sources} for part in ("train", "validation", "test")
    }
    assert all(len(sources) >= 8 for sources in of_part.values())
    assert sum(map(len, of_part.values())) == len(set.union(*of_part.values()))
    for one in found.values():
        for part, some in one.items():
            assert {part_of(source) for source in some.sources} == {part}


def test_sources_that_differ_by_what_is_no_word_share_their_part():
    texts = [f"Delete the layer number {i} of all" for i in range(30)]
    assert len({part_of(text) for text in texts}) == 1
    assert part_of("Save %1 as a file?") == part_of("save {name} as a file!")
    assert len({part_of(f"save the {word} of it") for word in "abcdefghijklmnopqrstuvwxyz" for word in [word * 3]}) == 3


def test_a_catalogue_gives_sentences_alone(folder):
    parts = catalogues(folder / "mo", [NEAR])[NEAR]
    pairs = [pair for some in parts.values() for pair in zip(some.sources, some.targets, strict=True)]
    assert 250 < len(pairs) <= 301
    assert all(target == translated(source, NEAR) for source, target in pairs)
    assert sum(source.endswith("again") for source, _ in pairs) == 1  # its context and accelerator are gone
    assert cleaned("_Open the\nI_mage && %s") == "Open the Image && %s"


def test_missing_catalogues_and_uneven_files_are_named(folder, tmp_path):
    with pytest.raises(Exception, match="no message catalogue of xx"):
        catalogues(folder / "mo", [NEAR, "xx"])
    write_mo(tmp_path / "xx" / "LC_MESSAGES" / "a.mo", {})
    (tmp_path / "xx" / "LC_MESSAGES" / "b.mo").write_bytes(b"damaged")
    with pytest.raises(Exception, match="no message catalogue of xx"):
        catalogues(tmp_path, ["xx"])
    (tmp_path / "source.txt").write_text("a\nb\n")
    (tmp_path / "target.txt").write_text("a\n")
    with pytest.raises(Exception, match="as many lines; got 2 and 1"):
        text_files(tmp_path)


def test_every_row_is_within_its_budget_and_signed(undisturbed):
    document = json.loads((undisturbed / "translate.json").read_text())
    total = int(document["settings"]["parameters"].replace(",", ""))
    assert len(document["comparisons"]) == 4  # 2 pairs, 2 budgets
    for one in document["comparisons"]:
        assert one["complete"]
        rows = {row["method"]: row for row in one["rows"]}
        assert set(rows) == {"lora", "full"}
        assert rows["full"]["trained"] == total
        for row in rows.values():
            assert (len(row["test"]), len(row["bleu"])) == (2, 2)
            assert "version:" in row["bleu_signature"]
            assert "version:" in row["chrf_signature"]
            assert row["method"] == "full" or row["trained"] <= one["budget"] * total
            assert row["bleu_signature"] in translate.report(document)
    assert (undisturbed / "translate.png").stat().st_size > 5_000


def test_rates_are_chosen_on_validation_and_judged_on_other_draws(undisturbed):
    runs = [one for one, *_ in outcomes(undisturbed) if "judge" in one]
    judged = [one for one in runs if one["judge"] == "test:6"]
    chosen = [one for one in runs if one["judge"] == "validation:4"]
    assert len(judged) + len(chosen) == len(runs)
    assert {one["draw"] for one in chosen} == {0}
    assert {one["draw"] for one in judged} == {100, 101}
    # Full fine-tuning has no budget: it is run once.
    assert {one["budget"] for one in runs if one["method"] == "full"} == {None}
    assert len(judged) == 2 * (2 + 1) * 2  # pairs, two budgets and none, draws


def test_after_a_kill_it_goes_on_and_ends_with_the_same_runs(folder, undisturbed, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_translate as t, pytest; "
    code += "t.few(pytest.MonkeyPatch()); from snell.cli import main; main(sys.argv[2:])"
    here = str(__file__).rpartition("/")[0]
    child = subprocess.Popen([sys.executable, "-c", code, here, *command(folder, tmp_path)], stderr=subprocess.DEVNULL)
    path = tmp_path / "translate.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_text().count("\n") >= 4) and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = path.read_text().count("\n")
    assert 4 <= done < len(outcomes(undisturbed)), "the kill came too late to test anything"
    run(folder, tmp_path)
    assert outcomes(tmp_path) == outcomes(undisturbed)


def test_a_stopped_pre_training_goes_on_and_ends_alike(tmp_path, monkeypatch):
    few(monkeypatch)
    monkeypatch.setattr(parent, "SAVED", 2)
    monkeypatch.setattr(parent, "BATCH", 4)
    texts = tuple(f"word {i} of it" for i in range(20))
    parts = {"fr": Sentences(texts, tuple(translated(text, "fr") for text in texts))}
    whole = parent.parent(tmp_path / "whole", parts, 6)
    fit, calls = parent.fit, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(parent, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        parent.parent(tmp_path / "stopped", parts, 6)
    assert parent.parent(tmp_path / "stopped", parts, 6) == tmp_path / "stopped"
    assert len(calls) == 4  # two, the stopped one, and the rest
    paths = whole, tmp_path / "stopped"
    models = [tf.PegasusForConditionalGeneration.from_pretrained(path).state_dict() for path in paths]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    tokenizer = tf.AutoTokenizer.from_pretrained(whole)
    text = "Sýna laghuluna %s"  # bytes: no letter is unknown
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_a_checkpoint_and_text_files_take_the_same_command(folder, undisturbed, tmp_path):
    [own] = undisturbed.glob("parent-*")
    tokenizer = tf.AutoTokenizer.from_pretrained(own)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    config = tf.T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **sizes)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    parts = catalogues(folder / "mo", [FAR])[FAR]
    for side in ("source", "target"):
        lines = [line for some in parts.values() for line in getattr(some, f"{side}s")]
        (tmp_path / f"{side}.txt").write_text("\n".join(lines) + "\n")
    more = ["--checkpoint", tmp_path / "t5", "--text", f"xx={tmp_path}", "--sentences", 8]
    pairs = ["--far", "xx=translate to xx:", "--near", NEAR]
    words = command(folder, tmp_path / "out", *more, methods=["snell"], pairs=pairs)
    with pytest.MonkeyPatch.context() as patch:
        few(patch)
        result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out" / "translate.json").read_text())
    assert {(one["pair"], one["kind"]) for one in document["comparisons"]} == {(NEAR, "near"), ("xx", "far")}
    assert all(one["rows"][0]["method"] == "snell" for one in document["comparisons"])


def test_a_method_without_a_rank_is_refused(folder, tmp_path):
    result = CliRunner().invoke(main, command(folder, tmp_path, "--methods", "probe"))
    assert result.exit_code == 2
    assert "fit a budget" in result.output


def made_up(lora, full, noise=0.1, draws=3):
    """Comparisons whose chrF are ``lora(kind, budget, sentences)`` and ``full(kind, sentences)``, nearly."""
    comparisons = []
    for pair, kind in (("gl", "near"), ("ca", "near"), ("hu", "far"), ("tr", "far")):
        for sentences in (100, 1000):
            for budget in (0.001, 0.1):
                values = {"lora": lora(kind, budget, sentences), "full": full(kind, sentences)}
                rows = [
                    {
                        "method": name,
                        "label": name,
                        "test": [value + noise * (i - 1) * (name == "lora") for i in range(draws)],
                    }
                    for name, value in values.items()
                ]
                comparisons.append({"pair": pair, "kind": kind, "sentences": sentences, "budget": budget, "rows": rows})
    return comparisons


def answers(comparisons):
    return [row["answer"] for row in answered(comparisons)]


def test_claims_are_answered_by_their_intervals():
    def as_the_paper_says(kind, budget, sentences):
        return 40 - (budget < 0.01) * (6 if kind == "far" else 3)

    assert answers(made_up(as_the_paper_says, lambda kind, n: 40.2 if n == 1000 else 35)) == ["yes"] * 4
    assert answers(made_up(lambda *_: 30, lambda *_: 40, noise=0.0)) == ["no", *["not decided"] * 2, "no"]
    unsure = answers(made_up(as_the_paper_says, lambda kind, n: 40.0, noise=8.0))
    assert (unsure[0], unsure[3]) == ("not decided", "not decided")
    part = made_up(as_the_paper_says, lambda *_: 40)
    part[-1]["rows"].pop()
    assert answers(part)[0] == "not decided: runs are missing"


def test_an_estimate_is_the_mean_over_pairs_with_the_draws_error():
    values = [[1.0, 2.0, 4.0], [11.0, 10.0, 12.0]]
    estimate = pooled(values)
    assert estimate.mean == pytest.approx(fmean(map(fmean, values)))
    errors = [stdev(some) / 3**0.5 for some in values]
    assert estimate.error == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    assert estimate.freedom == 4
    assert Estimate(0, 1, 4).half == pytest.approx(2.776, abs=1e-3)
