"""What people have their data in: each kind is taken for what it is, or refused by name with a remedy that works."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import implicit_rnn as irnn
from implicit_rnn.errors import ScaleWarning


def net(outputs: int = 1, **settings: object) -> irnn.Network:
    return irnn.Network(2, [irnn.Layer(3)], outputs=outputs, seed=0, engine="numpy", **settings)


@pytest.fixture(name="X")
def samples() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((8, 2))


# --- targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "binary_cross_entropy"])
@pytest.mark.parametrize(
    "kind", [np.asarray, list, lambda y: pytest.importorskip("pandas").Series(y)], ids=["array", "list", "series"]
)
def test_targets_of_one_axis_are_refused_since_they_would_broadcast_against_predictions(X, loss, kind):
    Y = kind((X[:, 0] > 0).astype(float))
    broadcasts = r"Y has shape \(8,\), but predictions have shape \(8, 1\).*pass np\.reshape\(Y, \(-1, 1\)\)$"
    with pytest.raises(ValueError, match=broadcasts):
        net().fit(X, Y, loss=loss, epochs=1)
    assert np.isfinite(net().fit(X, np.reshape(Y, (-1, 1)), loss=loss, epochs=1).loss).all()


def test_targets_of_one_axis_are_refused_in_validation_and_gradients_too(X):
    with pytest.raises(ValueError, match=r"validation\[1\] has shape \(8,\)"):
        net().fit(X, X[:, :1], validation=(X, X[:, 0]), epochs=1)
    with pytest.raises(ValueError, match=r"Y has shape \(8,\)"):
        net().loss_and_gradient(X, X[:, 0])


def test_labels_of_cross_entropy_stay_of_one_axis(X):
    labels = (X[:, 0] > 0).astype(int)
    for given in (labels, labels.astype(object), labels.astype(np.uint8), labels[:, None], labels.tolist()):
        assert np.isfinite(net(2).fit(X, given, loss="cross_entropy", epochs=1).loss).all()


@pytest.mark.parametrize("labels", [["cat", "dog"] * 4, np.array(["cat", "dog"] * 4, object)], ids=["text", "objects"])
def test_labels_of_text_are_refused_with_a_remedy_that_works(X, labels):
    with pytest.raises(TypeError, match=r"classes, labels = np.unique\(Y, return_inverse=True\)"):
        net(2).fit(X, labels, loss="cross_entropy", epochs=1)
    _, numbers = np.unique(labels, return_inverse=True)
    net(2).fit(X, numbers, loss="cross_entropy", epochs=1)


# --- scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X: X + np.array([0, 1e6]), "column 1 of X has mean 1e\\+06"),
        (lambda X: X * [500, 1], "column 0 of X has mean .* and standard deviation"),
        (lambda X: X * [1e300, 1], "column 0 of X has mean .* and standard deviation .*e\\+(299|300)"),
        (lambda X: X * [90, 0.01], "columns 0 and 1 of X have standard deviations"),
        (lambda X: X * [1, 1e-200], "columns 0 and 1 of X have standard deviations .* and .*e-20(0|1)"),
    ],
    ids=["mean", "spread", "huge spread", "different spreads", "tiny spread"],
)
def test_columns_far_from_unit_scale_are_warned_of_once_by_name(X, change, message):
    with pytest.warns(ScaleWarning, match=message + r".*\(X - X.mean\(0\)\) / X.std\(0\)") as caught:
        net().fit(change(X), X[:, :1], epochs=1)
    assert len(caught) == 1


def test_targets_far_from_unit_scale_are_warned_of(X):
    with pytest.warns(ScaleWarning, match="column 0 of Y has mean 1e\\+03"):
        net().fit(X, X[:, :1] + 1e3, epochs=1)


@pytest.mark.parametrize(
    "X", [np.ones((8, 2)), np.c_[np.ones(8), np.arange(8.0)], np.zeros((8, 2))], ids=["constant", "a constant", "zero"]
)
def test_data_around_1_are_not_warned_of(X):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net().fit(X, np.linspace(-1, 1, 8)[:, None], epochs=1)


# --- kinds of array ------------------------------------------------------------------------------------------


def test_masked_array_is_refused_where_something_is_masked(X):
    masked = np.ma.masked_greater(X, 0.5)
    with pytest.raises(TypeError, match=r"X is a masked array with \d+ masked entries.*X.filled\(number\)"):
        net().predict(masked)
    np.testing.assert_array_equal(net().predict(np.ma.array(X)), net().predict(X))


def test_masked_labels_targets_and_arguments_of_equations_are_refused_too(X):
    labels = np.ma.array((X[:, 0] > 0).astype(int), mask=[True] + [False] * 7)
    with pytest.raises(TypeError, match="Y is a masked array with 1 masked entries"):
        net(2).fit(X, labels, loss="cross_entropy", epochs=1)
    with pytest.raises(TypeError, match="Y is a masked array"):
        net().fit(X, np.ma.masked_greater(X[:, :1], 0), epochs=1)
    with pytest.raises(TypeError, match="a is a masked array"):
        irnn.fixed_point(lambda z, a: np.cos(a.sum() * z), [0.5], args=(np.ma.array([0.1, 9.0], mask=[False, True]),))
    with pytest.raises(TypeError, match="z0 is a masked array"):
        irnn.root(lambda z: z**2 - 2, np.ma.array([1.0], mask=[True]))


def test_sparse_matrix_is_refused_with_the_remedy(X):
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"X is a sparse csr_matrix; expected a dense array: pass X.toarray\(\)"):
        net().predict(sparse.csr_matrix(X))


def test_data_frames_of_any_numbers_are_taken_whatever_the_names_of_their_columns(X):
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.DataFrame({"a": [1, 0, 1], "b": [0.5, 1.5, -0.5]})
    expected = net().predict([[1, 0.5], [0, 1.5], [1, -0.5]])
    nullable = pandas.DataFrame({"a": pandas.array([1, 0, 1], "Int64"), "b": pandas.array([0.5, 1.5, -0.5], "Float64")})
    mixed = pandas.DataFrame({"a": [True, False, True], "b": [0.5, 1.5, -0.5]})
    same_names = frame.set_axis(["a", "a"], axis=1)
    for given in (frame, nullable, mixed, nullable.astype({"a": "boolean"}), same_names):
        np.testing.assert_allclose(net().predict(given), expected)


def test_data_frame_with_a_missing_value_or_text_is_refused_by_name():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    missing = pandas.DataFrame({"a": pandas.array([1, None], "Int64"), "b": [0.5, 1.5]})
    with pytest.raises(ValueError, match="X has 1 missing values"):
        net().predict(missing)
    text = pandas.DataFrame({"a": pandas.Categorical(["x", "y"]), "b": [0.5, 1.5]})
    with pytest.raises(TypeError, match="X has a column 'a' of dtype category"):
        net().predict(text)


def test_array_of_objects_is_taken_if_all_are_numbers(X):
    np.testing.assert_allclose(net().predict(X.astype(object)), net().predict(X))
    spoilt = X.astype(object)
    spoilt[3, 1] = "three"
    with pytest.raises(TypeError, match="X has dtype object with entries of type str; expected real numbers"):
        net().predict(spoilt)
    spoilt[3, 1] = None
    with pytest.raises(TypeError, match="entries of type NoneType"):
        net().predict(spoilt)


def test_complex_parameters_are_refused_instead_of_losing_a_part():
    some = net()
    with pytest.raises(TypeError, match="parameters has dtype complex128"):
        some.parameters = some.parameters + 1j


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("float32"), "f4", "<f4", ">f4"])
def test_dtype_is_taken_as_numpy_takes_it(dtype):
    assert net(dtype=dtype).parameters.dtype == np.float32
