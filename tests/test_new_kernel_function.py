"""A kernel function is added in as many places as docs/method.md says, and then works in every backend.

A copy of the sources gets a kernel function that the package lacks, by insertions alone. The self-check then holds each
backend of the copy to its error bounds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


class Insertion(NamedTuple):
    """``text``, put into ``file`` right before the one place where it says ``before``."""

    file: str
    before: str
    text: str


#: alpha * exp(-beta * |b - a|) + gamma
INSERTIONS = (
    Insertion(
        "snell/kernel_functions.py",
        "def _rbf(",
        """def _laplacian(statistics: Sequence[Tensor], theta: Tensor) -> Tensor:
    alpha, beta, gamma = theta
    return alpha * torch.exp(-beta * statistics[0]) + gamma


""",
    ),
    Insertion(
        "snell/kernel_functions.py",
        '    "rbf": ',
        """    "laplacian": KernelFunction(
        "distance", False, True, lambda groups, scale: [scale, 1.0, -scale], _laplacian
    ),
""",
    ),
    Insertion(
        "csrc/cpu/kappa.h",
        "struct Rbf :",
        """struct Laplacian : Norm {
  static constexpr bool grouped = false;
  static constexpr int scalars = 3;
  template <class T, class V>
  static SNELL_INLINE V add_group(const T* theta, int, V norm, V) {
    return fma(splat(theta[0]), exp(-theta[1] * norm), splat(theta[2]));
  }
  template <class T>
  static SNELL_INLINE Vec<T> slope(const T* theta, int, Vec<T> norm, Vec<T> H, Vec<T>* dtheta) {
    Vec<T> unit = exp(-theta[1] * norm);
    Vec<T> inner = -theta[0] * H * unit;
    dtheta[0] += H * unit;
    dtheta[1] += inner * norm;
    dtheta[2] += H;
    return norm == T(0) ? norm : theta[1] * inner / norm;
  }
};

""",
    ),
    Insertion("csrc/cpu/kappa.h", '  ROW("rbf", Rbf)', '  ROW("laplacian", Laplacian) \\\n'),
    Insertion("kernels/kappa.py", '"rbf": "square"', '"laplacian": "norm", '),
    Insertion(
        "kernels/kappa.py",
        "@triton.jit\ndef scalars(",
        """@triton.jit
def laplacian(norm, theta_ptr, p, K, H):
    alpha, beta, gamma = scalars(theta_ptr, norm)
    unit = tl.exp(-(beta * norm))
    inner = -(H * alpha * unit)
    return tl.fma(unit, alpha, gamma), tl.where(norm == 0.0, 0.0, beta * inner / norm), (H * unit, inner * norm, H)


""",
    ),
    Insertion(
        "kernels/kappa.py",
        '    if KERNEL == "rbf":',
        """    if KERNEL == "laplacian":
        return laplacian(statistic, theta_ptr, p, K, H)
""",
    ),
    Insertion(
        "snell/testing/bounds.py",
        "def _of_unit(",
        """def _laplacian(s: list[_Statistic], theta: Tensor, eps: float) -> _Scalar:
    (alpha, beta, _), (norm, norm_error) = theta.abs(), s[0]
    unit = torch.exp(-theta[1] * norm)
    unit_error = unit * (beta * norm_error + 16 * eps)
    slope_error = alpha * (unit_error + unit * norm_error / norm)
    return _of_unit(s[0], theta, eps, (unit, unit_error), (alpha * unit, slope_error), beta / norm)


""",
    ),
    Insertion("snell/testing/bounds.py", '    "rbf": _rbf,', '    "laplacian": _laplacian,\n'),
)

CHECK = """
import json, torch, snell
from snell import SnellLinear, backends
from snell.testing import cases, selfcheck

every = cases.settings
selfcheck.settings = lambda thinned: [one for one in every(thinned) if one.kernel == "laplacian"]
found = [one for place in selfcheck.places() for one in selfcheck.check(*place)]

layer = SnellLinear(9, 7, rank=4, kernel="laplacian", sparsity=0)
assert isinstance(layer.snell_theta, torch.nn.Parameter)
alpha, beta, gamma = layer.snell_theta.tolist()
K = alpha * torch.exp(-beta * torch.cdist(layer.snell_B, layer.snell_A)) + gamma
print(json.dumps({
    "snell": snell.__file__,
    "formula": torch.allclose(layer.delta_weight(), K, atol=1e-6),
    "self_check": [[one.backend, one.operation, one.cases, one.verdict() if not one.ok else ""] for one in found],
}))
"""


def insert(folder: Path, insertion: Insertion) -> None:
    path = folder / insertion.file
    text = path.read_text()
    assert text.count(insertion.before) == 1, insertion
    path.write_text(text.replace(insertion.before, insertion.text + insertion.before))


def build(folder: Path) -> None:
    """The native library for the base instruction set, hardly optimised: that compiles in seconds."""
    assert COMPILER is not None
    flags = ["-std=c++17", "-O1", "-fopenmp", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-DSNELL_ISA=base"]
    sources = sorted((folder / "csrc" / "cpu").glob("*.cpp"))
    jobs = [subprocess.Popen([COMPILER, *flags, "-c", source, "-o", source.with_suffix(".o")]) for source in sources]
    assert [job.wait() for job in jobs] == [0] * len(sources)
    objects = [source.with_suffix(".o") for source in sources]
    library = folder / "snell" / "_native.so"
    subprocess.run([COMPILER, "-shared", "-fopenmp", *objects, "-o", library], check=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The sources with the kernel function, built."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("snell", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for insertion in INSERTIONS:
        insert(folder, insertion)
    shutil.move(folder / "kernels", folder / "snell" / "kernels")
    if COMPILER is not None:
        build(folder)
    return folder


def test_a_new_kernel_function_works_in_every_backend(copy):
    environment = {**os.environ, "PYTHONPATH": str(copy), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["snell"]).is_relative_to(copy)
    assert found["formula"]
    assert [one for one in found["self_check"] if one[3]] == []
    expected = {"blocked", *(["cpu"] if COMPILER else []), *(["triton"] if _has_triton() else [])}
    checked = {(backend, operation): cases for backend, operation, cases, _ in found["self_check"]}
    for backend in expected:
        for operation in ("select", "survivors", "merge", "factor gradients", "linear, forward", "linear, backward"):
            assert checked.pop((backend, operation)) >= 4
    assert {backend for backend, _ in checked} <= expected


def test_the_page_says_how_many_places_that_takes():
    page = (ROOT / "docs" / "method.md").read_text()
    section = page.partition("\n## Adding a kernel function\n")[2].partition("\n## ")[0]
    files = {insertion.file for insertion in INSERTIONS}
    numbers = re.search(r"(\d+) insertions in (\d+) files", section)
    assert numbers is not None
    assert (int(numbers[1]), int(numbers[2])) == (len(INSERTIONS), len(files))
    assert set(re.findall(r"^\d\. `([^`]+)`", section, re.MULTILINE)) == files


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None
