"""Quantised bases: bitsandbytes 8-bit and 4-bit and torchao int8 weight-only run on a CPU where they are installed.

An opaque layer that stands for every other quantisation is in test_layer.py.
"""

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from small_models import TOKENS, VOCABULARY, config, logits, train

from snell import reference
from snell.peft import AdaptedLinear

# Half the widest gap between two neighbouring levels, as a share of the largest weight of a block.
STEP = {"bnb8": 1 / 254 + 2**-11, "bnb4": 1 / 6, "torchao": 1 / 254}


def settings(kind: str):
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        return tf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "bnb8":
        return tf.BitsAndBytesConfig(load_in_8bit=True)
    return tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(params=list(STEP))
def quantised(request, tmp_path):
    """A way to load the same small quantised model again and again, and its kind."""
    quantization = settings(request.param)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128, "num_attention_heads": 4}
    tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCABULARY, **sizes, **TOKENS)).save_pretrained(tmp_path / "base")

    def load():
        arguments = {"quantization_config": copy.deepcopy(quantization), "device_map": "cpu"}
        return tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **arguments).eval()

    return request.param, load


def inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, VOCABULARY, (2, 7))
    return {"input_ids": tokens, "labels": tokens}


def adapters(model: torch.nn.Module) -> list[AdaptedLinear]:
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def dense(layer: torch.nn.Module) -> torch.Tensor:
    """The weight a quantised layer multiplies by, found by asking it: unit vectors in, columns out."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).T.double()


def test_a_quantised_base_is_adapted_trained_saved_and_loaded(quantised, tmp_path):
    _, load = quantised
    base, batch = load(), inputs()
    untouched = logits(base, batch)
    model = get_peft_model(base, config(sparsity=0.5)).eval()
    assert len(adapters(model)) == 7
    layer, x = adapters(model)[0], torch.randn(3, 64)
    assert layer.snell_A["default"].weight.dtype == torch.float32
    spec, update = layer.snell_spec["default"], layer._update("default")
    A, B, theta = (t.detach().double() for t in update[:3])
    share = reference.snell_linear(
        x.double(),
        torch.zeros(64, 64).double(),
        None,
        A,
        B,
        theta,
        sparsity=spec.sparsity,
        kernel=spec.kernel,
        groups=spec.groups,
        gate=spec.gate,
    )
    # bitsandbytes answers in half precision where its 8-bit kernel computes there.
    torch.testing.assert_close((layer(x) - layer.base_layer(x)).double(), share, rtol=1e-3, atol=2e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), untouched)
    losses = train(model, batch, steps=6)
    assert losses[-1] < losses[0]
    tuned = logits(model, batch)
    # On some CPUs bitsandbytes packs 4-bit weights anew when they are saved, and rounds them otherwise then.
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, batch), tuned)


def test_merging_quantises_anew_and_unmerging_returns_the_bits(quantised):
    kind, load = quantised
    model, batch = get_peft_model(load(), config()).eval(), inputs()
    tuned = logits(model, batch)
    targets = [dense(layer.base_layer) + layer.get_delta_weight("default").double() for layer in adapters(model)]
    model.merge_adapter(safe_merge=True)
    for layer, target in zip(adapters(model), targets, strict=True):
        error = (dense(layer.base_layer) - target).abs().max()
        # Blocks are rows or parts of them; what the base had lost to rounding it has lost already.
        assert error <= 1.05 * STEP[kind] * target.abs().max(), error / target.abs().max()
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch), tuned)
