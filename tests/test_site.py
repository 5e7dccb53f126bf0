"""The documentation site: built without a warning, readable without a network, with every public name in its reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT

import implicit_rnn as irnn

DOCS = CHECKOUT / "python" / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for tool in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(tool, reason="needs pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)],
        cwd=CHECKOUT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, str]:
    """The pages of the site by their paths."""
    return {str(path.relative_to(site)): path.read_text("utf-8") for path in site.rglob("*.html")}


def test_every_page_is_in_the_site(pages):
    written = {str(path.relative_to(DOCS).with_suffix(".html")) for path in DOCS.rglob("*.md")}
    assert written == pages.keys() - {"404.html"}


def test_pages_load_nothing_from_the_network(pages):
    loaded = re.compile(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="?(?:https?:)?//[^"> ]*')
    assert not {path: found for path, text in pages.items() if (found := loaded.findall(text))}


def test_no_page_shows_markup_that_its_extensions_do_not_know(pages):
    assert not [path for path, text in pages.items() if re.search(r"<p>(?:!!!|\?\?\?|===) ", text)]


def test_formulas_are_mathml_that_needs_no_script(pages):
    assert pages["mathematics.html"].count("<math") > 100
    assert not [path for path, text in pages.items() if 'class="arithmatex"' in text]


@pytest.mark.parametrize("name", [name for name in irnn.__all__ if name != "__version__"])
def test_public_name_is_in_the_reference_once(pages, name):
    headings = [re.findall(rf'<h2 id="implicit_rnn\.{name}"', text) for text in pages.values()]
    assert sum(map(len, headings)) == 1


def test_parameters_that_are_described_together_keep_their_own_defaults(pages):
    row = re.search(r"<code>batch_size</code>.*?</tr>", pages["reference/training.html"], re.DOTALL)[0]
    assert "<code>None</code>" in row
    assert "100" not in row


def test_exported_name_of_julia_is_in_its_reference_with_its_docstring(pages):
    source = (CHECKOUT / "julia" / "src" / "ImplicitRNN.jl").read_text("utf-8")
    exported = [name for line in re.findall(r"^export (.+)$", source, re.MULTILINE) for name in line.split(", ")]
    sections = re.split(r'<h2 id="([\w!]+)"', pages["reference/julia.html"])
    assert sections[1::2] == exported
    assert all("<p>" in text for text in sections[2::2])
    assert "$(" not in pages["reference/julia.html"]
