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
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from torch import nn
from tqdm import tqdm
from transformers import ViTForImageClassification
from transformers.utils import logging

from snell import SnellLinear
from snell.bench.demo_data import Domains, Images, draw_few, load_domains
from snell.bench.demo_methods import METHODS, SETTINGS, Method, map_backbone, new_vit, shown_layer, weight_change
from snell.bench.demo_report import Result, draw, table
from snell.bench.demo_training import BATCH, accuracy, costs, num_trainable, train
from snell.bench.record import made_by, out_option, write

__all__ = ["Settings", "main", "reload_merged", "run"]


@dataclass(frozen=True)
class Settings:
    """How much of everything."""

    pretraining_steps: int = 700
    pretraining_rate: float = 1e-3
    steps: int = 120
    labels_per_class: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    timed_steps: int = 30


class Transfer:
    """A pre-trained network and the domains it goes between; ``bar`` counts training steps of every kind."""

    def __init__(self, domains: Domains, settings: Settings, bar: tqdm) -> None:
        self.domains, self.settings, self.bar = domains, settings, bar
        bar.set_description("pre-training")
        torch.manual_seed(0)
        self.pretrained = new_vit()
        steps, rate = settings.pretraining_steps, settings.pretraining_rate
        train(self.pretrained, domains.source_train, lr=rate, steps=steps, seed=0, on_step=bar.update)

    def few(self, seed: int) -> Images:
        return draw_few(self.domains.target_pool, self.settings.labels_per_class, seed)

    def tuned(self, method: Method, lr: float, seed: int) -> nn.Module:
        """The network tuned by ``method``; the seed decides labels, batches, new head and factors."""
        self.bar.set_description(f"{method.name}, rate {lr:g}, seed {seed}")
        torch.manual_seed(seed)
        model = method.build(self.pretrained)
        train(model, self.few(seed), lr=lr, steps=self.settings.steps, seed=seed, on_step=self.bar.update)
        return model

    def evaluate(self, method: Method) -> tuple[Result, nn.Module]:
        """The method's row but for its costs, and its model of the first seed at the rate that validation chose."""
        validation, test = self.domains.target_validation, self.domains.target_test
        models = {lr: [self.tuned(method, lr, seed) for seed in self.settings.seeds] for lr in method.learning_rates}
        trials = {lr: fmean(accuracy(model, validation) for model in tuned) for lr, tuned in models.items()}
        best = max(trials, key=trials.__getitem__)
        return Result(method.name, trials, best, [accuracy(model, test) for model in models[best]]), models[best][0]


def reload_merged(tuned: nn.Module, folder: Path, images: Images) -> float:
    """Save ``tuned`` with its updates merged into plain linear layers, load that as any transformers checkpoint.

    Returns:
        The largest difference between a logit of the loaded model and one of ``tuned``.

    Raises:
        AssertionError: a layer of the loaded model is no plain one, or its outputs are not ``tuned``'s.
    """
    with torch.no_grad():
        expected = tuned(pixel_values=images.pixels).logits
        merged = map_backbone(copy.deepcopy(tuned), SnellLinear, SnellLinear.to_linear)
        merged.save_pretrained(folder)
        loaded = ViTForImageClassification.from_pretrained(folder).eval()
        logits = loaded(pixel_values=images.pixels).logits
    assert not any(isinstance(module, SnellLinear) for module in loaded.modules())
    # Both multiply by the same float32 W0 + dW; only the order of sums may differ.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    return (logits - expected).abs().max().item()


def run(out: Path, settings: Settings | None = None, methods: Sequence[Method] = METHODS) -> list[Result]:
    """The whole demonstration; files go to ``out``."""
    start = time.perf_counter()
    settings = settings or Settings()
    out.mkdir(parents=True, exist_ok=True)
    domains = load_domains()
    runs = len(settings.seeds) * sum(len(method.learning_rates) for method in methods)
    with tqdm(total=settings.pretraining_steps + settings.steps * runs, unit="step", mininterval=0.5) as bar:
        transfer = Transfer(domains, settings, bar)
        rows = [transfer.evaluate(method) for method in methods]
        bar.set_description("done")
    results, models = [result for result, _ in rows], [model for _, model in rows]

    batch = transfer.few(settings.seeds[0])[torch.arange(BATCH)]
    for result, model, cost in zip(results, models, costs(models, batch, settings.timed_steps), strict=True):
        result.trainable = num_trainable(model)
        result.saved_bytes, result.step_seconds = cost

    source = accuracy(transfer.pretrained, domains.source_test)
    untuned = accuracy(transfer.pretrained, domains.target_test)
    layer = shown_layer(transfer.pretrained)
    updates = {r.method: weight_change(m, transfer.pretrained, layer) for r, m in zip(results, models, strict=True)}
    draw(out / "demo.png", domains, results, untuned, updates, layer)
    difference = reload_merged(models[-1], out / "demo_model", domains.target_test)
    facts = {
        "settings": asdict(settings) | {"methods": SETTINGS},
        "source_accuracy": source,
        "target_accuracy_before_tuning": untuned,
        "reloaded_max_logit_difference": difference,
        "seconds": time.perf_counter() - start,
    }
    rows_json = [asdict(r) | {"mean": r.mean, "spread": r.spread} for r in results]
    write(out, "demo", facts | {"methods": rows_json})

    print(f"\nPre-trained: {source:.1f} % on the source's test images, {untuned:.1f} % on the target's.")
    print(
        f"Tuned with {settings.labels_per_class} labels a class in {settings.steps} steps; mean ± sd of "
        f"{len(settings.seeds)} seeds on {len(domains.target_test)} test images:\n"
    )
    print(table(results))
    print(
        f"\n{SETTINGS}\n\nSNELL merged into plain nn.Linear layers, saved and loaded as a plain ViT: "
        f"largest difference of a logit {difference:.1e}.\n"
        f"Picture, figures and model: {out}/demo.png, demo.json, demo_model/. {facts['seconds']:.0f} s in all."
    )
    return results


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    results = [Result(**{field.name: row[field.name] for field in fields(Result)}) for row in document["methods"]]
    for result in results:  # JSON turns the rates, which are keys, into strings
        result.trials = {float(rate): accuracy for rate, accuracy in result.trials.items()}
    settings, before = document["settings"], document["target_accuracy_before_tuning"]
    shown = {
        "labels a class": settings["labels_per_class"],
        "steps": settings["steps"],
        "draws": len(settings["seeds"]),
    }
    return (
        f"{table(results)}\n\nMean and standard deviation over the draws of labels; before tuning {before:.1f} %. "
        f"{settings['methods']}\n\n{made_by(document | {'settings': shown})}"
    )


@click.command(help=__doc__)
@out_option
def main(out: Path) -> None:
    # Their own progress bars and deprecations would break ours up.
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    run(out)


if __name__ == "__main__":
    main()
