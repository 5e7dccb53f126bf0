"""Learning-rate schedules, as the history of a run and as the steps they scale."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_net

import implicit_rnn as irnn

E = 40


def rates(schedule: irnn.training.Schedule, epochs: int = E, batch_size: int | None = None) -> np.ndarray:
    """The learning rates of the first step of each epoch, of an optimiser whose own is 2."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((12, 3)), rng.standard_normal((12, 2))
    settings = {"optimizer": irnn.SGD(2.0), "epochs": epochs, "batch_size": batch_size, "clip": 1e-9}
    return make_net("numpy").fit(X, Y, schedule=schedule, **settings).learning_rate


def test_constant_rate_is_that_of_the_optimiser():
    np.testing.assert_array_equal(rates(irnn.Constant()), 2.0)


def test_cosine_starts_at_the_rate_is_half_way_in_the_middle_and_approaches_its_final_share():
    found = rates(irnn.Cosine(final=0.1))
    assert found[0] == 2.0
    assert found[E // 2] == pytest.approx(2 * 0.55)
    assert 0.2 < found[-1] < 0.21
    assert (np.diff(found) < 0).all()


def test_steps_divide_the_rate_every_so_many_epochs():
    found = rates(irnn.Step(every=15, factor=0.5), batch_size=5)
    np.testing.assert_allclose(found, [2.0] * 15 + [1.0] * 15 + [0.5] * 10)


def test_one_cycle_rises_to_the_rate_and_falls_to_almost_nothing():
    found = rates(irnn.OneCycle(rise=0.25, start=0.1, final=0.001))
    assert found[0] == pytest.approx(0.2)
    assert found.argmax() == 10
    assert found[10] == pytest.approx(2.0)
    assert found[-1] < 0.02
    assert (np.diff(found[:11]) > 0).all()
    assert (np.diff(found[10:]) < 0).all()


def test_warm_up_rises_in_equal_steps_and_leaves_the_rest_to_another():
    found = rates(irnn.WarmUp(4, irnn.Cosine()))
    np.testing.assert_allclose(found[:4], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(found[4:], rates(irnn.Cosine(), E - 4))


def test_rate_changes_from_step_to_step_within_an_epoch(engine, X, Y):
    """Two steps of SGD in a warm-up of one epoch: rates 1/2 and 1."""
    net, twin = make_net(engine), make_net(engine)
    net.fit(X, Y, optimizer=irnn.SGD(0.1), schedule=irnn.WarmUp(1), epochs=1, batch_size=6, seed=2)
    order = np.random.default_rng(2).permutation(12)
    for rate, part in ((0.05, order[:6]), (0.1, order[6:])):
        twin.parameters -= rate * twin.loss_and_gradient(X[part], Y[part])[1]
    np.testing.assert_allclose(net.parameters, twin.parameters, rtol=0, atol=1e-13)


@pytest.mark.parametrize("optimizer", [irnn.Momentum(0.05), irnn.Adam(0.02), irnn.RMSProp(0.01)], ids=lambda o: o.name)
@pytest.mark.julia
def test_engines_agree_on_a_run_with_changing_rates(optimizer, X, Y):
    nets = [make_net(engine) for engine in ("numpy", "julia")]
    for net in nets:
        net.fit(X, Y, optimizer=optimizer, schedule=irnn.WarmUp(3, irnn.Cosine()), epochs=30, batch_size=5)
    np.testing.assert_allclose(nets[0].parameters, nets[1].parameters, rtol=0, atol=1e-7)


def test_schedule_after_a_warm_up_may_be_named():
    assert irnn.WarmUp(3, "one_cycle") == irnn.WarmUp(3, irnn.OneCycle())
