"""Optimisers: steps against their formulas, weight decay, and L-BFGS against SciPy's."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import make_net
from scipy.optimize import minimize

import implicit_rnn as irnn

EVERY = [
    irnn.SGD(0.1),
    irnn.Momentum(0.05),
    irnn.Nesterov(0.05),
    irnn.Adam(0.02),
    irnn.AdamW(0.02),
    irnn.RMSProp(0.005),
    irnn.LBFGS(),
]


def names(optimizer) -> str:
    return optimizer.name


@pytest.mark.parametrize("optimizer", EVERY, ids=names)
def test_every_optimiser_learns(net, optimizer, X):
    run = net.fit(X, np.sin(X[:, :2]), optimizer=optimizer, epochs=100)
    assert run.loss[-1] < 0.3 * run.loss[0]


@pytest.mark.parametrize("optimizer", EVERY[:4] + EVERY[5:6], ids=names)
def test_weight_decay_adds_its_share_of_the_parameters_to_the_gradient(engine, optimizer, X, Y):
    """One step with decay is one step without along the longer gradient, which another loss has."""
    net = make_net(engine)
    decaying = type(optimizer)(optimizer.learning_rate, weight_decay=0.3)
    start = net.parameters.copy()
    gradient = net.loss_and_gradient(X, Y)[1]
    net.fit(X, Y, optimizer=decaying, epochs=1)
    np.testing.assert_allclose(
        start - net.parameters, first_step(optimizer, gradient + 0.3 * start), rtol=1e-10, atol=1e-14
    )


def first_step(optimizer, g):
    if isinstance(optimizer, irnn.Adam):
        return optimizer.learning_rate * g / (np.abs(g) + optimizer.epsilon)
    if isinstance(optimizer, irnn.RMSProp):
        return optimizer.learning_rate * g / (np.sqrt((1 - optimizer.decay) * g**2) + optimizer.epsilon)
    factor = 1 + optimizer.momentum if isinstance(optimizer, irnn.Nesterov) else 1
    return factor * optimizer.learning_rate * g


@pytest.mark.parametrize(("dtype", "large"), [("float32", 1e21), ("float64", 1e160)])
@pytest.mark.parametrize("optimizer", EVERY[3:6], ids=names)
def test_gradients_whose_squares_overflow_are_followed(optimizer, dtype, large):
    steps = []
    for size in (1.0, large):
        state = optimizer.start((1, 2), np.dtype(dtype))
        steps.append([optimizer.change(state, np.array([[size, -size]], dtype), 0.1) for _ in range(3)])
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-5)


def test_adamw_shrinks_the_parameters_beside_the_step_of_adam(engine, X, Y):
    net, adam = make_net(engine), make_net(engine)
    start = net.parameters.copy()
    net.fit(X, Y, optimizer=irnn.AdamW(0.02, weight_decay=0.3), epochs=1)
    adam.fit(X, Y, optimizer=irnn.Adam(0.02), epochs=1)
    np.testing.assert_allclose(net.parameters, adam.parameters - 0.02 * 0.3 * start, rtol=0, atol=1e-14)


def test_rmsprop_follows_its_formula(net, X, Y):
    p, v = net.parameters.copy(), 0.0
    twin = make_net(net.engine.name)
    net.fit(X, Y, optimizer=irnn.RMSProp(0.01, decay=0.8), epochs=5)
    for _ in range(5):
        twin.parameters = p
        g = twin.loss_and_gradient(X, Y)[1]
        v = 0.8 * v + 0.2 * g**2
        p = p - 0.01 * g / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(net.parameters, p, rtol=0, atol=1e-10)


# --- L-BFGS --------------------------------------------------------------------------------------------------


def test_lbfgs_lowers_the_loss_in_every_epoch_and_beats_adam_by_far(net, X):
    Y, adam = np.sin(X[:, :2]), make_net(net.engine.name)
    run = net.fit(X, Y, optimizer=irnn.LBFGS(), epochs=60)
    other = adam.fit(X, Y, optimizer=irnn.Adam(0.02), epochs=60)
    assert (np.diff(run.loss) <= 0).all()
    assert run.loss[-1] < 0.05 * other.loss[-1]
    assert np.isnan(run.learning_rate).all()


def test_lbfgs_finds_the_optimum_of_a_linear_model_that_linear_algebra_finds(engine, rng):
    X, Y = rng.standard_normal((30, 4)), rng.standard_normal((30, 1))
    net = irnn.Network(4, [irnn.Layer(1, "identity", lateral=False)], outputs=[0], seed=0, engine=engine)
    net.fit(X, Y, optimizer="lbfgs", epochs=40)
    exact = np.linalg.lstsq(np.column_stack([X, np.ones(30)]), Y, rcond=None)[0]
    found = np.concatenate([net.weights["W"].ravel(), net.weights["b"]])
    np.testing.assert_allclose(found, exact.ravel(), rtol=0, atol=1e-7)


def test_lbfgs_gets_as_far_as_that_of_scipy(net, X):
    Y, twin = np.sin(X[:, :2]), make_net(net.engine.name)

    def f(p):
        twin.parameters = p
        return twin.loss_and_gradient(X, Y)

    theirs = minimize(
        f, net.parameters.copy(), jac=True, method="L-BFGS-B", options={"maxiter": 30, "gtol": 0, "ftol": 0}
    )
    ours = net.fit(X, Y, optimizer="lbfgs", epochs=31).loss[-1]
    assert ours <= 3 * theirs.fun


def test_lbfgs_stays_at_an_optimum(net, X):
    Y = net.predict(X)
    before = net.parameters.copy()
    run = net.fit(X, Y, optimizer="lbfgs", epochs=5)
    assert run.loss[-1] < 1e-18
    np.testing.assert_allclose(net.parameters, before, rtol=0, atol=1e-6)


def test_lbfgs_trains_many_nets_each_as_if_alone(engine, X, Y):
    together = [make_net(engine, seed=seed) for seed in range(2)]
    irnn.fit_many(together, X, Y, optimizer="lbfgs", epochs=8)
    for seed, net in enumerate(together):
        alone = make_net(engine, seed=seed)
        alone.fit(X, Y, optimizer="lbfgs", epochs=8)
        np.testing.assert_array_equal(net.parameters, alone.parameters)


def test_lbfgs_in_threads_leaves_the_filters_of_warnings_as_they_were(engine, X, Y):
    def train(seed):
        make_net(engine, seed=seed).fit(X, Y, optimizer="lbfgs", epochs=60)

    before = [*warnings.filters]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(8)))
    assert warnings.filters == before


def test_lbfgs_trains_in_float32(engine, X):
    net = make_net(engine, dtype="float32")
    run = net.fit(X, np.sin(X[:, :2]), optimizer="lbfgs", epochs=40)
    assert run.loss[-1] < 0.05 * run.loss[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5}, "LBFGS needs all samples in every step, but batch_size is 5 of 12"),
        ({"clip": 1.0}, "clip"),
        ({"schedule": "cosine"}, "no learning rate"),
    ],
    ids=str,
)
def test_lbfgs_refuses_what_it_cannot_do(net, settings, message, X, Y):
    with pytest.raises(ValueError, match=message):
        net.fit(X, Y, optimizer="lbfgs", **settings)


@pytest.mark.parametrize("optimizer", [irnn.Adam(), irnn.AdamW(weight_decay=0.0)], ids=names)
def test_training_goes_on_where_squares_of_gradients_overflow(engine, optimizer):
    net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0, engine=engine)
    net.weights["C"][...] = 1e160
    before = net.weights["W"].copy()
    net.fit(
        [[1.0], [2.0]], [[0.0], [1.0]], loss="mae", optimizer=optimizer, epochs=2, guard=irnn.Guard(parameter_norm=None)
    )
    assert (np.abs(net.weights["W"] - before) > 1e-3).all()
