"""Arrays in the memory of a device: what is read of them, what is refused, and that none is copied.

Without a card the memory of the machine stands for that of a card: a class that says where NumPy's memory lies as CuPy says it of
a card's, and DLPack's arrays on the CPU, on networks whose device is that of the reference arrays of Julia's GPU packages.
"""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
from conftest import CHECKOUT, check_device

import implicit_rnn as irnn
from implicit_rnn import device_arrays, dlpack
from implicit_rnn.device_arrays import EVERYTHING, NOTHING, DeviceArray, as_device_array
from implicit_rnn.runtime import start
from implicit_rnn.runtime.environments import Environment

STREAM = 7


class OnCard:
    """An array as CuPy has them: here of NumPy's memory."""

    def __init__(self, array: np.ndarray, **different: Any) -> None:
        self.array, self.different = array, different

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        usual = {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, True),
            "strides": None,
            "stream": STREAM,
            "version": 3,
        }
        given = usual | self.different
        return {key: value for key, value in given.items() if value != "absent"}


class ByDLPack:
    """An array as other libraries have them, of NumPy's memory."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> object:
        return self.array.__dlpack__()


# --- what is read ----------------------------------------------------------------------------------------------


def test_an_array_is_read_where_it_lies():
    array = np.arange(12.0).reshape(4, 3)
    for producer in (OnCard(array), OnCard(array, strides=array.strides), OnCard(array, shape=[4, 3]), ByDLPack(array)):
        found = as_device_array("X", producer, "jl")
        assert (found.address, found.shape, found.dtype) == (array.ctypes.data, (4, 3), np.dtype("float64"))
        assert (len(found), found.ndim, found.size, found.reshape(-1).shape) == (4, 2, 12, (12,))


def test_strides_count_where_there_is_more_than_one_entry():
    column = np.arange(12.0).reshape(4, 3)[:, :1].copy()
    assert as_device_array("X", OnCard(column, strides=(8, 1000)), "jl").shape == (4, 1)
    assert as_device_array("X", ByDLPack(np.zeros((1, 3))[:, ::1]), "jl").shape == (1, 3)


@pytest.mark.parametrize(
    ("said", "stream"),
    [
        ({}, STREAM),
        ({"stream": None}, NOTHING),
        ({"stream": "absent"}, NOTHING),
        ({"stream": 1}, 1),
        ({"version": 2, "stream": "absent"}, EVERYTHING),  # which PyTorch has
    ],
)
def test_the_stream_of_the_producer_is_known(said, stream):
    assert as_device_array("X", OnCard(np.zeros((4, 3)), **said), "jl").stream == stream


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"data": "absent"}, TypeError, "__cuda_array_interface__ of X has no data"),
        ({"version": 4}, TypeError, "version 4; expected one up to 3"),
        ({"version": "3"}, TypeError, "version '3'"),
        ({"mask": object()}, TypeError, "X is masked"),
        ({"shape": (4, -3)}, TypeError, r"shape \(4, -3\); expected a tuple of sizes"),
        ({"shape": 12}, TypeError, "shape 12"),
        ({"typestr": "<f9"}, TypeError, "typestr '<f9'.*; expected a type such as '<f4'"),
        ({"data": 17}, TypeError, "data 17"),
        ({"data": (0, True)}, ValueError, r"shape \(4, 3\) and no memory"),
        ({"strides": (8, 32)}, ValueError, r"strides \(1, 4\) in entries; expected \(3, 1\).*contiguous"),
        ({"strides": (24,)}, TypeError, "expected 2 multiples of 8"),
        ({"strides": (24, 4)}, TypeError, "expected 2 multiples of 8"),
        ({"stream": 0}, TypeError, "stream 0; expected None, 1, 2 or the handle of a stream"),
        ({"stream": "s"}, TypeError, "stream 's'"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(said, error, message):
    with pytest.raises(error, match=message):
        as_device_array("X", OnCard(np.zeros((4, 3)), **said), "jl")


def test_what_dlpack_cannot_say_is_refused_by_name():
    with pytest.raises(ValueError, match=r"strides \(1, 4\) in entries"):
        as_device_array("X", ByDLPack(np.zeros((3, 4)).T), "jl")
    with pytest.raises(TypeError, match="X has dtype int64; expected float32 or float64"):
        as_device_array("X", ByDLPack(np.zeros((3, 4), np.int64)), "jl")
    with pytest.raises(ValueError, match=r"X is on card 1.*CUDA_VISIBLE_DEVICES"):
        as_device_array("X", ByDLPack(np.zeros((3, 4)), (2, 1)), "cuda")


def test_what_is_somewhere_else_is_not_read():
    array = np.zeros((4, 3))
    assert as_device_array("X", array, "jl") is None
    assert as_device_array("X", array.tolist(), "jl") is None
    assert as_device_array("X", OnCard(array), "cpu") is None
    assert as_device_array("X", ByDLPack(array), "cuda") is None  # it is in host memory
    assert as_device_array("X", ByDLPack(array, (2, 0)), "jl") is None
    for producer in (array, OnCard(array), ByDLPack(array)):
        assert device_arrays.is_on_device(producer, "jl") == (as_device_array("X", producer, "jl") is not None)


# --- what is given out -----------------------------------------------------------------------------------------


def test_a_result_on_a_card_has_the_interface_of_cupy():
    result = DeviceArray("cuda", 4096, (4, 3), np.dtype("float32"), NOTHING, None)
    assert result.__cuda_array_interface__ == {
        "shape": (4, 3),
        "typestr": "<f4",
        "data": (4096, False),
        "strides": None,
        "stream": None,
        "version": 3,
    }
    assert result.__dlpack_device__() == (2, 0)
    with pytest.raises(TypeError, match=r"in the memory of a device; its method numpy\(\) copies"):
        np.asarray(result)


def test_a_result_is_exported_by_dlpack_and_kept_as_long_as_it_is_used():
    memory = np.arange(12.0).reshape(4, 3)
    result = DeviceArray("jl", memory.ctypes.data, (4, 3), memory.dtype, NOTHING, memory)
    taken = np.from_dlpack(result)
    assert taken.ctypes.data == memory.ctypes.data
    np.testing.assert_array_equal(taken, memory)
    result.__dlpack__()  # a capsule that nobody takes
    assert [kept[-1] is memory for kept in dlpack._exported.values()] == [True]
    del taken
    gc.collect()
    assert not dlpack._exported
    with pytest.raises(BufferError, match="without a copy"):
        result.__dlpack__(copy=True)


# --- networks --------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(julia_environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference device arrays are a device, "jl", which reads and writes the memory that it is lent."""
    check_device("jl")
    monkeypatch.setattr("implicit_rnn.engines.DEVICES", ("cpu", "jl"))
    start.evaluate(
        f'isdefined(Main, :AWAITED) || include(raw"{CHECKOUT / "julia" / "test" / "device_memory.jl"}"); empty!(AWAITED)'
    )


