"""The gates' experiment: its protocol on made-up accuracies, its tasks in a few steps, its report."""

import json
import math
from contextlib import nullcontext
from itertools import pairwise
from statistics import fmean, variance

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from torch import nn

from snell import SnellLinear
from snell.bench.digits import Settings, lora, new_vit, snell
from snell.bench.memory import num_trained
from snell.bench.paper import gates
from snell.bench.paper.gates import GATES, LORA, Candidate, Plan, try_all
from snell.bench.protocol import Job, at_edge, judged
from snell.bench.report import standard_error
from snell.cli import main

PLAN = Plan(
    rates=(1e-3, 1e-2, 1e-1, 1.0),
    scales=(0.1, 1.0),
    sparsities=(0.0, 0.5, 0.9, 0.99),
    selection=(1, 2),
    judging=(3, 4, 5),
)


class MadeUp:
    """Accuracies with one peak over the rates, at ``peak(candidate)``, on validation data; the reverse on test data."""

    def __init__(self, peak=lambda candidate: 1e-2):
        self.peak, self.calls = peak, []

    def __call__(self, candidate, jobs):
        return [self.accuracy(candidate, *job) for job in jobs]

    def of(self, candidate):
        return lambda jobs: self(candidate, jobs)

    def accuracy(self, candidate, rate, draw, part):
        self.calls.append((candidate, rate, draw, part))
        distance = abs(math.log10(rate / self.peak(candidate)))
        accuracy = 90 - 10 * distance + len(candidate.gate) / 10 + draw + 0.3 * (draw == 4)
        return accuracy if part == "validation" else 100 - accuracy


def test_validation_alone_chooses_the_rate():
    measure = MadeUp(peak=lambda candidate: 1e-1)
    row = judged(measure.of(LORA), PLAN.rates, PLAN.selection, PLAN.judging)
    # The test accuracies of the made-up measure are worst exactly there.
    assert row["rate"] == 1e-1
    assert row["test"] == [measure.accuracy(LORA, 1e-1, draw, "test") for draw in PLAN.judging]


def test_the_test_set_is_met_at_the_chosen_rate_once_a_draw_and_never_by_a_draw_that_chose():
    measure = MadeUp()
    rows = try_all(PLAN, measure)
    judging = [call for call in measure.calls if call[3] == "test"]
    chosen = [(Candidate(row["gate"], row["scale"], row["sparsity"]), row["rate"]) for row in rows]
    assert sorted(judging) == sorted((*pair, draw, "test") for pair in chosen for draw in PLAN.judging)
    assert {draw for _, _, draw, part in measure.calls if part == "validation"} == set(PLAN.selection)


def test_the_plan_chooses_and_judges_by_different_draws():
    plan = gates.PLAN
    assert not set(plan.selection) & set(plan.judging)
    assert all(low < high for low, high in pairwise(plan.rates))
    assert gates.SPARSITY in plan.sparsities
    # A standard error needs two.
    assert len(plan.judging) > 1


def test_every_gate_is_tried_at_every_scale_and_rate_and_every_sparsity():
    rows = try_all(PLAN, MadeUp(peak=lambda candidate: 1e-1 if candidate.scale == 0.1 else 0.05))
    found = {(row["gate"], row["scale"], row["sparsity"]): row for row in rows}
    assert len(found) == len(rows)
    assert ("LoRA", None, None) in found
    for gate in GATES:
        for scale in PLAN.scales:
            assert found[gate, scale, 0.9]["rates"] == list(PLAN.rates)
        # At scale 0.1 the peak lies on a rate of the grid: validation prefers it.
        assert all((gate, 0.1, sparsity) in found for sparsity in PLAN.sparsities if sparsity)
    assert found["none", 0.1, 0.0]["validation"]
    # Without competition the gates do the same, so one row serves them all.
    assert len(rows) == 1 + len(GATES) * (len(PLAN.scales) + 2) + 1


