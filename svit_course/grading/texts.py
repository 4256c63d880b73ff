"""A student's text as HTML: Markdown as JupyterLab shows it, formulas as pictures, nothing that is loaded or run."""

from __future__ import annotations

import base64
import html
import io
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup
from mdit_py_plugins.dollarmath import dollarmath_plugin

LONGEST = 20_000  # characters of a text that is set; a longer one is shown as it is
FORMULA, FORMULAS = 400, 200  # characters of a formula that is set, and how many of a text


def as_html(text: str) -> Markup:
    """HTML of a written answer. HTML in it is shown as text; pictures, which would be loaded, as their links' words."""
    if len(text) > LONGEST:
        return Markup(f"<pre>{html.escape(text)}</pre>")
    left = [FORMULAS]

    def formula(content: str, options: dict[str, Any]) -> str:
        left[0] -= 1
        picture = _picture(content.strip()) if left[0] >= 0 and len(content) <= FORMULA else ""
        said = html.escape(content.strip())
        if not picture:
            return f"<code>{said}</code>"
        kind = "formula block" if options.get("display_mode") else "formula"
        return f'<img class="{kind}" alt="{said}" src="data:image/svg+xml;base64,{picture}">'

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    markdown.use(dollarmath_plugin, renderer=formula, allow_space=False, double_inline=True)
    return Markup(markdown.render(text))


@lru_cache(maxsize=1000)
def _picture(formula: str) -> str:
    """SVG of a formula, in base64; "" where matplotlib's TeX does not know it."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    drawn = io.BytesIO()
    try:
        math_to_image(f"${formula}$", drawn, prop=FontProperties(size=12), format="svg")
    except Exception:  # whatever a parser makes of what was written for it
        return ""
    return base64.b64encode(drawn.getvalue()).decode()