@pytest.fixture
def nets(reference: None) -> tuple[irnn.Network, irnn.Network]:
    """The same network on the CPU and on the reference device arrays."""
    cpu, device = (
        irnn.Network(3, [irnn.Layer(6), 4], feedback=True, outputs=2, seed=1, engine="julia") for _ in range(2)
    )
    return cpu, device.to("jl")


def awaited() -> set[int]:
    return set(start.evaluate("copy(AWAITED)"))


@pytest.mark.parametrize("producer", [OnCard, ByDLPack])
def test_a_device_array_in_gives_a_device_array_out(nets, X, Y, producer):
    cpu, device = nets
    x, y = producer(X), producer(Y)
    there = device.equilibrium(x)
    assert isinstance(there.state, DeviceArray)
    assert there.converged.all()
    np.testing.assert_allclose(there.state.numpy(), cpu.equilibrium(X).state, atol=1e-9)
    np.testing.assert_allclose(device.read_out(there.state).numpy(), cpu.predict(X), atol=1e-9)
    np.testing.assert_allclose(np.from_dlpack(device.predict(x, z0=there.state)), cpu.predict(X), atol=1e-9)
    loss, gradient = device.loss_and_gradient(x, y, sample_weights=np.arange(1.0, 13))
    expected, along = cpu.loss_and_gradient(X, Y, sample_weights=np.arange(1.0, 13))
    assert loss == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(gradient, along, atol=1e-9)
    g, dX = device.vjp(x, y, z0=there.state)
    for found, exact in zip((g, dX.numpy()), cpu.vjp(X, Y), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-8)
    np.testing.assert_allclose(device.jvp(x, x).numpy(), cpu.jvp(X, X), atol=1e-8)
    np.testing.assert_allclose(device.jvp(x, dparameters=g).numpy(), cpu.jvp(X, dparameters=g), atol=1e-8)
    np.testing.assert_allclose(device.spectral_radius(x), cpu.spectral_radius(X), rtol=1e-7)
    assert awaited() - {EVERYTHING} == ({STREAM} if producer is OnCard else set())


