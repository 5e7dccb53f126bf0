"""What MkDocs lacks for these pages: the reference of the Julia package, and formulas without a script or a font."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

# --- the Julia package: the docstrings of what it exports ----------------------------------------------------------

SOURCES = Path(__file__).parents[2] / "julia" / "src"
EXPORTS = re.compile(r"^export (.+)$", re.MULTILINE)
DOCSTRING = re.compile(
    r'^(?:"""\n(?P<long>.*?)^"""|"(?P<short>[^"\n]+)")\n(?:@\w+ )*(?:mutable |abstract )?(?:\w+ )?(?:\w+\.)?(?P<name>[\w!]+)',
    re.MULTILINE | re.DOTALL,
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page of the Julia package, with its docstrings behind what stands there."""
    return "\n\n".join([markdown, *julia_reference()]) if page.file.src_uri == "reference/julia.md" else markdown


def julia_reference() -> list[str]:
    """A section for each exported name, in the order of the exports."""
    text = "\n".join(path.read_text("utf-8") for path in sorted(SOURCES.rglob("*.jl")))
    docstrings: dict[str, list[str]] = {}
    for found in DOCSTRING.finditer(text):
        docstring = re.sub(r"\$\((\w+)\)", lambda name: _constant(name[1], text), found["long"] or found["short"])
        docstrings.setdefault(found["name"], []).append(docstring)
    names = [name for line in EXPORTS.findall(text) for name in line.split(", ")]
    return [f"## {name} {{#{name}}}\n\n" + _page("\n\n".join(docstrings[name]), names) for name in names]


def _constant(name: str, text: str) -> str:
    """The value of a constant that a docstring interpolates."""
    found = re.search(rf"^const {name} = (\S+)", text, re.MULTILINE)
    return found[1] if found else name


def _page(docstring: str, names: list[str]) -> str:
    """A docstring with headings below those of the page, and with references that are links where there is something."""
    text = re.sub(r"^#", "###", docstring, flags=re.MULTILINE)
    return re.sub(r"\[(`(\w+!?)`)\]\(@ref\)", lambda m: f"[{m[1]}](#{m[2]})" if m[2] in names else m[1], text)


# --- formulas as MathML --------------------------------------------------------------------------------------

FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The content of a page with its formulas as MathML."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    tag, formula = found.groups()
    mathml = convert(html.unescape(formula).strip(), display="block" if tag == "div" else "inline")
    return f'<{tag} class="formula">{mathml}</{tag}>'


# --- the API reference ---------------------------------------------------------------------------------------


class TypesOfGroups(griffe.Extension):
    """Gives each of several parameters that a docstring describes together its own type and default, not the first one's."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Correct what the docstring of a function, or of the class that it makes, says."""
        owner = func.parent if func.name == "__init__" and func.parent else func
        for section in owner.docstring.parsed if owner.docstring else ():
            if section.kind is griffe.DocstringSectionKind.parameters:
                for described in section.value:
                    if described.name in [parameter.name for parameter in func.parameters]:
                        described.annotation = func.parameters[described.name].annotation
                        described.value = func.parameters[described.name].default
