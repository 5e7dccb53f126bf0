"""Julia with one thread and with two: Ctrl-C, SIGTERM, Python threads, equal results, in processes of their own."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import ENVIRONMENT, Finished, RunPython, run_process

import implicit_rnn as irnn
from implicit_rnn.runtime import threads

LIMIT = 3.0
"""Seconds from Ctrl-C to KeyboardInterrupt; 0.1 where nothing else keeps the machine busy."""

SCENARIOS = """
import concurrent.futures, gc, hashlib, json, os, signal, sys, threading, time
import numpy as np
import implicit_rnn as irnn
from implicit_rnn.runtime import start

irnn.get_engine("julia")
rng = np.random.default_rng(0)
X, Y = rng.standard_normal((2100, 3)), rng.standard_normal((2100, 2))
report = {"threads": start.evaluate("Threads.nthreads()"), "interrupted": {}, "after": {}}

def make(**settings):
    return irnn.Network(3, [irnn.Layer(40)], outputs=2, seed=1, engine="julia", **settings)

def digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()

# Equal results, whatever the threads.
net = make()
state, (loss, gradient) = net.equilibrium(X).state, net.loss_and_gradient(X, Y)
run = net.fit(X, Y, epochs=2, batch_size=700, progress=False)
products = *make().vjp(X, Y), make().jvp(X, X, gradient)
report["digest"] = [digest(state), digest(gradient), digest(net.parameters, run.loss), digest(*products)]

# Ctrl-C.
def press_ctrl_c():
    time.sleep(0.5)
    global pressed
    pressed = time.perf_counter()
    os.kill(os.getpid(), signal.SIGINT)

def interrupt(name, call):
    threading.Thread(target=press_ctrl_c).start()
    try:
        call()
        report["interrupted"][name] = None
        time.sleep(1)
    except KeyboardInterrupt:
        report["interrupted"][name] = time.perf_counter() - pressed

wavering = irnn.Network(1, [irnn.Layer(1)], outputs=[0], constraint=irnn.Free(), engine="julia")
wavering.weights["W"][...], wavering.weights["R"][...] = 1.0, -3.0
forever = dict(solver=irnn.Picard(max_iterations=10**9), on_failure="ignore")
interrupt("equilibrium", lambda: wavering.equilibrium(np.full((2100, 1), 0.1), **forever))
report["after"]["equilibrium"] = digest(make().equilibrium(X).state) == report["digest"][0]
interrupt("gradient", lambda: wavering.loss_and_gradient(np.full((2100, 1), 0.1), Y[:, :1], **forever))
report["after"]["gradient"] = digest(make().loss_and_gradient(X, Y)[1]) == report["digest"][1]
net = make()
interrupt("fit", lambda: net.fit(X, Y, epochs=10**7, batch_size=700, progress=False))
moved = (net.parameters != make().parameters).any() and np.isfinite(net.parameters).all()
again = make()
run = again.fit(X, Y, epochs=2, batch_size=700, progress=False)
report["after"]["fit"] = bool(moved) and digest(again.parameters, run.loss) == report["digest"][2]
f = irnn.julia("z -> -3 .* tanh.(z) .+ 0.1")
interrupt("generic", lambda: irnn.fixed_point(f, np.ones((500, 2)), **forever))
root = irnn.fixed_point(irnn.julia("z -> cos.(z)"), np.ones((3, 1))).value
report["after"]["generic"] = bool(np.abs(np.cos(root) - root).max() < 1e-8)

# A handler of the user's own decides what Ctrl-C does; the call is not cut short.
seen = []
signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
limited = irnn.Picard(max_iterations=20_000_000)
solution = wavering.equilibrium([[0.1]], solver=limited, on_failure="ignore")
report["own handler"] = [seen, int(solution.iterations[0]) == limited.max_iterations]
signal.signal(signal.SIGINT, signal.default_int_handler)

# Four Python threads at once, while garbage is collected on both sides.
def work(k):
    net, right = make(), 0
    for _ in range(20):
        part = slice(k * 500, k * 500 + 500)
        gradient = net.loss_and_gradient(X[part], Y[part])[1]
        right += np.array_equal(gradient, expected[k])
        gc.collect()
    return right

