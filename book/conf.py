"""Sphinx's configuration of the book. `make site` (tools/book.py) lays the pages out and calls Sphinx."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from svit_utils import __version__  # noqa: E402
from tools import links  # noqa: E402

project, author, copyright = "SelectiveViT, taken apart", "The SelectiveViT tutorial contributors", "MIT licence"
version = release = __version__
language = "en"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax 3 and its fonts, copied beside the pages
    "sphinxcontrib.bibtex",
    "sphinxarg.ext",
    "sphinx_copybutton",
]

# The pages show what is stored and tested; nothing is run here.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that a cell shows
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_fence_as_directive = ["math"]  # as GitHub renders formulas of the README
myst_heading_anchors = 4
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrtalpha"
copybutton_selector = "div.cell_input pre, div.highlight-console pre, div.highlight-python pre"

autodoc_typehints, python_use_unqualified_type_names = "signature", True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
# Types of other packages, whose documentation lies on other hosts: looked up offline they are never found.
OTHERS = "torch|timm|numpy|np|pd|pandas|matplotlib|PIL|accelerate|collections|pathlib|os|argparse|contextlib|typing"
OTHERS += "|huggingface_hub|networkx|nx|nn|Tensor|Figure|Dataset"
# A name in single backticks is linked where it has a place of its own, and else shown as code.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:.*", rf"({OTHERS})(\..*)?"),
    ("py:obj", ".*"),
    ("py:class", r"svit_utils\.show\.explorers?\..*|.*\[.*|svit_utils\.exclusive\.F"),  # F is a type variable
]

repository, place = links.repository(os.environ.get("SVIT_REPOSITORY")), links.stamped()
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system has it
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search stands in the sidebar
}
if repository:
    html_theme_options |= {
        "repository_url": f"https://github.com/{repository}",
        "repository_branch": place.branch if place and place.repository == repository else "main",
        "use_repository_button": True,
        "launch_buttons": {
            "colab_url": "https://colab.research.google.com",
            "binderhub_url": "https://mybinder.org",
            "notebook_interface": "jupyterlab",
        },
    }


def literal_blocks(app, what, name, obj, options, lines: list[str]) -> None:
    """An indented block after a paragraph of a docstring is a formula or a program: shown as it stands."""
    before = ""
    for number, line in reversed(list(enumerate(lines))):
        before = next((text for text in reversed(lines[:number]) if text.strip()), "")
        starts = line.startswith("    ") and number > 1 and not lines[number - 1].strip()
        if starts and before and not before.startswith(" "):
            lines[number:number] = ["::", ""]


def without_list_roles(app, pagename, templatename, context: dict, doctree) -> None:
    """docutils calls the references a list, but none of its children a list's item: screen readers stumble."""
    for role in (' role="list"', ' role="doc-biblioentry"'):
        context["body"] = context.get("body", "").replace(role, "")


def setup(app) -> None:
    """The first before napoleon, which reads the docstrings at priority 500."""
    app.connect("autodoc-process-docstring", literal_blocks, priority=400)
    app.connect("html-page-context", without_list_roles)
