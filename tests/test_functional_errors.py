"""Bad input gets an error that names the argument."""

from __future__ import annotations

import pytest
import torch

from snell import SnellLinear, functional

PIECEWISE = {"kernel": "piecewise_linear", "groups": 2}


def good() -> dict:
    A, B, theta = torch.randn(14, 6), torch.randn(9, 6), torch.tensor([0.3, -0.3])
    return {
        "x": torch.randn(4, 14),
        "weight": torch.randn(9, 14),
        "bias": torch.randn(9),
        "A": A,
        "B": B,
        "theta": theta,
    }


def bad_factors():
    """(argument named, error, the change), for every function that takes factors."""
    g = good()
    nan = g["A"].clone()
    nan[1, 2] = float("nan")
    return {
        "A is a list": ("A", TypeError, {"A": [[1.0]]}),
        "A is integer": ("A", TypeError, {"A": g["A"].long()}),
        "A is half": ("A", TypeError, {"A": g["A"].bfloat16()}),
        "A is complex": ("A", TypeError, {"A": g["A"].to(torch.complex64)}),
        "A is a vector": ("A", ValueError, {"A": g["A"][0]}),
        "A is empty": ("A", ValueError, {"A": g["A"][:0]}),
        "A has no rank": ("A", ValueError, {"A": g["A"][:, :0]}),
        "B is integer": ("B", TypeError, {"B": g["B"].int()}),
        "B is of another precision": ("B", TypeError, {"B": g["B"].double()}),
        "B is 3-d": ("B", ValueError, {"B": g["B"][None]}),
        "B is empty": ("B", ValueError, {"B": g["B"][:0]}),
        "B is on another device": ("B", ValueError, {"B": g["B"].to("meta")}),
        "B is of another rank": ("B", ValueError, {"B": g["B"][:, :4]}),
        "theta is a number": ("theta", TypeError, {"theta": 0.1}),
        "theta is integer": ("theta", TypeError, {"theta": torch.tensor([1, -1])}),
        "theta is of another precision": ("theta", TypeError, {"theta": g["theta"].double()}),
        "theta is too short": ("theta", ValueError, {"theta": g["theta"][:1]}),
        "theta is for another kernel function": ("theta", ValueError, {"kernel": "rbf"}),
        "theta is 0-d": ("theta", ValueError, {"theta": g["theta"][0]}),
        "groups do not divide the rank": ("groups", ValueError, {"groups": 4}),
        "groups is a float": ("groups", TypeError, {"groups": 2.0}),
        "kernel is unknown": ("kernel", ValueError, {"kernel": "cosine"}),
    }


def bad_selection():
    g = good()

    def with_value(name, value):
        t = g[name].clone()
        t.view(-1)[1] = value
        return {name: t}

    return {
        "sparsity is 1": ("sparsity", ValueError, {"sparsity": 1.0}),
        "sparsity is negative": ("sparsity", ValueError, {"sparsity": -1e-9}),
        "sparsity is NaN": ("sparsity", ValueError, {"sparsity": float("nan")}),
        "sparsity is a tensor": ("sparsity", TypeError, {"sparsity": torch.tensor(0.5)}),
        "A has a NaN": ("A", ValueError, with_value("A", float("nan"))),
        "B has a NaN": ("B", ValueError, with_value("B", float("nan"))),
        "B is infinite": ("B", ValueError, with_value("B", float("-inf"))),
        "theta has a NaN": ("theta", ValueError, with_value("theta", float("nan"))),
    }


