"""The book's pages: a copy of the repository's notebooks and Markdown, with what only a page needs.

A page lies at the place that its file has in the repository, so that links and launch buttons lead where they lead
there. What changes on the way: the README becomes the first page, arXiv numbers become citations, pictures keep their
alt text, folded cells their titles, and assignments are those of the students.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from svit_course import build, masters, notebooks, stamp
from svit_utils.files import write_file
from tools import outputs

BOOK = Path(__file__).resolve().parent.parent / "book"
# Copied as they are: what pages link to and what Sphinx reads.
FILES = (
    "LICENSE",
    "CITATION.cff",
    "notebooks/images/*",
    "book/references.bib",
    "svit_utils/attention/**/*.py",
    "benchmarks/gpu/*.py",
)
MARKDOWN = ("*.md", "notebooks/**/*.md", "results/**/*.md", "benchmarks/gpu/README.md", "data/README.md")
# The library's rooms, as a reader of the chapters meets them.
MODULES = (
    "attention",
    "attention.normalisers",
    "exclusive",
    "models",
    "hub",
    "training",
    "data",
    "explain",
    "referee",
    "show",
    "records",
    "paths",
)
COMMANDS = {  # title: module whose `parser()` has the options, command of that parser
    "python -m svit_utils doctor": ("svit_utils.__main__", "doctor"),
    "python -m svit_utils train": ("svit_utils.__main__", "train"),
    "python -m svit_utils evaluate": ("svit_utils.__main__", "evaluate"),
    "python -m svit_utils explain": ("svit_utils.__main__", "explain"),
    "python -m svit_course build": ("svit_course.build", ""),
    "python -m svit_course grade": ("svit_course.grading.command", ""),
    "python -m svit_course totals": ("svit_course.grading.totals", ""),
    "python -m research experiment": ("research.__main__", "experiment"),
    "python -m research study": ("research.__main__", "study"),
    "python -m research plan": ("research.__main__", "plan"),
    "python -m research erratum": ("research.__main__", "erratum"),
    "python -m research photographs": ("research.__main__", "photographs"),
    "python -m research sinks": ("research.__main__", "sinks"),
    "python -m benchmarks": ("benchmarks.__main__", ""),
    "python -m benchmarks.gpu": ("benchmarks.gpu.__main__", ""),
}
NO_KERNEL = "A widget: open the notebook in JupyterLab to move it."


def lay_out(folder: Path, executed: Mapping[str, Any], run: str = "") -> None:
    """Write every page into ``folder``; a file that would not change is left alone, so that Sphinx reads it no more.

    Args:
        folder: Sphinx's source folder.
        executed: notebooks to show in place of the stored ones, by file name.
        run: Markdown of a page about the run that executed them; without it there is no such page.
    """
    root, wanted = notebooks.ROOT, {}
    for pattern in MARKDOWN:
        for path in root.glob(pattern):
            place = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8")
            wanted["index.md" if place == "README.md" else place] = cited(text)
    for path in [*notebooks.chapters(), *sorted((notebooks.NOTEBOOKS / "assignments").glob("*.ipynb"))]:
        notebook = executed.get(path.name) or notebooks.read(path)
        wanted[path.relative_to(root).as_posix()] = as_page(notebook, master=path.parent.name == "assignments")
    wanted["index.md"] = wanted.get("index.md", "# The book\n") + (BOOK / "contents.md").read_text(encoding="utf-8")
    wanted |= {path.name: path.read_text(encoding="utf-8") for path in BOOK.glob("*.md") if path.name != "contents.md"}
    wanted |= {f"reference/{name}.md": reference(f"svit_utils.{name}") for name in MODULES}
    wanted["reference/svit_course.md"] = reference("svit_course")
    wanted |= {f"commands/{'_'.join(title.split()[2:])}.md": command(title) for title in COMMANDS}
    if run:
        wanted["run.md"] = run
        wanted["index.md"] += "\n```{toctree}\n:caption: The walkthrough\n:hidden:\nrun\n```\n"
    everything = {path for pattern in FILES for path in root.glob(pattern) if path.is_file()}
    copies = {path.relative_to(root).as_posix().removeprefix("book/"): path.read_bytes() for path in everything}
    _write(folder, {name: text.encode("utf-8") for name, text in wanted.items()} | copies)


def _write(folder: Path, wanted: Mapping[str, bytes]) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in wanted:
            path.unlink()
    for name, content in wanted.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)


def as_page(notebook: Any, *, master: bool) -> str:
    """The text of a notebook's page.

    Args:
        notebook: stays as it is.
        master: the notebook is an assignment's master, whose solutions and hidden tests the page leaves out.

    Raises:
        RuntimeError: something of a solution would be left on the page.
    """
    original, notebook = notebook, copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if cell.get("id") not in (stamp.LINKS_ID, stamp.SETUP_ID)]
    for cell in notebook.cells:
        if master:
            _for_students(cell)
        if cell.cell_type == "code":
            _for_the_page(cell)
        else:
            cell.source = cited(cell.source)
    if master and (lost := list(build.leaks(notebook, original))):
        raise RuntimeError("the page would still hold\n  " + "\n  ".join(lost))
    return nbformat.writes(notebook)


def _for_students(cell: Any) -> None:
    """Take solution and hidden test out of a master's cell, as nbgrader does, whose metadata the page does not need."""
    kind = masters.part(cell)
    if kind == "written":
        cell.source = "*Your answer here.*"
    instead = "# YOUR CODE HERE\nraise NotImplementedError()"
    cell.source = masters.without(cell.source, masters.BEGIN_SOLUTION, masters.END_SOLUTION, instead)
    cell.source = masters.without(cell.source, masters.BEGIN_HIDDEN, masters.END_HIDDEN)
    cell.metadata.pop("nbgrader", None)


