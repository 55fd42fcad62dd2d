"""An exported adapter, applied by the loader that docs/peft.md prints, gives the merged model bit for bit."""

import re

import pytest
import torch
from safetensors.torch import load_file
from small_models import adapted, batch, config, logits, train

from checkout import ROOT
from snell.peft import export_sparse
from snell.peft.snell.export import skips


def loader():
    """The snippet of the page, run where snell is not imported by it."""
    page = (ROOT / "docs" / "peft.md").read_text()
    (source,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "def apply_sparse" in code)
    assert "snell" not in source
    names = {}
    exec(source, names)
    return names["apply_sparse"]


def bits(model):
    return {name: value.clone().contiguous().view(torch.uint8) for name, value in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("start", [False, "identity"])
def test_the_loader_gives_the_merged_model(name, dtype, start, tmp_path):
    model, base = adapted(name, init_weights=start)
    train(model, batch(name))
    model, base = model.to(dtype), base.to(dtype)
    model.base_model._cast_adapter_dtype("default")
    before = bits(model)
    size = export_sparse(model, tmp_path / "sparse")
    assert same(before, bits(model))
    assert 0 < size < (tmp_path / "sparse").stat().st_size
    loader()(base, tmp_path / "sparse")
    assert same(bits(base), bits(model.merge_and_unload()))


def test_modules_to_save_are_exported_whole(tmp_path):
    model, base = adapted("bert", target_modules=["query"], modules_to_save=["classifier"])
    inputs = batch("bert")
    train(model, inputs)
    export_sparse(model, tmp_path / "sparse")
    loader()(base, tmp_path / "sparse")
    assert torch.equal(logits(base, inputs), logits(model.merge_and_unload(), inputs))


def test_one_adapter_of_several_is_exported(tmp_path):
    model, base = adapted("llama")
    model.add_adapter("second", config(r=6, kernel="rbf", target_modules=["q_proj"]))
    export_sparse(model, tmp_path / "sparse", "second")
    assert {key.split(".")[-2] for key in load_file(tmp_path / "sparse")} == {"q_proj"}
    loader()(base, tmp_path / "sparse")
    assert same(bits(base), bits(model.merge_and_unload(adapter_names=["second"])))


@pytest.mark.parametrize("positions", [[], [0], [254], [255], [256], [510], [0, 1, 255, 511, 512, 100_000]])
def test_long_gaps_are_coded(positions, tmp_path):
    coded = skips(torch.tensor(positions, dtype=torch.long)).long()
    reached = torch.where(coded == 255, 255, coded + 1).cumsum(0)[coded != 255] - 1
    assert reached.tolist() == positions


def test_a_survivor_costs_a_byte_and_its_value(tmp_path):
    model, _ = adapted("llama", target_modules=["gate_proj"], sparsity=0.9)
    entries = 2 * 24 * 36
    survivors = sum(int((layer.get_delta_weight("default") != 0).sum()) for _, layer in model._layers("default"))
    assert survivors == pytest.approx(0.1 * entries, rel=0.05)
    assert export_sparse(model, tmp_path / "sparse") == 5 * survivors


def test_what_cannot_be_exported_is_refused(tmp_path):
    model, _ = adapted("bert")
    with pytest.raises(ValueError, match="adapter_name must be one of a SNELL adapter; got 'nobody'"):
        export_sparse(model, tmp_path / "sparse", "nobody")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        export_sparse(model, tmp_path / "sparse")
    biased, _ = adapted("bert", bias="all")
    with pytest.raises(ValueError, match="bias='all'"):
        export_sparse(biased, tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()
