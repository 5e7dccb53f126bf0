"""The Julia package by itself, without Python: its own tests."""

from __future__ import annotations

import os

import pytest
from conftest import CHECKOUT, ENVIRONMENT, run_process

from implicit_rnn.runtime import environments

NEEDED = ("Aqua", "ForwardDiff", "Zygote")


@pytest.mark.julia
@pytest.mark.timeout(600)
def test_the_tests_of_the_julia_package_pass(julia_environment):
    missing = set(NEEDED) - set(environments.manifest_versions(julia_environment.project))
    if missing:
        pytest.skip(f"the Julia project lacks {', '.join(sorted(missing))}")
    package = CHECKOUT / "julia"
    path = os.pathsep.join((julia_environment.project, str(package), "@stdlib"))
    command = [julia_environment.exe, "--startup-file=no", str(package / "test" / "runtests.jl")]
    done = run_process(command, ENVIRONMENT | {"JULIA_LOAD_PATH": path}, 560, package / "test")
    assert done.returncode == 0, str(done)
