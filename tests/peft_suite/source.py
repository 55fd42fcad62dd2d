"""PEFT's test files from its source archive; nothing of them is committed here."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import peft

#: The files that run, in order.
FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_encoder_decoder_models.py",
    "test_decoder_models.py",
)
_HELPERS = ("testing_common.py", "testing_utils.py")


class Unreachable(RuntimeError):
    """No registry gives the archive."""


def fetch(folder: Path, archive: Path | None = None) -> None:
    """Write the tests of the installed PEFT's version into ``folder/tests``, with SNELL named where LoRA is.

    Args:
        folder: where to.
        archive: PEFT's source archive; None: pip downloads it.

    Raises:
        Unreachable: pip finds no archive of that version.
    """
    with tempfile.TemporaryDirectory() as download:
        if archive is None:
            asked = ["--no-binary=peft", "--no-deps", f"--dest={download}", f"peft=={peft.__version__}"]
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", *asked]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                raise Unreachable(f"pip does not get the source archive of peft {peft.__version__}:\n{done.stderr}")
            (archive,) = Path(download).glob("peft-*.tar.gz")
        tests = folder / "tests"
        tests.mkdir(parents=True)
        (tests / "__init__.py").touch()
        with tarfile.open(archive) as tar:
            for name in (*FILES, *_HELPERS):
                member = tar.extractfile(f"peft-{peft.__version__}/tests/{name}")
                assert member is not None
                (tests / name).write_text(with_snell(member.read().decode()))


class _Lists(ast.NodeTransformer):
    """Adds SnellConfig to the lists of classes outside which a test is skipped."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if isinstance(node.ops[0], ast.NotEq) and ast.unparse(node.comparators[0]) == "LoraConfig":
            node.ops[0], node.comparators[0] = ast.NotIn(), ast.Tuple([node.comparators[0]], ast.Load())
        if isinstance(node.ops[0], ast.NotIn):
            self._extend(node.comparators[0])
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        called = node.operand.func if isinstance(node.operand, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in ("isinstance", "issubclass"):
            self._extend(node.operand.args[1])
        return node

    def _extend(self, classes: ast.expr) -> None:
        if isinstance(classes, ast.Tuple) and "LoraConfig" in map(ast.unparse, classes.elts):
            classes.elts.append(ast.Name("SnellConfig", ast.Load()))


def with_snell(source: str) -> str:
    """The test file, in which "LoRA and others have this feature" names SNELL as well."""
    tree = _Lists().visit(ast.parse(source))
    return f"from snell.peft import SnellConfig\n{ast.unparse(tree)}\n"
