"""The documentation runs: the Python blocks of each page, in order, in one namespace."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import CHECKOUT

TIME_LIMIT = 120
PAGES = [
    "README.md",
    "python/docs/choosing.md",
    "python/docs/mathematics.md",
    "python/docs/training.md",
    "python/docs/experiments.md",
    "python/docs/sklearn.md",
]
NEEDED = {"python/docs/sklearn.md": "sklearn"}
"""The packages without which the blocks of a page do not run."""
LINKED_PAGES = [*PAGES, "python/docs/performance.md"]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (CHECKOUT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def links(page: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", (CHECKOUT / page).read_text("utf-8"))
    return [target.partition("#")[0] for target in targets if not target.startswith(("http", "#"))]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_of_a_page_run_in_order(page, tmp_path):
    if page in NEEDED:
        pytest.importorskip(NEEDED[page])
    blocks = python_blocks(page)
    assert blocks
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


@pytest.mark.parametrize("page", LINKED_PAGES)
def test_links_of_a_page_lead_to_files(page):
    missing = [link for link in links(page) if not ((CHECKOUT / page).parent / link).exists()]
    assert not missing
