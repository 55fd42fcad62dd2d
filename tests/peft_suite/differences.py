"""Where SNELL differs from LoRA in PEFT's tests, with a reason a row. Anything else that differs is a failure."""

from __future__ import annotations

import re

#: Settings of LoRA's that SNELL has none for: rows that use them have no twin.
LORA_ONLY: dict[str, str] = {
    "use_dora": "DoRA, a variant of LoRA: it rescales W0 + BA column by column",
    "use_rslora": "scales by alpha / sqrt(r); SNELL's scale does not depend on the rank",
    "use_qalora": "QA-LoRA, a variant of LoRA for group-quantised bases",
    "use_bdlora": "BD-LoRA, a variant of LoRA with block-diagonal factors",
    "kasa_config": "KaSA, a variant of LoRA with singular values",
    "velora_config": "VeLoRA, a compression of LoRA's activations",
    "monteclora_config": "MonteCLoRA, a variant of LoRA with sampled factors",
    "arrow_config": "Arrow, a router of LoRA adapters",
    "alora_invocation_tokens": "aLoRA, LoRA that begins at a token",
    "init_lora_weights": "draws of LoRA's factors from W0 or from data, which say nothing of a nonlinear update",
    "lora_bias": "a bias of LoRA's B; bias='snell_only' trains the base's",
    "target_parameters": "not built: parameters that are not a layer's weight",
    "ensure_weight_tying": "not built: it concerns tied embeddings",
}

#: Why a test that passes with LoRA may fail with SNELL, by regular expression of "its name: what was raised".
FAILS: dict[str, str] = {
    r"cannot be adapted: it is a MultiheadAttention": "SNELL does not adapt a layer that is read and never called",
    r"roundtrip_fsdp_wrapped.*: assert False": (
        "saves with init_weights=False and loads into a model of the default start: an identity start is part of what "
        "an adapter computes, and adapter_config.json carries it"
    ),
    r"with_runtime_config.*: ": "runtime_config is LoRA's own",
}


def reason(failure: str) -> str | None:
    """Why SNELL may fail so, given "the test's name: what was raised"; None where nothing says so."""
    return next((text for pattern, text in FAILS.items() if re.search(pattern, failure, re.DOTALL)), None)
