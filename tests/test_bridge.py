"""The bridge to Julia: no copies, no leaks, threads, and errors."""

from __future__ import annotations

import copy
import gc
import threading

import numpy as np
import pytest
from conftest import RunPython, make_net

import implicit_rnn as irnn
from implicit_rnn.engines.base import Samples, TrainerOptions
from implicit_rnn.engines.julia.calls import call
from implicit_rnn.runtime import environments, start

pytestmark = pytest.mark.julia


@pytest.fixture
def net() -> irnn.Network:
    return make_net("julia")


# --- memory is shared ----------------------------------------------------------------------------------------

ADDRESS = """
    let e = Base.get_extension(ImplicitRNN, :ImplicitRNNPythonCallExt)
        pyfunc = e.pyfunc
        x -> pyfunc(y -> e.borrow(v -> (v .*= 2; UInt(pointer(v))), nothing, e.NumPy{Float64}(y)))(x)
    end
"""


@pytest.fixture(scope="module")
def address_in_julia():
    """A Julia function that is lent an array by the bridge, doubles it in place and tells its address."""
    import juliacall

    start.entry_points()
    module = juliacall.newmodule("ImplicitRNNTests")
    module.seval("import ImplicitRNN")
    point = module.seval(ADDRESS)
    return lambda array: int(point(array))


@pytest.mark.parametrize("text", ["C:\\new\\table", '$HOME "quoted"', "Käse 😀"])
def test_text_reaches_julia_as_it_is(text: str):
    assert start.evaluate(environments.julia_string(text)) == text


def test_julia_works_in_the_memory_of_the_numpy_array(address_in_julia):
    array = np.arange(6.0)
    assert address_in_julia(array) == array.ctypes.data
    np.testing.assert_array_equal(array, 2 * np.arange(6.0))


def test_the_bridge_refuses_what_it_could_not_share(address_in_julia):
    with pytest.raises(Exception, match="contiguous"):
        address_in_julia(np.arange(12.0)[::2])


def test_gradient_is_written_by_julia_into_the_array_of_the_caller(net, X, Y):
    gradient = np.full(len(net.parameters), np.nan)
    net.program().gradient(net.parameters, Samples(X, Y), gradient, 0)
    np.testing.assert_array_equal(gradient, net.loss_and_gradient(X, Y)[1])


def test_equilibria_are_written_by_julia_into_the_arrays_of_the_caller(net, X):
    solution = irnn.Solution.empty(len(X), 5, net.dtype)
    state = solution.state
    state[...] = np.nan
    net.program().solve(net.parameters, X, None, solution)
    assert solution.state is state
    np.testing.assert_array_equal(state, net.equilibrium(X).state)


def test_training_writes_into_the_parameters_that_python_holds(net, X, Y):
    view, before = net.weights["R"], net.parameters.copy()
    net.fit(X, Y, epochs=3)
    assert np.shares_memory(view, net.parameters)
    assert np.abs(net.parameters - before).max() > 0


def test_result_stays_valid_after_julia_has_collected_its_garbage(net, X):
    solution = net.equilibrium(X)
    kept = copy.deepcopy(solution.state)
    start.evaluate("GC.gc()")
    net.equilibrium(3 * X)
    np.testing.assert_array_equal(solution.state, kept)


