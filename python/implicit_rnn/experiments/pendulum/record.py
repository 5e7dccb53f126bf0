"""A recorded swing: the times and angles in a file that somebody has written for himself.

``table`` finds the numbers, ``units`` what the header says of them; here the columns are chosen, their units settled, and
all of it said in one line. What can be understood in two ways that lead to different pendulums is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from implicit_rnn.experiments.pendulum import units as kinds
from implicit_rnn.experiments.pendulum.oscillation import rough_period
from implicit_rnn.experiments.pendulum.positions import angles_about_the_pivot
from implicit_rnn.experiments.pendulum.table import DAY, SEPARATORS, Table, read_table
from implicit_rnn.experiments.pendulum.units import ANGLE, FRAME, OTHER, TIME, UNITS, VELOCITY, Heading, heading

Array = np.ndarray

PERIODS = (0.2, 60.0)
"""Periods of the pendulums that people record, in s, by which a time without a unit is known to be in s, ms, µs or ns."""
DOMINANT = 0.9
"""The share of the mean square of all axes that the one must have about which a pendulum with a gyroscope swings."""
FEWEST = 12
"""Rows in a record."""
_POSITION = re.compile(r"\?|(pos|position) \?|\?(pos| pos| position)|mass a \?")
_GUESSED = " (no unit given)"
COUNTING = 4
"""Rows that may share one rounded time, on average."""


@dataclass(frozen=True)
class Record:
    """What somebody has recorded of a pendulum, in SI units."""

    name: str
    times: Array
    """(n,) in s, increasing."""
    values: Array
    """(n,) angles in rad, without jumps by whole turns, or angular velocities in rad/s; the zero may be anywhere."""
    lines: Array
    """(n,) where each stands in the file."""
    quantity: str = ANGLE
    """``ANGLE`` or ``VELOCITY``."""
    understood: str = ""
    """One line for the reader."""
    assumed: bool = False
    """Whether nobody said that the angles are in rad, and they could be in degrees as well."""

    def in_degrees(self) -> Record:
        """The same numbers, taken as degrees."""
        understood = self.understood.replace(f"in rad{_GUESSED}", f"in deg{_GUESSED}")
        return replace(self, values=np.radians(self.values), understood=understood)


def read(
    path: str | Path, columns: Sequence[str] | None = None, units: Sequence[str] | None = None, fps: float | None = None
) -> Record:
    """The record in a file.

    Parameters
    ----------
    path
        Text with rows of numbers: CSV, tables by tabs, semicolons or blanks, with or without a header.
    columns
        Names or numbers (from 1) of the columns of the time and of the angle; of the time, x and y of the bob; or of the
        angle only, with ``fps``.
    units
        Of the time (s, ms, µs, ns, min) and of the angle (rad, mrad, deg, turns, or N/rev for N counts of an encoder per
        revolution; rad/s and deg/s of an angular velocity), in any order; they overrule the file.
    fps
        Frames per second, where the file has frame numbers or nothing in place of times.

    Raises ``ValueError`` that names the file, the line or column and the remedy.
    """
    table = read_table(Path(path))
    given = _given_units(units or ())
    if fps is not None and not (np.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps}; expected a positive number of frames per second")
    headings = [heading(text) for text in table.header]
    time_column, swing_columns = _columns(table, headings, columns, fps)
    swing = " and ".join(table.title(k) for k in swing_columns)
    values, quantity, unit, size = _swing(table, headings, swing_columns, given)
    times, time_unit, time_size, source = _times(table, time_column, headings, given)
    there = np.isfinite(times) & np.isfinite(values)
    times, values, lines = times[there], values[there], table.lines[there]
    times, values, lines = _in_order(table, _past_midnight(times, time_size), values, lines, source)
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        raise ValueError(f"{table.file}: {swing} is {values[0]:g} in every row; expected the swing of a pendulum")
    assumed = False
    if unit is None:
        unit, size = _guessed_angle_unit(table, values, swing)
        assumed = unit == "rad"
        unit += _GUESSED
    values = values * size
    if quantity == ANGLE:  # before means are taken: that of 359° and 1° is 0°
        values = np.unwrap(values)
    times, values, lines = _merged(table, times, values, lines, source)
    time_unit, time_size = _settled_time_unit(table, times, values, source, time_unit, time_size, fps)
    times = (times - times[0]) * time_size

    missing, merged = int((~there).sum()), int(there.sum()) - len(times)
    notes = [
        *([f"{missing} without a number left out"] if missing else []),
        *([f"{merged} of equal times averaged"] if merged else []),
    ]
    layout = SEPARATORS[table.separator] if sum(table.numeric) > 1 else "one number per line"
    understood = (
        f"{Path(path).name}: {layout}{', decimal commas' if table.decimal == ',' else ''}; time from {source} in {time_unit}, "
        f"{quantity} from {swing} in {unit}; {len(times)} samples in {times[-1]:.4g} s"
    )
    if notes:
        understood += f" ({', '.join(notes)})"
    return Record(table.file, times, values, lines, quantity, understood, assumed)


# --- columns -------------------------------------------------------------------------------------------------


def _columns(
    table: Table, headings: Sequence[Heading], wanted: Sequence[str] | None, fps: float | None
) -> tuple[int | None, tuple[int, ...]]:
    """The columns of the time, None where rows are frames, and of the angle, the angular velocity, or positions x and y."""
    if wanted:
        found = [_named(table, name) for name in wanted]
        if len(found) > 3:
            raise ValueError(
                f"--columns {','.join(wanted)} names {len(found)} columns; expected those of time and angle, or of time, x and y"
            )
        if len(found) > 1:
            return found[0], tuple(found[1:])
        if headings[found[0]].quantity == TIME:
            raise ValueError(
                f"--columns {wanted[0]} names the time alone; expected that of the angle, too: --columns TIME,ANGLE"
            )
        time = None if fps is not None else _time_column(table, headings, None, found[0])
        return time, (found[0],)
    time = _time_column(table, headings, fps, None)
    return time, _swing_columns(table, headings, time)


def _named(table: Table, name: str) -> int:
    """The column of that name or number."""
    name = name.strip()
    names = [text.lower() for text in table.header]
    bare = [heading(text).name for text in table.header]
    for candidates, key in ((names, name.lower()), (bare, heading(name).name or name.lower())):
        if key and candidates.count(key) == 1:
            column = candidates.index(key)
            break
    else:
        if not name.isdigit() or not 1 <= int(name) <= len(names):
            raise ValueError(
                f"{table.file} has no single column {name!r}; expected a name or a number of {_listed(table)}"
            )
        column = int(name) - 1
    if not table.numeric[column]:
        raise ValueError(f"{table.file}: {table.title(column)} holds no numbers; expected one of {_listed(table)}")
    return column


def _time_column(table: Table, headings: Sequence[Heading], fps: float | None, swing: int | None) -> int | None:
    numeric = [k for k, is_number in enumerate(table.numeric) if is_number and k != swing]
    times = [k for k in numeric if headings[k].quantity == TIME]
    frames = [k for k in numeric if headings[k].quantity == FRAME]
    if fps is not None:
        return next(iter(frames + times), _increasing(table, headings, numeric) if len(numeric) > 1 else None)
    chosen = next((k for k in times if headings[k].unit), next(iter(times + frames), None))
    if chosen is None:
        chosen = _increasing(table, headings, numeric)
    if chosen is None and len(numeric) == 1 and swing is None:
        raise ValueError(
            f"{table.file} has one column of numbers and no times; give --fps N if its rows are frames, N a second"
        )
    if chosen is None:
        raise ValueError(
            f"{table.file} has no column that is a time by its name, and not exactly one that increases; say which by "
            f"--columns TIME,ANGLE (among {_listed(table)}), or give --fps N if its rows are frames"
            f"{table.comma_hint}"
        )
    return chosen


def _increasing(table: Table, headings: Sequence[Heading], numeric: Sequence[int]) -> int | None:
    """The one column of unknown kind whose numbers increase from row to row; the first column, if there are more."""
    found = []
    for k in numeric:
        values = table.numbers(k)[0]
        values = values[np.isfinite(values)]
        if headings[k].quantity is None and len(values) > 2 and (np.diff(values) >= 0).all() and values[-1] > values[0]:
            found.append(k)
    return found[0] if len(found) == 1 or found[:1] == [0] else None


def _swing_columns(table: Table, headings: Sequence[Heading], time: int | None) -> tuple[int, ...]:
    numeric = [k for k, is_number in enumerate(table.numeric) if is_number and k != time]
    angles = [k for k in numeric if headings[k].quantity == ANGLE]
    if len({headings[k].name for k in angles}) == 1:  # theta in rad and theta in degrees
        return (next((k for k in angles if headings[k].unit == "rad"), angles[0]),)
    plain = [k for k in angles if len(headings[k].name.split()) == 1]
    if len(plain) == 1:  # "angle" and "angle, smoothed"
        return (plain[0],)
    if angles:
        raise ValueError(
            f"{table.file} has {len(angles)} columns that could be the angle: "
            f"{', '.join(table.title(k) for k in angles)}; choose by --columns TIME,ANGLE"
        )
    velocities = [k for k in numeric if headings[k].quantity == VELOCITY]
    if velocities:
        return (_main_axis(table, velocities),)
    positions = [[k for k in numeric if _POSITION.fullmatch(headings[k].name.replace(axis, "?"))] for axis in "xy"]
    if [len(found) for found in positions] == [1, 1]:
        return positions[0][0], positions[1][0]
    unknown = [k for k in numeric if headings[k].quantity is None]
    if len(unknown) == 1:
        return (unknown[0],)
    if unknown:
        raise ValueError(
            f"{table.file} has {len(unknown)} columns that could be the angle: "
            f"{', '.join(table.title(k) for k in unknown)}; choose by --columns TIME,ANGLE, by name or by number"
            f"{table.comma_hint}"
        )
    raise ValueError(
        f"{table.file} has no column of angles, only {_listed(table)}; expected one named angle or theta, or with the "
        "unit rad or deg, or the positions x and y. A column of another name is chosen by --columns TIME,ANGLE or TIME,X,Y"
    )


def _main_axis(table: Table, velocities: Sequence[int]) -> int:
    """The axis of a gyroscope about which it swings."""
    axes = [k for k in velocities if "abs" not in table.header[k].lower()] or list(velocities)
    squares = np.array([np.nanvar(table.numbers(k)[0]) for k in axes])
    if len(axes) > 1 and squares.max() < DOMINANT * squares.sum():
        raise ValueError(
            f"{table.file} has {len(axes)} angular velocities, none of which has the whole swing: "
            f"{', '.join(table.title(k) for k in axes)}; choose by --columns TIME,VELOCITY, or fix the sensor so that "
            "one axis is that of the pendulum"
        )
    return axes[int(np.argmax(squares))]


def _listed(table: Table) -> str:
    return ", ".join(table.title(k) for k in range(len(table.header)) if table.numeric[k])


# --- units ---------------------------------------------------------------------------------------------------


def _given_units(units: Sequence[str]) -> dict[str, tuple[str, float]]:
    """The name and the size of a unit for each quantity, as the caller has given them."""
    given: dict[str, tuple[str, float]] = {}
    for text in units:
        per_turn = text.lower().removesuffix("turn").removesuffix("rev")
        unit = kinds.unit_of(text)
        if per_turn != text.lower() and per_turn.endswith("/"):
            try:
                counts = float(per_turn[:-1])
            except ValueError:
                counts = float("nan")
            unit = (ANGLE, f"counts of {counts:g} per revolution", 2 * np.pi / counts) if counts > 0 else None
        if unit is None or unit[0] == OTHER or not np.isfinite(unit[2]):
            raise ValueError(
                f"--units {text!r} is unknown; expected s, ms, µs, ns or min for the time, and rad, mrad, deg, turns "
                "or N/rev (an encoder of N counts per revolution) for the angle, rad/s or deg/s for an angular velocity"
            )
        if unit[0] in given:
            raise ValueError(
                f"--units {','.join(units)} has two units of {unit[0]}; expected one of time and one of angle"
            )
        given[unit[0]] = unit[1:]
    return given


def _swing(
    table: Table, headings: Sequence[Heading], columns: tuple[int, ...], given: dict[str, tuple[str, float]]
) -> tuple[Array, str, str | None, float]:
    """The numbers of the swing, what they are, the name of their unit or None, and its size."""
    if len(columns) == 1:
        values, cell_unit = table.numbers(columns[0])
        return values, *_unit(table, columns[0], headings[columns[0]], cell_unit, given)
    x, y = (table.numbers(k)[0] for k in columns)
    there = np.isfinite(x) & np.isfinite(y)
    values = np.full(len(x), np.nan)
    try:
        values[there] = angles_about_the_pivot(x[there], y[there])
    except ValueError as error:
        raise ValueError(
            f"{table.file}: from {table.title(columns[0])} and {table.title(columns[1])} no pivot is found, since {error}. "
            "Record the angle itself: atan2(x - x0, y0 - y) with the pivot at x0, y0; in Tracker it is θ with the origin at "
            "the pivot"
        ) from None
    return values, ANGLE, "rad about the pivot computed from them", 1.0


def _unit(
    table: Table, column: int, head: Heading, cell_unit: str, given: dict[str, tuple[str, float]]
) -> tuple[str, str | None, float]:
    """The quantity of the swing's column, the name of its unit or None, and its size."""
    if ANGLE in given or VELOCITY in given:
        quantity = ANGLE if ANGLE in given else VELOCITY
        return quantity, *given[quantity]
    quantity, unit, size = head.quantity or ANGLE, head.unit, head.size
    if unit is None and cell_unit:
        quantity, unit, size = UNITS[cell_unit]
    if quantity not in (ANGLE, VELOCITY) and head.quantity == OTHER and not cell_unit and unit is None:
        quantity = ANGLE  # chosen by --columns, whatever its name
    if quantity not in (ANGLE, VELOCITY):
        raise ValueError(
            f"{table.file}: {table.title(column)} is no angle; give its unit by --units, or another column by --columns"
        )
    encoder = unit is None and "encoder" in head.text.lower()
    if encoder or (unit is not None and not np.isfinite(size)):
        raise ValueError(
            f"{table.file}: {table.title(column)} is in counts; give --units N/rev, where N is the counts of a full "
            "revolution"
        )
    if quantity == VELOCITY and unit is None:
        raise ValueError(f"{table.file}: {table.title(column)} has no unit; give --units rad/s or --units deg/s")
    return quantity, unit, size


