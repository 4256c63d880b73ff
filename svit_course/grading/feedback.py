"""What a student gets back: a page with each question's marks and message, the answer as graded, the picture."""

from __future__ import annotations

import base64
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from svit_course import masters, notebooks, questions
from svit_course.grading.hand import OVERRIDDEN
from svit_course.grading.runs import Graded, Mark
from svit_course.grading.tables import number
from svit_course.grading.texts import as_html

RUBRIC = masters.ASSIGNMENTS / "rubric.md"
_BLANK = re.compile(r"\n(?:[ \t]*\n){3,}")
STATUS = {
    "ok": "holds",
    "wrong": "not yet",
    "missing": "missing",
    "time": "too slow",
    "memory": "too much memory",
    "processes": "too many processes",
    "files": "too many files",
    "crash": "crashed",
    "not graded": "not graded",
    "refused": "refused",
    "by hand": "to be marked",
    "marked": "marked by hand",
    "overridden": "changed by hand",
}

# What stands between dollars in titles and rubrics.
SYMBOLS = {r"\tau": "τ", r"\alpha": "α", r"\beta": "β", r"\ge": "≥", r"\le": "≤", r"\cdot": "·", r"\times": "×"}

COMMAND = r"\\[a-z]+"
# A formula, code, what is strong and what is emphasised; a star between spaces is none of them.
_PIECE = re.compile(r"\$([^$]+)\$|`([^`]+)`|\*\*(?!\s)([^*]+)(?<!\s)\*\*|\*(?!\s)([^*]+)(?<!\s)\*")

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title | formulas | striptags }} – {{ student }}</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#d0d7de, #444c56); --soft: light-dark(#f6f8fa, #22272e); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid var(--line); padding: .5rem 0 1rem; }
h2 { font-size: 1.15rem; margin-bottom: .25rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th:first-child, th:nth-child(2) { width: 6rem; }
td, th { text-align: left; padding: .25rem .6rem .25rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
td.marks { white-space: nowrap; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; white-space: pre-wrap; border-radius: 6px; }
img { max-width: 100%; background: #fff; }
img.formula { background: none; vertical-align: middle; }
img.block { display: block; margin: .5rem auto; }
.message { margin: .25rem 0; }
.small { font-size: .9rem; opacity: .8; }
@media (prefers-color-scheme: light) { {{ light }} }
@media (prefers-color-scheme: dark) { {{ dark }} img.formula { filter: invert(1); } }
pre { background: var(--soft) !important; }
</style>
</head>
<body>
<h1>{{ title | formulas }}</h1>
<p><strong>{{ student }}</strong>: {{ got }} of {{ out_of }} marks
{%- if to_mark %}; {{ to_mark }} are still to be marked by hand{% endif %}.</p>
{% for note in notes %}
<p class="message">⚠ {{ note }}</p>
{% endfor %}
{% for question in questions %}
<section>
<h2>{{ question.name }}</h2>
<table>
<thead><tr><th scope="col">test</th><th scope="col">marks</th><th scope="col">what was found</th></tr></thead>
<tbody>
{% for mark in question.marks %}
<tr><td>{{ mark.test }}</td>
<td class="marks">{{ mark | got }}</td>
<td>{{ status.get(mark.status, mark.status) }}{% if mark.marker %} by {{ mark.marker }}{% endif %}
{%- if mark.message %}: {{ mark.message }}{% endif %}</td></tr>
{% endfor %}
</tbody>
</table>
{% if question.section and not question.full %}
<p class="small">Explained in {{ question.section }};
<code>hint("{{ question.name }}")</code> in the notebook gives a nudge.</p>
{% endif %}
{% if question.rubric %}
<p class="small">Marked by:</p>
<ul class="small">{% for line in question.rubric %}<li>{{ line | formulas }}</li>{% endfor %}</ul>
{% endif %}
{% if question.printed %}
<details open><summary>What the cell printed</summary><pre>{{ question.printed }}</pre></details>
{% endif %}
{% for picture in question.pictures %}
<p><img src="data:image/png;base64,{{ picture }}" alt="The figure that the answer to {{ question.name }} drew"></p>
{% endfor %}
{% if question.code %}
<details><summary>The answer as it was graded</summary>{{ question.code | safe }}</details>
{% elif question.text %}
<details open><summary>The answer</summary>{{ question.text }}</details>
{% endif %}
{% for name, cell in question.elsewhere %}
<p class="small">What was graded as <code>{{ name }}</code> was last defined by cell {{ cell }}, below.</p>
{% endfor %}
</section>
{% endfor %}
{% if own %}
<section>
<h2>Your other cells, as they were run</h2>
{% for cell, source in own.items() %}
<details><summary>Cell {{ cell }} of the notebook</summary><pre>{{ source }}</pre></details>
{% endfor %}
</section>
{% endif %}
</body>
</html>
"""


def formulas(text: str) -> Markup:
    """HTML of a line of Markdown: its emphasis and code, and short formulas in italics, without anything to load."""

    def piece(found: re.Match[str]) -> str:
        formula, code, strong, emphasis = found.groups()
        if formula:
            return f"<i>{re.sub(COMMAND, lambda name: SYMBOLS.get(name.group(), name.group()), formula)}</i>"
        if code:
            return f"<code>{code}</code>"
        return f"<strong>{strong}</strong>" if strong else f"<em>{emphasis}</em>"

    return Markup(_PIECE.sub(piece, str(escape(text))))


def got(mark: Mark) -> str:
    """Marks as they stand on the page: what is changed by hand with its sign."""
    if mark.status == OVERRIDDEN:
        return f"{mark.marks:+g}"
    return f"{'–' if mark.marks is None else number(mark.marks)} of {number(mark.out_of)}"


_PAGES = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_PAGES.filters |= {"formulas": formulas, "got": got}
_PAGE = _PAGES.from_string(_TEMPLATE)


@cache
def rubric() -> dict[str, tuple[str, ...]]:
    """The lines of rubric.md for each question that is marked by hand."""
    if not RUBRIC.is_file():
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for name, body in re.findall(
        r"^### (\w+)[^\n]*\n(.*?)(?=^##|\Z)", RUBRIC.read_text("utf-8"), re.MULTILINE | re.DOTALL
    ):
        joined = re.sub(r"\n[ \t]+(?=\S)", " ", body)
        found[name] = tuple(re.findall(r"^- (.+)$", joined, re.MULTILINE))
    return found


def write_feedback(graded: Graded, folder: Path) -> Path:
    """Write the page of one submission, ``<folder>/<student>/<assignment>.html``, and return its path."""
    submission = graded.submission
    path = folder / submission.student / f"{submission.assignment}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    coded = questions(submission.assignment[0])
    sections = {q.name: q.section for q in coded}
    shown: dict[str, dict[str, Any]] = {}
    for mark in graded.marks:
        about = shown.setdefault(
            mark.question, {"name": mark.question, "marks": [], "section": sections.get(mark.question)}
        )
        about["marks"].append(mark)
    for name, about in shown.items():
        by_hand = about["marks"][0].test == "by hand"
        source = graded.sources.get(name, "")
        is_code = name in sections or name in graded.pictures
        source = _BLANK.sub("\n\n\n", source)
        # Highlighting takes more than linear time on text that was made for it.
        coloured = is_code and len(source) < 20_000
        about["code"] = highlight(source, PythonLexer(), HtmlFormatter()) if source and coloured else ""
        about["text"] = "" if coloured else Markup("<pre>{}</pre>").format(source) if is_code else as_html(source)
        about["printed"] = graded.printed.get(name, "")
        asked = next((q.answers for q in coded if q.name == name), ())
        about["elsewhere"] = [(n, graded.origin[n]) for n in asked if graded.origin.get(n, name) != name]
        about["pictures"] = [base64.b64encode(data).decode() for data in graded.pictures.get(name, [])]
        about["rubric"] = rubric().get(name, ()) if by_hand else ()
        about["full"] = sum(mark.marks or 0 for mark in about["marks"]) >= sum(mark.out_of for mark in about["marks"])
    page = _PAGE.render(
        title=notebooks.title(notebooks.read(masters.master(submission.assignment)), submission.assignment),
        student=submission.student,
        got=f"{sum(mark.marks or 0 for mark in graded.marks):g}",
        out_of=f"{sum(mark.out_of for mark in graded.marks):g}",
        to_mark=f"{sum(m.out_of for m in graded.marks if m.marks is None):g}"
        if any(m.marks is None for m in graded.marks)
        else "",
        notes=graded.notes,
        own={cell: _BLANK.sub("\n\n\n", source) for cell, source in graded.own.items()},
        # By number: a, b, c of the names sort as text, a10 would not.
        questions=sorted(shown.values(), key=lambda q: int(re.sub(r"\D", "", q["name"]) or 0)),
        status=STATUS,
        light=HtmlFormatter(style="default").get_style_defs(".highlight"),
        dark=HtmlFormatter(style="github-dark").get_style_defs(".highlight"),
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path
