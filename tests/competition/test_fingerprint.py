"""128 bits that tell tensors apart by what they hold."""

from __future__ import annotations

import pytest
import torch

from snell import native
from snell.competition import memo


@pytest.fixture(params=["native", "hashlib"])
def words(request, monkeypatch):
    """The fingerprint as two words of 64 bits."""
    if request.param == "native":
        if not native.available():
            pytest.skip("the native library was not built")
        return memo.fingerprint
    monkeypatch.setattr(native, "available", lambda: False)

    def both(*tensors):
        digest = memo.fingerprint(*tensors)
        assert len(digest) == 16
        return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")

    return both


def test_each_word_alone_changes_with_every_byte(words) -> None:
    # 101 bytes: whole blocks of 32 and a rest.
    content = torch.randint(0, 256, (101,), dtype=torch.uint8)
    seen = [words(content)]
    for place in range(len(content)):
        other = content.clone()
        other[place] ^= 1 << place % 8
        seen.append(words(other))
    first, second = zip(*seen, strict=True)
    assert len(set(first)) == len(set(second)) == len(seen)
    assert not set(first) & set(second)


def test_half_of_the_bits_change_with_one(words) -> None:
    content = torch.zeros(64, dtype=torch.uint8)
    flipped = []
    for bit in range(512):
        other = content.clone()
        other[bit // 8] = 1 << bit % 8
        pairs = zip(words(content), words(other), strict=True)
        flipped.append(sum((one ^ another).bit_count() for one, another in pairs))
    # Of 128 bits 64 flip, with a standard deviation of 5.7.
    assert min(flipped) > 30
    assert max(flipped) < 98
    assert sum(flipped) / len(flipped) == pytest.approx(64, abs=2)


def test_zeros_of_other_lengths_differ(words) -> None:
    assert len({words(torch.zeros(count, dtype=torch.uint8)) for count in range(100)}) == 100


def test_order_counts(words) -> None:
    one, other = torch.randn(2, 16)
    assert words(one, other) != words(other, one)
    assert words(one, other) == words(one.clone(), other.clone())
