"""Docstrings open with an imperative or a noun phrase, and a public name means one thing in the whole project."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("stable_audio_lite", "training", "evaluation")

AWAITING_REWORK: tuple[str, ...] = ()
"""Packages, or files by their path, that are exempt until they are rewritten; to be emptied then."""

CONVENTIONS = frozenset({"main", "run", "add_command"})
"""Names with the same role in every file that has them: commands and trainers."""

QUESTION = re.compile(r"(What|Whether|Where|How|Which|Who|When)\b")


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Path from the root and syntax tree of each module."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not any(name == part or name.startswith(f"{part}/") for part in AWAITING_REWORK):
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of the docstrings in a module, those of constants and attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def public_names(tree: ast.Module) -> Iterator[str]:
    """Names of the classes, functions and constants that a module defines; type variables don't count."""
    for node in tree.body:
        names: list[ast.expr] = []
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names = [ast.Name(node.name)]
        elif isinstance(node, ast.AnnAssign):
            names = [node.target]
        elif isinstance(node, ast.Assign) and not ast.unparse(node.value).startswith("TypeVar("):
            names = [part for target in node.targets for part in getattr(target, "elts", [target])]
        yield from (name.id for name in names if isinstance(name, ast.Name) and not name.id.startswith("_"))


def test_docstrings_open_with_a_phrase_and_public_names_are_unique() -> None:
    questions, places = [], defaultdict(list)
    for path, tree in modules():
        questions += [f"{path}:{line}: {text[:60]}" for line, text in docstrings(tree) if QUESTION.match(text)]
        for name in set(public_names(tree)) - CONVENTIONS:
            places[name].append(path)
    repeated = [f"{name}: {', '.join(paths)}" for name, paths in sorted(places.items()) if len(paths) > 1]
    assert not questions, "\n".join(questions)
    assert not repeated, "\n".join(repeated)