expected = [make().loss_and_gradient(X[k * 500 : k * 500 + 500], Y[k * 500 : k * 500 + 500])[1] for k in range(4)]
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    futures = [pool.submit(work, k) for k in range(4)]
    while not all(future.done() for future in futures):
        start.evaluate("GC.gc()")
    report["right"] = [future.result() for future in futures]
print(json.dumps(report))
"""


@dataclass(frozen=True)
class Scenarios:
    process: Finished
    report: dict[str, Any]


@functools.cache
def scenarios(threads: int) -> Scenarios:
    """What came of the scenarios above in a Julia with so many threads, run once."""
    env = ENVIRONMENT | {"IMPLICIT_RNN_THREADS": str(threads)}
    process = run_process([sys.executable, "-X", "faulthandler", "-c", SCENARIOS], env, timeout=240)
    lines = process.stdout.splitlines()
    return Scenarios(process, json.loads(lines[-1]) if lines else {})


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def done(request: pytest.FixtureRequest) -> Scenarios:
    return scenarios(request.param)


@pytest.mark.julia
class TestOneAndTwoThreads:
    def test_process_ends_normally(self, done: Scenarios):
        assert done.process.returncode == 0, str(done.process)

    def test_setting_is_followed(self, request, done: Scenarios):
        assert done.report["threads"] == request.node.callspec.params["done"]

    @pytest.mark.parametrize("call", ["equilibrium", "gradient", "fit", "generic"])
    def test_ctrl_c_stops_a_long_call(self, done: Scenarios, call: str):
        delay = done.report["interrupted"][call]
        assert delay is not None, "the call came to its end"
        assert delay < LIMIT

    @pytest.mark.parametrize("call", ["equilibrium", "gradient", "fit", "generic"])
    def test_next_call_after_ctrl_c_is_right(self, done: Scenarios, call: str):
        assert done.report["after"][call]

    def test_handler_of_the_user_decides_what_ctrl_c_does(self, done: Scenarios):
        assert done.report["own handler"] == [[signal.SIGINT], True]

    def test_python_threads_at_once_get_right_results_while_garbage_is_collected(self, done: Scenarios):
        assert done.report["right"] == [20] * 4


@pytest.mark.julia
@pytest.mark.parametrize("what", [0, 1, 2, 3], ids=["equilibrium", "gradient", "fit", "products"])
def test_results_do_not_depend_on_the_number_of_threads(what: int):
    assert scenarios(1).report["digest"][what] == scenarios(2).report["digest"][what]


@pytest.mark.julia
def test_sigterm_ends_a_process_in_the_middle_of_a_call():
    code = """
