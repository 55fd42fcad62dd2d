"""Saves replace an adapter whole or not at all; a torn checkpoint is passed over for the newest whole one."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
from small_models import adapted, batch, config, logits

from snell.peft import last_checkpoint, save_adapter

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_an_adapter_is_saved_as_save_pretrained_saves_it(tmp_path):
    model, untouched = adapted("llama")
    model.add_adapter("second", config(r=6, kernel="rbf"))
    model.save_pretrained(tmp_path / "theirs")
    for _ in range(2):
        save_adapter(model, tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert files(tmp_path).count("ours") == len(list(tmp_path.iterdir())) - 1 == 1
    loaded = PeftModel.from_pretrained(untouched, tmp_path / "ours")
    loaded.load_adapter(tmp_path / "ours" / "second", "second")
    for name in ("default", "second"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        inputs = batch("llama")
        assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))


def test_only_the_selected_adapter_is_replaced(tmp_path):
    model, _ = adapted("llama")
    model.add_adapter("second", config())
    save_adapter(model, tmp_path)
    before = (tmp_path / "second" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    save_adapter(model, tmp_path, selected_adapters=["default"])
    assert (tmp_path / "second" / "adapter_model.safetensors").read_bytes() == before
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(saved[key.replace(".default", "")], p) for key, p in model.named_parameters() if "lt" in key)


def test_what_else_lies_in_the_folder_stays_and_so_do_edits_of_the_model_card(tmp_path):
    model, _ = adapted("llama")
    save_adapter(model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card + "\nTrained on my data.\n")
    save_adapter(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "Trained on my data." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("save", [save_adapter, lambda model, folder: model.save_pretrained(folder)])
def test_the_model_card_says_once_which_import_the_adapter_needs(save, tmp_path):
    model, _ = adapted("llama")
    for _ in range(2):
        save(model, tmp_path)
    assert (tmp_path / "README.md").read_text().count("import snell.peft") == 1


def test_an_adapter_of_other_settings_takes_the_place_of_the_old_one(tmp_path):
    save_adapter(adapted("llama", gate="hard")[0], tmp_path)
    model, untouched = adapted("llama", r=8, gate="soft")
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["gate"] == "soft"
    inputs = batch("llama")
    assert torch.equal(logits(PeftModel.from_pretrained(untouched, tmp_path).eval(), inputs), logits(model, inputs))


class Folder:
    """What stands in an adapter's folder at each rename, and what the rename does."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.seen, self.fail_at, self.replace = folder, [], None, os.replace
        monkeypatch.setattr("os.replace", self)

    def __call__(self, source, target):
        self.seen.append(self.pair())
        if self.fail_at == len(self.seen) - 1:
            raise OSError("no space left")
        self.replace(source, target)

    def pair(self):
        """The settings and the weights, or no weights."""
        files = (self.folder / name for name in ("adapter_config.json", "adapter_model.safetensors"))
        return tuple(path.read_bytes() if path.exists() else None for path in files)


def test_new_weights_never_stand_under_old_settings(tmp_path, monkeypatch):
    save_adapter(adapted("llama", gate="hard")[0], tmp_path)
    folder = Folder(tmp_path, monkeypatch)
    old = folder.pair()
    save_adapter(adapted("llama", gate="soft")[0], tmp_path)
    new = folder.pair()
    assert folder.seen[0] == old
    assert all(pair in (old, new) or pair[1] is None for pair in folder.seen)
    assert (new[0], None) in folder.seen  # settings first
    # With the same settings no moment is without an adapter.
    folder.seen.clear()
    model = adapted("llama", gate="soft")[0]
    save_adapter(model, tmp_path)
    assert len(folder.seen) == 3
    assert all(pair[1] in (new[1], folder.pair()[1]) for pair in folder.seen)


@pytest.mark.parametrize("error", range(4))
def test_an_error_between_two_renames_puts_the_old_adapter_back(error, tmp_path, monkeypatch):
    save_adapter(adapted("llama", gate="hard")[0], tmp_path)
    folder = Folder(tmp_path, monkeypatch)
    old, folder.fail_at = folder.pair(), error
    with pytest.raises(OSError, match="no space"):
        save_adapter(adapted("llama", gate="soft")[0], tmp_path)
    # The model card comes last: then the new adapter is whole already.
    assert (folder.pair() == old) == (error < 3)
    assert None not in folder.pair()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_folder_on_a_file_system_of_its_own_is_saved_to(tmp_path, monkeypatch):
    volume, replace = tmp_path / "volume", os.replace

    def across(source, target):
        if Path(source).is_relative_to(volume) != Path(target).is_relative_to(volume):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr("os.replace", across)
    for rank in (4, 8):
        model, untouched = adapted("llama", r=rank)
        model.add_adapter("second", config(r=rank))
        save_adapter(model, volume)
        inputs = batch("llama")
        assert torch.equal(logits(PeftModel.from_pretrained(untouched, volume).eval(), inputs), logits(model, inputs))


