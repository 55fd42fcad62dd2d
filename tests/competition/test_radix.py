"""Selection by counting digits, against sorting, where the digits are the first, the second and the last."""

from __future__ import annotations

import itertools

import pytest
import torch

from snell.competition import radix


def magnitudes(dtype: torch.dtype) -> torch.Tensor:
    """Finite numbers whose bits are all combinations of digits at the ends of their range."""
    bits, width = (torch.int32, 31) if dtype == torch.float32 else (torch.int64, 63)
    digits = []
    for top in range(width, 0, -radix.DIGIT_BITS):
        size = min(radix.DIGIT_BITS, top)
        digits.append([digit << (top - size) for digit in (0, 1, 2, (1 << size) - 1)])
    # An exponent of all ones is infinity or NaN.
    digits[0] = digits[0][:3]
    keys = [sum(combination) for combination in itertools.product(*digits)]
    values = torch.tensor(keys, dtype=bits).view(dtype)
    assert values.isfinite().all()
    return values[torch.randperm(len(values))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_is_found_among_numbers_that_share_their_digits(dtype) -> None:
    values = magnitudes(dtype)
    signed = values * torch.randint(0, 2, values.shape).mul(2).sub(1)
    ranked = values.sort().values
    ranks = range(len(values) + 1) if len(values) < 200 else [0, 1, 2, len(values), *range(3, len(values), 97)]
    for k in ranks:
        found = radix.smallest(k, lambda: signed.split(50), values)
        assert found.dtype == dtype
        assert found == (ranked[k - 1] if k else 0), k


def test_a_number_that_is_none_is_larger_than_infinity() -> None:
    values = torch.tensor([float("nan"), -float("inf"), 1.0, -0.0])
    found = [radix.smallest(k, lambda: [values], values).item() for k in range(1, 5)]
    assert found[:3] == [0.0, 1.0, float("inf")]
    assert found[3] != found[3]


def test_what_each_pass_hands_to_the_other_processes_are_the_counts_of_all_its_entries() -> None:
    values = torch.randn(40)
    for k in (1, 30, 40):
        handed: list[torch.Tensor] = []
        radix.smallest(
            k, lambda: values.split(9), values, lambda counts, to=handed: to.append(counts.clone()) or counts
        )
        assert [int(counts.sum()) for counts in handed] == [40] * 3


def test_counts_that_another_process_adds_to_decide() -> None:
    """Two processes of equal pieces: each digit counts twice."""
    values = torch.randn(40)
    ranked = values.abs().sort().values.repeat_interleave(2)
    for k in (1, 2, 3, 41, 80):
        assert radix.smallest(k, lambda: [values], values, lambda counts: 2 * counts) == ranked[k - 1]
