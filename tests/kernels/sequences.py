"""Prints what PTX does to the accumulators of K on tensor cores, by kernel; as JSON. Arguments: sm, kernel function."""

import json
import re
import sys
from collections.abc import Iterator
from unittest import mock

import torch

from snell.bench import core
from snell.bench.experiments import resources
from snell.kernels import split

LINE = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;\n]*);", re.MULTILINE)

Lines = list[tuple[str, list[tuple[str, ...]]]]


def operands(text: str) -> list[tuple[str, ...]]:
    """The registers of each operand; several in braces are one operand."""
    return [tuple(re.findall(r"%\w+", one)) for one in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text)]


def sequence(register: str, lines: Lines) -> Iterator[str]:
    """The instructions that write the register; a letter for each operand of the matrix instructions."""
    names: dict[tuple[str, ...], str] = {}
    for name, (out, *inputs) in lines:
        if name.startswith("mma") and register in out:
            left, right = (names.setdefault(one, chr(65 + len(names))) for one in inputs[:2])
            yield f"{name} {left} {right} {'in place' if inputs[2] == out else 'elsewhere'}"
        elif out == (register,):
            yield name


def sequences(ptx: str) -> list[str]:
    """Of every accumulator, each different one once."""
    lines = [(name, operands(rest)) for name, rest in LINE.findall(ptx)]
    products = [out for name, (out, *_) in lines if name.startswith("mma") and ".f16." in name]
    return sorted({"; ".join(sequence(register, lines)) for out in products for register in out})


found: dict[str, list[str]] = {}


def record(compiled, *_) -> dict:
    found[compiled.metadata.name] = sequences(compiled.asm["ptx"])
    return {}


arch, kernel = int(sys.argv[1]), sys.argv[2]
update = resources.update_of(kernel, 32, 2 if kernel == "piecewise_linear" else 1)
with split.use(True), mock.patch.object(resources, "resources", record):
    for operation in ("merge", "factor_grad", "few_tokens", "select"):

        def call(operation=operation):
            core.kernel_calls(update, torch.bfloat16)[operation]()

        list(resources.launches(call, arch, set()))
print(json.dumps({name: told for name, told in found.items() if told}))
