"""The start of the engines, in processes of their own: what is started, when, and what is said where nothing can be."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
from conftest import ENVIRONMENT, RunPython, run_process

import implicit_rnn as irnn
from implicit_rnn.engines import check_engine
from implicit_rnn.runtime import environments
from implicit_rnn.runtime.environments import Environment

# --- import --------------------------------------------------------------------------------------------------

HEAVY = ("juliacall", "juliapkg", "matplotlib")


def test_import_a_network_and_the_numpy_engine_start_nothing(run_python: RunPython):
    code = f"""
        import sys, threading
        import implicit_rnn as irnn
        def told():
            print([m for m in {HEAVY} if m in sys.modules])
        print(threading.active_count())
        told()
        net = irnn.Network(2, [irnn.Layer(2)], outputs=1)
        repr(net), net.summary(), net.recurrent_weights
        told()
        irnn.Network(2, [irnn.Layer(2)], outputs=1, engine="numpy").fit([[0, 1]], [[0]], epochs=2)
        told()
    """
    assert run_python(code).stdout == "1\n[]\n[]\n[]\n"


# --- no Julia can be had -------------------------------------------------------------------------------------

FALLBACK = """
    import json, sys, warnings
    import implicit_rnn as irnn
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            net = irnn.Network(2, [irnn.Layer(2)], outputs=1, seed=0)
            net.fit([[0, 1], [1, 0]], [[0], [1]], epochs=3)
            net.predict([[0, 1]])
        irnn.get_engine()
    print(json.dumps({
        "engine": net.engine.name,
        "warnings": [[w.category.__name__, str(w.message), w.filename] for w in caught],
    }))
"""


def test_machine_without_network_has_the_numpy_engine_and_one_warning_with_the_remedy(run_python, fresh_machine):
    done = run_python(FALLBACK, fresh_machine)
    assert done.returncode == 0, str(done)
    assert done.seconds < 10
    result = json.loads(done.stdout)
    assert result["engine"] == "numpy"
    ((category, message, place),) = result["warnings"]
    assert (category, place) == ("EngineWarning", "<string>")  # which is the user's code
    assert "no Julia environment is prepared and the Julia package server cannot be reached" in message
    assert "run `implicit-rnn setup`" in message
    assert "IMPLICIT_RNN_ENGINE=numpy" in message
    files = [path for path in Path(fresh_machine["HOME"]).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000, files


def test_network_that_swallows_every_packet_delays_the_start_by_less_than_10_seconds(
    run_python: RunPython, fresh_machine
):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = {
            name: proxy if name.lower().endswith("_proxy") and value else value for name, value in fresh_machine.items()
        }
        done = run_python(FALLBACK, env)
    assert json.loads(done.stdout)["engine"] == "numpy"
    assert done.seconds < 10


@pytest.mark.parametrize(("engine", "settings"), [("julia", {}), (None, {"IMPLICIT_RNN_ENGINE": "julia"})])
def test_julia_engine_that_cannot_be_had_raises(run_python: RunPython, fresh_machine, engine, settings):
    code = f"""
        import implicit_rnn as irnn
        net = irnn.Network(2, [irnn.Layer(2)], outputs=1, engine={engine!r})
        try:
            net.predict([[0, 1]])
        except irnn.EngineError as error:
            print(error)
    """
    done = run_python(code, fresh_machine | settings)
    assert "the Julia package server cannot be reached; run `implicit-rnn setup`" in done.stdout, str(done)
    assert done.seconds < 10


def test_numpy_engine_by_the_setting_of_the_environment_gives_no_warning(run_python: RunPython, fresh_machine):
    done = run_python(FALLBACK, fresh_machine | {"IMPLICIT_RNN_ENGINE": "numpy"})
    assert json.loads(done.stdout) == {"engine": "numpy", "warnings": []}


def test_unknown_setting_of_the_environment_is_refused_with_the_valid_names(monkeypatch):
    monkeypatch.setenv("IMPLICIT_RNN_ENGINE", "torch")
    with pytest.raises(ValueError, match="IMPLICIT_RNN_ENGINE is 'torch'; expected one of 'auto', 'julia', 'numpy'"):
        irnn.get_engine()


def test_empty_setting_of_the_environment_is_none(monkeypatch):
    monkeypatch.setenv("IMPLICIT_RNN_ENGINE", "")
    assert check_engine(None) == "auto"


# --- settings that contradict each other ---------------------------------------------------------------------

WHY_NO_ENGINE = """
    import implicit_rnn as irnn
    try:
        irnn.get_engine("{}")
    except irnn.EngineError as error:
        print(error)
