"""The schedule of a budget, and its exact division among layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snell.training import BudgetSchedule, water_fill

LAYERS = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), st.integers(1, 2**40)), min_size=1, max_size=20
)


@given(layers=LAYERS, share=st.floats(0, 1))
def test_the_total_is_met_to_the_entry_and_no_layer_overflows(layers, share):
    scores, sizes = zip(*layers, strict=True)
    total = min(round(share * sum(sizes)), sum(sizes))
    kept = water_fill(total, scores, sizes)
    assert sum(kept) == total
    assert all(0 <= entries <= size for entries, size in zip(kept, sizes, strict=True))


@given(scores=st.lists(st.floats(0, 1e6), min_size=2, max_size=12), size=st.integers(1, 10**6), share=st.floats(0, 1))
def test_of_layers_of_one_size_a_higher_score_keeps_no_less(scores, size, share):
    kept = water_fill(int(share * size * len(scores)), scores, [size] * len(scores))
    by_score = [entries for _, entries in sorted(zip(scores, kept, strict=True))]
    assert by_score == sorted(by_score)


def test_equal_layers_share_alike_and_without_scores_by_size():
    assert water_fill(300, [0.2, 0.2, 0.2], [500] * 3) == [100, 100, 100]
    assert water_fill(300, [0.0, 0.0], [400, 200]) == [200, 100]
    assert water_fill(2, [1.0, 1.0, 1.0], [5] * 3) == [1, 1, 0]


def test_what_a_full_layer_cannot_take_goes_to_the_others():
    assert water_fill(110, [1.0, 0.0, 0.0], [50, 60, 60]) == [50, 30, 30]
    assert water_fill(110, [8.0, 1.0, 1.0], [50, 60, 60]) == [50, 30, 30]
    assert water_fill(170, [8.0, 1.0, 0.0], [50, 60, 60]) == [50, 60, 60]
    assert water_fill(0, [8.0, 1.0], [50, 60]) == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((-1, [1.0], [5]), r"total must lie in \[0, 5\]"),
        ((6, [1.0], [5]), "total must lie"),
        ((3, [-1.0], [5]), "scores must be finite and not negative; got -1"),
        ((3, [float("nan")], [5]), "scores must be finite"),
        ((3, [float("inf")], [5]), "scores must be finite"),
    ],
)
def test_what_cannot_be_divided_is_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        water_fill(*arguments)


def test_the_schedule_is_a_cubic_between_warm_up_and_cool_down():
    schedule = BudgetSchedule(0.2, 0.8, total=120, warmup=10, cooldown=10, interval=5)
    first, last = 800, 200
    assert [schedule.kept(step, 1000) for step in (0, 10)] == [first, first]
    assert schedule.kept(60, 1000) == last + (first - last) // 8
    assert [schedule.kept(step, 1000) for step in (110, 120, 500)] == [last] * 3
    kept = [schedule.kept(step, 10**9) for step in range(121)]
    assert kept == sorted(kept, reverse=True)
    assert [step for step in range(1, 121) if schedule.allocates(step)] == [*range(15, 111, 5), *range(111, 121)]


def test_a_budget_may_rise():
    kept = [BudgetSchedule(0.9, 0.5, total=10).kept(step, 1000) for step in range(11)]
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (100, 500)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"initial": 1.0}, r"initial must be a sparsity in \[0, 1\)"),
        ({"final": -0.1}, "final must be a sparsity"),
        ({"final": float("nan")}, "final must be a sparsity"),
        ({"total": 0}, "total must be an int of at least 1"),
        ({"interval": 0}, "interval must be"),
        ({"warmup": -1}, "warmup must be"),
        ({"warmup": 5, "cooldown": 5}, "must leave a step of the 10"),
    ],
)
def test_schedules_that_cannot_be_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        BudgetSchedule(**{"initial": 0.5, "final": 0.9, "total": 10, **settings})
