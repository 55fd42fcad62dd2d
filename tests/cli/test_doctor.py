"""The doctor finds a broken library, a missing Triton and wrong results, and finds nothing where all is well."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from processes import run, without

import snell
from snell import backends, native, schedule
from snell.backends import blocked, cpu
from snell.cli import cases, environment, selfcheck
from snell.cli.doctor import main

TRITON = backends.AVAILABLE.get("triton")

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


def wrong(checked: list[selfcheck.Checked]) -> set[str]:
    return {one.operation for one in checked if not one.ok}


# --- a machine where all is well


@needs_native
def test_all_is_well_here():
    status, document = examine()
    assert (status, document["problems"], document["ok"]) == (0, [], True)
    checked = {(one["backend"], one["operation"]): one for one in document["self_check"]}
    assert {backend for backend, _ in checked} == set(backends.AVAILABLE)
    assert all(one["cases"] >= 6 for one in checked.values())
    # Errors are measured: no bound is so wide that nothing shows, and none is exceeded.
    for operation in ("merge", "linear, forward", "linear, backward"):
        assert 1e-3 < checked["cpu", operation]["largest_error"] <= 1
    versions = {one["name"]: one["text"] for one in document["findings"] if one["section"] == "versions"}
    assert versions["torch"].startswith(torch.__version__)
    assert {"python", "numpy", "peft", "transformers", "click"} <= versions.keys()
    assert "pytest" not in versions


def test_the_thinned_settings_hold_every_pair():
    every, thinned = cases.settings(False), cases.settings(True)
    assert len(every) == len(set(every)) == 64
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(s[i], s[j]) for s in thinned} == {(s[i], s[j]) for s in every}


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
    [(b"not a library" * 100, "invalid ELF header", "install snell anew"), (None, "was not built", "C++ compiler")],
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
    line = next(line for line in done.stdout.splitlines() if "not installed" in line)
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
        return "0.1" if name in ("peft", "torch") else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    found = {one.name: one for one in environment.versions()}
    assert {name: one.verdict for name, one in found.items() if one.verdict != "ok"} == {
        "peft": "problem",
        "torch": "problem",
        "transformers": "note",
    }
    declared = next(line for line in importlib.metadata.requires("snell") if line.startswith("peft"))
    assert found["peft"].advice == f"pip install '{declared.partition(';')[0].strip()}'"
    assert found["transformers"].advice == "pip install 'snell[peft]'"


# --- wrong results


def off_by(share: float, function, *places: int):
    """The function, with what it writes into its arguments at ``places`` too large by a share."""

    def scaled(*args):
        result = function(*args)
        for place in places:
            args[place].mul_(1 + share)
        return result

    return scaled


@needs_native
@pytest.mark.parametrize("operation, places, named", [("merge_out", [5], "merge"), ("factor_grad", [7], "backward")])
def test_a_result_off_by_a_thousandth_fails_the_doctor(monkeypatch, operation, places, named):
    monkeypatch.setattr(cpu, operation, off_by(1e-3, getattr(cpu, operation), *places))
    status, document = examine()
    assert status == 1
    assert document["problems"]
    assert all(problem.startswith("backend cpu on cpu") for problem in document["problems"])
    assert any(named in problem for problem in document["problems"])


@pytest.mark.parametrize(
    "operation, places, expected",
    [
        ("merge_out", [5], {"merge", "factor gradients", "linear, forward", "x dW^T, both ways"}),
        ("factor_grad", [7], {"factor gradients", "linear, backward", "x dW^T, both ways"}),
        ("factor_grad", [8], {"factor gradients", "linear, backward", "x dW^T, both ways"}),
        ("factor_grad", [9], {"factor gradients", "linear, backward", "x dW^T, both ways"}),
    ],
)
def test_each_operation_is_checked(monkeypatch, operation, places, expected):
    monkeypatch.setattr(blocked, operation, off_by(1e-3, getattr(blocked, operation), *places))
    assert expected <= wrong(selfcheck.check("blocked", "cpu", True))


def test_one_wrong_survivor_is_found(monkeypatch):
    def next_larger(A, B, theta, sparsity, kernel, groups):
        return right(A, B, theta, sparsity + 1.0 / (A.shape[0] * B.shape[0]), kernel, groups)

    right = blocked.select_threshold
    monkeypatch.setattr(blocked, "select_threshold", next_larger)
    assert {"select", "survivors"} <= wrong(selfcheck.check("blocked", "cpu", True))


def test_one_wrong_entry_is_found(monkeypatch):
    def one_dropped(A, B, theta, tau, weight, out, kernel, groups, gate):
        right(A, B, theta, tau, weight, out, kernel, groups, gate)
        survivors = (out if weight is None else out - weight).nonzero()
        if gate != "none" and len(survivors):
            i, j = survivors[0].tolist()
            out[i, j] = 0 if weight is None else weight[i, j]

    right = blocked.merge_out
    monkeypatch.setattr(blocked, "merge_out", one_dropped)
    assert "survivors" in wrong(selfcheck.check("blocked", "cpu", True))


def test_a_wrong_product_is_found(monkeypatch):
    forward = schedule.linear_forward
    monkeypatch.setattr("snell.ops.schedule.linear_forward", lambda *args: forward(*args) * 1.01)
    assert {"linear, forward"} <= wrong(selfcheck.check("blocked", "cpu", True))


@needs_native
def test_the_gradients_of_survivors_are_checked(monkeypatch):
    right = native.factor_grad_of_tokens
    monkeypatch.setattr(native, "factor_grad_of_tokens", off_by(1e-3, right, 6))
    assert wrong(selfcheck.check("cpu", "cpu", True)) == {"gradients of survivors"}


@pytest.mark.skipif(TRITON is None or torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_the_path_for_few_tokens_is_checked(monkeypatch):
    monkeypatch.setitem(backends.AVAILABLE, "triton", TRITON)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(selfcheck, "settings", lambda thinned: [cases.Setting("rbf", "soft", torch.float32)])
    assert wrong(selfcheck.check("triton", "cpu", True)) == set()
    few = TRITON.linear_few
    monkeypatch.setattr(TRITON, "linear_few", lambda *args: few(*args) * 1.001)
    assert wrong(selfcheck.check("triton", "cpu", True)) == {"linear, few tokens"}


def test_what_raises_is_a_failure_in_a_sentence(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no kernel image\nand many more lines")

    monkeypatch.setattr(blocked, "merge_out", refuse)
    done = CliRunner().invoke(main)
    assert done.exit_code == 1
    assert "raises RuntimeError: no kernel image" in done.output
    assert "more lines" not in done.output
    assert "Traceback" not in done.output
