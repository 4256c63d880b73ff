"""Take a function or a class out of a notebook's syntax tree, for the parity tests.

    from tests.notebooks.notebook_functions import extract_function

    taught = extract_function("01_attention_theory", "thresholded_softmax", {"torch": torch})
    torch.testing.assert_close(taught(scores, 0.01), svit_utils.thresholded_softmax(scores, 0.01))

The ``def`` itself is compiled, with nothing around it: a cell that only imports the package's function under that name
does not pass, and nothing else of the notebook runs.
"""

from __future__ import annotations
import __future__

import ast
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svit_course import notebooks


def extract_function(
    notebook: str | Path,
    name: str,
    namespace: Mapping[str, Any] | None = None,
    *,
    needs: Sequence[str] = (),
    occurrence: int = -1,
) -> Callable[..., Any]:
    """The function (or class) ``name`` as the notebook defines it.

    Args:
        notebook: a path, or the beginning of a chapter's file name.
        namespace: what the definition may use: ``{"torch": torch, ...}``.
        needs: other definitions and assignments of the notebook that it uses, taken out in this order before it.
        occurrence: which of several definitions of that name, in reading order; the last one unless said otherwise.

    Raises:
        LookupError: the notebook does not define it, or not that often.
    """
    path = Path(notebook) if Path(notebook).is_file() else notebooks.chapters([str(notebook)])[0]
    tree = syntax_tree(path)
    scope = dict(namespace or {})
    scope["__name__"] = f"notebook_{path.stem}"  # classes ask for it
    for wanted, which in [*((need, -1) for need in needs), (name, occurrence)]:
        found = [node for node in tree.body if wanted in _defines(node)]
        try:
            node = found[which]
        except IndexError:
            raise LookupError(f"{path.name} defines {wanted!r} {len(found)} times at the top of a cell") from None
        module = ast.Module(body=[node], type_ignores=[])
        code = compile(module, f"{path.name}:{wanted}", "exec", flags=__future__.annotations.compiler_flag)
        exec(code, scope)
    taken = scope[name]
    if not isinstance(found[which], ast.FunctionDef | ast.ClassDef):
        raise LookupError(f"{path.name} assigns {name!r}; there is no `def` or `class` of that name")
    return taken


def syntax_tree(path: Path) -> ast.Module:
    """All code cells of the notebook as one module; IPython's magics and shell lines are left out."""
    tree = ast.Module(body=[], type_ignores=[])
    for cell in notebooks.code_cells(notebooks.read(path)):
        lines = cell.source.splitlines()
        if lines and lines[0].startswith("%%"):
            continue
        kept = ["" if line.lstrip().startswith(("%", "!")) else line for line in lines]
        tree.body += ast.parse("\n".join(kept), filename=path.name).body
    return tree


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
