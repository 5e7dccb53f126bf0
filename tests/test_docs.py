"""The documentation runs: the Python blocks of each page, in order, in one namespace."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKOUT

import implicit_rnn as irnn

TIME_LIMIT = 120
FOLDER = CHECKOUT / "python" / "docs"
LINKED_PAGES = ["README.md", *sorted(str(path.relative_to(CHECKOUT)) for path in FOLDER.rglob("*.md"))]
PAGES = [page for page in LINKED_PAGES if "```python\n" in (CHECKOUT / page).read_text("utf-8")]


def blocks_of(page: str, language: str) -> list[str]:
    text = (CHECKOUT / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def links(page: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", (CHECKOUT / page).read_text("utf-8"))
    return [target.partition("#")[0] for target in targets if not target.startswith(("http", "#"))]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_of_a_page_run_in_order(page, tmp_path):
    if (library := Path(page).stem) in ("jax", "sklearn", "torch"):
        pytest.importorskip(library)
    blocks = blocks_of(page, "python")
    for number, block in enumerate(blocks, 1):
        (tmp_path / f"block{number}.py").write_text(block, "utf-8")
    # Compiled one by one, so that a traceback names the block and its line.
    (tmp_path / "page.py").write_text(
        "import warnings, implicit_rnn\n"
        "warnings.simplefilter('error', implicit_rnn.ConvergenceWarning)\n"
        f"for number in range(1, {len(blocks) + 1}):\n"
        "    name = f'block{number}.py'\n"
        "    exec(compile(open(name, encoding='utf-8').read(), name, 'exec'), globals())\n",
        "utf-8",
    )
    finished = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env={**os.environ, "IMPLICIT_RNN_ENGINE": "numpy", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=TIME_LIMIT,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.julia
def test_julia_code_of_the_page_on_equations_runs(capsys):
    for block in blocks_of("python/docs/equations.md", "py"):
        exec(block, {"np": np, "irnn": irnn})
    assert capsys.readouterr().out == "True (100000, 1) (100000, 1)\n"


@pytest.mark.parametrize("page", LINKED_PAGES)
def test_links_of_a_page_lead_to_files(page):
    missing = [link for link in links(page) if not ((CHECKOUT / page).parent / link).exists()]
    assert not missing