@pytest.mark.parametrize("start", PLAN.rates)
@pytest.mark.parametrize("peak", PLAN.rates)
def test_from_any_rate_the_climb_ends_at_the_peak_with_its_neighbours_tried(start, peak):
    measure = MadeUp(lambda candidate: peak).of(Candidate("soft", 1.0, 0.5))
    row = judged(measure, PLAN.rates, PLAN.selection, PLAN.judging, [start])
    assert row["rate"] == peak
    position = PLAN.rates.index(peak)
    assert set(PLAN.rates[max(position - 1, 0) : position + 2]) <= set(row["rates"])
    assert [fmean(tried) for tried in row["validation"]] == pytest.approx(
        [90.4 + 1.5 - 10 * abs(math.log10(rate / peak)) for rate in row["rates"]]
    )


def test_a_rate_at_the_edge_of_its_grid_is_one():
    row = judged(MadeUp(lambda candidate: 1e-3).of(LORA), PLAN.rates, PLAN.selection, PLAN.judging)
    assert at_edge(row)
    assert not at_edge(judged(MadeUp().of(LORA), PLAN.rates, PLAN.selection, PLAN.judging))


def test_the_standard_error_is_the_root_of_the_variance_over_the_draws():
    values = [71.0, 74.5, 70.0, 78.0]
    assert standard_error(values) ** 2 == pytest.approx(variance(values) / 4)


def test_a_rate_works_within_a_few_points_of_loras_best():
    lora = {"gate": "LoRA", "scale": None, "sparsity": None, "rates": [1, 2], "validation": [[60, 70], [80, 70]]}
    bar = 75 - gates.WORKING
    row = {"gate": "hard", "scale": 1.0, "sparsity": 0.9, "rates": [1, 2, 3]}
    row["validation"] = [[bar - 1, bar + 1], [bar, bar - 0.1], [bar + 20, bar]]
    assert gates.working_rates(row, [lora, row]) == [1, 3]


def test_the_command_writes_what_the_report_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "PLAN", PLAN)
    monkeypatch.setattr(gates, "measuring", lambda workers: nullcontext(({"steps": 1}, MadeUp())))
    result = CliRunner().invoke(main, ["bench", "gates", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "gates.json").read_text())
    assert (tmp_path / "gates.png").stat().st_size > 10_000
    report = gates.report(document)
    lora = document["rows"][0]["test"]
    lines = report.splitlines()
    for row in document["rows"]:
        result = f"{fmean(row['test']):.1f} ± {standard_error(row['test']):.1f}"
        if row["gate"] == "LoRA":
            [line] = [line for line in lines if line.startswith("| LoRA |")]
        elif row["sparsity"] == 0.9:
            [line] = [line for line in lines if line.startswith(f"| {row['gate']} | {row['scale']:g} |")]
            assert f"| {fmean(row['test']) - fmean(lora):+.1f} ±" in line
            assert f"**{max(map(fmean, row['validation'])):.1f}**" in line
        else:
            [line] = [line for line in lines if line.startswith(f"| {row['sparsity']:g} |")]
            result += f" ({row['rate']:g})"
        assert result in line
    assert "`snell bench gates`: steps 1;" in report


def test_a_candidates_settings_reach_every_layer_and_train_what_lora_trains():
    pretrained = new_vit()
    model = snell(pretrained, **Candidate("magnitude", 0.3, 0.8)._asdict())
    linears = [m for name, m in pretrained.named_modules() if isinstance(m, nn.Linear) and name != "classifier"]
    layers = [module for module in model.modules() if isinstance(module, SnellLinear)]
    assert len(layers) == len(linears)
    for layer in layers:
        assert layer.spec.gate == "magnitude"
        assert layer.spec.sparsity == 0.8
        assert layer.snell_theta.abs().tolist() == pytest.approx([0.3, 0.3])
    assert num_trained(model) == num_trained(lora(pretrained))


def test_digits_are_measured_on_the_part_asked_for_and_alike_at_every_call():
    shown, train = gates.digits(Settings(pretraining_steps=2, steps=2))
    candidate = Candidate("hard", 1.0, 0.9)
    first = [train(candidate, Job(1e-2, 7, part)) for part in ("validation", "test")]
    assert first == [train(candidate, Job(1e-2, 7, part)) for part in ("validation", "test")]
    for accuracy, part in zip(first, ("validation", "test"), strict=True):
        right = accuracy / 100 * int(shown[part].split()[0])
        assert right == pytest.approx(round(right))
    assert train(candidate, Job(1e-2, 8, "test")) != first[1]