"""


@pytest.mark.parametrize(("given", "absent"), [("EXE", "PROJECT"), ("PROJECT", "EXE")])
@pytest.mark.parametrize("engine", ["auto", "julia"])
def test_exe_without_project_is_an_error_even_for_auto(run_python: RunPython, fresh_machine, given, absent, engine):
    done = run_python(WHY_NO_ENGINE.format(engine), fresh_machine | {f"PYTHON_JULIACALL_{given}": sys.executable})
    assert f"PYTHON_JULIACALL_{given} is set but PYTHON_JULIACALL_{absent} is not; set both, or neither" in done.stdout


def test_exe_without_project_does_not_disturb_the_numpy_engine(run_python: RunPython, fresh_machine):
    code = "import implicit_rnn as irnn; print(irnn.get_engine('numpy').name)"
    assert run_python(code, fresh_machine | {"PYTHON_JULIACALL_EXE": sys.executable}).stdout == "numpy\n"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"exe": "julia"}', '{"exe": 5, "project": null}', "\x00\xff", '"text"']
)
def test_damaged_record_of_the_prepared_environment_is_reported_with_its_path(no_prepared_julia, content):
    path = environments.named_path()
    assert path.is_relative_to(no_prepared_julia)
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(
        irnn.EngineError, match=rf"{path.name} is damaged .*; run `implicit-rnn setup` again or delete it"
    ):
        environments.find_environment()


def test_record_that_may_not_be_read_is_an_engine_error(no_prepared_julia, monkeypatch):
    environments.remember(Environment("julia", "/project", "a test"))
    monkeypatch.setattr(Path, "read_text", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(irnn.EngineError, match=r"environment\.json cannot be read: Permission denied; make it yours"):
        environments.find_environment()


def test_auto_engine_falls_back_and_tells_of_a_damaged_record(run_python: RunPython, fresh_machine):
    path = Path(fresh_machine["XDG_CONFIG_HOME"]) / "implicit-rnn" / "environment.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    result = json.loads(run_python(FALLBACK, fresh_machine).stdout)
    assert result["engine"] == "numpy"
    assert "environment.json is damaged" in result["warnings"][0][1]


def test_explicit_environment_comes_before_the_prepared_one(no_prepared_julia, monkeypatch):
    path = environments.named_path()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"exe": "prepared", "project": "prepared"}))
    monkeypatch.setenv("PYTHON_JULIACALL_EXE", "explicit")
    monkeypatch.setenv("PYTHON_JULIACALL_PROJECT", "explicit")
    with pytest.raises(irnn.EngineError, match="'explicit'"):
        environments.find_environment()


def test_environment_may_be_given_by_options_of_python(no_prepared_julia, monkeypatch):
    monkeypatch.setitem(sys._xoptions, "juliacall-exe", "/given/julia")
    monkeypatch.setitem(sys._xoptions, "juliacall-project", "/given/project")
    given = environments.explicit_environment()
    assert (given.exe, given.project) == ("/given/julia", "/given/project")


def test_record_that_cannot_be_written_leaves_the_earlier_one(no_prepared_julia):
    environments.remember(Environment("julia", "/installed", "a test", ours=True))
    environments.named_path().mkdir()
    with pytest.raises(OSError, match=r"environment\.json"):
        environments.remember(Environment("julia", "/named", "a test"))
    assert environments.prepared_environment().project == "/installed"


# --- environments that cannot work ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "changes", "message"),
    [
        ({}, {"exe": "/no/julia"}, r"the Julia executable '/no/julia' \(a test\) does not exist"),
        ({}, {"project": "/no/project"}, r"the Julia project '/no/project' \(a test\) is not a folder"),
        (
            {"without": ("NLsolve", "Optimisers")},
            {},
            r'lacks NLsolve, Optimisers; .*Pkg.add\(\["NLsolve", "Optimisers"\]\)',
        ),
        ({"without": ("Optimisers",)}, {"ours": True}, "lacks Optimisers; run `implicit-rnn setup` again"),
        (
            {"python_call": "0.9.2"},
            {},
            rf"juliacall {metadata.version('juliacall')} is .* has PythonCall 0.9.2; .* pip install juliacall==0.9.2",
        ),
        (
            {"python_call": "0.9.2"},
            {"ours": True},
            r"run `implicit-rnn setup` again, or pip install juliacall==0\.9\.2",
        ),
    ],
    ids=str,
)
def test_environment_that_cannot_work_is_reported_with_the_remedy(fake_julia, made, changes, message):
    with pytest.raises(irnn.EngineError, match=message):
        replace(Environment(*fake_julia(**made), "a test"), **changes).check()


def test_project_without_a_manifest_is_reported(fake_julia):
    exe, project = fake_julia()
    (Path(project) / "Manifest.toml").unlink()
    with pytest.raises(irnn.EngineError, match="lacks PythonCall"):
        Environment(exe, project, "a test").check()


def test_manifest_for_one_version_of_julia_is_read(fake_julia):
    exe, project = fake_julia()
    Path(project, "Manifest.toml").rename(Path(project, "Manifest-v1.11.toml"))
    Environment(exe, project, "a test").check()


def test_manifest_is_the_one_that_julia_takes(tmp_path):
    in_order = [
        "Manifest.toml",
        "JuliaManifest.toml",
        "Manifest-v1.9.toml",
        "Manifest-v1.11.toml",
        "JuliaManifest-v1.11.toml",
    ]
    (tmp_path / "OldManifest-v1.12.toml").write_text('[[deps.P]]\nversion = "99.0"\n')
    for number, name in enumerate(in_order):
        (tmp_path / name).write_text(f'[[deps.P]]\nversion = "{number}.0"\n')
        assert environments.manifest_versions(tmp_path) == {"P": f"{number}.0"}


def test_manifest_that_cannot_be_read_is_an_engine_error(fake_julia):
    exe, project = fake_julia()
    Path(project, "Manifest.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(irnn.EngineError, match=r"Manifest\.toml, the manifest of a Julia project, cannot be read"):
        Environment(exe, project, "a test").check()


@pytest.mark.parametrize(("name", "value"), [("PROJECT", "relative"), ("OFFLINE", "maybe")])
def test_setting_that_juliapkg_refuses_is_an_engine_error(run_python: RunPython, fresh_machine, name, value):
    done = run_python(WHY_NO_ENGINE.format("julia"), fresh_machine | {f"PYTHON_JULIAPKG_{name}": value})
    assert done.stdout.startswith(f"juliapkg failed: PYTHON_JULIAPKG_{name} must be "), str(done)


def test_julia_that_does_not_start_is_an_engine_error(run_python: RunPython, fresh_machine, fake_julia):
    exe, project = fake_julia()
    done = run_python(
        WHY_NO_ENGINE.format("julia"),
        fresh_machine | {"PYTHON_JULIACALL_EXE": exe, "PYTHON_JULIACALL_PROJECT": project},
    )
    assert done.stdout.startswith(f"Julia did not start: {exe} ended with status 3: this is no Julia"), str(done)


@pytest.mark.julia
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("JULIA_LOAD_PATH", "@", "did not start: .* perhaps by what is set in the environment: .*JULIA_LOAD_PATH"),
        ("PYTHON_JULIACALL_INIT", "no", "PYTHON_JULIACALL_INIT .* forbids it; unset that"),
    ],
)
def test_setting_with_which_julia_does_not_start_is_named(run_python: RunPython, given_julia, name, value, expected):
    assert re.search(expected, run_python(WHY_NO_ENGINE.format("julia"), given_julia | {name: value}).stdout)


def test_file_with_the_name_of_juliacall_is_told(run_python: RunPython, fresh_machine, fake_julia, tmp_path):
    (tmp_path / "juliacall.py").write_text("")
    exe, project = fake_julia()
    done = run_python(
        WHY_NO_ENGINE.format("julia") * 2,
        fresh_machine | {"PYTHON_JULIACALL_EXE": exe, "PYTHON_JULIACALL_PROJECT": project},
    )
    told = f"{tmp_path / 'juliacall.py'} was imported as juliacall, but is another module; rename it"
    assert done.stdout.splitlines() == [told, told], str(done)


# --- Julia starts --------------------------------------------------------------------------------------------


def test_given_julia_is_used_without_juliapkg_and_with_the_sources_of_this_package(
    run_python: RunPython, given_julia, julia_environment
):
    code = """
        import json, sys, warnings
        warnings.simplefilter("error")
        import implicit_rnn as irnn
        from implicit_rnn.runtime import start
        net = irnn.Network(2, [irnn.Layer(2)], outputs=1)
        net.predict([[0, 1]])
        KEY = 'only(key for key in keys(Base.loaded_modules) if key.name == "ImplicitRNN")'
        print(json.dumps({
            "engine": net.engine.name,
            "juliapkg": "juliapkg" in sys.modules,
            "exe": str(start.evaluate("joinpath(Sys.BINDIR, Base.julia_exename())")),
            "project": str(start.evaluate("dirname(Base.active_project())")),
            "source": str(start.evaluate("pkgdir(Base.loaded_modules[" + KEY + "])")),
        }))
    """
    done = run_python(code, given_julia)
    assert done.returncode == 0, str(done)
    result = json.loads(done.stdout)
    assert result["engine"] == "julia"
    assert result["juliapkg"] is False
    assert os.path.samefile(result["exe"], julia_environment.exe)
    assert os.path.samefile(result["project"], julia_environment.project)
    assert os.path.samefile(result["source"], environments.JULIA_SOURCES)


SOLVE = "irnn.Network(2, [irnn.Layer(2)], outputs=1, seed=0, engine='julia').predict([[0, 1]])"


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lower", "newest"])
def test_oldest_and_newest_juliacall_give_the_results_of_the_numpy_engine(
    run_python: RunPython, julia_environment, other_packages, name, tmp_path
):
    project, settings = other_packages(name)
    version = environments.manifest_versions(project)["PythonCall"]
    target = str(tmp_path / "juliacall")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, f"juliacall=={version}"]
    if run_process(pip, ENVIRONMENT, 120).returncode != 0:
        pytest.skip(f"pip finds no juliacall {version}")
    code = """
        import juliacall, numpy as np, implicit_rnn as irnn
        X, Y = np.random.default_rng(0).standard_normal((2, 20, 2))
        runs = {}
        for engine in ("julia", "numpy"):
            net = irnn.Network(2, [irnn.Layer(4)], outputs=2, seed=0, engine=engine)
            loss = net.fit(X, Y, epochs=3, seed=0, progress=False, callbacks=[lambda state: None]).loss
            root = irnn.root(lambda z, x: z + np.tanh(z) - x, np.zeros(2), args=(X[0],), engine=engine).value
            runs[engine] = net.predict(X), loss, root
        print(juliacall.__version__, [bool(np.allclose(a, b)) for a, b in zip(*runs.values())])
    """
    path = os.pathsep.join([target, ENVIRONMENT.get("PYTHONPATH", "")])
    given = {"PYTHON_JULIACALL_EXE": julia_environment.exe, "PYTHON_JULIACALL_PROJECT": str(project)}
    done = run_python(code, settings | given | {"PYTHONPATH": path, "XDG_CONFIG_HOME": str(tmp_path)}, 540)
    assert done.stdout == f"{version} [True, True, True]\n", str(done)


FIRST_USE = """
import numpy as np
import implicit_rnn as irnn

