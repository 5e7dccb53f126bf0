"""Networks on a device: what of it holds without one, and the device engine on the reference arrays of Julia's GPU packages."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from conftest import DEVICES, RunPython, check_device, has_julia_package

import implicit_rnn as irnn
from implicit_rnn.engines.julia.calls import call
from implicit_rnn.runtime import doctor, gpu, install, start
from implicit_rnn.runtime.environments import Environment

LAYERS = [irnn.Layer(6), irnn.Layer(4, "softplus")]


def network(**options) -> irnn.Network:
    return irnn.Network(3, LAYERS, outputs=2, feedback=True, seed=1, **options)


@pytest.fixture
def data(rng) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal((40, 3)), rng.standard_normal((40, 2))


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
    with pytest.raises(ValueError, match=r"device is 'gpu'; expected one of 'cpu', 'cuda', which is an NVIDIA card$"):
        act()


def test_an_unknown_device_is_no_fault_of_a_file(tmp_path):
    network().save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="device is 'gpu'"):
        irnn.load(tmp_path / "net.safetensors", device="gpu")


@pytest.fixture
def without_cuda(julia_environment: Environment) -> None:
    if has_julia_package("CUDA"):
        pytest.skip("CUDA.jl is in Julia's environment")


def test_without_cuda_the_error_says_what_to_do(without_cuda, data):
    for use in (
        lambda: network(device="cuda", engine="julia").predict(data[0]),
        lambda: irnn.root(KEPLER, [[1.0]], args=(1.0, 0.5), device="cuda"),
    ):
        with pytest.raises(irnn.EngineError, match=r'needs CUDA.jl, which is not in .*Pkg.add\("CUDA"\)'):
            use()


# --- the engine on device arrays -------------------------------------------------------------------------------


@pytest.fixture(params=DEVICES)
def device_name(request, monkeypatch) -> str:
    check_device(request.param)
    monkeypatch.setattr("implicit_rnn.engines.DEVICES", ("cpu", request.param))
    return request.param


@pytest.fixture
def pair(device_name) -> tuple[irnn.Network, irnn.Network]:
    """The same network on the CPU and on a device."""
    return network(engine="julia"), network(engine="julia", device=device_name)


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


def test_training_follows_that_of_the_cpu(pair, data):
    cpu, device = pair
    runs = [net.fit(*data, epochs=5, batch_size=16, seed=3, progress=False) for net in (cpu, device)]
    np.testing.assert_allclose(runs[1].loss, runs[0].loss, rtol=1e-7)
    np.testing.assert_allclose(device.parameters, cpu.parameters, atol=1e-7)
    with pytest.raises(irnn.CheckpointError, match=f"device is 'cpu' there and '{device.device}' here"):
        device.fit(*data, epochs=6, batch_size=16, seed=3, progress=False, resume=runs[0])


@pytest.mark.parametrize("solver", ["picard", "anderson", "newton", "chord"])
@pytest.mark.parametrize(
    "adjoint", [irnn.Implicit("lu"), irnn.Implicit("anderson"), irnn.JacobianFree(), irnn.Unrolled(4)]
)
def test_solvers_and_adjoints_are_those_of_the_cpu(pair, data, solver, adjoint):
    cpu, device = pair
    loss, gradient = cpu.loss_and_gradient(*data, solver=solver, adjoint=adjoint)
    found, computed = device.loss_and_gradient(*data, solver=solver, adjoint=adjoint)
    assert found == pytest.approx(loss, rel=1e-8)
    np.testing.assert_allclose(computed, gradient, atol=1e-8)


def test_many_nets_are_trained_as_on_the_cpu(pair, data):
    results = []
    for net in pair:
        nets = [irnn.Network.from_topology(net.topology, "float64", "julia", net.device) for _ in range(3)]
        for k, one in enumerate(nets):
            one.parameters[:] = net.parameters * (1 + 0.1 * k)
        runs = irnn.fit_many(nets, *data, epochs=4, batch_size=16, seed=3, progress=False)
        results.append(np.concatenate([one.parameters for one in nets] + [run.loss for run in runs]))
    np.testing.assert_allclose(results[1], results[0], atol=1e-8)


def test_a_run_resumed_on_the_device_is_the_run_not_interrupted(pair, data):
    whole, parted = pair[1], irnn.Network.from_topology(pair[1].topology, "float64", "julia", pair[1].device)
    parted.parameters[:] = whole.parameters
    options = {"batch_size": 16, "seed": 3, "progress": False, "optimizer": irnn.Adam(0.01)}
    whole.fit(*data, epochs=6, **options)
    first = parted.fit(*data, epochs=3, **options)
    parted.fit(*data, epochs=6, resume=first, **options)
    np.testing.assert_array_equal(parted.parameters, whole.parameters)


def test_what_a_device_does_not_offer_is_refused_by_name(pair, data):
    X, Y = data
    device = pair[1]
    with pytest.raises(irnn.EngineError, match="does not offer the solver NLsolve; choose Auto, Picard"):
        device.predict(X, solver="nlsolve")
    with pytest.raises(irnn.EngineError, match="does not offer Hessian-vector products"):
        device.hessian_vector_product(X, Y, device.parameters)


@pytest.mark.julia
def test_who_computes_on_the_cpu_loads_no_package_for_devices(run_python: RunPython):
    done = run_python(
        """
        import implicit_rnn as irnn, numpy as np
        irnn.Network(3, [irnn.Layer(4)], outputs=2, engine="julia").predict(np.zeros((5, 3)))
        import juliacall  # after the engine has chosen its Julia
        loaded = juliacall.Main.seval("join((p.name for p in keys(Base.loaded_modules)), ' ')").split()
        print(sorted({"KernelAbstractions", "GPUArrays", "JLArrays", "CUDA", "GPUCompiler"} & set(loaded)))
    """,
        timeout=300,
    )
    assert done.stdout.strip() == "[]", str(done)


# --- equations ------------------------------------------------------------------------------------------------

KEPLER = irnn.julia("(E, M, e) -> E .- e .* sin.(E) .- M")


@pytest.fixture
def orbits(rng) -> tuple[np.ndarray, np.ndarray]:
    return rng.uniform(0, 6, 300), rng.uniform(0, 0.9, 300)


def test_an_equation_on_the_device_has_the_solution_and_the_derivatives_of_the_cpu(device_name, orbits, rng):
    M, _ = orbits
    here, there = (
        irnn.root(KEPLER, M[:, None], args=orbits, batched=("M", "e"), device=name) for name in ("cpu", device_name)
    )
    np.testing.assert_allclose(there.value, here.value, rtol=1e-10)
    np.testing.assert_array_equal(there.status, here.status)
    np.testing.assert_array_equal(there.iterations, here.iterations)
    v = rng.standard_normal((300, 1))
    for solution in (there, pickle.loads(pickle.dumps(there))):
        for name, product in here.vjp(v).items():
            np.testing.assert_allclose(solution.vjp(v)[name], product, rtol=1e-8)
        np.testing.assert_allclose(solution.jacobian("e"), here.jacobian("e"), rtol=1e-8)
    shared = irnn.root(KEPLER, M[:, None], args=(M, 0.5), batched="M", device=device_name)
    expected = irnn.root(KEPLER, M[:, None], args=(M, 0.5), batched="M").vjp(v)["e"]
    assert shared.vjp(v)["e"] == pytest.approx(expected, rel=1e-8)


def test_what_a_device_does_not_offer_of_equations_is_refused_by_name(device_name):
    half = irnn.julia("z -> z ./ 2")
    with pytest.raises(irnn.EngineError, match="does not offer the solver Anderson for equations; choose Auto, Picard"):
        irnn.fixed_point(half, np.ones((5, 2)), solver="anderson", device=device_name)
    with pytest.raises(ValueError, match=r"f returned .*\(3,\)"):
        irnn.fixed_point(irnn.julia("z -> [z[1], z[2], z[1]]"), np.ones((5, 2)), device=device_name)


def test_a_python_function_cannot_run_on_a_device():
    with pytest.raises(ValueError, match="a Python function cannot run on device='cuda'; write it as Julia code"):
        irnn.root(lambda z: z, [[1.0]], device="cuda")
    with pytest.raises(ValueError, match=r"device is 'gpu'; expected one of 'cpu', 'cuda', which is an NVIDIA card$"):
        irnn.root(KEPLER, [[1.0]], args=(1.0, 0.5), device="gpu")


# --- the command, and what goes wrong --------------------------------------------------------------------------


def test_the_self_test_of_a_device_compares_it_with_the_cpu(device_name):
    report = gpu.self_test(device_name, sizes=((8, 32),))
    assert report["ok"]
    assert set(report["differences"]) == {"float64", "float32"}
    assert set(report["differences"]["float32"]) == {"states", "gradient", "fit", "equation"}
    assert set(report["gradient, ms"]["8 x 32"]) == {"cpu", device_name}
    library = {"jl": "JLArrays.jl", "cuda": "CUDA.jl"}[device_name]
    assert library in gpu.describe(device_name)


def test_doctor_says_why_there_is_no_gpu(without_cuda):
    report = doctor.diagnose(gpu=True)
    assert "needs CUDA.jl" in report["gpu"]
    assert "implicit-rnn setup --cuda" in report["gpu self-test"]
    assert not report["ok"]


def test_setup_with_cuda_adds_it_to_the_project(monkeypatch, fake_julia):
    exe, project = fake_julia()
    commands: list[list[str]] = []
    monkeypatch.setattr(install, "run", lambda command, env=None: commands.append(command) or len(commands) > 1)
    monkeypatch.setattr(install, "cause", lambda: "no network")
    environment = Environment(exe, project, "a test")
    gpu.add_cuda(environment)
    assert commands[0][:2] == [exe, f"--project={project}"]
    assert 'name = "CUDA"' in commands[0][-1]
    with pytest.raises(irnn.EngineError, match=r"CUDA.jl could not be added to .*: no network"):
        gpu.add_cuda(environment)


def test_too_little_memory_on_the_card_is_a_memory_error(monkeypatch):
    class JuliaError(Exception):
        pass

    def solve() -> None:
        raise JuliaError("Out of GPU memory trying to allocate 8.000 GiB\nStacktrace:")

    monkeypatch.setattr(start, "entry_points", lambda: {"solve": solve})
    monkeypatch.setattr(start, "interruptible", lambda point, arguments: point(*arguments))
    with pytest.raises(MemoryError, match=r"allocate 8.000 GiB; take smaller batches, or device='cpu'"):
        call("solve")
