"""Masks, banks and their mixtures, against plain PyTorch."""

import itertools

import pytest
import torch

from snell import counter
from snell.peft.xpeft.bank import random_source
from snell.peft.xpeft.masks import chosen, mix, weights


def softmax_gradient(logits, grad):
    logits = logits.detach().requires_grad_()
    torch.softmax(logits, -1).backward(grad)
    return logits.grad


@pytest.mark.parametrize("mean", [True, False])
def test_a_hard_mask_chooses_k_and_has_the_gradient_of_the_softmax(mean):
    logits = torch.randn(3, 9, requires_grad=True)
    found = weights(logits, 4, mean)
    assert (found > 0).sum(-1).tolist() == [4, 4, 4]
    assert found[found > 0].unique().tolist() == [0.25 if mean else 1.0]
    assert found.max(-1).values.gt(0).all()
    assert ((found > 0) == (logits >= logits.topk(4).values[:, -1:])).all()
    grad = torch.randn(3, 9)
    found.backward(grad)
    assert logits.grad.equal(softmax_gradient(logits, grad))


def test_of_equal_logits_the_lowest_index_is_chosen():
    assert chosen(torch.zeros(5), 2).tolist() == [True, True, False, False, False]
    assert chosen(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), 3).tolist() == [True, True, False, True, False]


def test_all_chosen_is_the_plain_sum_or_mean():
    logits = torch.randn(1, 7)
    assert weights(logits, 7, mean=False).equal(torch.ones(1, 7))
    assert weights(logits, 7, mean=True).equal(torch.full((1, 7), 1 / 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("chunk", [1, 2**21])
def test_a_mixture_and_its_gradient_are_those_of_one_product(dtype, sparse, chunk, monkeypatch):
    monkeypatch.setattr("snell.peft.xpeft.masks.CHUNK_BYTES", chunk)
    bank = torch.randn(11, 6, 4).to(dtype)
    w = torch.randn(3, 11) * (torch.rand(3, 11) < 0.4)
    w[:, 5] = 0
    w.requires_grad_()
    out = mix(w, bank, sparse)
    wide = bank.double().flatten(1)
    torch.testing.assert_close(out.double(), (w.double() @ wide).view(3, 6, 4), rtol=1e-5, atol=1e-5)
    grad = torch.randn(3, 6, 4)
    out.backward(grad)
    torch.testing.assert_close(w.grad.double(), grad.double().flatten(1) @ wide.t(), rtol=1e-5, atol=1e-5)
    assert w.grad[:, 5].abs().min() > 0  # an adapter that nobody uses has a gradient too


def test_a_mixture_has_no_second_gradient_for_the_bank():
    bank = torch.randn(3, 2, 2)
    assert torch.autograd.gradcheck(
        lambda w: mix(w, bank.double()), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    )


def test_duplicates_may_change_places():
    bank = torch.randn(4, 5, 3)
    bank[2] = bank[0]
    w = torch.softmax(torch.randn(1, 4), -1)
    torch.testing.assert_close(mix(w, bank), mix(w[:, [2, 1, 0, 3]], bank))


def test_one_adapter_has_all_the_weight_and_a_large_logit_nearly_so():
    bank = torch.randn(1, 5, 3)
    assert mix(weights(torch.randn(1, 1), None, True), bank)[0].equal(bank[0])
    bank = torch.randn(6, 5, 3)
    logits = torch.zeros(1, 6)
    logits[0, 4] = 1000.0
    assert mix(weights(logits, None, True), bank)[0].equal(bank[4])


def test_a_bank_of_zeros_gives_no_gradient():
    logits = torch.randn(1, 6, requires_grad=True)
    mix(weights(logits, 3, True), torch.zeros(6, 5, 3)).sum().backward()
    assert not logits.grad.any()


def bank_of(module="a", seed=0, num=5, dtype=torch.float32):
    return random_source(seed, num, 3, 1, dtype).bank(module, 7, 4).on(torch.device("cpu"))


def test_a_random_bank_is_its_seed_alone():
    first = bank_of()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    again = bank_of()
    torch.set_num_threads(threads)
    assert all(map(torch.equal, first, again))
    assert counter.uniform(3, 42, first=5).tolist() == [uniform(42, place) for place in (5, 6, 7)]


def uniform(seed, place):
    """The same number of SplitMix64 by Python's integers."""
    z = seed + (place + 1) * 0x9E3779B97F4A7C15 & 2**64 - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ z >> shift) * factor & 2**64 - 1
    z ^= z >> 31
    return (2 * (z >> 40) + 1 - 2**24) / 2**24


def test_adapters_layers_and_seeds_of_a_random_bank_differ():
    banks = [bank_of(), bank_of("b"), bank_of(seed=1)]
    rows = [row for bank in banks for factor in bank for row in factor]
    assert not any(one.shape == other.shape and one.equal(other) for one, other in itertools.combinations(rows, 2))
    longer = bank_of(num=8)
    assert all(part.equal(factor[:5]) for part, factor in zip(banks[0], longer, strict=True))


def test_a_mean_over_a_random_bank_is_as_large_as_one_adapter():
    source = random_source(0, 64, 8, 64, torch.float32)
    A, B = (factor.mean(0) for factor in source.bank("a", 400, 300).on(torch.device("cpu")))
    assert A.var().item() == pytest.approx(1 / (3 * 400), rel=0.1)
    assert B.var().item() == pytest.approx(1 / (3 * 8), rel=0.1)
