"""How Julia and its packages come onto a machine, with a stand-in for juliapkg that only notes what it is asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import CHECKOUT, NOWHERE, RunPython, read_toml
from package_server import PackageServer
from test_startup import WHY_NO_ENGINE

import implicit_rnn as irnn
from implicit_rnn.runtime import environments, install, package_server
from implicit_rnn.runtime.environments import Environment
from implicit_rnn.runtime.setup import remove, setup

STAND_IN = """
    import json, os, sys, time
    from pathlib import Path

    HOME = Path(__file__).parents[2]

    def executable():
        return str(HOME / "julia")

    def resolve(force=False, dry_run=False):
        print("Waiting for lock to be freed")
        if dry_run:
            return (HOME / "resolved").exists()
        with (HOME / "calls").open("a") as file:
            file.write(json.dumps({"force": force, "path": sys.path, "xoptions": sys._xoptions}) + "\\n")
        if (HOME / "slow").exists():
            import subprocess
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            (HOME / "child").write_text(str(child.pid))
            child.wait()
        print("Installing Julia 1.11.1")
        print("ERROR: Unsatisfiable requirements detected for package KrylovKit")
        print("Stacktrace: and so on")
        raise SystemExit(1)
"""


@pytest.fixture
def stand_in(tmp_path: Path, fake_julia) -> dict:
    """Variables of a machine on which juliapkg is the stand-in, beside which the files are that steer it."""
    home = tmp_path / "home"
    (home / "path" / "juliapkg").mkdir(parents=True)
    (home / "path" / "juliapkg" / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    (home / "path" / "juliapkg" / "state.py").write_text(f"STATE = {{'project': {str(home / 'julia_env')!r}}}\n")
    (home / "julia_env").mkdir()
    names = [name for name in os.environ if name.startswith(("PYTHON_JULIA", "JULIA_", "IMPLICIT_RNN"))]
    return {name: value for name, value in os.environ.items() if name not in names} | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(home / "path"), os.environ.get("PYTHONPATH")])),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_STATE_HOME": str(home / "state"),
        "HOME": str(home),
        "PYTHON_JULIAPKG_OFFLINE": "yes",
    }


def home(env: dict) -> Path:
    return Path(env["HOME"])


def calls(env: dict) -> list[dict]:
    path = home(env) / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


ENGINE = WHY_NO_ENGINE.format("julia")


def test_record_of_a_resolution_without_its_manifest_is_not_believed(run_python: RunPython, stand_in):
    (home(stand_in) / "resolved").touch()
    run_python(ENGINE, stand_in)
    assert [call["force"] for call in calls(stand_in)] == [True]


def test_failed_installation_is_reported_with_its_first_cause_the_log_and_setup(run_python: RunPython, stand_in):
    done = run_python(ENGINE, stand_in)
    assert "juliapkg could not install" in done.stdout, str(done)
    assert "Unsatisfiable requirements detected for package KrylovKit" in done.stdout
    assert "run `implicit-rnn setup` to try again" in done.stdout
    assert "Stacktrace" in next(home(stand_in).rglob("install.log")).read_text()


def test_cause_of_a_failure_is_told_with_the_list_that_it_announces(tmp_path, monkeypatch):
    log = tmp_path / "install.log"
    monkeypatch.setattr(install, "log_path", lambda: log)
    log.write_text("Traceback\nException: entries do not agree:\n- '0.9' at here\n- '0.10' at there\nthe end\n")
    assert install.cause() == "Exception: entries do not agree: - '0.9' at here - '0.10' at there"
    log.write_text("no error\nthe end\n")
    assert install.cause() == "the end"


def test_nothing_but_the_result_comes_on_stdout_and_each_phase_on_stderr(run_python: RunPython, stand_in):
    done = run_python(ENGINE, stand_in)
    assert len(done.stdout.splitlines()) == 1, str(done)
    assert "implicit-rnn: installing Julia (" in done.stderr


@pytest.mark.parametrize("stream", ["io.StringIO()", "None"])
def test_installation_works_where_stderr_is_no_file(run_python: RunPython, stand_in, stream):
    done = run_python(f"import io, sys; sys.stderr = {stream}\n" + textwrap.dedent(ENGINE), stand_in)
    assert "juliapkg could not install" in done.stdout, str(done)


def test_child_that_installs_has_the_path_and_the_options_of_its_parent(stand_in, tmp_path):
    (tmp_path / "decoy").mkdir()
    (tmp_path / "decoy" / "juliapkg.json").write_text("{}")
    (tmp_path / "decoy" / "json.py").write_text("raise SystemExit('this is not the json of Python')")
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys; sys.path[:0] = [pathlib.Path('/no/text'), '/ä']\n" + textwrap.dedent(ENGINE), "utf-8"
    )
    command = [sys.executable, "-X", "juliapkg-test=5", str(script)]
    subprocess.run(command, env=stand_in, cwd=tmp_path / "decoy", check=True, capture_output=True)
    (call,) = calls(stand_in)
    assert call["path"][:2] == ["/ä", str(tmp_path)]
    assert call["xoptions"]["juliapkg-test"] == "5"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_end_of_an_installation_by_a_signal_is_that_of_all_its_processes(stand_in, name):
    (home(stand_in) / "slow").touch()
    # Under nohup the tests, and what they start, ignore SIGHUP.
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\nimport implicit_rnn as irnn; irnn.get_engine('julia')"
    process = subprocess.Popen([sys.executable, "-c", code], env=stand_in, stderr=subprocess.PIPE, text=True)
    child = home(stand_in) / "child"
    deadline = time.monotonic() + 30
    while not (child.exists() and child.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=30)
    if name == "SIGINT":
        assert "KeyboardInterrupt" in stderr
    else:
        assert process.returncode == 128 + getattr(signal, name), stderr
    deadline = time.monotonic() + 10
    while is_running(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(child.read_text()))


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


# --- what was installed earlier ------------------------------------------------------------------------------


def installed_earlier(env: dict, fake_julia, version: str | None = None) -> None:
    exe, project = fake_julia(version)
    target = home(env) / "julia_env"
    (target / "pyjuliapkg").mkdir()
    (target / "Manifest.toml").write_bytes((Path(project) / "Manifest.toml").read_bytes())
    (target / "pyjuliapkg" / "meta.json").write_text(json.dumps({"executable": exe}))


FIND = """
    import json
    from implicit_rnn.runtime import environments
    found = environments.find_environment()
    print(json.dumps(found and [found.exe, found.project, found.source]))
