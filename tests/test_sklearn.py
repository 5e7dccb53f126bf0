"""The estimators for scikit-learn."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import implicit_rnn as irnn

pytest.importorskip("sklearn", "1.6", reason="needs scikit-learn 1.6 or newer")

from joblib import Parallel, delayed, parallel_config
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import load_iris, load_linnerud, make_friedman1, make_moons
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.estimator_checks import check_estimator

from implicit_rnn.sklearn import ImplicitRNNClassifier, ImplicitRNNRegressor
from implicit_rnn.training.loop import Training

BOTH = pytest.mark.parametrize("kind", [ImplicitRNNRegressor, ImplicitRNNClassifier])


@pytest.fixture(params=[ImplicitRNNRegressor, ImplicitRNNClassifier])
def estimator(request, engine):
    return request.param((4,), epochs=5, random_state=0, engine=engine)


@pytest.fixture
def regressor(engine):
    return ImplicitRNNRegressor((6,), epochs=60, learning_rate=0.03, random_state=0, engine=engine)


@pytest.fixture
def classifier(engine):
    return ImplicitRNNClassifier((6,), epochs=60, learning_rate=0.03, random_state=0, engine=engine)


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True)
    return X, load_iris().target_names[y]


@pytest.fixture(scope="module")
def friedman():
    return make_friedman1(120, noise=0.5, random_state=0)


@pytest.fixture
def data(estimator, friedman):
    """Samples and targets that both kinds of estimator take."""
    X, y = friedman
    return X, (y > 14).astype(int)


# --- the contract of scikit-learn ----------------------------------------------------------------------------


@BOTH
def test_every_check_of_scikit_learn_passes(kind, engine):
    settings = {"layers": (3,), "epochs": 20, "learning_rate": 0.1, "engine": engine}
    results = check_estimator(kind(**settings), on_skip=None, on_fail=None)
    others = {result["check_name"]: result["exception"] for result in results if result["status"] != "passed"}
    others.pop("check_array_api_input", None)  # of scikit-learn 1.9, skipped where SciPy's array API is off
    assert {name: error for name, error in others.items() if "pandas is not installed" not in str(error)} == {}
    assert len(results) > 50


def test_a_search_over_parameters_in_threads_and_in_processes_gives_the_same(estimator, data):
    search = GridSearchCV(
        estimator, {"layers": [(3,), (irnn.Layer(4, "relu"),)], "constraint": ["perron", "free"]}, cv=2
    )
    scores = []
    for backend, jobs in (("loky", 1), ("threading", 2), ("loky", 2)):
        with parallel_config(backend=backend):
            scores.append(clone(search).set_params(n_jobs=jobs).fit(*data).cv_results_["mean_test_score"])
    assert_array_equal(scores[1], scores[0])
    assert_array_equal(scores[2], scores[0])


def test_data_in_memory_that_cannot_be_written_is_read_only(estimator, data):
    X, y = data
    expected = estimator.fit(X, y).predict(X)
    fitted = Parallel(n_jobs=2, max_nbytes=1)(delayed(clone(estimator).fit)(X, y) for _ in range(2))
    predicted = Parallel(n_jobs=2, max_nbytes=1)(delayed(one.predict)(X) for one in fitted)
    assert_array_equal(predicted, [expected, expected])


def test_a_pickled_estimator_predicts_and_goes_on_as_the_original(estimator, data):
    estimator.fit(*data)
    copy = pickle.loads(pickle.dumps(estimator))
    assert_array_equal(copy.predict(data[0]), estimator.predict(data[0]))
    assert_array_equal(copy.partial_fit(*data).loss_curve_, estimator.partial_fit(*data).loss_curve_)


def test_in_a_pipeline_the_names_of_the_columns_arrive(classifier, iris):
    pandas = pytest.importorskip("pandas")
    X = pandas.DataFrame(iris[0], columns=["a", "b", "c", "d"])
    pipeline = make_pipeline(StandardScaler(), classifier).set_output(transform="pandas").fit(X, iris[1])
    assert_array_equal(pipeline[-1].feature_names_in_, ["a", "b", "c", "d"])
    assert pipeline.score(X, iris[1]) > 0.9


def test_nullable_columns_are_numbers(estimator, data):
    pandas = pytest.importorskip("pandas")
    X, y = np.round(10 * data[0]), data[1]
    expected = clone(estimator).fit(X, y).predict(X)
    table = pandas.DataFrame(X).astype("Int64")
    assert_array_equal(estimator.fit(table, pandas.Series(y, dtype="Int64")).predict(table), expected)
    table.iloc[0, 0] = pandas.NA
    with pytest.raises(ValueError, match="NaN"):
        estimator.predict(table)


# --- targets -------------------------------------------------------------------------------------------------


def test_it_learns_a_function(regressor, friedman):
    assert cross_val_score(regressor, *friedman, cv=3).mean() > 0.5


def test_predictions_have_the_shape_of_the_targets(regressor):
    X, Y = load_linnerud(return_X_y=True)
    assert regressor.fit(X, Y).predict(X).shape == Y.shape
    assert regressor.fit(X, Y[:, :1]).predict(X).shape == (20, 1)
    assert regressor.fit(X, Y[:, 0]).predict(X).shape == (20,)


@pytest.mark.parametrize("dtype", [bool, "uint8", "float16", object, str])
def test_targets_may_be_numbers_of_any_kind(regressor, friedman, dtype):
    X, y = friedman
    y = (y > 14).astype(float)
    regressor.set_params(epochs=2)
    expected = clone(regressor).fit(X, y).predict(X)
    assert_allclose(regressor.fit(X, y.astype(dtype)).predict(X), expected, rtol=1e-9)


@BOTH
def test_the_unit_of_the_features_and_targets_does_not_matter(kind, friedman):
    X, y = friedman
    y, unit = (y, 1e-3) if kind is ImplicitRNNRegressor else ((y > 14).astype(int), 1)
    estimator = kind((4,), epochs=5, random_state=0, engine="numpy")
    expected = clone(estimator).fit(X, y).predict(X)
    predicted = estimator.fit(1e6 * X - 5e6, unit * y).predict(1e6 * X - 5e6)
    assert_allclose(predicted / unit, expected, rtol=1e-6)


def test_a_network_of_single_precision_predicts_targets_far_from_zero_to_their_digits(regressor, friedman):
    X, y = friedman
    expected = clone(regressor).set_params(dtype="float32").fit(X, y).predict(X)
    assert_allclose(regressor.set_params(dtype="float32").fit(X, y + 1e9).predict(X) - 1e9, expected, atol=1e-3)


def test_without_scaling_the_network_sees_the_numbers_as_they_are(friedman):
    X, y = friedman
    regressor = ImplicitRNNRegressor((4,), epochs=5, scale=False, random_state=0, engine="numpy").fit(X, y)
    assert_array_equal(regressor.predict(X), regressor.network_.predict(X)[:, 0])
    with pytest.warns(irnn.errors.ScaleWarning, match="column 0 of X has mean"):
        regressor.fit(X + 1000, y)


def test_labels_are_those_that_were_given(classifier, iris):
    X, y = iris
    classifier.fit(X, y)
    assert_array_equal(classifier.classes_, ["setosa", "versicolor", "virginica"])
    assert classifier.score(X, y) > 0.9
    assert_array_equal(classifier.classes_[classifier.predict_proba(X).argmax(axis=1)], classifier.predict(X))


def test_the_logits_of_one_two_and_three_classes(classifier, iris):
    X, y = iris
    three = classifier.fit(X, y)
    assert three.decision_function(X).shape == (150, 3)
    assert_allclose(np.log(three.predict_proba(X)), three.predict_log_proba(X), rtol=1e-9)
    two = classifier.fit(X[:100], y[:100])
    logits = two.decision_function(X)
    assert logits.shape == (150,)
    assert_array_equal(two.predict(X) == "versicolor", logits > 0)
    assert_allclose(two.predict_proba(X)[:, 1], 1 / (1 + np.exp(-logits)), rtol=1e-12)
    assert_allclose(np.log(two.predict_proba(X)), two.predict_log_proba(X), rtol=1e-9)
    with pytest.raises(ValueError, match=r"y has 1 class, 'setosa'; expected 2 or more classes"):
        classifier.fit(X[:50], y[:50])
    with pytest.raises(ValueError, match=r"y has 1 class, 'setosa', where weights are above zero; expected 2 or more"):
        classifier.fit(X, y, sample_weight=y == "setosa")
    with pytest.raises(ValueError, match="classes has 1 class, 'setosa'; expected all there can be, 2 or more"):
        clone(classifier).partial_fit(X[:50], y[:50], classes=["setosa"])


# --- weights -------------------------------------------------------------------------------------------------


def test_a_weight_of_two_is_a_sample_that_is_there_twice(estimator, data):
    X, y = data
    weights = np.arange(len(X)) % 3
    weighted = clone(estimator).fit(X, y, sample_weight=weights)
    repeated = estimator.fit(np.repeat(X, weights, axis=0), np.repeat(y, weights))
    assert_allclose(weighted.predict(X), repeated.predict(X), rtol=1e-6)


def test_a_sample_without_weight_does_not_count_in_minibatches_and_validation_either(estimator, data):
    X, y = data
    estimator.set_params(batch_size=10, early_stopping=True)
    weights = (np.arange(len(X)) % 4 > 0).astype(float)
    weighted = clone(estimator).fit(X, y, sample_weight=weights)
    without = estimator.fit(X[weights > 0], y[weights > 0])
    assert_allclose(weighted.validation_loss_curve_, without.validation_loss_curve_, rtol=1e-6)
    with pytest.raises(ValueError, match="zero"):
        estimator.fit(X, y, sample_weight=0 * weights)


def test_weights_of_partial_fit_count_beside_those_of_the_same_call(classifier, data):
    X, y = data[0], np.arange(len(data[0])) % 2
    heavy, light = (
        clone(classifier)
        .partial_fit(X[:9], y[:9], classes=[0, 1])
        .partial_fit(X[9:], y[9:], sample_weight=np.full(len(X) - 9, weight))
        for weight in (7.0, 1.0)
    )
    assert_allclose(heavy.predict_proba(X), light.predict_proba(X), rtol=1e-12)


@pytest.mark.parametrize("unit", [2.0**-1073, 2.0**-600, 2.0**600, 2.0**1022])
def test_the_unit_of_weights_does_not_matter(estimator, data, unit):
    X, y = data
    weights = np.arange(len(X)) % 2 + 1.0
    small, large = (clone(estimator).fit(X, y, sample_weight=scale * weights) for scale in (1.0, unit))
    assert_array_equal(large.predict(X), small.predict(X))


@pytest.mark.parametrize("unit", [1e-320, 1e307])
def test_the_unit_of_weights_does_not_matter_beside_balanced_classes(classifier, iris, unit):
    classifier.set_params(class_weight="balanced")
    heavy, light = (clone(classifier).fit(*iris, sample_weight=np.full(150, weight)) for weight in (unit, 1.0))
    assert_allclose(heavy.loss_curve_, light.loss_curve_, rtol=1e-6)


def test_balanced_classes_weigh_the_same(classifier, iris):
    X, y = iris[0][:120], iris[1][:120]
    balanced = clone(classifier).set_params(class_weight="balanced").fit(X, y)
    weighted = classifier.fit(X, y, sample_weight=compute_sample_weight("balanced", y))
    assert_array_equal(balanced.loss_curve_, weighted.loss_curve_)


def test_a_sample_that_is_there_twice_counts_twice_in_the_balance_of_classes(classifier, iris):
    X, y = iris
    weights = np.arange(len(X)) % 3
    classifier.set_params(class_weight="balanced", batch_size=len(X))
    weighted = clone(classifier).fit(X, y, sample_weight=weights)
    repeated = classifier.fit(np.repeat(X, weights, axis=0), np.repeat(y, weights))
    assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), rtol=1e-6)


def test_classes_are_balanced_where_one_has_no_weight(classifier, iris):
    X, y = iris
    classifier.set_params(class_weight="balanced").fit(X, y, sample_weight=y != "setosa")
    assert np.isfinite(classifier.predict_proba(X)).all()


def test_a_class_of_weight_may_be_missing_from_a_piece_of_a_stream(classifier, iris):
    X, y = iris
    classifier.set_params(class_weight={"setosa": 3.0}).partial_fit(X, y, classes=np.unique(y))
    assert classifier.partial_fit(X[y != "setosa"], y[y != "setosa"]).n_iter_ == 2


# --- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_state", [3, "RandomState(3)", None])
def test_the_same_random_state_gives_the_same_result(estimator, data, random_state):
    def predictions():
        state = np.random.RandomState(3) if isinstance(random_state, str) else random_state
        np.random.seed(5)  # the generator that None stands for in scikit-learn
        return clone(estimator).set_params(random_state=state, batch_size=20).fit(*data).loss_curve_

    assert_array_equal(predictions(), predictions())


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "lbfgs"])
def test_a_warm_start_goes_on_where_the_last_training_ended(estimator, data, optimizer):
    estimator.set_params(optimizer=optimizer)
    whole = clone(estimator).set_params(epochs=10).fit(*data)
    halves = estimator.set_params(warm_start=True, epochs=5).fit(*data).fit(*data)
    assert halves.n_iter_ == 10
    assert_array_equal(halves.loss_curve_, whole.loss_curve_)
    assert_array_equal(halves.predict(data[0]), whole.predict(data[0]))


def test_without_a_warm_start_a_second_training_begins_anew(estimator, data):
    first = list(estimator.fit(*data).loss_curve_)
    assert estimator.fit(*data).loss_curve_ == first


def test_calls_of_partial_fit_are_epochs_of_fit(estimator, data):
    X, y = data
    piecewise = clone(estimator)
    for _ in range(5):
        piecewise.partial_fit(X, y, **({"classes": [0, 1]} if isinstance(piecewise, ImplicitRNNClassifier) else {}))
    assert_array_equal(piecewise.loss_curve_, estimator.fit(X, y).loss_curve_)
    assert piecewise.n_iter_ == 5


def test_a_stream_of_minibatches_is_learnt(classifier):
    X, y = make_moons(400, noise=0.1, random_state=0)
    for _ in range(20):
        for first in range(0, 400, 50):
            part = slice(first, first + 50)
            classifier.partial_fit(X[part], y[part], classes=[0, 1])
    assert classifier.score(X, y) > 0.95


def test_early_stopping_ends_the_training_at_the_best_parameters(estimator, data):
    stopping = irnn.EarlyStopping(patience=3)
    estimator.set_params(early_stopping=stopping, validation_fraction=0.25, epochs=300, learning_rate=0.3).fit(*data)
    assert estimator.n_iter_ < 300
    assert len(estimator.validation_loss_curve_) == estimator.n_iter_
    assert estimator.n_iter_ - 1 - np.argmin(estimator.validation_loss_curve_) >= 3


def test_the_validation_samples_have_their_share_of_a_rare_class():
    X, y = np.random.default_rng(0).standard_normal((40, 2)), np.arange(40) % 10 == 0
    classifier = ImplicitRNNClassifier((2,), epochs=2, early_stopping=True, validation_fraction=0.5, engine="numpy")
    assert_array_equal(classifier.fit(X, y).classes_, [False, True])
    with pytest.raises(ValueError, match="least populated class"):
        classifier.fit(X, np.arange(40) == 0)


def test_options_reach_the_optimiser():
    def chosen(**parameters):
        return ImplicitRNNRegressor(**parameters)._chosen_optimizer()

    assert chosen() == irnn.Adam(0.003, weight_decay=0.003)
    assert chosen(learning_rate=0.1, weight_decay=0.0) == irnn.Adam(0.1)
    assert chosen(optimizer="adam") == irnn.Adam()
    assert chosen(optimizer=irnn.AdamW(0.2, weight_decay=0.3)) == irnn.AdamW(0.2, weight_decay=0.3)
    assert chosen(optimizer=irnn.Adam(0.2, beta1=0.8), learning_rate=0.1) == irnn.Adam(0.1, beta1=0.8)
    assert chosen(optimizer="lbfgs") == irnn.LBFGS()
    with pytest.raises(TypeError, match="LBFGS has no option weight_decay"):
        chosen(optimizer="lbfgs", weight_decay=0.1)


def test_unrolled_nets_predict_by_the_steps_they_were_trained_with(friedman):
    X, y = friedman
    regressor = ImplicitRNNRegressor((4,), epochs=3, adjoint=irnn.Unrolled(3), random_state=0, engine="numpy").fit(X, y)
    exact = clone(regressor).set_params(epochs=3).fit(X, y).set_params(adjoint="implicit")
    assert np.abs(regressor.predict(X) - exact.predict(X)).max() > 1e-6


# --- what is refused -----------------------------------------------------------------------------------------


def test_masked_samples_and_sparse_data_are_refused_by_name(estimator, data):
    X, y = data
    hidden = np.ma.masked_array(X, X > 0.5)
    with pytest.raises(TypeError, match=r"X is a masked array with \d+ masked entries"):
        estimator.fit(hidden, y)
    with pytest.raises(TypeError, match="X is a sparse csr_array; expected a dense array"):
        estimator.fit(csr_array(X), y)
    with pytest.raises(TypeError, match="y is a sparse csr_array"):
        estimator.fit(X, csr_array(y[:, None]))
    with pytest.raises(TypeError, match="X is a masked array"):
        estimator.fit(X, y).predict(hidden)


@pytest.mark.parametrize("unit", [1e200, 1e-200])
def test_numbers_whose_variance_cannot_be_told_are_refused(estimator, regressor, data, unit):
    X, y = data
    with pytest.raises(ValueError, match=r"column 0 of X, with entries up to .* cannot be scaled"):
        estimator.fit(unit * X, y)
    with pytest.raises(ValueError, match=r"column 0 of y, with entries up to .* cannot be scaled"):
        regressor.fit(X, unit * y)


def test_small_numbers_are_learnt_where_the_caller_wants_errors_of_numpy(estimator, data):
    X, y = data
    with np.errstate(all="raise"):
        assert np.isfinite(estimator.fit(1e-140 * X, y).predict(1e-170 * X)).all()


@pytest.mark.parametrize("spread", [1.0, 1e-8, 1e-12])
def test_columns_of_many_samples_are_scaled_whatever_their_offset(regressor, spread):
    column = spread * np.linspace(-1, 1, 100_000)[:, None] + 1
    scaler = regressor._scaler_of("X", column, None)
    scaled = scaler.transform(column)
    assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-3)
    assert_allclose(scaler.inverse_transform(scaled), column, atol=1e-15)


def test_columns_that_differ_by_rounding_only_are_constant(regressor):
    column = np.where(np.arange(50) % 2, 0.3, 0.1 + 0.2)[:, None]
    assert np.abs(regressor._scaler_of("X", column, None).transform(column)).max() < 1e-15
    column[:] = 1e300
    assert not regressor._scaler_of("X", column, None).transform(column).any()


def test_samples_beyond_the_precision_of_the_network_are_refused_by_name(estimator, data):
    X, y = data
    estimator.set_params(dtype="float32").fit(X, y)
    with pytest.raises(ValueError, match=r"X has entries up to .*e\+300, which float32 cannot hold"):
        estimator.predict(1e300 * X)


def test_too_few_samples_for_early_stopping_are_said(iris):
    classifier = ImplicitRNNClassifier(early_stopping=True)
    with pytest.raises(
        ValueError, match=r"cannot hold out validation_fraction=0.1 of 10 samples.*early_stopping=False"
    ):
        classifier.fit(iris[0][45:55], iris[1][45:55])


def test_weights_of_classes_below_zero_are_refused(iris):
    with pytest.raises(ValueError, match=r"class_weight gives class 'setosa' the weight -1.0"):
        ImplicitRNNClassifier(class_weight={"setosa": -1.0, "versicolor": 1.0, "virginica": 1.0}).fit(*iris)
    for weights in (np.ones(3), "balance"):
        with pytest.raises(
            ValueError, match=r"class_weight is .*; expected a dict of the weights of classes, 'balanced' or"
        ):
            ImplicitRNNClassifier(class_weight=weights).fit(*iris)


def test_predictions_before_a_fit_are_refused(estimator, data):
    with pytest.raises(NotFittedError):
        estimator.predict(data[0])


def test_a_fit_that_fails_leaves_nothing_that_could_predict(estimator, data):
    with pytest.raises(ValueError, match="clip must be positive"):
        estimator.set_params(clip=-1.0).fit(*data)
    with pytest.raises(NotFittedError):
        estimator.predict(data[0])


def test_a_fit_that_fails_leaves_the_last_one_as_it_was(estimator, data):
    X, y = data
    expected = estimator.fit(X, y).predict(X)
    with pytest.raises(ValueError, match="clip must be positive"):
        estimator.set_params(clip=-1.0).fit(100 * X + 5, y[::-1])
    assert_array_equal(estimator.predict(X), expected)
    assert estimator.n_iter_ == len(estimator.loss_curve_) == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, irnn.ConvergenceWarning])
def test_a_fit_that_is_broken_off_leaves_nothing_that_could_predict(estimator, data, broken_off, error):
    with broken_off(error), pytest.raises(error):
        estimator.fit(*data)
    with pytest.raises(NotFittedError):
        estimator.predict(data[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, irnn.ConvergenceWarning])
def test_a_warm_start_that_is_broken_off_is_as_if_it_had_not_been(estimator, data, broken_off, error):
    estimator.set_params(warm_start=True, batch_size=7).fit(*data)
    other = copy.deepcopy(estimator)
    with broken_off(error), pytest.raises(error):
        estimator.fit(*data)
    assert_array_equal(estimator.predict(data[0]), other.predict(data[0]))
    assert_array_equal(estimator.fit(*data).predict(data[0]), other.fit(*data).predict(data[0]))
    assert estimator.loss_curve_ == other.loss_curve_


@pytest.fixture
def broken_off(monkeypatch):
    """Trainings end with an error after their first epochs."""

    @contextmanager
    def breaking_off(error):
        train = Training._train

        def fail(self, count):
            train(self, count)
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(Training, "_train", fail)
            yield

    return breaking_off


def test_an_estimator_in_training_is_trained_by_no_other_call(estimator, data, monkeypatch):
    monkeypatch.setattr(Training, "_train", lambda self, count: estimator.fit(*data))
    with pytest.raises(RuntimeError, match="is being trained by another call of fit"):
        estimator.fit(*data)


def test_a_stream_that_begins_with_an_unknown_label_can_begin_again(classifier, iris):
    X, y = iris
    with pytest.raises(ValueError, match="previously unseen labels"):
        classifier.partial_fit(X, y, classes=["setosa", "versicolor"])
    with pytest.raises(NotFittedError):
        classifier.predict(X)
    assert len(classifier.partial_fit(X, y, classes=np.unique(y)).classes_) == 3


@pytest.mark.parametrize(
    ("classes", "label"), [(["no", "yes"], "yesterday"), (np.array([0, 1], np.uint8), 257), ([False, True], 2)]
)
def test_label_that_would_be_another_in_the_dtype_of_the_classes_is_refused(classifier, data, classes, label):
    X, y = data
    classifier.partial_fit(X, np.asarray(classes)[(y > 0).astype(int)], classes=classes)
    with pytest.raises(ValueError, match=f"previously unseen labels: .{label!r}."):
        classifier.partial_fit(X, [label] * len(X))


def test_whole_numbers_that_are_one_as_floats_are_no_labels(classifier, friedman):
    pandas = pytest.importorskip("pandas")
    X, y = friedman
    labels = pandas.Series(2**60 + (y > 14), dtype="Int64")
    with pytest.raises(ValueError, match=r"y has labels up to 1152921504606846976 .*; pass y\.astype\('int64'\)"):
        classifier.fit(X, labels)
    assert classifier.fit(X, labels.astype("int64")).classes_.tolist() == [2**60, 2**60 + 1]


@pytest.mark.parametrize("kind", ["timedelta64[s]", "datetime64[s]"])
def test_times_are_no_targets_without_a_unit(regressor, friedman, kind):
    X, y = friedman
    with pytest.raises(TypeError, match=r"y has dtype .*; expected numbers: divide it by a unit"):
        regressor.fit(X, y.astype(np.int64).astype(kind))


def test_a_warm_start_with_another_network_is_refused(estimator, data):
    estimator.set_params(warm_start=True).fit(*data).set_params(layers=(7,))
    with pytest.raises(ValueError, match="from which warm_start and partial_fit cannot go on"):
        estimator.fit(*data)


def test_a_warm_start_with_other_targets_is_refused(regressor, classifier, friedman, iris):
    X, y = friedman
    with pytest.raises(ValueError, match=r"y has shape \(120, 2\); expected \(samples,\), as it was at first"):
        regressor.set_params(warm_start=True, epochs=1).fit(X, y).fit(X, np.stack([y, y], axis=1))
    with pytest.raises(ValueError, match="previously unseen labels"):
        classifier.set_params(warm_start=True, epochs=1).fit(iris[0][:100], iris[1][:100]).fit(*iris)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"early_stopping": True}, "set early_stopping=False"),
        ({"optimizer": "lbfgs"}, "LBFGS needs all samples"),
        ({"schedule": "cosine"}, "set schedule='constant'"),
        ({"class_weight": "balanced"}, "pass class_weight as a dict"),
    ],
)
def test_partial_fit_refuses_what_it_cannot_do(iris, parameters, message):
    with pytest.raises(ValueError, match=message):
        ImplicitRNNClassifier(**parameters).partial_fit(*iris, classes=np.unique(iris[1]))


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"layers": 8}, TypeError, "layers must be a sequence of sizes or Layer objects"),
        ({"layers": (0,)}, ValueError, "layers has 0; expected numbers of neurons from 1"),
        ({"layers": (True,)}, TypeError, "layers has True; expected a Layer or a number of neurons"),
        ({"skips": 3}, TypeError, "skips is 3; expected pairs"),
        ({"input_skips": 3}, TypeError, "input_skips is 3; expected layers"),
        ({"scale": "yes"}, TypeError, "scale must be True or False"),
        ({"warm_start": "yes"}, TypeError, "warm_start must be True or False"),
        ({"verbose": "yes"}, TypeError, "verbose must be True, False or a whole number, got 'yes'"),
        ({"loss": "binary_cross_entropy"}, ValueError, "loss='binary_cross_entropy' is one of classification"),
        ({"loss": irnn.CrossEntropy(), "scale": False}, ValueError, "use ImplicitRNNClassifier"),
        ({"activation": "tanj"}, ValueError, "did you mean tanh"),
        ({"constraint": "peron"}, ValueError, "did you mean Perron"),
        ({"optimizer": "adan"}, ValueError, "did you mean Adam"),
        ({"early_stopping": 5}, TypeError, "early_stopping must be True, False or an EarlyStopping"),
        ({"validation_fraction": 2.0}, ValueError, "validation_fraction must lie strictly between 0 and 1"),
        ({"batch_size": "all"}, TypeError, "batch_size must be a whole number"),
        ({"epochs": 0}, ValueError, "epochs must be a whole number from 1"),
        ({"clip": -1.0}, ValueError, "clip must be positive"),
        ({"clip": np.inf}, ValueError, "clip must be positive and finite"),
        ({"dtype": "int"}, ValueError, "expected 'float64' or 'float32'"),
        ({"engine": "fortran"}, ValueError, "engine"),
    ],
)
def test_parameters_out_of_range_are_named_by_fit(friedman, parameters, error, message):
    with pytest.raises(error, match=message):
        ImplicitRNNRegressor(**parameters).fit(*friedman)


# --- without scikit-learn ------------------------------------------------------------------------------------


def test_without_scikit_learn_the_import_says_what_to_install(monkeypatch):
    import importlib
    import sys

    monkeypatch.delitem(sys.modules, "implicit_rnn.sklearn")
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(ImportError, match=r"pip install 'implicit-rnn\[sklearn\]'"):
        importlib.import_module("implicit_rnn.sklearn")
