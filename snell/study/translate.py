"""What ``snell study translate`` runs, reports and draws."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
import transformers as tf
from tqdm import tqdm

from snell.bench.contenders import quiet_libraries
from snell.bench.names import METHODS
from snell.bench.report import Columns, Document, Panel, Series, made_by, picture, publish, standard_error, table
from snell.study.catalogues import Sentences, catalogues, text_files
from snell.study.claims import PAR, answered
from snell.study.journal import Journal
from snell.study.methods import Method
from snell.study.parent import NEW, parent
from snell.study.translation import BATCH, Grid, Pair, Translation, zero_shot


def run(
    out: Path,
    folder: Path,
    languages: Sequence[str],
    near: Sequence[tuple[str, str]],
    far: Sequence[tuple[str, str]],
    texts: Mapping[str, Path],
    checkpoint: Path | None,
    pretraining: int,
    methods: Sequence[Method],
    budgets: Sequence[float],
    sentences: Sequence[int],
    steps: int,
    draws: int,
    threads: int,
    max_minutes: float | None,
) -> None:
    """Compare the methods within each budget on each pair, and publish ``translate.json``."""
    import sacrebleu  # noqa: F401 (if it is missing, say so before hours of training)

    torch.set_num_threads(threads)
    quiet_libraries()
    parts = _parts(folder, [name for name, _ in (*near, *far)], texts)
    if checkpoint is None:
        sources = catalogues(folder, list(languages))
        training = {language: found["train"] for language, found in sources.items()}
        checkpoint = parent(out / f"parent-{pretraining}-{'-'.join(languages)}", training, pretraining)
        before = NEW
    else:
        before = ""
    model: Any = tf.AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint)
    kinds = [("near", *one) for one in near] + [("far", *one) for one in far]
    pairs = [Pair(language, kind, parts[language], code or before) for kind, language, code in kinds]
    grids = [
        Grid(checkpoint.name, pair.language, count, steps, budget)
        for count in sentences
        for pair in pairs
        for budget in budgets
    ]
    with Journal(out / "translate.jsonl") as journal:
        with tqdm(total=len(grids) * len(methods) * (5 + draws), unit="run", desc="translate") as bar:
            seconds = None if max_minutes is None else 60 * max_minutes
            study = Translation(model, tokenizer, pairs, journal, bar, deadline=seconds)
            untuned = [{"pair": pair.language, **_untuned(study, checkpoint.name, pair)} for pair in pairs]
            compared = []
            for grid in grids:
                rows, whole = study.rows(grid, methods, draws)
                kind = study.pairs[grid.pair].kind
                where = {"pair": grid.pair, "kind": kind, "sentences": grid.sentences, "budget": grid.budget}
                compared.append({**where, "complete": whole, "rows": rows})
        total = sum(p.numel() for p in model.parameters())
        settings = {"parent": checkpoint.name, "parameters": f"{total:,}", "steps": steps, "batch": BATCH}
        settings |= {f"{part} sentences": size for part, size in study.sizes.items()} | {"draws": draws}
        document = {"settings": settings, "untuned": untuned, "comparisons": compared, "claims": answered(compared)}
        publish(out, "translate", sys.modules[__name__], document, program="snell study translate")


def _parts(folder: Path, languages: list[str], texts: Mapping[str, Path]) -> dict[str, dict[str, Sentences]]:
    of_catalogues = [language for language in languages if language not in texts]
    found = catalogues(folder, of_catalogues) if of_catalogues else {}
    found |= {language: text_files(path) for language, path in texts.items() if language in languages}
    for language, parts in found.items():
        if empty := [part for part, some in parts.items() if not some]:
            raise click.ClickException(f"{language} has too few sentences: none for {', '.join(empty)}")
    return found


def _untuned(study: Translation, name: str, pair: Pair) -> dict[str, Any]:
    key = {"parent": name, "pair": pair.language, "untuned": study.sizes["test"]}
    result = study.journal.get(key)
    if result is None:
        result = zero_shot(study, pair)
        study.journal.add(key, result)
    return result


def _with_error(values: Sequence[float], sign: str = "") -> str:
    return f"{fmean(values):{sign}.2f} ± {standard_error(values):.2f}"


def _rows(document: Document) -> Iterator[dict[str, Any]]:
    """The rows of all comparisons, full fine-tuning once for a pair and a number of sentences."""
    seen = set()
    for one in document["comparisons"]:
        for row in one["rows"]:
            budget = None if row["method"] == "full" else one["budget"]
            key = one["sentences"], one["pair"], row["method"], budget
            if key not in seen:
                seen.add(key)
                yield {**{name: one[name] for name in ("pair", "kind", "sentences")}, **row, "budget": budget}


COLUMNS: Columns = [
    ("into", "{pair} ({kind})"),
    ("sentences", "{sentences:,}"),
    ("budget", lambda row: "all" if row["budget"] is None else f"{100 * row['budget']:g} %"),
    ("method", "{label}"),
    ("trained parameters", "{trained:,}"),
    ("chrF", lambda row: _with_error(row["test"])),
    ("BLEU", lambda row: _with_error(row["bleu"])),
    ("chrF - LoRA's", lambda row: _with_error(row["difference"], "+") if _compared(row) else ""),
    ("learning rate", "{rate:g}"),
]
CLAIMS: Columns = [
    ("claim", "{claim}"),
    ("method", "{method}"),
    ("figure, chrF points", "{figure}"),
    ("value", lambda row: f"{row['mean']:+.2f} ± {row['half']:.2f}" if "mean" in row else "-"),
    ("above", "{threshold:g}"),
    ("answer", "**{answer}**"),
]


def _compared(row: Mapping[str, Any]) -> bool:
    return row["budget"] is not None and len(row.get("difference", ())) > 1


def report(document: Document) -> str:
    """The results file as Markdown."""
    rows = list(_rows(document))
    signatures = sorted({row[name] for row in rows for name in ("bleu_signature", "chrf_signature")})
    untuned = ", ".join(f"{one['pair']} {one['chrf']:.1f}" for one in document["untuned"])
    rule = (
        f"Values: mean ± half of a 95 % interval, of paired differences. On par: less than {PAR:g} point behind. No "
        "correction for several answers."
    )
    unfinished = "" if all(one["complete"] for one in document["comparisons"]) else "Unfinished: more runs are to come."
    parts = [
        unfinished,
        table(CLAIMS, document["claims"]),
        rule,
        table(COLUMNS, rows),
        f"Mean ± standard error over the draws. chrF of the model before tuning: {untuned}.",
        *(f"`{signature}`" for signature in signatures),
        made_by(document),
    ]
    return "\n\n".join(part for part in parts if part)


def draw(path: Path, document: Document) -> None:
    """chrF over the budget: a column for each pair, a row for each number of sentences."""
    panels: dict[int, list[Panel]] = {}
    for count, pair, kind in dict.fromkeys((c["sentences"], c["pair"], c["kind"]) for c in document["comparisons"]):
        rows = [row for row in _rows(document) if (row["sentences"], row["pair"]) == (count, pair)]
        title, level = f"{pair} ({kind}), {count:,} sentences", None
        series = []
        for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "full"):
            its = [row for row in rows if row["method"] == method]
            errors = [standard_error(row["test"]) for row in its]
            shown = METHODS.get(method.partition(":")[0], METHODS["published"])
            x, y = [100 * row["budget"] for row in its], [fmean(row["test"]) for row in its]
            series.append(Series(y, x, its[0]["label"], shown.colour, "o-", errors))
        for row in rows:
            if row["method"] == "full":
                level = fmean(row["test"])
        of_size = panels.setdefault(count, [])
        of_size.append(Panel(title, series, "trained, % of the model", "chrF", "x", level=level))
    if any(panel.series for some in panels.values() for panel in some):
        title = "Translation within budgets (line: full fine-tuning; bars: standard error over draws)"
        picture(path, title, list(panels.values()), width=3.6, height=3.2)