def bad_merge():
    return {
        "gate is unknown": ("gate", ValueError, {"gate": "relu"}),
        "tau is a float": ("tau", TypeError, {"tau": 0.5}),
        "tau is of another precision": ("tau", TypeError, {"tau": torch.tensor(0.5).double()}),
        "tau is a vector": ("tau", ValueError, {"tau": torch.ones(1)}),
        "tau is on another device": ("tau", ValueError, {"tau": torch.ones((), device="meta")}),
        "weight is integer": ("weight", TypeError, {"weight": torch.ones(9, 14, dtype=torch.int8)}),
        "weight is a vector": ("weight", ValueError, {"weight": torch.ones(9)}),
        "weight is of another shape": ("weight", ValueError, {"weight": torch.ones(9, 13)}),
        "weight is on another device": ("weight", ValueError, {"weight": torch.ones(9, 14, device="meta")}),
        "A and B are swapped": ("A and B look swapped", ValueError, "swap"),
    }


def bad_layer():
    return {
        "x is a list": ("x", TypeError, {"x": [1.0]}),
        "x is integer": ("x", TypeError, {"x": torch.ones(4, 14, dtype=torch.long)}),
        "x is of another dtype": ("x", TypeError, {"x": torch.randn(4, 14).bfloat16()}),
        "x is of another width": ("x", ValueError, {"x": torch.randn(4, 13)}),
        "x is 0-d": ("x", ValueError, {"x": torch.tensor(1.0)}),
        "x is on another device": ("x", ValueError, {"x": torch.ones(4, 14, device="meta")}),
        "bias is a matrix": ("bias", ValueError, {"bias": torch.ones(1, 9)}),
        "bias is too long": ("bias", ValueError, {"bias": torch.ones(10)}),
        "bias is integer": ("bias", TypeError, {"bias": torch.ones(9, dtype=torch.long)}),
        "bias is on another device": ("bias", ValueError, {"bias": torch.ones(9, device="meta")}),
        "bias is of another dtype": ("bias", TypeError, {"bias": torch.ones(9).bfloat16()}),
    }


def assert_refused(function, arguments, name, error, change):
    if change == "swap":
        change = {"A": arguments["B"], "B": arguments["A"]}
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        function(**{**arguments, **change})
    assert "got" in str(caught.value) or "contains" in str(caught.value)


@pytest.mark.parametrize("case", {**bad_factors(), **bad_selection()})
def test_select_names_the_bad_argument(case):
    g = good()
    arguments = {"A": g["A"], "B": g["B"], "theta": g["theta"], "sparsity": 0.5, **PIECEWISE}
    assert_refused(functional.select_threshold, arguments, *{**bad_factors(), **bad_selection()}[case])


@pytest.mark.parametrize("case", {**bad_factors(), **bad_merge()})
def test_merge_names_the_bad_argument(case):
    g = good()
    arguments = {name: g[name] for name in ("A", "B", "theta", "weight")}
    arguments |= {"tau": torch.tensor(0.1), **PIECEWISE, "gate": "soft"}
    assert_refused(functional.merge, arguments, *{**bad_factors(), **bad_merge()}[case])


@pytest.mark.parametrize("case", {**bad_factors(), **bad_selection(), **bad_merge(), **bad_layer()})
def test_layer_names_the_bad_argument(case):
    arguments = {**good(), "sparsity": 0.5, **PIECEWISE, "gate": "soft"}
    assert_refused(
        functional.snell_linear, arguments, *{**bad_factors(), **bad_selection(), **bad_merge(), **bad_layer()}[case]
    )


def test_integer_x_is_refused_under_autocast_too():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"\bx\b"):
        functional.snell_linear(
            **{**good(), "x": torch.ones(4, 14, dtype=torch.long)}, sparsity=0.5, **PIECEWISE, gate="soft"
        )


def test_transforms_of_torch_func_are_refused():
    layer = SnellLinear(14, 9, rank=6)
    x = torch.randn(4, 14)
    parameters = dict(layer.named_parameters())
    for transformed in (
        lambda: torch.func.vmap(layer)(x),
        lambda: torch.func.jvp(layer, (x,), (x,)),
        lambda: torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(parameters),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.func .*torch\.autograd"):
            transformed()
    assert torch.func.functional_call(layer, parameters, (x,)).equal(layer(x))
