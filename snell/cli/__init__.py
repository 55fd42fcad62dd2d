"""The command line: ``snell doctor``, ``snell demo``, ``snell inspect``, ``snell bench``, ``snell study``."""

from __future__ import annotations

import click

from snell.cli.lazy import LazyGroup

_EXPERIMENTS, _PAPER = "snell.bench.experiments", "snell.bench.paper"

#: Module and one line of help of each command; a module is imported when its command runs.
COMMANDS = {
    "Commands": {
        "doctor": ("snell.cli.doctor", "Report what snell finds on this machine, and check every operation on it."),
        "inspect": (
            "snell.cli.inspect",
            "Show a saved adapter: which entries survive, and how much it changes each layer.",
        ),
        "demo": (
            f"{_EXPERIMENTS}.demo",
            "Tune a small ViT for another domain: SNELL, LoRA, full tuning, linear probe.",
        ),
    },
}

#: The same for ``snell bench``.
BENCHMARKS = {
    "Layers and models": {
        "layer": (
            f"{_EXPERIMENTS}.layer",
            "One layer's forward and backward, compared with the floor and other methods.",
        ),
        "models": (f"{_EXPERIMENTS}.models", "A whole training step through PEFT, compared with other methods."),
        "red": (f"{_EXPERIMENTS}.red", "A whole training step of RED, compared with (IA)^3 and LoRA."),
        "profiles": (f"{_EXPERIMENTS}.profiles", "X-PEFT: masks over a bank, many profiles in a step, a switch."),
        "competition": (f"{_EXPERIMENTS}.competition", "One threshold for a whole model, and a budget beside a step."),
        "operations": (f"{_EXPERIMENTS}.operations", "A layer's operations on a CPU, compared with a copy and a GEMM."),
        "growth": (f"{_EXPERIMENTS}.growth", "How time and memory grow, compared with the cost model."),
        "freezing": (
            f"{_EXPERIMENTS}.freezing",
            "Selective freezing (SAFE): cost and accuracy beside the run without.",
        ),
    },
    "The paper's experiments": {
        "steps": (f"{_PAPER}.steps", "The paper's Table A14: a step's time relative to LoRA-8 on ViT-B/16."),
        "memory": (f"{_PAPER}.memory", "The paper's Table A12: memory while ViT-B, L and H train."),
        "gates": (f"{_PAPER}.gates", "Accuracy by gate, scale, sparsity and learning rate, compared with LoRA."),
        "fit": (f"{_PAPER}.fit", "The paper's Figure 4(a): fitting random matrices by each kernel function."),
        "sparsify": (f"{_PAPER}.sparsify", "The paper's Table 5 on real data: what is sparsified, and at what rank."),
        "matrix-rank": (f"{_PAPER}.matrix_rank", "The rank of the merged update by kernel function."),
    },
    "Operations on a GPU": {
        "merge": (f"{_EXPERIMENTS}.gpu", "Writing W0 + dW, compared with a copy."),
        "select": (f"{_EXPERIMENTS}.gpu", "Selecting thresholds, layer by layer and a whole model at once."),
        "factor-grad": (f"{_EXPERIMENTS}.gpu", "The factors' gradients, compared with a copy."),
        "generate": (f"{_EXPERIMENTS}.gpu", "Few tokens through an unmerged layer."),
        "resources": (
            f"{_EXPERIMENTS}.resources",
            "Registers, memory and predicted cost of the GPU kernels, compiled ahead of time. Needs no GPU.",
        ),
        "tune": (f"{_EXPERIMENTS}.tune", "Search tile sizes and print rows for the table of launch parameters."),
    },
}

#: The same for ``snell study``.
STUDIES = {
    "Studies": {
        "classify": ("snell.study.command", "Methods of fine-tuning on real data, paired with LoRA draw by draw."),
        "curve": ("snell.study.command:curve", "The difference from LoRA as one setting varies: rank, labels, depth."),
        "translate": ("snell.study.command:translate", "Methods within budgets of parameters on translation."),
        "dynamics": ("snell.study.dynamics", "How survivors and gradients move while SNELL trains, by gate and start."),
        "freezing": ("snell.study.freezing", "Selective freezing (SAFE) on MiniLM, beside the run without."),
    },
}


@click.group(cls=LazyGroup, sections=COMMANDS)
@click.version_option(package_name="snell")
def main() -> None:
    """Sparse low-rank fine-tuning near LoRA's cost."""


@main.group("bench", cls=LazyGroup, sections=BENCHMARKS)
def bench() -> None:
    """Measure: layers, models, growth, and the paper's experiments."""


@main.group("study", cls=LazyGroup, sections=STUDIES)
def study() -> None:
    """Compare accuracies on real data, with the errors of the differences."""
