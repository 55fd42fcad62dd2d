"""CI runs this from an empty folder, in an environment that holds the wheel and nothing of the source tree."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch

import snell
from snell import backends, native, reference

home = Path(snell.__file__).resolve().parent
assert "site-packages" in home.parts, f"snell comes from {home}, not from the wheel"
assert native.available(), "the wheel holds no native library that loads here"
assert "cpu" in backends.AVAILABLE
assert "Tag: py3-none-manylinux" in (importlib.metadata.distribution("snell").read_text("WHEEL") or "")
maps = Path("/proc/self/maps").read_text().splitlines()
runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
assert len(runtimes) == 1, f"two OpenMP runtimes are loaded: {sorted(runtimes)}"
assert Path(torch.__file__).parent in Path(*runtimes).parents, f"the OpenMP runtime is not torch's: {runtimes}"
assert "peft" not in sys.modules, "importing snell alone must not need its extras"

layer = snell.SnellLinear(96, 80, rank=8, sparsity=0.9, dtype=torch.float64)
x = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
spec = layer.spec
settings = {"sparsity": spec.sparsity, "kernel": spec.kernel, "groups": spec.groups, "gate": spec.gate}
inputs = (x, layer.snell_A, layer.snell_B)
expected = reference.snell_linear(
    x, layer.weight, layer.bias, layer.snell_A, layer.snell_B, layer.snell_theta, **settings
)
grad_y = torch.randn_like(expected)
pairs = zip(
    (layer(x), *torch.autograd.grad(layer(x), inputs, grad_y)),
    (expected, *torch.autograd.grad(expected, inputs, grad_y)),
    strict=True,
)
assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in pairs)
assert layer.num_survivors() == 96 * 80 - 6912
done = subprocess.run([sys.executable, "-m", "snell", "--version"], capture_output=True, text=True, check=False)
assert snell.__version__ in done.stdout or "pip install 'click" in done.stderr, done.stderr
print(f"snell {snell.__version__} from its wheel: native ({native.instruction_set()}) agrees with the reference")
