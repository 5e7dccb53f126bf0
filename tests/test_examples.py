"""The examples run from beginning to end, at small size, and draw their figures."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT, ENVIRONMENT, run_process

EXAMPLES = CHECKOUT / "examples"
NAMES = ("xor", "pendulum", "custom_fixed_point")


def small(engine: str) -> dict[str, str]:
    """The environment of an example in its small size."""
    return {"IMPLICIT_RNN_EXAMPLES": "small", "IMPLICIT_RNN_ENGINE": engine, "MPLBACKEND": "Agg"}


def test_every_example_is_a_script_and_a_notebook():
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_file()) == sorted(
        f"{name}.{kind}" for name in NAMES for kind in ("ipynb", "py")
    )


# Scripts run on the Julia engine and notebooks, which do the same, on the NumPy engine: once each, to save time.


@pytest.mark.julia
@pytest.mark.parametrize("name", NAMES)
def test_script_runs_and_draws_its_figure(name, tmp_path):
    done = run_process([sys.executable, str(EXAMPLES / f"{name}.py")], ENVIRONMENT | small("julia"), 120, tmp_path)
    assert done.returncode == 0, str(done)
    assert "Warning" not in done.stderr, str(done)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_and_draws_figures(name, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for variable, value in small("numpy").items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("MPLBACKEND")  # the notebook's own, inline
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    errors = "".join(output["text"] for output in outputs if output.get("name") == "stderr")
    assert "Warning" not in errors, errors


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_stored_without_outputs(name):
    text = (EXAMPLES / f"{name}.ipynb").read_text("utf-8")
    assert set(re.findall(r'"outputs": (\[[^]]*\])', text)) == {"[]"}
    assert set(re.findall(r'"execution_count": (\w+)', text)) == {"null"}


@pytest.mark.parametrize("name", NAMES)
def test_size_of_an_example_is_set_by_the_environment(name):
    for kind in ("py", "ipynb"):
        assert "IMPLICIT_RNN_EXAMPLES" in Path(EXAMPLES / f"{name}.{kind}").read_text("utf-8")