def test_products_are_written_by_julia_into_the_arrays_of_the_caller(net, X, Y):
    g, dX, tangent = np.full(len(net.parameters), np.nan), np.full_like(X, np.nan), np.full_like(Y, np.nan)
    net.program().vjp(net.parameters, X, None, Y, "outputs", g, dX)
    net.program().jvp(net.parameters, X, None, g, X, "outputs", tangent)
    for ours, theirs in zip((g, dX, tangent), (*net.vjp(X, Y), net.jvp(X, X, g)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_results_are_plain_numpy_arrays(net, X, Y):
    solution = net.equilibrium(X)
    loss, gradient = net.loss_and_gradient(X, Y)
    assert type(solution.state) is type(gradient) is np.ndarray
    assert type(loss) is float
    assert type(net.program().trainer(TrainerOptions(irnn.Adam(), 1, 12, np.inf, irnn.Guard())).state()) is np.ndarray


@pytest.mark.parametrize(
    "wrong",
    [
        [0.0],
        np.zeros(4, np.float32),
        np.zeros(4, np.int64),
        np.zeros((2, 2)),
        np.zeros(8)[::2],
        np.zeros(4).view(np.matrix),
    ],
    ids=["list", "float32", "integers", "two axes", "strided", "subclass"],
)
def test_memory_of_another_kind_than_was_agreed_is_not_read(net, wrong):
    with pytest.raises(irnn.EngineError, match="the bridge takes"):
        call("read_out", net.program()._handle.number, (net.parameters, wrong, np.empty(1)))


# --- nothing leaks -------------------------------------------------------------------------------------------

GROWTH = """
    import resource, sys
    import numpy as np
    import implicit_rnn as irnn

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20

    net = irnn.Network(8, [irnn.Layer(6)], outputs=2, seed=0, engine="julia")
    rng = np.random.default_rng(0)
    def work(calls):
        for _ in range(calls):
            X = rng.standard_normal((200, 8))  # 12.5 KiB: 122 MiB in all, if they were kept
            net.{call}
    work(2_000)  # two collections: their own memory is taken once
    before = resident()
    work(10_000)
    print(resident() - before)
"""


@pytest.mark.parametrize("call", ["loss_and_gradient(X, X[:, :2])", "predict(X)", "vjp(X, X[:, :2])"])
def test_memory_grows_by_less_than_20_megabytes_in_10000_calls(call, run_python: RunPython):
    done = run_python(GROWTH.format(call=call), timeout=90)
    assert done.returncode == 0, str(done)
    assert float(done.stdout) < 20


def alive() -> int:
    gc.collect()
    return int(call("alive"))  # which releases what was collected


def test_handles_are_released_with_their_networks(X, Y):
    before = alive()
    nets = [make_net("julia") for _ in range(5)]
    for net in nets:
        net.loss_and_gradient(X, Y)
    assert alive() == before + 10  # a workspace and a choice of options each
    del nets, net
    assert alive() == before


def test_handles_of_trainers_are_released_after_training(net, X, Y):
    net.fit(X, Y, epochs=1)
    before = alive()
    for _ in range(3):
        net.fit(X, Y, epochs=1)
    assert alive() == before


def test_networks_collected_on_another_thread_are_released(X):
    before = alive()
    nets = [make_net("julia") for _ in range(3)]
    for net in nets:
        net.predict(X)
    del net
    thread = threading.Thread(target=lambda: (nets.clear(), gc.collect()))
    thread.start()
    thread.join()
    assert alive() == before


def test_same_problem_is_compiled_once(net, X):
    net.predict(X)
    before = alive()
    for _ in range(3):
        net.predict(X)
    assert alive() == before


def test_fifty_tolerances_share_one_workspace_and_the_oldest_are_dropped(net, X, Y):
    before = alive()
    for k in range(50):
        net.loss_and_gradient(X, Y, solver=irnn.Picard(tol=1e-8 / (k + 1)))
    assert alive() <= before + 1 + 16
    expected = make_net("julia").loss_and_gradient(X, Y, solver=irnn.Picard(tol=1e-8))
    again = net.loss_and_gradient(X, Y, solver=irnn.Picard(tol=1e-8))
    assert again[0] == expected[0]
    np.testing.assert_array_equal(again[1], expected[1])


# --- threads -------------------------------------------------------------------------------------------------

THREADS = """
    import threading
    import numpy as np
    import implicit_rnn as irnn

    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((300, 8)), rng.standard_normal((300, 2))
    def results(seed):
        net = irnn.Network(8, [irnn.Layer(20)], outputs=2, seed=seed, engine="julia")
        first = net.predict(X), net.loss_and_gradient(X, Y)[1]
        net.fit(X, Y, epochs=10, batch_size=50)
        return *first, net.parameters

    expected = [results(seed) for seed in range(4)]
    found = {}
    threads = [threading.Thread(target=lambda s=s: found.update({s: [results(s) for _ in range(10)]})) for s in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    same = [all(np.array_equal(a, b) for a, b in zip(expected[s], r)) for s in range(4) for r in found[s]]
    print(len(same), all(same))
"""


def test_four_threads_at_once_get_the_results_of_one(run_python: RunPython):
    done = run_python(THREADS, timeout=60)
    assert (done.returncode, done.stdout) == (0, "40 True\n"), str(done)


START_BY_WORKER = """
    import threading
    import implicit_rnn as irnn

    def start():
        try:
            irnn.get_engine("julia")
        except irnn.EngineError as error:
            print(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    print(irnn.get_engine("julia").name)
"""


def test_start_by_a_worker_thread_is_refused_with_the_remedy(run_python: RunPython):
    done = run_python(START_BY_WORKER, timeout=60)
    refusal, engine = done.stdout.splitlines()
    assert "started by the main thread: call implicit_rnn.get_engine() there" in refusal
    assert engine == "julia"


GARBAGE = """
    import threading
    import numpy as np
    import implicit_rnn as irnn
    from implicit_rnn.runtime import start

    net = irnn.Network(8, [irnn.Layer(20)], outputs=2, seed=0, engine="julia")
    X = np.random.default_rng(0).standard_normal((300, 8))
    net.predict(X)
    def work():
        for _ in range(20):
            net.predict(X)
            start.evaluate("GC.gc()")
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    print("hangs" if thread.is_alive() else "done", flush=True)
    import os; os._exit(0)
"""


def test_julia_collects_its_garbage_on_a_worker_thread_without_a_hang(run_python: RunPython):
    done = run_python(GARBAGE, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), str(done)


# --- errors --------------------------------------------------------------------------------------------------


def test_julia_error_arrives_as_engine_error_with_its_first_line_and_the_traceback_of_julia():
    with pytest.raises(irnn.EngineError) as caught:
        call("state", 10**9)
    assert "KeyError" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Stacktrace" in caught.value.julia_traceback


def test_handle_is_read_while_python_is_locked(run_python: RunPython):
    """An error of Python's that is raised without the lock, here that the number is too large, ends the process."""
    code = """
        import numpy as np, implicit_rnn as irnn
        from implicit_rnn.engines.julia.calls import call
        for name, arguments in ("state", ()), ("restore", (np.zeros(1),)):
            try:
                call(name, 2**70, *arguments)
            except irnn.EngineError as error:
                print(name, "cannot convert" in str(error))
    """
    done = run_python(code)
    assert done.stdout == "state True\nrestore True\n", str(done)


def test_bridge_goes_on_working_after_an_error(net, X):
    expected = net.predict(X)
    with pytest.raises(irnn.EngineError):
        call("state", 10**9)
    np.testing.assert_array_equal(net.predict(X), expected)


def test_engine_error_that_does_not_come_from_julia_has_no_traceback_of_julia(X):
    with pytest.raises(irnn.EngineError) as caught:
        make_net("numpy").predict(X, solver=irnn.NLsolve())
    assert caught.value.julia_traceback is None


def test_engine_is_started_once():
    assert irnn.get_engine("julia") is irnn.get_engine("julia")
