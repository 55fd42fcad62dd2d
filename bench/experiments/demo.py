"""The main job on real data: take a network from one domain to another with few labels.

``snell demo`` pre-trains a small vision transformer on scikit-learn's handwritten digits as they are
(the source), then tunes it for digits that are turned by a quarter, inverted and noisy (the target), of which ten
a class have labels: by SNELL on every linear layer of the frozen encoder, beside LoRA, full fine-tuning and a
linear probe. Every method takes the same number of steps and tries the same number of learning rates, with three
draws of labels each; the target's validation images choose the rate, its test images judge that rate's models alone.

Writes ``demo.png``, ``demo.json`` and the tuned SNELL model as an ordinary transformers checkpoint, ``demo_model``.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
from matplotlib.axes import Axes
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTForImageClassification

from snell import SnellLinear
from snell.bench import digits, memory
from snell.bench.clock import take_turns
from snell.bench.contenders import quiet_libraries, replaced
from snell.bench.digits import BATCH, CLASSES, RANK, Build, Images, Transfer
from snell.bench.names import METHODS as SHOWN
from snell.bench.protocol import at_edge, judged
from snell.bench.report import Columns, Document, Panel, Series, made_by, picture, publish, table

#: What the learning rate alone does not say. LoRA's alpha (of r, 2r, 4r) was chosen on the target's validation images,
#: with draws of labels that the demonstration does not use, and so were SNELL's defaults (snell bench gates).
SETTINGS = f"LoRA: rank {RANK}, alpha {RANK}. SNELL: rank {RANK}, otherwise its defaults."


@dataclass(frozen=True)
class Settings(digits.Settings):
    """``seeds`` number the draws of labels."""

    seeds: tuple[int, ...] = (0, 1, 2)
    timed_steps: int = 30


class Method(NamedTuple):
    """A way of tuning; every grid has the same number of rates."""

    name: str
    colour: str
    build: Build
    rates: tuple[float, ...]


METHODS = (
    Method("linear probe", "#9aa0a6", digits.linear_probe, (1e-2, 3e-2, 1e-1, 3e-1)),
    Method("full fine-tuning", SHOWN["full"].colour, digits.with_new_head, (3e-4, 1e-3, 3e-3, 1e-2)),
    Method("LoRA (PEFT)", SHOWN["lora"].colour, digits.lora, (1e-3, 3e-3, 1e-2, 3e-2)),
    Method("SNELL", SHOWN["snell"].colour, digits.snell, (1e-3, 3e-3, 1e-2, 3e-2)),
)


def costs(models: Mapping[str, nn.Module], batch: Images, repetitions: int) -> dict[str, dict[str, float]]:
    """Of each model's training step: bytes kept between forward and backward, and median seconds."""
    steps, found = {}, {}
    for name, model in models.items():
        kept = memory.saved_bytes(lambda model=model: digits.loss(model, batch), model.train().parameters())
        found[name] = {"trainable": memory.num_trained(model), "saved_bytes": kept}
        # A rate of 0 costs what any other does and leaves the model as it is.
        steps[name] = partial(digits.step, model, digits.optimizer(model, 0.0), batch)
        steps[name]()
    for name, seconds in take_turns(steps, "cpu", repetitions).items():
        found[name]["step_seconds"] = statistics.median(seconds)
        models[name].eval()
    return found


@torch.no_grad()
def weight_change(model: nn.Module, pretrained: nn.Module, layer: str) -> Tensor:
    """dW ``[m, n]`` of the layer named ``layer`` in the pre-trained model, however the method holds it."""
    tuned = next(module for name, module in model.named_modules() if name.endswith(layer))
    if isinstance(tuned, SnellLinear):
        return tuned.delta_weight()
    if isinstance(tuned, LoraLayer):
        return tuned.get_delta_weight("default")
    return tuned.weight - pretrained.get_submodule(layer).weight


@torch.no_grad()
def reload_merged(tuned: nn.Module, folder: Path, images: Images) -> float:
    """Save ``tuned`` with its updates merged into plain linear layers, load that as any transformers checkpoint.

    Returns:
        The largest difference between a logit of the loaded model and one of ``tuned``.

    Raises:
        AssertionError: a layer of the loaded model is no plain one, or its outputs are not ``tuned``'s.
    """
    expected = tuned(pixel_values=images.pixels).logits
    replaced(copy.deepcopy(tuned), SnellLinear.to_linear, SnellLinear).save_pretrained(folder)
    loaded = ViTForImageClassification.from_pretrained(folder).eval()
    logits = loaded(pixel_values=images.pixels).logits
    assert not any(isinstance(module, SnellLinear) for module in loaded.modules())
    # Both multiply by the same float32 W0 + dW; only the order of sums may differ.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    return (logits - expected).abs().max().item()


COLUMNS: Columns = [
    ("method", "{method}"),
    ("target accuracy, %", lambda r: f"{statistics.fmean(r['test']):.1f} ± {statistics.stdev(r['test']):.1f}"),
    ("trainable parameters", "{trainable:,}"),
    ("saved for backward", lambda r: f"{r['saved_bytes'] / 2**20:.2f} MiB"),
    ("time per step", lambda r: f"{r['step_seconds'] * 1e3:.1f} ms"),
    ("learning rate", lambda r: f"{r['rate']:g}{' (edge of its grid)' if at_edge(r) else ''}"),
]


