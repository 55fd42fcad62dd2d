"""A save that kills its process at the worst moment; run in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from small_models import adapted

from tests.stress.lives import SAVES


def save_twice_and_die(folder: Path, save: str, file: str) -> None:
    """Save, then save other factors over it and die at the first line of the second save that runs in ``file``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, _ = adapted("llama")
    SAVES[save](model, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line" and frame.f_code.co_filename.endswith(file):
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    SAVES[save](model, folder)
