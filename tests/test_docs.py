"""The documentation is true: the Python blocks of each page run, in order, and print what the page says they print."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKOUT, ENVIRONMENT, run_process

import implicit_rnn as irnn

TIME_LIMIT = 120
FOLDER = CHECKOUT / "python" / "docs"
LINKED_PAGES = ["README.md", *sorted(str(path.relative_to(CHECKOUT)) for path in FOLDER.rglob("*.md"))]
PAGES = [page for page in LINKED_PAGES if "```python\n" in (CHECKOUT / page).read_text("utf-8")]

BLOCK = r"^```{}\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?(?![\w.]*\w)")
ROUNDING = 1e-8
"""Numbers below are residuals and errors at the level of rounding or of a tolerance, of which the size counts."""

RUNNER = """
import contextlib, io, json, pathlib, sys, warnings
import implicit_rnn

warnings.simplefilter("error", implicit_rnn.ConvergenceWarning)
printed, names = [], {"__name__": "__main__"}
for number, block in enumerate(json.loads(pathlib.Path("blocks.json").read_text("utf-8")), 1):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block, f"block {number}", "exec"), names)
    printed.append(out.getvalue())
pathlib.Path("printed.json").write_text(json.dumps(printed), "utf-8")
"""


def blocks(page: str, mark: str = "python") -> list[tuple[str, str]]:
    """The code of each Python block, and the output that the page shows for it, if it does.

    Blocks marked ``py`` need Julia or other machines, those marked ``sh`` are commands.
    """
    return re.findall(BLOCK.format(mark), (CHECKOUT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def links(page: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", (CHECKOUT / page).read_text("utf-8"))
    return [target.partition("#")[0] for target in targets if not target.startswith(("http", "#"))]


def printed_by(code: list[str], folder: Path) -> list[str]:
    """What blocks print on the NumPy engine, one after the other in one process."""
    (folder / "blocks.json").write_text(json.dumps(code), "utf-8")
    env = ENVIRONMENT | {"IMPLICIT_RNN_ENGINE": "numpy"}
    done = run_process([sys.executable, "-c", RUNNER], env, TIME_LIMIT, folder)
    assert done.returncode == 0, str(done)
    return json.loads((folder / "printed.json").read_text("utf-8"))


def is_near(shown: str, printed: str) -> bool:
    """Whether two numbers differ by no more than one in the last digit that is shown; counts are exact."""
    if shown == printed:
        return True
    x, y = float(shown), float(printed)
    mantissa, _, exponent = shown.partition("e")
    if abs(x) < ROUNDING and abs(y) < ROUNDING and exponent:
        return min(abs(x), abs(y)) * 10 >= max(abs(x), abs(y)) or max(abs(x), abs(y)) < 1e-12
    decimals = len(mantissa.partition(".")[2])
    is_count = "." not in mantissa and not exponent
    return not is_count and abs(x - y) <= 1.01 * 10.0 ** (int(exponent or 0) - decimals)


def difference(shown: str, printed: str) -> str | None:
    """The first pair of lines that do not say the same."""
    for ours, theirs in zip_longest(shown.split("\n"), printed.rstrip("\n").split("\n"), fillvalue="(nothing)"):
        words = [NUMBER.sub("#", line).split() for line in (ours, theirs)]
        numbers = zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=False)
        if words[0] != words[1] or not all(is_near(*pair) for pair in numbers):
            return f"the page shows {ours!r}, but it prints {theirs!r}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_of_a_page_print_what_it_shows(page, tmp_path):
    if (library := Path(page).stem) in ("jax", "sklearn", "torch"):
        pytest.importorskip(library)
    code, shown = zip(*blocks(page), strict=True)
    printed = printed_by(list(code), tmp_path)
    wrong = [difference(text.rstrip("\n"), output) for text, output in zip(shown, printed, strict=True) if text]
    assert not [text for text in wrong if text]


@pytest.mark.parametrize("library", ["sklearn", "torch"])
def test_block_of_the_readme_on_another_library_runs(library, tmp_path):
    pytest.importorskip(library)
    (code,) = [code for code, _ in blocks("README.md", "py") if f"implicit_rnn.{library}" in code]
    printed_by([code], tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_every_output_that_a_page_shows_belongs_to_a_block(page):
    text = (CHECKOUT / page).read_text("utf-8")
    assert text.count("\n```text\n") == sum(
        bool(output) for mark in ("python", "py", "sh") for _, output in blocks(page, mark)
    )


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("error 1.8e-02, 12 of 12", "error 1.7e-02, 12 of 12"),
        ("loss 0.0115", "loss 0.0116"),
        ("residual up to 9.9e-11", "residual up to 4.1e-11"),
        ("Implicit(tol=None)   0e+00", "Implicit(tol=None) 3e-16"),
    ],
)
def test_outputs_that_differ_by_rounding_say_the_same(shown, printed):
    assert difference(shown, printed) is None


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("error 1.8e-02", "error 1.6e-02"),
        ("17 iterations", "18 iterations"),
        ("loss 0.0115", "loss 0.0119"),
        ("residual 9.9e-11", "residual 9.9e-05"),
        ("CONVERGED", "UNSTABLE"),
        ("one", "one\ntwo"),
        ("Perron(kappa=0.95)", "Perron(kappa=0.90)"),
    ],
)
def test_outputs_that_say_something_else_are_told(shown, printed):
    assert difference(shown, printed)


@pytest.mark.julia
def test_julia_code_of_the_page_on_equations_prints_what_it_shows(capsys):
    for code, shown in blocks("python/docs/equations.md", "py"):
        exec(code, {"np": np, "irnn": irnn})
        assert difference(shown.rstrip("\n"), capsys.readouterr().out) is None


@pytest.mark.parametrize("page", LINKED_PAGES)
def test_links_of_a_page_lead_to_files(page):
    missing = [link for link in links(page) if not ((CHECKOUT / page).parent / link).exists()]
    assert not missing


@pytest.mark.skipif(shutil.which("git") is None or not (CHECKOUT / ".git").exists(), reason="no clone")
def test_what_the_commands_of_the_readme_leave_behind_is_ignored_by_git():
    environments = re.findall(r"python -m venv (\S+)", (CHECKOUT / "README.md").read_text("utf-8"))
    left = [f"{name}/bin/python" for name in environments] + [
        "xor/xor.json",
        ".pytest_cache/README.md",
        "julia/Manifest.toml",
    ]
    ignored = subprocess.run(["git", "check-ignore", *left], cwd=CHECKOUT, capture_output=True, text=True)
    assert ignored.stdout.split() == left
