"""Every public name has a docstring that says what it takes, of which shape, what it raises, and an example that runs."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import re
import warnings
from collections.abc import Callable
from types import ModuleType

import matplotlib as mpl
import numpy as np
import pytest

import implicit_rnn as irnn
from implicit_rnn import errors, plotting, runs

PUBLIC = (
    {name: getattr(irnn, name) for name in irnn.__all__ if name != "__version__"}
    | {f"errors.{name}": getattr(errors, name) for name in ("DerivativeWarning", "RunError", "ScaleWarning")}
    | {f"runs.{name}": getattr(runs, name) for name in ("prepare_worker", "run_many")}
    | {f"plotting.{name}": getattr(plotting, name) for name in ("decision_surface", "loss_curve", "topology")}
)
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
SHAPE = re.compile(r"\((\w+|\.\.\.)(,( [\w.]+)?)+\)|shape|number|None")


def ours(cls: type) -> list[type]:
    """The class and its bases in this package."""
    return [base for base in cls.__mro__ if base.__module__.startswith("implicit_rnn.")]


def members(cls: type) -> dict[str, object]:
    """The public methods and properties of a class, as they are defined; not its fields."""
    names = {name: value for base in reversed(ours(cls)) for name, value in vars(base).items() if name[0] != "_"}
    fields = getattr(cls, "__dataclass_fields__", {})
    return {
        name: value
        for name, value in names.items()
        if name not in fields and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
    }


METHODS = {
    f"{owner}.{name}": (cls, name)
    for owner, cls in CLASSES.items()
    for name, value in members(cls).items()
    if inspect.isfunction(getattr(value, "__func__", value))
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


def section(doc: str, title: str) -> str:
    """A section of a docstring in NumPy style; empty where there is none."""
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\w[\w ]*\n---|\Z)", doc, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def described(doc: str, title: str = "Parameters") -> dict[str, str]:
    """What a section says of each name."""
    entries = re.findall(r"^(\w[\w, ]*)\n((?: +.*\n?|\n)+)", section(doc, title) + "\n", re.MULTILINE)
    return {name: text for names, text in entries for name in names.split(", ")}


def documents(cls: type, name: str) -> list[str]:
    """The docstrings of a method, in the class and where the bases say what it is."""
    return [inspect.cleandoc(vars(base)[name].__doc__ or "") for base in ours(cls) if name in vars(base)]


def known_parameters(docs: list[str], module: ModuleType = irnn) -> dict[str, str]:
    """What docstrings say of parameters, or that of what the first of them refers to."""
    others = [inspect.getdoc(getattr(module, name)) for name in re.findall(r"those of ``(\w+)``", docs[0])]
    return {key: text for doc in reversed([*docs, *others]) for key, text in described(doc).items()}


def parameters(call: Callable) -> dict[str, str]:
    """The annotations of the parameters of a call, by name."""
    return {
        p.name: str(p.annotation) for p in inspect.signature(call).parameters.values() if p.name not in ("self", "cls")
    }


def check_parameters(call: Callable, known: dict[str, str]) -> None:
    wanted = parameters(call)
    assert not wanted.keys() - known.keys(), "parameters that are not described"
    shapeless = [name for name, kind in wanted.items() if "Array" in kind and not SHAPE.search(known[name])]
    assert not shapeless, "arrays without a shape"


# --- what is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring_of_its_own_with_an_example(name):
    doc = vars(PUBLIC[name]).get("__doc__") if name in CLASSES else PUBLIC[name].__doc__
    assert doc
    assert section(inspect.cleandoc(doc), "Examples")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_describes_its_parameters_and_errors(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    check_parameters(FUNCTIONS[name], described(doc))
    if not name.startswith("plotting"):
        assert section(doc, "Raises")


@pytest.mark.parametrize("name", CLASSES)
def test_class_describes_its_parameters_or_fields(name):
    cls, docs = CLASSES[name], [inspect.getdoc(base) or "" for base in ours(CLASSES[name])]
    known = {
        key: text
        for doc in docs
        for title in ("Parameters", "Attributes")
        for key, text in described(doc, title).items()
    }
    if dataclasses.is_dataclass(cls):
        internal = {"equation", "compiled"}  # of ImplicitSolution
        assert not {field.name for field in dataclasses.fields(cls)} - known.keys() - internal
    elif "__init__" in vars(cls):
        check_parameters(cls.__init__, known)


@pytest.mark.parametrize("name", [n for n, cls in CLASSES.items() if "__post_init__" in vars(cls)] + ["Network"])
def test_class_that_checks_its_options_says_what_it_raises(name):
    assert any(section(inspect.getdoc(base) or "", "Raises") for base in ours(CLASSES[name]))


@pytest.mark.parametrize("name", METHODS)
def test_method_describes_its_parameters(name):
    cls, method = METHODS[name]
    assert any(documents(cls, method))
    check_parameters(getattr(cls, method), known_parameters(documents(cls, method)))


@pytest.mark.parametrize("name", METHODS)
def test_method_that_returns_an_array_says_its_shape(name):
    cls, method = METHODS[name]
    if "Array" in str(inspect.signature(getattr(cls, method)).return_annotation):
        assert SHAPE.search("\n".join(documents(cls, method)))


@pytest.mark.parametrize("name", METHODS)
def test_method_that_raises_says_so(name):
    cls, method = METHODS[name]
    if re.search(r"^\s+raise ", inspect.getsource(inspect.unwrap(getattr(cls, method))), re.MULTILINE):
        assert re.search("Raises|raises", "\n".join(documents(cls, method)))


@pytest.mark.parametrize("owner", CLASSES)
def test_every_member_is_in_an_example(owner):
    cls = CLASSES[owner]
    examples = "\n".join(
        line
        for base in ours(cls)
        for doc in [base.__doc__, *(getattr(value, "__doc__", None) for value in vars(base).values())]
        for line in (doc or "").splitlines()
        if line.lstrip().startswith((">>>", "..."))
    )
    missing = [name for name in members(cls) if not re.search(rf"\.{name}\b", examples)]
    assert not missing


# --- what runs -----------------------------------------------------------------------------------------------


def examples(name: str) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    objects = ours(PUBLIC[name]) if name in CLASSES else [PUBLIC[name]]
    return [test for value in objects for test in finder.find(value, value.__name__, globs={"np": np, "irnn": irnn})]


def run(tests: list[doctest.DocTest]) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def needs_julia(test: doctest.DocTest) -> bool:
    return any('engine="julia"' in example.source for example in test.examples)


@pytest.fixture(autouse=True)
def figures_that_are_not_shown():
    mpl.use("Agg")
    yield
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.mark.filterwarnings("ignore::implicit_rnn.EngineWarning")
@pytest.mark.parametrize("name", PUBLIC)
def test_examples_give_what_they_say_on_the_numpy_engine(name, monkeypatch):
    monkeypatch.setenv("IMPLICIT_RNN_ENGINE", "numpy")
    with warnings.catch_warnings():  # examples may change the filters
        run([test for test in examples(name) if not needs_julia(test)])


# --- the doors to other libraries, where these are installed -----------------------------------------------------


@pytest.mark.parametrize("door", ["jax", "sklearn", "torch"])
def test_names_of_a_door_are_described_and_their_examples_run(door, monkeypatch):
    pytest.importorskip(door)
    monkeypatch.setenv("IMPLICIT_RNN_ENGINE", "numpy")
    module = importlib.import_module(f"implicit_rnn.{door}")
    for name in module.__all__:
        value = getattr(module, name)
        doc = inspect.getdoc(value)
        assert section(doc, "Examples"), name
        assert not parameters(value).keys() - known_parameters([doc], module).keys(), name
        for method in (
            (m for m in members(value) if inspect.isfunction(vars(value).get(m))) if inspect.isclass(value) else ()
        ):
            said = inspect.cleandoc(vars(value)[method].__doc__ or "")
            assert said, f"{name}.{method}"
            missing = [each for each in parameters(getattr(value, method)) if not re.search(rf"\b{each}\b", said)]
            assert not missing, f"{name}.{method} does not tell of {missing}"
        run(doctest.DocTestFinder().find(value, name, extraglobs={"np": np, "irnn": irnn}))


@pytest.mark.julia
@pytest.mark.parametrize("name", [name for name in PUBLIC if any(map(needs_julia, examples(name)))])
def test_examples_of_the_julia_engine_give_what_they_say(name):
    run([test for test in examples(name) if needs_julia(test)])
