"""Configuration objects: what an editor sees of them, what is said of misspelt names, and kinds that an engine does not know."""

from __future__ import annotations

import dataclasses
import inspect
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from conftest import make_net

import implicit_rnn as irnn
from implicit_rnn.model.constraints import Constraint, ConstraintLike
from implicit_rnn.model.losses import Loss, LossLike
from implicit_rnn.model.optimizers import Optimizer, OptimizerLike
from implicit_rnn.options import Option, choose
from implicit_rnn.solvers import Adjoint, AdjointLike, Solver, SolverLike
from implicit_rnn.training.schedules import Schedule, ScheduleLike

CLASSES = [
    value for name in irnn.__all__ if inspect.isclass(value := getattr(irnn, name)) and issubclass(value, Option)
]

# --- what an editor sees -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", CLASSES)
def test_signature_of_an_option_shows_its_fields_with_their_defaults(option):
    parameters = inspect.signature(option).parameters
    fields = dataclasses.fields(option)
    assert list(parameters) == [field.name for field in sorted(fields, key=lambda field: field.kw_only)]
    for field in fields:
        has_default = field.default is not dataclasses.MISSING
        assert parameters[field.name].default == (field.default if has_default else inspect.Parameter.empty)


@pytest.mark.parametrize(
    ("kind", "like"),
    [
        (Solver, SolverLike),
        (Adjoint, AdjointLike),
        (Loss, LossLike),
        (Constraint, ConstraintLike),
        (Optimizer, OptimizerLike),
        (Schedule, ScheduleLike),
    ],
)
def test_every_name_that_a_type_checker_completes_chooses_an_option_of_its_own(kind, like):
    names = get_args(get_args(like)[1])
    chosen = {type(choose(kind, name, "argument")) for name in names}
    nameless = {irnn.CustomLoss}  # which is nothing without its function
    assert chosen == {option for option in CLASSES if issubclass(option, kind)} - nameless
    assert len(names) == len(chosen)


def test_fit_shows_the_settings_of_fit_many_with_their_defaults():
    one = inspect.signature(irnn.Network.fit).parameters
    many = inspect.signature(irnn.fit_many).parameters
    assert list(one)[1:] == list(many)[1:]
    assert one["epochs"].default == many["epochs"].default == 100


@pytest.mark.parametrize(
    ("option", "number"),
    [
        (lambda x: irnn.Huber(x), Fraction(1, 2)),
        (lambda x: irnn.Anderson(ridge=x), Fraction(1, 4)),
        (lambda x: irnn.Perron(x), np.longdouble(0.5)),
        (lambda x: irnn.WarmUp(x), np.int64(3)),
    ],
)
def test_any_real_number_is_kept_as_one_of_python(option, number):
    plain = int(number) if isinstance(number, np.integer) else float(number)
    assert repr(option(number)) == repr(option(plain))


def test_number_beyond_those_of_the_machine_is_refused():
    with pytest.raises(ValueError, match=r"delta must be a number below 1.8e\+308, got a larger one"):
        irnn.Huber(Fraction(10**400))


def test_model_with_a_constraint_of_a_longdouble_is_saved(tmp_path):
    net = make_net("numpy", constraint=irnn.Perron(np.longdouble(0.5)))
    net.save(tmp_path / "net.safetensors")
    assert irnn.load(tmp_path / "net.safetensors").topology == net.topology


# --- misspelt names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda net, X, Y: irnn.Adam(learing_rate=1),
            "Adam has no option learing_rate; .*; did you mean learning_rate?",
        ),
        (lambda net, X, Y: net.predict(X, solver="newtn"), "solver is 'newtn'; .*; did you mean Newton?"),
        (lambda net, X, Y: irnn.Layer(3, "Tanh"), "unknown activation 'Tanh'; .*; did you mean tanh?"),
        (lambda net, X, Y: net.fit(X, Y, epohcs=3), "fit has no setting epohcs; .*; did you mean epochs?"),
        (lambda net, X, Y: irnn.WarmUp(3, "one cycle"), "then is 'one cycle'; .*; did you mean OneCycle?"),
        (lambda net, X, Y: make_net("nunpy"), "engine is 'nunpy'; .*; did you mean numpy?"),
        (lambda net, X, Y: irnn.NLsolve("trust-region"), "method is 'trust-region'; .*; did you mean trust_region?"),
    ],
)
def test_misspelt_name_is_refused_with_the_nearest_valid_one(call, message, X, Y):
    with pytest.raises((TypeError, ValueError), match=message.replace("?", r"\?$")):
        call(make_net("numpy"), X, Y)


def test_name_that_is_like_no_valid_one_gets_no_suggestion(X):
    with pytest.raises(ValueError, match=r"NLsolve$"):
        make_net("numpy").predict(X, solver="zzz")


