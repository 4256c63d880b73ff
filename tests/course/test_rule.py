"""What answers must not take from the library: the same in the notebook and at grading, from one function.

A lecturer who did the assignments found names refused that the questions give, after green checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from svit_course import ASSIGNMENTS, Wrong, check, notebooks, rule
from svit_course import masters as m
from svit_course.grading import reading
from svit_course.grading.flags import flags
from svit_course.grading.reading import ToRun
from tests.course.handed_in import MASTER, Change, answers, inserted, submission

REFUSED = [
    ("a", "from svit_utils import thresholded_softmax"),
    ("a", "import svit_utils.attention as a\na.thresholded_softmax(x)"),
    ("a", "import svit_utils.attention.formula as a\na.thresholded_softmax(x)"),
    ("a", "import importlib\nimportlib.import_module('svit_utils.attention')"),
    ("a", "%time x = 1\nsvit_utils.thresholded_softmax(x)"),
    ("a", "from svit_utils.attention import *"),
    ("a", "from svit_utils.attention.module import thresholded_softmax"),
    ("a", "module = svit_utils"),
    ("a", "getattr(svit_utils, 'thresholded_softmax')"),
    # By every way that a notebook has to write code, and in a text that is code.
    ("a", "here = %pwd\nfrom svit_utils import thresholded_softmax"),
    ("a", "%%time\nfrom svit_utils import thresholded_softmax"),
    ("a", "\n%%capture\n%%time\nfrom svit_utils import thresholded_softmax"),
    ("a", "len?\nfrom svit_utils import thresholded_softmax"),
    ("a", "exec(b'from svit_utils import thresholded_softmax')"),
    ("a", "exec('from svit\\x5futils import thresholded_attention')"),
    ("a", "eval('svit_utils.thresholded_softmax')"),
    ("a", "exec(\"exec('from svit_utils import thresholded_softmax')\")"),
    ("a", "x = __import__(' svit_utils ')"),
    ("a", "x = __import__('svit' '_utils')"),
    ("a", "from \uff53vit_utils import thresholded_attention"),
    ("a", "def f():\n    import svit_utils as np\n    return np.sparsify"),
    ("b", "from svit_utils import thresholded_attention"),
    ("c", "svit_utils.thresholded_attention(q, k, v)"),
    ("c", "from svit_utils.explain import attention_maps"),
    ("c", "svit_utils.sparsified(model)"),
    ("d", "from svit_utils.referee import paired_bootstrap"),
    ("d", "import svit_utils.training\nsvit_utils.training.train()"),
    ("e", "from svit_utils.explain import rollout_matrix, upsample"),
    ("e", "from svit_utils import referee\nreferee.energy_in_mask(m, n)"),
    ("e", "import captum.attr"),
]
ALLOWED = [
    ("a", "import svit_utils"),
    ("a", "import math\nfrom svit_utils.data import PlantedShapes\nfrom svit_utils.models import load_embedded"),
    ("a", "# like svit_utils does\ntext = 'svit_utils does the same'"),
    ("a", "print('see svit_utils/attention/formula.py')"),
    ("a", "def broken(:"),
    ("c", "svit_utils.thresholded_softmax(scores, self.tau)"),
    ("c", "from svit_utils import thresholded_softmax as cut, TokenSparsityTracker"),
    ("c", "from svit_utils.attention.formula import thresholded_softmax"),
    ("d", "from svit_utils import sparsify, densify\nfrom svit_utils.data import PlantedShapes"),
    ("e", "from svit_utils.explain import attention_maps, upsample"),
    ("e", "from svit_utils import explain, referee\nexplain.upsample(x)\nreferee.mean_interval(y)"),
    ("e", "import svit_utils.referee as r\nr.uniform_maps(1, (2, 2)), r.centre_maps(1, (2, 2))"),
    ("f", "from svit_utils import sparsify\nfrom svit_utils.referee import paired_bootstrap\nm = svit_utils"),
]


def breach(assignment: str, *cells: str) -> str:
    return rule.rule_of(assignment, cells).breach(cells[-1])


@pytest.mark.parametrize(("assignment", "source"), REFUSED)
def test_what_would_be_the_answer_is_refused(assignment: str, source: str) -> None:
    assert "to be written, not imported" in breach(assignment, source)


@pytest.mark.parametrize(("assignment", "source"), ALLOWED)
def test_what_is_given_and_what_does_no_harm_is_allowed(assignment: str, source: str) -> None:
    assert breach(assignment, source) == ""


def test_another_name_of_the_module_is_known_from_another_cell() -> None:
    assert breach("a", "import svit_utils as s", "s.thresholded_softmax(x)")
    assert not breach("a", "from svit_utils import show", "show = print\nshow(1)")


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_no_solution_is_refused_or_flagged(assignment: str) -> None:
    cells = m.read_cells(m.master(assignment))
    whole = rule.rule_of(assignment, [cell.source for cell in cells])
    for cell in cells:
        if cell.part == "answer":
            assert (whole.breach(cell.source), flags(cell.source)) == ("", [])


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_what_the_imports_of_an_assignment_give_is_allowed(assignment: str) -> None:
    cells = m.read_cells(m.master(assignment))
    given = [cell.source for cell in cells if cell.part == "given" and cell.id != "given-random"]
    assert [breach(assignment, source) for source in given] == [""] * len(given)


# ------------------------------------------------------------------------------------------------ both agree

SOFTMAX = "def softmax(s):\n    e = np.exp(s - s.max(-1, keepdims=True))\n    return e / e.sum(-1, keepdims=True)"
LIBRARYS = "import torch\ndef softmax(s):\n    return taken(torch.from_numpy(s), 0.0).numpy()"
# The cells of a notebook, in order, and whether a1 would be refused.
NOTEBOOKS = {
    "a harmless cell before it": (["import math\nfrom svit_utils.data import PlantedShapes", SOFTMAX], False),
    "in the answer": ([f"from svit_utils import thresholded_softmax as taken\n{LIBRARYS}"], True),
    "in a cell of one's own": (["from svit_utils import thresholded_softmax as taken", LIBRARYS], True),
    "in a cell that nothing uses": (["from svit_utils import thresholded_softmax as taken", SOFTMAX], False),
    "mended since": ([f"from svit_utils import thresholded_softmax as taken\n{LIBRARYS}", SOFTMAX], False),
    "a helper": (
        ["from svit_utils import sparsify\ndef helper(s):\n    return sparsify", f"{SOFTMAX} + helper(0)"],
        True,
    ),
    "a helper beside an import that nothing uses": (
        ["from svit_utils import sparsify\ndef helper(s):\n    return 0 * s", f"{SOFTMAX} + helper(0)"],
        False,
    ),
    "an import that nothing uses": ([f"import torch\nfrom svit_utils import sparsify, data\n{SOFTMAX}"], False),
    "an import that another cell uses": (
        [f"from svit_utils import sparsify as other\n{SOFTMAX}", "print(other.__name__)"],
        True,
    ),
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_check_refuses_at_once_what_grading_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, refused = NOTEBOOKS[name]
    shell = InteractiveShell()
    shell.run_cell("import numpy as np", store_history=True)
    for cell in cells:
        assert shell.run_cell(cell, store_history=True).success
    monkeypatch.setattr(rule.sys.modules["IPython"], "get_ipython", lambda: shell)
    if refused:
        with pytest.raises(Wrong, match="not run when you are graded"):
            check("a1", shell.user_ns["softmax"])
    else:
        check("a1", shell.user_ns["softmax"])


def test_a_cell_of_ones_own_runs_and_one_that_takes_the_answer_does_not(tmp_path) -> None:
    sources = [
        "import math\nfrom svit_utils.data import PlantedShapes",
        "import math\nfrom svit_utils import sparsify\nconvert = sparsify",
    ]

    def change(notebook) -> None:
        for source in sources:
            inserted(source)(notebook)

    path = submission(tmp_path, "ada", change)
    cells = {c.source: c for c in reading.read(path.read_bytes(), notebooks.read(MASTER))[0] if c.part == "own"}
    assert isinstance(cells[sources[0]], ToRun) and cells[sources[0]].refused == ""
    assert "sparsify" in cells[sources[1]].refused and "what else the cell defines" in cells[sources[1]].refused


UNUSED = {
    "from svit_utils import sparsify\nx = 1": "pass\nx = 1",
    "import math; from svit_utils import sparsify; x = math.pi": "import math; pass; x = math.pi",
    "from svit_utils import (\n    data,\n    sparsify as ü,\n)\nx = 1": "from svit_utils import data\nx = 1",
    "é = 1; from svit_utils import densify, sparsify; x = 1": "é = 1; pass; x = 1",
    "def f():\n    from svit_utils import sparsify\n    return 1": "def f():\n    pass\n    return 1",
    "if True: from svit_utils import sparsify": "if True: pass",
}


@pytest.mark.parametrize("source", UNUSED)
def test_a_forbidden_import_that_nothing_uses_is_left_out_and_flagged(tmp_path: Path, source: str) -> None:
    """It once cost the whole cell; it is not run, so nobody can use it in a way that is not seen."""
    whole = rule.rule_of("a", [source])
    left, names = whole.without_unused(source)
    assert left == UNUSED[source] and any("sparsify" in name for name in names)
    path = submission(tmp_path, "ada", inserted(source))
    cells, notes = reading.read(path.read_bytes(), notebooks.read(MASTER))
    (cell,) = [cell for cell in cells if cell.part == "own" and cell.source.strip() and "sparsify" in cell.flags]
    assert (cell.source, cell.refused) == (UNUSED[source], "") and "which nothing uses" in cell.flags
    assert any("was run without its import" in note for note in notes)


@pytest.mark.parametrize(
    "source",
    [
        "from svit_utils import sparsify\nsparsify",
        "from svit_utils import thresholded_softmax as f\nx = f",
        "from svit_utils.attention import *",
        "from svit_utils import sparsify\nexec('from svit_utils import densify')",
        "%time 1\nfrom svit_utils import sparsify",
        "from svit_utils import sparsify\nglobals()[svit_utils.sparsify]",
    ],
)
def test_a_cell_that_uses_what_it_must_not_stays_refused(source: str) -> None:
    whole = rule.rule_of("a", [source])
    assert whole.breach(whole.without_unused(source)[0])


def test_what_another_cell_uses_stays_refused_and_what_a_plot_uses_does_not(tmp_path: Path) -> None:
    def read(*changes: Change) -> list[ToRun]:
        def change(notebook: Any) -> None:
            for one in changes:
                one(notebook)

        path = submission(tmp_path, "ada", change)
        return reading.read(path.read_bytes(), notebooks.read(MASTER))[0]

    taken = inserted("from svit_utils import thresholded_attention as taken")
    (cell,) = [c for c in read(taken, inserted("y = taken")) if "as taken" in c.source]
    assert "the cell of a plot may use everything" in cell.refused
    plot = answers("a5", "plt.plot(taken)")
    assert not [c for c in read(taken, plot) if c.refused or "as taken" in c.source]


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("source", "flag"),
    [
        ("import sys\nsys.modules[softmax.__module__.split('.')[0] + '.explain']", "sys.modules"),
        ("from sys import modules", "sys.modules"),
        ("import importlib", "importlib"),
        ("attention_maps.__globals__['x']", "__globals__"),
        ("getattr(m, '__glo' + 'bals__')", "getattr with a name that is made"),
        ("getattr(m, '__globals__')", "__globals__"),
        ("eval('1')", "eval"),
        ("exec('x = 1')", "exec"),
        ("open(path).read()", "open"),
        ("Path(p).read_text()", "read_text"),
        ("import inspect", "inspect"),
        ("vars(np)", "vars"),
    ],
)
def test_ways_around_the_rule_are_flagged(source: str, flag: str) -> None:
    assert flag in flags(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.compile(f)",
        "model.modules()",
        "getattr(m, 'name', 0)",
        "self.__dict__.update(old.__dict__)",
        "model.blocks[0].attn.__dict__['qkv']",
        "def f(attn):\n    return dict(attn.__dict__)",
    ],
)
def test_what_everybody_writes_is_not_flagged(source: str) -> None:
    assert flags(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "svit_utils.__dict__['sparsify']",
        "import svit_utils as s\ns.attention.__dict__",
        "from svit_utils import attention as a\na.__dict__",
        "torch.nn.__dict__",
        "elsewhere.__dict__['x']",
        "f().__dict__",
        "getattr(m, '__dict__')",
        "{**np.__dict__}",
    ],
)
def test_the_names_of_a_module_are_flagged(source: str) -> None:
    assert "__dict__" in flags(source, {"elsewhere"})


def test_sys_is_known_by_the_way_of_another_module() -> None:
    assert "sys.modules" in flags("torch.sys.modules['x']")
