"""Training survives what happens to adapters between its steps; damage that a soak is to find is found."""

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("click")

from seeds import SEED
from snell.peft import AdaptedLinear
from tests.stress import soak as soak_run
from tests.stress.__main__ import tables
from tests.stress.events import Violation
from tests.stress.soak import FLAT_KIB_A_STEP, FLAT_MIB, Soak, soak

STEPS = 125

#: The last step of the runs that are spoilt.
LAST = 7


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return soak(STEPS, tmp_path_factory.mktemp("saves"), SEED)


def test_turmoil_between_steps_changes_no_bit_and_keeps_no_memory(result):
    assert result.problems() == []
    assert result.difference == result.base_difference == 0
    assert len(result.losses) == len(result.resident_kib) == STEPS
    assert len(result.live) == STEPS // soak_run.APART
    # Of thirteen kinds, with about 175 draws: two are missed once in a hundred million runs.
    assert len(result.events) >= 12


def test_the_table_shows_the_run(result):
    rows = dict(tables(result, [])[0]["rows"])
    assert rows["training steps"] == str(STEPS)
    assert rows["trained factors, largest difference from the quiet runs'"] == "0"


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A short run that is spoilt after its steps."""
    monkeypatch.setattr(soak_run, "APART", (LAST + 1) // 2)
    return lambda spoil=None: soak(LAST + 1, tmp_path, SEED, spoil)


def layers(model):
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def test_a_kept_tensor_is_found(short):
    kept = []
    problems = short(lambda model, step: kept.append(torch.zeros(1))).problems()
    assert len(problems) == 1
    assert problems[0].startswith("live tensors went from")


@pytest.mark.parametrize(
    ("part", "damage"), [("base weights", "a bit"), ("trained factors", "a bit"), ("trained factors", "NaN")]
)
def test_damage_to_one_entry_is_found(part, damage, short):
    def spoil(model, step):
        if step == LAST:
            layer = layers(model)[3]
            damaged = layer.base_layer.weight if part == "base weights" else layer.snell_A["default"].weight
            entry = damaged.data.view(-1)[5:6]
            entry.copy_(entry.nextafter(torch.tensor(torch.inf)) if damage == "a bit" else torch.tensor(torch.nan))

    assert [problem.startswith(part) for problem in short(spoil).problems()] == [True]


def test_a_merge_that_is_not_taken_out_whole_is_found(short, monkeypatch):
    def unmerge(self):
        """As LoRA does it: subtract what was added, to rounding."""
        while self._merged:
            self.base_layer.weight.data -= self.get_delta_weight(self._merged.popitem()[0])

    monkeypatch.setattr(AdaptedLinear, "unmerge", unmerge)

    def merge_and_unmerge(model, step):
        model.merge_adapter()
        model.unmerge_adapter()

    try:
        found = any("differ" in problem for problem in short(merge_and_unmerge).problems())
    except Violation as violation:
        found = "changes the base model's outputs" in str(violation)
    assert found


def test_a_loss_that_is_not_a_number_is_found(short, monkeypatch):
    monkeypatch.setattr(soak_run, "_step", lambda model, optimizer, batch: float("nan"))
    with pytest.raises(Violation, match="the loss of step 0 is nan"):
        short()


def steady(steps, **settings):
    return Soak(steps, **{"live": [(5, 20)] * 20, "difference": 0.0, "base_difference": 0.0, **settings})


def test_a_growing_resident_set_is_found_beside_the_noise_of_a_flat_one():
    steps = 2000
    noise = torch.randint(2000, (steps,))
    flat = steady(steps, resident_kib=(500_000 + noise).tolist())
    # Medians of 375 draws lie within 300 of the middle.
    assert flat.problems() == []
    rising = noise + 1.5 * FLAT_KIB_A_STEP * torch.arange(steps)
    assert "the resident set grew" in steady(steps, resident_kib=(500_000 + rising).tolist()).problems()[0]
    leap = noise + 1.2 * 1024 * FLAT_MIB * (torch.arange(steps) > 1500)
    assert "the resident set grew" in steady(steps, resident_kib=(500_000 + leap).tolist()).problems()[0]


def test_growth_while_allocators_fill_their_pools_counts_as_none():
    steps = 400
    pools = 500_000 + 100 * torch.arange(steps).clamp(max=steps // 5)
    assert steady(steps, resident_kib=pools.tolist()).problems() == []
