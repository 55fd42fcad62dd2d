"""One run of PEFT's tests, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .checkpoints import build
from .outcomes import Comparison
from .source import FILES, fetch

_TESTS = Path(__file__).resolve().parents[1]


def run(share: tuple[int, int] = (0, 1), archive: Path | None = None, chosen: str = "") -> Comparison:
    """Fetch PEFT's tests, run them with LoRA and SNELL, and compare.

    Args:
        share: ``(i, n)`` takes every n-th pair of tests, from the i-th on.
        archive: PEFT's source archive; None: pip downloads it.
        chosen: an expression as for pytest's ``-k``.

    Raises:
        Unreachable: there is no archive.
        RuntimeError: pytest could not run the tests.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch(folder, archive)
        build(folder / "hub")
        report = folder / "report.json"
        env = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(folder / "hub"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (folder, _TESTS, _TESTS.parent))),
            "PEFT_SUITE_REPORT": str(report),
            "PEFT_SUITE_SHARE": "/".join(map(str, share)),
        }
        options = ["-p", "peft_suite.plugin", "-p", "no:cacheprovider", "-q", "--rootdir", name, "-k", chosen]
        files = [f"tests/{file}" for file in FILES]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files], cwd=folder, env=env, capture_output=True, text=True
        )
        if done.returncode not in (0, 1) or not report.exists():
            raise RuntimeError(f"PEFT's tests did not run:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return Comparison.of(json.loads(report.read_text()))
