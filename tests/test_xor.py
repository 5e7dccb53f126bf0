"""The XOR experiment: its statistics and the judgements of its protocol, on nets whose weights are known to solve it."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest

import implicit_rnn as irnn
from implicit_rnn.experiments import xor
from implicit_rnn.experiments.statistics import wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 200, 0.0, 0.018846),
        (200, 200, 0.981154, 1.0),
        (190, 200, 0.910422, 0.972617),
        (5, 10, 0.236593, 0.763407),
        (1, 1, 0.206549, 1.0),
    ],
)
def test_wilson_interval_has_its_known_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=2e-6)


def net_of(
    engine: str, W: list, b: list, R: list | None, constraint: irnn.model.constraints.Constraint
) -> irnn.Network:
    layer = irnn.Layer(len(b), "tanh", lateral=R is not None)
    net = irnn.Network(2, [layer], outputs=[0], constraint=constraint, engine=engine)
    net.parameters[:] = 0
    net.weights["W"][...], net.weights["b"][...] = W, b
    if R is not None:
        net.weights["R"][...] = R
    return net


def test_hand_made_inhibition_solves_xor_in_sign(engine):
    net = net_of(engine, [[2, 2], [3, 3]], [-2, -3], [[0, -4], [0, 0]], irnn.Free())
    np.testing.assert_allclose(net.predict(xor.X)[:, 0], [-0.964, 0.963, 0.963, -0.963], atol=2e-3)


TRAINED = {
    "W": [[-0.999, 1.087], [-1.099, 1.359]],
    "b": [0.995, 1.08],
    "R": [[0.575, -2.128], [-0.073, 0.537]],
    "constraint": irnn.Free(),
}
"""Weights that the protocol found under Perron(0.95); the constraint is in them."""


def test_trained_weights_solve_xor(engine):
    assert xor.solves(net_of(engine, **TRAINED))


def test_trained_weights_have_one_equilibrium(engine):
    assert not xor.is_multistable(net_of(engine, **TRAINED), seed=0)


def test_weights_whose_signs_are_right_but_error_is_large_do_not_solve_xor(engine):
    net = net_of(engine, [[0.49, 0.49], [3, 3]], [-0.49, -3], [[0, -0.98], [0, 0]], irnn.Free())
    np.testing.assert_array_equal(np.sign(net.predict(xor.X)[:, 0]), np.sign(xor.Y))
    assert not xor.solves(net)


def test_net_that_does_not_converge_does_not_solve_xor(engine):
    broken = {**TRAINED, "W": [*TRAINED["W"], [1, 1]], "b": [*TRAINED["b"], 0.3]}
    broken["R"] = [[0.575, -2.128, 0], [-0.073, 0.537, 0], [0, 0, -5]]
    net = net_of(engine, **broken)
    solution = net.equilibrium(xor.X, solver=xor.SOLVER, on_failure="ignore")
    assert np.mean((net.read_out(solution.state)[:, 0] - xor.Y) ** 2) < 0.01
    assert not xor.solves(net)


def test_net_with_a_second_equilibrium_is_multistable(engine):
    bistable = {**TRAINED, "W": [*TRAINED["W"], [0, 0]], "b": [*TRAINED["b"], 0.0]}
    bistable["R"] = [[0.575, -2.128, 0], [-0.073, 0.537, 0], [0, 0, 2]]
    assert xor.is_multistable(net_of(engine, **bistable), seed=0)


def test_untrained_net_does_not_solve_xor(engine):
    assert not xor.solves(xor.initial_net("perron", 2, 0, engine))


def test_initial_net_of_a_seed_is_reproducible_and_has_the_protocol_s_kind():
    a, b = (xor.initial_net("free", 3, 5, "numpy") for _ in range(2))
    np.testing.assert_array_equal(a.parameters, b.parameters)
    assert a.topology.constraint == irnn.Free()
    assert a.topology.layers == (irnn.Layer(3, "tanh", lateral=True),)


def test_initial_net_without_recurrence_has_no_recurrent_weights():
    assert set(xor.initial_net("none", 3, 5, "numpy").weights) == {"W", "b"}


def test_unknown_recurrence_is_refused_with_the_valid_names():
    with pytest.raises(ValueError, match="expected numbers from 1 and recurrences among none, free, perron"):
        xor.run([2], ["monotone"], 1, "numpy")


@pytest.fixture(scope="module")
def feed_forward() -> xor.Result:
    return xor.run([1, 2], ["none"], 2, "numpy")


def test_feed_forward_nets_solve_nothing(feed_forward):
    assert [cell.solved for cell in feed_forward.cells] == [0, 0]


def test_table_has_a_line_per_kind_of_net_and_explains_its_words(feed_forward):
    table, legend = xor.table(feed_forward).split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 3
    assert all(line.split()[0] in lines[0] for line in legend.splitlines())
    assert lines[1].split()[:5] == ["none", "1", "0", "of", "2"]


def test_result_as_json_holds_what_is_needed_to_repeat_it(feed_forward):
    data = json.loads(json.dumps(feed_forward.as_dict()))
    assert {"optimizer", "solver", "steps", "clip", "starts", "seeds"} <= set(data["protocol"])
    assert data["protocol"]["seeds"] == [0, 1]
    assert data["protocol"]["optimizer"]["learning_rate"] == 0.03
    assert {"implicit-rnn", "numpy", "python"} <= set(data["versions"])
    assert data["engine"] == "numpy"


def test_no_figure_is_written_if_no_net_solved_it(feed_forward, tmp_path):
    assert [path.name for path in xor.save(feed_forward, tmp_path / "new" / "folder")] == ["xor.json"]


def test_figure_of_an_earlier_result_does_not_stay_beside_one_without(feed_forward, tmp_path):
    (tmp_path / "xor.png").touch()
    xor.save(feed_forward, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["xor.json"]


def test_result_that_cannot_be_written_leaves_the_earlier_one(feed_forward, tmp_path, monkeypatch):
    xor.save(feed_forward, tmp_path)
    before = (tmp_path / "xor.json").read_text()
    monkeypatch.setattr("os.fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: '.*xor\.json'"):
        xor.save(feed_forward, tmp_path)
    assert (tmp_path / "xor.json").read_text() == before


@pytest.mark.julia
class TestClaim:
    """The paper's first claim, with seeds enough to tell."""

    @pytest.fixture(scope="class")
    @classmethod
    def cells(cls) -> dict[tuple[str, int], xor.Cell]:
        result = xor.run([1, 2], ["none", "perron"], 60, "julia")
        return {(cell.recurrence, cell.neurons): cell for cell in result.cells}

    @pytest.mark.parametrize("kind", [("none", 1), ("none", 2), ("perron", 1)])
    def test_feed_forward_nets_and_single_neurons_solve_nothing(self, cells, kind):
        assert cells[kind].solved == 0

    def test_two_neurons_with_lateral_connections_under_perron_solve_it(self, cells):
        assert cells["perron", 2].solved >= 57

    def test_no_net_under_perron_is_multistable(self, cells):
        assert cells["perron", 2].multistable == 0