def _times(
    table: Table, column: int | None, headings: Sequence[Heading], given: dict[str, tuple[str, float]]
) -> tuple[Array, str, float | None, str]:
    """Times as numbers, the name and the size of their unit if it is known, and where they come from."""
    if column is None:
        return np.arange(len(table.cells), dtype=float), "frames", None, "rows"
    times, cell_unit = table.numbers(column)
    head, source = headings[column], table.title(column)
    if TIME in given:
        return times, *given[TIME], source
    if FRAME in given or head.quantity == FRAME:
        return times, "frames", None, source
    if head.unit is not None and head.quantity == TIME:
        return times, head.unit, head.size, source
    if cell_unit and UNITS[cell_unit][0] == TIME:
        return times, *UNITS[cell_unit][1:], source
    return times, "", None, source


def _settled_time_unit(
    table: Table, times: Array, values: Array, source: str, unit: str, size: float | None, fps: float | None
) -> tuple[str, float]:
    """The unit of the times where frames are counted or no unit is given, too."""
    if fps is not None and size is not None:
        raise ValueError(f"{table.file}: {source} is a time in {unit}, so --fps has no meaning; leave one of them out")
    if fps is not None:
        return f"frames at {fps:g} per second", 1 / fps
    if unit == "frames":
        raise ValueError(f"{table.file}: {source} counts frames; give --fps N, the frames per second of the camera")
    if size is not None:
        return unit, size
    unit, size = _guessed_time_unit(table, times, values, source)
    return unit + _GUESSED, size


