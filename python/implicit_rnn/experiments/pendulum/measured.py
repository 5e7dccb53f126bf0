"""Length and damping of your own pendulum, from a recording.

A record may begin before the release or in mid-swing, its zero may be anywhere, and its pendulum may have any length. The
release is located and everything before it cut; similarity maps the swing into the range of the training data: with the time
in units of s, a pendulum of l and γ is one of l/s² and γ s. A network reads it, and least squares of the equation of motion
refine the estimate. The errors of both are those implied by the residual of this record.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from implicit_rnn.experiments.pendulum.motion import Alternative, Fit, Motion, alternative, correlation_time, fit, grow
from implicit_rnn.experiments.pendulum.oscillation import binned
from implicit_rnn.experiments.pendulum.reader import Reader
from implicit_rnn.experiments.pendulum.record import Record, read
from implicit_rnn.experiments.pendulum.release import AGREEMENT, first_motion, swing_period
from implicit_rnn.experiments.pendulum.simulation import DAMPINGS, LENGTHS, RELEASES, TIMES
from implicit_rnn.experiments.pendulum.units import VELOCITY

Array = np.ndarray

TYPICAL_LENGTH = 1.1
"""The length in m to which a pendulum is mapped, if the record is long enough."""
PERIODS = 1.5
"""Number of periods that a record must have after the release."""
LONGEST_GAP = 0.5
"""The longest gap allowed in a record after the release, in periods."""
PLAUSIBLE = (0.01, 100.0)
"""Plausible lengths of pendulums in m; others indicate a wrong unit of time."""
NOISY, UNEXPLAINED = 0.5, 0.01
"""The largest shares of the record's variance that may be residual, and residual that is not noise."""
POOR_FIT = 0.1
"""The share of residual above which the refinement is repeated, starting from the rough fit."""
MOST = 0.6
"""The share of a record that must be free swing for the rest to be left out."""
GROWTH = 0.02
"""Relative growth of the energy over the record beyond which it is refused."""
UNCERTAIN = 0.01
"""The largest relative difference in length between two equations that fit."""
MISFIT = 1.2
"""The ratio of residual to noise, in a long record, above which a remark says what does not fit."""
NEGLIGIBLE = 1e-4
"""The ratio of residual to range up to which the residual is rounding, and causes no remark."""
BETTER = 0.8
"""Largest share of the residual that another equation may leave to count as its cause."""
EVIDENCE = 25.0
"""χ² by which another equation must fit better to be believed: five standard errors."""
DECISIVE = 5.0
"""Logarithm of the ratio of likelihoods by which one unit of angles is preferred to the other."""
OUTLIER, OUTLIERS = 8.0, 0.02
"""The residual relative to its median size beyond which a sample is left out as misread, and their largest share."""
TRIALS = 200
"""Number of simulated records for the error of the network's estimate."""


@dataclass(frozen=True)
class Reading:
    """A length (m) and a damping (1/s) with their standard errors."""

    length: float
    length_error: float
    damping: float
    damping_error: float

    def __str__(self) -> str:
        return (
            f"length {_with_error(self.length, self.length_error)} m, "
            f"damping {_with_error(self.damping, self.damping_error)} 1/s"
        )


