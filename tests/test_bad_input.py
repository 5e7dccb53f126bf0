"""Bad input is refused in Python with the argument's name, what came and what was expected; good input is accepted."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import make_net, make_neuron
from matplotlib.figure import Figure

import implicit_rnn as irnn
from implicit_rnn import plotting

CALLS = {
    "equilibrium": lambda net, X: net.equilibrium(X),
    "predict": lambda net, X: net.predict(X),
    "loss_and_gradient": lambda net, X: net.loss_and_gradient(X, np.zeros((12, 2))),
    "fit": lambda net, X: net.fit(X, np.zeros((12, 2)), epochs=1),
}


@pytest.fixture(params=list(CALLS))
def call(request):
    """Every call that takes samples X."""
    return CALLS[request.param]


@pytest.fixture
def net():
    return make_net("numpy")


# --- samples that are refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((12, 4)), r"shape \(12, 4\); expected \(samples, 3\): the network has 3 features"),
        (np.zeros((0, 3)), r"no samples: shape \(0, 3\)"),
        ([], r"shape \(0,\); expected \(samples, 3 features\)"),
        (np.zeros(3), r"shape \(3,\); expected \(samples, 3 features\); one sample is np\.reshape\(X, \(1, -1\)\)"),
        (np.zeros((2, 3, 3)), r"shape \(2, 3, 3\); expected \(samples, 3 features\)"),
        (1.0, r"shape \(\); expected"),
    ],
)
def test_samples_of_another_shape_are_refused(net, call, samples, message):
    with pytest.raises(ValueError, match=f"X has {message}"):
        call(net, samples)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_sample_that_is_not_finite_is_refused(net, call, X, value):
    X[[5, 8], 1] = value
    with pytest.raises(ValueError, match="X has NaN or infinity in 2 of 12 samples, first in sample 5"):
        call(net, X)


def test_a_vector_of_samples_of_one_feature_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"X has shape \(5,\); .*; samples of one number are np\.reshape\(X, \(-1, 1\)\)"
    ):
        make_neuron("numpy", 0.5).predict(np.zeros(5))


def test_ragged_list_is_refused_by_name(net, call):
    with pytest.raises(ValueError, match="X is not an array of numbers: setting an array element"):
        call(net, [[1.0, 2.0, 3.0], [1.0, 2.0]])


def test_what_is_no_array_is_named_by_its_kind(net, call):
    with pytest.raises(TypeError, match="X is a generator; expected numbers, as an array or in lists"):
        call(net, (row for row in np.eye(3)))


def test_what_says_why_it_is_no_array_is_heard(net, call):
    class Tensor:
        def __array__(self, *how, **more):
            raise RuntimeError("it requires grad")

    with pytest.raises(TypeError, match="X is not an array of numbers: it requires grad"):
        call(net, Tensor())


@pytest.mark.parametrize(
    ("dtype", "shown"), [("complex128", "complex128"), ("U3", "<U3"), ("S3", r"\|S3"), ("datetime64[s]", "datetime64")]
)
def test_dtype_without_real_numbers_is_refused(net, call, dtype, shown):
    with pytest.raises(TypeError, match=rf"X has dtype {shown}.*; expected real numbers \(float, integer or boolean\)"):
        call(net, np.zeros((12, 3), dtype))


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="here longdouble is float64")
def test_longdouble_is_refused_and_told_how_to_convert_it(net, call):
    with pytest.raises(TypeError, match=r"X has dtype .*float64 cannot hold; pass X.astype\('float64'\)"):
        call(net, np.zeros((12, 3), np.longdouble))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_array_larger_than_memory_is_refused_at_once(engine, dtype):
    huge = np.broadcast_to(np.float64(0), (10**13, 3))
    with pytest.raises(MemoryError, match=r"X has 10000000000000 samples, which need .* GiB of memory, but .* GiB"):
        make_net(engine, dtype=dtype).predict(huge)


def test_array_whose_states_would_not_fit_is_refused():
    net = irnn.Network(1, [irnn.Layer(3000)], outputs=1, engine="numpy")
    huge = np.broadcast_to(np.float64(0), (10**9, 1))
    with pytest.raises(MemoryError, match="X has 1000000000 samples"):
        net.predict(huge)


# --- targets and starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (np.zeros((12, 3)), ValueError, r"shape \(12, 3\); expected \(samples, 2\): the network has 2 outputs"),
        (np.zeros((11, 2)), ValueError, "11 samples, X has 12"),
        (np.zeros(12), ValueError, r"shape \(12,\); expected \(samples, 2 outputs\)"),
        (np.full((12, 2), np.nan), ValueError, "NaN or infinity in 12 of 12 samples"),
        (np.full((12, 2), None), TypeError, "dtype object with entries of type NoneType"),
    ],
)
@pytest.mark.parametrize("method", ["loss_and_gradient", "fit"])
def test_bad_targets_are_refused_by_name(net, method, X, targets, error, message):
    with pytest.raises(error, match=f"Y has {message}"):
        getattr(net, method)(X, targets)


def test_bad_validation_data_are_refused_by_name(net, X, Y):
    with pytest.raises(ValueError, match=r"validation\[0\] has shape"):
        net.fit(X, Y, validation=(X[:, :2], Y))
    with pytest.raises(ValueError, match=r"validation\[1\] has 3 samples, validation\[0\] has 12"):
        net.fit(X, Y, validation=(X, Y[:3]))
    with pytest.raises(TypeError, match=r"validation must be a tuple of samples, targets .*, got a float"):
        net.fit(X, Y, validation=0.2)
    with pytest.raises(TypeError, match=r"validation must be a tuple .*, got 1 of them"):
        net.fit(X, Y, validation=(X,))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (np.zeros((12, 4)), r"shape \(12, 4\); expected \(samples, 5\): the network has 5 neurons"),
        (np.zeros((1, 5)), "1 samples, X has 12"),
        (np.full((12, 5), np.inf), "NaN or infinity"),
    ],
)
def test_bad_start_is_refused_by_name(net, X, start, message):
    with pytest.raises(ValueError, match=f"z0 has {message}"):
        net.equilibrium(X, z0=start)


# --- samples that are accepted -------------------------------------------------------------------------------


@pytest.mark.parametrize("net_dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", ">f8", ">f4", "<f8", "int64", "int8", ">i4", "uint64", "uint8", "bool"]
)
def test_every_real_dtype_gives_the_result_of_its_values(engine, dtype, net_dtype, rng):
    net = make_net(engine, dtype=net_dtype)
    X = rng.integers(0, 2, (6, 3))
    np.testing.assert_array_equal(net.predict(X.astype(dtype)), net.predict(X.astype(net_dtype)))


LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "every other row": lambda X: np.repeat(X, 2, axis=0)[::2],
    "every other column": lambda X: np.repeat(X, 2, axis=1)[:, ::2],
    "reversed": lambda X: X[::-1].copy()[::-1],
    "slice of a wider array": lambda X: np.hstack([X, X])[:, : X.shape[1]],
    "transposed": lambda X: X.T.copy().T,
    "misaligned": lambda X: misaligned(X),
    "list": lambda X: X.tolist(),
    "tuple of rows": lambda X: tuple(X),
}


def misaligned(X: np.ndarray) -> np.ndarray:
    buffer = np.empty(X.nbytes + 1, np.uint8)
    array = buffer[1:].view(X.dtype).reshape(X.shape)
    array[...] = X
    assert not array.flags.aligned
    return array


@pytest.fixture(params=list(LAYOUTS))
def layout(request):
    return LAYOUTS[request.param]


def test_samples_of_any_layout_give_the_same_equilibria(engine, layout, X):
    net = make_net(engine)
    np.testing.assert_array_equal(net.equilibrium(layout(X)).state, net.equilibrium(X).state)


def test_samples_and_targets_of_any_layout_give_the_same_gradient(engine, layout, X, Y):
    net = make_net(engine)
    expected = net.loss_and_gradient(X, Y)[1]
    np.testing.assert_array_equal(net.loss_and_gradient(layout(X), np.asfortranarray(Y))[1], expected)


def test_starts_of_any_layout_give_the_same_equilibria(engine, layout, X, rng):
    net = make_net(engine)
    z0 = rng.standard_normal((12, 3)) @ np.ones((3, 5))
    np.testing.assert_array_equal(net.equilibrium(X, z0=layout(z0)).state, net.equilibrium(X, z0=z0).state)


def test_broadcast_samples_are_accepted(engine, X):
    net = make_net(engine)
    tiled = net.predict(np.broadcast_to(X[0], (6, 3)))
    np.testing.assert_array_equal(tiled, net.predict(np.tile(X[0], (6, 1))))


def test_read_only_samples_are_accepted(engine, X, Y):
    net = make_net(engine)
    expected = net.loss_and_gradient(X, Y)[1]
    X.flags.writeable = Y.flags.writeable = False
    np.testing.assert_array_equal(net.loss_and_gradient(X, Y)[1], expected)
    assert np.isfinite(net.fit(X, Y, epochs=3, batch_size=5).loss).all()


def test_data_are_never_written_to(engine, X, Y):
    z0 = np.ones((12, 5))
    before = X.copy(), Y.copy(), z0.copy()
    net = make_net(engine)
    net.equilibrium(X, z0=z0)
    net.loss_and_gradient(X, Y)
    net.fit(X, Y, epochs=3, batch_size=5)
    for array, old in zip((X, Y, z0), before, strict=True):
        np.testing.assert_array_equal(array, old)


# --- structure -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neurons", "error"), [(0, ValueError), (-1, ValueError), *((n, TypeError) for n in (True, 2.0, "2", None))]
)
def test_bad_number_of_neurons_is_refused(neurons, error):
    with pytest.raises(error, match=f"neurons must be a whole number from 1, got {neurons!r}"):
        irnn.Layer(neurons)


@pytest.mark.parametrize("outputs", ["01", None, 1.5, [0.5], True, [True, False]])
def test_outputs_of_another_kind_are_refused(outputs):
    with pytest.raises(TypeError, match="outputs"):
        irnn.Network(1, [2], outputs=outputs)


@pytest.mark.parametrize(
    ("structure", "error", "message"),
    [
        ({"inputs": 0}, ValueError, "inputs must be .*, got 0"),
        ({"inputs": -2}, ValueError, "inputs must be .*, got -2"),
        ({"inputs": 1.5}, TypeError, "inputs must be .*, got 1.5"),
        ({"inputs": True}, TypeError, "inputs must be .*, got True"),
        ({"seed": -1}, ValueError, "seed must be a whole number from 0, got -1"),
        ({"skips": [(0.5, 2.5)]}, TypeError, r"skips has 0\.5; expected pairs \(earlier, later\) of layers"),
        ({"skips": [(0, 1, 2)]}, ValueError, r"skips is \[\(0, 1, 2\)\]; expected pairs"),
        ({"skips": "02"}, TypeError, "skips is '02'; expected pairs"),
        ({"feedback": None}, TypeError, r"feedback is None; expected True, False or pairs \(later, earlier\)"),
        ({"feedback": 1}, TypeError, "feedback is 1; expected True, False or pairs"),
        ({"feedback": [("1", "0")]}, TypeError, "feedback has '1'; expected True, False or pairs"),
        ({"input_skips": [1.5]}, TypeError, r"input_skips has 1\.5; expected layers that see the input"),
        ({"input_skips": [[1]]}, TypeError, r"input_skips has \[1\]; expected layers"),
        (
            {"input_skips": [3]},
            ValueError,
            r"input_skips is \(3,\); expected layers from 1 to 2: layer 0 sees the input",
        ),
        (
            {"layers": [2], "input_skips": [1]},
            ValueError,
            r"input_skips is \(1,\); expected none, as layer 0 is the only",
        ),
        (
            {"skips": [(0, 5)]},
            ValueError,
            r"skips has \(0, 5\); expected pairs .* of the layers 0 to 2 that are not neigh",
        ),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"layers": [2, 0]}, ValueError, "layers has 0; expected numbers of neurons from 1"),
        ({"layers": 2}, TypeError, "layers is 2; expected a list of Layer"),
        ({"layers": None}, TypeError, "layers is None; expected a list of Layer"),
        ({"layers": irnn.Layer(2)}, TypeError, r"layers is Layer\(.*\); expected a list of Layer"),
        ({"layers": b"12"}, TypeError, "layers is b'12'; expected a list of Layer"),
        ({"layers": np.array(3)}, TypeError, r"layers is array\(3\); expected a list of Layer"),
        ({"layers": ["2"]}, TypeError, "layers has '2'; expected a Layer or a number of neurons"),
        ({"layers": [2.0]}, TypeError, r"layers has 2\.0; expected a Layer or a number of neurons"),
        ({"layers": [True]}, TypeError, "layers has True; expected a Layer or a number of neurons"),
        ({"outputs": 0}, ValueError, "outputs must be a whole number from 1, got 0"),
        ({"outputs": -1}, ValueError, "outputs must be a whole number from 1, got -1"),
        ({"outputs": [6]}, ValueError, r"outputs is \[6\]; expected neurons from 0 to 5, at least one"),
        ({"outputs": [-1]}, ValueError, r"outputs is \[-1\]; expected neurons from 0 to 5, at least one"),
        ({"outputs": []}, ValueError, r"outputs is \[\]; expected neurons from 0 to 5, at least one"),
        ({"outputs": np.array(3)}, TypeError, r"outputs is array\(3\); expected a number of outputs"),
        ({"engine": np.array([])}, ValueError, r"engine is array.*; expected one of"),
        ({"device": np.array([])}, ValueError, r"device is array.*; expected one of"),
    ],
)
def test_structure_that_is_not_of_layers_is_refused_by_name(structure, error, message):
    with pytest.raises(error, match=message):
        irnn.Network(**({"inputs": 1, "layers": [2, 2, 2], "outputs": 1} | structure))


def test_structure_may_be_given_in_numbers_and_arrays_of_numpy():
    arrays = {"feedback": np.array([[2, 0]]), "skips": np.array([[0, 2]]), "input_skips": np.array([1])}
    net = irnn.Network(1, np.array([2, 3, 2]), outputs=np.array([6]), **arrays)
    lists = irnn.Network(1, [2, 3, 2], feedback=[(2, 0)], skips=[(0, 2)], input_skips=[1], outputs=[6])
    assert net.topology == lists.topology
    every = irnn.Network(1, [2, 2], feedback=np.True_, outputs=1)
    assert every.topology == irnn.Network(1, [2, 2], feedback=True, outputs=1).topology


def test_connection_that_is_named_twice_is_one():
    twice = irnn.Network(1, [2, 2, 2], feedback=[(1, 0), (1, 0)], skips=[(0, 2), (0, 2)], outputs=1)
    assert twice.topology == irnn.Network(1, [2, 2, 2], feedback=[(1, 0)], skips=[(0, 2)], outputs=1).topology


@pytest.mark.parametrize(
    "choose",
    [
        lambda word: irnn.Layer(2, lateral=word),
        lambda word: irnn.EarlyStopping(restore_best=word),
        lambda word: make_net("numpy").fit([[0.1] * 3], [[0.2] * 2], warm_start=word),
        lambda word: make_net("numpy").fit([[0.1] * 3], [[0.2] * 2], restore_best=word),
        lambda word: irnn.root(lambda z: z, [1.0], vectorized=word),
    ],
)
@pytest.mark.parametrize("word", ["no", "False", 0, None, []])
def test_word_in_place_of_true_or_false_is_refused(choose, word):
    with pytest.raises(TypeError, match=f"must be True or False, got {re.escape(repr(word))}"):
        choose(word)


@pytest.mark.parametrize(
    "sizes", [{"inputs": 2**30, "layers": [100]}, {"outputs": 2**30, "layers": [100]}, {"layers": [10**8]}]
)
def test_network_larger_than_memory_is_refused_at_once(sizes):
    with pytest.raises(MemoryError, match=r"the network has \d+ parameters, which need .* GiB of memory"):
        irnn.Network(**({"inputs": 1, "layers": [2], "outputs": 1} | sizes))


@pytest.mark.parametrize("activation", ["tahn", "TANH", "", None, ["tanh"], np.tanh])
def test_unknown_activation_is_refused_with_the_valid_names(activation):
    named = re.escape(f"unknown activation {activation!r}; expected one of tanh, sigmoid, ")
    with pytest.raises(ValueError, match=f"{named}.*identity"):
        irnn.Layer(2, activation)


@pytest.mark.parametrize("dtype", ["float16", "f8x", int, "complex128", None])
def test_unknown_dtype_is_refused_with_the_valid_names(dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; expected 'float64' or 'float32'"):
        irnn.Network(1, [2], outputs=1, dtype=dtype)


# --- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "given", "valid"),
    [
        (lambda net, X, Y: make_net("torch"), "engine is 'torch'", "'auto', 'julia', 'numpy'"),
        (lambda net, X, Y: make_net("numpy", constraint="peron"), "constraint is 'peron'", ".*InfNorm, Perron"),
        (lambda net, X, Y: net.equilibrium(X, solver="newtn"), "solver is 'newtn'", ".*Picard,.* NLsolve"),
        (lambda net, X, Y: net.loss_and_gradient(X, Y, adjoint="bptt"), "adjoint is 'bptt'", ".*Implicit"),
        (lambda net, X, Y: net.fit(X, Y, optimizer="adamax"), "optimizer is 'adamax'", ".*SGD, .*Adam"),
        (lambda net, X, Y: net.loss_and_gradient(X, Y, loss="rmse"), "loss is 'rmse'", "MSE, MAE, Huber"),
        (lambda net, X, Y: net.fit(X, Y, schedule="linear"), "schedule is 'linear'", "Constant, Cosine, .* WarmUp"),
        (lambda net, X, Y: net.equilibrium(X, on_failure="print"), "on_failure is 'print'", "'raise', 'warn', "),
        (lambda net, X, Y: net.fit(X, Y, on_failure="print"), "on_failure is 'print'", "'raise', 'warn', 'ignore'"),
        (lambda net, X, Y: irnn.NLsolve("broyden"), "method is 'broyden'", "'trust_region', 'newton', 'anderson'"),
        (lambda net, X, Y: irnn.Implicit("cg"), "linear_solver is 'cg'", "'auto', 'lu'"),
    ],
)
def test_unknown_word_is_refused_with_the_valid_ones(net, X, Y, call, given, valid):
    with pytest.raises(ValueError, match=f"{given}; expected one of {valid}"):
        call(net, X, Y)


@pytest.mark.parametrize("constraint", [None, "none"])
def test_no_constraint_is_told_to_be_free(constraint):
    with pytest.raises(ValueError, match=r"constraint is .*; no constraint is Free\(\)"):
        make_net("numpy", constraint=constraint)


def test_what_is_no_option_of_the_kind_is_refused_with_what_was_expected(net, X):
    with pytest.raises(TypeError, match=r"solver is the class Picard; pass an object: Picard\(\)"):
        net.equilibrium(X, solver=irnn.Picard)
    with pytest.raises(TypeError, match=r"solver is Perron\(kappa=0.95\); expected one of .*Picard"):
        net.equilibrium(X, solver=irnn.Perron())


@pytest.mark.parametrize(
    ("option", "valid"),
    [
        (irnn.Picard, "damping, tol, max_iterations"),
        (irnn.NLsolve, "method, tol, max_iterations"),
        (irnn.Implicit, "linear_solver, tol, max_iterations"),
        (irnn.Perron, "kappa"),
        (irnn.SGD, "learning_rate"),
        (irnn.Adam, "learning_rate, weight_decay, beta1, beta2, epsilon"),
    ],
)
def test_unknown_option_name_is_refused_with_the_valid_names(option, valid):
    with pytest.raises(TypeError, match=rf"misspelt(.|\n)*{valid}"):
        option(misspelt=1)


def test_unknown_setting_of_fit_is_refused_with_the_valid_names(net, X, Y):
    with pytest.raises(TypeError, match=r"epoch(.|\n)*optimizer, epochs, batch_size"):
        net.fit(X, Y, epoch=3)


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("learning_rate", r"optimizer=Adam\(learning_rate=\.\.\.\)"),
        ("lr", r"optimizer=Adam\(learning_rate=\.\.\.\)"),
        ("tol", r"solver=Auto\(tol=\.\.\.\)"),
        ("patience", r"early_stopping=EarlyStopping\(patience=\.\.\.\)"),
    ],
)
def test_option_of_a_setting_of_fit_is_told_its_place(net, X, Y, setting, remedy):
    with pytest.raises(TypeError, match=f"fit has no setting {setting}, which is an option of .*: pass {remedy}"):
        net.fit(X, Y, **{setting: 1})


@pytest.mark.parametrize(
    ("option", "name", "values", "message"),
    [
        (irnn.Perron, "kappa", (0, 1, -0.5, 1.5, np.nan), "kappa must lie strictly between 0 and 1, got {}"),
        (irnn.Picard, "damping", (0, -1, 1.1, np.nan), r"damping must lie in \(0, 1\], got {}"),
        (irnn.Huber, "delta", (0, -1, np.inf, np.nan), "delta must be positive and finite, got {}"),
        (irnn.Adam, "learning_rate", (0, -1, np.nan), "learning_rate must be positive and finite, got {}"),
        (irnn.Auto, "max_iterations", (2**31,), r"max_iterations must be a whole number below 2\*\*31, got {}"),
        (irnn.Cosine, "final", (-0.1, 1.1, np.nan), "final must lie from 0 to 1, got {}"),
        (irnn.OneCycle, "rise", (0.0, 1.0), "rise must lie strictly between 0 and 1, got {}"),
        (irnn.Step, "every", (0,), "every must be a whole number from 1, got {}"),
        (irnn.Step, "factor", (0.0, 1.0), "factor must lie strictly between 0 and 1, got {}"),
        (irnn.Guard, "unconverged", (1.5, -0.1), "unconverged must .*, got {}"),
        (irnn.Guard, "parameter_norm", (0,), "parameter_norm must .*, got {}"),
        (irnn.Adam, "beta1", (1.0, -0.1), r"beta1 must lie in \[0, 1\), got {}"),
        (irnn.Adam, "beta2", (1.0, np.nan), r"beta2 must lie in \[0, 1\), got {}"),
        (irnn.Adam, "epsilon", (-1e-8,), "epsilon must be positive and finite, got {}"),
        (irnn.Momentum, "momentum", (-0.1, 1.5, np.nan), r"momentum must lie in \[0, 1\), got {}"),
        (irnn.Nesterov, "momentum", (-0.1, 1.5, np.nan), r"momentum must lie in \[0, 1\), got {}"),
        (irnn.SGD, "weight_decay", (-1.0, np.inf, np.nan), "weight_decay must be finite and not negative, got {}"),
        (irnn.AdamW, "weight_decay", (-1.0, np.inf, np.nan), "weight_decay must be finite and not negative, got {}"),
    ],
)
def test_number_out_of_its_range_is_refused_by_name(option, name, values, message):
    for value in values:
        with pytest.raises(ValueError, match=message.format(value)):
            option(**{name: value})


@pytest.mark.parametrize(
    "option", [irnn.Auto, irnn.Anderson, irnn.Chord, irnn.Newton, irnn.NLsolve, irnn.Picard, irnn.Implicit]
)
@pytest.mark.parametrize("tol", [1, 2.5, np.inf])
def test_tolerance_that_anything_would_meet_is_refused(option, tol):
    with pytest.raises(ValueError, match="tol must lie strictly between 0 and 1"):
        option(tol=tol)


@pytest.mark.parametrize("solver", [irnn.Picard, irnn.NLsolve, irnn.Implicit])
@pytest.mark.parametrize(
    ("name", "value"),
    [("tol", tol) for tol in (0, -1, np.nan, "small")]
    + [("max_iterations", limit) for limit in (0, -1, np.nan, 2.5, "many")],
)
def test_bad_tolerance_or_limit_is_refused_by_name(solver, name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        solver(**{name: value})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "validation_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_count_of_fit_that_is_no_whole_number_from_1_is_refused(net, X, Y, name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be a whole number from 1, got {value!r}"):
        net.fit(X, Y, **{name: value})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "validation_every"])
def test_count_of_fit_may_be_a_numpy_integer(X, Y, name):
    settings = {"epochs": 2, "validation": (X, Y), "seed": 0}
    run, same = (make_net("numpy").fit(X, Y, **settings | {name: number}) for number in (np.int64(2), 2))
    np.testing.assert_array_equal(run.loss, same.loss)
    np.testing.assert_array_equal(run.validation_epochs, same.validation_epochs)


def test_clip_that_is_zero_in_the_dtype_of_the_net_is_refused(engine, X, Y):
    with pytest.raises(ValueError, match="clip must be positive, got 1e-50, which is 0 as a float32"):
        make_net(engine, dtype="float32").fit(X, Y, clip=1e-50)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (irnn.Adam(beta2=1 - 1e-9), r"decay rate 0\.999999999, which is 1 as a float32"),
        (irnn.RMSProp(decay=1 - 1e-9), r"decay rate 0\.999999999, which is 1 as a float32"),
        (irnn.Adam(epsilon=1e-50), "epsilon 1e-50, which is 0 as a float32"),
        (irnn.RMSProp(epsilon=1e-50), "epsilon 1e-50, which is 0 as a float32"),
    ],
    ids=str,
)
def test_option_of_an_optimiser_that_the_precision_of_the_net_rounds_to_what_it_must_not_be(engine, optimizer, message):
    net = irnn.Network(3, [irnn.Layer(5)], outputs=2, engine=engine, dtype="float32")
    with pytest.raises(ValueError, match=message):
        net.fit(np.zeros((2, 3)), np.zeros((2, 2)), epochs=1, optimizer=optimizer)


@pytest.mark.parametrize("make", [lambda net: net, lambda net: [net, "net"], lambda net: iter([net])])
def test_what_is_no_list_of_nets_is_refused(net, X, Y, make):
    with pytest.raises(TypeError, match=r"nets must be a list of Network, got .*net\.fit\(X, Y\)"):
        irnn.fit_many(make(net), X, Y)


def test_report_of_another_kind_is_refused(net, X, Y):
    with pytest.raises(TypeError, match=r"report is True; expected GradientReport\.empty\(12\)"):
        net.loss_and_gradient(X, Y, report=True)


@pytest.mark.parametrize(
    ("probe", "error"),
    [(True, TypeError), (1.0, TypeError), ("1", TypeError), (None, TypeError), (-1, ValueError), (2**63, ValueError)],
)
def test_probe_that_is_no_whole_number_from_0_is_refused(net, X, Y, probe, error):
    with pytest.raises(error, match=rf"probe must be a whole number from 0 below 2\*\*63, got {probe!r}$"):
        net.loss_and_gradient(X, Y, jacobian_penalty=0.1, probe=probe)


@pytest.mark.parametrize("state", [np.zeros((2, 99)), np.zeros(5), np.zeros((1, 2, 5)), [], 1.0])
def test_states_of_another_shape_are_not_read_out(net, state):
    with pytest.raises(ValueError, match=r"state has shape \(.*\); expected \(samples, \d+ neurons\)"):
        net.read_out(state)


def test_states_may_be_lists(net, X):
    state = net.equilibrium(X).state
    np.testing.assert_array_equal(net.read_out(state.tolist()), net.read_out(state))


@pytest.mark.parametrize("path", [None, 3, b"net.safetensors", ["net.safetensors"]])
def test_what_is_no_path_is_refused(net, path):
    for use in (net.save, irnn.load):
        with pytest.raises(TypeError, match=r"path is .*; expected a file name, as a string or a pathlib.Path"):
            use(path)


@pytest.mark.parametrize(
    ("nets", "message"),
    [
        (lambda net: [], "nets is empty"),
        (lambda net: [net, net], "nets has the same Network twice; expected one for each training"),
        (
            lambda net: [net, make_net("numpy", neurons=4)],
            r"the topology of nets\[0\] and nets\[1\] differ: Network\(.*",
        ),
        (
            lambda net: [net, make_net("numpy", dtype="float32")],
            r"same topology, dtype, engine and device, but the dtype of nets\[0\] and nets\[1\] differ: float64 and float32",
        ),
        pytest.param(lambda net: [net, make_net("julia")], "topology, dtype, engine", marks=pytest.mark.julia),
    ],
)
def test_nets_that_cannot_be_trained_together_are_refused(net, nets, message, X, Y):
    with pytest.raises(ValueError, match=message):
        irnn.fit_many(nets(net), X, Y)


def test_nothing_is_trained_if_an_argument_is_refused(net, X, Y):
    before = net.parameters.copy()
    with pytest.raises(ValueError, match="epochs"):
        net.fit(X, Y, epochs=0)
    np.testing.assert_array_equal(net.parameters, before)


# --- settings and parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"guard": None}, TypeError, r"guard is None; expected an object Guard\(\.\.\.\)"),
        ({"seed": -1}, ValueError, "seed must be a whole number from 0, got -1"),
        ({"seed": "a"}, TypeError, "seed must be a whole number from 0, got 'a'"),
        ({"seed": [1, 2]}, TypeError, r"seed must be a whole number from 0, got \[1, 2\]"),
        ({"seed": True}, TypeError, "seed must be a whole number from 0, got True"),
        ({"progress": "yes"}, TypeError, "progress must be True or False, got 'yes'"),
        ({"progress": 1}, TypeError, "progress must be True or False, got 1"),
        ({"progress": np.zeros(2)}, TypeError, r"progress must be True or False, got array\(\[0., 0.\]\)"),
        ({"callbacks": 3}, TypeError, "callbacks must be functions that are called with a Progress, got 3"),
        ({"callbacks": [print, None]}, TypeError, "callbacks must be functions .* got None"),
        ({"checkpoint": ""}, ValueError, "checkpoint is ''; expected a file name"),
        ({"checkpoint": "a\0b"}, ValueError, r"checkpoint is 'a\\x00b'; expected a file name"),
        ({"checkpoint": "a\ud800b"}, ValueError, r"checkpoint is 'a\\ud800b'; expected a file name"),
        *(({"clip": clip}, ValueError, "clip must be positive") for clip in (0, -1, np.nan)),
        *(({"clip": clip}, TypeError, "clip must be a number") for clip in ("1", [1.0], np.array([1.0]), True)),
        ({"clip": 10**400}, ValueError, r"clip must be a number below 1.8e\+308"),
        ({"sample_weights": [10**400] * 12}, ValueError, "sample_weights has whole numbers beyond"),
        ({"resume": ""}, ValueError, "resume is ''; expected a file name"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be a path or a Checkpoint, got 3"),
        ({"epochs": 2**31}, ValueError, r"epochs must be a whole number below 2\*\*31, got 2147483648"),
    ],
)
def test_setting_of_fit_that_makes_no_sense_is_refused_by_name(net, X, setting, error, message):
    with pytest.raises(error, match=message):
        net.fit(X, np.zeros((12, 2)), **{"epochs": 1, **setting})


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "constraint", [irnn.Free(), irnn.Perron(), irnn.InfNorm(), irnn.Spectral(), irnn.Monotone()], ids=lambda c: c.name
)
def test_recurrent_weights_that_are_not_finite_end_as_non_finite_and_are_named(engine, X, constraint, value):
    net = irnn.Network(3, [irnn.Layer(4)], outputs=2, constraint=constraint, engine=engine, seed=0)
    net.weights["R"][1, 2] = value
    with np.errstate(all="ignore"):
        with pytest.raises(irnn.ConvergenceError, match=r"non_finite.*check that net.parameters are finite"):
            net.predict(X)
        with pytest.raises(irnn.ConvergenceError, match=r"nan forward.*check that net.parameters are finite"):
            net.loss_and_gradient(X, np.zeros((12, 2)))
        with pytest.raises(irnn.ConvergenceError, match=r"nan forward.*check that net.parameters are finite"):
            net.jvp(X, X)
        assert np.isnan(net.spectral_radius(X, on_failure="ignore")).all()


def test_plane_is_not_drawn_of_a_net_without_two_inputs(net, X):
    with pytest.raises(ValueError, match="net has 3 inputs; expected 2"):
        plotting.decision_surface(net, None, X, np.zeros(12))


def test_samples_labelled_0_are_drawn_on_the_plane():
    ax = Figure().gca()
    net = irnn.Network(2, [irnn.Layer(2)], outputs=1, seed=0, engine="numpy")
    plotting.decision_surface(net, ax, np.eye(2), [0, 1], points=3)
    above, below = ax.collections[-2:]
    assert (above.get_offsets().tolist(), below.get_offsets().tolist()) == ([[0, 1]], [[1, 0]])


def test_small_plane_fills_its_axes():
    ax = Figure().gca()
    net = irnn.Network(2, [irnn.Layer(2)], outputs=1, seed=0, engine="numpy")
    plotting.decision_surface(net, ax, np.zeros((1, 2)), [1], reach=0.01, points=3)
    assert ax.get_xlim() == ax.get_ylim() == (-0.01, 0.01)


def test_weights_that_are_not_finite_are_not_drawn_and_small_ones_have_no_minus():
    ax = Figure().gca()
    net = irnn.Network(1, [irnn.Layer(1, lateral=False)], outputs=1, engine="numpy")
    net.weights["W"][...] = -0.001
    plotting.topology(net, ax)
    assert "0.00" in [text.get_text() for text in ax.texts]
    net.weights["W"][...] = np.nan
    with pytest.raises(ValueError, match="weights with NaN or infinity"):
        plotting.topology(net, ax)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"X": np.zeros((4, 3))}, r"X has shape \(4, 3\) and Y 4 targets"),
        ({"Y": np.zeros(3)}, r"X has shape \(4, 2\) and Y 3 targets; expected \(B, 2\) and B"),
        ({"points": 1}, "points must be 2 or more, got 1"),
        ({"points": -1}, "points must be a whole number from 1, got -1"),
        ({"reach": 0}, "reach must be positive and finite, got 0"),
    ],
)
def test_plane_that_cannot_be_drawn_is_refused(given, message):
    net = irnn.Network(2, [irnn.Layer(2)], outputs=1, engine="numpy")
    with pytest.raises(ValueError, match=message):
        plotting.decision_surface(net, None, **({"X": np.zeros((4, 2)), "Y": np.zeros(4)} | given))