def test_numpy_arrays_and_those_of_the_device_can_be_mixed(nets, X, Y):
    cpu, device = nets
    assert isinstance(device.predict(X), np.ndarray)
    for x, y in ((X, ByDLPack(Y)), (ByDLPack(X), Y)):
        np.testing.assert_allclose(device.loss_and_gradient(x, y)[1], cpu.loss_and_gradient(X, Y)[1], atol=1e-9)
        dX = device.vjp(x, y)[1]
        np.testing.assert_allclose(dX if x is X else dX.numpy(), cpu.vjp(X, Y)[1], atol=1e-8)


def test_nothing_is_written_to_what_is_lent(nets, X, Y):
    x, y, start_ = X.copy(), Y.copy(), np.zeros((12, 10))
    nets[1].vjp(OnCard(x), OnCard(y), z0=OnCard(start_))
    nets[1].fit(OnCard(x), OnCard(y), epochs=2, batch_size=5, progress=False)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    assert not start_.any()


def test_weights_and_validation_data_of_the_device_count_as_numpy_arrays_do(nets, X, Y):
    cpu, device = nets
    w = np.arange(1.0, 13)
    found = device.loss_and_gradient(OnCard(X), OnCard(Y), sample_weights=OnCard(w))
    expected = device.loss_and_gradient(OnCard(X), OnCard(Y), sample_weights=w)
    assert found[0] == expected[0]
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[0] == pytest.approx(cpu.loss_and_gradient(X, Y, sample_weights=w)[0], rel=1e-9)
    again = pickle.loads(pickle.dumps(device))
    options = {"epochs": 3, "batch_size": 5, "progress": False}
    run = device.fit(X, Y, sample_weights=ByDLPack(w), validation=(OnCard(X), ByDLPack(Y), OnCard(w)), **options)
    same = again.fit(X, Y, sample_weights=w, validation=(X, Y, w), **options)
    np.testing.assert_array_equal(run.loss, same.loss)
    np.testing.assert_array_equal(run.validation_loss, same.validation_loss)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_training_on_arrays_of_the_device_is_that_on_numpy_arrays(nets, X, Y, optimizer):
    device = nets[1]
    again = pickle.loads(pickle.dumps(device))
    options = {"epochs": 4, "batch_size": 5, "seed": 2, "validation": (X, Y), "progress": False, "optimizer": optimizer}
    if optimizer == "lbfgs":
        options["batch_size"] = None
    run, same = device.fit(OnCard(X), ByDLPack(Y), **options), again.fit(X, Y, **options)
    np.testing.assert_array_equal(run.loss, same.loss)
    np.testing.assert_array_equal(device.parameters, again.parameters)
    device.fit(X, OnCard(Y), **options | {"epochs": 6}, resume=run)  # the same data, wherever they are


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_targets_on_the_device_are_checked_as_others_are(nets, X, Y, loss):
    cpu, device = nets
    good = np.eye(2)[np.arange(12) % 2]
    found = device.loss_and_gradient(OnCard(X), OnCard(good), loss=loss)[0]
    assert found == pytest.approx(cpu.loss_and_gradient(X, good, loss=loss)[0], rel=1e-9)
    with pytest.raises(ValueError, match="Y"):
        device.loss_and_gradient(OnCard(X), OnCard(Y), loss=loss)


