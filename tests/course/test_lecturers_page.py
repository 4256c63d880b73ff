"""What the lecturer's page says in numbers and names, measured anew."""

from __future__ import annotations

import ast
import importlib.util
import io
import keyword
import re
import sys
import tokenize
from builtins import __dict__ as builtin

import pytest

from svit_course import masters as m
from svit_course import notebooks

PAGE = (m.ASSIGNMENTS / "lecturer.md").read_text(encoding="utf-8")
RUN = 12  # tokens
CALLED = {"grad-cam": "pytorch_grad_cam", "pillow": "PIL"}


def tokens(source: str) -> list[str]:
    """Of code without comments, docstrings and annotations, all names of variables and functions of one's own alike."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            said = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = said or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    found, before = [], ""
    for token in tokenize.generate_tokens(io.StringIO(ast.unparse(tree)).readline):
        text = token.string
        if not text.strip():
            continue
        is_name = token.type == tokenize.NAME and not keyword.iskeyword(text) and before != "."
        found.append("name" if is_name and text not in {*builtin, "np", "torch", "F", "nn"} else text)
        before = text
    return found


def runs_of(source: str) -> list[tuple[str, ...]]:
    found = tokens(source)
    return [tuple(found[i : i + RUN]) for i in range(len(found) - RUN + 1)]


def copied(source: str, known: set[tuple[str, ...]]) -> float:
    """The share of the tokens that stand in a run that is known."""
    inside = [False] * len(tokens(source))
    for place, run in enumerate(runs_of(source)):
        if run in known:
            inside[place : place + RUN] = [True] * RUN
    return sum(inside) / len(inside)


def test_how_much_of_the_solutions_stands_in_the_chapters() -> None:
    cells = [cell for path in notebooks.chapters() for cell in notebooks.code_cells(notebooks.read(path))]
    known = {run for cell in cells for run in runs_of(cell.source)}
    head, _, row = PAGE.split("whatever the variables are called,")[1].strip().splitlines()[:3]
    said = dict(zip(re.findall(r"[a-f]", head), map(int, re.findall(r"(\d+) %", row)), strict=True))
    for path in m.masters():
        everything = m.read_cells(path)
        marks = {
            c.id: sum(o.points for o in everything if o.question == c.id) for c in everything if c.part == "answer"
        }
        shares = {
            cell.id: copied(cell.source.replace(m.BEGIN_SOLUTION, "").replace(m.END_SOLUTION, ""), known)
            for cell in everything
            if cell.part == "answer"
        }
        share = 100 * sum(marks[name] * shares[name] for name in marks) / sum(marks.values())
        assert said[path.stem[0]] == pytest.approx(share, abs=4), (path.stem, shares)


def test_a_copy_is_measured() -> None:
    """Other names and a comment change nothing; other code is no copy."""
    source = "def f(p, tau):\n    r = (p - tau).relu()\n    return r / r.sum(dim=-1, keepdim=True)"
    other = (
        'def cut(x: int, t):\n    "A text."\n    y = (x - t).relu()  # cut\n    return y / y.sum(dim=-1, keepdim=True)'
    )
    assert copied(other, set(runs_of(source))) == 1.0
    assert copied("def g(a):\n    return [sorted(b)[0] for b in a if b and b[-1] > 0]", set(runs_of(source))) == 0.0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_list_of_packages_is_what_the_library_needs() -> None:
    import tomllib

    with (notebooks.ROOT / "pyproject.toml").open("rb") as file:
        needed = {re.split(r"[<>=;\[]", one)[0].strip() for one in tomllib.load(file)["project"]["dependencies"]}
    line = PAGE.split("**What answers may import.**")[1].split("also `svit_utils`")[0]
    listed = set(re.findall(r"`(\w+)`", line))
    assert listed == {CALLED.get(name, name) for name in needed}
    assert not [name for name in listed if importlib.util.find_spec(name) is None]