def test_a_mounted_folder_is_saved_to(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs more rights")
    try:
        for rank in (4, 8):
            save_adapter(adapted("llama", r=rank)[0], tmp_path)
            assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == rank
            assert load_file(tmp_path / "adapter_model.safetensors")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("name", ["/{}/elsewhere", "a/../../elsewhere"])
def test_an_adapter_whose_name_leads_out_of_the_folder_is_refused(name, tmp_path):
    # PyTorch allows no dot in such a name today: the check does not rely on it.
    name, (model, _) = name.format(tmp_path), adapted("llama")
    if "." in name:
        model.peft_config[name] = model.peft_config["default"]
    else:
        model.add_adapter(name, config())
    with pytest.raises(ValueError, match="name must not lead out of folder"):
        save_adapter(model, tmp_path / "adapter")
    assert files(tmp_path) == []
    save_adapter(model, tmp_path / "adapter", selected_adapters=["default"])


def test_a_save_that_fails_leaves_what_stood_there(tmp_path, monkeypatch):
    model, _ = adapted("llama")
    save_adapter(model, tmp_path / "adapter")
    before = {name: (tmp_path / "adapter" / name).read_bytes() for name in files(tmp_path / "adapter")}

    def fail(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("peft.peft_model.safe_save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, tmp_path / "adapter")
    assert {name: (tmp_path / "adapter" / name).read_bytes() for name in files(tmp_path / "adapter")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_a_killed_save_left_is_swept(tmp_path):
    (tmp_path / "adapter" / ".saving" / "stale").mkdir(parents=True)
    save_adapter(adapted("llama")[0], tmp_path / "adapter")
    assert ".saving" not in files(tmp_path / "adapter")


def test_processes_other_than_the_main_one_write_no_adapter(tmp_path):
    save_adapter(adapted("llama")[0], tmp_path, is_main_process=False)
    assert files(tmp_path) == []


def test_a_file_in_the_folders_place_and_pickles_are_refused(tmp_path):
    model, _ = adapted("llama")
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        save_adapter(model, tmp_path, safe_serialization=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be a directory"):
        save_adapter(model, tmp_path / "file")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Trainer's output with checkpoints of steps 9 and 10."""
    folder = tmp_path_factory.mktemp("run")
    columns = batch("llama", 20)
    data = [{key: column[i] for key, column in columns.items()} for i in range(20)]
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        max_steps=10,
        save_steps=1,
        save_total_limit=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    tf.Trainer(model=adapted("llama")[0], args=arguments, train_dataset=data).train()
    assert {path.name for path in folder.iterdir()} == {"checkpoint-9", "checkpoint-10"}
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_the_newest_checkpoint_is_the_one_of_the_largest_step(run):
    (run / "checkpoint-of-mine").mkdir()
    (run / "checkpoint-11").write_text("no folder")
    assert last_checkpoint(run) == str(run / "checkpoint-10")


def test_the_list_of_what_a_checkpoint_is_made_of_is_complete(run):
    assert set(files(run / "checkpoint-10")) == {*FILES, "README.md"}


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_file_cut_anywhere_is_passed_over(name, run):
    path = run / "checkpoint-10" / name
    whole = path.read_bytes()
    # A text file may lack its last line break and lose nothing.
    lengths = {0, 1, len(whole) // 2, len(whole) - 2, *torch.randint(len(whole) - 2, (20,)).tolist()}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        assert last_checkpoint(run) == str(run / "checkpoint-9"), f"cut to {length} of {len(whole)} bytes"
    path.write_bytes(whole)
    assert last_checkpoint(run) == str(run / "checkpoint-10")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "trainer_state.json"])
def test_a_checkpoint_without_a_file_is_passed_over(name, run):
    (run / "checkpoint-10" / name).unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-9")


def test_a_checkpoint_under_another_steps_name_is_passed_over(run):
    shutil.copytree(run / "checkpoint-9", run / "checkpoint-12")
    assert last_checkpoint(run) == str(run / "checkpoint-10")


def test_there_is_no_checkpoint_before_the_first(tmp_path):
    assert last_checkpoint(tmp_path / "not there yet") is None
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        last_checkpoint(tmp_path / "file")
