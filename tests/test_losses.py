"""Losses: their values against formulas written another way, their derivatives, the targets and weights they take."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, field

import numpy as np
import pytest
from conftest import derivative_along, make_net, make_oscillating
from scipy.special import expit, log_softmax, logsumexp
from test_gradients import EXACT, check_gradient

import implicit_rnn as irnn

LABELS = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0])
REGRESSION = [irnn.MSE(), irnn.MAE(), irnn.Huber(0.7)]
LOSSES = [*REGRESSION, irnn.CrossEntropy(), irnn.BinaryCrossEntropy()]


def names(loss: irnn.MSE) -> str:
    return loss.name


def targets_for(loss, Y):
    if loss == irnn.CrossEntropy():
        return LABELS
    return (Y > 0).astype(float) if loss == irnn.BinaryCrossEntropy() else Y


def smooth(loss, net, X, Y):
    """Targets from which no output is so near that finite differences would meet the kink of the absolute error."""
    T = targets_for(loss, Y)
    return T + 0.1 * np.sign(T - net.predict(X)) if loss == irnn.MAE() else T


def by_hand(loss, y, Y, w):
    """The loss of outputs y, written differently from both engines."""
    t = targets_for(loss, Y)
    if loss == irnn.CrossEntropy():
        per_sample = -np.take_along_axis(log_softmax(y, axis=1), t[:, None], 1)[:, 0]
    elif loss == irnn.BinaryCrossEntropy():
        per_sample = -(t * np.log(expit(y)) + (1 - t) * np.log(expit(-y))).mean(axis=1)
    elif loss == irnn.MSE():
        per_sample = ((y - t) ** 2).mean(axis=1)
    elif loss == irnn.MAE():
        per_sample = np.abs(y - t).mean(axis=1)
    else:
        δ, d = loss.delta, np.abs(y - t)
        per_sample = (np.minimum(d, δ) * (d - np.minimum(d, δ) / 2)).mean(axis=1)
    return np.average(per_sample, weights=w)


@pytest.fixture(params=[False, True], ids=["plain", "weighted"])
def weights(request, rng):
    return rng.uniform(0, 3, 12) if request.param else None


@pytest.mark.parametrize("loss", LOSSES, ids=names)
class TestEveryLoss:
    def test_value_is_that_of_its_formula(self, net, loss, weights, X, Y):
        value, _ = net.loss_and_gradient(X, targets_for(loss, Y), loss=loss, sample_weights=weights)
        assert value == pytest.approx(by_hand(loss, net.predict(X), Y, weights), rel=1e-9)

    def test_gradient_is_that_of_differences(self, net, loss, weights, X, Y):
        check_gradient(net, X, smooth(loss, net, X, Y), 1e-3, loss=loss, sample_weights=weights)

    @pytest.mark.julia
    def test_hessian_times_vector_is_the_difference_of_gradients(self, loss, weights, rng, X, Y):
        net = make_net("julia")
        T = smooth(loss, net, X, Y)
        v = rng.standard_normal(len(net.parameters))
        settings = {"loss": loss, "sample_weights": weights, "solver": EXACT}
        difference = derivative_along(net, v, lambda step: net.loss_and_gradient(X, T, **settings)[1], 1e-3)
        product = net.hessian_vector_product(X, T, v, **settings)
        assert np.linalg.norm(product - difference) <= 1e-8 * np.linalg.norm(difference)

    @pytest.mark.julia
    def test_engines_agree_to_1e_12(self, loss, weights, X, Y):
        T = targets_for(loss, Y)
        answers = [
            make_net(e).loss_and_gradient(X, T, loss=loss, sample_weights=weights, solver=EXACT)
            for e in ("numpy", "julia")
        ]
        assert answers[0][0] == pytest.approx(answers[1][0], rel=1e-12)
        np.testing.assert_allclose(answers[1][1], answers[0][1], rtol=0, atol=1e-12)

    def test_training_lowers_it_and_validation_takes_the_same_loss(self, net, loss, X, Y):
        T = targets_for(loss, Y)
        run = net.fit(X, T, loss=loss, optimizer=irnn.Adam(0.02), epochs=40, validation=(X, T))
        assert run.loss[-1] < 0.9 * run.loss[0]
        assert run.validation_loss[-1] == pytest.approx(net.loss_and_gradient(X, T, loss=loss)[0], rel=1e-9)

    def test_training_in_float32_follows_float64(self, engine, loss, X, Y):
        runs = [
            make_net(engine, dtype=d).fit(X, targets_for(loss, Y), loss=loss, epochs=5) for d in ("float32", "float64")
        ]
        np.testing.assert_allclose(runs[0].loss, runs[1].loss, rtol=1e-3)


def test_huber_is_half_the_squared_error_near_and_linear_far(net, X, Y):
    near = net.loss_and_gradient(X, Y, loss=irnn.Huber(1e6))[0]
    assert near == pytest.approx(net.loss_and_gradient(X, Y)[0] / 2, rel=1e-12)
    far = net.loss_and_gradient(X, Y, loss=irnn.Huber(1e-9))[0] / 1e-9
    assert far == pytest.approx(net.loss_and_gradient(X, Y, loss="mae")[0], rel=1e-6)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("delta", "size"), [(1.0, 1e200), (1e200, 1.0)])
def test_huber_of_distances_far_from_delta_does_not_overflow(delta, size):
    expected = delta * size - delta**2 / 2 if delta < size else size**2 / 2
    (value,), slope = irnn.Huber(delta).values_and_derivatives(np.array([[size]]), np.zeros((1, 1)))
    assert (value, slope) == (pytest.approx(expected), min(delta, size))


@pytest.mark.parametrize("size", [1e3, -1e3, 1e5])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cross_entropies_of_huge_logits_are_exact_and_finite(engine, size, dtype, X):
    net = make_net(engine, dtype=dtype)
    net.weights["C"][...] = 0
    net.weights["d"][...] = size, 0
    value, gradient = net.loss_and_gradient(X, np.zeros(12, int), loss="cross_entropy")
    assert value == pytest.approx(logsumexp([size, 0]) - size, rel=1e-6)
    assert np.isfinite(gradient).all()
    value, gradient = net.loss_and_gradient(X, np.zeros((12, 2)), loss="binary_cross_entropy")
    assert value == pytest.approx((max(size, 0) + np.log(2)) / 2, rel=1e-6)
    assert np.isfinite(gradient).all()


# --- targets -------------------------------------------------------------------------------------------------


def test_labels_and_their_one_hot_vectors_are_the_same_targets(net, X):
    values = [
        net.loss_and_gradient(X, T, loss="cross_entropy")[0] for T in (LABELS, LABELS[:, None], np.eye(2)[LABELS])
    ]
    assert values[0] == values[1] == values[2]


def test_labels_take_the_memory_of_their_samples_however_many_classes_there_are():
    tracemalloc.start()
    targets = irnn.CrossEntropy().targets("Y", [0, 4999], samples=2, outputs=5000, dtype=np.dtype("float64"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(np.nonzero(targets), [[0, 1], [0, 4999]])
    assert peak < 10 * targets.nbytes


@pytest.mark.parametrize("kind", [bool, int, np.int8, np.uint64, float])
def test_binary_labels_may_be_of_any_kind(engine, kind, X):
    net = make_net(engine, outputs=1)
    value = net.loss_and_gradient(X, LABELS[:, None].astype(kind), loss="binary_cross_entropy")[0]
    assert value == net.loss_and_gradient(X, LABELS[:, None].astype(float), loss="binary_cross_entropy")[0]


class NoArray:
    """As a tensor of PyTorch that requires a gradient."""

    def __array__(self, *how, **more):
        raise RuntimeError("it requires grad")


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (LABELS + 1, ValueError, "labels from 1 to 2; with 2 outputs they must lie from 0 to 1"),
        (LABELS - 1, ValueError, "labels from -1 to 0"),
        (np.full(12, 10**30), ValueError, f"labels from {10**30} to {10**30}"),
        (LABELS.astype(float), TypeError, r"whole numbers from 0: pass Y\.astype\(int\)"),
        (np.where(LABELS, np.nan, 0), ValueError, "Y has NaN or infinity in"),
        (LABELS[:5], ValueError, "Y has 5 samples, X has 12"),
        (np.full((12, 2), 0.6), ValueError, "sum to 1"),
        (np.tile([1.5, -0.5], (12, 1)), ValueError, "smallest value is -0.5"),
        (np.zeros((12, 3)), ValueError, r"expected \(samples, 2\)"),
        ([[0], [0, 1]], ValueError, "Y is not an array of numbers: setting an array element"),
        (NoArray(), TypeError, "Y is not an array of numbers: it requires grad"),
        ({"a": 1}, TypeError, "Y is a dict; expected numbers"),
        (["a", "b"] * 6, TypeError, r"Y has dtype <U1; class labels .* np\.unique\(Y"),
        (np.array(["a", 1] * 6, object), TypeError, "Y has dtype object; class labels must be whole numbers"),
    ],
)
def test_targets_that_are_no_classes_are_refused(net, targets, error, message, X):
    with pytest.raises(error, match=message):
        net.loss_and_gradient(X, targets, loss="cross_entropy")


def test_cross_entropy_of_one_output_is_refused(engine, X):
    with pytest.raises(ValueError, match="use BinaryCrossEntropy"):
        make_net(engine, outputs=1).loss_and_gradient(X, LABELS, loss="cross_entropy")


def test_binary_targets_outside_of_0_to_1_are_refused(net, X, Y):
    with pytest.raises(ValueError, match="binary cross-entropy expects labels 0 and 1"):
        net.loss_and_gradient(X, Y, loss="binary_cross_entropy")


# --- of one's own --------------------------------------------------------------------------------------------


def squared(y, t):
    """The mean squared error, by hand."""
    d = y - t
    return (d**2).mean(axis=1), 2 * d / y.shape[1]


def log_loss(y, labels):
    """The cross-entropy, by hand, of labels as they were given."""
    assert labels.dtype == LABELS.dtype
    log_p = log_softmax(y, axis=1)
    rows = np.arange(len(y))
    derivatives = np.exp(log_p)
    derivatives[rows, labels] -= 1
    return -log_p[rows, labels], derivatives


@pytest.mark.parametrize(
    ("own", "known"), [(squared, irnn.MSE()), (log_loss, irnn.CrossEntropy())], ids=["squared", "log"]
)
class TestLossOfOnesOwn:
    def test_has_the_value_and_the_gradient_of_its_formula(self, net, own, known, weights, X, Y):
        T = targets_for(known, Y)
        answers = [
            net.loss_and_gradient(X, T, loss=loss, sample_weights=weights, solver=EXACT, jacobian_penalty=0.3, probe=2)
            for loss in (irnn.CustomLoss(own), known)
        ]
        assert answers[0][0] == pytest.approx(answers[1][0], rel=1e-12)
        np.testing.assert_allclose(answers[0][1], answers[1][1], rtol=0, atol=1e-11)

    @pytest.mark.parametrize("settings", [{"batch_size": 5}, {"optimizer": "lbfgs"}, {"adjoint": "unrolled"}], ids=str)
    def test_trains_like_a_loss_of_the_package(self, engine, own, known, settings, weights, X, Y):
        T = targets_for(known, Y)
        nets = [make_net(engine, seed=3) for _ in range(2)]
        runs = [
            net.fit(X, T, loss=loss, sample_weights=weights, epochs=5, validation=(X, T), **settings)
            for net, loss in zip(nets, (irnn.CustomLoss(own), known), strict=True)
        ]
        np.testing.assert_allclose(runs[0].loss, runs[1].loss, rtol=1e-8)
        np.testing.assert_allclose(runs[0].validation_loss, runs[1].validation_loss, rtol=1e-8)
        np.testing.assert_allclose(nets[0].parameters, nets[1].parameters, rtol=0, atol=1e-7)

    def test_trains_many_nets_side_by_side(self, engine, own, known, X, Y):
        T = targets_for(known, Y)
        groups = [[make_net(engine, seed=s) for s in range(3)] for _ in range(2)]
        for group, loss in zip(groups, (irnn.CustomLoss(own), known), strict=True):
            irnn.fit_many(group, X, T, loss=loss, epochs=5, clip=0.1)
        for ours, theirs in zip(*groups, strict=True):
            np.testing.assert_allclose(ours.parameters, theirs.parameters, rtol=0, atol=1e-9)


def test_loss_of_ones_own_takes_targets_of_any_shape(net, X):
    """Such as a time and whether it was seen to end, for an exponential distribution of log rate y."""

    def survival(y, t):
        hazard = np.exp(y[:, 0]) * t[:, 0]
        events = t[:, 1]
        return hazard - events * y[:, 0], np.stack([hazard - events, 0 * hazard], axis=1)

    T = np.stack([np.linspace(0.1, 2, 12), np.arange(12) % 2], axis=1)
    run = net.fit(X, T, loss=irnn.CustomLoss(survival), optimizer=irnn.Adam(0.02), epochs=30, batch_size=4)
    assert run.loss[-1] < run.loss[0]


def test_unconverged_samples_are_told_with_a_loss_of_ones_own(engine):
    net, X = make_oscillating(engine), np.array([[0.1], [5.0]])
    report, solver = irnn.GradientReport.empty(2), irnn.Picard(max_iterations=50)
    settings = {"loss": irnn.CustomLoss(squared), "solver": solver}
    with pytest.raises(irnn.ConvergenceError, match="1 of 2 samples"):
        net.loss_and_gradient(X, X, **settings)
    net.loss_and_gradient(X, X, **settings, report=report, on_failure="ignore")
    assert report.status.tolist() == [irnn.Status.MAX_ITERATIONS, irnn.Status.CONVERGED]
    assert net.fit(X, X, **settings, epochs=2, on_failure="ignore").unconverged.tolist() == [1, 1]


@pytest.mark.parametrize("size", [1.0, 1e6, 1e200])
def test_derivatives_of_the_wrong_sign_are_refused_whatever_the_size_of_outputs(size):
    wrong = irnn.CustomLoss(lambda y, t: (np.abs(y - t).sum(axis=1), np.sign(t - y)))
    with pytest.raises(ValueError, match=r"derivatives .* are not those of its values"):
        wrong.values_and_derivatives(size * np.ones((4, 2)), np.zeros((4, 2)))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda y, t: (((y - t) ** 2).mean(), 2 * (y - t)), ValueError, r"values of shape \(\); expected \(12,\)"),
        (lambda y, t: ((y - t) ** 2, 2 * (y - t)), ValueError, r"values of shape \(12, 2\); expected \(12,\)"),
        (lambda y, t: ((y - t).sum(axis=1), y[:, 0]), ValueError, r"derivatives of shape \(12,\); expected \(12, 2\)"),
        (lambda y, t: ((y - t) ** 2).sum(axis=1), TypeError, r"returned ndarray; expected \(values, derivatives\)"),
        (lambda y, t: (["a"] * len(y), y), TypeError, "expected real numbers"),
        (lambda y, t: (((y - t) ** 2).sum(axis=1), y - t), ValueError, "derivatives .* are not those of its values"),
        (lambda y, t: (((y - t) ** 2).sum(axis=1), 2 * (y - t) / len(y)), ValueError, "not divided by the number of"),
    ],
    ids=["mean", "per output", "one column", "no derivatives", "text", "half", "mean of derivatives"],
)
def test_function_that_returns_something_else_is_refused(net, function, error, message, X, Y):
    for call in (net.loss_and_gradient, net.fit):
        with pytest.raises(error, match=message):
            call(X, Y, loss=irnn.CustomLoss(function))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_kinks_and_single_precision_pass_for_derivatives(net, kind, X):
    def absolute(y, t):
        d = (y - t).astype(kind)
        return np.abs(d).sum(axis=1), np.sign(d)

    at_the_kink = net.predict(X)
    value, _ = net.loss_and_gradient(X, at_the_kink, loss=irnn.CustomLoss(absolute))
    assert value == pytest.approx(0, abs=1e-6)


@dataclass
class Weighted:
    """A function that is an object without a hash, and that another may be equal to."""

    weight: object
    calls: int = field(default=0, compare=False)

    def __call__(self, y, t):
        self.calls += 1
        values, derivatives = squared(y, t)
        return np.mean(self.weight) * values, np.mean(self.weight) * derivatives


def test_function_may_be_an_object_without_a_hash(net, X, Y):
    half, double = (net.loss_and_gradient(X, Y, loss=irnn.CustomLoss(Weighted(w)))[0] for w in (0.5, 2))
    assert double == pytest.approx(4 * half)


def test_function_may_be_an_object_that_holds_an_array(net, X, Y):
    once, again = (net.loss_and_gradient(X, Y, loss=irnn.CustomLoss(Weighted(np.ones(2))))[0] for _ in range(2))
    assert once == again


def test_function_is_called_and_not_another_that_is_equal_to_it(net, X, Y):
    mine, yours = Weighted(1.0), Weighted(1.0)
    for each in (mine, yours):
        net.loss_and_gradient(X, Y, loss=irnn.CustomLoss(each))
    assert min(mine.calls, yours.calls) > 0


def test_loss_is_equal_to_one_of_the_same_function_or_method():
    weighted = Weighted(1.0)
    assert irnn.CustomLoss(weighted) == irnn.CustomLoss(weighted) != irnn.CustomLoss(Weighted(1.0))
    assert len({irnn.CustomLoss(weighted.__call__), irnn.CustomLoss(weighted.__call__)}) == 1


def test_function_may_not_change_the_outputs_it_is_given(net, X, Y):
    def careless(y, t):
        y -= t
        return (y**2).mean(axis=1), 2 * y / y.shape[1]

    expected = net.loss_and_gradient(X, Y)[1]
    np.testing.assert_allclose(net.loss_and_gradient(X, Y, loss=irnn.CustomLoss(careless))[1], expected, atol=1e-11)


def test_function_may_not_change_the_targets_it_is_given(engine, X, Y):
    def careless(y, t):
        t -= y
        return (t**2).mean(axis=1), -2 * t / t.shape[1]

    nets, targets = (make_net(engine), make_net(engine)), Y.copy()
    nets[0].fit(X, targets, epochs=3, loss=irnn.CustomLoss(careless), validation=(X, targets))
    nets[1].fit(X, Y, epochs=3)
    np.testing.assert_array_equal(targets, Y)
    np.testing.assert_allclose(nets[0].parameters, nets[1].parameters, atol=1e-11)


def test_targets_that_are_none_are_refused_for_a_loss_of_ones_own(net, X, Y):
    with pytest.raises(ValueError, match="Y has 11 samples, X has 12"):
        net.fit(X, Y[:11], loss=irnn.CustomLoss(squared))
    with pytest.raises(ValueError, match="Y has NaN or infinity"):
        net.fit(X, np.full((12, 2), np.nan), loss=irnn.CustomLoss(squared))


def test_loss_of_ones_own_needs_its_function(net, X, Y):
    with pytest.raises(TypeError, match="function must take outputs and targets, got 3"):
        irnn.CustomLoss(3)
    with pytest.raises(TypeError, match=r"pass an object: CustomLoss\(function\)"):
        net.fit(X, Y, loss=irnn.CustomLoss)
    with pytest.raises(ValueError, match="loss is 'customloss'; expected one of MSE, MAE, Huber"):
        net.fit(X, Y, loss="customloss")


def test_run_with_a_loss_of_ones_own_goes_on_from_its_checkpoint(engine, tmp_path, X, Y):
    path, settings = tmp_path / "run", {"loss": irnn.CustomLoss(squared), "batch_size": 5}
    whole, parts = make_net(engine), make_net(engine)
    whole.fit(X, Y, epochs=6, **settings)
    parts.fit(X, Y, epochs=3, checkpoint=path, **settings)
    parts.fit(X, Y, epochs=6, resume=path, **settings)
    np.testing.assert_array_equal(parts.parameters, whole.parameters)
    with pytest.raises(irnn.CheckpointError, match="loss is CustomLoss there and MSE here"):
        parts.fit(X, Y, epochs=6, resume=path, batch_size=5)


@pytest.mark.julia
def test_hessian_of_a_loss_of_ones_own_is_refused_by_name(X, Y):
    net = make_net("julia")
    with pytest.raises(irnn.EngineError, match=r"CustomLoss\(test_losses.squared\) has no second derivatives"):
        net.hessian_vector_product(X, Y, net.parameters, loss=irnn.CustomLoss(squared))


# --- weights of samples --------------------------------------------------------------------------------------


def test_only_the_proportions_of_weights_count(net, rng, X, Y):
    w = rng.uniform(1, 2, 12)
    value, gradient = net.loss_and_gradient(X, Y, sample_weights=w)
    other, other_gradient = net.loss_and_gradient(X, Y, sample_weights=5e307 * w)  # whose sum overflows
    assert value == pytest.approx(other, rel=1e-12)
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-10)


def test_sample_of_weight_zero_might_as_well_be_missing(net, X, Y):
    w = np.ones(12)
    w[[2, 7]] = 0
    kept = w > 0
    value, gradient = net.loss_and_gradient(X, Y, sample_weights=w)
    other, other_gradient = net.loss_and_gradient(X[kept], Y[kept])
    assert value == pytest.approx(other, rel=1e-12)
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-10, atol=1e-14)


def test_epoch_of_weighted_minibatches_has_the_weighted_loss_of_all_samples(net, rng, X, Y):
    w = rng.uniform(0, 3, 12)
    expected = net.loss_and_gradient(X, Y, sample_weights=w)[0]
    run = net.fit(X, Y, sample_weights=w, optimizer=irnn.SGD(1e-300), epochs=2, batch_size=5)
    np.testing.assert_allclose(run.loss, expected, rtol=1e-12)


def test_validation_may_have_weights_of_its_own(net, rng, X, Y):
    w = rng.uniform(0, 3, 12)
    run = net.fit(X, Y, epochs=2, validation=(X, Y, w))
    assert run.validation_loss[-1] == pytest.approx(net.loss_and_gradient(X, Y, sample_weights=w)[0], rel=1e-9)


@pytest.mark.parametrize("w", [np.ones(11), np.ones((12, 1)), -np.ones(12), np.zeros(12), np.full(12, np.nan)])
def test_weights_that_are_none_are_refused(net, w, X, Y):
    with pytest.raises(ValueError, match="sample_weights"):
        net.fit(X, Y, sample_weights=w)
