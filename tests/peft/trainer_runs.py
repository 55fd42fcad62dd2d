"""Small runs of transformers' Trainer on a fixed data set."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from peft import PeftModel
from small_models import batch


class Samples(torch.utils.data.Dataset):
    """A fixed data set: the batch of a small model, one sample at a time."""

    def __init__(self, name: str, samples: int) -> None:
        self.columns = batch(name, samples)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: column[i] for key, column in self.columns.items()}


class StopAfter(tf.TrainerCallback):
    """Interrupts a run that was meant to be longer."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.steps


def run(model: PeftModel, data: Samples, folder: Path, *callbacks: tf.TrainerCallback, **settings) -> tf.Trainer:
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = tf.TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    return tf.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def losses(trainer: tf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