# --- kinds of one's own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Constraint, Loss, Solver, Adjoint, Schedule])
def test_kind_of_ones_own_without_its_formula_cannot_be_made(kind):
    made_up = dataclasses.dataclass(frozen=True)(type("MadeUp", (kind,), {}))
    with pytest.raises(TypeError, match="abstract class MadeUp"):
        made_up()


@dataclasses.dataclass(frozen=True)
class MySolver(irnn.Picard):
    """A solver that no engine has, though it looks like one of theirs."""


@dataclasses.dataclass(frozen=True)
class MyAdjoint(irnn.Implicit):
    """Likewise."""


@dataclasses.dataclass(frozen=True)
class MyOptimizer(Optimizer):
    """Likewise."""


@dataclasses.dataclass(frozen=True)
class MyLoss(irnn.MSE):
    """Four times the mean squared error."""

    def values_and_derivatives(self, Y, T):
        values, derivatives = super().values_and_derivatives(Y, T)
        return 4 * values, 4 * derivatives


@dataclasses.dataclass(frozen=True)
class MyConstraint(irnn.Free):
    """Half of the weights."""

    def apply(self, K, scales, bounds):
        return K / 2

    def pullback(self, K, scales, bounds, R, dR):
        return dR / 2, scales


@pytest.mark.parametrize(
    "settings",
    [{"solver": MySolver()}, {"adjoint": MyAdjoint()}, {"optimizer": MyOptimizer()}],
    ids=lambda s: next(iter(s)),
)
def test_solver_adjoint_or_optimizer_that_the_engine_lacks_is_refused_by_name(engine, settings, X, Y):
    name = type(next(iter(settings.values()))).__name__
    with pytest.raises(irnn.EngineError, match=name):
        make_net(engine).fit(X, Y, epochs=1, **settings)


@pytest.mark.julia
@pytest.mark.parametrize(
    "base", [irnn.MSE, irnn.Perron, irnn.Picard, irnn.Implicit, irnn.SGD], ids=lambda b: b.__name__
)
def test_class_of_ones_own_is_not_taken_for_its_namesake_of_the_julia_engine(base, X, Y):
    mine = type(base.__name__, (base,), {"__module__": __name__})()
    setting = {irnn.MSE: "loss", irnn.Picard: "solver", irnn.Implicit: "adjoint", irnn.SGD: "optimizer"}.get(base)
    net = make_net("julia", **({} if setting else {"constraint": mine}))
    with pytest.raises(irnn.EngineError, match=f"the Julia engine has no .* {base.__name__}; use one of the package"):
        net.fit(X, Y, epochs=1, **({setting: mine} if setting else {}))


@pytest.mark.julia
def test_solver_of_ones_own_is_not_taken_for_its_namesake_where_it_solves_an_equation():
    newton = type("Newton", (irnn.Newton,), {"__module__": __name__})()
    with pytest.raises(irnn.EngineError, match="the Julia engine has no solver Newton; use one of the package"):
        irnn.root(irnn.julia("z -> z .- 1"), np.ones(1), solver=newton)


@pytest.mark.parametrize("factors", [np.nan, -1.0, np.inf])
def test_schedule_of_ones_own_has_a_finite_factor_for_each_step(engine, factors, X, Y):
    class Mine(irnn.Constant):
        def factors(self, t, steps_per_epoch, total):
            return np.full(len(t), factors)

    with pytest.raises(ValueError, match=r"the factors of Mine for 1 steps are .*; expected a finite number for each"):
        make_net(engine).fit(X, Y, epochs=1, schedule=Mine())


def test_schedule_of_ones_own_may_return_whole_numbers(engine, X, Y):
    class Mine(irnn.Constant):
        def factors(self, t, steps_per_epoch, total):
            return [2] * len(t)

    nets = make_net(engine), make_net(engine)
    nets[0].fit(X, Y, optimizer=irnn.SGD(0.1), epochs=3, schedule=Mine())
    nets[1].fit(X, Y, optimizer=irnn.SGD(0.2), epochs=3)
    assert (nets[0].parameters == nets[1].parameters).all()


def test_loss_of_ones_own_brings_its_formula_to_the_numpy_engine(X, Y):
    net = make_net("numpy")
    assert net.loss_and_gradient(X, Y, loss=MyLoss())[0] == pytest.approx(4 * net.loss_and_gradient(X, Y)[0])


def test_constraint_of_ones_own_brings_its_formula_to_the_numpy_engine(X):
    halved, free = make_net("numpy", constraint=MyConstraint()), make_net("numpy", constraint="free")
    free.parameters = halved.parameters
    free.weights["R"][...] /= 2
    assert (halved.predict(X) == free.predict(X)).all()


def test_subclass_does_not_hide_the_class_it_comes_from():
    assert make_net("numpy", constraint="free").topology.constraint == irnn.Free()
