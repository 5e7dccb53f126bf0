"""The statistics the experiments report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Ratio:
    """The geometric mean of paired ratios, with its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float
    below: int
    """Pairs whose ratio is below 1."""
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


RESAMPLES = 10_000


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """The geometric mean of a / b over pairs, with the percentile bootstrap interval (Efron, Ann. Stat. 7, 1979)."""
    logs = _log_ratios(a, b)
    drawn = np.random.default_rng(0).integers(len(logs), size=(RESAMPLES, len(logs)))
    low, high = np.exp(np.quantile(logs[drawn].mean(axis=1), (0.025, 0.975)))
    return Ratio(float(np.exp(logs.mean())), float(low), float(high), int((logs < 0).sum()), len(logs))


def signed_rank_less(a: Sequence[float], b: Sequence[float]) -> float:
    """The one-sided p value of Wilcoxon's signed-rank test on log(a / b), with "a is smaller" as the alternative.

    Wilcoxon, Biometrics Bulletin 1 (1945). From n pairs the smallest value it can give is 2⁻ⁿ.
    """
    from scipy.stats import wilcoxon

    logs = _log_ratios(a, b)
    return float(wilcoxon(logs, alternative="less").pvalue) if logs.any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P values of several tests, adjusted to control the family-wise error rate (Holm, Scand. J. Stat. 6, 1979)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(value) for value in adjusted]


def _log_ratios(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x) or not (x > 0).all() or not (y > 0).all():
        raise ValueError(f"expected pairs of positive numbers, got {len(x)} and {len(y)}: {x.tolist()}, {y.tolist()}")
    return np.log(x) - np.log(y)
