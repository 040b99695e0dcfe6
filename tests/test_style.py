"""The habits that a machine can hold: sizes, names, docstrings, words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for p in (ROOT / "src").rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

#: Names that say nothing about what is inside.
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc", "stuff"}
#: Words that sell instead of telling; each sentence is better without them.
SELLING = (
    "blazing", "blazingly", "revolutionary", "cutting-edge", "state-of-the-art", "seamless", "seamlessly",
    "effortless", "effortlessly", "game-changing", "world-class", "best-in-class", "supercharge", "unleash", "leverage",
    "delve", "robustly", "lightning-fast", "unparalleled", "next-generation", "magically",
)  # fmt: skip


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _public(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")


def test_files_are_short():
    lines = {_id(p): len(p.read_text().splitlines()) for p in SOURCES}
    longest = max(lines, key=lambda name: lines[name])
    assert lines[longest] <= 600, f"{longest} has {lines[longest]} lines; split the file by what it knows"
    over = {name: n for name, n in lines.items() if n > 400}
    assert len(over) <= 0.05 * len(lines), f"few files may be over 400 lines: {over}"


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_functions_are_short(path):
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            prose = docstring.end_lineno - docstring.lineno + 1 if docstring is not None else 0
            lines = node.end_lineno - node.lineno + 1 - prose
            assert lines <= 80, f"{node.name} has {lines} lines beside its docstring"


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_names_say_something(path):
    words = {path.stem.strip("_"), *(p.name for p in path.relative_to(ROOT).parents)}
    assert not words & EMPTY_NAMES
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ClassDef):
            assert not re.search(r"(Manager|Helper|Utils?)$", node.name), node.name


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_public_things_have_docstrings(path):
    tree = _tree(path)
    assert ast.get_docstring(tree), "a module says what it is"
    if path.name.startswith("_") and path.name != "__init__.py":
        return
    for node in tree.body:
        if _public(node):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_public_functions_are_typed(path):
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef) and _public(node):
            assert node.returns is not None, f"{node.name} does not say what it returns"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None]
            assert not untyped, f"{node.name}: {untyped}"


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=_id)
def test_words(path):
    text = path.read_text().lower()
    found = [word for word in SELLING if re.search(rf"(?<![\w-]){word}(?![\w-])", text)]
    assert not found
    assert not re.search(r"\b(todo|fixme|xxx)\b", text), "unfinished work belongs in an issue"


def test_unrestricted_unpickling_is_nowhere():
    for path in SOURCES:
        for node in ast.walk(_tree(path)):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), _id(path)
            if name == "torch.load":
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert safe.get("weights_only") == "True", _id(path)


def test_there_is_something_to_check():
    assert len(SOURCES) > 40
