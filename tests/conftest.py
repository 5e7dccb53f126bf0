"""What the tests share: the two engines, Python processes of their own, and the count of the tests that need Julia."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import implicit_rnn as irnn
from implicit_rnn.engines.julia import JuliaEngine
from implicit_rnn.engines.julia.network import JuliaNetwork
from implicit_rnn.runtime import environments, gpu, start
from implicit_rnn.runtime.environments import Environment

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What Julia and JAX compile in the tests they optimise less, in less time; the package as its first use compiled it stays so.
os.environ.setdefault("PYTHON_JULIACALL_OPTIMIZE", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Before Julia is started here, which changes it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "IMPLICIT_RNN_ENGINE"}
NOWHERE = "http://127.0.0.1:9"
CHECKOUT = Path(__file__).parent.parent

# What a shell starts in the background ignores Ctrl-C, which some tests send to themselves and to processes of theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# --- Julia or no Julia ---------------------------------------------------------------------------------------


@functools.cache
def why_no_julia() -> str | None:
    try:
        irnn.get_engine("julia")
    except irnn.EngineError as error:
        return str(error)
    return None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start Julia before the first test, since its sources may have to be compiled, which no test should wait for."""
    if any(item.get_closest_marker("julia") for item in session.items) and not session.config.option.collectonly:
        why_no_julia()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "julia: the test needs the Julia engine")
    config.addinivalue_line("markers", "device: the test runs on the reference device arrays of Julia's GPU packages")
    config.addinivalue_line("markers", "cuda: the test runs on an NVIDIA card, where the machine has one and CUDA.jl")
    config.addinivalue_line("markers", "slow: the test takes minutes, and is run only with --slow")
    if config.option.numprocesses:  # workers share the cores, on which threads that wait for each other would spin
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Who takes the environment of Julia needs Julia."""
    if "julia_environment" in getattr(item, "fixturenames", ()):
        item.add_marker("julia")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.option.slow:
        pytest.skip("takes minutes; run by --slow")
    if item.get_closest_marker("julia") is None:
        return
    if reason := why_no_julia():
        pytest.skip(f"{NEEDS_JULIA}{reason}")


NEEDS_JULIA = "needs Julia: "


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests needed Julia, also those of the workers of pytest-xdist."""
    stats = terminalreporter.stats
    reasons = [str(report.longrepr[2]) for report in stats.get("skipped", ()) if isinstance(report.longrepr, tuple)]
    skipped = [reason.split(NEEDS_JULIA)[1] for reason in reasons if NEEDS_JULIA in reason]
    ran = [report for name in ("passed", "failed") for report in stats.get(name, ()) if report.when == "call"]
    needed = sum("julia" in report.keywords for report in ran)
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests need Julia and were SKIPPED: {skipped[0]}")
    elif needed:
        terminalreporter.write_line(f"{needed} tests needed Julia and were run with it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The modules that take longest first, so that with ``-n`` no worker is at one of them when the others are done."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


LONGEST = ("test_julia_package", "test_vjp", "test_threads")


SHARED_WITH_DEVICES = ("test_layered", "test_losses", "test_vjp")
"""The modules whose tests run a third time on the reference device arrays, where Julia has them; others take long there."""

DEVICES = [pytest.param("jl", marks=(pytest.mark.julia, pytest.mark.device))]
"""The reference device arrays, and a card where the machine has the driver of one."""
if shutil.which("nvidia-smi"):
    DEVICES.append(pytest.param("cuda", marks=(pytest.mark.julia, pytest.mark.device, pytest.mark.cuda)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = any("engine" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "engine" in metafunc.fixturenames and not chosen:
        engines = ["numpy", pytest.param("julia", marks=pytest.mark.julia)]
        if metafunc.module.__name__ in SHARED_WITH_DEVICES:
            engines += DEVICES
        metafunc.parametrize("engine", engines, indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each engine in turn; for a device the Julia engine, with networks on it."""
    if request.param in ("numpy", "julia"):
        return str(request.param)
    check_device(request.param)
    monkeypatch.setattr(
        JuliaEngine, "compile", lambda self, topology, dtype, device: JuliaNetwork(topology, dtype, request.param)
    )
    return "julia"


def check_device(name: str) -> None:
    """Skip where Julia lacks the package of a device, or the device does not work."""
    if name == "jl" and not has_julia_package("JLArrays"):
        pytest.skip("JLArrays.jl is not in Julia's environment")
    if name == "cuda" and (card := gpu.describe()).startswith("not available"):
        pytest.skip(card)


def has_julia_package(name: str) -> bool:
    """Whether it is in the environment of the running Julia."""
    return bool(start.evaluate(f'Base.find_package("{name}") !== nothing'))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """What a device refuses by name is nothing to be tested there."""
    try:
        return (yield)
    except irnn.EngineError as error:
        if item.get_closest_marker("device") and "a device does not offer" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def julia_environment() -> Environment:
    """The Julia and the project that the engine of this machine uses."""
    import juliacall

    return Environment(
        str(juliacall.Main.seval("joinpath(Sys.BINDIR, Base.julia_exename())")),
        str(juliacall.Main.seval("dirname(Base.active_project())")),
        "the running Julia",
    )


PREFERENCES = """
[extras]
ImplicitRNN = "74eb9529-a41d-4f8c-83e4-0ae849b485fd"

[preferences.ImplicitRNN]
precompile_workload = false
"""


FIND = """
project = Base.load_path_expand(ARGS[1])
manifest = project === nothing ? nothing : Base.project_file_manifest_path(project)
manifest === nothing || print(get(Base.parsed_toml(manifest), "julia_version", "unknown"), " ", dirname(project))
"""


@pytest.fixture
def other_environment(julia_environment: Environment) -> Callable[[str], Path]:
    """The folder of another Julia environment, by its entry in a load path; versions of packages hold for one Julia only."""

    def find(entry: str) -> Path:
        found = run_process([julia_environment.exe, "--startup-file=no", "-e", FIND, entry], ENVIRONMENT).stdout
        if not found:
            pytest.skip(f"this machine has no Julia environment {entry}")
        version, folder = found.split(" ", 1)
        running = str(start.evaluate("string(VERSION)"))
        if version.split(".")[:2] != running.split(".")[:2]:
            pytest.skip(f"the environment {entry} is one of Julia {version}, and this is Julia {running}")
        return Path(folder)

    return find


@pytest.fixture
def other_packages(
    tmp_path: Path, other_environment: Callable[[str], Path]
) -> Callable[[str], tuple[Path, dict[str, str]]]:
    """Julia's shared environment ``@implicit-rnn-NAME``, and settings with which little is compiled for it and nothing kept.

    "lower" has the oldest packages that are accepted, "newest" the newest PythonCall.
    """

    def find(name: str) -> tuple[Path, dict[str, str]]:
        project = other_environment(f"@implicit-rnn-{name}")
        (tmp_path / "preferences").mkdir()
        (tmp_path / "preferences" / "Project.toml").write_text(PREFERENCES)
        depots = str(start.evaluate(f'join(DEPOT_PATH, "{os.pathsep}")'))
        load_path = ["@", str(tmp_path / "preferences"), str(CHECKOUT / "julia"), "@stdlib"]
        settings = {
            "JULIA_DEPOT_PATH": os.pathsep.join([str(tmp_path / "depot"), depots]),
            "JULIA_LOAD_PATH": os.pathsep.join(load_path),
        }
        return project, ENVIRONMENT | settings

    return find


def read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


# --- data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20101056)


@pytest.fixture(name="X")
def samples(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((12, 3))


@pytest.fixture(name="Y")
def targets(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((12, 2))


@pytest.fixture
def net(engine: str) -> irnn.Network:
    return make_net(engine)


OF_A_NUMBER = pytest.mark.parametrize(
    "f",
    [
        lambda z, a: z**3 + z - a,
        lambda z, a: (z**3 + z - a)[None],
        pytest.param(irnn.julia("(z, a) -> z.^3 .+ z .- a"), marks=pytest.mark.julia),
    ],
    ids=["number", "one entry", "julia"],
)
"""Tests of an equation of one number in another library: z³ + z = a, by functions of a number and in Julia code."""


def make_net(engine: str | None, activation: str = "tanh", neurons: int = 5, **settings: object) -> irnn.Network:
    """A net of one layer for the data above, with nonzero scales and biases."""
    settings = {"outputs": 2, "seed": 7} | settings
    net = irnn.Network(3, [irnn.Layer(neurons, activation)], engine=engine, **settings)  # type: ignore[arg-type]
    extra = np.random.default_rng(8)
    for name in sorted({"a", "b", "d"} & set(net.weights)):
        net.weights[name][...] = 0.3 * extra.standard_normal(net.weights[name].shape)
    return net


def make_neuron(engine: str | None, r: float, activation: str = "tanh", w: float = 1.0) -> irnn.Network:
    """One free neuron z = f(w x + r z)."""
    net = irnn.Network(1, [irnn.Layer(1, activation)], outputs=[0], constraint=irnn.Free(), engine=engine)
    net.weights["W"][...], net.weights["R"][...] = w, r
    return net


def make_bistable(engine: str | None) -> irnn.Network:
    """One neuron z = tanh(x + 2 z), which has equilibria on both sides of zero."""
    return make_neuron(engine, 2.0)


def make_oscillating(engine: str | None) -> irnn.Network:
    """One neuron z = tanh(x - 3 z): Picard iteration oscillates for ever for small x, and converges for x = 5."""
    return make_neuron(engine, -3.0)


def make_overflowing(engine: str | None) -> irnn.Network:
    """Two free neurons z = relu(x + R z), of which the second overflows for a large second input, and rests at 0 for none."""
    net = irnn.Network(2, [irnn.Layer(2, "relu")], outputs=1, constraint=irnn.Free(), engine=engine)
    net.weights["W"][...], net.weights["R"][...] = [[1, 0], [0, 1e200]], [[0, 0], [0, 1e200]]
    net.weights["C"][...] = 1.0
    return net


def derivative_along(net: irnn.Network, direction: np.ndarray, value: Callable[[float], Any], h: float) -> Any:
    """The derivative of ``value(t)`` at t = 0, where the parameters move along with t: by central differences of fourth order."""
    start, values = net.parameters.copy(), []
    for t in (-2 * h, -h, h, 2 * h):
        net.parameters = start + t * direction
        values.append(value(t))
    net.parameters = start
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)


# --- processes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    def __str__(self) -> str:
        return f"exit status {self.returncode} after {self.seconds:.1f} s\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


def run_process(
    command: list[str], env: Mapping[str, str], timeout: float = 60, cwd: str | Path | None = None
) -> Finished:
    """Run a command with exactly that environment; a process that outlives its time limit fails the test."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=timeout, cwd=cwd)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{command} still ran after {timeout} s; stdout {error.stdout!r}, stderr {error.stderr!r}")
    return Finished(done.returncode, done.stdout, done.stderr, time.perf_counter() - begin)


RunPython = Callable[..., Finished]


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Run a Python snippet in a process of its own, away from the checkout."""

    def run(code: str, env: Mapping[str, str] = ENVIRONMENT, timeout: float = 60) -> Finished:
        return run_process([sys.executable, "-c", textwrap.dedent(code)], env, timeout, tmp_path)

    return run


@pytest.fixture
def run_cli(tmp_path: Path) -> RunPython:
    """Run the command implicit-rnn in a process of its own, away from the checkout."""

    def run(*arguments: str, env: Mapping[str, str] = ENVIRONMENT, timeout: float = 60) -> Finished:
        return run_process([sys.executable, "-m", "implicit_rnn", *arguments], env, timeout, tmp_path)

    return run


@pytest.fixture
def fresh_machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds no network, no prepared Julia and nothing that juliapkg installed."""
    home = tmp_path / "home"
    home.mkdir()
    env = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("PYTHON_JULIA", "JULIA"))}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), NOWHERE)
    places = {"HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"), "XDG_DATA_HOME": str(home / "data")}
    return env | proxies | places | {"no_proxy": "", "PYTHON_JULIAPKG_PROJECT": str(home / "juliapkg")}


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """The file of a certificate for 127.0.0.1 that nobody has signed but itself, and that of its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl, which makes the certificate")
    file, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    done = run_process(["openssl", *request, *names, "-keyout", str(key), "-out", str(file)], ENVIRONMENT)
    assert done.returncode == 0, str(done)
    return file, key


@pytest.fixture
def given_julia(tmp_path: Path, julia_environment: Environment) -> dict[str, str]:
    """The environment of a process to which Julia is given by PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT."""
    return ENVIRONMENT | {
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "PYTHON_JULIACALL_EXE": julia_environment.exe,
        "PYTHON_JULIACALL_PROJECT": julia_environment.project,
    }


@pytest.fixture
def no_prepared_julia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For calls in this process: a user's folder in which no Julia was prepared; its path."""
    for name in [name for name in os.environ if name.startswith("PYTHON_JULIA")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


@pytest.fixture
def fake_julia(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Make a Julia executable and a project, with PythonCall of juliacall's version, that only look like ones: (exe, project)."""

    def make(python_call: str | None = None, without: tuple[str, ...] = ()) -> tuple[str, str]:
        exe, project = tmp_path / "julia", tmp_path / "project"
        exe.write_text("#!/bin/sh\necho this is no Julia >&2\nexit 3\n")
        exe.chmod(0o755)
        project.mkdir()
        versions = dict.fromkeys(environments.dependencies(), "1.0.0") | {
            "PythonCall": python_call or metadata.version("juliacall")
        }
        entries = [f'[[deps.{name}]]\nversion = "{v}"\n' for name, v in versions.items() if name not in without]
        (project / "Manifest.toml").write_text('manifest_format = "2.0"\n\n' + "\n".join(entries))
        (project / "Project.toml").write_text("[deps]\n")
        return str(exe), str(project)

    return make
