"""The page "Installing": its steps are run, without a container engine and with a stand-in for the download of Julia."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT, ENVIRONMENT, run_process

import implicit_rnn as irnn
from implicit_rnn.runtime import environments

PAGE = (CHECKOUT / "python" / "docs" / "installing.md").read_text("utf-8")
PLACES = ("/src", "/opt", "/tmp")  # of the image, which lie in a folder of the test here

STAND_IN = """
import os
from pathlib import Path

def resolve(force=False, dry_run=False):
    if not dry_run:
        Path(os.environ["ASKED"]).write_text(os.environ["PYTHON_JULIAPKG_PROJECT"])
        raise SystemExit("ERROR: no Julia here")
"""


def block(language: str) -> str:
    return re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as pairs (instruction, its argument)."""
    return [tuple(line.split(" ", 1)) for line in block("dockerfile").splitlines()]


def section(name: str) -> list[str]:
    """The lines of a section of the Apptainer recipe."""
    found = re.search(rf"^%{name}\n((?:    .*\n)+)", block("apptainer"), re.MULTILINE)[1]
    return [line.strip() for line in found.splitlines()]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The files of the image before its first command: what COPY puts there."""
    wanted = ["pyproject.toml", "README.md", "LICENSE", "python", "julia"]
    for name in wanted:
        source, target = CHECKOUT / name, tmp_path / "src" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("docs", "__pycache__", "julia"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    shutil.copytree(CHECKOUT / "julia", tmp_path / "src" / "julia", dirs_exist_ok=True)
    (tmp_path / "stand-in" / "juliapkg").mkdir(parents=True)
    (tmp_path / "stand-in" / "juliapkg" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "stand-in" / "juliapkg" / "state.py").write_text(
        "import os\nSTATE = {'project': os.environ['PYTHON_JULIAPKG_PROJECT']}\n"
    )
    return tmp_path


def here(text: str, image: Path) -> str:
    """Text with the places of the image in the folder of the test."""
    return re.sub(rf"(?<![\w.])({'|'.join(PLACES)})\b", rf"{image}\1", text)


@pytest.mark.skipif(os.name != "posix", reason="the image is one of Linux")
def test_steps_of_the_dockerfile_install_the_package_and_ask_for_julia_where_it_is_looked_for_later(image):
    pytest.importorskip("hatchling", reason="needs hatchling, with which the package is built")
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    # No index is asked: what the package depends on is that of these tests, behind a stand-in for juliapkg.
    env = {
        name: value for name, value in ENVIRONMENT.items() if not name.startswith(("PYTHON", "JULIA", "IMPLICIT"))
    } | {
        "HOME": str(image),
        "XDG_CONFIG_HOME": str(image / "config"),
        "PYTHONPATH": os.pathsep.join([str(image / "stand-in"), packages]),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say that there is to be none
        "PIP_IGNORE_INSTALLED": "1",
        "PYTHON_JULIAPKG_OFFLINE": "yes",
        "ASKED": str(image / "asked"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    ends = []
    for instruction, argument in instructions():
        if instruction == "ENV":
            name, value = here(argument, image).split("=", 1)
            env[name] = value.replace("$PATH", env["PATH"])
        elif instruction == "RUN":
            ends.append(run_process(["bash", "-euc", here(argument, image)], env, 120, image))
    *python, julia = ends
    assert all(end.returncode == 0 for end in python), "\n".join(map(str, python))
    assert (image / "opt/irnn/lib").is_dir()
    version = run_process([str(image / "opt/irnn/bin/implicit-rnn"), "--version"], env, 60, image)
    assert version.stdout.strip() == irnn.__version__, str(version)
    assert julia.returncode == 1, str(julia)
    assert "no Julia here" in julia.stdout
    assert (image / "asked").read_text() == env["PYTHON_JULIACALL_PROJECT"]
    assert env["PYTHON_JULIACALL_EXE"].startswith(env["PYTHON_JULIACALL_PROJECT"] + "/pyjuliapkg/install/")


def test_apptainer_recipe_takes_the_steps_of_the_dockerfile():
    steps = {"RUN": "{}", "ENV": "export {}"}
    docker = [steps[kind].format(argument) for kind, argument in instructions() if kind in steps]
    last = max(index for index, line in enumerate(docker) if not line.startswith("export"))
    assert section("post") == docker[: last + 1]
    assert section("environment") == [line for line in docker if line.startswith("export PATH")] + docker[last + 1 :]
    assert section("files") == [argument for kind, argument in instructions() if kind == "COPY"]
    base = dict(instructions())["FROM"]
    assert f"From: {base}" in block("apptainer")


def test_project_for_machines_without_network_has_the_packages_that_the_julia_sources_need():
    listed = re.search(r"Pkg\.add\(\[(.*?)\]\)", PAGE)[1]
    assert re.findall(r'"(\w+)"', listed) == environments.dependencies()


def test_settings_that_the_page_names_are_those_of_the_code():
    package = "\n".join(path.read_text("utf-8") for path in (CHECKOUT / "python" / "implicit_rnn").rglob("*.py"))
    unknown = {
        name for name in re.findall(r"\b((?:IMPLICIT_RNN|PYTHON_JULIACALL)_[A-Z]+)\b", PAGE) if name not in package
    }
    assert not unknown


def test_options_that_the_page_names_are_those_of_the_command(run_cli):
    setup, doctor = (run_cli(command, "--help").stdout for command in ("setup", "doctor"))
    for option in ("--julia", "--project", "--remove"):
        assert option in setup
    assert "--install" in doctor
