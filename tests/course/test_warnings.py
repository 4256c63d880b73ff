"""What a prompt warns of is noticed by the visible check, at once, and not only when the assignment is graded."""

from __future__ import annotations

import re

import pytest

from svit_course import ASSIGNMENTS, notebooks
from svit_course import masters as m
from tests.course.test_bank import BANKS

# Question: words of its prompt, and the planted answer that makes the mistake which they warn of.
WARNED = {
    "a1": {
        "each row (the last axis)": "axis 1 instead of the last",
        "It must survive scores of a thousand": "overflow",
        "leave its input as it is": "in-place change of the input",
    },
    "a2": {
        "divide by what is left **in the row**": "sums of the columns",
        "A row in which nobody exceeds $\\tau$ gets zeros": "0/0 in an empty row",
        "A_j = \\frac{r_j}{\\sum_k r_k}": "a small number added to the sum",
    },
    "a3": {
        "leading axes (a batch, heads) should go along": "only two axes",
        "divided by $\\sqrt D$": "no square root of d",
    },
    "a4": {
        "with the gradient": "through NumPy",
        "a 0/0 on the side that is not used": "where differentiates 0/0",
        "**a row that loses every key keeps its plain softmax**": "one empty row sends all rows back",
    },
    "b1": {
        "A row in which nobody exceeds $\\tau$ gets zeros here": "0/0 in an empty row",
        "Leading axes go along": "hard-coded shape: only two axes",
        "Leave the inputs as they are": "in-place change of the input",
    },
    "b2": {
        "Look at what this says about a key that was cut": "zero gradient for cut keys",
        "each row on its own": "one sum for the whole array",
    },
    "b3": {
        "**one threshold for each head**": "one number for all heads",
        "What does such a row add?": "empty rows counted",
        "-\\sum_{b,\\, i} G_{bhi}": "only the first image",
    },
    "b4": {
        "**one gradient for each input**": "one gradient too few",
        "what gradient arrives at $p$ there": "an empty row gets no gradient",
        "and at $\\tau$?": "empty rows counted in dtau",
        "until somebody overwrites `q`": "attributes instead of save_for_backward",
        "Write into no input": "in-place change of an input",
        "and not into `d_out`": "in-place change of d_out",
        "It should run for `q` in float64 and in float32": "always float64",
        "autograd records nothing": "autograd does it",
    },
    "c1": {
        "`q_norm` on $q$ and `k_norm` on $k$": "no qk_norm",
        "a boolean `attn_mask` is `True` where a query *may* attend": "boolean mask the wrong way round",
        "with `is_causal=True`": "is_causal ignored",
        "a query whose keys are all at $-\\infty$ gets 0": "NaN for a query that sees nothing",
        "Then `attn_drop`": "dropout before the cut",
        "`norm`, `proj`, `proj_drop`": "norm left out",
    },
    "c2": {
        "Each module has its own `tau`": "tau on the class",
        "training mode and `requires_grad`": "training mode lost",
        "Another subclass may have a `forward` that you have not read": "a stranger is converted",
        "gives the converted modules the new one": "a second call changes nothing",
        "**bit for bit**": "restored by tau = 0",
    },
    "c3": {
        "in an error": "no restore after an exception",
        "pressed Ctrl-C": "an interrupt is no Exception",
        "The exception itself goes on to the caller": "the exception is swallowed",
        "the inner one gives the modules the outer `tau` back": "dense after a block inside another",
        "What the block did to the *weights*": "weights put back as well",
    },
    "c4": {
        "perhaps a distillation token": "one prefix token left out of two",
        "need not be square": "a square grid",
        "a hook on `attn_drop` never fires": "hook that never fires because attention is fused",
        "Leave nothing behind": "left unfused",
    },
    "d1": {
        "where } T = 0": "no ramp divides by zero",
        "**both runs see the same batches in the same order**": "batches in another order: one generator for both arms",
        "even if its ramp was not over": "judged at the tau of the last step",
    },
    "d2": {
        "stay together in every resample": "unpaired bootstrap",
        "twice if it is drawn twice": "a group drawn twice counts once",
        "the mean over all images that were drawn": "the mean of the groups' means",
        "arrays of `bool`": "bool cannot be subtracted",
    },
    "d3": {
        "takes the $S$ runs as the data": "images taken for seeds",
        "\\frac{1}{S-1}": "ddof=0",
        "raise `ValueError` for $S < 2$": "NaN for one seed",
    },
    "d4": {
        "best **mean validation** accuracy": "test set used for choosing",
        "of equal ones the smaller": "ties by the order of the table",
    },
    "e1": {
        "each row divided by its sum": "no renormalisation",
        "without the prefix": "one prefix token, always",
        "Leave the inputs as they are": "in-place change of the attention",
    },
    "e2": {
        "for every picture on its own": "weights of the whole batch",
        "Do not rescale the maps": "scaled to a maximum of 1",
        "*before* the last attention": "tapped after the last attention",
        "Leave no hook on the model": "a hook left behind",
    },
    "e3": {
        "Bilinear enlargement averages": "enlarged bilinearly",
        "A map without anything positive": "0/0 on a blank map",
        "`argmax` takes the first of them": "argmax on ties",
    },
    "e4": {
        "where nobody exceeds": "empty rows become zeros",
        "each head's row is cut on its own": "heads averaged before the cut",
        "as a whole, with the prefix in it": "prefix left out before the cut",
        "without the prefix": "one prefix token, always",
    },
    "f1": {
        "a negative index counts from the end": "layers by range, so a negative index is lost",
        "Measure in eval mode": "train mode",
        "in the mode in which it came": "mode not put back",
        "leave the model as you found it: dense": "model left cut",
    },
    "f2": {
        "it is not always four": "hard-coded, too few",
        "in the order given": "taus sorted",
        "**layer $l$ alone**": "layers pile up",
    },
    "f3": {
        "A sum equal to the budget holds it": "below the budget, not up to it",
        "raise a `ValueError`": "something is returned where nothing holds",
        "an error can fall again": "stops at the first error that is too large",
        "**values** from `taus`": "indices instead of values",
        "together they may not": "budget exceeded: each layer for itself",
    },
    "f4": {
        "Choose on validation": "test set used for choosing tau",
        "the **mean** of $s_l": "the sum reported as the mean",
        'if that sum, `"test_error"`': "kept because validation keeps it",
    },
}
PLANTED = {(p.question, p.name): p for bank in BANKS.values() for p in bank.PLANTED}


