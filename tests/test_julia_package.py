"""The Julia package by itself, for those who do not use Python: its own tests, and its names."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from conftest import CHECKOUT, ENVIRONMENT, read_toml, run_process

import implicit_rnn as irnn
from implicit_rnn.runtime import environments

NEEDED = ("Aqua", "ForwardDiff", "Zygote")
PACKAGE = CHECKOUT / "julia"
NOT_INSTALLED = {"CUDA", "InteractiveUtils", "LinearAlgebra", "Random", "Test", "julia"}
ON_THE_OLDEST = ("network", "solvers", "vjp")
LINT = PACKAGE / "test" / "lint"


@pytest.mark.timeout(900)
def test_the_tests_of_the_julia_package_pass(julia_environment):
    missing = set(NEEDED) - set(environments.manifest_versions(julia_environment.project))
    if missing:
        pytest.skip(f"the Julia project lacks {', '.join(sorted(missing))}")
    path = os.pathsep.join((julia_environment.project, str(PACKAGE), "@stdlib"))
    command = [julia_environment.exe, "--startup-file=no", "-O1", str(PACKAGE / "test" / "runtests.jl")]
    done = run_process(command, ENVIRONMENT | {"JULIA_LOAD_PATH": path}, 860, PACKAGE / "test")
    assert done.returncode == 0, str(done)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_oldest_packages_that_are_accepted_pass_the_tests_of_what_they_do(julia_environment, other_packages):
    project, settings = other_packages("lower")
    accepted = read_toml(PACKAGE / "Project.toml")["compat"]
    oldest = {name: bound.split(",")[0] for name, bound in accepted.items()}
    present = environments.manifest_versions(project)
    assert {name for name in oldest if not (present.get(name) or "").startswith(oldest[name])} <= NOT_INSTALLED
    command = [
        julia_environment.exe,
        "--startup-file=no",
        f"--project={project}",
        str(PACKAGE / "test" / "runtests.jl"),
    ]
    done = run_process([*command, *ON_THE_OLDEST], settings, 860, PACKAGE / "test")
    assert done.returncode == 0, str(done)


@pytest.mark.parametrize(("script", "tool"), [("format.jl", "runic"), ("errors.jl", "jet")])
def test_linters_of_julia_find_nothing(julia_environment, other_environment, script, tool):
    """The linters of the project julia/test/lint where it has been instantiated, else of Julia's shared @runic and @jet."""
    project = other_environment(str(LINT) if any(LINT.glob("Manifest*.toml")) else f"@{tool}")
    path = os.pathsep.join((str(project), str(PACKAGE), "@stdlib"))
    env, julia = ENVIRONMENT | {"JULIA_LOAD_PATH": path}, [julia_environment.exe, "--startup-file=no"]
    done = run_process([*julia, str(LINT / script)], env, 240)
    assert done.returncode == 0, str(done)


@pytest.mark.julia
@pytest.mark.parametrize("constraint", [irnn.Perron(), irnn.Free()], ids=str)
@pytest.mark.parametrize("neurons", [[4], [4, 2, 3]], ids=str)
def test_named_weights_of_julia_are_those_of_python_with_layers_counted_from_one(neurons, constraint):
    import juliacall

    net = irnn.Network(2, neurons, feedback=[(2, 1)] if len(neurons) > 1 else False, outputs=2, constraint=constraint)
    net.parameters = np.arange(net.parameters.size)
    julia = juliacall.newmodule("NamedWeights")
    julia.seval("using ImplicitRNN")
    feedback = "[3 => 2]" if len(neurons) > 1 else "false"
    julia.seval(
        f"net = Network(2, Layer.({neurons}); feedback = {feedback}, outputs = 2, constraint = {constraint.name}())"
    )
    named = julia.seval("named_weights(net, collect(0.0:(length(net) - 1)))")
    expected = {re.sub(r"\d+", lambda layer: str(int(layer[0]) + 1), name): w for name, w in net.weights.items()}
    assert set(named) == set(expected)
    for name, weights in expected.items():
        np.testing.assert_array_equal(np.asarray(named[name]), weights)