@dataclass(frozen=True)
class Estimate:
    """The estimate of a pendulum from a record of it."""

    network: Reading
    """The network's estimate; the errors are those of its estimates on simulated records of this pendulum and this residual."""
    refined: Reading
    """Least squares of the equation of motion; the errors follow from the residual."""
    release: float
    """The angle at the release or the first turning point, from the position of rest, in rad."""
    release_time: float
    """The time of the release, in s from the first sample of the record; everything before it is not used."""
    end_time: float
    """The time of the last sample that is used."""
    zero: float
    """The value of the record at the position of rest, in rad, or rad/s for angular velocities."""
    periods: float
    """Number of periods from the release to the end of the used part."""
    residual: float
    """Standard deviation of the record from the refined pendulum, in rad or rad/s."""
    noise: float
    """The part of the residual that is independent from sample to sample."""
    unit: str
    understood: str
    """How the file was read."""
    remarks: tuple[str, ...]
    """Remarks needed to judge the reliability of the numbers."""
    record: Record = field(repr=False)
    motion: Motion = field(repr=False)

    def __str__(self) -> str:
        lines = [
            f"read      {self.understood}",
            f"network   {self.network}",
            f"refined   {self.refined}  (standard errors)",
            f"release   {self.release:.4g} rad ({np.degrees(self.release):.1f}°) at {self.release_time:.4g} s; "
            f"position of rest at {self.zero:.4g} {self.unit}",
            f"residual  {self.residual:.3g} {self.unit} over {self.periods:.1f} periods; noise {self.noise:.3g} "
            f"{self.unit}",
        ]
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.remarks)])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; length and damping are the refined ones."""
        others = [f.name for f in fields(self) if f.repr and f.name not in ("network", "refined")]
        return asdict(self.refined) | {"network": asdict(self.network)} | {name: getattr(self, name) for name in others}


def estimate(reader: Reader, record: Record | str | Path) -> Estimate:
    """The pendulum in a record; the ``ValueError`` says why no reliable one was found."""
    if not isinstance(record, Record):
        record = read(record)
    if record.assumed:
        return _in_either_unit(reader, record)
    return _judged(reader, _analysed(reader, record))


@dataclass(frozen=True)
class _Analysis:
    """A record with the motion fitted to it, not yet judged."""

    record: Record
    view: _View
    answer: Array
    """(2,) the network's length and damping."""
    found: Fit
    times: Array
    values: Array
    """The values that were fitted."""
    remarks: tuple[str, ...]

    @property
    def negligible(self) -> bool:
        """Whether the residual is only rounding."""
        return self.found.residual <= NEGLIGIBLE * np.ptp(self.values)


def _analysed(reader: Reader, record: Record) -> _Analysis:
    rough, period = first_motion(record)
    after = record.times >= rough.begin
    times, values, lines = record.times[after], record.values[after], record.lines[after]
    _check_extent(record, times, lines, period)
    view = _View.of(rough, times, period)
    answer = view.read(reader, values[:, None])[0]
    found = _refined(answer, rough, times, values, period)
    remarks: tuple[str, ...] = ()
    if _is_unexplained(found, values) and (end := _free_until(found, times, values, period)) is not None:
        free = times <= end
        remarks = (f"the record after {end:.3g} s (line {lines[free][-1]}) is no longer free swing, and is left out",)
        times, values, lines = times[free], values[free], lines[free]
        found = grow(found.motion, times, values, period)
    outliers = _outliers(found, values)
    if outliers.any():
        remarks = (*remarks, _left_out(lines[outliers], len(lines)))
        times, values = times[~outliers], values[~outliers]
        found = fit(found.motion, times, values)
    return _Analysis(record, view, answer, found, times, values, remarks)


def _judged(reader: Reader, analysis: _Analysis) -> Estimate:
    """The estimate with its errors and remarks; ``ValueError`` if it is not a pendulum."""
    record, found, motion = analysis.record, analysis.found, analysis.found.motion
    remarks = list(analysis.remarks)
    other = None
    if not analysis.negligible and found.residual**2 < NOISY * np.var(analysis.values):
        other = alternative(found, analysis.times, analysis.values, _unit(record))
        other = other if other is not None and other.evidence > EVIDENCE else None
    _check_pendulum(analysis, other)
    if not analysis.negligible:
        remarks += _misfit(analysis, other)
    remarks += analysis.view.out_of_range(motion)
    errors = analysis.view.errors(reader, found)
    shift = other.fit.motion if other is not None else motion
    refined = Reading(
        motion.length,
        float(np.hypot(found.length_error, shift.length - motion.length)),
        motion["damping"],
        float(np.hypot(found.error("damping"), shift["damping"] - motion["damping"])),
    )
    lasts = float(analysis.times[-1] - analysis.times[0])
    if refined.damping < -3 * refined.damping_error and refined.damping * lasts < -GROWTH:
        raise ValueError(
            f"{record.name}: the swing grows, with a damping of {_with_error(refined.damping, refined.damping_error)} "
            "1/s: something drives it, or the record runs backwards. A free pendulum is expected"
        )
    return Estimate(
        network=Reading(float(analysis.answer[0]), float(errors[0]), float(analysis.answer[1]), float(errors[1])),
        refined=refined,
        release=motion["angle"],
        release_time=motion.begin,
        end_time=float(analysis.times[-1]),
        zero=motion["zero"],
        periods=lasts / swing_period(motion),
        residual=found.residual,
        noise=found.noise,
        unit=_unit(record),
        understood=record.understood,
        remarks=tuple(remarks),
        record=record,
        motion=motion,
    )