for dtype in ("float64", "float32"):
    X = np.random.default_rng(0).standard_normal((12, 2)).astype(dtype)
    for neurons in (3, 30):
        net = irnn.Network(2, [irnn.Layer(neurons)], outputs=1, dtype=dtype, seed=0, engine="julia")
        net.equilibrium(X)
        net.loss_and_gradient(X[:4], X[:4, :1])
        net.loss_and_gradient(X, X[:, :1])
        net.vjp(X, X[:, :1])
        net.jvp(X, X)
        for warm_start in (False, True):
            net.fit(X, X[:, :1], epochs=2, batch_size=8, warm_start=warm_start, progress=False)
nets = [irnn.Network(2, [irnn.Layer(2)], outputs=1, seed=seed, engine="julia") for seed in range(40)]
irnn.fit_many(nets, X, X[:, :1], epochs=2, progress=False)
sigmoid = irnn.Network(2, [irnn.Layer(3, activation="sigmoid")], outputs=1, seed=0, engine="julia")
sigmoid.loss_and_gradient(X[:4], X[:4, :1])
"""


def test_first_use_of_a_network_compiles_nothing_of_the_julia_package(run_python: RunPython, given_julia, tmp_path):
    """On one thread, and with too few samples for the matrix unit, the code for which is never compiled ahead."""
    trace = tmp_path / "trace.jl"
    env = given_julia | {"PYTHON_JULIACALL_TRACE_COMPILE": str(trace), "PYTHON_JULIACALL_THREADS": "1"}
    done = run_python(FIRST_USE, env)
    assert done.returncode == 0, str(done)
    compiled = trace.read_text().splitlines()
    assert len(compiled) > 0
    assert [line for line in compiled if "ImplicitRNN" in line] == []


def test_processes_started_from_one_with_julia_have_its_environment_without_what_julia_needs(
    run_python: RunPython, no_prepared_julia, julia_environment
):
    """Else another virtual environment would get this one's packages, and NumPy one thread."""
    environments.remember(julia_environment)
    code = """
        import os, subprocess, sys
        import implicit_rnn as irnn
        def inherited():
            names = subprocess.run([sys.executable, "-c", "import os; print(*os.environ)"], capture_output=True, text=True)
            return [name for name in names.stdout.split() if "JULIACALL" in name or "OPENBLAS" in name]
        before = dict(os.environ)
        print(irnn.get_engine("julia").name, inherited(), dict(os.environ) == before)
    """
    settings = ENVIRONMENT | {"XDG_CONFIG_HOME": os.environ["XDG_CONFIG_HOME"]}
    env = {name: value for name, value in settings.items() if "JULIACALL" not in name and "OPENBLAS" not in name}
    done = run_python(code, env)
    assert done.stdout == "julia [] True\n", str(done)


