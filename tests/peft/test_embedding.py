"""Adapters of embeddings: only the ids of a batch are evaluated, and nn.Embedding's options keep their meaning."""

import copy

import pytest
import torch
from peft import get_peft_model
from test_layer import adapt
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from interrupts import at_every_instruction
from snell import functional, reference
from snell.peft import SnellConfig

WORDS, WIDTH, PAD = 23, 10, 4
IDS = torch.tensor([[5, PAD, 5, 0], [22, 7, PAD, 5]])


def embedding(**options) -> nn.Embedding:
    return nn.Embedding(WORDS, WIDTH, padding_idx=PAD, **options)


def reference_delta(layer, A, B, theta, name="default"):
    """dW [words, width] in the factors' dtype, by the definition; the padding's row is 0."""
    spec = layer.snell_spec[name]
    settings = {"kernel": spec.kernel, "groups": spec.groups}
    tau = reference.select_threshold(A.detach(), B.detach(), theta, sparsity=spec.sparsity, **settings)
    delta = reference.merge(A, B, theta, tau, gate=spec.effective_gate, **settings).T
    return delta * (torch.arange(WORDS) != PAD)[:, None]


def leaves(layer, name="default"):
    return [t.detach().double().requires_grad_() for t in layer._parameters_of(name)[:3]]


@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}, {"sparse": True}])
@pytest.mark.parametrize("kernel", ["piecewise_linear", "rbf"])
def test_rows_and_gradients_are_those_of_the_whole_matrix(options, kernel):
    layer = adapt(embedding(**options).double(), kernel=kernel, train_theta=True, sparsity=0.6)
    weights = torch.randn(*IDS.shape, WIDTH, dtype=torch.float64)
    y = layer(IDS)
    (y * weights).sum().backward()

    A, B, theta = leaves(layer)
    table = layer.base_layer.weight.detach() + reference_delta(layer, A, B, theta)
    target = F.embedding(IDS, table, PAD, scale_grad_by_freq=options.get("scale_grad_by_freq", False))
    torch.testing.assert_close(y, target, rtol=1e-12, atol=1e-12)
    assert not torch.equal(y, layer.base_layer(IDS))
    (target * weights).sum().backward()
    grads = [getattr(layer, f"snell_{factor}")["default"].weight.grad for factor in ("A", "B", "theta")]
    assert grads[0].is_sparse == options.get("sparse", False)
    for ours, theirs in zip(grads, (A, B, theta), strict=True):
        torch.testing.assert_close(ours.to_dense(), theirs.grad, rtol=1e-9, atol=1e-12)
    assert grads[0].to_dense()[5].any()
    assert not grads[0].to_dense()[PAD].any()


def test_a_softmax_over_the_whole_column_is_kept():
    layer = adapt(embedding().double(), kernel="mixture", sparsity=0.6)
    whole = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.equal(layer(IDS), whole[IDS])
    layer(IDS).sum().backward()
    own = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
    layer.zero_grad()
    F.embedding(IDS, functional.dense(layer._update("default")).T, PAD).sum().backward()
    for grad, parameter in zip(own, [p for p in layer.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_each_id_is_evaluated_once_and_no_other(monkeypatch):
    layer, shapes, dense = adapt(embedding()), [], functional.dense

    def watched(update, *rest):
        shapes.append(update.shape)
        return dense(update, *rest)

    monkeypatch.setattr(functional, "dense", watched)
    layer(IDS)
    assert shapes == [(WIDTH, len(set(IDS.flatten().tolist())))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [False, True, "identity"])
@pytest.mark.parametrize("padding", [None, 0, PAD, WORDS - 1])
def test_merging_gives_the_same_bits_and_unmerging_the_old_ones(dtype, start, padding):
    base = nn.Embedding(WORDS, WIDTH, padding_idx=padding).to(dtype)
    before = base.weight.detach().clone()
    layer = adapt(base, init_weights=start)
    if start == "identity":
        assert torch.equal(layer(IDS), base(IDS))
        with torch.no_grad():
            layer.snell_B["default"].weight.mul_(3)
    every = torch.arange(WORDS)
    y, some, delta = layer(every), layer(IDS), layer.get_delta_weight("default")
    assert delta.any()
    assert y.dtype == dtype
    layer.merge(safe_merge=True)
    assert torch.equal(layer(every), y)
    assert torch.equal(layer(IDS), some)
    assert torch.equal(base.weight, (before + delta).to(dtype))
    assert padding is None or torch.equal(base.weight[padding], before[padding])
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_an_interrupt_leaves_the_weight_merged_or_not():
    layer = adapt(embedding())
    weight = layer.base_layer.weight
    states = {False: weight.detach().clone()}
    layer.merge()
    states[True] = weight.detach().clone()
    for merged, work, again in ((True, layer.unmerge, layer.merge), (False, layer.merge, layer.unmerge)):
        assert layer.merged == merged
        for instruction in at_every_instruction(work):
            assert torch.equal(weight, states[layer.merged]), (work.__name__, instruction)
            if layer.merged != merged:
                again()
            assert torch.equal(weight, states[merged]), (work.__name__, instruction)


def test_several_adapters_add_up_and_each_sample_may_have_its_own():
    model = get_peft_model(nn.Sequential(embedding()), SnellConfig(r=4, target_modules=["0"], init_weights=False))
    model.add_adapter("other", SnellConfig(r=6, kernel="rbf", target_modules=["0"], init_weights=False))
    model.eval()
    layer, plain = model.base_model.model[0], model.base_model.model[0].base_layer(IDS)
    alone = {"__base__": plain}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(IDS)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(IDS), alone["default"] + alone["other"] - plain)
    both = layer(IDS)
    layer.merge()
    assert torch.equal(layer(IDS), both)
    layer.unmerge()
    ids, names = IDS[[0, 1, 0]], ["other", "__base__", "default"]
    rows = torch.stack([alone[name][row] for name, row in zip(names, (0, 1, 0), strict=True)])
    torch.testing.assert_close(model(ids, adapter_names=names), rows)
    with model.disable_adapter():
        assert torch.equal(model(IDS), plain)


def test_a_scaled_embedding_scales_its_update():
    base = Gemma3TextScaledWordEmbedding(WORDS, WIDTH, PAD, embed_scale=3.0)
    layer = adapt(base)
    y = layer(IDS)
    assert not torch.equal(y, base(IDS))
    layer.merge()
    torch.testing.assert_close(y, layer(IDS))


def test_dropout_leaves_ids_alone():
    layer = adapt(Gemma3TextScaledWordEmbedding(WORDS, WIDTH, PAD, embed_scale=3.0), dropout=0.9)
    y = layer(IDS)
    assert torch.equal(layer.train()(IDS), y)


def test_no_ids_give_no_rows():
    layer = adapt(embedding())
    y = layer(IDS[:0])
    assert y.shape == (0, IDS.shape[1], WIDTH)
    y.sum().backward()


def test_an_embedding_that_rewrites_its_weight_is_refused():
    with pytest.raises(ValueError, match=r"max_norm=2\.0 cannot be adapted"):
        adapt(embedding(max_norm=2.0))


def test_the_layer_compiles_whole():
    layer = adapt(embedding())
    twin = copy.deepcopy(layer)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(IDS)
    assert torch.equal(y, twin(IDS))
    y.square().sum().backward()
    twin(IDS).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad)
