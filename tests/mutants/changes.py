"""Small changes to a source, each likely a bug: Python by its syntax tree, C++ by patterns on its lines."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple


class Change(NamedTuple):
    """``source[start:end]``, in bytes, becomes ``new``."""

    start: int
    end: int
    new: bytes
    rule: str


COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "*"), ast.Div: ("/", "*"),
    ast.Mod: ("%", "//"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"), ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"), ast.BitXor: ("^", "|"), ast.MatMult: ("@", "*"),
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "floor": "ceil", "ceil": "floor", "minimum": "maximum", "maximum": "minimum"}
PAIRS = [{"A", "B"}, {"m", "n"}, {"rows", "cols"}, {"a", "b"}, {"x", "grad_y"}, {"grad_A", "grad_B"}]


def _inert(tree: ast.AST) -> set[ast.AST]:
    """Nodes whose change changes nothing that runs: annotations, and messages of errors."""
    roots: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            roots.append(node.annotation)
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            roots.append(node.returns)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            roots.extend(node.exc.args)
        elif isinstance(node, ast.Assign | ast.Expr) and isinstance(node.value, ast.Subscript | ast.Constant):
            target = getattr(node, "targets", [None])[0]
            if isinstance(node, ast.Expr) or (isinstance(target, ast.Name) and target.id[0].isupper()):
                roots.append(node.value)
    return {inner for root in roots for inner in ast.walk(root)}


def python(source: bytes) -> Iterator[Change]:
    """The changes that the rules allow in a Python source."""
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    tree = ast.parse(source)
    inert = _inert(tree)

    def span(node) -> tuple[int, int]:
        return lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset

    def between(left, right, old: str, new: str, rule: str) -> Iterator[Change]:
        start, end = span(left)[1], span(right)[0]
        at = source.find(old.encode(), start, end)
        if at >= 0:
            yield Change(at, at + len(old), new.encode(), rule)

    for node in ast.walk(tree):
        if node in inert:
            continue
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                yield from between(left, right, *COMPARISONS[type(op)], "comparison")
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                yield from between(left, right, *OPERATORS[type(op)], "operator")
            case ast.AugAssign(target=target, op=ast.Add(), value=value):
                yield from between(target, value, "+=", "-=", "operator")
                yield Change(*span(node), b"pass", "removed statement")
            case ast.BoolOp(op=op, values=[first, second, *_]):
                words = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                yield from between(first, second, *words, "and/or")
            case ast.UnaryOp(op=ast.Not() | ast.USub() as op):
                start = span(node)[0]
                yield Change(start, start + (4 if isinstance(op, ast.Not) else 1), b"", "negation")
            case ast.Constant(value=bool(value)):
                yield Change(*span(node), str(not value).encode(), "constant")
            case ast.Constant(value=int(value) | float(value)):
                for new in {value + 1, value - 1} if isinstance(value, int) and value > 0 else {value + 1}:
                    yield Change(*span(node), str(new).encode(), "constant")
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                start, end = span(test)
                yield Change(start, end, b"not (" + source[start:end] + b")", "condition")
            case ast.Raise() | ast.Expr(value=ast.Call()):
                yield Change(*span(node), b"pass", "removed statement")
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in NAMES:
                end = span(node)[1]
                yield Change(end - len(name), end, NAMES[name].encode(), "min/max, floor/ceil")
            case ast.Call(args=items) | ast.Tuple(elts=items):
                for one, other in itertools.pairwise(items):
                    if isinstance(one, ast.Name) and isinstance(other, ast.Name) and {one.id, other.id} in PAIRS:
                        new = f"{other.id}, {one.id}".encode()
                        yield Change(span(one)[0], span(other)[1], new, "swapped")


CPP = [
    (r" < ", " <= "), (r" <= ", " < "), (r" > ", " >= "), (r" >= ", " > "), (r" == ", " != "), (r" != ", " == "),
    (r" \+ ", " - "), (r" - ", " + "), (r" \* ", " + "), (r" / ", " * "), (r" % ", " / "), (r" \+= ", " -= "),
    (r" && ", " || "), (r" \|\| ", " && "), (r" << ", " >> "), (r" >> ", " << "), (r" & ", " | "), (r" \| ", " & "),
    (r"std::min\b", "std::max"), (r"std::max\b", "std::min"), (r"(?<=\()!", ""), (r"~(?=\w)", ""),
    (r"(?<=[ (,])-(?=\w)", ""), (r"^\s+[\w.\[\]]+ [+|]?= [^;]*;$", ";"), (r"^\s+[\w:<>.]+\([^;]*\);$", ";"),
    (r"^\s+\+\+\w[^;]*;$", ";"),
]  # fmt: skip
#: Lines that say what there is, not what is done.
DECLARED = re.compile(r"^\s*(#|template|static_assert|using|namespace|struct|SNELL_KERNEL|ROW|typedef|case KERNEL)")
#: What only other instruction sets than the base one compile.
OTHER_ISA = re.compile(r"defined\(__(AVX512F|AVX2|F16C)__\)|SNELL_HAVE_")


def cpp(source: bytes) -> Iterator[Change]:
    """The changes that the rules allow in a C++ source, on lines that the base instruction set compiles."""
    start, active = 0, [True]
    for raw in source.splitlines(keepends=True):
        line = raw.decode("latin-1").rstrip("\n").split("//")[0]
        word = line.lstrip()
        if word.startswith("#if"):
            active.append(not OTHER_ISA.search(word))
        elif word.startswith(("#elif", "#else")):
            active[-1] = not OTHER_ISA.search(word)
        elif word.startswith("#endif"):
            active.pop()
        elif all(active) and not DECLARED.match(line):
            for pattern, new in CPP:
                for found in re.finditer(pattern, line.rstrip()):
                    rule = "removed statement" if new == ";" else "operator"
                    yield Change(start + found.start(), start + found.end(), new.encode(), rule)
            for found in re.finditer(r"(?<![\w.])\d+(?![\w.])", line):
                yield Change(start + found.start(), start + found.end(), b"%d" % (int(found[0]) + 1), "constant")
        start += len(raw)
