"""The angle of a pendulum from positions of its bob: about the pivot, the centre of the circle on which it moves.

Neither the unit of the positions nor the direction of their axes matters, since the position of rest is found later.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

ROUND, CERTAIN = 0.03, 0.02
"""The largest departure from the circle (root mean square) and the largest standard error of its radius, relative to it."""
LINE = 1e4
"""From a radius of so many times the extent of the positions on, they lie on a line."""


def angles_about_the_pivot(x: Array, y: Array) -> Array:
    """(n,) angles in rad from an arbitrary zero; ``ValueError`` if the positions do not tell where the pivot is.

    The circle is that of least squares of the distances, with a loss that forgives the few positions off it.
    """
    from scipy.optimize import least_squares

    # Kåsa's linear problem for the start: x² + y² = 2 a x + 2 b y + c.
    middle, size = np.array([x.mean(), y.mean()]), float(np.hypot(np.ptp(x), np.ptp(y)))
    u, v = (x - middle[0]) / size, (y - middle[1]) / size
    a, b, c = np.linalg.lstsq(np.stack([2 * u, 2 * v, np.ones_like(u)], axis=1), u**2 + v**2, rcond=None)[0]
    start = np.array([a, b, np.sqrt(max(c + a**2 + b**2, 1e-12))])

    def departures(p: Array) -> Array:
        return np.asarray(np.hypot(u - p[0], v - p[1]) - p[2])

    def slopes(p: Array) -> Array:
        du, dv = p[0] - u, p[1] - v
        distance = np.maximum(np.hypot(du, dv), np.finfo(np.float64).tiny)
        return np.stack([du / distance, dv / distance, -np.ones_like(u)], axis=1)

    # Without a bound on the gradient, which is small on a line as well, where the radius has to go on to grow.
    found = least_squares(departures, start, slopes, loss="soft_l1", f_scale=0.01, x_scale="jac", gtol=None)
    radius, off = abs(found.x[2]), departures(found.x)
    if np.sqrt(np.mean(off**2)) > ROUND * radius:
        raise ValueError(
            f"the positions are off a circle by {np.sqrt(np.mean(off**2)) / radius:.1%} of its radius, more than {ROUND:.0%}"
        )
    _, triangle = np.linalg.qr(slopes(found.x))  # whose last corner says what JᵀJ no longer can of a short arc
    error = np.std(off) / (radius * abs(triangle[2, 2])) if radius < LINE else 1.0
    if error > CERTAIN:
        raise ValueError(
            f"their arc is too short to tell the radius of the circle better than within {min(error, 1):.0%}"
        )
    return np.unwrap(np.arctan2(v - found.x[1], u - found.x[0]))
