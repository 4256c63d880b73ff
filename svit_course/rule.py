"""What answers must not take from the library: one rule, for `check` in the notebook and for grading.

An assignment forbids what would be its answer. Everything else of the library may be imported, in any spelling: a name
is judged by where it is defined, so ``svit_utils.name``, ``from svit_utils import name`` and a re-import are the same.

The rule keeps honest people to the question. It is no fence: what code can do is up to the grader's sandbox.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import symtable
import sys
import types
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

LIBRARY = "svit_utils"
OPERATOR = (f"{LIBRARY}.attention", f"{LIBRARY}.explain")
# Assignment -> packages whose functions would be the answer, and names in them that it hands out all the same.
FORBIDDEN: Mapping[str, tuple[str, ...]] = {
    "a": OPERATOR,
    "b": OPERATOR,
    "c": OPERATOR,
    "d": (f"{LIBRARY}.referee", f"{LIBRARY}.training"),
    "e": (f"{LIBRARY}.explain", f"{LIBRARY}.referee", "captum", "pytorch_grad_cam"),
    "f": (),
}
GIVEN: Mapping[str, tuple[str, ...]] = {
    "c": ("thresholded_softmax", "TokenSparsityTracker"),
    "e": ("attention_maps", "upsample", "mean_interval", "uniform_maps", "centre_maps"),
}
WRITTEN = "the answer is to be written, not imported"
Aliases = Mapping[str, str]


@dataclass(frozen=True)
class Rule:
    """The rule of one assignment, in a notebook whose cells call the library's modules by ``aliases``."""

    assignment: str
    aliases: Aliases

    def breach(self, source: str) -> str:
        """What a cell's code takes that it must not, as a sentence; "" where there is nothing.

        Texts that are code, such as ``exec("import …")`` runs, are looked into as well.
        """
        if not FORBIDDEN.get(self.assignment):
            return ""
        try:
            trees = list(trees_of(source))
            aliases = {**self.aliases, **_bound_modules(trees)}
            return next((said for tree in trees for said in self._in(tree, aliases) if said), "")
        except (RecursionError, MemoryError):  # nested so deeply that it can be run and not be looked into
            plain = unicodedata.normalize("NFKC", source)
            suspicious = any(part in plain for part in ("svit", "import", "exec", "eval", "\\"))
            return f"it is nested too deeply to be looked into: {WRITTEN}" if suspicious else ""

    def without_unused(self, source: str, others: Iterable[str] = ()) -> tuple[str, list[str]]:
        """The cell without the imports that are forbidden and used nowhere, and what they would have imported.

        It is safe because they are not run: whoever reaches for the name in a way that is not seen finds none.

        Args:
            others: the cells that could use what this one imports.
        """
        try:
            tree = ast.parse(source)
            nodes = [node for each in (source, *others) for tree_ in trees_of(each) for node in ast.walk(tree_)]
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # also cells with magics: they stay as they are
            return source, []
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        lines, left_out = source.encode().splitlines(keepends=True), list[str]()
        for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)), key=_where)[::-1]:
            unused = {id(alias): name for alias, name in _imports(node) if self._unused(name, alias, used)}
            if not unused:
                continue
            kept = [alias for alias in node.names if id(alias) not in unused]
            instead = ast.unparse(_with_names(node, kept)) if kept else "pass"
            first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
            begin, end = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
            lines[first : last + 1] = [begin + instead.encode() + end]
            left_out += unused.values()
        return b"".join(lines).decode(), left_out[::-1]

    def _unused(self, dotted: str, alias: ast.alias, used: Set[str]) -> bool:
        bound = alias.asname or alias.name.split(".")[0]
        return bool(self._taken(dotted, imported=True)) and alias.name != "*" and bound not in used

    def _in(self, tree: ast.Module, aliases: Aliases) -> Iterator[str]:
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        shadowed = _stored(tree) - _bound_modules([tree]).keys()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield from (self._taken(name, imported=True) for _, name in _imports(node))
            elif isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner:
                if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                    continue
                dotted = _dotted(node)
                root = dotted.split(".")[0]
                if root in aliases and root not in shadowed:
                    yield self._taken(aliases[root] + dotted[len(root) :])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
                if any(part in text for part in ("svit", "import", "\\")):
                    yield Rule(self.assignment, {**aliases, LIBRARY: LIBRARY}).breach(text.strip())

    def _taken(self, dotted: str, imported: bool = False) -> str:
        forbidden = FORBIDDEN[self.assignment]
        uses = f"it uses {dotted}, which assignment {self.assignment} forbids: {WRITTEN}"
        if not _below(dotted, (LIBRARY,)):
            return uses if _below(dotted, forbidden) else ""
        if dotted.endswith(".*"):
            each = (self._taken(f"{dotted[:-2]}.{name}", imported=True) for name in _public(dotted[:-2]))
            return next((said for said in each if said), "")
        home, is_module = home_of(dotted)
        if is_module:
            whole = f"it hands on the module {home} as a whole, and nobody sees what is taken from it"
            return "" if imported or not _below(home, (LIBRARY,)) else f"{whole}: {WRITTEN}"
        if _below(home, forbidden) and home.rsplit(".", 1)[-1] not in GIVEN.get(self.assignment, ()):
            return uses
        return ""


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[ast.alias, str]]:
    """Each name of an import, with where it comes from; nothing of a relative one."""
    if isinstance(node, ast.Import):
        yield from ((alias, alias.name) for alias in node.names)
    elif node.module and not node.level:
        yield from ((alias, f"{node.module}.{alias.name}") for alias in node.names)


