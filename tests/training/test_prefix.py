"""Backward stops at the lowest layer that trains, whatever asks for gradients further down."""

import copy
import re
from contextlib import contextmanager

import pytest
import torch
from small_models import batch
from tuned import adamw, freezing, lowest, tuned

from snell.peft import AdaptedLinear

CHECKPOINTING = {"plain": None, "input gradients": None, "reentrant": True, "not reentrant": False}


def prepared(name: str, mode: str, tuner: str = "snell"):
    model = tuned(tuner, name)
    if mode == "input gradients":
        model.enable_input_require_grads()
    elif mode != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[mode]})
        model.enable_input_require_grads()
    return model


def blocks(model, name):
    inner = model.base_model.model
    return {"llama": lambda: inner.model.layers, "bert": lambda: inner.bert.encoder.layer}[name]()


class Seen:
    """Of a module: how often it ran, how many tensors were saved within it, and whether its input wanted a gradient."""

    def __init__(self, module):
        self.calls, self.saved, self.wanted, self.inside = 0, 0, [], False
        self.handles = [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.leave),
        ]

    def enter(self, module, args, kwargs):
        self.calls, self.inside = self.calls + 1, True
        self.wanted.append((args[0] if args else kwargs["hidden_states"]).requires_grad)

    def leave(self, *_):
        self.inside = False


@contextmanager
def watched(*modules):
    seen = [Seen(module) for module in modules]

    def pack(tensor):
        for each in seen:
            each.saved += each.inside
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen
    for each in seen:
        for handle in each.handles:
            handle.remove()


def gradients(model, inputs):
    torch.manual_seed(7)
    loss = model(**inputs).loss
    loss.backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("tuner", ["snell", "lora"])
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_a_frozen_prefix_stops_backward(mode, name, tuner):
    model, inputs = prepared(name, mode, tuner), batch(name, 4)
    number = sum("layer.0." in n or "layers.0." in n for n in freezing(model, adamw(model)).adapters)
    share = (number + 0.5) / len(freezing(model, adamw(model)).adapters)
    frozen = freezing(model, adamw(model), batch=inputs, share=share, end=0.1, importance=lowest(number), fold=False)
    first, second = blocks(model, name)

    with watched(first) as (before,):
        reference = gradients(model, inputs)
    assert before.saved > 0 or mode == "not reentrant"  # whose own hooks keep the tensors from these
    assert len(frozen.check(1)) == number

    with watched(first, second) as (below, above):
        found = gradients(model, inputs)
    assert below.calls == 1  # and none in backward
    assert below.saved == 0
    assert not first.gradient_checkpointing  # which, in older transformers, runs what is to pass without gradients
    assert above.wanted[0] is (mode == "reentrant")  # whose checkpoints pass gradients only where an input wants one
    assert found.keys() == {key for key in reference if not re.search(r"layers?\.0\.", key)}
    assert found
    for key, gradient in found.items():
        assert torch.equal(gradient, reference[key]), key


@pytest.mark.parametrize("mode", ["input gradients", "not reentrant"])
def test_a_prefix_within_a_block_stops_backward_too(mode):
    model, inputs = prepared("llama", mode), batch("llama", 4)
    frozen = freezing(model, adamw(model), batch=inputs, share=0.25, end=0.1, importance=lowest(3), fold=False)
    reference = gradients(model, inputs)
    frozen.check(1)
    first = blocks(model, "llama")[0]
    with watched(first, first.self_attn, first.self_attn.o_proj) as (block, attention, above):
        found = gradients(model, inputs)
    assert not block.wanted[0]
    assert not any(above.wanted)
    assert attention.saved == above.saved  # by the layer that trains, and nothing below it
    assert above.saved > 0 or mode == "not reentrant"
    assert len(reference) - len(found) == 6
    assert all(torch.equal(gradient, reference[key]) for key, gradient in found.items())


def test_embeddings_that_train_keep_backward_going():
    model, inputs = prepared("llama", "input gradients"), batch("llama", 4)
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    frozen = freezing(model, adamw(model), batch=inputs, share=0.5, end=0.1, importance=lowest(7))
    assert len(frozen.check(1)) == 7
    gradients(model, inputs)
    model(**inputs).loss.backward()
    assert embeddings.grad.any()


@pytest.mark.parametrize("mode", ["input gradients", "reentrant", "not reentrant"])
def test_the_cut_moves_up(mode):
    model, inputs = prepared("llama", mode), batch("llama", 4)
    order = iter([*range(14), *range(3, 14), *range(7, 14)])  # who froze at a check is not measured at the next
    frozen = freezing(model, adamw(model), batch=inputs, share=1.0, importance=lambda *_: 0.01 * next(order))
    for step, level in ((1, 3), (2, 7), (3, 10)):  # within the first block, the whole of it, within the second one
        frozen.schedule = type(frozen.schedule)(share=level / 14, warmup=0, end=0.1)
        assert len(frozen.check(step)) == level - sum(facts["step"] < step for facts in frozen.frozen.values())
        first, second = blocks(model, "llama")
        lowest_one = first.self_attn.o_proj if step == 1 else second.self_attn.q_proj if step == 2 else second.self_attn
        with watched(first, lowest_one) as (block, layer):
            found = gradients(model, inputs)
        assert found
        if step > 1:
            assert (block.calls, block.saved) == (1, 0)
        if mode != "reentrant":
            assert not any(layer.wanted)


def test_an_error_amid_the_prefix_leaves_gradients_on():
    model, inputs = prepared("llama", "input gradients"), batch("llama", 4)
    frozen = freezing(model, adamw(model), batch=inputs, share=0.5, end=0.1, importance=lowest(7))
    frozen.check(1)
    with pytest.raises(RuntimeError, match="amid the prefix"), failing(blocks(model, "llama")[0].mlp):
        model(**inputs)
    assert torch.is_grad_enabled()
    assert model(**inputs).loss.requires_grad


@contextmanager
def failing(module):
    def fail(*_):
        raise RuntimeError("amid the prefix")

    handle = module.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("mode", ["input gradients", "reentrant", "not reentrant"])
def test_a_second_run_of_the_same_model_cuts_again(mode):
    model, inputs = prepared("llama", mode), batch("llama", 4)
    for count in (7, 2):  # the first block, then two layers of the second one
        share = (count + 0.1) / sum(any(p.requires_grad for p in layer.parameters()) for layer in adapted_layers(model))
        frozen = freezing(model, adamw(model), batch=inputs, share=share, end=0.1, importance=lowest(count), fold=False)
        reference = gradients(model, inputs)
        assert len(frozen.check(1)) == count
        first, _ = blocks(model, "llama")
        with watched(first) as (below,):
            found = gradients(model, inputs)
        assert torch.is_grad_enabled()
        assert (below.calls, below.saved) == (1, 0)
        assert len(found) == len(reference) - 2 * count
        assert all(torch.equal(gradient, reference[key]) for key, gradient in found.items())


def adapted_layers(model):
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def test_a_copy_trains_as_its_original():
    model, inputs = prepared("llama", "reentrant"), batch("llama", 4)
    frozen = freezing(model, adamw(model), batch=inputs, share=0.5, end=0.1, importance=lowest(7))
    frozen.check(1)
    twin = copy.deepcopy(model)
    ours, theirs = gradients(twin, inputs), gradients(model, inputs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
