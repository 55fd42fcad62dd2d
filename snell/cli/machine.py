"""Facts on the machine that help to judge a measured time. None of them identifies it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from snell import backends, native


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def machine_facts(device: str = "cpu") -> dict[str, object]:
    """The processor, the versions and the backend that a result was measured with."""
    facts: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backends": sorted(backends.AVAILABLE),
        "instruction_set": native.instruction_set(),
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts
