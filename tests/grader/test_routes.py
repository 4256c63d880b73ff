"""Other routes to what once was broken: to the library, past the limits, into the feedback, through names."""

from __future__ import annotations

import base64
import copy
import time
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

from svit_course import notebooks, rule
from svit_course.grading import hand, reports, runs, submissions, tables
from svit_course.grading.runs import Graded, Judge, Mark
from svit_course.sandbox import sandbox, wire
from svit_course.sandbox.sandbox import Sandbox
from tests.course.handed_in import MASTER, answers, submission
from tests.grader.conftest import run
from tests.grader.test_attacks import CHANNEL, HEAD
from tests.grader.test_points import (  # noqa: F401 (graded_by is a fixture)
    Grader,
    both,
    graded_by,
    inserted,
    lost,
    message,
    rows,
    written,
)

pytestmark = pytest.mark.grader
SOFTMAX = "    e = np.exp(scores - scores.max(-1, keepdims=True))\n    return e / e.sum(-1, keepdims=True)"

# ------------------------------------------------------------------------------------------------ the library by its name

NESTED = "x = " + "+".join("1" * 3000)
BY_NAME = {
    "letters that Python reads as others": "from \uff53vit_utils import thresholded_attention as f",
    "an escape": "f = __import__('svit\\x5futils').thresholded_attention",
    "two texts side by side": "f = __import__('svit' '_utils').thresholded_attention",
    "bytes": "f = __import__(b'svit\\x5futils'.decode()).thresholded_attention",
    "below an expression too deep to look into": f"from svit_utils import thresholded_attention as f\n    {NESTED}",
    "an escape in code that is a text": "g = {}; exec('from svit\\x5futils import thresholded_attention', g); f = g['thresholded_attention']",
}


@pytest.mark.parametrize("name", BY_NAME)
def test_the_name_of_the_library_is_found_however_it_is_written(name: str) -> None:
    source = f"def attention_torch(q, k, v, tau):\n    {BY_NAME[name]}\n    return f(q, k, v, tau, return_weights=True)"
    whole = rule.rule_of("a", [source])
    assert whole.breach(source) and whole.breach(f"%%time\n{source}")


def test_an_answer_that_imports_in_other_letters_is_not_run(graded_by: Grader) -> None:  # noqa: F811
    body = BY_NAME["letters that Python reads as others"]
    graded = graded_by(
        answers(
            "a4", f"def attention_torch(q, k, v, tau):\n    {body}\n    return f(q, k, v, tau, return_weights=True)"
        )
    )
    assert lost(graded) == {"a4 visible", "a4 hidden"}
    assert next(mark.status for mark in graded.marks if mark.question == "a4") == "refused"


# A plot may use the library. What it learns there goes no way to the answers.
FROM_A_PLOT = {
    "a file": (
        "",
        "import os\nopen('/tmp/learnt', 'w').write('x')\nplt.plot([1])",
        "    import os\n    known = os.path.exists('/tmp/learnt')",
    ),
    "the name of a folder": (
        "",
        "import os\nos.mkdir('/tmp/learnt')\nplt.plot([1])",
        "    import os\n    known = os.path.exists('/tmp/learnt')",
    ),
    "a link in the folder of fonts": (
        "",
        "import os\nos.symlink('x', '/tmp/matplotlib/learnt')\nplt.plot([1])",
        "    import os\n    known = os.path.lexists('/tmp/matplotlib/learnt')",
    ),
    "a socket": (
        "import socket, threading\nserver = socket.socket(socket.AF_UNIX); server.bind('\\0learnt'); server.listen()\nheard = []\n"
        "threading.Thread(target=lambda: heard.append(server.accept()), daemon=True).start()",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0learnt')\nplt.plot([1])",
        "    import time; time.sleep(0.1)\n    known = bool(heard)",
    ),
    "a fork that is none": (
        "import os\nos.fork = lambda: 0\nreally = os._exit\ndef stay(code): raise RuntimeError\nos._exit = stay\nos.closerange = print",
        "import builtins\nbuiltins.learnt = True\nplt.plot([1])",
        "    import builtins\n    known = hasattr(builtins, 'learnt')",
    ),
    "a signal": (
        "import signal\nheard = []\nsignal.signal(signal.SIGUSR1, lambda *_: heard.append(1))",
        "import os, signal\nos.kill(os.getppid(), signal.SIGUSR1)\nplt.plot([1])",
        "    known = bool(heard)",
    ),
}
OWN = """
def attention_torch(q, k, v, tau):
{known}
    if not known: raise ValueError("nothing was learnt")
    p = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
    r = torch.relu(p - tau)
    total = r.sum(-1, keepdim=True)
    weights = torch.where(total > 0, r / total.clamp_min(1e-30), p)
    return weights @ v, weights
"""


@pytest.mark.parametrize("way", FROM_A_PLOT)
def test_what_a_plot_learns_stays_in_the_plot(graded_by: Grader, way: str) -> None:  # noqa: F811
    before, plot, known = FROM_A_PLOT[way]
    changes = [answers("a4", OWN.format(known=known)), answers("a5", plot)]
    graded = graded_by(both(*changes, *([inserted(before)] if before else [])))
    assert {"a4 visible", "a4 hidden"} <= lost(graded)
    assert "nothing was learnt" in message(graded, "a4", "visible")


# ------------------------------------------------------------------------------------------------ hidden cases

WAITS = "while True: time.sleep(9)"
FORGE = f"""{HEAD}{CHANNEL}
def forge(message, data=b""):
    line = message[:-1] + (b', "bytes": %d}}' % len(data)) + b"\\n" + data
    for number in channels():
        while line:
            line = line[os.write(number, line):]
    {WAITS}
"""
SAID = {
    "ends": (
        "import os; os._exit(73)",
        'forge(b\'{"memory": "LEAK-memory"}\')',
        "import os, signal; signal.signal(11, signal.SIG_DFL); os.kill(os.getpid(), 11)",
        "import os\n        for _ in range(73): os.fork()",
    ),
    "answers": (
        'forge(b\'{"missing": ["LEAK-missing"], "defined": ["LEAK-defined"]}\')',
        'forge(b\'{"origin": ["LEAK-origin"]}\')',
        'forge(b\'{"wrong": "LEAK-wrong is not written yet"}\')',
        'forge(b\'{"error": "LEAK-error"}\')',
    ),
}


@pytest.mark.parametrize("ways", SAID)
def test_what_is_said_when_a_hidden_case_is_known_is_not_quoted(
    graded_by: Grader,  # noqa: F811
    tmp_path: Path,
    ways: str,
) -> None:
    """A cell of one's own wraps the four answers: on inputs that no visible case has they say what they have seen."""
    one, two, three, four = SAID[ways]
    wrapped = f"""
def large(x): return x.size > 500 if isinstance(x, np.ndarray) else x.numel() > 500
def softmax(scores, plain=softmax):
    if scores.ndim > 3:
        {one}
    return plain(scores)
def cut(p, tau, plain=cut):
    if large(p):
        {two}
    return plain(p, tau)
def attention(q, k, v, tau, plain=attention):
    if large(q):
        {three}
    return plain(q, k, v, tau)
def attention_torch(q, k, v, tau, plain=attention_torch):
    if large(q):
        {four}
    return plain(q, k, v, tau)
"""
    graded = graded_by(both(inserted(FORGE), inserted(wrapped, "a4-visible")))
    assert {mark for mark in lost(graded) if "visible" in mark} == set()
    assert {mark for mark in lost(graded) if "hidden" in mark} >= {"a1 hidden", "a2 hidden", "a4 hidden"}
    reports.write_reports([graded], tmp_path)
    page = next(tmp_path.rglob("*.html")).read_text(encoding="utf-8").split("<details>")[0]
    said = [mark.message for mark in graded.marks]
    for text in (*said, *graded.notes, *graded.origin.values(), page):
        assert "LEAK" not in text and "73" not in text and "SIG" not in text


# ------------------------------------------------------------------------------------------------ what the next question pays

FORGED = wire.encode({"weights": [[0.1] * 4] * 4, "scores": [[1.0] * 4] * 4}).encode()


@pytest.fixture(params=["while True: pass", WAITS], ids=["a loop", "sleep"])
def forge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What forges a reply and never returns; the process is given up on sooner."""
    monkeypatch.setattr(sandbox, "BACK", 0.3)
    return FORGE.replace(WAITS, str(request.param))


def test_a_forged_answer_that_never_returns_costs_no_later_question(
    graded_by: Grader,  # noqa: F811
    forge: str,
) -> None:
    """The next question was once asked while the process was still inside this one, and paid for it."""
    body = f"""def softmax(scores):\n    forge(b'{{"origin": []}}', {FORGED!r})"""
    graded = graded_by(both(inserted(forge), answers("a1", body)))
    assert lost(graded) == {"a1 visible", "a1 hidden"}, [mark.message for mark in graded.marks]
    assert "it answered and did not come to an end" in message(graded, "a1", "visible")


def test_a_cell_that_forges_its_end_costs_no_later_cell(
    graded_by: Grader,  # noqa: F811
    forge: str,
) -> None:
    graded = graded_by(inserted(forge + "forge(b'{\"missing\": []}')", "a2"))
    assert lost(graded) == set()
    assert any("did not come to an end" in note for note in graded.notes)


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_an_answer_in_advance_is_not_taken_for_the_next(student: Sandbox, pause: float) -> None:
    """It is written before its question is asked, so that this one would be answered by the one before."""
    source = f"{HEAD}{CHANNEL}\nfor _ in range(2):\n    for number in channels(): os.write(number, b'{{\"bytes\": 0}}\\n')\n    time.sleep({pause})"
    status, said = run(student, source)
    assert status == "crash" and ("more than once" in said or "cannot be read" in said)


def test_what_ends_in_a_process_that_others_have_used_is_asked_again_alone(graded_by: Grader) -> None:  # noqa: F811
    """An answer that holds and leaves behind what ends the next one."""
    body = f"def softmax(scores):\n    import os\n    np.maximum = lambda *_: os._exit(7)\n{SOFTMAX}"
    assert lost(graded_by(answers("a1", body))) == {"a3 visible", "a3 hidden"}  # which calls both at once


# ------------------------------------------------------------------------------------------------ room for every question

FILL = """
def fill(left=0):
    import os
    try:
        for number in range(99):
            with open(f"/tmp/fill-{number}-{os.getpid()}", "wb") as file: file.write(bytes(8 << 20))
    except OSError: pass
"""
NEEDS = """
def needs():
    import os
    opened = [os.dup(1) for _ in range(100)]; [os.close(n) for n in opened]
    room = bytearray(b"x") * (300 << 20)
    for _ in range(4):
        if (child := os.fork()) == 0: os._exit(0)
        os.waitpid(child, 0)
    for number in range(200): open(f"/tmp/n{number}", "w").close()
    with open("/tmp/notes", "wb") as file: file.write(bytes(20 << 20))
"""
LEFT = {
    "files": (
        "fill()",
        "kept.append(open('/tmp/x', 'wb')); kept[-1].write(bytes(50 << 20)); kept[-1].flush(); os.unlink('/tmp/x')",
        "for i in range(4500): open(f'/tmp/{i}', 'w').close()",
    ),
    "folders": (
        "fill(); os.makedirs('/tmp/d/e', exist_ok=True); os.chmod('/tmp/d', 0)",
        "[(os.mkdir('d'), os.chdir('d')) for _ in range(1500)]; os.chdir('/tmp'); fill()",
        "os.symlink('/tmp', '/tmp/matplotlib/x') if not os.path.lexists('/tmp/matplotlib/x') else None; fill()",
    ),
    "what runs": (
        "kept.append(bytearray(b'x') * (700 << 20)) if not kept else None",
        "[os.fork() or time.sleep(600) for _ in range(12)] if not kept else None; kept.append(1)",
        "threading.Thread(target=work, daemon=True).start() if not kept else None; kept.append(1)",
    ),
}


@pytest.mark.parametrize("left", LEFT)
def test_every_question_begins_with_room(graded_by: Grader, left: str) -> None:  # noqa: F811
    """What one answer leaves behind, the next one needs: files, names, memory, processes, descriptors."""
    one, two, three = (f"\n        try: {way}\n        except OSError: pass" for way in LEFT[left])
    if left == "files":
        three = f"\n        {LEFT[left][2]}"
    wrapped = f"""
import os, threading, time
kept = []
def work():
    while True: pass
def scores_of(q, k): return (*q.shape[:-1], k.shape[-2])
def softmax(scores, plain=softmax):
    if scores.ndim == 1:{one}
    return plain(scores)
def cut(p, tau, plain=cut):
    if p.shape == (4, 6):
        needs(){two}
    return plain(p, tau)
def attention(q, k, v, tau, plain=attention):
    if scores_of(q, k) == (3, 5):
        needs(){three}
    return plain(q, k, v, tau)
def attention_torch(q, k, v, tau, plain=attention_torch):
    if k.shape[-2] == 7: needs()
    return plain(q, k, v, tau)
"""
    graded = graded_by(both(inserted(FILL + NEEDS), inserted(wrapped, "a4-visible")))
    assert lost(graded) == set(), [mark.message for mark in graded.marks]


@pytest.mark.parametrize("end", ["import os; os._exit(0)", "while True: pass"], ids=["an end of its own", "a loop"])
def test_a_folder_that_was_filled_is_empty_after_an_end(graded_by: Grader, end: str) -> None:  # noqa: F811
    body = f"def softmax(scores):\n    fill()\n    {end}"
    notes = "def cut(p, tau, plain=cut):\n    needs()\n    return plain(p, tau)"
    graded = graded_by(both(inserted(FILL + NEEDS), answers("a1", body), inserted(notes, "a2-visible")))
    assert {mark for mark in lost(graded) if mark.startswith("a2")} == set()


def test_a_cell_that_fills_the_folder_is_left_out(graded_by: Grader) -> None:  # noqa: F811
    notes = "def cut(p, tau, plain=cut):\n    needs()\n    return plain(p, tau)"
    graded = graded_by(both(inserted(FILL + NEEDS), inserted("fill()"), inserted(notes, "a2-visible")))
    assert lost(graded) == set()
    assert any("nothing is left" in note for note in graded.notes)


# ------------------------------------------------------------------------------------------------ limits


def test_page_tables_that_nobody_counts(student: Sandbox) -> None:
    """Pages of zeros that are only read cost no memory; the tables that lead to them do, two gigabytes in a terabyte."""
    source = """
import mmap
try:
    whole = mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=mmap.PROT_READ)
except (OSError, MemoryError, ValueError): pass
else: raise AssertionError("a terabyte of addresses")
"""
    assert run(student, source) == ("", "")


def test_two_hundred_plots_of_one_name_do_not_grow_the_grader(graded_by: Grader) -> None:  # noqa: F811
    picture = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(3 << 20))

    def many(notebook: Any) -> None:
        place = next(i for i, cell in enumerate(notebook.cells) if cell.get("id") == "a5")
        plot = notebook.cells[place]
        plot.source = f"import sys\nsys.modules['svit_course.sandbox.student']._pictures = lambda: {picture[:20]!r} + b'A' * 4000000"
        for number in range(12):
            other = nbformat.v4.new_code_cell(f"other = {number}")
            notebook.cells[place + 1 : place + 1] = [other, copy.deepcopy(plot)]

    graded = graded_by(many)
    assert len(graded.pictures.get("a5", [])) <= 3


def costly() -> dict[str, bytes]:
    texts = [f"{number:x}" for number in range(200_000)]
    return {
        "texts of which each is looked for": wire.encode({"weights": "x" * 100_000, "names": texts}).encode(),
        "a text of many texts": wire.encode({"weights": [" ".join(texts)], "scores": ["(" * 100_000]}).encode(),
    }


@pytest.mark.parametrize("name", costly())
def test_judging_a_forged_answer_takes_no_minutes(judge: Judge, name: str) -> None:
    """It is judged, within its limits: a judge that dies of the message would be quick, too."""
    place = {"question": "a1", "hidden": True, "number": 0, "quiet": True}
    begun = judge._sandbox.used() if judge._sandbox.running else 0.0
    try:
        said = judge.ask(place, costly()[name])[0]["wrong"]
    except runs.Ended as ended:
        said = ended.status
    assert said in ("time", "memory") or said.startswith("a1, ")
    assert judge._sandbox.used() - begun < 10


@pytest.mark.parametrize("piece", ["it stops with ", " is not written yet", "(", "it fails on inputs of this shape ("])
def test_reading_a_forged_error_takes_no_minutes(judge: Judge, piece: str) -> None:
    begun = judge._sandbox.used() if judge._sandbox.running else 0.0
    place = {"question": "a1", "hidden": True, "number": 0}
    said = judge.ask({"raised": piece * (60_000 // len(piece)), **place})[0]["wrong"]
    assert said == "it stops with an error"
    assert judge._sandbox.used() - begun < 10


def test_a_case_whose_message_says_nothing_of_quoting_is_not_quoted(judge: Judge) -> None:
    seen = wire.encode({"weights": "LEAK", "scores": np.array([0.0, 1, 2, 4])}).encode()  # the case left unchanged
    said = [
        judge.ask({"question": "a1", "hidden": False, "number": 0, **more}, seen) for more in ({}, {"quiet": False})
    ]
    assert [("LEAK" in answer["wrong"], answer["wrong"][:3]) for answer, _ in said] == [(False, "a1,"), (True, "a1,")]


def test_what_judging_one_submission_may_take_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All its questions together: there is one judge for everybody."""
    allowed: list[float] = []

    def ask(message: dict[str, Any], data: bytes, seconds: float) -> Any:
        allowed.append(seconds)
        clock[0] += 50
        raise runs.Ended("time", "stopped")

    clock, judge = [0.0], Judge()
    monkeypatch.setattr(judge._sandbox, "running", True)
    monkeypatch.setattr(judge._sandbox, "used", lambda: clock[0])
    monkeypatch.setattr(judge._sandbox, "ask", ask)
    spent: dict[str, float] = {}
    for _ in range(5):
        with pytest.raises(runs.Ended):
            judge.ask({"question": "a1"}, b"", spent)
    assert allowed == [120, 70, 20, 1, 1]


def test_a_large_notebook_is_handed_on_in_one_go(judge: Judge, tmp_path: Path) -> None:
    """Outputs of 100 MB: what is not yet sent was once copied for every piece that was."""
    notebook = notebooks.read(submission(tmp_path, "ada"))
    output = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "A" * 100_000_000}}
    notebooks.code_cells(notebook)[-1].outputs = [nbformat.from_dict(output)]
    path = written(notebook, tmp_path / "large.ipynb", 5)
    judge.ask({"read": "a"}, MASTER.read_bytes())
    begun = time.thread_time()
    assert judge.ask({"read": "a"}, path.read_bytes())[1]
    assert time.thread_time() - begun < 5


# ------------------------------------------------------------------------------------------------ names

STRANGE = [
    "'=ada",
    "''-ada",
    "=ada",
    "@ada",
    "'ada'",
    "山" * 85,
    "\u202e" * 80,
    "-",
    "a" * 250,
    "COM1",
    "ada.",
    "\\x1b",
]


@pytest.mark.parametrize("name", STRANGE, ids=ascii)
def test_marks_by_hand_stay_for_names_that_a_table_would_change(tmp_path: Path, name: str) -> None:
    for folder in (name, f"{name[:80]} "):  # and a second one whose name comes out the same
        submission(tmp_path / "in", folder)
    found, _ = submissions.find(tmp_path / "in")
    assert len({one.student for one in found}) == 2

    def everybody() -> list[Graded]:
        return [Graded(one, [Mark("a5", "by hand", None, 3.0, "by hand")]) for one in found]

    reports.write_reports(everybody(), tmp_path / "out")
    table = tables.read_table(tmp_path / "out" / "by_hand.csv")[1]
    for row in table:
        row["marks"] = "3"
    tables.write_table(tmp_path / "out" / "by_hand.csv", hand.BY_HAND, table)
    reports.write_reports(everybody(), tmp_path / "out")
    assert [row["by_hand"] for row in rows(tmp_path / "out" / "totals.csv")] == ["3", "3"]
    assert len(list((tmp_path / "out" / "feedback").rglob("*.html"))) == 2
