"""The command line: ``snell doctor``, ``snell demo``, ``snell inspect``, ``snell bench``."""

from __future__ import annotations

import click

from snell.cli.lazy import LazyGroup

#: Module and one line of help of each command; a module is imported when its command runs.
COMMANDS = {
    "Commands": {
        "doctor": ("snell.cli.doctor", "Say what snell finds on this machine, and check every operation on it."),
        "inspect": (
            "snell.cli.inspect",
            "Show a saved adapter: where its survivors lie, and how far it moves each layer.",
        ),
        "demo": ("snell.bench.demo", "Tune a small ViT for another domain: SNELL, LoRA, full tuning, linear probe."),
    },
}

#: The same for ``snell bench``.
BENCHMARKS = {
    "Layers and models": {
        "layer": ("snell.bench.layer", "One layer's forward and backward beside the floor and every peer."),
        "models": ("snell.bench.models", "A whole training step through PEFT beside every peer."),
        "operations": ("snell.bench.operations", "What a layer's operations take on a CPU, beside a copy and a GEMM."),
        "growth": ("snell.bench.growth", "How time and memory grow, beside the cost model."),
        "minilm": ("snell.bench.minilm", "A real checkpoint on real text: SNELL, LoRA, linear probe."),
        "soak": ("snell.bench.soak", "Training under random adapter events and under kill -9, beside quiet training."),
    },
    "The paper's experiments": {
        "steps": ("snell.bench.paper.steps", "The paper's Table A14: a step's time relative to LoRA-8 on ViT-B/16."),
        "memory": ("snell.bench.paper.memory", "The paper's Table A12: memory while ViT-B, L and H train."),
        "gates": ("snell.bench.paper.gates", "Accuracy by gate, scale, sparsity and learning rate, beside LoRA's."),
        "fit": ("snell.bench.paper.fit", "The paper's Figure 4(a): fitting random matrices by each kernel function."),
        "sparsify": (
            "snell.bench.paper.sparsify",
            "The paper's Table 5 on real data: what is sparsified, and at what rank.",
        ),
        "matrix-rank": ("snell.bench.paper.matrix_rank", "The rank of the merged update by kernel function."),
    },
    "Operations on a GPU": {
        "merge": ("snell.bench.merge", "Writing W0 + dW beside a copy."),
        "select": ("snell.bench.select", "Selecting thresholds, layer by layer and a whole model at once."),
        "factor-grad": ("snell.bench.factor_grad", "The factors' gradients beside a copy."),
        "generate": ("snell.bench.generate", "Few tokens through an unmerged layer."),
        "resources": ("snell.bench.resources", "GPU kernels compiled ahead of time: registers, memory. Needs no GPU."),
        "tune": ("snell.bench.tune", "Search tile sizes and print rows for the table of launch parameters."),
    },
}


@click.group(cls=LazyGroup, sections=COMMANDS)
@click.version_option(package_name="snell")
def main() -> None:
    """Sparse low-rank fine-tuning near LoRA's cost."""


@main.group("bench", cls=LazyGroup, sections=BENCHMARKS)
def bench() -> None:
    """Measure: layers, models, growth, and the paper's experiments."""
