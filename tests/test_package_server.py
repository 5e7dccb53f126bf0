"""From pip to a Julia that runs, by juliapkg, with an empty depot and a Julia package server on loopback.

Julia interprets here what it usually compiles, and CondaPkg, which only Conda needs, is a stand-in: what counts is what is
installed and used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import textwrap
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from conftest import CHECKOUT, ENVIRONMENT, NOWHERE, Finished, run_process
from package_server import PackageServer, make_index

from implicit_rnn.runtime import environments

pytestmark = [
    pytest.mark.julia,
    pytest.mark.skipif(os.name != "posix", reason="the stand-in for Julia's executable is a shell script"),
    pytest.mark.skipif(not (CHECKOUT / "pyproject.toml").is_file(), reason="needs the checkout"),
]

KRYLOVKIT = "0b1a1467-8014-51b9-945f-bf0ae24f4b77"
VERSION, NEWER = metadata.version("implicit-rnn"), "0.2.0"

# --- the packages ----------------------------------------------------------------------------------------------


def write_package(folder: Path, version: str, uuid: str, **tables: dict[str, str]) -> Path:
    """A Julia package that is nothing but its name; returns its folder."""
    name = folder.name
    lines = [f'name = "{name}"', f'uuid = "{uuid}"', f'version = "{version}"']
    for table, entries in tables.items():
        lines += [f"[{table}]", *(f'{key} = "{value}"' for key, value in entries.items())]
    (folder / "src").mkdir(parents=True)
    (folder / "Project.toml").write_text("\n".join(lines))
    (folder / "src" / f"{name}.jl").write_text(f"module {name} end")
    return folder


def stand_ins(folder: Path) -> list[Path]:
    """CondaPkg, and OpenSSL, which juliacall asks for in the version of Python's."""
    version = ".".join(map(str, ssl.OPENSSL_VERSION_INFO[:3]))
    return [
        write_package(folder / "OpenSSL_jll", version, "458c3c95-2e84-50aa-8efc-19380b2a3a95"),
        write_package(folder / "CondaPkg", "0.2.99", "992eb4ea-22a4-4c89-a5bb-47a3300528ab"),
    ]


def older_packages(folder: Path) -> list[Path]:
    """KrylovKit 0.9 and what would take it, did ImplicitRNN not ask for newer ones."""
    return [
        write_package(folder / "krylov" / "KrylovKit", "0.9.5", KRYLOVKIT),
        write_package(
            folder / "implicit" / "ImplicitDifferentiation",
            "0.9.0",
            "57b37032-215b-411a-8a7c-41a003a55207",
            deps={"KrylovKit": KRYLOVKIT},
            compat={"KrylovKit": "0.8, 0.9, 0.10"},
        ),
    ]


@pytest.fixture(scope="module")
def manifest(julia_environment) -> Path:
    """The manifest of the packages that can be served."""
    project = Path(julia_environment.project)
    found = [project / name for name in ("JuliaManifest.toml", "Manifest.toml") if (project / name).is_file()]
    if not found or "\npath = " not in found[0].read_text():
        pytest.skip("the Julia environment of this machine has no packages by their paths, which could be served")
    return found[0]


@pytest.fixture(scope="module")
def julia(julia_environment) -> str:
    return julia_environment.exe


