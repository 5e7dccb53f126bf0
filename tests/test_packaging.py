"""The package as it is shipped: one version everywhere, and a wheel that works far from the checkout."""

from __future__ import annotations

import json
import re
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from conftest import CHECKOUT, ENVIRONMENT, read_toml, run_process

import implicit_rnn as irnn
from implicit_rnn.runtime import environments, gpu

pytestmark = pytest.mark.skipif(not (CHECKOUT / "pyproject.toml").is_file(), reason="needs the checkout")

# --- one version ---------------------------------------------------------------------------------------------


@pytest.fixture
def project() -> dict:
    """julia/Project.toml, in which the version stands."""
    return read_toml(CHECKOUT / "julia" / "Project.toml")


def test_installed_package_has_the_version_of_the_julia_package(project):
    assert metadata.version("implicit-rnn") == irnn.__version__ == project["version"]


def test_pyproject_takes_the_version_from_the_julia_package():
    text = (CHECKOUT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert re.search(r'\[tool\.hatch\.version\]\npath = "julia/Project\.toml"', text)


def test_juliapkg_asks_for_the_julia_and_the_packages_that_the_julia_package_asks_for(project):
    asked = json.loads((CHECKOUT / "python" / "implicit_rnn" / "juliapkg.json").read_text())
    assert asked["julia"] == f"^{project['compat']['julia']}"
    assert asked["packages"] == {
        name: {"uuid": project["deps"][name], "version": project["compat"][name]}
        for name in environments.dependencies()
    }


def test_packages_that_setup_adds_for_cuda_are_those_of_the_extensions_in_versions_that_these_accept(project):
    asked = re.findall(r'name = "(\w+)", uuid = "([^"]+)", version = "([^"]+)"', gpu.ADD_CUDA)
    assert {"PythonCall": project["weakdeps"]["PythonCall"]} | {name: uuid for name, uuid, _ in asked} == project[
        "weakdeps"
    ]
    assert all(project["compat"][name].startswith(version) for name, _, version in asked)


def test_julia_package_has_the_licence():
    assert (CHECKOUT / "julia" / "LICENSE").read_bytes() == (CHECKOUT / "LICENSE").read_bytes()


def test_development_environment_of_julia_names_the_package_by_its_path():
    project = (CHECKOUT / "Project.toml").read_text()
    assert 'ImplicitRNN = {path = "julia"}' in project


def test_julia_package_and_python_package_accept_the_same_python_call(project):
    (oldest,) = re.search(r'"juliacall>=([\d.]+),<0\.10"', (CHECKOUT / "pyproject.toml").read_text()).groups()
    assert project["compat"]["PythonCall"] == oldest


def test_citation_has_the_version_and_names_the_paper(project):
    text = (CHECKOUT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [project["version"]]
    assert {"cff-version", "title", "message", "authors"} <= set(re.findall(r"^([\w-]+):", text, re.MULTILINE))
    assert "arXiv:2010.10564" in text


# --- the wheel -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(CHECKOUT)]
    done = run_process(command, ENVIRONMENT, 120)
    assert done.returncode == 0, str(done)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("name", ["juliapkg.json", "py.typed", "julia/Project.toml"])
def test_wheel_contains(names, name):
    assert f"implicit_rnn/{name}" in names


def test_wheel_contains_every_source_file_of_julia(names):
    sources = {
        str(path.relative_to(CHECKOUT)) for part in ("src", "ext") for path in (CHECKOUT / "julia" / part).rglob("*.jl")
    }
    assert {f"implicit_rnn/{name}" for name in sources} <= names


def test_wheel_contains_every_module_of_python(names):
    modules = {
        str(path.relative_to(CHECKOUT / "python"))
        for path in (CHECKOUT / "python" / "implicit_rnn").rglob("*.py")
        if "julia" not in path.parent.parts
    }
    assert modules <= names


def test_wheel_contains_no_tests_manifests_or_leftovers(names):
    unwanted = [n for n in names if re.search(r"julia/test/|Manifest|__pycache__|LocalPreferences|(^|/)tests/", n)]
    assert not unwanted


def test_wheel_installed_in_a_new_environment_runs_the_experiment(wheel, tmp_path):
    env = {n: v for n, v in ENVIRONMENT.items() if n not in ("PYTHONPATH", "VIRTUAL_ENV")} | {
        "XDG_CONFIG_HOME": str(tmp_path)
    }
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    install = run_process([str(scripts / "python"), "-m", "pip", "install", "--quiet", str(wheel)], env, 240, tmp_path)
    if re.search(r"Could not find a version|Connection|timed out|ProxyError", install.stderr):
        pytest.skip("needs the packages it depends on from an index")
    assert install.returncode == 0, str(install)
    arguments = ["xor", "--neurons", "2", "--constraint", "perron", "--seeds", "1", "--engine", "numpy", "--json"]
    done = run_process([str(scripts / "implicit-rnn"), *arguments], env, 120, tmp_path)
    assert done.returncode == 0, str(done)
    assert json.loads(done.stdout)["cells"][0]["neurons"] == 2
    assert (tmp_path / "xor" / "xor.png").is_file()
