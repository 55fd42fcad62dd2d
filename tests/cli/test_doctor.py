"""The doctor finds a broken library, a missing Triton and wrong results, and finds nothing where all is well."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from processes import run, without

import snell
from snell import backends, native
from snell.backends.blocked import BlockedBackend
from snell.backends.cpu import CpuBackend
from snell.cli import environment
from snell.cli.doctor import main
from snell.testing import cases, selfcheck

needs_native = pytest.mark.skipif("cpu" not in backends.AVAILABLE, reason="the native library was not built")


@pytest.fixture(autouse=True)
def _fewer_cases(monkeypatch):
    """The backends that need no interpreter, on the settings that a slow one gets."""
    every = cases.settings
    monkeypatch.setattr(selfcheck, "settings", lambda thinned: every(True))
    monkeypatch.delitem(backends.AVAILABLE, "triton", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def examine():
    done = CliRunner().invoke(main, ["--json"])
    return done.exit_code, json.loads(done.stdout)


# --- a machine where all is well


@needs_native
def test_all_is_well_here():
    status, document = examine()
    assert (status, document["problems"], document["ok"]) == (0, [], True)
    checked = {(one["backend"], one["operation"]): one for one in document["self_check"]}
    assert {backend for backend, _ in checked} == set(backends.AVAILABLE)
    # One kernel function of five has smooth maxima, and the slow backend gets a part of the settings.
    assert all(one["cases"] >= (1 if operation == "smooth maxima" else 6) for (_, operation), one in checked.items())
    # Errors are measured: no bound is so wide that nothing shows, and none is exceeded.
    for operation in ("merge", "linear, forward", "linear, backward"):
        assert 1e-3 < checked["cpu", operation]["largest_error"] <= 1
    versions = {one["name"]: one["text"] for one in document["findings"] if one["section"] == "versions"}
    assert versions["torch"].startswith(torch.__version__)
    assert {"python", "numpy", "peft", "transformers", "click"} <= versions.keys()
    assert "pytest" not in versions


def test_words_are_coloured_on_a_terminal_alone(monkeypatch):
    monkeypatch.setattr("snell.cli.doctor.places", lambda: [])
    assert "\x1b[" not in CliRunner().invoke(main).output
    assert "\x1b[32m" in CliRunner().invoke(main, color=True).output


# --- a broken installation


def installed_anew(folder: Path) -> Path:
    """A copy of the installed package in ``folder``; the path of its native library."""
    home = Path(snell.__file__).parent
    shutil.copytree(home, folder / "snell", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("kernels", "bench"):
        beside = importlib.util.find_spec(f"snell.{name}").submodule_search_locations[0]
        shutil.copytree(beside, folder / "snell" / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("results"))
    return folder / "snell" / native.PATH.name


@needs_native
def test_a_library_cut_short_is_a_problem(tmp_path):
    library = installed_anew(tmp_path)
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    done = run([sys.executable, "-m", "snell", "doctor", "--json"], tmp_path)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    [problem] = document["problems"]
    words = f"{library} is truncated: it holds {len(whole) // 2} of {len(whole)} bytes"
    assert problem.startswith(f"native library, file: the native library does not load: {words}")
    assert {one["backend"] for one in document["self_check"]} == {"blocked"}


@pytest.mark.parametrize(
    "contents, words, advice",
    [(b"not a library" * 100, "invalid ELF header", "reinstall snell"), (None, "was not built", "C++ compiler")],
)
def test_it_says_what_is_wrong_with_the_library_and_what_to_do(monkeypatch, tmp_path, contents, words, advice):
    path = tmp_path / "_native.so"
    if contents is not None:
        path.write_bytes(contents)
    monkeypatch.setattr(native, "PATH", path)
    monkeypatch.setattr(native, "_problem", native._load()[1])
    finding = environment.native_library()
    assert finding.verdict == "problem"
    assert words in finding.text
    assert advice in finding.advice


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU needs Triton")
def test_a_missing_triton_is_noted_where_there_is_no_gpu():
    done = without("triton", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    # Packages of extras may be missing too.
    line = next(line for line in done.stdout.splitlines() if "not installed" in line and "(extra" not in line)
    assert line.split()[:2] == ["note", "package"]
    assert "-> for a GPU: pip install 'triton>=" in done.stdout


@pytest.mark.parametrize("gpu, verdict", [(True, "problem"), (False, "note")])
def test_what_a_missing_triton_means_depends_on_the_gpu(monkeypatch, gpu, verdict):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(environment, "has_nvidia_gpu", lambda: gpu)
    finding = environment.triton()
    assert finding.verdict == verdict
    assert finding.text.startswith("not installed")


def test_a_gpu_that_torch_cannot_use_is_a_problem(monkeypatch):
    monkeypatch.setattr(environment, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [one.name for one in environment.machine() if one.verdict == "problem"] == ["GPU"]


def test_versions_are_judged_by_what_the_package_declares(monkeypatch):
    version = importlib.metadata.version

    def other(name):
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"peft": "0.1", "torch": "0.1", "trl": "1.16"}.get(name) or version(name)  # trl need not be here

    monkeypatch.setattr(importlib.metadata, "version", other)
    found = {one.name: one for one in environment.versions()}
    assert {name: one.verdict for name, one in found.items() if one.verdict != "ok"} == {
        "peft": "problem",
        "torch": "problem",
        "transformers": "note",
    }
    for name in ("peft", "transformers"):
        declared = next(line for line in importlib.metadata.requires("snell") if line.startswith(name))
        assert found[name].advice == f"pip install '{declared.partition(';')[0].strip()}'"


@pytest.mark.parametrize(
    "record, command",
    [
        ('{"url": "file:///a/clone", "dir_info": {"editable": true}}', "--editable file:///a/clone"),
        ('{"url": "file:///a%20b/snell.whl", "archive_info": {}}', "file:///a%20b/snell.whl"),
        (None, "PATH_OF_THE_CLONE_OR_WHEEL"),
    ],
)
def test_installing_anew_names_what_snell_was_installed_from(monkeypatch, tmp_path, record, command):
    if record is not None:
        (tmp_path / "direct_url.json").write_text(record)
    installed = importlib.metadata.PathDistribution(tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed)
    monkeypatch.setattr(native, "PATH", tmp_path / "_native.so")
    monkeypatch.setattr(native, "_problem", "was not built")
    monkeypatch.setattr(sys, "platform", "linux")
    advice = environment.native_library().advice
    assert advice == f"install a C++ compiler (g++), then: pip install --force-reinstall --no-deps {command}"


@needs_native
def test_a_missing_openmp_runtime_is_asked_for(monkeypatch):
    problem = "does not load: libgomp.so.1: cannot open shared object file: No such file or directory"
    monkeypatch.setattr(native, "_problem", problem)
    assert "libgomp1 on Debian" in environment.native_library().advice


# --- wrong results


@needs_native
@pytest.mark.parametrize("operation, named", [("merge", "merge"), ("factor_grad", "backward")])
def test_a_result_off_by_a_thousandth_fails_the_doctor(monkeypatch, operation, named):
    right = getattr(CpuBackend, operation)

    def off(self, first, second, results, *rest):
        right(self, first, second, results, *rest)
        (results if operation == "merge" else results.A).mul_(1.001)

    monkeypatch.setattr(CpuBackend, operation, off)
    status, document = examine()
    assert status == 1
    assert document["problems"]
    assert all(problem.startswith("backend cpu on cpu") for problem in document["problems"])
    assert any(named in problem for problem in document["problems"])


def test_what_raises_is_a_failure_in_a_sentence(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no kernel image\nand many more lines")

    monkeypatch.setattr(BlockedBackend, "merge", refuse)
    done = CliRunner().invoke(main)
    assert done.exit_code == 1
    assert "raises RuntimeError: no kernel image" in done.output
    assert "more lines" not in done.output
    assert "Traceback" not in done.output


# --- the CUDA library


def test_the_cuda_library_is_asked_for_and_absent(monkeypatch):
    monkeypatch.setattr("snell.kernels.cuda._problem", "was not built (no nvcc at installation?)")
    assert environment.cuda_library().verdict == environment.OK
    monkeypatch.setenv("SNELL_CUDA_SELECT", "1")
    found = environment.cuda_library()
    assert found.verdict == environment.NOTE
    assert "nvcc" in found.advice


def test_the_cuda_library_is_there(monkeypatch):
    monkeypatch.setattr("snell.kernels.cuda._problem", None)
    assert "unused without SNELL_CUDA_SELECT=1" in environment.cuda_library().text