def _for_the_page(cell: Any) -> None:
    """Alt text where MyST-NB looks for it, the title of a folded cell on its handle, words in a widget's place."""
    page: dict[str, Any] = {}
    if alts := [alt for _, alt in outputs.pictures(cell) if alt]:
        page["image"] = {"alt": " ".join(alts)}
    if found := re.match(r"#\s*@title\s+(.+)\n", cell.source):
        cell.source = cell.source[found.end() :]
        page |= {"code_prompt_show": found.group(1), "code_prompt_hide": found.group(1)}
    if page:
        cell.metadata["mystnb"] = page
    for output in cell.get("outputs", []):
        if outputs.WIDGET in output.get("data", {}):
            output.data = {"text/html": f"<em>{NO_KERNEL}</em>", "text/plain": NO_KERNEL}


def cited(text: str) -> str:
    """``[arXiv 1706.03762](https://arxiv.org/abs/1706.03762)``, and the number after "arXiv" or in brackets, cited.

    A number that `book/references.bib` does not have is a warning of the build, which fails by it.
    """
    number = r"(\d{4}\.\d{4,5})"
    text = re.sub(rf"\[(?:arXiv[: ]*)?{number}\]\(https://arxiv\.org/abs/\1\)", r"{cite}`\1`", text)
    text = re.sub(rf"arXiv[: ]{number}\b", r"{cite}`\1`", text)
    return re.sub(rf"\({number}\)", r"({cite}`\1`)", text)


def reference(module: str) -> str:
    """The page of a module's public names; of a package, those that its ``__all__`` gathers."""
    gathered = "\n   :imported-members:" if (BOOK.parent / module.replace(".", "/")).is_dir() else ""
    return f"""\
# {module}

```{{eval-rst}}
.. automodule:: {module}
   :members:{gathered}
   :exclude-members: extra_repr
```
"""


def command(title: str) -> str:
    """The page of a command, from its parser, with the examples of its help."""
    module, name = COMMANDS[title]
    path = f"\n   :path: {name}" if name else ""
    home = importlib.import_module(f"svit_utils.cli.{name}" if module.startswith("svit_utils.") else module)
    examples = getattr(home, "EXAMPLES", "")
    return f"""\
# {title}

```{{eval-rst}}
.. argparse::
   :module: {module}
   :func: parser
   :prog: {title.removesuffix(name).strip()}{path}
   :nodefault:
   :noepilog:
```
""" + (f"\n```text\n{examples}\n```\n" if examples else "")
