"""Changes the core in small ways, one at a time in a copy of the checkout, and records which test notices.

``python tests/mutants/run.py`` goes through all that the seed chooses and that results.json does not hold yet;
``--again`` repeats those that survived; names of files restrict it. A forked child, in which torch is imported
already, runs the tests of each change, so that a change costs the tests' own time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
sys.dont_write_bytecode = True  # a source changed twice within a second would keep the first's bytecode
sys.path.insert(0, str(Path(__file__).parent))
# Triton reads whether it is interpreted when it is imported, which is here.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1"}
os.environ.setdefault("SNELL_TEST_SEED", "1")

import changes  # noqa: E402
from subjects import GROUPS, Group  # noqa: E402

FLAGS = "-std=c++17 -O1 -fopenmp -fvisibility=hidden -fno-math-errno -ffp-contract=off -fPIC -w -DSNELL_ISA=base"
SIMD = ("merge", "select", "factor_grad", "softmax", "red")


class Native:
    """The library for the base instruction set alone, whose objects are compiled again where their source changed."""

    def __init__(self, copy: Path) -> None:
        self.copy, self.objects = copy, copy / "objects"
        self.objects.mkdir()
        self.build((*SIMD, "library"), self.objects, copy / "snell/_native.so")
        shutil.copy(copy / "snell/_native.so", self.objects)

    def build(self, names: tuple[str, ...], folder: Path, library: Path) -> bool:
        for name in names:
            flags = [*FLAGS.split(), *(["-DSNELL_HAVE_BASE"] if name == "library" else [])]
            command = ["g++", *flags, "-c", f"csrc/cpu/{name}.cpp", "-o", folder / f"{name}.o"]
            if subprocess.run(command, cwd=self.copy, stderr=subprocess.DEVNULL, check=False).returncode:
                return False
        parts = [folder / f"{n}.o" if (folder / f"{n}.o").exists() else self.objects / f"{n}.o" for n in self.names]
        return not subprocess.run(["g++", "-shared", "-fopenmp", *parts, "-o", library], check=False).returncode

    names = (*SIMD, "library")

    def changed(self, file: str) -> bool:
        """Build with this file changed; False if it does not compile."""
        name = Path(file).stem
        again = (name,) if file.endswith(".cpp") else {"merge": ("merge", "factor_grad")}.get(name, SIMD)
        with tempfile.TemporaryDirectory() as folder:
            return self.build(again, Path(folder), self.copy / "snell/_native.so")

    def restore(self) -> None:
        shutil.copy(self.objects / "_native.so", self.copy / "snell")


class Watch:
    """A pytest plugin: runs what passed quickly before, quickest first, and tells durations and the first failure."""

    def __init__(self, durations: dict[str, float] | None, longest: float) -> None:
        self.known, self.longest = durations, longest
        self.durations: dict[str, float] = {}
        self.failed: str | None = None

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.known is not None:
            items[:] = [item for item in items if self.known.get(item.nodeid, 1e9) <= self.longest]
            items.sort(key=lambda item: self.known[item.nodeid])

    def pytest_runtest_logreport(self, report) -> None:
        if report.passed and report.when == "call":
            self.durations[report.nodeid] = report.duration
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report) -> None:
        if report.failed and self.failed is None:
            self.failed = f"import by {report.nodeid}"


def _child(copy: Path, group: Group, durations: dict[str, float] | None, longest: float, to: Connection) -> None:
    import pytest

    os.setsid()
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "TRITON_INTERPRET": str(int(group.interpreted))}
    sys.path.insert(0, str(copy))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    watch = Watch(durations, longest)
    keyword = ["-k", group.keyword] if group.keyword else []
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--hypothesis-seed=1",
        "--tb=no",
        *(["-x"] if durations is not None else []),
    ]
    code = pytest.main([*options, *keyword, *group.tests], plugins=[watch])
    failed = watch.failed or (f"exit status {int(code)}" if code else None)
    to.send((failed, watch.durations))
    to.close()
    os._exit(0)


def run_tests(copy: Path, group: Group, durations: dict[str, float] | None, longest: float, limit: float):
    """The first test that failed (or None) and how long each took; None where time ran out, or the process died."""
    receiver, sender = Pipe(duplex=False)
    pid = os.fork()
    if not pid:
        try:
            _child(copy, group, durations, longest, sender)
        finally:
            os._exit(1)
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else None
    except EOFError:
        return "the process died", {}
    finally:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def chosen(group: Group, seed: int, files: list[str]):
    """The changes that the seed picks of each file, in the order it picks them; more than the number, as spares."""
    for file in group.files:
        if files and file not in files:
            continue
        source = (ROOT / file).read_bytes()
        found = sorted(set((changes.python if file.endswith(".py") else changes.cpp)(source)))
        random.Random(f"{seed} {file}").shuffle(found)
        yield file, source, found


def describe(file: str, source: bytes, change: changes.Change) -> dict[str, str]:
    line = source.count(b"\n", 0, change.start) + 1
    first = source.rfind(b"\n", 0, change.start) + 1
    last = source.find(b"\n", change.end)
    after = source[first : change.start] + change.new + source[change.end : last]
    return {
        "at": f"{file}:{line}",
        "rule": change.rule,
        "before": " ".join(source[first:last].decode().split()),
        "after": " ".join(after.decode().split()),
    }


def key(mutant: dict[str, str]) -> tuple[str, str, str]:
    return mutant["at"].split(":")[0], mutant["before"], mutant["after"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="repeat what survived")
    parser.add_argument("--longest", type=float, default=2.0, help="seconds of the slowest test that is used")
    options = parser.parse_args()
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo
    import torch.testing  # noqa: F401

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = {key(mutant): mutant for mutant in results}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "snell"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        for name in listed.stdout.split():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, copy / name)
        for name in ("kernels", "bench"):  # which an installation has inside the package
            (copy / "snell" / name).symlink_to(copy / name)
        native = Native(copy)
        passed: dict[bool, dict[str, float]] = {False: {}, True: {}}
        timed: set[tuple[str, bool]] = set()
        for group in GROUPS:
            durations = passed[group.interpreted]
            for file, source, found in chosen(group, options.seed, options.files):
                count = 0
                for change in found:
                    mutant = describe(file, source, change)
                    old = known.get(key(mutant))
                    if old is not None and not (options.again and old["result"] == "survived"):
                        count += 1
                        continue
                    if options.again and old is None:
                        continue
                    if count >= group.number:
                        break
                    new = tuple(test for test in group.tests if (test, group.interpreted) not in timed)
                    if new:
                        failed, took = run_tests(copy, group._replace(tests=new, keyword=""), None, 0, 1200)
                        if failed is not None:
                            print(f"left out, as it fails on the code as it is: {failed} (and perhaps more)")
                        print(f"{len(took)} tests pass", flush=True)
                        timed |= {(test, group.interpreted) for test in new}
                        durations |= took
                    began = time.monotonic()
                    (copy / file).write_bytes(source[: change.start] + change.new + source[change.end :])
                    if file.startswith("csrc") and not native.changed(file):
                        ended = None
                    else:
                        limit = 60 + 3 * sum(t for t in durations.values() if t <= options.longest)
                        ended = run_tests(copy, group, durations, options.longest, limit)
                        count += 1
                        mutant["result"] = "timeout" if ended is None else "survived" if ended[0] is None else "killed"
                        mutant["by"] = "" if ended is None else ended[0] or ""
                        mutant["seconds"] = round(time.monotonic() - began, 1)
                        if old is not None:
                            old.update(mutant)
                        else:
                            results.append(mutant)
                        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                        print(
                            mutant["result"], mutant["at"], mutant["after"], mutant["by"], mutant["seconds"], flush=True
                        )
                    (copy / file).write_bytes(source)
                    if file.startswith("csrc"):
                        native.restore()


if __name__ == "__main__":
    main()
