"""Saves that a killed process cannot spoil, and the newest checkpoint that one has not spoiled."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ["last_checkpoint", "save_adapter"]

_CARD = "README.md"

#: In a tensor's name, the step from one tuner's layer to another's below it on the same base layer.
_BELOW = re.compile(r"\.base_layer(?!\.(?:weight|bias)$)")
_STAGING = ".saving"
_STATE = "trainer_state.json"
_WEIGHTS = ("*.safetensors", "*.bin", "pytorch_model_fsdp*")


def save_adapter(model: PeftModel, folder: str | os.PathLike[str], **settings: Any) -> None:
    """``model.save_pretrained(folder)``, but that a kill at any moment leaves the adapter that stood there loadable.

    PEFT writes the configuration in place: killed in between, it leaves a folder that no longer loads. Here every
    file is written into ``folder/.saving``, brought to the disk, and then renamed over its predecessor. Other files in
    the folder stay. Each adapter of a model with several is replaced by itself. Processes that share a folder must not
    save at once. An adapter below another tuner's, as LoRA's below RED's, is saved under the names it has alone:
    from ``save_pretrained`` it loads only into a model where the other one is in place.

    One instant is left: two files cannot be renamed at once. Where the settings differ from those in the folder, the
    old weights move into ``.saving`` before the new settings and the new weights take their places. A kill between
    those renames leaves no adapter, never new weights under old settings; both are then whole in ``.saving``. An
    error or an interrupt there puts the old adapter back.

    Args:
        model: the model; its adapters are saved.
        folder: where to, as for ``save_pretrained``: ``default`` into the folder, others into folders of their name.
        settings: of ``PeftModel.save_pretrained``: ``selected_adapters``, ``is_main_process``, ``state_dict``, ...

    Raises:
        ValueError: ``safe_serialization=False``, ``folder`` is a file, or an adapter's name leads out of the folder.
        OSError: the folder cannot be written; the adapter in it stays.
    """
    if not settings.pop("safe_serialization", True):
        raise ValueError("safe_serialization must be True: save_adapter writes safetensors")
    folder = Path(folder).resolve()
    if folder.is_file():
        raise ValueError(f"folder must be a directory; got the file {folder}")
    for name in settings.get("selected_adapters") or model.peft_config:
        if not Path(os.path.normpath(folder / name)).is_relative_to(folder):
            raise ValueError(f"an adapter's name must not lead out of folder, {folder}; got {name!r}: give it another")
    if not settings.get("is_main_process", True):
        # Writes nothing, but takes part in gathering sharded factors.
        model.save_pretrained(str(folder), **settings)
        return
    # Inside the folder, which may be a mount point: nothing is renamed into another file system.
    fresh = folder / _STAGING
    # What a killed save has left.
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        if (folder / _CARD).exists():
            # PEFT adds to a model card that people may have edited.
            shutil.copy(folder / _CARD, fresh)
        model.save_pretrained(str(fresh), **settings)
        for path in fresh.rglob(SAFETENSORS_WEIGHTS_NAME):
            _name_as_alone(path)
        for path in fresh.rglob("*"):
            _flush(path)
        for config in sorted(fresh.rglob(CONFIG_NAME)):
            _replace(config.parent, folder / config.parent.relative_to(fresh))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _name_as_alone(path: Path) -> None:
    """Give an adapter that lies below another tuner's the names it has alone, under which it loads."""
    with safe_open(path, "pt") as file:
        names, metadata = {key: _BELOW.sub("", key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        if any(key != name for key, name in names.items()):
            save_file({name: file.get_tensor(key) for key, name in names.items()}, path, metadata)


def _replace(fresh: Path, folder: Path) -> None:
    """Rename an adapter's files over those in ``folder``; weights never stand under settings not theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    old_config, old_weights = fresh / f"old_{CONFIG_NAME}", fresh / f"old_{SAFETENSORS_WEIGHTS_NAME}"
    try:
        if weights.exists() and _settings(fresh / CONFIG_NAME) != _settings(config):
            if config.exists():
                shutil.copy(config, old_config)
            os.replace(weights, old_weights)
            _flush(folder)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, _CARD):
            if (fresh / name).exists():
                os.replace(fresh / name, folder / name)
        _flush(folder)
    except BaseException:  # KeyboardInterrupt too
        if old_weights.exists() and not weights.exists():
            if old_config.exists():
                os.replace(old_config, config)
            os.replace(old_weights, weights)
        raise


def _settings(path: Path) -> dict[str, Any] | None:
    """A saved configuration; its lists were sets and stand in any order."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in settings.items()}


def _flush(path: Path) -> None:
    """Bring a file, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest of a Trainer's checkpoints that is whole; None where there is none, or no folder yet.

    ``trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))`` is right at the first start and after
    every kill. ``resume_from_checkpoint=True`` takes the newest folder, which a kill amid a save leaves torn.

    Whole is: the Trainer's state, which it writes last, parses and is of that step; there are weights; every
    safetensors file has the length its header tells, every archive of PyTorch its directory at the end, and every
    JSON file parses. Damage inside files of the right length is not looked for, nor a mixture of two runs: one that
    saves over another run's checkpoints of the same steps.

    Args:
        folder: the Trainer's ``output_dir``.

    Raises:
        NotADirectoryError: ``folder`` is a file.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir() if path.is_dir())
    for step, path in sorted(((int(match[1]), path) for match, path in named if match), reverse=True):
        if _is_whole(path, step):
            return str(path)
    return None


def _is_whole(checkpoint: Path, step: int) -> bool:
    """Whether the Trainer's checkpoint of that step can be resumed from."""
    try:
        if json.loads((checkpoint / _STATE).read_text())["global_step"] != step:
            return False
        for path in checkpoint.rglob("*"):
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
                if path.name == SAFETENSORS_WEIGHTS_NAME and not path.with_name(CONFIG_NAME).exists():
                    return False
            elif path.suffix in (".pt", ".pth", ".bin") and path.is_file():
                zipfile.ZipFile(path).close()
            elif path.suffix == ".json":
                json.loads(path.read_text())
    except (OSError, ValueError, LookupError, TypeError, SafetensorError, zipfile.BadZipFile):
        return False
    return any(path.name != "training_args.bin" for pattern in _WEIGHTS for path in checkpoint.rglob(pattern))