@pytest.fixture(scope="module")
def index(julia, manifest, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    folders = [CHECKOUT / "julia", *stand_ins(folder), *older_packages(folder)]
    return make_index(julia, folder / "server", manifest, folders)


@pytest.fixture(scope="module")
def server(index):
    with PackageServer(index) as server:
        yield server


def build_wheel(folder: Path, version: str | None = None) -> Path:
    """A wheel of the checkout, as another version where one is given."""
    source = CHECKOUT
    if version is not None:
        source = folder / "source"
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(CHECKOUT / name, source / name)
        for name in ("julia", "python"):
            shutil.copytree(CHECKOUT / name, source / name, symlinks=True)
        project = source / "julia" / "Project.toml"
        project.write_text(project.read_text().replace(f'"{VERSION}"', f'"{version}"', 1))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    done = run_process(list(map(str, command)), ENVIRONMENT, 120)
    assert done.returncode == 0, str(done)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


# --- a machine ---------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """A user's home with a depot of Julia packages, and virtual environments."""

    home: Path
    settings: dict[str, str]
    wheel: Path
    patience: float = 280
    """seconds that a command may take"""
    prefix: tuple[str, ...] = ()
    """of every command"""

    def venv(self, name: str) -> Path:
        """The Python of a virtual environment in which pip has installed the wheel, made at its first use."""
        folder = self.home / name
        python = folder / "bin" / "python"
        if not folder.exists():
            venv.create(folder, with_pip=False)
            # What the package depends on is that of the environment of these tests.
            site = next(folder.glob("lib/python*/site-packages"))
            (site / "tests.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
            self.install(name, self.wheel)
        return python

    def site(self, name: str) -> Path:
        return next((self.home / name).glob("lib/python*/site-packages"))

    def project(self, name: str) -> Path:
        """Where juliapkg installs for a virtual environment."""
        return self.home / name / "julia_env"

    def install(self, name: str, wheel: Path) -> None:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.home / name / "bin" / "python",
            "--no-cache-dir",
            "install",
        ]
        done = run_process([*map(str, pip), "--no-index", "--no-deps", "--quiet", str(wheel)], self.settings, 120)
        assert done.returncode == 0, str(done)

    def run(self, name: str, *arguments: str, **settings: str) -> Finished:
        command = [*self.prefix, str(self.venv(name)), *arguments]
        return run_process(command, self.settings | settings, self.patience, self.home)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written anywhere on the machine meanwhile, not even by root."""
        if os.geteuid() == 0:
            if shutil.which("setpriv") is None:
                pytest.skip("no setpriv, without which root may write anywhere")
            self.prefix = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
        paths = [Path(folder) / name for folder, _, names in os.walk(self.home) for name in (".", *names)]
        modes = {path: path.stat().st_mode for path in paths if not path.is_symlink()}
        try:
            for path, mode in modes.items():
                path.chmod(mode & ~0o222)
            yield
        finally:
            self.prefix = ()
            for path, mode in modes.items():
                path.chmod(mode)

    def start(self, name: str, **settings: str) -> Finished:
        """Start an engine, whichever can be had; stdout is its name, and the Julia package's version if it is Julia's."""
        return self.run(name, "-c", textwrap.dedent(START), **settings)

    def start_julia(self, name: str, version: str = VERSION, **settings: str) -> str:
        """Start an engine, which has to be Julia's, with the Julia package of that version; what is said meanwhile."""
        started = self.start(name, **settings)
        assert started.stdout == f"julia {version}\n", str(started)
        return started.stderr

    def start_without_julia(self, name: str, **settings: str) -> str:
        """Start an engine where Julia cannot be installed; what is said of that."""
        started = self.start(name, **settings)
        assert started.stdout == "numpy \n", str(started)
        assert "juliapkg could not install" in started.stderr
        return started.stderr

    def doctor(self, name: str, *arguments: str, **settings: str) -> dict:
        return json.loads(self.run(name, "-m", "implicit_rnn", "doctor", "--json", *arguments, **settings).stdout)

    def compiled(self) -> set[Path]:
        return set((self.home / "depot" / "compiled").rglob("*.ji"))


START = """
    import warnings
    import implicit_rnn as irnn
    warnings.simplefilter("always")
    engine = irnn.get_engine()
    version = ""
    if engine.name == "julia":
        from implicit_rnn.runtime import start
        version = start.evaluate("string(pkgversion(Base.require(Main, :ImplicitRNN)))")
    print(engine.name, version)
"""
PREFERENCES = """
[extras]
PrecompileTools = "aea7be01-6a6a-4083-8856-8a6e6704d82a"

[preferences.PrecompileTools]
precompile_workloads = false
"""


def make_machine(home: Path, julia: str, server: PackageServer, wheel: Path, quick: bool) -> Machine:
    """A machine that has Julia and nothing else of it; where ``quick``, Julia interprets instead of compiling."""
    prefixes = ("PYTHON", "JULIA", "IMPLICIT", "XDG", "VIRTUAL_ENV", "SSL_CERT")
    names = [name for name in ENVIRONMENT if name.startswith(prefixes) or name.lower().endswith("_proxy")]
    # The code of Julia's standard library may have been compiled into the depot of whoever built Julia.
    bundled = home / "bundled"
    bundled.mkdir()
    for depot in [*os.environ.get("JULIA_DEPOT_PATH", "").split(os.pathsep), os.path.expanduser("~/.julia")]:
        if depot and (Path(depot) / "compiled").is_dir():
            (bundled / "compiled").unlink(missing_ok=True)
            (bundled / "compiled").symlink_to(Path(depot) / "compiled")
    settings = {name: value for name, value in ENVIRONMENT.items() if name not in names} | {
        "HOME": str(home),
        "JULIA_DEPOT_PATH": f"{home / 'depot'}{os.pathsep}{bundled}{os.pathsep}",
        "JULIA_PKG_SERVER": server.url,
        "PYTHON_JULIAPKG_EXE": julia,
    }
    if quick:
        version = run_process([julia, "-e", 'print("v$(VERSION.major).$(VERSION.minor)")'], ENVIRONMENT).stdout
        # Julia 1.10 would interpret Pkg, too, and cannot interpret code of LLVM.
        compiled = "yes" if version == "v1.10" else "min"
        script = home / "julia"
        script.write_text(f'#!/bin/sh\nexec "{julia}" -O0 --compile={compiled} "$@"\n')
        script.chmod(0o755)
        settings |= {
            "PYTHON_JULIAPKG_EXE": str(script),
            "PYTHON_JULIACALL_OPTIMIZE": "0",
            "PYTHON_JULIACALL_COMPILE": compiled,
        }
        project = home / "depot" / "environments" / version / "Project.toml"
        project.parent.mkdir(parents=True)
        project.write_text(PREFERENCES)
    return Machine(home, settings, wheel)


@pytest.fixture(scope="module")
def machine(julia, server, wheel, tmp_path_factory) -> Machine:
    return make_machine(tmp_path_factory.mktemp("machine"), julia, server, wheel, quick=True)


@pytest.fixture(scope="module")
def first_use(machine) -> Finished:
    """The first use of the package on that machine, in the virtual environment "one"."""
    return machine.start("one")


@pytest.fixture
def used(machine, first_use) -> Machine:
    """A machine on which the package has been used in the virtual environment "one"."""
    assert first_use.returncode == 0, str(first_use)
    return machine


# --- first use ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_first_use_installs_what_is_needed_and_starts(first_use, machine):
    assert first_use.stdout == f"julia {VERSION}\n", str(first_use)
    assert environments.manifest_versions(machine.project("one"))["PythonCall"] == metadata.version("juliacall")
    assert "Warning" not in first_use.stderr


def test_first_use_tells_of_each_phase_once_and_in_its_order(first_use):
    phases = [line.split(": ")[1].split(" (")[0] for line in first_use.stderr.splitlines() if "log in" in line]
    assert phases == [
        "choosing the versions of the packages",
        "downloading the packages",
        "precompiling the packages",
    ], str(first_use)


def test_second_start_compiles_nothing_and_needs_no_network(used):
    before = used.compiled()
    assert used.start_julia("one", JULIA_PKG_SERVER=NOWHERE) == ""
    assert used.compiled() == before


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_first_use_with_all_that_is_usually_compiled(julia, server, wheel, tmp_path):
    machine = make_machine(tmp_path, julia, server, wheel, quick=False)
    machine.patience = 1800
    assert "precompiling the Julia sources (once)" in machine.start_julia("one")
    before = machine.compiled()
    assert "precompiling the Julia sources" not in machine.start_julia("two")
    assert machine.compiled() == before


# --- two installations of one user -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_by_setup(machine, first_use) -> set[Path]:
    """What setup in the virtual environment "two" compiled."""
    before = machine.compiled()
    prepared = machine.run("two", "-m", "implicit_rnn", "setup")
    assert prepared.returncode == 0, str(prepared)
    return machine.compiled() - before


def test_second_virtual_environment_of_a_user_compiles_nothing(compiled_by_setup, machine):
    assert compiled_by_setup == set()
    (copy,) = (machine.home / "depot" / "packages" / "ImplicitRNN").iterdir()
    assert (copy / "src" / "ImplicitRNN.jl").is_file()


@pytest.mark.usefixtures("compiled_by_setup")
def test_setup_in_one_virtual_environment_leaves_the_other_as_it_is(used):
    for name in ("one", "two"):
        assert used.start_julia(name, JULIA_PKG_SERVER=NOWHERE) == ""


@pytest.mark.usefixtures("compiled_by_setup")
def test_setup_repairs_what_is_damaged(used):
    (project,) = used.home.glob(".local/share/implicit-rnn/julia-*")
    (project / "Manifest.toml").unlink()
    assert "run `implicit-rnn setup` again" in used.start("two").stderr
    assert used.run("two", "-m", "implicit_rnn", "setup").returncode == 0
    used.start_julia("two")


def test_two_processes_at_once_install_once_each_after_the_other_with_clean_output(used):
    shutil.rmtree(used.project("one"))
    command = [str(used.venv("one")), "-m", "implicit_rnn", "doctor", "--install", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env=used.settings, cwd=used.home, **pipes) for _ in range(2)]
    for process in both:
        stdout, stderr = process.communicate(timeout=120)
        assert json.loads(stdout)["julia engine"] == "ready", stderr


