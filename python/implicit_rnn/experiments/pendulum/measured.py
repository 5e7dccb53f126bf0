"""Length and damping of a pendulum of one's own, from its measured trajectory.

A record is a CSV file with the columns ``time`` (s) and ``angle`` (rad, from the position of rest), evenly sampled at
intervals of at most 0.125 s, that begins where the pendulum is released from rest and lasts at least 3.875 s. A cubic
spline through the record is read at the 32 times that the networks know; a record sampled at these times is taken as it
is. A pendulum released on the negative side is mirrored, which changes neither of its parameters.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from implicit_rnn.experiments.pendulum.data import Data
from implicit_rnn.experiments.pendulum.reader import Reader
from implicit_rnn.experiments.pendulum.simulation import DAMPINGS, INTERVAL, LENGTHS, RELEASES, TIMES, trajectories

Array = np.ndarray

COLUMNS = ("time", "angle")
EVEN = 0.01
"""Largest departure of an interval from the median one, relative."""


@dataclass(frozen=True)
class Estimate:
    """What a network says of a pendulum; each error is the network's root mean squared error on the test set."""

    length: float
    length_error: float
    damping: float
    damping_error: float
    residual: float
    """Root mean square of the record minus the trajectory of these parameters, in rad; the noise of the training data is 0.02."""
    remarks: tuple[str, ...]
    """What is out of the range that the network was trained on."""

    def __str__(self) -> str:
        lines = [
            f"length   {self.length:.4f} ± {self.length_error:.4f} m",
            f"damping  {self.damping:.4f} ± {self.damping_error:.4f} 1/s",
            f"residual {self.residual:.4f} rad, root mean square",
        ]
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.remarks)])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def read(path: str | Path) -> Array:
    """(32,) the angles of a record at ``TIMES`` from its first row; ``ValueError`` says what is wrong with a file."""
    times, angles = _columns(Path(path))
    return resample(times, angles, str(path))


def resample(times: Array, angles: Array, name: str = "the record") -> Array:
    """(32,) the angles at ``TIMES`` after the first of ``times``; ``ValueError`` for records that do not allow it."""
    from scipy.interpolate import CubicSpline

    for column, values in zip(COLUMNS, (times, angles), strict=True):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"{name}: {column} is {values[bad[0]]} in record {bad[0] + 1}; expected finite numbers")
    if len(times) < 4:
        raise ValueError(f"{name} has {len(times)} records; expected at least {len(TIMES)}")
    intervals = np.diff(times)
    if not (intervals > 0).all():
        raise ValueError(f"{name}: time does not increase after record {int(np.argmin(intervals > 0)) + 1}")
    usual = float(np.median(intervals))
    worst = int(np.argmax(np.abs(intervals - usual)))
    if abs(intervals[worst] - usual) > EVEN * usual:
        raise ValueError(
            f"{name} is not evenly sampled: {intervals[worst]:.4g} s after record {worst + 1}, elsewhere {usual:.4g} s; expected "
            f"equal intervals within {EVEN:.0%}"
        )
    if usual > INTERVAL * (1 + EVEN):
        raise ValueError(f"{name} has a sample every {usual:.4g} s; expected one at least every {INTERVAL} s")
    times = times - times[0]
    if times[-1] < TIMES[-1] - EVEN * usual:
        raise ValueError(f"{name} lasts {times[-1]:.4g} s; expected at least {TIMES[-1]} s")
    if np.abs(angles).max() > np.pi:
        raise ValueError(
            f"{name} has an angle of {np.abs(angles).max():.4g}; expected rad, between -π and π, not degrees"
        )
    return np.asarray(CubicSpline(times, angles)(np.minimum(TIMES, times[-1])))


def _columns(path: Path) -> tuple[Array, Array]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        header = [column.strip() for column in rows.fieldnames or ()]
        missing = [column for column in COLUMNS if column not in header]
        if missing:
            raise ValueError(
                f"{path} has no column {' and no column '.join(missing)}; its first line must name the columns time (s) and "
                f"angle (rad), it is {','.join(header)!r}"
            )
        rows.fieldnames = header
        values: list[tuple[float, ...]] = []
        for row in rows:
            try:
                values.append(tuple(float(row[column]) for column in COLUMNS))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {rows.line_num}: time {row['time']!r} and angle {row['angle']!r}; expected numbers"
                ) from error
    times, angles = np.array(values, np.float64).reshape(-1, 2).T
    return times, angles


def error_on_test_set(reader: Reader) -> Array:
    """(2,) the root mean squared errors of length (m) and damping (1/s) on the test set of the study."""
    test = Data.of_seed(0).test
    return np.asarray(np.sqrt(np.mean((reader.predict(test.measured) - test.parameters) ** 2, axis=0)))


def estimate(reader: Reader, angles: Array) -> Estimate:
    """The parameters of the pendulum with these angles (32,) at ``TIMES``."""
    upright = angles if angles[0] >= 0 else -angles
    length, damping = map(float, reader.predict(upright[None])[0])
    errors = error_on_test_set(reader)
    remarks = [
        f"the {what} is {value:.3g} {unit}, out of the range of {low} to {high} {unit} that was learnt"
        for what, value, (low, high), unit in (
            ("angle at release", float(upright[0]), RELEASES, "rad"),
            ("length", length, LENGTHS, "m"),
            ("damping", damping, DAMPINGS, "1/s"),
        )
        if not low - 0.05 * (high - low) <= value <= high + 0.05 * (high - low)
    ]
    residual = float("nan")
    if length > 0:
        again = trajectories(np.array([length]), np.array([damping]), upright[:1])[0]
        residual = float(np.sqrt(np.mean((upright - again) ** 2)))
    return Estimate(length, float(errors[0]), damping, float(errors[1]), residual, tuple(remarks))
