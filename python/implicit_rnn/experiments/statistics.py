"""The statistics the experiments report."""

from __future__ import annotations

from math import sqrt

Z_95 = 1.959963984540054


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is no proportion")
    p, z2 = successes / trials, Z_95**2
    centre = p + z2 / (2 * trials)
    half = Z_95 * sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    low, high = (centre - half) / (1 + z2 / trials), (centre + half) / (1 + z2 / trials)
    return max(low, 0.0) if successes else 0.0, min(high, 1.0) if successes < trials else 1.0
