"""Settings are checked once, and each bad one is named."""

import math

import pytest

from snell.kernel_functions import KERNEL_FUNCTIONS
from snell.spec import GATES, Spec


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("rank", 0, ValueError),
        ("rank", -4, ValueError),
        ("rank", 8.0, TypeError),
        ("rank", True, TypeError),
        ("rank", "8", TypeError),
        ("rank", 9, ValueError),
        ("groups", 0, ValueError),
        ("groups", 3, ValueError),
        ("groups", 2.0, TypeError),
        ("groups", None, TypeError),
        ("sparsity", -0.1, ValueError),
        ("sparsity", 1.0, ValueError),
        ("sparsity", 1, ValueError),
        ("sparsity", 90, ValueError),
        ("sparsity", math.nan, ValueError),
        ("sparsity", math.inf, ValueError),
        ("sparsity", "0.9", TypeError),
        ("sparsity", None, TypeError),
        ("sparsity", True, TypeError),
        ("kernel", "gauss", ValueError),
        ("kernel", None, ValueError),
        ("kernel", ["linear"], ValueError),
        ("gate", "firm", ValueError),
        ("gate", 1, ValueError),
    ],
)
def test_a_bad_setting_is_named(argument, value, error):
    good = {"rank": 8, "sparsity": 0.9, "kernel": "piecewise_linear", "groups": 2, "gate": "soft"}
    with pytest.raises(error, match=argument) as caught:
        Spec(**{**good, argument: value})
    # It says what came, too.
    assert repr(value) in str(caught.value) or str(float(value)) in str(caught.value)


def test_rank_and_groups_that_do_not_fit_say_what_would():
    with pytest.raises(ValueError, match=r"rank=10, groups=4.*rank of 12"):
        Spec(10, 0.9, groups=4)


@pytest.mark.parametrize("choices, argument", [(KERNEL_FUNCTIONS, "kernel"), (GATES, "gate")])
def test_an_unknown_name_is_told_the_known_ones(choices, argument):
    with pytest.raises(ValueError) as caught:
        Spec(8, 0.9, **{argument: "?"})
    assert all(name in str(caught.value) for name in choices)


def test_the_scale_at_the_start_goes_by_the_gate_that_applies():
    assert [Spec(8, 0.9, gate=gate).default_scale for gate in ("soft", "magnitude", "hard")] == [3.0, 3.0, 0.1]
    assert Spec(8, 0.0, gate="soft").default_scale == Spec(8, 0.0, gate="hard").default_scale == 0.1


@pytest.mark.parametrize("scale", ["0.1", None, True])
def test_scale_is_a_number(scale):
    with pytest.raises(TypeError, match="scale"):
        Spec(8, 0.9).initial_theta(scale)


@pytest.mark.parametrize(
    "sparsity, entries, zeroed",
    [
        (0.0, 100, 0),
        (0.5, 7, 4),
        (0.9, 10, 9),
        (0.9, 1, 1),
        (0.999, 1, 1),
        (1e-9, 100, 1),
        (0.9, 128256 * 28672, 3309620429),
        (math.nextafter(1.0, 0.0), 100, 100),
    ],
)
def test_the_number_of_losers_is_the_ceiling(sparsity, entries, zeroed):
    assert Spec(8, sparsity).num_zeroed(entries) == zeroed


def test_theta_starts_where_kappa_of_nothing_is_zero():
    scale = 0.3
    alpha, beta, gamma = Spec(8, 0.9, "sigmoid").initial_theta(scale)
    assert alpha / (1 + math.exp(-beta * 0.0)) + gamma == 0
    alpha, beta, gamma = Spec(8, 0.9, "rbf").initial_theta(scale)
    assert alpha * math.exp(-beta * 0.0) + gamma == 0
    assert Spec(9, 0.9, groups=3).initial_theta(scale) == [scale, -scale, scale]
    assert Spec(8, 0.9, "linear").initial_theta(scale) == []


@pytest.mark.parametrize("kernel", KERNEL_FUNCTIONS)
def test_num_theta_counts_them(kernel):
    spec = Spec(12, 0.9, kernel, 3)
    assert spec.num_theta == len(spec.initial_theta(1.0)) == {"linear": 0, "mixture": 6}.get(kernel, 3)


def test_nothing_competes_without_sparsity():
    assert Spec(8, 0, gate="hard").effective_gate == "none"
    assert Spec(8, 1e-12, gate="hard").effective_gate == "hard"
