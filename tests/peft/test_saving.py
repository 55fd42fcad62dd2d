"""Saves replace an adapter whole or not at all; a torn checkpoint is passed over for the newest whole one."""

import json
import shutil

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


def test_an_adapter_of_other_settings_takes_the_place_of_the_old_one(tmp_path):
    save_adapter(adapted("llama", gate="hard")[0], tmp_path)
    model, untouched = adapted("llama", r=8, gate="soft")
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["gate"] == "soft"
    inputs = batch("llama")
    assert torch.equal(logits(PeftModel.from_pretrained(untouched, tmp_path).eval(), inputs), logits(model, inputs))


def test_new_weights_never_stand_under_old_settings(tmp_path, monkeypatch):
    save_adapter(adapted("llama", gate="hard")[0], tmp_path)
    replaced = []

    def stop(source, target):
        replaced.append(target.name)
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(OSError, match="no space"):
        save_adapter(adapted("llama", gate="soft")[0], tmp_path)
    assert replaced == ["adapter_config.json"]
    assert not (tmp_path / "adapter_model.safetensors").exists()


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
    (tmp_path / ".adapter.saving" / "stale").mkdir(parents=True)
    save_adapter(adapted("llama")[0], tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


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
