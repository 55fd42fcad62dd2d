"""X-PEFT: what masks over a bank cost beside a training step, many profiles in one step, and a switch of profile.

    snell bench profiles [--adapters 100 --adapters 800] [--rank 48]

BERT-base, of which each block's attention output (768 x 768) takes its update from a bank in bfloat16. Mixing is what
masks cost whatever the number of tokens: softmax, k-hot choice, both mixtures, and their backward. It stands beside a
step of 8 x 128 tokens. Then profiles are trained on one short text each: all in one step together, and one in a step of
its own. One by one they would take that step's time as often as there are profiles.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

from snell.bench.clock import take_turns
from snell.bench.contenders import quiet_libraries
from snell.bench.report import Columns, Document, made_by, table
from snell.peft import MaskedLinear, Profile, XpeftConfig, use_profiles

#: Samples and tokens of the step that mixing is compared with, and tokens of each profile's text.
SAMPLES, TOKENS, SHORT = 8, 128, 16


def bert() -> tf.PreTrainedModel:
    """BERT-base, with random weights: time does not depend on them."""
    return tf.BertForSequenceClassification(tf.BertConfig()).eval()


def measure(adapters: Sequence[int], rank: int, profiles: int, repetitions: int) -> dict[str, Any]:
    """Each number of adapters, with hard and with soft masks."""
    quiet_libraries()
    torch.manual_seed(0)
    base, rows = bert(), []
    for num in tqdm(adapters, desc="banks", unit="bank"):
        for masks in ("hard", "soft"):
            rows.append(
                {"adapters": num, "masks": masks, **_of_one_bank(base, num, masks, rank, profiles, repetitions)}
            )
    settings = {"rank": rank, "profiles": profiles, "tokens": f"{SAMPLES} x {TOKENS}", "tokens a profile": SHORT}
    return {"file": "profiles-cpu", "settings": settings, "rows": rows}


def _of_one_bank(base: nn.Module, num: int, masks: str, rank: int, profiles: int, repetitions: int) -> dict[str, Any]:
    settings = {"num_adapters": num, "masks": masks, "r": rank, "bank_dtype": "bfloat16"}
    settings |= {"target_modules": ["attention.output.dense"]}
    one, many = (
        get_peft_model(copy.deepcopy(base), XpeftConfig(**settings, num_profiles=count)) for count in (1, profiles)
    )
    layers = [module for module in one.modules() if isinstance(module, MaskedLinear)]
    for layer, other in zip(layers, (m for m in many.modules() if isinstance(m, MaskedLinear)), strict=True):
        other.xpeft_bank = layer.xpeft_bank

    def mixing() -> None:
        for layer in layers:
            A, B = layer.mixed("default")
            torch.autograd.backward([A, B], [A, B])

    words = base.config.vocab_size
    whole, short = (torch.randint(words, size) for size in ((SAMPLES, TOKENS), (profiles, SHORT)))
    profile = Profile.of(one)
    steps: dict[str, Callable[[], object]] = {
        "mixing": mixing,
        "step": lambda: one(input_ids=whole).logits.square().sum().backward(),
        "together": lambda: _together(many, short),
        "alone": lambda: one(input_ids=short[:1]).logits.square().sum().backward(),
        "switch": lambda: profile.put_in(one),
    }
    for step in steps.values():
        step()
    seconds = {name: statistics.median(taken) for name, taken in take_turns(steps, "cpu", repetitions).items()}
    with tempfile.TemporaryDirectory() as folder:
        profile.save(Path(folder) / "profile")
        size = (Path(folder) / "profile").stat().st_size
    bank = sum(factor.nbytes for layer in layers for factor in layer.xpeft_bank["default"].on(torch.device("cpu")))
    seconds["one by one"] = profiles * seconds["alone"]
    return {"seconds": seconds, "file_bytes": size, "bank_bytes": bank}


def _together(model: nn.Module, texts: torch.Tensor) -> None:
    with use_profiles(model, torch.arange(len(texts))):
        model(input_ids=texts).logits.square().sum().backward()


COLUMNS: Columns = [
    ("adapters", "{adapters}"),
    ("masks", "{masks}"),
    ("bank", "{bank_bytes:size}"),
    ("mixing, forward and backward", "{seconds[mixing]:ms}"),
    ("of a step", lambda row: f"{100 * row['seconds']['mixing'] / row['seconds']['step']:.1f} %"),
    ("profiles together", "{seconds[together]:s}"),
    ("one by one", "{seconds[one by one]:s}"),
    ("times faster", lambda row: f"{row['seconds']['one by one'] / row['seconds']['together']:.1f}"),
    ("switch", "{seconds[switch]:ms}"),
    ("file of a profile", "{file_bytes:size}"),
]


def report(document: Document) -> str:
    """The results file as Markdown."""
    return f"{table(COLUMNS, document['rows'])}\n\n{made_by(document)}"