def test_a_warning_of_juliacall_does_not_keep_julia_from_starting_where_warnings_are_errors(
    run_python: RunPython, given_julia
):
    code = """
        import sys, types, warnings
        sys.modules["torch"] = types.ModuleType("torch")  # of which juliacall warns
        warnings.simplefilter("error")
        import implicit_rnn as irnn
        print(irnn.get_engine("julia").name, ("error", None, Warning, None, 0) in warnings.filters)
    """
    done = run_python(code, given_julia)
    assert done.stdout == "julia True\n", str(done)
    assert "torch was imported before juliacall" in done.stderr


def test_julia_that_somebody_else_has_started_is_used_whatever_names_are_in_its_main_module(
    run_python: RunPython, given_julia
):
    code = f"""
        import juliacall
        juliacall.Main.seval("somebody_else = string = sprint = join = pkgdir = 42; *(a, b) = 0")
        import implicit_rnn as irnn
        from implicit_rnn.runtime import start
        {SOLVE}
        print(irnn.get_engine().name, start.evaluate("somebody_else"))
    """
    done = run_python(code, given_julia)
    assert done.stdout == "julia 42\n", str(done)


FORK = """
    import os, sys
    {before}
    import implicit_rnn as irnn
    from implicit_rnn.runtime import start
    {start}
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            irnn.Network(2, [irnn.Layer(2)], outputs=1, seed=0, engine="numpy").predict([[0, 1]])
            {solve}
            print("solved", flush=True)
        except irnn.EngineError as error:
            print(error, flush=True)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    print("child", os.waitstatus_to_exitcode(status))
    {solve}
    print("parent solves")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
class TestFork:
    @pytest.mark.parametrize(("before", "start"), [("", SOLVE), ("import juliacall", "")], ids=["ours", "another's"])
    def test_after_the_start_is_a_clear_error_in_the_child_and_the_parent_goes_on(
        self, run_python: RunPython, given_julia, before, start
    ):
        done = run_python(FORK.format(before=before, start=start, solve=SOLVE), given_julia)
        message, child, parent = done.stdout.splitlines()
        assert "forked after Julia had started" in message, str(done)
        assert 'get_context("spawn") or "forkserver"' in message
        assert (child, parent) == ("child 0", "parent solves")

    def test_before_the_start_is_no_problem(self, run_python: RunPython, given_julia):
        done = run_python(FORK.format(before="", start="", solve=SOLVE), given_julia)
        assert done.stdout.splitlines() == ["solved", "child 0", "parent solves"], str(done)

    def test_child_that_exits_has_written_what_it_printed(self, run_python: RunPython, given_julia):
        code = f"""
            import os, sys
            import implicit_rnn as irnn
            {SOLVE}
            child = os.fork()
            if child == 0:
                print("printed")
                sys.exit()
            os.waitpid(child, 0)
        """
        done = run_python(code, given_julia)
        assert done.stdout == "printed\n", str(done)


def test_read_only_project_works(run_python: RunPython, given_julia, julia_environment, tmp_path):
    project = tmp_path / "read-only"
    project.mkdir()
    for name in ("Project.toml", "Manifest.toml", "JuliaManifest.toml", "LocalPreferences.toml"):
        if (Path(julia_environment.project) / name).is_file():
            shutil.copy(Path(julia_environment.project) / name, project)
    for path in (*project.iterdir(), project):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(path.name for path in project.iterdir())
    done = run_python(
        f"import implicit_rnn as irnn; print({SOLVE}.shape)",
        given_julia | {"PYTHON_JULIACALL_PROJECT": str(project)},
        120,
    )
    project.chmod(0o755)
    assert done.stdout == "(1, 1)\n", str(done)
    assert sorted(path.name for path in project.iterdir()) == before
