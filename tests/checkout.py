"""The checkout that these tests belong to, and refusal to run them against another."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# snell/ lies beside tests/ and is found by that. kernels/ and bench/ are found through the installed snell.
for name in ("snell", "snell.kernels", "snell.bench"):
    found = importlib.util.find_spec(name)
    origin = found.origin if found else None
    if origin is None or ROOT not in Path(origin).resolve().parents:
        raise pytest.UsageError(
            f"these tests are {ROOT}'s, but {name} would come from {origin or 'nowhere'}: "
            f"run `make test`, or first `pip install --editable {ROOT}`"
        )
