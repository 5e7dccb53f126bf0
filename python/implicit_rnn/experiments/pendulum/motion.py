"""A pendulum fitted to a record: least squares of its equation of motion, with the errors that the residual implies.

θ″ = -(g/l) sin θ - γ θ′, observed as an angle or an angular velocity with an unknown zero. The errors are those of linear
regression, s² (JᵀJ)⁻¹, with the residual variance s² multiplied by the time over which residuals are correlated, in
samples: neighbouring residuals that agree tell less than independent ones. If they are correlated, something does not fit,
and the errors are at least those of a jackknife over parts of the record.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from implicit_rnn.experiments.pendulum.simulation import GRAVITY
from implicit_rnn.experiments.pendulum.units import VELOCITY

Array = np.ndarray

PENDULUM = ("log length", "damping", "angle", "velocity", "zero")
"""Parameters of every fit; the angle and the velocity are those at the first time."""
EXTENSIONS = {
    "drift": ("a zero that moves by {value:.2g} {unit} per second", 0.0),
    "drag": ("air drag that grows with the square of the velocity (coefficient {value:.2g} 1/rad)", 0.0),
    "friction": ("dry friction in the bearing (a deceleration of {value:.2g} rad/s²)", 0.0),
    "scale": ("angles of {value:.3g} times their true size (another unit, an oblique camera)", 1.0),
}
"""What a record can have that the equation has not, one at a time: in words, and the value where it is absent."""
RELATIVE, ABSOLUTE = 1e-9, 1e-12
"""Tolerances of the integration."""
CORRELATED, PARTS = 2.0, 8
"""The correlation time in samples from which on errors are those of a jackknife too, if larger, and its parts."""
FAR = 1e3
"""Residuals, relative to the range of the record, of a motion that cannot be one: least squares shorten the step to it."""
RESOLUTION = 1e-7
"""Resolution of a motion, relative to its range: smaller residuals say nothing."""
STEP = 1e-30
"""The complex step of derivatives."""


@dataclass(frozen=True)
class Motion:
    """The motion of a pendulum from the time ``begin`` on, as a record of that quantity shows it."""

    begin: float
    quantity: str
    parameters: Array
    """The values of ``names``."""
    names: tuple[str, ...] = PENDULUM

    def __getitem__(self, name: str) -> float:
        return float(self.parameters[self.names.index(name)])

    @property
    def length(self) -> float:
        """In m."""
        return float(np.exp(self["log length"]))

    def swings(self, interval: float) -> bool:
        """Whether it is damped less than critically, with a period longer than the interval between samples."""
        with np.errstate(over="ignore"):
            frequency = float(np.sqrt(GRAVITY) * np.exp(-self["log length"] / 2))
        return abs(self["damping"]) < 2 * frequency and frequency * interval < 2 * np.pi

    def states(self, times: Array) -> Array:
        """(2, n) angles and angular velocities at increasing times, or at decreasing ones before ``begin``."""
        return np.asarray(self._states(times, self.parameters[:, None])[:, 0].real)

    def observed(self, times: Array) -> Array:
        """(n,) what a record would show at those times."""
        return self.linearised(times, jacobian=False)[0]

    def linearised(self, times: Array, jacobian: bool = True) -> tuple[Array, Array]:
        """What a record would show (n,), and its derivatives by the parameters (n, p), by the complex step."""
        steps = 1j * STEP * np.eye(len(self.names)) if jacobian else np.zeros((len(self.names), 1))
        theta = self.parameters[:, None] + steps
        angle, velocity = np.moveaxis(self._states(times, theta), 1, -1)
        named = dict(zip(self.names, theta, strict=True))
        shown = velocity if self.quantity == VELOCITY else angle
        shown = named.get("scale", 1.0) * shown + named["zero"]
        shown = shown + named.get("drift", 0.0) * (times - self.begin)[:, None]
        return shown[:, 0].real, shown.imag / STEP

    def _states(self, times: Array, theta: Array) -> Array:
        """(2, k, n) the states for each of the k columns of parameters."""
        from scipy.integrate import solve_ivp

        named = dict(zip(self.names, theta, strict=True))
        stiffness, damping = GRAVITY * np.exp(-named["log length"]), named["damping"]
        drag, friction = named.get("drag"), named.get("friction")
        slow = 0.01 * np.sqrt(stiffness.real) * max(float(np.abs(named["angle"][0])), 0.01)

        def rate(_: float, state: Array) -> Array:
            angle, velocity = state.reshape(2, -1)
            force = -stiffness * np.sin(angle) - damping * velocity
            if drag is not None:
                force = force - drag * velocity * np.where(velocity.real < 0, -velocity, velocity)
            if friction is not None:
                force = force - friction * np.tanh(velocity / slow)
            return np.concatenate([velocity, force])

        initial = np.concatenate([named["angle"], named["velocity"]])
        if (times == self.begin).all():
            return np.repeat(initial.reshape(2, -1, 1), len(times), axis=2)
        span = (self.begin, float(times[-1]))
        with np.errstate(over="ignore", invalid="ignore"):  # of which the solver tells
            solved = solve_ivp(rate, span, initial, "DOP853", times, rtol=RELATIVE, atol=ABSOLUTE)
        if not solved.success:
            raise FloatingPointError(f"the equation of motion was not integrated: {solved.message}")
        return np.asarray(solved.y).reshape(2, theta.shape[1], len(times))


@dataclass(frozen=True)
class Fit:
    """A motion fitted to a record, and how far to believe it."""

    motion: Motion
    errors: Array
    """Standard errors of the parameters."""
    residuals: Array
    """(n,) the record minus the motion."""
    per_period: float
    """Samples in a period of a small swing."""

    @property
    def noise(self) -> float:
        """The standard deviation of what is independent from sample to sample, by fourth differences.

        A misfit is smooth where the record is sampled well, and all but vanishes in the differences; the noise does not.
        Angular velocities that were computed as differences have noise that vanishes too, but not in those of every other
        or every fourth sample, which are taken as well where the record is dense enough.
        """
        if len(self.residuals) < 8:
            return float(np.std(self.residuals))
        sizes = []
        for lag in (1, 2, 4):
            if lag == 1 or (self.per_period > 16 * lag and len(self.residuals) > 8 * lag):
                weights = np.zeros(4 * lag + 1)
                weights[::lag] = 1, -4, 6, -4, 1
                sizes.append(np.sqrt(np.mean(np.convolve(self.residuals, weights, "valid") ** 2) / 70))
        return float(max(sizes))

    @property
    def residual(self) -> float:
        """Standard deviation of the residuals, for the degrees of freedom that are left."""
        freedom = max(len(self.residuals) - len(self.motion.names), 1)
        return float(np.sqrt(np.sum(self.residuals**2) / freedom))

    def error(self, name: str) -> float:
        """The standard error of a parameter."""
        return float(self.errors[self.motion.names.index(name)])

    @property
    def length_error(self) -> float:
        """In m."""
        return self.motion.length * self.error("log length")


def fit(motion: Motion, times: Array, values: Array, tolerance: float = 1e-8) -> Fit:
    """The motion of least squares near the given one."""
    from scipy.optimize import least_squares

    cache: dict[bytes, tuple[Array, Array]] = {}
    interval = float(np.median(np.diff(times)))

    def linearised(parameters: Array) -> tuple[Array, Array]:
        key = parameters.tobytes()
        if key not in cache:
            cache.clear()
            trial = replace(motion, parameters=parameters)
            if not trial.swings(interval):
                raise FloatingPointError("what fits best would not swing, or faster than there are samples")
            cache[key] = trial.linearised(times)
        return cache[key]

    def departures(parameters: Array) -> Array:
        try:
            return linearised(parameters)[0] - values
        except FloatingPointError:
            return np.full_like(values, FAR * np.ptp(values))

    linearised(motion.parameters)
    solution = least_squares(
        departures,
        motion.parameters,
        lambda p: linearised(p)[1],
        method="lm",
        x_scale="jac",
        xtol=tolerance,
        ftol=tolerance,
        gtol=tolerance,
        max_nfev=60,
    )
    found, jacobian = replace(motion, parameters=solution.x), solution.jac
    residuals = -solution.fun
    variance = np.sum(residuals**2) / max(len(times) - len(motion.parameters), 1) + (RESOLUTION * np.ptp(values)) ** 2
    scale = np.linalg.norm(jacobian, axis=0)
    scale[scale == 0] = 1
    correlated = correlation_time(residuals)
    errors = np.sqrt(variance * correlated * np.diag(np.linalg.pinv((jacobian / scale).T @ (jacobian / scale))))
    if correlated > CORRELATED:
        errors = np.maximum(errors, _jackknife(jacobian / scale, residuals))
    per_period = 2 * np.pi * np.sqrt(found.length / GRAVITY) / interval
    return Fit(found, errors / scale, residuals, per_period)


def _jackknife(jacobian: Array, residuals: Array) -> Array:
    """(p,) errors from how much the parameters move when a part of the record is left out, for each part in turn."""
    moved = []
    for part in np.array_split(np.arange(len(residuals)), PARTS):
        rest = np.delete(jacobian, part, axis=0)
        moved.append(np.linalg.pinv(rest.T @ rest) @ (jacobian[part].T @ residuals[part]))
    deviations = np.array(moved) - np.mean(moved, axis=0)
    return np.sqrt((PARTS - 1) / PARTS * np.sum(deviations**2, axis=0))


def grow(motion: Motion, times: Array, values: Array, period: float) -> Fit:
    """Fit the first three periods, then twice as many from what was found, until all is fitted.

    The frequency is thereby known well enough at each step that no oscillation is skipped in the next.
    """
    reach = 3 * period
    while True:
        within = times <= times[0] + reach
        found = fit(motion, times[within], values[within], 1e-8 if within.all() else 1e-5)
        if within.all():
            return found
        motion, reach = found.motion, 2 * reach


def correlation_time(residuals: Array) -> float:
    """1 + 2 Σ ρₖ of the residuals' autocorrelations ρₖ up to the first that is negative; at least 1."""
    n = len(residuals)
    spectrum = np.fft.rfft(residuals, 1 << int(np.ceil(np.log2(2 * n))))
    correlations = np.fft.irfft(np.abs(spectrum) ** 2)[1 : n // 2]
    power = float(np.sum(residuals**2))
    if power == 0 or not len(correlations):
        return 1.0
    negative = np.flatnonzero(correlations < 0)
    stop = int(negative[0]) if len(negative) else len(correlations)
    return 1 + 2 * float(np.sum(correlations[:stop])) / power


@dataclass(frozen=True)
class Alternative:
    """A fit with one thing more in it than the equation of a pendulum."""

    fit: Fit
    words: str
    """What it is, and of which size."""
    evidence: float
    """χ² by which it fits better, for residuals that are correlated as those of this fit are."""


def alternative(found: Fit, times: Array, values: Array, unit: str) -> Alternative | None:
    """The one of the extensions that the residuals ask for most.

    It is found by the score test: what the residuals lose by a small step along each, beside the parameters fitted.
    """
    extensions = list(EXTENSIONS)
    motion = found.motion
    absent = [EXTENSIONS[name][1] for name in extensions]
    every = replace(motion, names=(*motion.names, *extensions), parameters=np.concatenate([motion.parameters, absent]))
    jacobian = every.linearised(times)[1]
    base = np.linalg.qr(jacobian[:, : len(motion.names)])[0]
    scores = []
    for direction in jacobian[:, len(motion.names) :].T:
        new = direction - base @ (base.T @ direction)
        size = float(new @ new)
        scores.append((found.residuals @ new) ** 2 / size if size > 1e-18 * float(direction @ direction) else 0.0)
    best = int(np.argmax(scores))
    name, (words, value) = extensions[best], EXTENSIONS[extensions[best]]
    start = replace(motion, names=(*motion.names, name), parameters=np.append(motion.parameters, value))
    try:
        more = fit(start, times, values)
    except (FloatingPointError, np.linalg.LinAlgError):
        return None
    if not 0 < more.residual < found.residual:
        return None
    evidence = 2 * len(times) * np.log(found.residual / more.residual) / correlation_time(more.residuals)
    return Alternative(more, words.format(value=more.motion[name], unit=unit), float(evidence))
