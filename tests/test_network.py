"""A network: its parameters, what it returns, what it reports, how it is copied."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import make_bistable, make_net, make_neuron, make_oscillating

import implicit_rnn as irnn

# --- parameters ----------------------------------------------------------------------------------------------


def test_one_layer_under_perron_has_its_six_blocks_of_weights():
    shapes = {name: weight.shape for name, weight in make_net("numpy").weights.items()}
    assert shapes == {"W": (5, 3), "R": (5, 5), "b": (5,), "a": (5,), "C": (2, 5), "d": (2,)}


def test_free_net_has_no_scales():
    assert set(make_net("numpy", constraint=irnn.Free()).weights) == {"W", "R", "b", "C", "d"}


def test_net_without_lateral_connections_has_no_recurrent_weights():
    net = irnn.Network(3, [irnn.Layer(5, "tanh", lateral=False)], outputs=2)
    assert set(net.weights) == {"W", "b", "C", "d"}


def test_net_that_reads_neurons_has_no_readout_weights():
    assert set(make_net("numpy", outputs=[0]).weights) == {"W", "R", "b", "a"}


def test_views_share_the_memory_of_the_parameters():
    net = make_net("numpy")
    assert all(np.shares_memory(weight, net.parameters) for weight in net.weights.values())


def test_views_cover_every_parameter_exactly_once():
    net = make_net("numpy")
    net.parameters[:] = 0
    for weight in net.weights.values():
        weight += 1
    np.testing.assert_array_equal(net.parameters, 1)


def test_weights_are_no_dictionary_to_write_to():
    with pytest.raises(TypeError):
        make_net("numpy").weights["W"] = np.zeros((5, 3))


def test_write_to_a_view_counts_at_the_next_call(net, X):
    net.predict(X)
    net.weights["C"][...], net.weights["d"][...] = 0, [1, 2]
    np.testing.assert_array_equal(net.predict(X), np.tile([1.0, 2.0], (len(X), 1)))


def test_write_to_a_recurrent_weight_counts_at_the_next_call(net, X):
    before = net.equilibrium(X).state
    net.weights["R"][0, 1] += 0.1
    after = net.equilibrium(X).state
    assert np.abs(after - before).max() > 1e-3


def test_write_to_the_flat_vector_counts_at_the_next_call(net, X):
    net.predict(X)
    net.parameters[:] = 0
    np.testing.assert_array_equal(net.predict(X), 0)


def test_assigning_parameters_copies_into_the_same_memory():
    net = make_net("numpy")
    memory, values = net.parameters, np.arange(len(net.parameters), dtype=float)
    net.parameters = values
    assert net.parameters is memory
    assert not np.shares_memory(memory, values)
    np.testing.assert_array_equal(memory, values)


def test_assigning_parameters_of_another_length_is_refused():
    net = make_net("numpy")
    for values in (np.zeros(3), 0.0):
        with pytest.raises(ValueError, match=re.escape(f"parameters has shape {np.shape(values)}; expected (62,)")):
            net.parameters = values


def test_named_views_a_gradient_by_name_without_copying(net, X, Y):
    _, gradient = net.loss_and_gradient(X, Y)
    named = net.named(gradient)
    assert {name: part.shape for name, part in named.items()} == {n: w.shape for n, w in net.weights.items()}
    assert all(np.shares_memory(part, gradient) for part in named.values())


@pytest.mark.parametrize(
    ("flat", "error", "message"),
    [
        (np.zeros(4), ValueError, r"has shape \(4,\); expected \(62,\)"),
        (["a"] * 62, TypeError, "has dtype <U1; expected real numbers"),
        (np.full(62, None), TypeError, "has dtype object with entries of type NoneType"),
    ],
)
def test_named_refuses_what_is_no_vector_of_the_parameters(flat, error, message):
    with pytest.raises(error, match=f"flat {message}"):
        make_net("numpy").named(flat)


def test_program_that_another_thread_has_dropped_is_no_matter(net):
    class Raced(dict):
        def pop(self, key, *default):
            super().pop(key, None)
            return super().pop(key, *default)

    net._programs = Raced()
    for k in range(20):
        net.program(irnn.Picard(max_iterations=k + 1))
    assert len(net._programs) == 16


def test_same_seed_gives_the_same_parameters():
    a, b = (irnn.Network(3, [5], outputs=2, seed=11).parameters for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_other_seeds_and_no_seed_give_other_parameters():
    vectors = [irnn.Network(3, [5], outputs=2, seed=seed).parameters for seed in (0, 1, None, None)]
    assert len({v.tobytes() for v in vectors}) == 4


def test_initial_weights_have_the_documented_variances_and_biases_zero():
    net = irnn.Network(400, [irnn.Layer(300)], outputs=200, seed=0)
    for name, variance in {"W": 1 / 400, "R": 0.09 / 300, "C": 1 / 300}.items():
        assert net.weights[name].var() == pytest.approx(variance, rel=0.02)
    for name in ("b", "a", "d"):
        assert not net.weights[name].any()


def test_recurrent_weights_of_a_free_net_are_the_raw_ones():
    net = make_net("numpy", constraint=irnn.Free())
    np.testing.assert_array_equal(net.recurrent_weights, net.weights["R"])


def test_matrices_in_force_cannot_be_written_to():
    net = make_net("numpy")
    for matrix in (net.recurrent_weights, net.input_weights):
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 1


def test_recurrent_weights_under_perron_are_the_scaled_and_stretched_ones():
    net = make_net("numpy", constraint=irnn.Perron(0.5))
    net.weights["R"][0] *= 100
    K, a = net.weights["R"].copy(), net.weights["a"]
    K *= np.minimum(1, 0.5 / np.abs(K).sum(axis=1))[:, None]
    np.testing.assert_allclose(net.recurrent_weights, np.exp(-a)[:, None] * K * np.exp(a), rtol=1e-13)


# --- results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_prediction_has_one_row_per_sample_and_the_dtype_of_the_net(engine, dtype, X):
    y = make_net(engine, dtype=dtype).predict(X)
    assert (y.shape, y.dtype.name) == ((len(X), 2), dtype)


def test_prediction_of_chosen_neurons_is_their_state(engine, X):
    net = make_net(engine, outputs=[4, 1])
    np.testing.assert_array_equal(net.predict(X), net.equilibrium(X).state[:, [4, 1]])


def test_prediction_is_the_linear_readout_of_the_state(net, X):
    expected = net.equilibrium(X).state @ net.weights["C"].T + net.weights["d"]
    np.testing.assert_allclose(net.predict(X), expected, rtol=1e-13)


def test_loss_is_the_mean_squared_error_of_the_prediction(net, X, Y):
    assert net.loss_and_gradient(X, Y)[0] == pytest.approx(np.mean((net.predict(X) - Y) ** 2), rel=1e-12)


def test_solution_holds_plain_arrays_of_the_documented_shapes(net, X):
    solution = net.equilibrium(X)
    assert solution.state.shape == (12, 5)
    for array in (solution.status, solution.iterations, solution.residual, solution.rate, solution.bound):
        assert type(array) is np.ndarray
        assert array.shape == (12,)


def test_converged_solution_says_so(net, X):
    solution = net.equilibrium(X)
    assert solution.converged.all()
    assert (solution.status == irnn.Status.CONVERGED).all()
    assert (solution.residual <= 1e-10).all()
    assert (solution.iterations > 1).all()
    assert solution.failure() is None


def test_feed_forward_net_is_solved_exactly_in_one_step(engine, X):
    net = irnn.Network(3, [irnn.Layer(5, "tanh", lateral=False)], outputs=2, seed=0, engine=engine)
    solution = net.equilibrium(X)
    np.testing.assert_allclose(solution.state, np.tanh(X @ net.weights["W"].T), rtol=1e-14)
    assert (solution.iterations == 1).all()


def test_start_decides_which_of_two_equilibria_is_reached(engine):
    net = make_bistable(engine)
    states = net.equilibrium(np.zeros((2, 1)), z0=[[0.5], [-0.5]]).state[:, 0]
    np.testing.assert_allclose(states, [0.957504, -0.957504], atol=1e-6)


def test_results_do_not_change_at_later_calls(net, X):
    first = net.equilibrium(X)
    kept = first.state.copy()
    net.equilibrium(2 * X)
    np.testing.assert_array_equal(first.state, kept)


def test_result_of_one_net_does_not_depend_on_other_nets_and_batch_sizes(engine, X, rng):
    net, other = make_net(engine), make_net(engine, seed=1)
    expected = net.predict(X)
    other.predict(rng.standard_normal((300, 3)))
    net.predict(X[:1])
    np.testing.assert_array_equal(net.predict(X), expected)


# --- samples without an equilibrium --------------------------------------------------------------------------


def test_unconverged_sample_raises_by_default_and_the_error_has_the_solution(engine):
    net = make_oscillating(engine)
    with pytest.raises(irnn.ConvergenceError, match=r"1 of 2 samples.*1 max_iterations.*first sample 1") as caught:
        net.equilibrium([[5.0], [0.5]], solver=irnn.Picard())
    assert caught.value.solution.converged.tolist() == [True, False]


def test_error_names_perron_as_a_remedy_for_free_nets(engine):
    with pytest.raises(irnn.ConvergenceError, match=r"constraint=Perron\(\)"):
        make_oscillating(engine).predict([[0.5]], solver=irnn.Picard())


@pytest.mark.parametrize(
    "call",
    [
        lambda net, **how: net.equilibrium([[0.5]], **how),
        lambda net, **how: net.predict([[0.5]], **how),
        lambda net, **how: net.fit([[0.5]], [[0.0]], epochs=1, **how),
        lambda net, **how: irnn.fit_many([net], [[0.5]], [[0.0]], epochs=1, **how),
    ],
    ids=["equilibrium", "predict", "fit", "fit_many"],
)
def test_every_call_warns_if_asked_to_at_the_line_of_its_caller(engine, call):
    with pytest.warns(irnn.ConvergenceWarning, match="1 of 1 samples") as caught:
        call(make_oscillating(engine), solver=irnn.Picard(), on_failure="warn")
    assert [warning.filename for warning in caught] == [__file__]


def test_unconverged_sample_is_only_marked_if_failures_are_ignored(engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = make_oscillating(engine).equilibrium([[0.5]], solver=irnn.Picard(), on_failure="ignore")
    assert solution.status[0] == irnn.Status.MAX_ITERATIONS
    assert solution.iterations[0] == irnn.Picard().max_iterations
    assert solution.residual[0] > 0.1


def test_gradient_at_an_unconverged_sample_raises(engine):
    with pytest.raises(irnn.ConvergenceError, match="gradient is not that of the loss"):
        make_oscillating(engine).loss_and_gradient([[0.5]], [[0.0]], solver=irnn.Picard())


def test_gradient_where_the_equilibrium_ceases_to_exist_raises(engine):
    net = make_bistable(engine)
    net.weights["R"][...] = 1  # at x = 0: z = tanh z, whose slope at its solution 0 is 1
    with pytest.raises(irnn.ConvergenceError, match="adjoint"):
        net.loss_and_gradient([[0.0]], [[1.0]], solver=irnn.Picard())


def test_diverging_sample_is_marked_as_diverged(engine):
    solution = make_neuron(engine, 2.0, "identity").equilibrium([[1.0]], solver=irnn.Picard(), on_failure="ignore")
    assert solution.status[0] == irnn.Status.DIVERGED
    assert np.isfinite(solution.state).all()


def test_sample_whose_state_overflows_is_never_marked_as_converged(engine):
    with np.errstate(all="ignore"):
        solution = make_neuron(engine, 0.5, "identity", 1e200).equilibrium([[1e200]], on_failure="ignore")
    assert solution.status[0] in (irnn.Status.NON_FINITE, irnn.Status.DIVERGED)


def test_parameters_that_are_not_numbers_are_not_returned_as_a_result_silently(net, X):
    net.weights["b"][0] = np.nan
    with np.errstate(all="ignore"), pytest.raises(irnn.ConvergenceError, match="12 non_finite"):
        net.predict(X)


@pytest.mark.parametrize(("name", "value"), [("C", np.nan), ("d", np.inf)])
def test_outputs_that_are_not_numbers_are_not_returned_silently_either(net, X, name, value):
    net.weights[name][...] = value
    with np.errstate(all="ignore"):
        with pytest.raises(
            irnn.ConvergenceError, match=r"12 of 12 samples have outputs with NaN.*net.parameters are finite"
        ):
            net.predict(X)
        assert not np.isfinite(net.predict(X, on_failure="ignore")).any()


@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "relu", "elu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_what_underflows_is_zero_where_the_caller_wants_errors_of_numpy(engine, activation, dtype):
    net = irnn.Network(3, [irnn.Layer(5, activation)], outputs=3, dtype=dtype, seed=0, engine=engine)
    rng, labels = np.random.default_rng(0), np.arange(6) % 3
    X, V = rng.standard_normal((6, 3)), rng.standard_normal((6, 3))
    with np.errstate(all="raise"):
        for size in (1e-300, 1e-42, 1.0, 1e4):
            assert np.isfinite(net.predict(size * X)).all()
            assert np.isfinite(net.vjp(size * X, V)[1]).all()
            assert np.isfinite(net.jvp(size * X, V)).all()
            assert np.isfinite(net.spectral_radius(size * X)).all()
            assert np.isfinite(net.loss_and_gradient(size * X, labels, loss="cross_entropy")[0])
        assert np.isfinite(net.recurrent_weights).all()
        for optimizer in ("adam", "lbfgs"):
            run = net.fit(X, labels, loss="cross_entropy", optimizer=optimizer, epochs=5, validation=(X, labels))
            assert np.isfinite(run.validation_loss).all()


def test_gradient_of_a_loss_that_overflows_says_where_to_look(engine, X):
    net = make_net(engine)
    net.weights["C"][...] = 1e20
    with (
        np.errstate(all="ignore"),
        pytest.raises(irnn.ConvergenceError, match=r"the derivative of the loss overflows.*Y, net"),
    ):
        net.loss_and_gradient(X, np.full((len(X), 2), 1e300))


@pytest.mark.parametrize("activation", ["relu", "softplus", "elu", "gelu", "silu", "identity"])
@pytest.mark.parametrize("solver", ["auto", "picard", "anderson", "newton", irnn.Picard(damping=0.5)])
def test_size_of_the_inputs_does_not_put_the_equilibrium_in_doubt(engine, activation, solver):
    net = irnn.Network(2, [irnn.Layer(5, activation)], outputs=1, seed=0, engine=engine)
    X = np.array([[1.0, -0.5]]) * 10.0 ** np.array([[6], [9], [30], [100]])
    solution = net.equilibrium(X, solver=solver, on_failure="ignore")
    assert solution.converged.all()
    R, u = net.recurrent_weights, X @ net.input_weights.T
    if activation in ("relu", "identity"):  # of which the equilibrium is known
        active = solution.state > 0 if activation == "relu" else np.ones_like(u, bool)
        exact = [np.linalg.solve(np.eye(5) - d[:, None] * R, d * v) for d, v in zip(active, u, strict=True)]
        np.testing.assert_allclose(solution.state / X[:, :1], exact / X[:, :1], atol=1e-7)


@pytest.mark.parametrize("damping", [0.2, 0.4])
def test_equilibrium_that_only_damping_reaches_is_found_and_marked_as_unstable(engine, damping):
    net, solver = make_oscillating(engine), irnn.Picard(damping=damping)
    solution = net.equilibrium([[0.5]], solver=solver, on_failure="ignore")
    z = solution.state[0, 0]
    assert z == pytest.approx(np.tanh(0.5 - 3 * z), abs=1e-9)
    assert solution.status[0] == irnn.Status.UNSTABLE


@pytest.mark.parametrize("solver", ["newton", "anderson"])
def test_what_attracts_is_told_by_the_spectral_radius_however_large_the_norm(engine, solver, rng):
    net = irnn.Network(3, [20], outputs=1, constraint=irnn.Free(), engine=engine, seed=0)
    X = rng.standard_normal((60, 3))
    for gain in (1.0, 2.0):
        net.weights["R"][...] = gain * rng.standard_normal((20, 20)) / 20**0.5
        solution = net.equilibrium(X, solver=solver, on_failure="ignore")
        found = np.isin(solution.status, (irnn.Status.CONVERGED, irnn.Status.UNSTABLE))
        jacobians = (1 - solution.state[found] ** 2)[..., None] * net.recurrent_weights
        attracts = np.abs(np.linalg.eigvals(jacobians)).max(axis=1) < 1
        np.testing.assert_array_equal(solution.status[found] == irnn.Status.CONVERGED, attracts)
        assert found.sum() > 10


# --- copies and texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copy_predicts_the_same_and_is_independent_and_has_what_its_owner_has_put_there(net, X, duplicate):
    expected = net.predict(X)
    net.mean_of_the_data = 3.0
    twin = duplicate(net)
    net.parameters[:] = 0
    np.testing.assert_array_equal(twin.predict(X), expected)
    assert twin.mean_of_the_data == 3.0
    assert all(np.shares_memory(weight, twin.parameters) for weight in twin.weights.values())


def test_topology_and_dtype_of_a_network_cannot_be_replaced(net, X):
    expected = net.predict(X)
    for name, value in (("topology", make_net("numpy", neurons=6).topology), ("dtype", np.dtype("float32"))):
        with pytest.raises(AttributeError, match=name):
            setattr(net, name, value)
    np.testing.assert_array_equal(net.predict(X), expected)


def test_network_keeps_its_engine_whatever_the_environment_says_later(X, Y, monkeypatch):
    monkeypatch.setenv("IMPLICIT_RNN_ENGINE", "numpy")
    net = make_net(None)
    net.predict(X)
    monkeypatch.setenv("IMPLICIT_RNN_ENGINE", "julia")
    assert net.fit(X, Y, epochs=1).engine == net.engine.name == "numpy"


def test_parameters_that_cannot_be_written_to_are_not_trained(net, X, Y):
    net.parameters.flags.writeable = False
    expected = net.parameters.copy()
    with pytest.raises(ValueError, match=r"cannot be written to; set net.parameters.flags.writeable = True"):
        net.fit(X, Y, epochs=1)
    np.testing.assert_array_equal(net.parameters, expected)
    net.predict(X)  # which only reads them


def test_repr_tells_the_structure():
    text = "Network(3 inputs, [5 tanh lateral], 2 outputs, Perron(kappa=0.95), 62 parameters, float64)"
    assert repr(make_net("numpy")) == text


def test_repr_tells_of_feedback_skips_and_chosen_neurons():
    layers = [4, irnn.Layer(3, "relu", lateral=False), 2]
    net = irnn.Network(2, layers, feedback=[(2, 0)], skips=[(0, 2)], input_skips=[2], outputs=[0, 3], constraint="free")
    assert repr(net) == (
        "Network(2 inputs, [4 tanh lateral, 3 relu, 2 tanh lateral], feedback 2->0, skips 0->2, input skips ->2, "
        "2 outputs (neurons 0, 3), Free(), 75 parameters, float64)"
    )


def test_repr_of_a_deep_network_stays_one_short_line():
    text = repr(irnn.Network(3, [5] * 20, feedback=True, outputs=2))
    assert "feedback 1->0, 2->0, 2->1, 3->0, 3->1, 3->2, 4->0, 4->1, and 182 more" in text
    assert "\n" not in text
    assert len(text) < 400


def test_notebook_shows_a_network_as_a_table():
    html = irnn.Network(2, [4, 3], feedback=True, outputs=1)._repr_html_()
    assert html.startswith("<table><caption>Network</caption>")
    assert "1-&gt;0" in html
    ElementTree.fromstring(html)  # well-formed


def test_summary_lists_every_block_and_the_total():
    lines = make_net("numpy").summary().splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["W", "R", "b", "a", "C", "d", "total"]
    assert lines[-1].split()[-1] == "62"


def test_repr_of_a_solution_counts_the_converged_samples(net, X):
    assert repr(net.equilibrium(X)).startswith("Solution(12 samples of 5 neurons, 12 converged")
