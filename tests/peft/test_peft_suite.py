"""PEFT's own tests, a share of them: what passes with LoRA passes with SNELL, but for a list with reasons."""

import pytest
from peft import LoraConfig
from peft_suite import source, twins
from peft_suite.differences import FAILS, LORA_ONLY
from peft_suite.outcomes import Comparison
from peft_suite.run import run

from seeds import SEED
from snell.peft import SnellConfig

SHARES = 8


def test_a_share_of_pefts_own_tests():
    try:
        found = run((SEED % SHARES, SHARES))
    except source.Unreachable as error:
        pytest.skip(str(error))
    assert found.unlisted == [], f"python -m tests.peft_suite --share {SEED % SHARES}/{SHARES}\n{found}"
    assert found.lora["passed"] > 100
    assert found.snell["passed"] > 50


ATTENTION = "TypeError: mha cannot be adapted: it is a MultiheadAttention; change"


def outcomes(name: str, lora: str, snell: str, reason: str = "why") -> dict[str, dict[str, str]]:
    both = {"LoRA": lora, "SNELL": snell}
    return {name.replace("[", f"[{tuner}:"): {"outcome": came, "reason": reason} for tuner, came in both.items()}


def test_only_a_test_that_passes_with_lora_and_is_not_listed_counts():
    report = {
        **outcomes("test_a[0 MLP]", "passed", "failed"),
        **outcomes("test_b[0 MLP]", "passed", "skipped"),
        **outcomes("test_a[1 MHA]", "passed", "failed", ATTENTION),
        **outcomes("test_c[0 MLP]", "failed", "failed"),
        **outcomes("test_d[0 MLP]", "failed", "passed"),
        **outcomes("test_e[0 MLP]", "passed", "passed"),
    }
    found = Comparison.of(report)
    assert found.unlisted == ["test_a[0 MLP]: why", "test_b[0 MLP]: why"]
    assert found.listed == {"SNELL does not adapt a layer that is read and never called": 1}
    assert found.both == ["test_c[0 MLP]"]
    assert found.idle == list(FAILS)[1:]
    assert found.lora == {"passed": 4, "failed": 2}
    assert "NOT LISTED test_a[0 MLP]: why" in str(found)


def test_a_row_gets_a_twin():
    rows = [("plain", LoraConfig, {"r": 4, "lora_alpha": 2, "lora_dropout": 0.1, "bias": "lora_only"})]
    lora, snell = twins.rows(rows)
    assert (lora.id, snell.id) == ("LoRA:0 plain", "SNELL:0 plain")
    assert lora.values == rows[0]
    name, kind, settings = snell.values
    assert (name, kind) == ("plain", SnellConfig)
    expected = {"r": 4, "dropout": 0.1, "bias": "snell_only", "init_weights": "identity", "sparsity": 0.5}
    assert settings == expected


def test_a_row_of_a_feature_that_snell_lacks_gets_none_and_an_unknown_setting_is_an_error():
    assert list(twins.rows([("dora", LoraConfig, {"use_dora": True})])) == []
    assert len(list(twins.rows([("no dora", LoraConfig, {"use_dora": False})]))) == 2
    with pytest.raises(KeyError, match="brand_new"):
        list(twins.rows([("new", LoraConfig, {"brand_new": 1})]))


def test_no_feature_that_snell_has_is_listed_as_missing():
    assert not LORA_ONLY.keys() & vars(SnellConfig())


def test_a_test_that_skips_all_but_some_tuners_names_snell_too():
    text = "if config_cls not in (LoraConfig, A): skip()\nif config_cls != LoraConfig: skip()\n"
    text += "if not isinstance(c, (A, LoraConfig)): skip()\nif isinstance(c, (A, LoraConfig)): loosen()\n"
    lines = source.with_snell(text).splitlines()
    assert lines[1] == "if config_cls not in (LoraConfig, A, SnellConfig):"
    assert lines[3] == "if config_cls not in (LoraConfig, SnellConfig):"
    assert lines[5] == "if not isinstance(c, (A, LoraConfig, SnellConfig)):"
    assert lines[7] == "if isinstance(c, (A, LoraConfig)):"
