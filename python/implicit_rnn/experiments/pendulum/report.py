"""What a study shows: tables as text, findings with their verdicts, and data for JSON. All from the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from implicit_rnn.experiments.pendulum.models import MODELS, SOLVER
from implicit_rnn.experiments.pendulum.simulation import NOISE, PARAMETERS
from implicit_rnn.experiments.pendulum.study import Outcome, Study, Tuning
from implicit_rnn.experiments.provenance import versions
from implicit_rnn.experiments.statistics import Ratio, holm, paired_ratio, signed_rank_less

PREREGISTERED = (("feedback", "ff2"), ("lateral", "ff2"), ("feedback", "lateral"))
"""The comparisons that are tested, the first said to have the smaller error."""
ALPHA, CLAIMED = 0.01, 0.95
"""A claim needs an adjusted p value below the one and the upper end of the ratio's interval below the other."""
GUARANTEES = tuple(
    (f"{free}-{constraint}", free) for free in ("lateral", "feedback") for constraint in ("perron", "monotone")
)
"""Each model with a guarantee, and the same model without."""
AFFORDABLE = 1.03
"""The ratio of errors up to which a guarantee is called nearly free."""
STRONG_MEAN, STRONG_HIGH = 0.85, 0.90
"""Mean ratio and upper end of its interval of what is called a clear gain."""


@dataclass(frozen=True)
class Finding:
    """A claim that could be true or false, the numbers it is judged by, and whether it holds."""

    claim: str
    numbers: str
    holds: bool

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'DOES NOT HOLD':<13}  {self.claim}: {self.numbers}"


def ratio(study: Study, model: str, reference: str) -> Ratio:
    """The error of a model against that of another, paired by seed."""
    return paired_ratio(study.totals(model), study.totals(reference))


def findings(study: Study) -> list[Finding]:
    """Every claim the study can judge, whatever its sign."""
    return list(_judged(study))


def _judged(study: Study) -> Iterator[Finding]:
    there = study.outcomes
    tested = [(a, b) for a, b in PREREGISTERED if a in there and b in there]
    p_values = holm([signed_rank_less(study.totals(a), study.totals(b)) for a, b in tested])
    for (a, b), p in zip(tested, p_values, strict=True):
        r = ratio(study, a, b)
        yield Finding(
            f"{_title(a)} has a smaller error than {_title(b)}, by more than {1 - CLAIMED:.0%} (preregistered)",
            f"ratio {r}, smaller for {r.below} of {r.pairs} seeds, p = {p:.1e} (Wilcoxon, Holm)",
            p < ALPHA and r.high < CLAIMED,
        )
    recurrent = [name for name in there if MODELS[name].recurrent and name != "bptt"]
    for name in recurrent if "ff2" in there else ():
        r = ratio(study, name, "ff2")
        claim = f"{_title(name)} is at least {1 - STRONG_MEAN:.0%} better than {_title('ff2')}, surely {1 - STRONG_HIGH:.0%}"
        yield Finding(claim, f"ratio {r}", r.mean <= STRONG_MEAN and r.high < STRONG_HIGH)
    for reference in ("ff3", "bptt"):
        for name in recurrent if reference in there else ():
            r = ratio(study, name, reference)
            yield Finding(f"{_title(name)} has a smaller error than {_title(reference)}", f"ratio {r}", r.high < 1)
    for guarded, free in GUARANTEES:
        if guarded in there and free in there:
            r = ratio(study, guarded, free)
            failed = unconverged_seeds(there[guarded])
            yield Finding(
                f"{_title(guarded)} costs at most {AFFORDABLE - 1:.0%} against {_title(free)} and always converges",
                f"ratio {r}, {failed} of {r.pairs} seeds with unconverged samples",
                r.mean <= AFFORDABLE and failed == 0,
            )
    for name in recurrent:
        if not MODELS[name].guaranteed:
            failed = unconverged_seeds(there[name])
            yield Finding(
                f"{_title(name)} converges without a guarantee",
                f"{failed} of {len(there[name])} seeds with unconverged test or training samples",
                failed == 0,
            )


def unconverged_seeds(outcomes: list[Outcome]) -> int:
    """Seeds for which some sample had no equilibrium, in training or in the test."""
    return sum(bool(outcome.unconverged or outcome.training_unconverged) for outcome in outcomes)