def _with_names(node: ast.Import | ast.ImportFrom, names: list[ast.alias]) -> ast.stmt:
    return ast.Import(names) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, names, node.level)


def _where(node: ast.stmt) -> tuple[int, int]:
    return node.lineno, node.col_offset


def rule_of(assignment: str, sources: Iterable[str]) -> Rule:
    """The rule of an assignment, for a notebook with these cells."""
    aliases = {LIBRARY: LIBRARY}
    for source in sources:
        try:
            aliases |= _bound_modules(trees_of(source))
        except (RecursionError, MemoryError):
            continue
    return Rule(assignment, aliases)


def home_of(dotted: str) -> tuple[str, bool]:
    """Where the thing of that name is defined, and whether it is a module; the name itself where there is none."""
    first, *rest = dotted.split(".")
    found = _module(first)
    for name in rest:
        if found is None:
            return dotted, False
        inner = getattr(found, name, None)
        inner = _module(f"{found.__name__}.{name}") if inner is None else inner
        if not isinstance(inner, types.ModuleType):
            home, called = getattr(inner, "__module__", None), getattr(inner, "__qualname__", name)
            return (f"{home}.{called}" if isinstance(home, str) else f"{found.__name__}.{name}"), False
        found = inner
    return (dotted, False) if found is None else (found.__name__, True)


def _module(name: str) -> types.ModuleType | None:
    try:
        return sys.modules.get(name) or importlib.import_module(name)
    except Exception:  # there is none, or what it needs is not installed
        return None


def _public(module: str) -> list[str]:
    found = _module(module)
    return [] if found is None else list(getattr(found, "__all__", None) or [n for n in dir(found) if n[:1] != "_"])


def _below(dotted: str, packages: Iterable[str]) -> bool:
    return any(dotted == package or dotted.startswith(f"{package}.") for package in packages)


def _dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute's chain; "" where it does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _bound_modules(trees: Iterable[ast.Module]) -> dict[str, str]:
    """Name -> module, of the library's modules that imports bind."""
    found = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                if _below(dotted, (LIBRARY,)) and home_of(dotted)[1]:
                    found[alias.asname or alias.name] = dotted
    return {name: module for name, module in found.items() if _below(module, (LIBRARY,))}


def _stored(tree: ast.Module) -> set[str]:
    """Names that a cell itself gives other values, so that an alias of another cell is not meant."""
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return (stored | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}) - {LIBRARY}


# ------------------------------------------------------------------------------------------------ a cell's code


def trees_of(source: str) -> Iterator[ast.Module]:
    """The syntax trees of a cell: as IPython makes it, and as it stands below a cell magic.

    Raises:
        RecursionError, MemoryError: it may be Python, nested too deeply to tell.
    """
    code = _below_magics(source)
    yield tree_of(transformed(code))
    if "%" in source or "!" in source or "?" in source:
        yield tree_of(code)


def _below_magics(source: str) -> str:
    while source.lstrip().startswith("%%"):  # what stands below a cell magic may be run
        source = source.lstrip().partition("\n")[2]
    return source


def transformed(source: str) -> str:
    """As IPython runs it; nothing where whatever was made for it makes that fail."""
    from IPython.core.inputtransformer2 import TransformerManager  # notebooks have it, the library does not need it

    try:
        return str(TransformerManager().transform_cell(_below_magics(source)))
    except (RecursionError, MemoryError):
        raise
    except Exception:
        return ""


def tree_of(code: str) -> ast.Module:
    """The syntax tree; empty where it is no Python.

    Raises:
        RecursionError, MemoryError: it may be Python, nested too deeply to tell.
    """
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


# ------------------------------------------------------------------------------------------------ in the notebook


def breach_in(assignment: str, answers: Sequence[str], cells: Sequence[str]) -> str:
    """The breach of a cell that the answers come from, themselves or what they use; "" where there is none.

    Args:
        cells: the sources of the cells that were run, in that order.
    """
    if not FORBIDDEN.get(assignment):
        return ""
    rule, latest = rule_of(assignment, cells), dict[str, str]()
    for source in cells:
        latest |= dict.fromkeys(_names(source)[0], source)
    todo, seen = list(answers), set[str]()
    while todo:
        name = todo.pop()
        if name in seen or name not in latest:
            continue
        seen.add(name)
        said = rule.breach(latest[name])
        if said:  # and then only is it worth looking through all cells
            others = [source for source in cells if source != latest[name]]
            said = rule.breach(rule.without_unused(latest[name], others)[0])
        if said:
            return f"the cell that defines {name} is not run when you are graded: {said}"
        todo += _names(latest[name])[1]
    return ""


def _names(source: str) -> tuple[set[str], set[str]]:
    """The global names that a cell gives a value, and those that it uses."""
    try:
        top = symtable.symtable(transformed(source), "cell", "exec")
    except Exception:  # no Python, or too deep
        return set(), set()
    given = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used, tables = set[str](), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (table is top or s.is_global())}
    return given, used - vars(builtins).keys()


def cells_run() -> list[str]:
    """The sources of the cells that this notebook has run, in order; none outside of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return list(shell.history_manager.input_hist_raw) if shell is not None else []