# --- where nothing can be written ----------------------------------------------------------------------------------


def test_read_only_environment_is_used_as_it_is_also_after_other_packages_have_come(used):
    with used.read_only():
        attempt = used.run("one", "-c", f"open({str(used.home / 'file')!r}, 'w')")
        assert "Permission denied" in attempt.stderr
        used.start_julia("one", JULIA_PKG_SERVER=NOWHERE)
    other = used.site("one") / "other"
    other.mkdir()
    (other / "juliapkg.json").write_text('{"packages": {}}')
    with used.read_only():
        started = used.start("one")
    shutil.rmtree(other)
    assert started.stdout == f"julia {VERSION}\n", str(started)
    assert started.stderr == ""


# --- a virtual environment that is moved ---------------------------------------------------------------------------


def test_moved_virtual_environment_is_used_with_the_julia_in_it_where_there_is_no_network(used):
    used.venv("here")
    julia = used.project("here") / "pyjuliapkg" / "install" / "bin" / "julia"  # where juliapkg would have put it
    julia.parent.mkdir(parents=True)
    shutil.copy(used.settings["PYTHON_JULIAPKG_EXE"], julia)
    used.start_julia("here", PYTHON_JULIAPKG_EXE=str(julia))
    before = used.compiled()
    (used.home / "here").rename(used.home / "there")
    assert used.start_julia("there", PYTHON_JULIAPKG_EXE="", JULIA_PKG_SERVER=NOWHERE) == ""
    assert used.compiled() == before
    environment = used.doctor("there", PYTHON_JULIAPKG_EXE="", JULIA_PKG_SERVER=NOWHERE)["julia"]
    assert environment["project"].startswith(str(used.project("there")))


