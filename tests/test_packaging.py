"""The source archive and the wheels made from it: what they hold, and what becomes of the native library."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from checkout import ROOT

pytest.importorskip("build")
pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for setuptools>=77")
if not (ROOT / ".git").exists():
    pytest.skip("the archive is compared with what git holds", allow_module_level=True)


def _tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def _build(kind: str, source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    inherited = {name: value for name, value in os.environ.items() if name not in ("CXX", "SNELL_NO_NATIVE")}
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of a checkout that holds nothing but what git holds."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("archive")
    for name in _tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    done = _build("sdist", checkout, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as file:
        # Releases of Python 3.11 before 3.11.4 have no filters.
        file.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.iterdir())


def _wheel(source: Path, out: Path, **environment: str) -> tuple[str, set[str], str]:
    """Name, members and build output of the wheel."""
    done = _build("wheel", source, out, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = next(out.glob("*.whl"))
    return wheel.name, set(zipfile.ZipFile(wheel).namelist()), done.stdout + done.stderr


def _compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_source_archive_holds_what_git_holds(unpacked: Path) -> None:
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    generated = {"PKG-INFO", "setup.cfg", *(name for name in held if name.startswith("snell.egg-info/"))}
    assert held - generated == _tracked()


@pytest.mark.parametrize(
    "environment, why",
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)"),
        ({"SNELL_NO_NATIVE": "1"}, "SNELL_NO_NATIVE"),
    ],
)
def test_without_a_compiler_the_wheel_is_pure_and_the_build_says_so(
    unpacked: Path, tmp_path: Path, environment: dict[str, str], why: str
) -> None:
    name, members, output = _wheel(unpacked, tmp_path, **environment)
    assert name.endswith("-py3-none-any.whl")
    (warning,) = (line for line in output.splitlines() if "without its native library" in line)
    assert why in warning
    folders = {"snell": "snell", "kernels": "snell/kernels", "bench": "snell/bench"}
    parts = [name.partition("/") for name in _tracked() if name.endswith(".py")]
    modules = {f"{folders[top]}/{rest}" for top, _, rest in parts if top in folders}
    assert {member for member in members if ".dist-info/" not in member} == modules


def test_a_compiler_that_fails_stops_the_build(unpacked: Path, tmp_path: Path) -> None:
    broken = _compiler(tmp_path / "broken", "echo no room left on device >&2; exit 1")
    done = _build("wheel", unpacked, tmp_path, CXX=broken)
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))
    assert "no room left on device" in done.stdout + done.stderr
    assert "SNELL_NO_NATIVE=1" in done.stdout + done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the native library is built on Linux only")
def test_a_wheel_with_the_library_is_tagged_for_the_platform(unpacked: Path, tmp_path: Path) -> None:
    # Writes down what it is asked and leaves an empty file; it is too old for AVX-512.
    script = f"""echo "$@" >> {tmp_path}/calls
case "$*" in *x86-64-v4*) exit 1;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done"""
    name, members, output = _wheel(unpacked, tmp_path, CXX=_compiler(tmp_path / "old", script))
    assert name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    assert "snell/_native.so" in members
    calls = (tmp_path / "calls").read_text()
    assert "-DSNELL_HAVE_BASE" in calls
    if platform.machine() == "x86_64":
        assert "does not know -march=x86-64-v4" in output
        assert "-DSNELL_HAVE_V3" in calls
        assert "-DSNELL_HAVE_V4" not in calls


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the native library is built on Linux only")
@pytest.mark.parametrize("works", [True, False])
def test_the_cuda_library_is_built_by_an_nvcc_that_works(unpacked: Path, tmp_path: Path, works: bool) -> None:
    leaves_a_file = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done'
    compiler = _compiler(tmp_path / "c++", leaves_a_file)
    # It knows one architecture of those that are asked for.
    listed = 'case "$1" in --list-gpu-arch) echo compute_75; echo compute_90; exit 0;; esac'
    outcome = leaves_a_file if works else "echo no host compiler >&2; exit 1"
    _compiler(tmp_path / "nvcc", f'{listed}\necho "$@" >> {tmp_path}/calls\n{outcome}')
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    _, members, output = _wheel(unpacked, tmp_path, CXX=compiler, PATH=path)
    assert {"snell/_native.so", "snell/_cuda.so"} & members == {"snell/_native.so"} | (
        {"snell/_cuda.so"} if works else set()
    )
    calls = (tmp_path / "calls").read_text()
    assert "arch=compute_90,code=sm_90" in calls
    assert "arch=compute_90,code=compute_90" in calls
    assert "compute_80" not in calls
    assert ("without its CUDA library: nvcc failed: no host compiler" in output) == (not works)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the native library is built on Linux only")
def test_an_nvcc_that_knows_none_of_the_architectures_is_not_asked_to_build(unpacked: Path, tmp_path: Path) -> None:
    compiler = _compiler(tmp_path / "c++", 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done')
    _compiler(
        tmp_path / "nvcc", f'case "$1" in --list-gpu-arch) echo compute_75;; *) echo "$@" >> {tmp_path}/calls;; esac'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    _, members, output = _wheel(unpacked, tmp_path, CXX=compiler, PATH=path)
    assert "snell/_cuda.so" not in members
    assert not (tmp_path / "calls").exists()
    assert "without its CUDA library: nvcc failed: it knows none of the architectures (80, 90, 100)" in output


def test_one_python_version_is_asked_for() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (oldest,) = re.findall(r"^>=(3\.\d+)$", settings["project"]["requires-python"])
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text()
    assert settings["tool"]["mypy"]["python_version"] == oldest
    assert settings["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
