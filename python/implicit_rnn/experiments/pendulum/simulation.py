"""The damped pendulum: its trajectories, how they are measured, and how well they can tell its parameters.

θ″ = -(g/l) sin θ - γ θ′, released at rest from θ₀. Length l in m, damping γ in 1/s, angles in rad, times in s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

GRAVITY = 9.81
STEP = 0.0125
"""The step of the integration, in s: a tenth of the sampling interval."""
INTERVAL = 0.125
TIMES = INTERVAL * np.arange(32)
NOISE = 0.02
"""Standard deviation of a measured angle, in rad."""

LENGTHS = (0.5, 2.0)
DAMPINGS = (0.05, 1.0)
RELEASES = (0.2, 1.4)
"""The ranges from which l, γ and θ₀ are drawn, uniformly."""

PARAMETERS = ("length", "damping")


@dataclass(frozen=True)
class Pendulums:
    """B pendulums and their measured trajectories."""

    parameters: Array
    """(B, 2) length and damping."""
    release: Array
    """(B,) the angle θ₀ at t = 0."""
    measured: Array
    """(B, 32) the angles at ``TIMES``, with noise."""

    def __getitem__(self, selected: slice) -> Pendulums:
        return Pendulums(self.parameters[selected], self.release[selected], self.measured[selected])


def trajectories(length: Array, damping: Array, release: Array, step: float = STEP) -> Array:
    """The angles (B, 32) at ``TIMES``, by the classical Runge-Kutta method with the given step.

    ``step`` must divide the sampling interval. Complex parameters pass through, for derivatives by the complex step.
    """
    per_sample = round(INTERVAL / step)
    if per_sample < 1 or abs(per_sample * step - INTERVAL) > 1e-9 * INTERVAL:
        raise ValueError(f"step is {step}; expected a whole fraction of the sampling interval {INTERVAL}")
    stiffness = GRAVITY / np.asarray(length)

    def rate(state: Array) -> Array:
        angle, velocity = state
        return np.stack([velocity, -stiffness * np.sin(angle) - damping * velocity])

    state = np.stack([release, np.zeros_like(release)]) * np.ones_like(stiffness)
    angles = [state[0]]
    for _ in range(len(TIMES) - 1):
        for _ in range(per_sample):
            k1 = rate(state)
            k2 = rate(state + 0.5 * step * k1)
            k3 = rate(state + 0.5 * step * k2)
            k4 = rate(state + step * k3)
            state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles.append(state[0])
    return np.stack(angles, axis=-1)


def measure(count: int, rng: np.random.Generator) -> Pendulums:
    """``count`` random pendulums and their noisy trajectories."""
    release = rng.uniform(*RELEASES, count)
    length = rng.uniform(*LENGTHS, count)
    damping = rng.uniform(*DAMPINGS, count)
    angles = trajectories(length, damping, release)
    return Pendulums(np.stack([length, damping], axis=1), release, angles + NOISE * rng.standard_normal(angles.shape))


def cramer_rao_variances(pendulums: Pendulums, noise: float = NOISE) -> Array:
    """(B, 2) the smallest variances of length and damping that any unbiased estimate from one trajectory can have.

    The Cramér-Rao bound with l, γ and θ₀ unknown: the Fisher matrix of a trajectory is SᵀS / σ², with S (32, 3) the
    sensitivities of the angles; the variances are on the diagonal of its inverse.
    """
    theta = np.stack([*pendulums.parameters.T, pendulums.release])
    tiny = 1e-30
    sensitivities = np.stack(
        [trajectories(*(theta + 1j * tiny * axis[:, None])).imag / tiny for axis in np.eye(3)], axis=-1
    )
    fisher = np.einsum("bti,btj->bij", sensitivities, sensitivities) / noise**2
    return np.asarray(np.linalg.inv(fisher)[:, [0, 1], [0, 1]])


def cramer_rao_floor(pendulums: Pendulums, noise: float = NOISE) -> Array:
    """(2,) the smallest NRMSE of length and damping that unbiased estimates for these pendulums can have.

    A biased estimate, such as that of a network that knows the ranges of the parameters, could go below it.
    """
    return np.asarray(np.sqrt(cramer_rao_variances(pendulums, noise).mean(axis=0)) / pendulums.parameters.std(axis=0))