def _guessed_angle_unit(table: Table, values: Array, swing: str) -> tuple[str, float]:
    """Degrees where the numbers are too large for rad; rad otherwise."""
    if np.abs(values).max() <= 2 * np.pi:
        return "rad", 1.0
    unwrapped = np.unwrap(values, period=360.0)
    if np.ptp(unwrapped) > 360:
        raise ValueError(
            f"{table.file}: {swing} ranges over {np.ptp(unwrapped):.4g} without a unit, which is "
            "neither rad nor degrees; give --units N/rev for an encoder of N counts per revolution"
        )
    return "deg", np.pi / 180


def _guessed_time_unit(table: Table, times: Array, values: Array, source: str) -> tuple[str, float]:
    """The unit in which the period is that of a pendulum."""
    if np.ptp(np.diff(times)) == 0 and times[1] - times[0] == 1:
        raise ValueError(
            f"{table.file}: {source} counts {times[0]:g}, {times[1]:g}, {times[2]:g}, ... and has no unit; give --fps "
            "N if it counts frames, or --units s if these are seconds"
        )
    period = rough_period(times, values)
    for name, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if PERIODS[0] <= period * size <= PERIODS[1]:
            return name, size
    raise ValueError(
        f"{table.file}: {source} has no unit, and with a period of about {period:.3g} of it no unit makes this a "
        "pendulum; give --units s, ms, µs or ns, or --fps N if it counts frames"
    )


