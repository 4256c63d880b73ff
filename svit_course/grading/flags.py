"""Ways around the rule on the library: code that reaches things without naming them. Shown, never punished."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set

from svit_course import rule

# Attributes by which one object leads to others.
_ATTRIBUTES = {"__globals__", "__builtins__", "__subclasses__", "__closure__", "__code__", "__dict__", "__loader__"}
_ATTRIBUTES |= {"f_back", "f_globals", "f_locals", "_getframe", "modules", "__wrapped__", "__spec__", "__import__"}
_MODULES = ("importlib", "runpy", "gc", "inspect", "pkgutil", "ctypes", "pickle", "marshal", "zipimport", "linecache")
_CALLS = ("eval", "exec", "compile", "open", "__import__", "globals", "vars", "breakpoint")
_READERS = ("read_text", "read_bytes")
_USUAL = frozenset(("builtins", "np", "numpy", "plt", "svit_utils", "sys", "timm", "torch"))  # names of modules


def flags(source: str, modules: Set[str] = frozenset()) -> list[str]:
    """What in a cell somebody should look at: ``sys.modules``, ``exec``, a name that is made, and the like.

    Args:
        modules: names that other cells have imported. The ``__dict__`` of what is imported leads to things without
            naming them; that of a model, a layer or ``self`` is what everybody writes.
    """
    try:
        trees = list(rule.trees_of(source))
        known = modules | _USUAL | {name for tree in trees for name in imported(tree)}
        found = {said for tree in trees for node in ast.walk(tree) for said in _said(node, known)}
    except (RecursionError, MemoryError):
        return ["nested too deeply to be looked into"]
    return sorted(found)


def imported(tree: ast.AST) -> Iterator[str]:
    """The names that imports bind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)


def _root(node: ast.AST) -> str:
    """``a`` of ``a.b[0].c``; "" where it begins with something else than a name."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _said(node: ast.AST, modules: Set[str]) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        if node.attr == "__dict__":
            yield from [] if _root(node.value) and _root(node.value) not in modules else ["__dict__"]
        elif node.attr in _ATTRIBUTES and (node.attr != "modules" or _is(node.value, "sys")):
            yield f"sys.{node.attr}" if _is(node.value, "sys") else node.attr
        if node.attr in _READERS:
            yield node.attr
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in _MODULES)
    elif isinstance(node, ast.ImportFrom):
        module = str(node.module)
        yield from [module] if module.split(".")[0] in _MODULES else []
        yield from (f"sys.{a.name}" for a in node.names if module == "sys" and a.name in ("modules", "_getframe"))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        if name in _CALLS:
            yield name
        # getattr(x, "name") is an attribute in other words, setattr and hasattr too: a name that is made is not.
        if name == "getattr" and len(node.args) > 1 and not isinstance(node.args[1], ast.Constant):
            yield "getattr with a name that is made"
        if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            yield from [str(node.args[1].value)] if node.args[1].value in _ATTRIBUTES else []


def _is(node: ast.AST, name: str) -> bool:
    return getattr(node, "id", getattr(node, "attr", "")) == name  # torch.sys is sys, too