def _in_either_unit(reader: Reader, record: Record) -> Estimate:
    """The estimate in rad or in degrees, whichever fits, for a record that does not say.

    A wide swing has a longer period than a narrow one, so the record itself shows the unit if its swing is wide or its
    noise small; otherwise rad is assumed and the other result mentioned.
    """
    degrees = _analysed(reader, record.in_degrees())
    try:
        rad = _analysed(reader, record)
    except ValueError:
        return _noted(
            _judged(reader, degrees),
            "the angles have no unit; as rad they are not a swing, so they are taken as degrees",
        )
    # The logarithm of the ratio of the likelihoods, with the residuals of both in the same unit; of correlated residuals
    # only so many count as are independent.
    independent = len(record.times) / max(correlation_time(a.found.residuals) for a in (rad, degrees))
    evidence = independent * np.log(rad.found.residual / np.degrees(degrees.found.residual))
    if evidence > DECISIVE:
        return _noted(
            _judged(reader, degrees),
            "the angles have no unit; they are taken as degrees, as no pendulum swings like this in rad",
        )
    found, length = _judged(reader, rad), degrees.found.motion.length
    if evidence < -DECISIVE or abs(length - found.refined.length) < found.refined.length_error:
        return found
    return _noted(
        found,
        f"the angles have no unit and are taken as rad; if they are degrees, the length is {length:.4g} m: --units "
        "rad or --units deg says which",
    )


def _noted(found: Estimate, remark: str) -> Estimate:
    return replace(found, remarks=(*found.remarks, remark))


def _unit(record: Record) -> str:
    return "rad/s" if record.quantity == VELOCITY else "rad"


# --- what can be believed ------------------------------------------------------------------------------------


def _check_extent(record: Record, times: Array, lines: Array, period: float) -> None:
    """Refuse a record that is too short, or has too long a gap."""
    lasts = float(times[-1] - times[0])
    if lasts < PERIODS * period:
        raise ValueError(
            f"{record.name} shows {lasts:.3g} s of free swing after {times[0]:.3g} s (line {lines[0]}), "
            f"{lasts / period:.3f} periods of {period:.3g} s; expected at least {PERIODS}: record it for longer"
        )
    gaps = np.diff(times)
    k = int(np.argmax(gaps))
    if gaps[k] > LONGEST_GAP * period:
        raise ValueError(
            f"{record.name} has a gap of {gaps[k]:.3g} s after line {lines[k]}, with a period of {period:.3g} s; "
            "expected gaps of at most half a period: keep only what is before or after it"
        )


def _check_pendulum(analysis: _Analysis, other: Alternative | None) -> None:
    """Refuse records that are not the swing of a pendulum, or not accurate enough to show that they are."""
    record, found, times, values = analysis.record, analysis.found, analysis.times, analysis.values
    length, residual, unit = found.motion.length, found.residual, _unit(record)
    variance = np.var(values)
    if _is_unexplained(found if other is None else other.fit, values):
        raise ValueError(
            f"{record.name} is not the free swing of a pendulum: the best that fits, {length:.3g} m long, leaves a "
            f"residual of {residual:.3g} {unit} of a root mean square of {np.std(values):.3g}, most of it around "
            f"{_worst(found, times):.3g} s. Cut the record to the free swing, or check --columns and --units"
        )
    if residual**2 > NOISY * variance:
        raise ValueError(
            f"{record.name} is too noisy: the swing has a root mean square of {np.std(values):.3g} {unit}, the noise "
            f"of {residual:.3g}; record a wider swing"
        )
    if not PLAUSIBLE[0] <= length <= PLAUSIBLE[1]:
        raise ValueError(
            f"{record.name}: a pendulum with this period would be {length:.3g} m long; expected {PLAUSIBLE[0]:g} to "
            f"{PLAUSIBLE[1]:g} m. Check the unit of the time, and give the true one by --units or --fps"
        )
    if other is not None and abs(other.fit.motion.length - length) > UNCERTAIN * length:
        raise ValueError(
            f"{record.name} does not determine the length: as it is, a pendulum of {length:.4g} m leaves a residual of "
            f"{residual:.2g} {unit}; {other.words} would leave {other.fit.residual:.2g} and make it "
            f"{other.fit.motion.length:.4g} m. Remove the cause, or record a smaller swing"
        )