def test_bad_arrays_of_the_device_are_refused_as_others_are(nets, X, Y):
    device = nets[1]
    with pytest.raises(ValueError, match=r"X has shape \(12, 2\); expected \(samples, 3\)"):
        device.predict(OnCard(Y))
    with pytest.raises(ValueError, match="X has no samples"):
        device.predict(OnCard(X[:0]))
    with pytest.raises(ValueError, match="Y has 11 samples, X has 12"):
        device.loss_and_gradient(OnCard(X), OnCard(Y[:11].copy()))
    with pytest.raises(TypeError, match=r"X has dtype float32, the network float64.*convert it there"):
        device.predict(OnCard(X.astype(np.float32)))
    bad = X.copy()
    bad[4:6, 1] = np.nan
    with pytest.raises(ValueError, match="X has NaN or infinity in 2 of 12 samples, first in sample 4"):
        device.predict(ByDLPack(bad))
    with pytest.raises(TypeError, match=r"sample_weights has dtype int64, the network float64.*convert it there"):
        device.loss_and_gradient(X, Y, sample_weights=OnCard(np.ones(12, np.int64)))
    with pytest.raises(ValueError, match=r"sample_weights has shape \(11,\); expected \(12,\)"):
        device.loss_and_gradient(OnCard(X), OnCard(Y), sample_weights=OnCard(np.ones(11)))
    with pytest.raises(TypeError, match=r"validation\[0\] has dtype float32, the network float64.*convert it there"):
        device.fit(X, Y, validation=(OnCard(X.astype(np.float32)), Y), epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"validation\[1\] has 11 samples, validation\[0\] has 12"):
        device.fit(X, Y, validation=(OnCard(X), ByDLPack(Y[:11].copy())), epochs=1, progress=False)
    with pytest.raises(TypeError, match=r"Y has dtype float32, the network float64.*convert it there"):
        device.loss_and_gradient(X, OnCard(Y.astype(np.float32)), loss=irnn.CustomLoss(squared))


