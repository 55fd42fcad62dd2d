"""What the doctor asks of a machine: versions, the native library, Triton, and which backend serves which device."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from snell import backends, native
from snell.cli.machine import machine_facts
from snell.kernels import cuda

OK, NOTE, PROBLEM = "ok", "note", "problem"

#: Names of the instruction sets that the native library is compiled for.
_ISAS = {"v4": "AVX-512", "v3": "AVX2", "base": "no vector set"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section, name: where it stands.
        verdict: ``ok``, ``note`` (worth knowing) or ``problem`` (something that should work does not).
        text: what was found.  advice: what to do about it, if anything.
    """

    section: str
    name: str
    verdict: str
    text: str
    advice: str = ""


def has_nvidia_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU, whether or not torch can use it."""
    return Path("/proc/driver/nvidia/version").exists() or (
        torch.version.cuda is not None and torch.cuda.is_available()
    )


def machine() -> Iterator[Finding]:
    """Processor and GPUs."""
    facts = machine_facts()
    cores = f"{facts['cores']} cores, {facts['threads']} of them for torch"
    yield Finding("machine", "processor", OK, f"{facts['cpu'] or platform.machine()}, {cores}")
    yield Finding("machine", "system", OK, f"{platform.system()} {platform.machine()}")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("machine", f"GPU {index}", OK, f"{name}, compute capability {major}.{minor}")
    if not torch.cuda.is_available():
        if has_nvidia_gpu():
            advice = "install a torch that is built for CUDA: see https://pytorch.org/get-started"
            text = f"an NVIDIA driver is installed, but torch {torch.__version__} cannot use a GPU"
            yield Finding("machine", "GPU", PROBLEM, text, advice)
        else:
            yield Finding("machine", "GPU", OK, "none")


def versions() -> Iterator[Finding]:
    """Python and every package that snell or one of its extras requires, with the required range."""
    metadata = importlib.metadata.metadata("snell")
    wanted = SpecifierSet(metadata["Requires-Python"] or "")
    yield _version("python", platform.python_version(), wanted, None)
    extras = ["", *(extra for extra in metadata.get_all("Provides-Extra") or () if extra != "dev")]
    for line in importlib.metadata.requires("snell") or ():
        requirement = Requirement(line)
        marker = requirement.marker
        asked_by = next((e for e in extras if marker is None or marker.evaluate({"extra": e})), None)
        if requirement.name == "snell" or asked_by is None:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if requirement.name == "triton":  # reported in the section on Triton
                continue
            version = None
        yield _version(requirement.name, version, requirement.specifier, asked_by)


def _version(name: str, version: str | None, wanted: SpecifierSet, extra: str | None) -> Finding:
    if version is None:
        verdict = NOTE if extra else PROBLEM
        text = "not installed" + (f" (extra {extra})" if extra else "")
        return Finding("versions", name, verdict, text, f"pip install '{name}{wanted}'")
    if not wanted.contains(version, prereleases=True):
        text = f"{version} is not in the supported range, {wanted}"
        return Finding("versions", name, PROBLEM, text, f"pip install '{name}{wanted}'" if name != "python" else "")
    return Finding("versions", name, OK, f"{version} ({wanted})")


def native_library() -> Finding:
    """Whether the native library exists and loads; if not, the reason and the remedy."""
    problem = native.problem()
    if problem is None:
        isa = native.instruction_set() or ""
        return Finding("native library", "file", OK, f"{native.PATH} loads; it runs on {_ISAS.get(isa, isa)} ({isa})")
    text = f"the native library {problem}; layers on the CPU run on plain PyTorch, several times slower"
    if not native.PATH.exists() and not sys.platform.startswith("linux"):
        return Finding("native library", "file", NOTE, text)
    advice = f"install a C++ compiler (g++), then: {_reinstall()}"
    if native.PATH.exists():
        advice = f"reinstall snell: {_reinstall()}"
    if "libgomp" in problem:
        advice = "install the OpenMP runtime (libgomp1 on Debian, libgomp on Fedora), or a newer torch, which brings it"
    return Finding("native library", "file", PROBLEM, text, advice)


def _reinstall() -> str:
    """The command that reinstalls snell from the clone or wheel that pip recorded as its source."""
    record = json.loads(importlib.metadata.distribution("snell").read_text("direct_url.json") or "{}")
    source = shlex.quote(record.get("url", "PATH_OF_THE_CLONE_OR_WHEEL"))
    editable = "--editable " if record.get("dir_info", {}).get("editable") else ""
    return f"pip install --force-reinstall --no-deps {editable}{source}"


def triton() -> Finding:
    """Whether Triton is installed, and has a GPU to run on."""
    try:
        import triton as package

        version, reason = package.__version__, ""
    except Exception as error:  # a package that is there and does not import raises anything
        absent = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        version, reason = "", "not installed" if absent else f"does not import: {type(error).__name__}: {error}"
    if reason and has_nvidia_gpu():
        text = f"{reason}; layers on the GPU run on plain PyTorch, many times slower"
        return Finding("Triton", "package", PROBLEM, text, f"pip install '{_requirement('triton')}'")
    if reason:
        text = f"{reason}; it is only needed on NVIDIA GPUs, and this machine has none"
        return Finding("Triton", "package", NOTE, text, f"for a GPU: pip install '{_requirement('triton')}'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        text = f"{version}, interpreted (TRITON_INTERPRET=1): for tests, thousands of times slower"
        return Finding("Triton", "package", NOTE, text, "unset TRITON_INTERPRET")
    if "triton" not in backends.AVAILABLE:
        return Finding("Triton", "package", OK, f"{version}; unused, as there is no NVIDIA GPU that torch can use")
    return Finding("Triton", "package", OK, f"{version}; kernels are compiled for the GPU at first use")


def cuda_library() -> Finding:
    """Whether the CUDA library is built and loads, and whether it is asked for."""
    asked = os.environ.get("SNELL_CUDA_SELECT") == "1"
    if cuda.problem() is None:
        use = "selects thresholds on a GPU" if asked else "unused without SNELL_CUDA_SELECT=1"
        return Finding("CUDA library", "file", OK, f"{cuda.PATH} loads; {use}")
    text = f"the CUDA library {cuda.problem()}; the Triton kernels serve in its place"
    if not asked:
        return Finding("CUDA library", "file", OK, text)
    return Finding("CUDA library", "file", NOTE, text, f"put nvcc on the PATH, then: {_reinstall()}")


def _requirement(name: str) -> str:
    found = (Requirement(line) for line in importlib.metadata.requires("snell") or ())
    return next((f"{r.name}{r.specifier}" for r in found if r.name == name), name)


def devices() -> Iterator[Finding]:
    """Which backend serves which type of device, and why."""
    cpu, cuda = (backends.serving(device_type).name for device_type in ("cpu", "cuda"))
    why = "the native library is loaded" if cpu == "cpu" else f"the native library {native.problem()}"
    yield Finding("devices", "cpu", OK, f"{_describe(cpu)}, because {why}")
    if not torch.cuda.is_available():
        yield Finding("devices", "cuda", OK, f"none: torch {torch.__version__} finds no GPU")
    else:
        why = "Triton is installed and torch is built for CUDA"
        if cuda != "triton":
            why = "torch is built for ROCm" if torch.version.hip else "Triton does not import"
        yield Finding("devices", "cuda", OK, f"{_describe(cuda)}, because {why}")
    yield Finding("devices", "others", OK, f"{_describe('blocked')}, because it runs wherever torch does")


def _describe(backend: str) -> str:
    described = {"cpu": "native C++", "triton": "Triton kernels", "blocked": "plain PyTorch in blocks"}
    return f"backend {backend} ({described[backend]})"


def findings() -> list[Finding]:
    """All findings, in the order of the report."""
    return [*machine(), *versions(), native_library(), triton(), cuda_library(), *devices()]
