"""Show what a saved SNELL, RED or X-PEFT adapter does to each layer, without loading the model.

ADAPTER_DIR is a folder that save_pretrained or the Trainer wrote (adapter_config.json and
adapter_model.safetensors). For every layer of a SNELL adapter: its shape, the rank, the share of zeros asked for and
counted, the threshold tau, and the Frobenius norm of dW; with --base also the norm of the base weight W0, and dW's in
percent of it, marked ! where it is larger than W0's. "Densest tenth" is the share of survivors in the densest tenth of
the rows, and of the columns (10 % would be uniform).

For every layer of a RED adapter: how many outputs are edited, the mean, smallest and largest scaling s, the share of s
below 0, and the root mean squares of s - 1 and of the bias c.

For every layer of an X-PEFT adapter: how many adapters the masks of A and B use (e to the entropy of a soft mask), how
much of their weight is alike, and how far profiles lie apart.

Writes inspect.json, and for SNELL inspect.png (where survivors lie in the matrices, and how layers compare). For a
Trainer's checkpoint with a budget it also writes inspect-budget.png: what each layer keeps, step by step.
"""

from __future__ import annotations

from pathlib import Path

import click

from snell.cli.options import out_option


@click.command(help=__doc__)
@click.argument("adapter_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base", metavar="NAME", help="Folder of the base model's checkpoint, or its name in the local cache.")
@out_option
def main(adapter_dir: Path, base: str | None, out: Path) -> None:
    # Here and not above: transformers and matplotlib take seconds to import, and --help needs neither.
    from snell.cli import inspect_red, inspect_report, inspect_xpeft
    from snell.cli.adapter import tuner_of

    folder, tuner = tuner_of(adapter_dir)
    if tuner == "SNELL":
        inspect_report.report(folder, base, out)
    elif base is not None:
        raise click.UsageError(f"--base is for SNELL adapters: nothing of {tuner} is compared with a weight")
    else:
        {"RED": inspect_red, "XPEFT": inspect_xpeft}[tuner].report(folder, out)
