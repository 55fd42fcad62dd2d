"""Tests run against their own checkout, or not at all."""

import shutil
import subprocess
import sys
from pathlib import Path

from checkout import ROOT


def test_another_checkouts_kernels_are_refused(tmp_path: Path) -> None:
    # As in a checkout that was never installed: its snell/ is found by its place, the rest through the installed one.
    for name in ("pyproject.toml", "tests/conftest.py", "tests/checkout.py", "tests/seeds.py", "tests/test_spec.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "snell", tmp_path / "snell", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pytest", "tests/test_spec.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stdout + done.stderr
    assert f"these tests are {tmp_path}'s, but snell.kernels would come from {ROOT}" in done.stderr
