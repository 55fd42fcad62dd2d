"""``snell inspect`` says of a saved adapter what the adapted model holds, and in one sentence what is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1] / "peft"))
from small_models import adapted, batch, build, config, train

from snell import blocks
from snell.cli import main
from snell.cli.adapter import read
from snell.cli.inspect_picture import draw
from snell.cli.rows import measure
from snell.cli.survivors import BINS, share_in_densest_tenth, spread
from snell.functional import dense
from snell.merging import row_blocks
from snell.peft import AdaptedLinear
from snell.spec import Spec
from snell.update import Update


def inspect(folder: Path, *arguments: str):
    out = folder.parent / "out"
    return CliRunner().invoke(main, ["inspect", str(folder), "--out", str(out), *arguments]), out


def layers_of(model) -> dict[str, AdaptedLinear]:
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))
    return {name.removeprefix("base_model.model."): module for name, module in found}


def saved(tmp_path: Path, name: str, **settings):
    """A trained adapter and its base on the disk, and the model that was saved."""
    model, untouched = adapted(name, **settings)
    untouched.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    train(model, batch(name))
    model.save_pretrained(tmp_path / "adapter")
    return model


# "vit": its weights' names on the disk are not its modules'; "gpt2": its weights are stored transposed.
@pytest.mark.parametrize(
    "name, settings",
    [
        ("llama", {"kernel": "sigmoid", "rank_pattern": {"q_proj": 6}, "sparsity_pattern": {"up_proj": 0.3}}),
        ("vit", {"gate": "hard", "scale": 0.3}),
        ("gpt2", {"kernel": "linear", "sparsity": 0.99}),
    ],
)
def test_figures_are_those_of_the_dense_matrices(tmp_path, name, settings):
    model = saved(tmp_path, name, **settings)
    done, out = inspect(tmp_path / "adapter", "--base", str(tmp_path / "base"))
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads((out / "inspect.json").read_text())["layers"]}
    layers = layers_of(model)
    assert rows.keys() == layers.keys()
    for layer_name, layer in layers.items():
        row, delta = rows[layer_name], dense(layer._update("default")).detach()
        weight = layer.base_layer.weight.detach()
        assert (row["out_features"], row["in_features"]) == delta.shape
        assert (row["rank"], row["sparsity_asked"]) == (
            layer.snell_spec["default"].rank,
            layer.snell_spec["default"].sparsity,
        )
        assert row["survivors"] == delta.count_nonzero()
        assert row["sparsity_counted"] == pytest.approx(1 - row["survivors"] / delta.numel())
        assert row["tau"] == layer._update("default").tau.item()
        assert row["norm"] == pytest.approx(delta.double().norm().item(), rel=1e-12)
        assert row["base_norm"] == pytest.approx(weight.double().norm().item(), rel=1e-12)
        assert row["ratio"] == pytest.approx(row["norm"] / row["base_norm"])
        assert row["exceeds_base"] == (row["norm"] > row["base_norm"])
        assert row["untouched_rows"] == (delta == 0).all(1).double().mean()
        assert row["untouched_columns"] == (delta == 0).all(0).double().mean()
        line = next(line for line in done.output.splitlines() if line.startswith(f"{layer_name} "))
        assert (" ! " in line) == row["exceeds_base"]
    assert (out / "inspect.png").read_bytes().startswith(b"\x89PNG")


def test_counts_and_grid_are_those_of_the_dense_matrix_block_by_block(monkeypatch):
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 64 * 1024)  # several blocks
    m, n = 300, 130
    A, B, theta = torch.randn(n, 4), torch.randn(m, 4), torch.tensor([0.1, -0.1])
    tau = torch.tensor(0.15)
    update = Update(A, B, theta, tau, Spec(4, 0.5))
    assert len(list(row_blocks(update))) > 1
    delta = dense(update)
    found, survives = spread(update), delta != 0
    assert found.count == survives.sum()
    assert found.by_row.equal(survives.sum(1))
    assert found.by_column.equal(survives.sum(0))
    assert found.norm == pytest.approx(delta.double().norm().item())
    # Bins of 5 rows and 3 columns; the last column's holds one.
    assert BINS == 64
    assert found.grid.shape == (60, 44)
    rows, columns = torch.arange(m) // 5, torch.arange(n) // 3
    for i, j in ((0, 0), (31, 7), (59, 43)):
        cell = survives[rows == i][:, columns == j]
        assert found.grid[i, j] == cell.float().mean()


def test_the_densest_tenth():
    assert share_in_densest_tenth(torch.ones(25)) == pytest.approx(0.1)
    assert share_in_densest_tenth(torch.tensor([0, 90, 0, 10] + [0] * 6)) == pytest.approx(0.9)
    assert share_in_densest_tenth(torch.tensor([8, 4] + [0] * 13)) == pytest.approx(10 / 12)
    assert share_in_densest_tenth(torch.zeros(7)) == 0


def test_an_update_larger_than_the_weight_is_marked_and_said(tmp_path):
    model, _ = adapted("bert", sparsity=0.5)
    layers = layers_of(model)
    large = [name for name in layers if name.endswith("0.output.dense")]
    assert len(large) == 1
    for name, layer in layers.items():
        weight, delta = layer.base_layer.weight, dense(layer._update("default")).detach()
        share = 1.01 if name in large else 0.99  # on either side of the threshold
        with torch.no_grad():
            weight.mul_(delta.norm() / weight.norm() / share)
    model.save_pretrained(tmp_path / "adapter")
    model.base_model.unload().save_pretrained(tmp_path / "base")
    done, out = inspect(tmp_path / "adapter", "--base", str(tmp_path / "base"))
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "inspect.json").read_text())["layers"]
    assert [row["name"] for row in rows if row["exceeds_base"]] == large
    assert [line.split()[0] for line in done.output.splitlines() if " ! " in line] == large
    assert f"note: |dW| > |W0| in 1 of {len(layers)} layers (marked !), most in {large[0]}" in done.output
    done, out = inspect(tmp_path / "adapter")
    assert "note" not in done.output
    assert "!" not in done.output
    assert {row["exceeds_base"] for row in json.loads((out / "inspect.json").read_text())["layers"]} == {None}


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float64", "float32"), ("float64", "float64")])
def test_an_adapter_of_any_float_dtype_is_read_as_a_model_loads_it(tmp_path, adapter, dtypes):
    shutil.copytree(adapter, tmp_path / "adapter")
    of_factor = dict(zip("AB", dtypes, strict=True))
    edit_weights(
        tmp_path / "adapter",
        lambda tensors: {
            key: tensor.to(getattr(torch, of_factor["A" if "snell_A" in key else "B"]))
            for key, tensor in tensors.items()
        },
    )
    held = torch.float64 if set(dtypes) == {"float64"} else torch.float32
    saved_tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, update in read(tmp_path / "adapter").updates():
        for factor in "AB":
            [saved_one] = [t for key, t in saved_tensors.items() if f"{name}.snell_{factor}" in key]
            assert getattr(update, factor).equal(saved_one.to(held))
            assert update.tau.dtype == held


def test_an_adapter_in_a_subfolder_is_found_and_several_are_listed(tmp_path):
    model = saved(tmp_path, "bert")
    model.add_adapter("second", config(r=6))
    model.save_pretrained(tmp_path / "adapter")
    done, _ = inspect(tmp_path / "adapter")
    assert done.exit_code == 0
    assert "r 4," in done.output
    assert f"Other adapters are in {tmp_path / 'adapter' / 'second'}." in done.output
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "adapter" / "second", alone / "second")
    done, _ = inspect(alone)
    assert done.exit_code == 0
    assert "r 6," in done.output
    shutil.copytree(alone / "second", alone / "third")
    done, _ = inspect(alone)
    assert done.exit_code == 1
    assert f"several adapters, name one: {alone / 'second'}, {alone / 'third'}" in done.output


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def without_one(tensors, part):
    key = next(key for key in tensors if part in key)
    return {other: tensor for other, tensor in tensors.items() if other != key}


def with_nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def with_integers(tensors):
    key = next(key for key in tensors if "snell_B" in key)
    return {**tensors, key: torch.zeros(tensors[key].shape, dtype=torch.int8)}


FAULTS = {
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    "another tuner's": (
        lambda f: edit_config(f, peft_type="LORA"),
        "SNELL, RED or X-PEFT adapter: its peft_type is LORA",
    ),
    "impossible setting": (lambda f: edit_config(f, sparsity=1.5), "sparsity must lie in [0, 1)"),
    "another rank": (lambda f: edit_config(f, r=8), "which does not fit rank 8"),
    "another kernel function": (lambda f: edit_config(f, kernel="rbf"), "lacks snell_theta of"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "but no adapter_model.safetensors"),
    "no weights of SNELL": (lambda f: save_file({"x": torch.ones(1)}, f / "adapter_model.safetensors"), "no tensor of"),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:900]),
        "adapter_model.safetensors cannot be read",
    ),
    "one factor missing": (lambda f: edit_weights(f, lambda t: without_one(t, "snell_B")), "lacks snell_B of"),
    "integers": (
        lambda f: edit_weights(f, with_integers),
        "is int8; an adapter is float32, bfloat16, float16, float64",
    ),
    "not a number": (lambda f: edit_weights(f, with_nan), "holds NaN or infinite values"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = adapted("bert")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_an_adapter_is_one_sentence(tmp_path, adapter, fault):
    folder = tmp_path / "broken"
    shutil.copytree(adapter, folder)
    damage, words = FAULTS[fault]
    damage(folder)
    done, out = inspect(folder)
    assert done.exit_code == 1
    sentence = done.output.strip().splitlines()[-1]
    assert sentence.startswith("Error: ")
    assert words in sentence
    assert not out.exists()


@pytest.mark.parametrize(
    "base, words",
    [
        ("no-such-model", "is neither a folder nor a model in the local Hugging Face cache"),
        ("adapter", "holds no float weight for any layer of the adapter"),
        ("empty", "holds no safetensors file"),
        ("other shape", "the adapter belongs to another base model"),
        ("other model", "holds no float weight for any layer of the adapter, such as bert.encoder.layer.0"),
    ],
)
def test_what_is_wrong_with_the_base_is_one_sentence(tmp_path, adapter, base, words):
    folders = {"adapter": adapter, "empty": tmp_path / "empty"}
    folders["empty"].mkdir()
    if base.startswith("other"):
        folders[base] = tmp_path / "other"
        model = build("bert" if base == "other shape" else "gpt2")
        if base == "other shape":
            model.bert.encoder.layer[1].output.dense = torch.nn.Linear(50, 24)
        model.save_pretrained(folders[base])
    shutil.copytree(adapter, tmp_path / "adapter")
    done, _ = inspect(tmp_path / "adapter", "--base", str(folders.get(base, base)))
    assert done.exit_code == 1
    assert words in done.output.strip().splitlines()[-1]


def test_a_folder_that_does_not_exist_is_a_usage_error(tmp_path):
    done, _ = inspect(tmp_path / "nowhere")
    assert done.exit_code == 2
    assert "does not exist" in done.output.splitlines()[-1]


@pytest.mark.parametrize(
    "names", [["proj"], [f"layers.{i}" for i in range(5)], [f"l.{i}.{j}" for i in range(30) for j in "ab"]]
)
def test_any_number_of_layers_is_drawn(tmp_path, names):
    A, B = torch.randn(20, 4), torch.randn(70, 4)
    update = Update(A, B, torch.tensor([0.1, -0.1]), torch.tensor(0.1), Spec(4, 0.5))
    measured = [measure(name, update, None) for name in names]
    draw(tmp_path / "picture.png", "title", [row for row, _ in measured], [grid for _, grid in measured])
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_picture_says_what_it_shows(tmp_path, adapter, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    shutil.copytree(adapter, tmp_path / "adapter")
    done, _ = inspect(tmp_path / "adapter")
    assert done.exit_code == 0, done.output
    [figure] = figures
    said = next(line for line in done.output.splitlines() if line.endswith("%)."))
    assert figure.get_suptitle().startswith(f"{tmp_path / 'adapter'}: {said.removesuffix('.')}")
    panels = figure.subfigs[1].axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "survivors in the densest tenth of the rows or columns, %",
        "rows and columns without a survivor, %",
        "Frobenius norm of dW",
    ]
    rows = json.loads((tmp_path / "out" / "inspect.json").read_text())["layers"]
    drawn = {line.get_label(): line.get_ydata() for line in panels[0].lines}
    assert drawn["rows"] == pytest.approx([100 * row["densest_tenth_of_rows"] for row in rows])
    assert drawn["columns"] == pytest.approx([100 * row["densest_tenth_of_columns"] for row in rows])


def test_a_layer_with_a_sparsity_of_its_own_is_counted_with_it(tmp_path):
    model, _ = adapted("bert", target_modules=["query"], sparsity=0.9, init_weights="identity")
    first = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    first.set_sparsity("default", 0.25)
    with torch.no_grad():
        first.snell_A["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out" / "inspect.json").read_text())["layers"]
    assert [row["sparsity_asked"] for row in rows] == [0.25, 0.9]
    survivors = first.get_delta_weight("default").count_nonzero().item() / 24**2
    assert rows[0]["sparsity_counted"] == pytest.approx(1 - survivors)