def _is_unexplained(found: Fit, values: Array) -> bool:
    """Whether the residual has a larger part beyond the noise than the record of a pendulum has."""
    return found.residual**2 - found.noise**2 > UNEXPLAINED * np.var(values)


def _free_until(found: Fit, times: Array, values: Array, period: float) -> float | None:
    """The time at which a free swing is stopped, if most of the record is free swing; None if the problem is elsewhere."""
    early = times <= times[0] + MOST * (times[-1] - times[0])
    part = grow(found.motion, times[early], values[early], period)
    if _is_unexplained(part, values[early]) or times[early][-1] - times[0] < PERIODS * period:
        return None
    tolerance = 3 * part.residual + AGREEMENT * np.ptp(values[early]) / 2
    middles, means = binned(times, values - part.motion.observed(times), period)
    departs = np.abs(means) > tolerance
    late = np.flatnonzero(departs[:-1] & departs[1:] & (middles[:-1] > times[early][-1]))
    return float(middles[late[0]] - period / 4) if len(late) else None


def _worst(found: Fit, times: Array) -> float:
    """The time around which the residual is largest."""
    width = max(len(times) // 20, 1)
    power = np.convolve(found.residuals**2, np.ones(width), "same")
    return float(times[int(np.argmax(power))])


def _outliers(found: Fit, values: Array) -> Array:
    """(n,) which samples are misread: far from the motion and from their neighbours; none if there are too many."""
    from scipy.ndimage import median_filter

    size = np.abs(found.residuals)
    alone = np.abs(found.residuals - median_filter(found.residuals, 5, mode="mirror"))
    outliers = np.minimum(size, alone) > max(OUTLIER * np.median(size), NEGLIGIBLE * np.ptp(values))
    few = outliers.sum() <= max(OUTLIERS * len(size), 1)
    return outliers if few else np.zeros(len(size), bool)


def _left_out(lines: Array, total: int) -> str:
    some, more = ", ".join(map(str, lines[:5])), ", ..." if len(lines) > 5 else ""
    return f"{len(lines)} of {total} samples far off {'is' if len(lines) == 1 else 'are'} left out (line {some}{more})"


def _misfit(analysis: _Analysis, other: Alternative | None) -> list[str]:
    """A remark on what does not fit, if the residual is well above the noise or another equation fits clearly better."""
    record, found = analysis.record, analysis.found
    ratio = found.residual / max(found.noise, 1e-300)
    above = ratio > MISFIT + 3 / np.sqrt(len(found.residuals))
    residual = f"the residual of {found.residual:.2g} {_unit(record)} is {ratio:.1f} times the noise of this record"
    if other is not None and (not above or other.fit.residual < BETTER * found.residual):
        length = _with_error(other.fit.motion.length, other.fit.length_error)
        return [
            f"{residual}; {other.words} would leave {other.fit.residual:.2g} and make the length {length} m: the "
            "errors include the difference"
        ]
    if above:
        return [
            f"{residual}, and largest around {_worst(found, analysis.times):.3g} s: something there is not the free "
            "swing of a pendulum. The errors count it as noise"
        ]
    return []


# --- the network ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A record as inputs of a network: from the release on, in units in which its pendulum is within the training data.

    Small swings obey a linear equation: those below the releases of the training data are enlarged.
    """

    motion: Motion
    """The motion from the release on, whose position of rest is subtracted."""
    times: Array
    period: float
    scale: float
    """Seconds of the record in a second of the network."""
    gain: float

    @classmethod
    def of(cls, motion: Motion, times: Array, period: float) -> _View:
        scale = min(np.sqrt(motion.length / TYPICAL_LENGTH), float(times[-1] - times[0]) / TIMES[-1])
        sign = 1.0 if motion["angle"] >= 0 else -1.0
        gain = sign * max(RELEASES[0] / max(abs(motion["angle"]), 1e-12), 1.0)
        return cls(motion, times, period, scale, gain)

    def angles(self, values: Array) -> Array:
        """(B, 32) the network's inputs for B records (n, B), by splines through averages.

        Before the release they are extended by the mirror image of what follows.
        """
        from scipy.interpolate import CubicSpline

        knots, means = binned(self.times, self.gain * self._angles(values), self.period)
        own = slice(3, 0, -1)
        knots = np.concatenate([2 * self.times[0] - knots[own], knots])
        means = np.concatenate([means[own], means])
        wanted = np.minimum(self.times[0] + self.scale * TIMES, self.times[-1])
        return np.asarray(CubicSpline(knots, means)(wanted).T)

    def _angles(self, values: Array) -> Array:
        """(n, B) the angles from the position of rest."""
        centred = values - self.motion["zero"]
        if self.motion.quantity != VELOCITY:
            return centred
        from scipy.integrate import cumulative_trapezoid

        return np.asarray(self.motion["angle"] + cumulative_trapezoid(centred, self.times, axis=0, initial=0))

    def read(self, reader: Reader, values: Array) -> Array:
        """(B, 2) lengths and dampings, as the network reads them from records (n, B)."""
        answers = reader.solve(self.angles(values))[0]
        return answers * [self.scale**2, 1 / self.scale]

    def errors(self, reader: Reader, found: Fit) -> Array:
        """(2,) root mean squared errors of the estimates on simulated records of the fitted pendulum and residual."""
        noise = found.residual * np.random.default_rng(0).standard_normal((len(self.times), TRIALS))
        answers = self.read(reader, found.motion.observed(self.times)[:, None] + noise)
        truth = [found.motion.length, found.motion["damping"]]
        return np.sqrt(np.mean((answers - truth) ** 2, axis=0))

    def out_of_range(self, motion: Motion) -> list[str]:
        """Remarks on inputs that are outside the training data."""
        return [
            f"the network was trained on {what} of {low} to {high} {unit}, and this record has {value:.3g} {unit}: rely on "
            "the refined estimate"
            for what, value, (low, high), unit in (
                ("releases", abs(self.gain * motion["angle"]), RELEASES, "rad"),
                ("lengths", motion.length / self.scale**2, LENGTHS, "m"),
                ("dampings", motion["damping"] * self.scale, DAMPINGS, "1/s"),
            )
            if not low - 0.05 * (high - low) <= value <= high + 0.05 * (high - low)
        ]


# --- the refinement ------------------------------------------------------------------------------------------


def _refined(answer: Array, rough: Motion, times: Array, values: Array, period: float) -> Fit:
    """Least squares from the network's estimate; from the rough fit if that fails."""
    fits = []
    if answer[0] > 0:
        parameters = rough.parameters.copy()
        parameters[:2] = np.log(answer[0]), answer[1]
        with suppress(FloatingPointError, np.linalg.LinAlgError):
            fits.append(grow(replace(rough, parameters=parameters), times, values, period))
    if not fits or np.var(fits[0].residuals) > POOR_FIT * np.var(values):
        fits.append(grow(rough, times, values, period))
    return min(fits, key=lambda found: found.residual)


def _with_error(value: float, error: float) -> str:
    """The value rounded to the second digit of its error: 1.1023 ± 0.0014."""
    if not (np.isfinite(error) and error > 0):
        return f"{value:.6g} ± {error:.2g}"
    digits = int(np.clip(1 - np.floor(np.log10(error)), 0, 12))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
