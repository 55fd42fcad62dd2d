"""The level rises by a cubic between the ends that the arguments set, and says who freezes."""

import re

import pytest

from snell.training import Schedule


@pytest.mark.parametrize("kind", ["threshold", "share"])
def test_the_level_rises_from_the_initial_to_the_final_one(kind):
    schedule = Schedule(**{kind: 0.6}, initial=0.2, warmup=0.1, end=0.5)
    assert schedule.level(0.1, 0.1) == pytest.approx(0.2)
    assert schedule.level(0.3, 0.1) == pytest.approx(0.2 + 7 / 8 * (0.6 - 0.2))
    assert schedule.level(0.5, 0.1) == schedule.level(0.9, 0.1) == 0.6
    levels = [schedule.level(0.1 + i / 100, 0.1) for i in range(60)]
    assert levels == sorted(levels)


def test_a_warm_up_that_lasts_beyond_the_end_leaves_the_final_level():
    assert Schedule(threshold=0.6, end=0.5).level(0.8, 0.8) == 0.6


def test_who_freezes():
    importances = {"a": 0.3, "b": 0.1, "c": 1.0, "d": 0.0}
    by_threshold, by_share = Schedule(threshold=1.0), Schedule(share=1.0)
    assert by_threshold.to_freeze(importances, 0.3, 0, 4) == ["d", "b", "a"]
    assert by_threshold.to_freeze(importances, 1.0, 0, 4) == ["d", "b", "a", "c"]
    assert by_threshold.to_freeze(importances, 0.0, 0, 4) == []  # also one that changes nothing yet, as a fresh LoRA
    assert by_share.to_freeze(importances, 0.7, 6, 10) == ["d"]  # 0.7 * 10 < 7 in floating point
    assert by_share.to_freeze(importances, 0.5, 6, 10) == []
    assert by_share.to_freeze(importances, 0.74, 0, 4) == ["d", "b"]
    assert by_share.to_freeze(importances, 0.4, 0, 10) == ["d", "b", "a", "c"]  # six are not reached by the batch


def test_half_of_the_adapters_freeze_unless_told_otherwise():
    assert (Schedule().kind, Schedule().final) == ("share", 0.5)
    assert (Schedule(threshold=0.1).kind, Schedule(threshold=0.1).final) == ("threshold", 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold must be a number in [0, 1]; got 1.5"),
        ({"threshold": -0.1}, "threshold must be a number in [0, 1]; got -0.1"),
        ({"threshold": float("nan")}, "threshold must be a number in [0, 1]; got nan"),
        ({"threshold": True}, "threshold must be a number in [0, 1]; got True"),
        ({"share": "half"}, "share must be a number in [0, 1]; got 'half'"),
        ({"warmup": 10}, "warmup must be a number in [0, 1]; got 10"),
        ({"tolerance": -1}, "tolerance must be a number in [0, 1]; got -1"),
        ({"threshold": 0.1, "share": 0.5}, "give threshold or share, not both; got 0.1 and 0.5"),
        ({"warmup": 0.6, "end": 0.5}, "warmup must not be after end; got 0.6 and 0.5"),
        ({"threshold": 0.1, "initial": 0.2}, "initial must be at most the final threshold, 0.1; got 0.2"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(**arguments)
