"""The cost experiment: its points, its comparison, its command."""

from __future__ import annotations

import json

import pytest

from implicit_rnn import cli
from implicit_rnn.experiments import cost
from implicit_rnn.experiments.cost import Point, Result


def test_error_of_bptt_falls_with_its_steps(engine: str):
    errors = [cost.measure("unrolled", steps, engine).error for steps in (5, 20, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2 > 1e-6 > errors[2]


@pytest.mark.parametrize("method", ["picard", "auto"])
def test_error_of_the_implicit_gradient_is_near_its_tolerance(engine: str, method: str):
    assert cost.measure(method, 1e-8, engine).error < 1e-6


@pytest.mark.julia
def test_memory_of_the_implicit_gradient_does_not_grow_with_the_iterations():
    chain = cost.measure_in_new_process("unrolled", 500, "julia")
    loose, tight = (cost.measure_in_new_process("picard", tol, "julia") for tol in (1e-3, 1e-11))
    assert tight.iterations > 3 * loose.iterations
    assert tight.peak_bytes < loose.peak_bytes + 10e6
    assert chain.peak_bytes > 5 * tight.peak_bytes


def test_memory_that_the_system_counts_later_is_no_growth_below_zero(monkeypatch):
    readings = iter([8192, 4096])
    monkeypatch.setattr(cost.PeakMemory, "_high_water", lambda self: next(readings))
    with cost.PeakMemory() as memory:
        pass
    assert memory.bytes == 0


def test_comparison_takes_the_shortest_chain_that_is_as_exact():
    chains = [Point("unrolled", k, k, k * 1e-3, k * 1000, 10.0**-k) for k in (1, 4, 9)]
    implicit = [Point("picard", 1e-3, 7, 2e-3, 2000, 1e-3), Point("auto", 1e-10, 7, 2e-3, 0, 1e-10)]
    first, second = cost.comparison(Result([*chains, *implicit], "julia", 1))
    assert (first["steps of BPTT"], first["time ratio"], first["memory ratio"]) == (4, 2.0, 2.0)
    assert (second["steps of BPTT"], second["time ratio"], second["memory ratio"]) == (None, None, None)


def test_steps_below_one_are_refused():
    with pytest.raises(ValueError, match=r"steps are \[0\]; expected numbers from 1"):
        cost.run([0], engine="numpy")


def test_command_writes_json_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "TOLERANCES", {"picard": (1e-5,)})
    assert cli.main(["cost", "--engine", "numpy", "--steps", "5", "100", "--out", str(tmp_path)]) == 0
    assert "BPTT is as accurate with 100 steps" in capsys.readouterr().out
    points = json.loads((tmp_path / "cost.json").read_text("utf-8"))["points"]
    assert [(point["method"], point["setting"]) for point in points] == [
        ("unrolled", 5), ("unrolled", 100), ("picard", 1e-5),
    ]  # fmt: skip
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