import implicit_rnn as irnn
net = irnn.Network(1, [irnn.Layer(1)], outputs=[0], constraint=irnn.Free(), engine="julia")
net.weights["W"][...], net.weights["R"][...] = 1.0, -3.0
net.equilibrium([[0.1]], solver=irnn.Picard(max_iterations=10), on_failure="ignore")
print("ready", flush=True)
net.equilibrium([[0.1]], solver=irnn.Picard(max_iterations=2**31 - 1), on_failure="ignore")
"""
    env = ENVIRONMENT | {"IMPLICIT_RNN_THREADS": "2"}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=20) == -signal.SIGTERM
        finally:
            process.kill()


@pytest.mark.julia
def test_signals_reach_the_handlers_of_the_user(run_python: RunPython):
    code = """
        import os, signal, time
        import implicit_rnn as irnn
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # which the tests' own process, where Julia runs, has handed down
        seen, numbers = [], [signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM]
        for number in numbers:
            signal.signal(number, lambda number, frame: seen.append(number))
        irnn.get_engine("julia")
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        print(seen == numbers)
    """
    done = run_python(code, ENVIRONMENT | {"IMPLICIT_RNN_THREADS": "2"})
    assert done.stdout == "True\n", str(done)


# --- settings ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("IMPLICIT_RNN_THREADS", "PYTHON_JULIACALL_THREADS", "JULIA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, f"{threads.usable_cores()} (usable cores)"),
        ({"IMPLICIT_RNN_THREADS": "3", "JULIA_NUM_THREADS": "5"}, "3 (IMPLICIT_RNN_THREADS)"),
        ({"IMPLICIT_RNN_THREADS": "3", "PYTHON_JULIACALL_THREADS": "5"}, "5 (PYTHON_JULIACALL_THREADS)"),
        ({"IMPLICIT_RNN_THREADS": "", "JULIA_NUM_THREADS": "5"}, "5 (JULIA_NUM_THREADS)"),
    ],
)
def test_order_of_the_settings(no_settings, settings, expected):
    for name, value in settings.items():
        no_settings.setenv(name, value)
    assert threads.setting() == expected


@pytest.mark.parametrize(
    ("cores", "given", "expected"), [(2, "", "2"), (3, "", "3"), (2, "1", "1"), (1, "", ""), (4, "", "")]
)
def test_few_cores_all_precompile(no_settings, cores, given, expected):
    no_settings.setenv("JULIA_IMAGE_THREADS", given)
    no_settings.setattr(threads, "usable_cores", lambda: cores)
    assert (os.environ | threads.precompilation_settings())["JULIA_IMAGE_THREADS"] == expected


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "auto", " 2", "²"])
def test_bad_number_of_threads_is_refused(no_settings, value):
    no_settings.setenv("IMPLICIT_RNN_THREADS", value)
    with pytest.raises(ValueError, match=r"IMPLICIT_RNN_THREADS is .*expected a whole number from 1"):
        threads.setting()


@pytest.mark.parametrize("name", ["JULIA_NUM_THREADS", "PYTHON_JULIACALL_THREADS"])
@pytest.mark.parametrize("value", ["0", "many", "1,0,0", "1,1,1", "99999"])
def test_threads_that_would_make_julia_end_the_process_are_refused(no_settings, name, value):
    no_settings.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is '{value}'; expected a whole number from 1 to 9999 or 'auto'"):
        irnn.get_engine("auto")


@pytest.mark.parametrize("value", ["auto", "auto,1", "2,1", "2,0", "9999", "2 "])
def test_threads_in_the_words_of_julia_are_taken(no_settings, value):
    no_settings.setenv("JULIA_NUM_THREADS", value)
    assert threads.setting() == f"{value.removesuffix(',0')} (JULIA_NUM_THREADS)"


def test_bad_number_of_threads_is_no_reason_to_fall_back(run_python: RunPython):
    code = "import implicit_rnn as irnn; irnn.Network(1, [irnn.Layer(1)], outputs=1).predict([[1.0]])"
    done = run_python(code, ENVIRONMENT | {"IMPLICIT_RNN_THREADS": "many"})
    assert "ValueError: IMPLICIT_RNN_THREADS is 'many'; expected a whole number from 1" in done.stderr, str(done)


def test_doctor_tells_of_a_bad_number_of_threads(run_cli: RunPython):
    done = run_cli("doctor", env=ENVIRONMENT | {"IMPLICIT_RNN_THREADS": "many"})
    assert done.returncode == 1
    assert "not available: IMPLICIT_RNN_THREADS is 'many'" in done.stdout, str(done)


@pytest.mark.julia
def test_several_threads_without_julia_s_signal_handlers_are_refused(run_python: RunPython):
    env = ENVIRONMENT | {"IMPLICIT_RNN_THREADS": "2", "PYTHON_JULIACALL_HANDLE_SIGNALS": "no"}
    done = run_python("import implicit_rnn as irnn; irnn.get_engine('julia')", env)
    assert "EngineError: PYTHON_JULIACALL_HANDLE_SIGNALS=no lets Julia crash" in done.stderr, str(done)


def test_running_julia_that_would_crash_is_refused(no_settings):
    with pytest.raises(threads.EngineError, match=r"already started in this process, with 4 threads but without"):
        threads.check_running({"opt_handle_signals": None}, 4)


def test_running_julia_with_another_number_of_threads_is_reported(no_settings):
    no_settings.setenv("IMPLICIT_RNN_THREADS", "4")
    with pytest.warns(threads.EngineWarning, match=r"with 1 thread, so IMPLICIT_RNN_THREADS=4 has no effect"):
        threads.check_running({"opt_handle_signals": None}, 1)


def test_running_julia_is_taken_as_it_is_where_nothing_was_asked_for(no_settings, recwarn):
    threads.check_running({"opt_handle_signals": "yes"}, 4)
    assert not recwarn.list


def test_engine_works_in_a_julia_started_before(run_python: RunPython, given_julia):
    code = """
        import warnings
        import juliacall
        import implicit_rnn as irnn
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            irnn.Network(1, [irnn.Layer(1)], outputs=1, engine="julia").predict([[1.0]])
        print([str(w.message).split(";")[0] for w in caught])
    """
    done = run_python(code, given_julia | {"IMPLICIT_RNN_THREADS": "2"}, timeout=120)
    assert done.stdout.strip() == str(
        ["Julia was already started in this process with 1 thread, so IMPLICIT_RNN_THREADS=2 has no effect"]
    ), str(done)


def test_julia_started_before_with_several_threads_and_its_signal_handlers_is_used(run_python: RunPython, given_julia):
    code = """
        import juliacall
        import implicit_rnn as irnn
        engine = irnn.get_engine("julia").name
        print(engine, juliacall.Main.seval("Threads.nthreads()"))
    """
    settings = {"PYTHON_JULIACALL_THREADS": "2", "PYTHON_JULIACALL_HANDLE_SIGNALS": "yes"}
    done = run_python(code, given_julia | settings, timeout=120)
    assert done.stdout == "julia 2\n", str(done)


SLEEPING = "(z, a) -> (ccall(:sleep, Cuint, (Cuint,), 60); z - a)"
COMPUTE = {
    "a fit, which is stopped": "net.fit(X, X, epochs=10**9, progress=False)",
    "what cannot be stopped": f"irnn.root(irnn.julia('{SLEEPING}'), [1.0], args=(0.0,), engine='julia')",
}


@pytest.mark.skipif(os.name != "posix", reason="sleep of POSIX")
@pytest.mark.parametrize("what", COMPUTE)
def test_process_whose_daemon_thread_computes_ends_as_any(run_python: RunPython, given_julia, what):
    code = f"""
        import atexit, sys, threading, time
        import numpy as np
        import implicit_rnn as irnn
        from implicit_rnn.runtime import start
        def told():  # after Julia's end
            thread.join(0.5)
            print(thread.is_alive())
        atexit.register(told)
        net = irnn.Network(2, [irnn.Layer(2)], outputs=2, engine="julia")
        X = np.eye(2)
        net.predict(X)
        start.SECONDS_TO_STOP = 2.0
        thread = threading.Thread(target=lambda: {COMPUTE[what]}, daemon=True)
        thread.start()
        time.sleep(1)
        sys.exit(3)
    """
    done = run_python(code, given_julia, timeout=30)
    expected = "False\n" if what == "a fit, which is stopped" else "True\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, expected, ""), str(done)


INTERRUPTED = {
    "as PythonCall starts": """
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "fractions":  # which PythonCall imports
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Finder())
    """,
    "as the package is loaded": """
        receive = start.receive
        def interrupted(points, arguments):
            start.receive = receive
            os.kill(os.getpid(), signal.SIGINT)
            receive(points, arguments)
        start.receive = interrupted
    """,
}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("when", INTERRUPTED)
def test_ctrl_c_at_the_start_is_an_interrupt_and_the_next_start_succeeds(run_python: RunPython, given_julia, when):
    begin = """
        import os, signal, sys
        import implicit_rnn as irnn
        from implicit_rnn.runtime import start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    """
    end = """
        try:
            irnn.get_engine()
        except KeyboardInterrupt:
            print("interrupted")
        print(irnn.get_engine().name, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    """
    done = run_python(begin + INTERRUPTED[when] + end, given_julia | {"IMPLICIT_RNN_THREADS": "1"}, timeout=120)
    assert done.stdout == "interrupted\njulia True\n", str(done)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_library_that_resets_the_handlers_of_signals_does_not_make_julia_crash(run_python, given_julia):
    """As Ray does when it shuts down; collections stop a thread that computes."""
    code = """
        import signal
        import implicit_rnn as irnn
        from implicit_rnn.runtime import start
        irnn.get_engine("julia")
        for handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGSEGV, handler)
            start.evaluate(
                "begin busy = Threads.@spawn sum(sin, 1:10^8); for _ in 1:20; GC.gc(); end; fetch(busy); nothing end"
            )
        print("alive")
    """
    done = run_python(code, given_julia | {"IMPLICIT_RNN_THREADS": "2"})
    assert done.stdout == "alive\n", str(done)
