"""Hints for what an optional part needs: complete, and never a name that no registry holds."""

import re
import tomllib

import pytest

from checkout import ROOT
from snell.extras import hint


def test_a_hint_names_all_that_the_extra_asks_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    peft = " ".join(f"'{requirement}'" for requirement in extras["peft"])
    assert hint("peft") == f"pip install {peft}"
    for requirement in extras["peft"] + extras["cli"] + extras["bench"]:
        assert requirement.startswith("snell[") or f"'{requirement}'" in hint("bench")
    assert "snell" not in hint("dev")
    assert ";" not in hint("dev")


def test_an_extra_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="'nonsense'"):
        hint("nonsense")


def test_no_text_asks_a_registry_for_snell() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    modules = [path for folder in ("snell", "kernels", "bench", "examples") for path in (ROOT / folder).rglob("*.py")]
    asks = re.compile(r"pip install (?:-\S+ )*['\"]?snell\b")
    assert [str(path) for path in pages + modules if asks.search(path.read_text())] == []