# --- Jupyter -----------------------------------------------------------------------------------------------------


def test_installation_tells_of_its_progress_in_the_cell_of_a_notebook(used, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    settings = [f"{name}={value}" for name, value in used.settings.items()]
    kernel = ["env", "-i", *settings, str(used.venv("notebook")), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    specification = tmp_path / "kernels" / "machine" / "kernel.json"
    specification.parent.mkdir(parents=True)
    specification.write_text(json.dumps({"argv": kernel, "display_name": "machine", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(START))])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="machine", coalesce_streams=True).execute()
    shown = {output["name"]: output["text"] for output in notebook.cells[0].outputs}
    assert shown["stdout"] == f"julia {VERSION}\n"
    told = [re.sub(r"[\d.]+ s\b.*", "s", line) for line in shown["stderr"].splitlines()]
    assert told == [
        "implicit-rnn: installing Julia and its packages (once, some minutes)",
        "implicit-rnn: choosing the versions of the packages (s",
        "implicit-rnn: installed in s",
    ]


# --- packages that cannot be had together ------------------------------------------------------------------------


def test_conflict_with_another_package_is_named_and_gone_when_that_package_is(used):
    other = used.site("one") / "other"
    other.mkdir()
    wanted = {"packages": {"KrylovKit": {"uuid": KRYLOVKIT, "version": "0.9"}}}
    (other / "juliapkg.json").write_text(json.dumps(wanted))
    refused = used.start("one")
    shutil.rmtree(other)
    assert refused.stdout == "numpy \n", str(refused)
    assert "juliapkg could not install" in refused.stderr
    assert "'version' entries have empty intersection: - " in refused.stderr
    assert f"- '0.9' at {other / 'juliapkg.json'}" in refused.stderr
    assert "`implicit-rnn setup`" in refused.stderr
    used.start_julia("one")


# --- servers that fail -------------------------------------------------------------------------------------------


@pytest.fixture
def empty_depot(used, tmp_path) -> dict[str, str]:
    """Settings with which no package is installed, though all of them are compiled."""
    shutil.rmtree(used.project("one"), ignore_errors=True)
    shutil.copytree(used.home / "depot" / "environments", tmp_path / "environments")
    (tmp_path / "compiled").symlink_to(used.home / "depot" / "compiled")
    path = used.settings["JULIA_DEPOT_PATH"].split(os.pathsep)
    return {"JULIA_DEPOT_PATH": os.pathsep.join([str(tmp_path), *path[1:]])}


def test_server_that_dies_leads_to_the_numpy_engine_and_the_next_start_goes_on(used, empty_depot, index):
    with PackageServer(index, healthy=20, then="dies") as dying:
        used.start_without_julia("one", **empty_depot, JULIA_PKG_SERVER=dying.url)
    with PackageServer(index) as healthy:
        used.start_julia("one", **empty_depot, JULIA_PKG_SERVER=healthy.url)
        assert healthy.packages < len(environments.manifest_versions(used.project("one"))) - 10


@pytest.mark.slow
def test_server_that_stalls_leads_to_the_numpy_engine(used, empty_depot, index):
    with PackageServer(index, healthy=20, then="stalls") as stalling:
        used.start_without_julia("one", **empty_depot, JULIA_PKG_SERVER=stalling.url)


# --- mirrors with a certificate of their own, and proxies ----------------------------------------------------------


def test_mirror_whose_certificate_nobody_has_signed_is_refused_with_the_remedy(used, empty_depot, index, certificate):
    with PackageServer(index, certificate=certificate) as mirror:
        said = used.start_without_julia("one", **empty_depot, JULIA_PKG_SERVER=mirror.url)
    assert re.search(rf"packages: RequestError: .*\b[Cc]ert.* while requesting {mirror.url}/", said), said
    assert "name a file of the certificates to trust in SSL_CERT_FILE and JULIA_SSL_CA_ROOTS_PATH" in said
    assert mirror.packages == 0


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "JULIA_SSL_CA_ROOTS_PATH"])
def test_mirror_whose_certificate_is_trusted_is_used(used, empty_depot, index, certificate, variable):
    trust = {variable: str(certificate[0])}
    with PackageServer(index, certificate=certificate) as mirror:
        used.start_julia("one", **empty_depot, **trust, JULIA_PKG_SERVER=mirror.url)
    assert mirror.packages > 10


