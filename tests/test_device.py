"""Networks on a device: what of it holds without one, and the device engine on the reference arrays of Julia's GPU packages."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest

import implicit_rnn as irnn
from implicit_rnn.runtime import start

LAYERS = [irnn.Layer(6), irnn.Layer(4, "softplus")]


def network(**options) -> irnn.Network:
    return irnn.Network(3, LAYERS, outputs=2, feedback=True, seed=1, **options)


@pytest.fixture
def data(rng) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal((40, 3)), rng.standard_normal((40, 2))


def has_package(name: str) -> bool:
    return bool(start.evaluate(f'Base.find_package("{name}") !== nothing'))


# --- the name of the device ------------------------------------------------------------------------------------


def test_a_network_keeps_its_device(tmp_path):
    net = network(device="cuda")
    net.save(tmp_path / "net.safetensors")
    assert net.device == "cuda"
    assert pickle.loads(pickle.dumps(net)).device == "cuda"
    assert irnn.load(tmp_path / "net.safetensors").device == "cuda"
    assert irnn.load(tmp_path / "net.safetensors", device="cpu").device == "cpu"
    assert repr(net).endswith("float64 on cuda)")


def test_to_changes_the_device_from_the_next_call_on(data):
    net = network(engine="numpy")
    before = net.predict(data[0])
    assert net.to("cuda") is net
    with pytest.raises(irnn.EngineError, match="CPU only; device='cuda'"):
        net.predict(data[0])
    np.testing.assert_array_equal(net.to("cpu").predict(data[0]), before)


@pytest.mark.parametrize("act", [lambda: network(device="gpu"), lambda: network().to("gpu")])
def test_an_unknown_device_is_refused_with_those_there_are(act):
    with pytest.raises(ValueError, match="device is 'gpu'; expected one of 'cpu', 'cuda'"):
        act()


def test_an_unknown_device_is_no_fault_of_a_file(tmp_path):
    network().save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="device is 'gpu'"):
        irnn.load(tmp_path / "net.safetensors", device="gpu")


@pytest.mark.julia
def test_without_cuda_the_error_says_what_to_do(data):
    if has_package("CUDA"):
        pytest.skip("CUDA.jl is in Julia's environment")
    with pytest.raises(irnn.EngineError, match=r'needs CUDA.jl, which is not in .*Pkg.add\("CUDA"\)'):
        network(device="cuda", engine="julia").predict(data[0])


# --- the engine on device arrays -------------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch) -> Iterator[tuple[irnn.Network, irnn.Network]]:
    """The same network on the CPU and on the reference device arrays."""
    if not has_package("JLArrays"):
        pytest.skip("JLArrays.jl is not in Julia's environment")
    monkeypatch.setattr("implicit_rnn.network.DEVICES", ("cpu", "jl"))
    return network(engine="julia"), network(engine="julia", device="jl")


@pytest.mark.julia
def test_states_gradients_and_products_are_those_of_the_cpu(pair, data):
    X, Y = data
    cpu, device = pair
    here, there = cpu.equilibrium(X), device.equilibrium(X)
    assert there.converged.all()
    np.testing.assert_allclose(there.state, here.state, atol=1e-9)
    assert (np.abs(there.state - here.state).max(axis=1) <= there.bound + here.bound).all()
    loss, gradient = cpu.loss_and_gradient(X, Y, loss="huber", sample_weights=np.linspace(0.5, 1.5, 40))
    found, computed = device.loss_and_gradient(X, Y, loss="huber", sample_weights=np.linspace(0.5, 1.5, 40))
    assert found == pytest.approx(loss, rel=1e-9)
    np.testing.assert_allclose(computed, gradient, atol=1e-9)
    for expected, product in zip(cpu.vjp(X, Y), device.vjp(X, Y), strict=True):
        np.testing.assert_allclose(product, expected, atol=1e-8)
    np.testing.assert_allclose(device.jvp(X, X), cpu.jvp(X, X), atol=1e-8)
    np.testing.assert_allclose(device.spectral_radius(X), cpu.spectral_radius(X), rtol=1e-7)


@pytest.mark.julia
def test_training_follows_that_of_the_cpu(pair, data):
    cpu, device = pair
    runs = [net.fit(*data, epochs=5, batch_size=16, seed=3, progress=False) for net in (cpu, device)]
    np.testing.assert_allclose(runs[1].loss, runs[0].loss, rtol=1e-7)
    np.testing.assert_allclose(device.parameters, cpu.parameters, atol=1e-7)
    with pytest.raises(irnn.CheckpointError, match="device is 'cpu' there and 'jl' here"):
        device.fit(*data, epochs=6, batch_size=16, seed=3, progress=False, resume=runs[0])


@pytest.mark.julia
def test_what_a_device_does_not_offer_is_refused_by_name(pair, data):
    X, Y = data
    device = pair[1]
    with pytest.raises(irnn.EngineError, match="does not offer the solver Newton; choose Auto or Picard"):
        device.predict(X, solver="newton")
    with pytest.raises(irnn.EngineError, match="does not offer the adjoint Unrolled"):
        device.loss_and_gradient(X, Y, adjoint=irnn.Unrolled(3))
    with pytest.raises(irnn.EngineError, match="does not offer Hessian-vector products"):
        device.hessian_vector_product(X, Y, device.parameters)