def report(document: Document) -> str:
    """The results file as Markdown."""
    settings, before = document["settings"], document["target_accuracy_before_tuning"]
    shown = {"labels a class": "labels_per_class", "steps": "steps"}
    facts = {name: settings[key] for name, key in shown.items()} | {"draws": len(settings["seeds"])}
    return (
        f"{table(COLUMNS, document['methods'])}\n\nMean and standard deviation over the draws of labels; before tuning "
        f"{before:.1f} %. {settings['methods']}\n\n{made_by({**document, 'settings': facts})}"
    )


def draw_all(
    path: Path, domains: digits.Domains, document: Document, updates: Mapping[str, Tensor], layer: str
) -> None:
    """Both domains, what each method reached, and which entries of one layer's weight it changed."""

    def examples(images: Images, title: str) -> Callable[[Axes], None]:
        """One column a digit, four examples of each."""
        chosen = [torch.nonzero(images.labels == digit).flatten()[:4] for digit in range(CLASSES)]
        tiles = torch.stack([images.pixels[index, 0] for index in chosen])  # [digit, row, 8, 8]
        sheet = nn.functional.pad(tiles, (1, 1, 1, 1), value=float("nan")).permute(1, 2, 0, 3).reshape(40, 10 * CLASSES)
        return partial(image, values=sheet, title=title, limit=1.3, cmap="gray")

    def change(name: str, delta: Tensor) -> Callable[[Axes], None]:
        """Entries of dW by sign and size; entries that are exactly zero stay white."""
        shown = torch.where(delta == 0, torch.nan, delta.sign() * (delta.abs() / delta.abs().max()).sqrt())
        title = f"{name}: {int(delta.count_nonzero()):,} of {delta.numel():,} entries changed (red up, blue down)"
        return partial(image, values=shown.T, title=f"{title}\n{layer}", limit=1, cmap="RdBu_r")

    def image(axes: Axes, values: Tensor, title: str, limit: float, cmap: str) -> None:
        axes.imshow(values.numpy(), cmap=cmap, vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xticks=[], yticks=[])

    series, ticks = [], {}
    for x, (row, method) in enumerate(zip(document["methods"], METHODS, strict=False)):
        mean = statistics.fmean(row["test"])
        series.append(Series([mean], [x], colour=method.colour, bars=0.6, style={"alpha": 0.35}))
        series.append(Series(row["test"], [x] * len(row["test"]), colour=method.colour, look="o"))
        ticks[x] = row["method"].replace(" ", "\n", 1) + f"\n{mean:.1f}"
    title, level = (
        "test accuracy, % (dots: draws of labels; line: before tuning)",
        document["target_accuracy_before_tuning"],
    )
    upright = examples(domains.source_test, "source: handwritten digits, upright")
    turned = examples(domains.target_test, "target: turned by a quarter, inverted, noisy")
    top = [upright, turned, Panel(title, series, ylim=(0, 100), ticks=ticks, level=level)]
    # The probe changes no weight of the backbone.
    maps = [change(name, delta) for name, delta in updates.items() if delta.any()]
    picture(path, "A small vision transformer tuned for another domain with ten labels a class", [top, maps])


def run(out: Path, settings: Settings | None = None, methods: Sequence[Method] = METHODS) -> Document:
    """The whole demonstration; files go to ``out``."""
    quiet_libraries()
    start, settings = time.perf_counter(), settings or Settings()
    tunings = len(settings.seeds) * sum(len(method.rates) for method in methods)
    rows, models = [], {}
    with tqdm(total=settings.pretraining_steps + settings.steps * tunings, unit="step", mininterval=0.5) as bar:
        transfer = Transfer(settings, bar)
        for method in methods:
            bar.set_description(method.name)
            tuned = cache(partial(transfer.tuned, method.build))
            row = judged(
                lambda jobs, tuned=tuned: [transfer.accuracy(tuned(job.rate, job.draw), job.part) for job in jobs],
                *(method.rates, settings.seeds, settings.seeds),
            )
            rows.append({"method": method.name} | row)
            models[method.name] = tuned(row["rate"], settings.seeds[0])
    spent = costs(models, transfer.few(settings.seeds[0])[torch.arange(BATCH)], settings.timed_steps)
    domains, pretrained, layer = transfer.domains, transfer.pretrained, digits.shown_layer(transfer.pretrained)
    facts = {
        "settings": asdict(settings) | {"methods": SETTINGS},
        "source_accuracy": digits.accuracy(pretrained, domains.source_test),
        "target_accuracy_before_tuning": digits.accuracy(pretrained, domains.target_test),
        "reloaded_max_logit_difference": reload_merged(models["SNELL"], out / "demo_model", domains.target_test),
        "seconds": time.perf_counter() - start,
        "methods": [row | spent[row["method"]] for row in rows],
    }
    document = publish(out, "demo", sys.modules[__name__], facts, program="snell demo")
    updates = {name: weight_change(model, pretrained, layer) for name, model in models.items()}
    draw_all(out / "demo.png", domains, document, updates, layer)
    click.echo(
        f"\nPre-trained: {document['source_accuracy']:.1f} % on the source's test images. SNELL merged into plain "
        f"nn.Linear layers, saved as a plain ViT and loaded: largest difference of a logit "
        f"{document['reloaded_max_logit_difference']:.1e}.\nPicture and model: {out}/demo.png, {out}/demo_model/. "
        f"{document['seconds']:.0f} s in all."
    )
    return document