# --- rows ----------------------------------------------------------------------------------------------------


def _past_midnight(times: Array, size: float | None) -> Array:
    """Times counted from midnight run on where the record passes it, at about the pace of the others; all others are kept."""
    for second in (1.0, 1e3, 1e6, 1e9) if size is None else (1 / size,):
        day = DAY * second
        jumps = np.abs(np.diff(times)) > day / 2
        if jumps.sum() == 1 and len(jumps) > 1 and ((times >= 0) & (times < day)).all():
            whole = np.unwrap(times, period=day)
            steps = np.diff(whole)
            ordered = (steps >= 0).all() or (steps <= 0).all()
            if ordered and np.abs(steps[jumps]).max() <= 2 * np.abs(steps[~jumps]).max():
                return whole
    return times


def _in_order(table: Table, times: Array, values: Array, lines: Array, source: str) -> tuple[Array, Array, Array]:
    """The rows by time, which never decreases."""
    if len(times) < FEWEST:
        raise ValueError(f"{table.file} has {len(times)} rows with a time and an angle; expected at least {FEWEST}")
    if (np.diff(times) < 0).all():
        times, values, lines = times[::-1], values[::-1], lines[::-1]
    back = np.flatnonzero(np.diff(times) < 0)
    if len(back):
        k = int(back[0]) + 1
        raise ValueError(
            f"{table.file}, line {lines[k]}: {source} goes back from {times[k - 1]:g} to {times[k]:g}; expected one "
            "record per file, in the order of time"
        )
    return times, values, lines


def _merged(table: Table, times: Array, values: Array, lines: Array, source: str) -> tuple[Array, Array, Array]:
    """The rows by increasing time, those of equal (rounded) times averaged."""
    unique, first, counts = np.unique(times, return_index=True, return_counts=True)
    if len(unique) * COUNTING < len(times):
        raise ValueError(
            f"{table.file}: {source} has {len(unique)} different times in {len(times)} rows, too coarse to tell how "
            "it moves; export the times with more digits, or give --columns ANGLE and --fps N if rows are evenly spaced"
        )
    return unique, np.add.reduceat(values, first) / counts, lines[first]
