"""The examples run from beginning to end and draw their figures; notebooks give what is stored with them.

``IMPLICIT_RNN_ENGINE=numpy jupyter execute --inplace examples/*.ipynb`` brings what is stored up to date.
"""

from __future__ import annotations

import re
import sys
from base64 import b64decode
from typing import Any

import numpy as np
import pytest
from conftest import CHECKOUT, ENVIRONMENT, run_process

EXAMPLES = CHECKOUT / "examples"
NAMES = ("xor", "pendulum", "custom_fixed_point")
DOORS = {"scikit_learn": "sklearn", "pytorch": "torch"}
"""Notebooks on other libraries, and these."""
NOTEBOOKS = (*NAMES, *DOORS)


def small(engine: str) -> dict[str, str]:
    """The environment of a script in its small size."""
    return {"IMPLICIT_RNN_EXAMPLES": "small", "IMPLICIT_RNN_ENGINE": engine, "MPLBACKEND": "Agg"}


def test_every_example_is_a_script_and_a_notebook():
    expected = [f"{name}.{kind}" for name in NAMES for kind in ("ipynb", "py")] + [f"{name}.ipynb" for name in DOORS]
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_file()) == sorted(expected)


# --- scripts, on the Julia engine ----------------------------------------------------------------------------


@pytest.mark.julia
@pytest.mark.parametrize("name", NAMES)
def test_script_runs_and_draws_its_figure(name, tmp_path):
    done = run_process([sys.executable, str(EXAMPLES / f"{name}.py")], ENVIRONMENT | small("julia"), 120, tmp_path)
    assert done.returncode == 0, str(done)
    assert "Warning" not in done.stderr, str(done)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", NAMES)
def test_size_of_a_script_is_set_by_the_environment(name):
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    setting = re.search(r"SMALL = .*\n(.*) = (.*) if SMALL else (.*)\n", text)
    assert setting is not None
    assert 'SMALL = os.environ.get("IMPLICIT_RNN_EXAMPLES") == "small"\n' in text
    assert np.all(np.array(eval(setting[2])) < np.array(eval(setting[3])))
    assert all(text.count(size) > 1 for size in setting[1].split(", "))  # which is used


# --- notebooks, on the NumPy engine --------------------------------------------------------------------------

NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def read(name: str) -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


def figures(notebook: Any) -> list[bytes]:
    return [
        b64decode(output.data["image/png"]) for output in outputs(notebook) if "image/png" in output.get("data", {})
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_gives_what_is_stored_with_it(name, tmp_path, monkeypatch):
    if name in DOORS:
        pytest.importorskip(DOORS[name])
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IMPLICIT_RNN_ENGINE", "numpy")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own, inline
    stored, now = read(name), read(name)
    place = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(now, timeout=120, kernel_name="python3", coalesce_streams=True, resources=place).execute()
    assert [output.get("text") for output in outputs(now) if output.get("name") == "stderr"] == []
    assert len(figures(now)) == len(figures(stored))
    # The same words, and numbers that differ as trainings do on different processors; errors below 1e-8 are all alike.
    assert NUMBER.sub("#", printed(now)) == NUMBER.sub("#", printed(stored))
    values = [[float(number) for number in NUMBER.findall(printed(notebook))] for notebook in (now, stored)]
    np.testing.assert_allclose(*values, rtol=0.1, atol=1e-8)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_with_small_figures_as_it_ran_from_beginning_to_end(name):
    notebook = read(name)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert figures(notebook)
    assert max(map(len, figures(notebook))) < 100_000
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data"}