def squared(y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert type(y) is type(t) is np.ndarray
    return ((y - t) ** 2).mean(axis=1), (y - t) * 2 / y.shape[1]


def test_a_loss_of_ones_own_is_given_copies_in_the_memory_of_the_machine(nets, X, Y):
    device, own = nets[1], irnn.CustomLoss(squared)
    again, expected = pickle.loads(pickle.dumps(device)), nets[0].loss_and_gradient(X, Y)
    for x, y in ((OnCard(X), ByDLPack(Y)), (X, OnCard(Y)), (ByDLPack(X), Y)):
        loss, gradient = device.loss_and_gradient(x, y, loss=own)
        assert loss == pytest.approx(expected[0], rel=1e-9)
        np.testing.assert_allclose(gradient, expected[1], atol=1e-9)
    options = {"epochs": 3, "batch_size": 5, "progress": False, "validation": (OnCard(X), OnCard(Y))}
    run, same = device.fit(OnCard(X), OnCard(Y), loss=own, **options), again.fit(X, Y, **options)
    np.testing.assert_allclose(run.loss, same.loss, rtol=1e-7)
    np.testing.assert_allclose(run.validation_loss, same.validation_loss, rtol=1e-7)


def test_the_memory_of_results_is_returned(nets, X):
    device = nets[1]
    gc.collect()
    device.predict(X)
    kept = start.entry_points()["alive"]()
    results = [device.predict(OnCard(X)) for _ in range(3)]
    assert start.entry_points()["alive"]() >= kept + 3
    del results
    gc.collect()
    device.predict(X)
    assert start.entry_points()["alive"]() <= kept
    assert EVERYTHING in awaited()  # before it is freed


def test_an_array_of_the_device_is_not_pickled(nets, X):
    with pytest.raises(TypeError, match=r"cannot be pickled; its method numpy\(\) copies it"):
        pickle.dumps(nets[1].predict(OnCard(X)))


def test_a_layer_of_torch_works_in_the_memory_of_its_tensors(nets, X):
    torch = pytest.importorskip("torch")
    from implicit_rnn.torch import ImplicitRNN

    results = []
    for net in nets:
        for of in ("outputs", "state"):
            layer, x = ImplicitRNN(net, of=of), torch.tensor(X, requires_grad=True)
            y = layer(x)
            (y**2).sum().backward()
            results.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    for here, there in zip(results[:2], results[2:], strict=True):
        for expected, found in zip(here, there, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


def test_arrays_of_a_card_on_a_network_of_the_cpu_are_refused_with_the_remedy():
    net = irnn.Network(3, [irnn.Layer(4)], outputs=2, engine="numpy")
    with pytest.raises(TypeError, match=r"X is a OnCard in the memory of a GPU.*; copy it to a NumPy array first"):
        net.predict(OnCard(np.zeros((4, 3))))


def test_an_engine_without_devices_says_so_rather_than_reading_the_array():
    net = irnn.Network(3, [irnn.Layer(4)], outputs=2, engine="numpy", device="cuda")
    with pytest.raises(irnn.EngineError, match="cuda"):
        net.predict(OnCard(np.zeros((4, 3))))


# --- equations -------------------------------------------------------------------------------------------------

KEPLER = irnn.julia("(E, M, e) -> E .- e .* sin.(E) .- M")
PLANE = irnn.julia("(z, a, s, k) -> [s[1] * z[1] - z[2]^2 - a[1], z[1] * z[2] + s[2] * z[k] - a[2]]")


@pytest.fixture
def orbits(rng) -> tuple[np.ndarray, np.ndarray]:
    return rng.uniform(0, 6, 40), rng.uniform(0, 0.9, 40)


def agree(there: irnn.ImplicitSolution, here: irnn.ImplicitSolution, v: np.ndarray, tol: float) -> None:
    """On the device is what is expected of the CPU: the value, and the derivatives along v by all arguments."""
    assert isinstance(there.value, DeviceArray)
    assert there.value.shape == here.value.shape
    np.testing.assert_allclose(there.value.numpy(), here.value, atol=tol)
    np.testing.assert_array_equal(there.status, here.status)
    for cotangent in (v, OnCard(v)):
        found, expected = there.vjp(cotangent), here.vjp(v)
        assert list(found) == list(expected)
        for name in expected:
            assert found[name].shape == expected[name].shape
            np.testing.assert_allclose(found[name].numpy(), expected[name], atol=tol)
            np.testing.assert_allclose(there.jacobian(name).numpy(), here.jacobian(name), atol=tol)


@pytest.mark.parametrize("producer", [OnCard, ByDLPack])
def test_an_equation_of_device_arrays_has_its_solution_and_derivatives_on_the_device(reference, orbits, rng, producer):
    M, e = orbits
    here = irnn.root(KEPLER, M[:, None], args=orbits, batched=("M", "e"))
    z0 = M[:, None].copy()
    there = irnn.root(KEPLER, producer(z0), args=(producer(M), producer(e)), batched=("M", "e"), scale=2.0, device="jl")
    agree(there, here, rng.standard_normal((40, 1)), 1e-9)
    np.testing.assert_array_equal(z0, M[:, None])  # the solution is in memory of its own
    assert awaited() - {EVERYTHING} == {STREAM}
    again = irnn.root(KEPLER, there.value, args=orbits, batched=("M", "e"), device="jl")  # a result is a start
    assert again.iterations.max() <= 2


@pytest.mark.parametrize(("dtype", "tol"), [("float64", 1e-8), ("float32", 1e-3)])
def test_arguments_of_an_equation_may_be_on_the_device_or_not(reference, rng, dtype, tol):
    z0, a, v = (rng.uniform(1, 2, (30, 2)).astype(dtype) for _ in range(3))
    s = np.array([2, 0.5], dtype)
    here = irnn.root(PLANE, z0, args=(a, s, 2), batched="a", on_failure="ignore")
    v *= here.converged[:, None]
    for start_, own, shared in ((z0, OnCard(a), s), (z0, a, OnCard(s)), (OnCard(z0), a, s)):
        there = irnn.root(PLANE, start_, args=(own, shared, 2), batched="a", on_failure="ignore", device="jl")
        agree(there, here, v, tol)
    numpy = irnn.root(PLANE, z0, args=(a, s, 2), batched="a", on_failure="ignore", device="jl")
    for cotangent in (v, OnCard(v)):  # NumPy in, NumPy out
        np.testing.assert_allclose(numpy.vjp(cotangent)["s"], here.vjp(v)["s"], atol=tol)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_single_equation_of_device_arrays_keeps_its_shape(reference, shape):
    cosine, z0, a = irnn.julia("(z, a) -> cos.(a .* z)"), np.full(shape, 0.5), np.full(shape, 0.8)
    here = irnn.fixed_point(cosine, z0, args=(a,))
    there = irnn.fixed_point(cosine, OnCard(z0), args=(OnCard(a),), device="jl")
    agree(there, here, np.ones(shape), 1e-9)


def test_arguments_on_the_device_are_read_where_they_lie_as_long_as_there_is_the_solution(reference, orbits):
    M, e = (array.copy() for array in orbits)
    producer = OnCard(e)
    solution = irnn.root(KEPLER, OnCard(M[:, None].copy()), args=(M, producer), batched=("M", "e"), device="jl")
    kept = weakref.ref(producer)
    del producer
    gc.collect()
    assert kept() is not None
    e[:] = 0  # which is why they must not be written to: the equation is E = M now
    np.testing.assert_array_equal(solution.jacobian("M").numpy(), np.ones((40, 1, 1)))
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(solution)
    del solution
    gc.collect()
    assert kept() is None


def test_samples_of_device_arrays_without_a_solution_have_no_derivative(reference):
    square, a = irnn.julia("(z, a) -> z .^ 2 .- a"), np.array([1.0, 0.0, 4.0, -1.0])
    solution = irnn.root(
        square, OnCard(np.ones((4, 1))), args=(OnCard(a),), batched="a", on_failure="ignore", device="jl"
    )
    np.testing.assert_array_equal(solution.converged, [True, True, True, False])
    v = np.array([[1.0], [0.0], [1.0], [0.0]])
    np.testing.assert_allclose(solution.vjp(OnCard(v))["a"].numpy(), [1 / 2, 0, 1 / 4, 0])
    with pytest.raises(irnn.ConvergenceError, match=r"1 of 4 samples did not converge \(first sample 3\)"):
        solution.vjp(OnCard(np.ones((4, 1))))
    with pytest.raises(irnn.ConvergenceError, match="singular at the solution of sample 1"):
        solution.vjp(OnCard(np.ones((4, 1)) - (np.arange(4) == 3)[:, None]))


def test_bad_device_arrays_of_an_equation_are_refused_as_others_are(reference, orbits):
    M, e = orbits
    z0, options = M[:, None].copy(), {"batched": ("M", "e"), "device": "jl"}
    bad = z0.copy()
    bad[4:6] = np.nan
    with pytest.raises(ValueError, match="z0 has NaN or infinity in 2 of 40 samples, first in sample 4"):
        irnn.root(KEPLER, OnCard(bad), args=orbits, **options)
    with pytest.raises(ValueError, match=r"z0 has shape \(1, 40, 1\); expected"):
        irnn.root(KEPLER, OnCard(z0[None]), args=orbits, **options)
    for producer in (OnCard, ByDLPack):
        with pytest.raises(TypeError, match="z0 has dtype int64; expected float32 or float64"):
            irnn.root(KEPLER, producer(z0.astype(np.int64)), args=orbits, **options)
    with pytest.raises(ValueError, match=r"z0 of shape \(2, 40\) has the strides \(1, 2\).*contiguous"):
        irnn.root(KEPLER, ByDLPack(np.ones((40, 2)).T), args=orbits, **options)
    with pytest.raises(TypeError, match=r"e has dtype float32, z0 float64.*convert it there"):
        irnn.root(KEPLER, z0, args=(M, OnCard(e.astype(np.float32))), **options)
    with pytest.raises(ValueError, match=r"e has shape \(39,\); expected \(40, ...\)"):
        irnn.root(KEPLER, z0, args=(M, OnCard(e[:39].copy())), **options)
    with pytest.raises(irnn.EngineError, match=r"number 1 is an array of 4 entries, 2 axes"):
        irnn.root(irnn.julia("(z, A) -> A * z"), np.ones((3, 2)), args=(OnCard(np.eye(2)),), device="jl")
    solution = irnn.root(KEPLER, OnCard(z0), args=orbits, **options)
    with pytest.raises(ValueError, match=r"v has shape \(40,\); expected \(40, 1\)"):
        solution.vjp(OnCard(M))
    with pytest.raises(TypeError, match=r"v has dtype float32, the solution float64.*convert it there"):
        solution.vjp(OnCard(z0.astype(np.float32)))
    with pytest.raises(ValueError, match="v has NaN or infinity"):
        solution.vjp(OnCard(bad))


def test_an_equation_on_an_engine_without_devices_says_so_rather_than_reading_the_array():
    with pytest.raises(irnn.EngineError, match="Julia code runs on the Julia engine only"):
        irnn.root(KEPLER, OnCard(np.ones((4, 1))), args=(1.0, 0.5), engine="numpy", device="cuda")


def test_an_equation_of_torch_is_solved_and_differentiated_in_the_memory_of_its_tensors(reference, orbits):
    torch = pytest.importorskip("torch")
    from implicit_rnn.torch import root

    results = []
    for f, device in ((KEPLER, "jl"), (lambda E, M, e: E - e * torch.sin(E) - M, "cpu")):
        M, e = (torch.tensor(array, requires_grad=True) for array in orbits)
        before = len(dlpack._exported)
        z = root(f, M.detach()[:, None], args=(M, e), batched=("M", "e"), device=device)
        (z**2).sum().backward()
        assert len(dlpack._exported) - before == (3 if device == "jl" else 0)  # all three in memory of the engine's
        results.append([z.detach(), M.grad, e.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_an_equation_of_torch_takes_integers_numbers_and_one_problem_to_the_device(reference):
    torch = pytest.importorskip("torch")
    from implicit_rnn.torch import fixed_point

    a = torch.tensor(0.8, requires_grad=True)
    cosine = irnn.julia("(z, a, k) -> cos.(a .* z) ./ k")
    z = fixed_point(cosine, torch.tensor([0.5]), args=(a, 1), scale=2.0, device="jl")
    z.sum().backward()
    assert z.item() == pytest.approx(0.801418, rel=1e-5)
    assert a.grad.item() == pytest.approx(-0.324205, rel=1e-4)


def test_an_equation_of_jax_is_solved_on_the_device_by_way_of_the_machine(reference, orbits):
    jax = pytest.importorskip("jax", minversion="0.8")  # enable_x64
    from implicit_rnn.jax import root

    M, e = orbits
    expected = irnn.root(KEPLER, M[:, None], args=orbits, batched=("M", "e"))
    with jax.enable_x64(True):

        def total(e):
            return (root(KEPLER, M[:, None], args=(M, e), batched=("M", "e"), device="jl") ** 2).sum()

        for wrap in (lambda function: function, jax.jit):
            value, gradient = wrap(jax.value_and_grad(total))(e)
            assert value == pytest.approx((expected.value**2).sum(), rel=1e-9)
            np.testing.assert_allclose(gradient, expected.vjp(2 * expected.value)["e"], rtol=1e-7)