def table(study: Study) -> str:
    """The table of all models, and the findings, as text."""
    floor = study.floor()
    total_floor = float(np.sqrt(np.mean(floor**2)))
    width = max(len(MODELS[name].title) for name in study.outcomes)
    lines = [
        f"{'':<{width}} {'':>6} {'NRMSE, median':^23} {'excess':>7} {'ratio of errors, geometric mean [95 %]':^43} "
        f"{'without equilibrium':>20} {'seconds':>8}",
        f"{'model':<{width}} {'params':>6} {'total':>7} {'length':>7} {'damping':>7} {'×10³':>7} {'to ' + _title('ff2'):>21} "
        f"{'to ' + _title('ff3'):>21} {'test':>9} {'training':>10} {'a run':>8}",
    ]
    for name, outcomes in study.outcomes.items():
        length, damping = np.median([outcome.nrmse for outcome in outcomes], axis=0)
        excess = 1e3 * (np.median(np.square(study.totals(name))) - total_floor**2)
        against = [str(ratio(study, name, other)) if _compared(study, name, other) else "" for other in ("ff2", "ff3")]
        if name == "bptt":
            failed = ["no equil.", "no equil."]
        else:
            failed = [
                f"{sum(getattr(o, kind) > 0 for o in outcomes)} of {len(outcomes)}"
                for kind in ("unconverged", "training_unconverged")
            ]
        total, count = np.median(study.totals(name)), MODELS[name].network().topology.parameters
        lines.append(
            f"{MODELS[name].title:<{width}} {count:>6} {total:>7.4f} {length:>7.4f} {damping:>7.4f} {excess:>7.2f} "
            f"{against[0]:>21} {against[1]:>21} {failed[0]:>9} {failed[1]:>10} "
            f"{np.mean([outcome.seconds for outcome in outcomes]):>8.1f}"
        )
    lines.append(
        f"{'Cramér-Rao floor':<{width}} {'':>6} {total_floor:>7.4f} {floor[0]:>7.4f} {floor[1]:>7.4f} {0:>7.2f}"
    )
    lines += ["", *map(str, findings(study))]
    return "\n".join(lines)


def _compared(study: Study, name: str, other: str) -> bool:
    return other in study.outcomes and name != other


def _title(name: str) -> str:
    return MODELS[name].title


def as_dict(study: Study) -> dict[str, Any]:
    """Plain data for JSON."""
    floor = study.floor()
    compared = [(a, b) for a in study.outcomes for b in ("ff2", "ff3", "lateral", "feedback", "bptt")]
    return {
        "experiment": "pendulum",
        "protocol": {
            **asdict(study.protocol),
            "noise": NOISE,
            "solver": {"name": SOLVER.name, **SOLVER.options()},
            "seeds": list(study.seeds),
        },
        "versions": versions(),
        "engine": study.engine,
        "seconds": study.seconds,
        "runs_kept_from_an_earlier_call": study.kept,
        "cramer_rao_floor": dict(zip(PARAMETERS, floor.tolist(), strict=True))
        | {"total": float(np.sqrt(np.mean(floor**2)))},
        "models": {
            name: {
                "title": MODELS[name].title,
                "parameters": MODELS[name].network().topology.parameters,
                "constraint": repr(MODELS[name].constraint),
                "adjoint": repr(MODELS[name].adjoint),
                "learning_rate": MODELS[name].learning_rate,
                "runs": [_without_parameters(outcome) for outcome in outcomes],
            }
            for name, outcomes in study.outcomes.items()
        },
        "ratios": [{"model": a, "to": b, **asdict(ratio(study, a, b))} for a, b in compared if _compared(study, a, b)],
        "findings": [asdict(finding) for finding in findings(study)],
    }


def _without_parameters(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in asdict(outcome).items() if name != "parameters"} | {"total": outcome.total}


def tuning_table(tuning: Tuning) -> str:
    """The validation errors of all learning rates as text, the best of each model marked."""
    width = max(len(MODELS[name].title) for name in tuning.errors)
    rates = list(next(iter(tuning.errors.values())))
    lines = [f"{'model':<{width}} " + " ".join(f"{rate:>10g}" for rate in rates) + f" {'in use':>8}"]
    for name, errors in tuning.errors.items():
        best = tuning.best(name)
        cells = [f"{errors[rate]:>9.4f}{'*' if rate == best else ' '}" for rate in rates]
        lines.append(f"{MODELS[name].title:<{width}} {' '.join(cells)} {MODELS[name].learning_rate:>8g}")
    return "\n".join(lines)


def tuning_as_dict(tuning: Tuning) -> dict[str, Any]:
    """Plain data for JSON."""
    return {
        "experiment": "pendulum, learning rates",
        "protocol": {**asdict(tuning.protocol), "seeds": list(tuning.seeds)},
        "versions": versions(),
        "engine": tuning.engine,
        "models": {
            name: {
                "validation_error": {f"{rate:g}": error for rate, error in errors.items()},
                "seeds_with_unconverged_samples": {f"{r:g}": n for r, n in tuning.unconverged[name].items()},
                "best": tuning.best(name),
            }
            for name, errors in tuning.errors.items()
        },
    }
