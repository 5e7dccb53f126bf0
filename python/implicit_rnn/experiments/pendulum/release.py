"""Where a record begins to show a free pendulum.

People record before they let go: a pendulum at rest, lifted, held still. The motion that fits the swings after the
widest turning point is followed back in time, as far as the record agrees with it; the first turning point from there on is
the release, or, of a record that begins in mid-swing, the first that it shows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from implicit_rnn.experiments.pendulum.motion import Fit, Motion, fit
from implicit_rnn.experiments.pendulum.oscillation import BINS, binned, centre, rough_period, turning_points
from implicit_rnn.experiments.pendulum.record import Record
from implicit_rnn.experiments.pendulum.simulation import GRAVITY
from implicit_rnn.experiments.pendulum.units import VELOCITY

Array = np.ndarray

PER_PERIOD = 4
"""Samples per period that a record must have."""
TOP = 3.1
"""The largest angle from the position of rest, in rad: short of upright."""
WIDE = 0.95
"""Share of the widest swing that a turning point must reach to be the release."""
AGREEMENT = 0.04
"""Share of the amplitude by which the record may depart from the motion, on top of three times the residual."""
SLACK = 1 / 16
"""How far before the first sample that agrees a turning point may lie, in periods."""
GUESSES = (1.0, 0.9, 1.1)
"""Periods from which fits begin, relative to the one seen."""


def angles(record: Record) -> Array:
    """(n,) the angles of a record, up to a constant; those of a gyroscope by integration, without the drift."""
    if record.quantity != VELOCITY:
        return record.values
    from scipy.integrate import cumulative_trapezoid

    integral = cumulative_trapezoid(record.values, record.times, initial=0)
    return integral - np.polyval(np.polyfit(record.times, integral, 1), record.times)


def first_motion(record: Record) -> tuple[Motion, float]:
    """The motion from the release on, fitted to its first periods, and its period in s.

    ``Motion.begin`` is the time of the first sample that belongs to it. ``ValueError`` for records that do not swing.
    """
    times, swing = record.times, angles(record)
    period = rough_period(times, record.values)
    check_rate(record, period)
    if np.ptp(swing) > 2 * TOP and record.quantity != VELOCITY:
        raise ValueError(
            f"{record.name} ranges over {np.ptp(swing):.3g} rad, over the top; expected the swing of a pendulum. If "
            "these are degrees, give --units deg"
        )
    turns, turning = turning_points(times, swing, period)
    if len(turns) < 2:
        raise ValueError(
            f"{record.name} shows {len(turns)} clear turning points in {times[-1]:.3g} s; expected a pendulum that "
            "swings to and fro at least one and a half times after its release"
        )
    zero = centre(turning, swing)
    reach = np.abs(turning - zero)
    widest = int(np.argmax(reach >= WIDE * reach.max()))
    later = widest + 1 if widest + 1 < len(turns) and times[-1] - turns[widest + 1] > period else widest
    spacing = 2 * float(np.median(np.diff(turns[widest:]))) if len(turns) > widest + 1 else period
    found = _fit_from(record, int(np.searchsorted(times, turns[later])), turning[later] - zero, zero, spacing)
    period = swing_period(found.motion)
    begin = _back(record, found, period)
    _check_before(record, turns, turning - zero, begin - period / 4)
    angle, velocity = found.motion.states(np.array([found.motion.begin, begin]))[:, -1]
    parameters = found.motion.parameters.copy()
    parameters[2:4] = angle, velocity
    return replace(found.motion, begin=begin, parameters=parameters), period


def _check_before(record: Record, turns: Array, turning: Array, begin: float) -> None:
    """Refuse a record that swings to and fro before the release as well, but otherwise than the free pendulum."""
    wide = (turns < begin) & (np.abs(turning) > np.abs(turning).max() / 2)
    if (np.diff(np.sign(turning[wide])) != 0).sum() > 1:
        line = record.lines[int(np.searchsorted(record.times, begin))]
        raise ValueError(
            f"{record.name} swings before {begin:.3g} s (line {line}) too, but not as the pendulum does that swings "
            "freely afterwards: something drives it, or it is none. If it was pushed at first, cut the record to what "
            "follows"
        )


def swing_period(motion: Motion) -> float:
    """The period of the first swing, in s, to the sixth order in the amplitude; damping hardly changes it."""
    half = np.sin(min(abs(motion["angle"]), TOP) / 2) ** 2
    series = 1 + half / 4 + 9 * half**2 / 64 + 25 * half**3 / 256
    return float(2 * np.pi * np.sqrt(motion.length / GRAVITY) * series)


def check_rate(record: Record, period: float) -> None:
    """Refuse a record with too few samples in a period."""
    interval = float(np.median(np.diff(record.times)))
    if interval * PER_PERIOD > period:
        raise ValueError(
            f"{record.name} has a sample every {interval:.4g} s, but swings with a period of about {period:.3g} s if "
            f"it swings at all; expected at least {PER_PERIOD} samples per period: record it at a higher rate"
        )


def _fit_from(record: Record, first: int, angle: float, zero: float, spacing: float) -> Fit:
    """The best fit to the two periods and a half from a turning point on."""
    begin = record.times[first]
    within = (record.times >= begin) & (record.times <= begin + 2.5 * spacing)
    if record.quantity == VELOCITY:
        zero = float(np.mean(record.values[within]))
    amplitude = min(max(abs(angle), 1e-6), TOP) * (1 if angle >= 0 else -1)
    fits = []
    for guess in GUESSES:
        # A wide swing takes longer than a narrow one: T = 2π √(l/g) (1 + θ²/16 + ...).
        length = GRAVITY * (guess * spacing / (2 * np.pi * (1 + amplitude**2 / 16))) ** 2
        start = Motion(begin, record.quantity, np.array([np.log(length), 0.05 / spacing, amplitude, 0.0, zero]))
        try:
            fits.append(fit(start, record.times[within], record.values[within], 1e-6))
        except (FloatingPointError, ValueError):  # too few samples, or no inverse
            continue
        if fits[-1].residual < 0.1 * np.std(record.values[within]):
            break
    if not fits:
        raise ValueError(
            f"{record.name} does not swing as a pendulum does: no motion near a period of {spacing:.3g} s fits it"
        )
    return min(fits, key=lambda found: found.residual)


def _back(record: Record, found: Fit, period: float) -> float:
    """The time of the first sample after the release."""
    motion = found.motion
    shown = motion.observed(np.linspace(motion.begin, motion.begin + period, 2 * BINS))
    tolerance = 3 * found.residual + AGREEMENT * np.ptp(shown) / 2
    before = record.times <= motion.begin
    times, values = binned(record.times[before], record.values[before], period)
    agrees, missed = motion.begin, False
    for time, value in zip(times[::-1], values[::-1], strict=True):
        if time >= motion.begin:
            continue
        if abs(motion.observed(np.array([motion.begin, time]))[-1] - value) <= tolerance:
            agrees, missed = float(time), False
        elif missed:  # the second in a row: not a misread sample
            break
        else:
            missed = True
    fine = agrees + period * np.linspace(-SLACK, 0.6, 200)
    fine = fine[fine <= record.times[-1]]
    velocity = _velocities(motion, fine)
    turned = np.flatnonzero(velocity[:-1] * velocity[1:] <= 0)
    release = fine[int(turned[0])] if len(turned) else agrees
    return float(record.times[int(np.searchsorted(record.times, release))])


def _velocities(motion: Motion, times: Array) -> Array:
    """Angular velocities at increasing times on both sides of the beginning."""
    before, after = times[times < motion.begin], times[times >= motion.begin]
    parts = []
    if len(before):
        parts.append(motion.states(before[::-1])[1][::-1])
    if len(after):
        parts.append(motion.states(after)[1])
    return np.concatenate(parts)