"""


def without_server(env: dict) -> dict:
    return {name: value for name, value in env.items() if name != "PYTHON_JULIAPKG_OFFLINE"} | {
        "JULIA_PKG_SERVER": "http://127.0.0.1:9"
    }


def test_what_was_installed_earlier_is_used_where_nothing_can_be_installed(run_python: RunPython, stand_in, fake_julia):
    installed_earlier(stand_in, fake_julia)
    done = run_python(FIND, without_server(stand_in))
    assert json.loads(done.stdout)[1:] == [str(home(stand_in) / "julia_env"), "installed earlier by juliapkg"]
    assert calls(stand_in) == []


def test_what_was_installed_earlier_is_used_with_its_julia_where_both_have_been_moved(
    run_python: RunPython, stand_in, fake_julia
):
    installed_earlier(stand_in, fake_julia)
    meta = home(stand_in) / "julia_env" / "pyjuliapkg" / "meta.json"
    julia = meta.parent / "install" / "bin" / "julia"
    julia.parent.mkdir(parents=True)
    Path(json.loads(meta.read_text())["executable"]).rename(julia)
    done = run_python(FIND, without_server(stand_in))
    assert json.loads(done.stdout)[:2] == [str(julia), str(home(stand_in) / "julia_env")]


def test_what_was_installed_earlier_with_another_juliacall_is_not_used(run_python: RunPython, stand_in, fake_julia):
    installed_earlier(stand_in, fake_julia, "0.9.2")
    assert "cannot be reached" in run_python(FIND, without_server(stand_in)).stderr


@pytest.mark.parametrize("content", ["", "[]", "{}", "null"])
def test_damaged_record_of_juliapkg_is_none(run_python: RunPython, stand_in, fake_julia, content):
    installed_earlier(stand_in, fake_julia)
    (home(stand_in) / "julia_env" / "pyjuliapkg" / "meta.json").write_text(content)
    assert "EngineError: no Julia environment is prepared" in run_python(FIND, without_server(stand_in)).stderr


def test_doctor_installs_nothing_without_being_asked(run_python: RunPython, stand_in):
    code = "from implicit_rnn import cli; cli.main(['doctor', '--json'])"
    report = json.loads(run_python(code, stand_in).stdout)
    assert "not available: Julia and its packages are not installed; run `implicit-rnn setup`" in report["julia engine"]
    assert calls(stand_in) == []
    assert "could not install" in run_python(code.replace("'--json'", "'--install', '--json'"), stand_in).stdout
    assert len(calls(stand_in)) == 1


# --- the package server --------------------------------------------------------------------------------------


class Refusing(BaseHTTPRequestHandler):
    """A server that wants a password, or a proxy that does; it notes what it is asked for."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_error(401)

    do_CONNECT = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def no_proxies(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_proxies")
def test_mirror_is_asked_instead_of_the_public_server(monkeypatch, server):
    monkeypatch.setenv("JULIA_PKG_SERVER", server.url)
    assert package_server.is_reachable()  # that it wants a password is Julia's affair
    assert server.asked == ["/registries"]
    monkeypatch.setenv("JULIA_PKG_SERVER", "127.0.0.1:9")
    assert not package_server.is_reachable()


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_mirror_is_asked_through_the_proxy(monkeypatch, server, variable):
    monkeypatch.setenv("JULIA_PKG_SERVER", "http://mirror.invalid")
    monkeypatch.setenv(variable, server.url)
    assert package_server.is_reachable()
    assert server.asked == ["http://mirror.invalid/registries"]


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy"])
def test_proxy_that_lets_nobody_through_to_the_server_is_no_network(monkeypatch, server, variable):
    monkeypatch.setenv("JULIA_PKG_SERVER", "https://mirror.invalid")
    monkeypatch.setenv(variable, server.url)
    assert not package_server.is_reachable()
    assert server.asked == ["mirror.invalid:443"]


@pytest.mark.usefixtures("no_proxies")
def test_mirror_within_the_house_is_not_asked_through_the_proxy(monkeypatch, server):
    monkeypatch.setenv("JULIA_PKG_SERVER", server.url)
    monkeypatch.setenv("http_proxy", NOWHERE)
    assert not package_server.is_reachable()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert package_server.is_reachable()


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(("server", "proxy"), [("", ""), ("https://mirror.invalid", "socks5h://127.0.0.1:9")])
def test_no_server_at_all_and_a_proxy_that_python_does_not_know_are_left_to_julia(monkeypatch, server, proxy):
    monkeypatch.setenv("JULIA_PKG_SERVER", server)
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert package_server.is_reachable()


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("trusted", [False, True])
def test_whether_the_certificate_of_the_mirror_is_trusted_is_for_julia_to_say(monkeypatch, certificate, trusted):
    for name in ("SSL_CERT_DIR", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with PackageServer({}, certificate=certificate) as server:
        monkeypatch.setenv("JULIA_PKG_SERVER", server.url)
        assert package_server.is_reachable()


def test_certificate_that_is_not_trusted_is_said_with_the_remedy(tmp_path, monkeypatch):
    log = tmp_path / "install.log"
    monkeypatch.setattr(install, "log_path", lambda: log)
    refusal = "RequestError: SSL certificate problem: self-signed certificate while requesting https://mirror.invalid"
    warning = f"┌ Warning: could not download\n│   exception = {refusal}\n└ @ Pkg.Registry\nERROR: failed to clone\n"
    monkeypatch.setattr(install, "run", lambda *_: log.write_text(warning))
    with pytest.raises(irnn.EngineError) as raised:
        install.resolve_with_juliapkg()
    assert f"packages: {refusal} (all of it" in str(raised.value)
    assert "name a file of the certificates to trust in SSL_CERT_FILE and JULIA_SSL_CA_ROOTS_PATH" in str(raised.value)


# --- several installations of one user -----------------------------------------------------------------------


def test_what_was_named_to_setup_is_shared_by_installations_without_their_own(no_prepared_julia, monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/one")
    environments.remember(Environment("julia", "/project/of/one", "a test", ours=True))
    monkeypatch.setattr(sys, "prefix", "/two")
    assert environments.prepared_environment() is None
    environments.remember(Environment("julia", "/named", "a test"))
    assert environments.prepared_environment().project == "/named"
    monkeypatch.setattr(sys, "prefix", "/three")
    assert environments.prepared_environment().project == "/named"
    monkeypatch.setattr(sys, "prefix", "/one")
    assert environments.prepared_environment().project == "/project/of/one"


def test_what_is_named_last_counts_where_it_was_named(no_prepared_julia):
    environments.remember(Environment("julia", "/installed", "a test", ours=True))
    environments.remember(Environment("julia", "/named", "a test"))
    assert environments.prepared_environment().project == "/named"


def test_remove_forgets_and_deletes(no_prepared_julia, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(no_prepared_julia / "data"))
    monkeypatch.setenv("XDG_STATE_HOME", str(no_prepared_julia / "state"))
    project = no_prepared_julia / "data" / "implicit-rnn" / f"julia-{environments.installation()}"
    project.mkdir(parents=True)
    environments.remember(Environment("julia", str(project), "a test", ours=True))
    deleted = remove()
    assert environments.prepared_environment() is None
    assert not project.exists()
    assert str(project) in deleted


def test_setup_tries_this_package_and_no_folder_of_its_name(no_prepared_julia, fake_julia, tmp_path, monkeypatch):
    exe, project = fake_julia()
    (tmp_path / "implicit_rnn.py").write_text("raise SystemExit('this is not the package')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(irnn.EngineError, match="this is no Julia"):
        setup(exe, project)


# --- the Julia projects --------------------------------------------------------------------------------------


@pytest.mark.julia
@pytest.mark.parametrize("name", ["Project.toml", "julia/Project.toml"])
def test_packages_have_the_uuids_that_the_running_julia_knows_them_by(name):
    from implicit_rnn.runtime import start

    project = read_toml(CHECKOUT / name)
    start.evaluate("import Pkg")
    known = start.evaluate('join(("$(p[1])=$id" for (id, p) in Pkg.Types.stdlibs()), " ")')
    uuids = dict(line.split("=") for line in str(known).split())
    entries = project.get("deps", {}) | project.get("weakdeps", {}) | project.get("extras", {})
    standard = {package: uuid for package, uuid in entries.items() if package in uuids}
    assert "Test" in standard
    assert standard == {package: uuids[package] for package in standard}
