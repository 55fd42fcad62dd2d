"""``PeftMixedModel``: adapters of several tuners on one base, in any order."""

import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    ShiraConfig,
    get_peft_model,
)
from small_models import batch, build, logits

from snell.peft import RedConfig, SnellConfig

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
KINDS = {
    "SNELL": SnellConfig(r=4, init_weights=False, **TARGETS),
    "RED": RedConfig(init_weights=False, **TARGETS),
    "LoRA": LoraConfig(r=4, init_lora_weights=False, **TARGETS),
    "LoHa": LoHaConfig(r=4, init_weights=False, **TARGETS),
    "LoKr": LoKrConfig(r=4, init_weights=False, **TARGETS),
    "AdaLoRA": AdaLoraConfig(init_r=4, total_step=1, init_lora_weights=False, **TARGETS),
    "SHiRA": ShiraConfig(r=2, init_weights=False, **TARGETS),
    "OFT": OFTConfig(oft_block_size=4, init_weights=False, **TARGETS),
}
PAIRS = [("SNELL", "LoRA"), ("LoRA", "SNELL"), ("SNELL", "LoHa"), ("RED", "SNELL"), ("LoRA", "RED"), ("OFT", "SNELL")]
PAIRS += [("SNELL", "LoKr"), ("SNELL", "AdaLoRA"), ("SHiRA", "SNELL")]


@pytest.fixture(scope="module")
def base():
    return build("llama")


@pytest.fixture(scope="module")
def inputs():
    return batch("llama")


def mixed(base, *kinds: str) -> PeftMixedModel:
    """A mixed model whose adapters have their kinds' names, all active."""
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(KINDS[kinds[0]]), adapter_name=kinds[0], mixed=True)
    for kind in kinds[1:]:
        model.add_adapter(kind, copy.deepcopy(KINDS[kind]))
    model.set_adapter(list(kinds))
    return model.eval()


def alone(model: PeftMixedModel, base, kind: str):
    """An unmixed model with the mixed one's adapter of that kind."""
    single = get_peft_model(copy.deepcopy(base), copy.deepcopy(KINDS[kind]), adapter_name=kind).eval()
    ours = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if kind in name.split(".")}
    theirs = {name.replace(".base_layer", ""): p for name, p in single.named_parameters() if kind in name.split(".")}
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    return single


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_each_adapter_of_a_mixture_works_alone(kinds, base, inputs):
    model = mixed(base, *kinds)
    both, seen = logits(model, inputs), [logits(base, inputs)]
    for kind in kinds:
        model.set_adapter(kind)
        seen.append(logits(model, inputs))
        torch.testing.assert_close(seen[-1], logits(alone(model, base, kind), inputs), rtol=1e-5, atol=1e-5)
    assert all((both - one).abs().max() > 1e-4 for one in seen)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), seen[0])


@pytest.mark.parametrize("kinds", [*PAIRS, ("SNELL", "LoRA", "RED")], ids="-".join)
def test_a_mixture_merges(kinds, base, inputs):
    model = mixed(base, *kinds)
    both = logits(model, inputs)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), both, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in merged.named_modules() if "base_layer" in name]


@pytest.mark.parametrize("kinds", [("SNELL", "LoRA"), ("LoRA", "SNELL"), ("RED", "SNELL")], ids="-".join)
def test_a_mixture_trains_its_active_adapters_and_nothing_else(kinds, base, inputs):
    model = mixed(base, *kinds)
    model.train()(**inputs).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {kind for kind in kinds if any(kind in name.split(".") for name in trained)} == set(kinds)
    assert all(any(kind in name.split(".") for kind in kinds) for name in trained)
    assert all(p.grad.any() for name, p in model.named_parameters() if name in trained)


def test_an_adapter_is_deleted_from_a_mixture(base, inputs):
    model = mixed(base, "LoRA", "SNELL")
    model.set_adapter("LoRA")
    expected = logits(model, inputs)
    model.set_adapter(["LoRA", "SNELL"])
    model.delete_adapter("SNELL")
    assert torch.equal(logits(model, inputs), expected)
    assert list(model.peft_config) == ["LoRA"]


def test_a_saved_adapter_joins_a_mixture(base, inputs, tmp_path):
    saved = get_peft_model(copy.deepcopy(base), KINDS["SNELL"]).eval()
    saved.save_pretrained(tmp_path)
    model = mixed(base, "LoRA")
    model.load_adapter(str(tmp_path), "SNELL")
    model.set_adapter("SNELL")
    torch.testing.assert_close(logits(model, inputs), logits(saved, inputs), rtol=1e-5, atol=1e-5)
    first = PeftMixedModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(logits(first, inputs), logits(saved, inputs))


def test_other_tuners_are_refused_as_before(base):
    with pytest.raises(ValueError, match=r"BOFT.* is not compatible with the `PeftMixedModel`.*SNELL"):
        get_peft_model(copy.deepcopy(base), BOFTConfig(**TARGETS), mixed=True)
