"""What MkDocs lacks for these pages: formulas as MathML, which browsers show without a script or a font from elsewhere."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The content of a page with its formulas as MathML."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    tag, formula = found.groups()
    mathml = convert(html.unescape(formula).strip(), display="block" if tag == "div" else "inline")
    return f'<{tag} class="formula">{mathml}</{tag}>'
