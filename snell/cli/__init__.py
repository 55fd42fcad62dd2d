"""The command line: ``snell doctor``, ``snell demo``, ``snell inspect``, ``snell bench``."""

from __future__ import annotations

import click

from snell.cli.lazy import LazyGroup

#: Module and one line of help of each command; a module is imported when its command runs.
COMMANDS = {
    "demo": ("snell.bench.demo", "Tune a small ViT for another domain: SNELL, LoRA, full tuning, linear probe."),
}

#: The same for ``snell bench``.
BENCHMARKS = {
    "layer": ("snell.bench.layer", "One layer's forward and backward beside the floor and every peer."),
    "models": ("snell.bench.models", "A whole training step through PEFT beside every peer."),
    "minilm": ("snell.bench.minilm", "A real checkpoint on real text: SNELL, LoRA, linear probe."),
    "fit": ("snell.bench.paper.fit", "The paper's Figure 4(a): fitting random matrices by each kernel function."),
    "sparsify": ("snell.bench.paper.sparsify", "The paper's Table 5 on real data: what is sparsified, and at what rank."),
    "matrix-rank": ("snell.bench.paper.matrix_rank", "The rank of the merged update by kernel function."),
    "merge": ("snell.bench.merge", "GPU: writing W0 + dW beside a copy."),
    "select": ("snell.bench.select", "GPU: selecting thresholds, layer by layer and a whole model at once."),
    "factor-grad": ("snell.bench.factor_grad", "GPU: the factors' gradients beside a copy."),
    "generate": ("snell.bench.generate", "GPU: few tokens through an unmerged layer."),
    "resources": ("snell.bench.resources", "GPU kernels compiled ahead of time: registers, memory. Needs no GPU."),
    "tune": ("snell.bench.tune", "GPU: search tile sizes and print rows for the table of launch parameters."),
}


@click.group(cls=LazyGroup, modules=COMMANDS)
@click.version_option(package_name="snell")
def main() -> None:
    """Sparse low-rank fine-tuning near LoRA's cost."""


@main.group("bench", cls=LazyGroup, modules=BENCHMARKS)
def bench() -> None:
    """Measure: layers, models, growth, and the paper's experiments."""
