"""The command implicit-rnn: what it prints, where, what it writes, and its exit status."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, Finished, RunPython, run_process

from implicit_rnn.cli import main
from implicit_rnn.runtime import environments

# --- usage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["learn"],
        ["xor", "--neurons", "0"],
        ["xor", "--neurons", "two"],
        ["xor", "--constraint", "monotone"],
        ["xor", "--seeds", "-1"],
        ["xor", "--engine", "torch"],
        ["xor", "--colour"],
        ["pendulum", "--seeds", "0"],
        ["pendulum", "--jobs", "two"],
        ["pendulum", "--quick", "--tune"],
        ["doctor", "--fix"],
        ["setup", "--julia"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong_on_stderr(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("usage: implicit-rnn")


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many"])
def test_number_that_is_none_is_named_with_what_was_expected(text, capsys):
    with pytest.raises(SystemExit):
        main(["xor", f"--seeds={text}"])
    assert f"{text} is not a whole number from 1" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == metadata.version("implicit-rnn")


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert {"xor", "cost", "pendulum", "doctor", "setup"} <= set(capsys.readouterr().out.split())


# --- xor -----------------------------------------------------------------------------------------------------

SMALL = ("xor", "--neurons", "2", "--constraint", "perron", "--seeds", "2", "--engine", "numpy", "--out", "results")


@pytest.fixture(scope="module")
def xor(tmp_path_factory) -> tuple[Finished, Path]:
    """A small run that prints JSON, and the folder it has written to."""
    folder = tmp_path_factory.mktemp("xor")
    command = [sys.executable, "-m", "implicit_rnn", *SMALL, "--json"]
    return run_process(command, ENVIRONMENT, 60, folder), folder / "results"


def test_xor_with_json_prints_the_data_that_it_writes_beside_a_figure_and_nothing_else_on_stdout(xor):
    done, folder = xor
    assert done.returncode == 0, str(done)
    assert "numpy engine, 2 seeds per entry" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["xor.json", "xor.png"]
    assert json.loads(done.stdout) == json.loads((folder / "xor.json").read_text())


def test_each_cell_of_xor_has_its_counts_and_interval(xor):
    (cell,) = json.loads(xor[0].stdout)["cells"]
    assert (cell["recurrence"], cell["neurons"], cell["seeds"]) == ("perron", 2, 2)
    assert 0 <= cell["solved_interval"][0] <= cell["solved"] / 2 <= cell["solved_interval"][1] <= 1
    assert cell["multistable"] == 0


def test_figure_of_xor_is_a_png_of_a_decent_size(xor):
    from matplotlib.image import imread

    height, width, _ = imread(xor[1] / "xor.png").shape
    assert width > 1000
    assert height > 400


def test_xor_without_json_prints_a_table_and_what_its_words_mean(run_cli: RunPython):
    done = run_cli("xor", "--neurons", "1", "--constraint", "none", "--seeds", "1", "--engine", "numpy")
    table, _ = done.stdout.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["recurrence", "none"], str(done)


def test_xor_on_a_julia_engine_that_cannot_be_had_exits_with_1_and_the_remedy(run_cli: RunPython, fresh_machine):
    done = run_cli("xor", "--engine", "julia", env=fresh_machine)
    assert done.returncode == 1
    assert "implicit-rnn setup" in done.stderr
    assert "Traceback" not in done.stderr


def test_number_that_is_given_twice_is_computed_once(tmp_path, capsys):
    command = ["xor", "--neurons", "1", "2", "1", "--constraint", "none", "none", "--seeds", "1", "--engine", "numpy"]
    assert main([*command, "--json", "--out", str(tmp_path)]) == 0
    assert [cell["neurons"] for cell in json.loads(capsys.readouterr().out)["cells"]] == [1, 2]


# --- pendulum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "count"), [([], 3), (["--seeds", "5"], 5)])
def test_quick_trial_of_the_pendulum_has_the_seeds_that_are_asked_for(arguments, count, tmp_path, monkeypatch, capsys):
    def run(models, seeds, *protocol, **work):
        raise ValueError(f"{len(seeds)} seeds")

    monkeypatch.setattr("implicit_rnn.experiments.pendulum.run", run)
    main(["pendulum", "--quick", *arguments, "--engine", "numpy", "--out", str(tmp_path)])
    assert capsys.readouterr().err.splitlines()[-1] == f"implicit-rnn: {count} seeds"


# --- doctor --------------------------------------------------------------------------------------------------


def test_doctor_where_no_julia_can_be_had_says_why_and_exits_with_0_as_the_numpy_engine_is_ready(
    run_cli: RunPython, fresh_machine
):
    done = run_cli("doctor", env=fresh_machine)
    assert done.returncode == 0
    assert "julia engine:        not available: no Julia environment is prepared" in done.stdout, str(done)
    assert "numpy engine:        ready" in done.stdout
    assert run_cli("doctor", "--gpu", env=fresh_machine).returncode == 1


def test_doctor_with_json_prints_nothing_else_on_stdout(run_cli: RunPython, fresh_machine):
    done = run_cli("doctor", "--json", env=fresh_machine)
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["packages"]["juliacall"] == metadata.version("juliacall")


def test_doctor_tells_which_version_of_python_call_does_not_fit_and_what_to_install(run_cli, fresh_machine, fake_julia):
    exe, project = fake_julia("0.9.2")
    done = run_cli(
        "doctor", "--json", env=fresh_machine | {"PYTHON_JULIACALL_EXE": exe, "PYTHON_JULIACALL_PROJECT": project}
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert "has PythonCall 0.9.2" in report["julia engine"]
    assert "pip install juliacall==0.9.2" in report["julia engine"]
    assert report["julia environment"]["needs juliacall"] == "0.9.2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"IMPLICIT_RNN_ENGINE": "julia"}, "julia engine:        not available"),
        ({"IMPLICIT_RNN_ENGINE": "torch"}, "IMPLICIT_RNN_ENGINE is 'torch'; expected one of 'auto', 'julia', 'numpy'"),
        ({"PYTHON_JULIACALL_EXE": sys.executable}, "PYTHON_JULIACALL_PROJECT is not; set both, or neither"),
    ],
    ids=["engine that cannot be had", "unknown engine", "exe without project"],
)
def test_doctor_exits_with_1_and_the_reason_where_the_settings_cannot_be_met(
    run_cli: RunPython, fresh_machine, settings, message
):
    done = run_cli("doctor", env=fresh_machine | settings)
    assert done.returncode == 1
    assert message in done.stdout, str(done)


@pytest.mark.parametrize("content", ["{", '{"exe": 5, "project": null}'])
def test_doctor_tells_of_a_damaged_record_of_the_prepared_environment(run_cli: RunPython, fresh_machine, content):
    path = Path(fresh_machine["XDG_CONFIG_HOME"]) / "implicit-rnn" / "environment.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    done = run_cli("doctor", env=fresh_machine)
    assert done.returncode == 0
    assert "environment.json is damaged" in done.stdout, str(done)


@pytest.mark.julia
def test_doctor_tells_that_the_julia_engine_is_ready_its_versions_and_threads(run_cli: RunPython):
    done = run_cli("doctor", "--json", env=ENVIRONMENT | {"IMPLICIT_RNN_THREADS": "2"})
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["julia engine"]) == (0, True, "ready"), str(done)
    assert set(report["julia"]) >= {"version", "exe", "project", "threads", "BLAS"}
    assert (report["threads setting"], report["julia"]["threads"]) == ("2 (IMPLICIT_RNN_THREADS)", 2)


# --- setup ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--julia", "julia"], ["--project", "."]], ids=" ".join)
def test_setup_with_half_of_an_environment_exits_with_1(no_prepared_julia, capsys, arguments):
    assert main(["setup", *arguments]) == 1
    assert "--julia and --project go together" in capsys.readouterr().err


@pytest.mark.parametrize("other", [["--cuda"], ["--julia", ""]], ids=str)
def test_remove_with_another_option_deletes_nothing(no_prepared_julia, capsys, other):
    environments.remember(environments.Environment("julia", "/named", "a test"))
    assert main(["setup", "--remove", *other]) == 1
    assert "--remove deletes everything that setup has installed" in capsys.readouterr().err
    assert environments.named_path().is_file()


@pytest.mark.parametrize(
    ("julia", "python_call", "message"),
    [
        ("/no/julia", None, "the Julia executable '/no/julia'"),
        (None, "0.9.2", "pip install juliacall==0.9.2"),
        (None, None, "Julia did not start with the project"),
    ],
)
def test_setup_that_fails_exits_with_1_and_the_reason_and_remembers_nothing(
    no_prepared_julia, fake_julia, capfd, julia, python_call, message
):
    exe, project = fake_julia(python_call)
    assert main(["setup", "--julia", julia or exe, "--project", project]) == 1
    assert message in capfd.readouterr().err
    assert environments.prepared_environment() is None


@pytest.fixture
def proxy_that_talks_nonsense() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.recv(4096)
                    connection.sendall(b"please log in to the hotel's network\r\n\r\n")
                    connection.close()

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_setup_behind_a_proxy_that_talks_nonsense_prints_one_line(run_cli, fresh_machine, proxy_that_talks_nonsense):
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy_that_talks_nonsense)
    done = run_cli("setup", env=fresh_machine | proxies | {"JULIA_PKG_SERVER": "http://pkg.julialang.org"})
    assert done.returncode == 1, str(done)
    assert len(done.stderr.splitlines()) == 1, str(done)


def test_setup_without_network_exits_with_1_and_one_line_with_a_remedy(run_cli: RunPython, fresh_machine):
    done = run_cli("setup", env=fresh_machine, timeout=60)
    assert done.returncode == 1, str(done)
    (line,) = done.stderr.splitlines()
    assert line.endswith("implicit-rnn setup --julia EXE --project DIR")
    assert done.seconds < 30


def test_setup_prepares_an_environment_that_the_next_process_uses(run_cli, run_python, tmp_path, julia_environment):
    env = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("PYTHON_JULIACALL")}
    env["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    done = run_cli(
        "setup", "--julia", julia_environment.exe, "--project", julia_environment.project, env=env, timeout=200
    )
    assert done.returncode == 0, str(done)
    code = """
        import sys, warnings
        warnings.simplefilter("error")
        import implicit_rnn as irnn
        print(irnn.get_engine().name, "juliapkg" in sys.modules)
    """
    assert run_python(code, env).stdout == "julia False\n"