def test_mirror_behind_a_proxy_is_used(used, empty_depot, index):
    with PackageServer(index) as proxy:
        used.start_julia("one", **empty_depot, ALL_PROXY=proxy.url, JULIA_PKG_SERVER="http://mirror.invalid")
    assert proxy.packages > 10


# --- upgrade and downgrade ---------------------------------------------------------------------------------------


def test_upgrade_and_downgrade_bring_their_own_julia_sources(used, tmp_path):
    newer = build_wheel(tmp_path, NEWER)
    for wheel, version in ((newer, NEWER), (used.wheel, VERSION)):
        used.install("one", wheel)
        used.start_julia("one", version)


# --- Julia by itself ---------------------------------------------------------------------------------------------

TEST = """
    import Pkg
    Pkg.add("ImplicitRNN")
    # Pkg asks for checks of all bounds, for which every package would be compiled anew.
    existing = VERSION < v"1.11" ? `` : `--compiled-modules=existing`
    Pkg.test("ImplicitRNN"; test_args = ["network"], julia_args = `--check-bounds=auto $existing`)
"""


def test_pkg_test_installs_what_the_tests_need_and_runs_those_that_are_named(used, tmp_path):
    julia = [used.settings["PYTHON_JULIAPKG_EXE"], "--startup-file=no", f"--project={tmp_path}"]
    settings = used.settings | {"JULIA_PKG_PRECOMPILE_AUTO": "0"}
    done = run_process([*julia, "-e", textwrap.dedent(TEST)], settings, 280, used.home)
    assert done.returncode == 0, str(done)
    assert re.search(r"^ImplicitRNN +\| +(\d+) +\1 ", done.stderr, re.MULTILINE), str(done)
    assert "Testing ImplicitRNN tests passed" in done.stderr
