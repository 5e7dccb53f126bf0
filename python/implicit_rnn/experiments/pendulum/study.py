"""The training runs: one model with one seed, the whole study, and the choice of the learning rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from implicit_rnn.engines import get_engine
from implicit_rnn.experiments.pendulum.data import Data, Normalisation, Sizes
from implicit_rnn.experiments.pendulum.models import MODELS, Model
from implicit_rnn.experiments.pendulum.reader import Reader
from implicit_rnn.experiments.pendulum.simulation import Pendulums, cramer_rao_floor
from implicit_rnn.experiments.provenance import versions
from implicit_rnn.model.optimizers import Adam
from implicit_rnn.runs import run_many

Array = np.ndarray

RATES = (1e-3, 2e-3, 5e-3, 1e-2)
TUNING_SEEDS = range(100, 105)


@dataclass(frozen=True)
class Protocol:
    """What is the same for every model."""

    sizes: Sizes = field(default_factory=Sizes)
    epochs: int = 300
    batch_size: int = 100
    clip: float = 1.0
    validation_every: int = 10

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Protocol:
        return cls(**{**data, "sizes": Sizes(**data["sizes"])})


FULL = Protocol()
QUICK = Protocol(Sizes(train=200, validation=100, test=300), epochs=40)
"""To see that everything works: its numbers say nothing about the models."""


@dataclass(frozen=True)
class Outcome:
    """What came out of one model with one seed."""

    nrmse: tuple[float, float]
    """Of length and damping, on the test set: root mean squared error by standard deviation of the target."""
    curve_epochs: tuple[int, ...]
    curve: tuple[float, ...]
    """Root mean squared error on the validation set, of normalised targets, at those epochs."""
    unconverged: int
    """Test samples without an equilibrium."""
    training_unconverged: int
    """Samples without an equilibrium over all training steps."""
    iterations: float
    """Mean over the test samples."""
    seconds: float
    """The time of the training."""
    parameters: tuple[float, ...]
    """Those of the trained net."""

    @property
    def total(self) -> float:
        """The primary measure: the root mean square of both NRMSE."""
        return float(np.sqrt(np.mean(np.square(self.nrmse))))

    @property
    def validation(self) -> float:
        """The lowest error on the validation set, whose parameters were kept."""
        return min(self.curve)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        sequences = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **sequences})


def train(
    model: Model, seed: int, learning_rate: float, protocol: Protocol = FULL, engine: str | None = None
) -> tuple[Reader, Outcome]:
    """Train a model on the data of a seed and judge it on the test set."""
    data = Data.of_seed(seed, protocol.sizes)
    scaling = Normalisation.of(data.train)
    net = model.network(seed, engine)
    run = net.fit(
        *_scaled(scaling, data.train),
        optimizer=Adam(learning_rate),
        schedule="cosine",
        epochs=protocol.epochs,
        batch_size=protocol.batch_size,
        clip=protocol.clip,
        solver=model.solver,
        adjoint=model.adjoint,
        validation=_scaled(scaling, data.validation),
        validation_every=protocol.validation_every,
        restore_best=True,
        seed=seed,
        progress=False,
        on_failure="ignore",
    )
    reader = Reader(net, scaling, model.solver)
    predicted, solution = reader.solve(data.test.measured)
    errors = predicted - data.test.parameters
    nrmse = np.sqrt(np.mean(errors**2, axis=0)) / data.test.parameters.std(axis=0)
    outcome = Outcome(
        (float(nrmse[0]), float(nrmse[1])),
        tuple(run.validation_epochs.tolist()),
        tuple(np.sqrt(run.validation_loss).tolist()),
        int((~solution.converged).sum()),
        int(run.unconverged.sum()),
        float(solution.iterations.mean()),
        run.seconds,
        tuple(net.parameters.tolist()),
    )
    return reader, outcome


def _scaled(scaling: Normalisation, pendulums: Pendulums) -> tuple[Array, Array]:
    return scaling.inputs(pendulums.measured), scaling.targets(pendulums.parameters)


def _run(model: str, seed: int, learning_rate: float, protocol: dict[str, Any], engine: str) -> dict[str, Any]:
    return asdict(train(MODELS[model], seed, learning_rate, Protocol.from_dict(protocol), engine)[1])


@dataclass(frozen=True)
class Study:
    """All outcomes of a study, and what is needed to repeat it."""

    outcomes: dict[str, list[Outcome]]
    """By the name of the model, in the order of the seeds."""
    seeds: tuple[int, ...]
    protocol: Protocol
    engine: str
    seconds: float
    """From beginning to end; runs that were kept from an earlier call took none."""
    kept: int
    """Runs kept from an earlier call."""

    def totals(self, model: str) -> list[float]:
        """The primary measure of each seed."""
        return [outcome.total for outcome in self.outcomes[model]]

    def test_set(self) -> Pendulums:
        return Data.of_seed(self.seeds[0], self.protocol.sizes).test

    def floor(self) -> Array:
        """(2,) the Cramér-Rao floor of the test set."""
        return cramer_rao_floor(self.test_set())

    def reader(self, model: str, index: int) -> Reader:
        """The trained net of that model and the seed of that index."""
        net = MODELS[model].network(engine=self.engine)
        net.parameters = np.array(self.outcomes[model][index].parameters)
        scaling = Normalisation.of(Data.of_seed(self.seeds[index], self.protocol.sizes).train)
        return Reader(net, scaling, MODELS[model].solver)


def run(
    models: Sequence[str] = tuple(MODELS),
    seeds: Sequence[int] = range(30),
    protocol: Protocol = FULL,
    *,
    engine: str | None = None,
    jobs: int = 1,
    folder: str | Path | None = None,
    report: Callable[[str, bool], None] = lambda name, kept: None,
) -> Study:
    """Train and judge all models on all seeds; ``jobs``, ``folder`` and ``report`` as in ``runs.run_many``.

    Raises ``ValueError`` for unknown names and too few seeds, ``RunError`` if runs fail.
    """
    _check(models, seeds)
    begin = time.perf_counter()
    rates = {name: (MODELS[name].learning_rate,) for name in models}
    results, used, kept = _run_all(models, seeds, rates, protocol, engine, jobs, folder, report)
    outcomes = {name: [results[name, seed, rates[name][0]] for seed in seeds] for name in models}
    return Study(outcomes, tuple(seeds), protocol, used, time.perf_counter() - begin, kept)


@dataclass(frozen=True)
class Tuning:
    """The validation error of each learning rate, and the rate that won."""

    errors: dict[str, dict[float, float]]
    """By model and learning rate: the geometric mean over the tuning seeds."""
    unconverged: dict[str, dict[float, int]]
    """Seeds in whose training some sample had no equilibrium."""
    protocol: Protocol
    seeds: tuple[int, ...]
    engine: str

    def best(self, model: str) -> float:
        """The learning rate with the lowest validation error."""
        return min(self.errors[model], key=self.errors[model].__getitem__)


def tune(
    models: Sequence[str] = tuple(MODELS),
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = TUNING_SEEDS,
    protocol: Protocol = FULL,
    *,
    engine: str | None = None,
    jobs: int = 1,
    folder: str | Path | None = None,
    report: Callable[[str, bool], None] = lambda name, kept: None,
) -> Tuning:
    """Compare learning rates by the validation error, on seeds that the study does not use; the test set is not looked at."""
    _check(models, seeds)
    results, used, _ = _run_all(
        models, seeds, dict.fromkeys(models, tuple(rates)), protocol, engine, jobs, folder, report
    )

    def over_seeds(model: str, rate: float) -> list[Outcome]:
        return [results[model, seed, rate] for seed in seeds]

    errors = {
        model: {rate: float(np.exp(np.mean([np.log(o.validation) for o in over_seeds(model, rate)]))) for rate in rates}
        for model in models
    }
    unconverged = {
        model: {rate: sum(o.training_unconverged > 0 for o in over_seeds(model, rate)) for rate in rates}
        for model in models
    }
    return Tuning(errors, unconverged, protocol, tuple(seeds), used)


def _check(models: Sequence[str], seeds: Sequence[int]) -> None:
    unknown = sorted(set(models) - set(MODELS))
    if unknown or not models or not len(seeds):
        raise ValueError(
            f"models {list(models)}, {len(seeds)} seeds: expected at least one seed and models among {', '.join(MODELS)}"
        )


def _run_all(
    models: Sequence[str],
    seeds: Sequence[int],
    rates: Mapping[str, tuple[float, ...]],
    protocol: Protocol,
    engine: str | None,
    jobs: int,
    folder: str | Path | None,
    report: Callable[[str, bool], None],
) -> tuple[dict[tuple[str, int, float], Outcome], str, int]:
    """The outcomes by model, seed and learning rate, the engine's name, and how many were kept from an earlier call."""
    used = get_engine(engine).name
    # Seed by seed, so that what is there after an interruption compares all models.
    keys = [(model, seed, rate) for seed in seeds for model in models for rate in rates[model]]
    tasks = {
        f"{model}-{seed}-{rate:g}": {
            "model": model,
            "seed": seed,
            "learning_rate": rate,
            "protocol": asdict(protocol),
            "engine": used,
        }
        for model, seed, rate in keys
    }
    kept = []

    def done(name: str, was_kept: bool) -> None:
        kept.append(was_kept)
        report(name, was_kept)

    settings = {"models": repr({name: replace(m, learning_rate=1.0) for name, m in MODELS.items()}), **versions()}
    results = run_many(_run, tasks, jobs=jobs, folder=folder, settings=settings, report=done)
    outcomes = {key: Outcome.from_dict(result) for key, result in zip(keys, results.values(), strict=True)}
    return outcomes, used, sum(kept)
