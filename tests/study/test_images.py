"""Fashion-MNIST's loader and the network pre-trained on characters, on tiny files and matplotlib's own fonts."""

import gzip
import json
import struct
from pathlib import Path

import matplotlib
import pytest
from click.testing import CliRunner

pytest.importorskip("peft")
pytest.importorskip("tqdm")

import torch

from snell.cli import main
from snell.study import comparison, images


@pytest.fixture
def fonts(tmp_path):
    folder = tmp_path / "fonts"
    folder.mkdir()
    for name in ("DejaVuSans.ttf", "DejaVuSerif.ttf"):
        (folder / name).symlink_to(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)
    return folder


@pytest.fixture
def fashion(tmp_path):
    folder, generator = tmp_path / "fashion", torch.Generator().manual_seed(0)
    folder.mkdir()
    for part, count in (("train", 120), ("t10k", 50)):
        labels = torch.arange(count) % 10
        pixels = torch.randint(0, 256, (count, 28, 28), generator=generator)
        for name, array, magic in (("images-idx3", pixels, 3), ("labels-idx1", labels, 1)):
            header = bytes([0, 0, 8, magic]) + struct.pack(f">{magic}i", *array.shape)
            content = header + array.to(torch.uint8).numpy().tobytes()
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return folder


def test_characters_are_drawn_and_learned(fonts, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "STEPS", 2)
    pixels, labels = images.glyphs(fonts)
    assert pixels.shape[1:] == (28, 28)
    assert len(labels) == len(pixels) == 2 * images.PICTURES * len(images.CHARACTERS)
    assert (pixels.flatten(1).max(1).values > 100).all()
    first = images.pretrained(1, fonts, tmp_path / "kept.pt")
    # The second call reads the file: it needs no font.
    again = images.pretrained(1, tmp_path / "none", tmp_path / "kept.pt")
    torch.manual_seed(0)
    fresh = images.Vit(1)
    for (name, one), other, new in zip(first.named_parameters(), again.parameters(), fresh.parameters(), strict=True):
        assert one.equal(other)
        assert not one.equal(new) or "cls_token" in name


def test_the_test_images_are_the_data_sets_own(fashion, tmp_path):
    task = images.load(fashion, None, 1, tmp_path / "kept.pt")
    assert task.parts["test"].tolist() == list(range(120, 170))
    assert (len(task.parts["pool"]), len(task.parts["validation"])) == (90, 30)
    assert task.labels[task.parts["test"]].tolist() == [i % 10 for i in range(50)]
    pixels = task.inputs(torch.arange(170))["pixel_values"]
    assert pixels.shape == (170, 1, 28, 28)
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)


def test_the_command_compares_methods_on_images(fashion, fonts, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "STEPS", 2)
    monkeypatch.setitem(comparison.SIZES, "validation", 20)
    monkeypatch.setitem(comparison.SIZES, "test", 40)
    words = [
        "--tasks",
        "fashion",
        "--data",
        f"fashion={fashion}",
        "--data",
        f"fonts={fonts}",
        "--out",
        tmp_path / "out",
    ]
    words += ["--labels-a-class", 2, "--steps", 1, "--layers", 1, "--rank", 2, "--draws", 2]
    words += ["--methods", "lora", "--methods", "probe"]
    result = CliRunner().invoke(main, ["study", "classify", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out" / "classify-fashion.json").read_text())
    assert document["settings"]["labels"] == "2 a class"
    assert [row["method"] for row in document["comparisons"][0]["rows"]] == ["lora", "probe"]


@pytest.mark.parametrize("missing, package", [("fashion", "dataset-fashion-mnist"), ("fonts", "fonts-noto-core")])
def test_missing_data_say_what_to_install(missing, package, fashion, tmp_path):
    (tmp_path / "empty").mkdir()
    paths = {"fashion": fashion, "fonts": tmp_path / "empty", missing: tmp_path / "empty"}
    words = [word for name, path in paths.items() for word in ("--data", f"{name}={path}")]
    words += ["--tasks", "fashion", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["study", "classify", *words])
    assert result.exit_code == 1
    assert package in result.output