def prompt(name: str) -> str:
    cells = notebooks.read(m.master(name[0])).cells
    return " ".join(next(cell.source for cell in cells if cell.get("id") == f"{name}-text").split())


@pytest.mark.parametrize("name", WARNED)
def test_what_a_prompt_warns_of_fails_the_visible_check(name: str) -> None:
    """That each planted answer does fail there is tested in test_bank.py."""
    for words, planted in WARNED[name].items():
        assert words in prompt(name), words
        assert PLANTED[name, planted].by == "visible", planted


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_every_prompt_is_looked_at(assignment: str) -> None:
    cells = {cell.id for cell in m.read_cells(m.master(assignment)) if cell.part == "visible"}
    assert {cell.removesuffix("-visible") for cell in cells} == {name for name in WARNED if name[0] == assignment}


def test_what_fails_only_when_graded_is_the_exception() -> None:
    """Other numbers and shapes: what no prompt warns of."""
    hidden = {(p.question, p.name) for p in PLANTED.values() if p.by == "hidden"}
    warned = {(name, planted) for name, rows in WARNED.items() for planted in rows.values()}
    assert not hidden & warned and len(hidden) <= 3, hidden


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_the_stated_minutes_are_those_that_the_lecturers_page_explains(assignment: str) -> None:
    """A minute for 150 words of prompts and for 15 written ones, 1.5 a line of an answer, half of that of a plot."""
    notebook, minutes = notebooks.read(m.master(assignment)), 0.0
    for cell in notebook.cells:
        part, words = m.part(cell), len(cell.source.split())
        solution = "\n".join(re.findall(r"BEGIN SOLUTION[^\n]*\n(.*?)[ \t]*### END", cell.source, flags=re.DOTALL))
        lines = sum(bool(line.strip()) and line.strip()[0] != "#" for line in solution.splitlines())
        minutes += {"answer": 1.5 * lines, "plot": 0.75 * lines, "written": words / 15}.get(part, 0.0)
        minutes += words / 150 if (part, cell.cell_type) == ("own", "markdown") else 0.0
    stated = re.search(r"\*\*Time\*\* \| about (\d+) minutes", notebook.cells[1].source)
    assert stated and abs(int(stated.group(1)) - minutes) <= 5, minutes
