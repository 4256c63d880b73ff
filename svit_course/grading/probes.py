"""What of the checks is loaded beside a submission: the probes and what they call. Judges and references stay outside.

A question's file holds its probe and its judge; here the statements are picked that the probe needs, name by name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from svit_course import notebooks

PACKAGE = "svit_course"
# What the process needs of `svit_course.question` itself, to call a probe and to say what it raised.
SHARED = ("Wrong", "describe", "plain")


@cache
def sources(assignment: str) -> dict[str, str]:
    """Module name -> source, each after those that it imports from: for every question of an assignment its probe."""
    wanted: dict[str, set[str]] = {}
    folder = notebooks.ROOT / PACKAGE / "checks" / assignment
    for path in sorted(folder.glob(f"{assignment}[0-9]*.py")):
        _want(f"{PACKAGE}.checks.{assignment}.{path.stem}", {"probe"}, wanted)
    _want(f"{PACKAGE}.question", set(SHARED), wanted)
    return {module: _picked(module, names) for module, names in reversed(wanted.items())}


def _want(module: str, names: set[str], wanted: dict[str, set[str]]) -> None:
    """Add to ``wanted`` the names and everything that their statements use; a module comes after those that use it."""
    known = wanted.pop(module, set())
    wanted[module] = known | names
    imported: dict[str, set[str]] = {}
    todo, defined = list(names - known), _defined(module)
    while todo:
        for node in defined.get(todo.pop(), ()):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                asked = {alias.name for alias in node.names if (alias.asname or alias.name) in wanted[module]}
                imported.setdefault(str(node.module), set()).update(asked)
            new = {name for name in _used(node) if name in defined} - wanted[module]
            wanted[module] |= new
            todo += new
    for other, asked in imported.items():
        _want(other, asked, wanted)


@cache
def _statements(module: str) -> tuple[ast.stmt, ...]:
    path = notebooks.ROOT / Path(*module.split(".")).with_suffix(".py")
    return tuple(ast.parse(path.read_text(encoding="utf-8")).body)


def _names(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    else:
        yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _defined(module: str) -> dict[str, list[ast.stmt]]:
    found: dict[str, list[ast.stmt]] = {}
    for node in _statements(module):
        for name in _names(node):
            found.setdefault(name, []).append(node)
    return found


def _used(node: ast.AST) -> Iterator[str]:
    """The names that a statement uses when it runs, annotations left out."""
    if isinstance(node, ast.Name):
        yield node.id
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _used(child)


def _picked(module: str, wanted: set[str]) -> str:
    """The statements of a module that define one of the names."""
    kept: list[ast.stmt] = []
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            kept.append(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) in wanted]
            if names and isinstance(node, ast.Import):
                kept.append(ast.Import(names))
            elif names and isinstance(node, ast.ImportFrom):
                kept.append(ast.ImportFrom(node.module, names, 0))
        elif wanted & set(_names(node)):
            kept.append(node)
    return "\n".join(ast.unparse(ast.fix_missing_locations(node)) for node in kept)
