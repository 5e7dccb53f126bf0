"""Pendulums of one's own: what people record is read, and its length comes out right or is refused for a true reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import implicit_rnn as irnn
from implicit_rnn.cli import main
from implicit_rnn.experiments import pendulum
from implicit_rnn.experiments.pendulum import study
from implicit_rnn.experiments.pendulum.data import Sizes
from implicit_rnn.experiments.pendulum.models import MODELS
from implicit_rnn.experiments.pendulum.motion import Motion
from implicit_rnn.experiments.pendulum.positions import angles_about_the_pivot
from implicit_rnn.experiments.pendulum.record import Record, read
from implicit_rnn.experiments.pendulum.simulation import GRAVITY, TIMES, trajectories
from implicit_rnn.experiments.pendulum.units import ANGLE, FRAME, OTHER, TIME, VELOCITY, heading

Array = np.ndarray


@pytest.fixture(scope="module")
def reader() -> pendulum.Reader:
    """A net that has learnt something."""
    protocol = study.Protocol(Sizes(train=1000, validation=200, test=100), epochs=60)
    return study.train(MODELS["ff2"], 0, 1e-2, protocol, "numpy")[0]


def integrated(rate: Callable[[float, Array], list[float]], times: Array, angle: float) -> tuple[Array, Array]:
    """Angles and angular velocities of any equation of motion, by other code than the package's."""
    from scipy.integrate import solve_ivp

    solved = solve_ivp(rate, (times[0], times[-1] + 1e-9), [angle, 0], t_eval=times, rtol=1e-10, atol=1e-12)
    return solved.y[0], solved.y[1]


def swing(length: float, damping: float, angle: float, times: Array) -> tuple[Array, Array]:
    return integrated(lambda _, y: [y[1], -GRAVITY / length * np.sin(y[0]) - damping * y[1]], times, angle)


def table(
    *columns: Sequence[object], header: str = "", separator: str = ",", decimal: str = ".", end: str = "\n"
) -> str:
    """Rows of numbers, and of words as they are."""

    def cell(value: object) -> str:
        return value if isinstance(value, str) else f"{value:.7g}".replace(".", decimal)

    rows = [separator.join(map(cell, row)) for row in zip(*columns, strict=True)]
    return end.join([*([header] if header else []), *rows, ""])


# --- twenty strangers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stranger:
    """Somebody's pendulum, how he has filmed it, and how he has written it down."""

    length: float
    damping: float
    angle: float
    fps: float
    periods: float
    noise: float
    write: Callable[[Array, Array], str]
    """From times in s and angles in rad."""
    zero: float = 0.0
    held: float = 0.0
    """Seconds before the release."""
    lifted: float = 0.0
    """Seconds in which it was lifted before."""
    late: float = 0.0
    """Of a period after the release at which the record begins."""
    encoding: str = "utf-8"
    options: tuple[str, ...] = ()

    def record(self) -> tuple[Array, Array]:
        period = 2 * np.pi * np.sqrt(self.length / GRAVITY)
        times = np.arange(round(self.periods * period * self.fps)) / self.fps
        angles = swing(self.length, self.damping, self.angle, times)[0][round(self.late * period * self.fps) :]
        lift = np.linspace(0, np.pi, round(self.lifted * self.fps))
        before = [self.angle * (1 - np.cos(lift)) / 2, np.full(round(self.held * self.fps), self.angle)]
        angles = np.concatenate([*before, angles]) + self.zero
        rng = np.random.default_rng(round(1000 * self.length))
        return np.arange(len(angles)) / self.fps, angles + self.noise * rng.standard_normal(len(angles))


def deg(angles: Array) -> Array:
    return np.degrees(angles)


def tracker(t: Array, a: Array) -> str:
    header = "mass_A\t\t\t\nt\tx\ty\tθ"
    return table(t, np.sin(a), -np.cos(a), deg(a), header=header, separator="\t", decimal=",")


def with_gaps(t: Array, a: Array) -> str:
    cells = ["" if k % 9 == 4 else f"{value:.3f}" for k, value in enumerate(deg(a))]
    return table(t, cells, header="Time (s),Angle (deg)")


def with_lost_frames(t: Array, a: Array) -> str:
    kept = np.random.default_rng(1).random(len(t)) < 0.8
    return table(t[kept], a[kept], header="t;phi", separator=";")


def of_an_encoder(t: Array, a: Array) -> str:
    return table(np.round(1e6 * t), np.round(a / (2 * np.pi) * 4096), header="micros,encoder")


def of_a_clock(t: Array, a: Array) -> str:
    return table(
        [f"14:59:{x:06.3f}".replace(".", ",") for x in t],
        deg(a),
        header="Uhrzeit;Winkel in Grad",
        separator=";",
        decimal=",",
    )


STRANGERS = {
    "time,angle": Stranger(1.1, 0.35, 0.9, 60, 6, 0.01, lambda t, a: table(t, a, header="time,angle")),
    "phyphox, held": Stranger(
        0.25, 0.08, 0.3, 100, 12, 0.01, lambda t, a: table(t, deg(a), header='"Time (s)";"Tilt (deg)"', separator=";"), held=2.0
    ),
    "Tracker": Stranger(0.1, 0.15, -0.5, 120, 10, 0.005, tracker, zero=0.1, late=0.2),
    "German spreadsheet": Stranger(
        0.05, 0.3, 0.7, 240, 9, 0.01,
        lambda t, a: "\ufeff" + table(t, deg(a), header="Zeit [s];Winkel [Grad]", separator=";", decimal=",", end="\r\n"),
        zero=-0.2,
    ),
    "no header, ms, degrees": Stranger(
        0.6, 0.05, 0.4, 30, 8, 0.003, lambda t, a: table(np.round(1000 * t), deg(a), separator="\t")
    ),
    "rounded to 10 ms": Stranger(
        0.4, 0.1, 0.6, 30, 10, 0.005, lambda t, a: table(10 * np.round(100 * t), np.round(deg(a), 1), header="time_ms,angle_deg")
    ),
    "frame numbers": Stranger(
        2.0, 0.1, 0.5, 24, 5, 0.01, lambda t, a: table(np.arange(len(t)), a, header="Frame,theta (rad)"), options=("--fps", "24")
    ),
    "a column of angles": Stranger(0.15, 0.2, 0.5, 60, 9, 0.01, lambda t, a: table(deg(a)), options=("--fps", "60")),
    "encoder, lifted": Stranger(
        0.3, 0.04, 1.2, 100, 15, 0.002, of_an_encoder, lifted=1.5, held=1.0, options=("--units", "4096/rev")
    ),
    "preamble of names": Stranger(
        5.0, 0.02, 0.3, 12, 6, 0.01,
        lambda t, a: "Group 7\nAnna, Bob\nLength?, m\n\n" + table(t, a, header="t / s, φ / rad", separator=", "),
    ),
    "units beneath the names": Stranger(
        20.0, 0.02, 0.2, 15, 4, 0.004, lambda t, a: table(t, deg(a), header="Time\tAngle\n(s)\t(°)", separator="\t"), held=3.0
    ),
    "empty cells": Stranger(0.8, 0.2, 1.0, 25, 7, 0.01, with_gaps, zero=0.5),
    "lost frames": Stranger(0.5, 0.1, 0.8, 50, 8, 0.02, with_lost_frames, late=0.1),
    "savetxt": Stranger(1.5, 0.1, 1.4, 30, 6, 0.01, lambda t, a: table(t, a, header="# t theta", separator=" "), held=1.0),
    "a clock": Stranger(0.07, 0.4, 0.4, 120, 12, 0.005, of_a_clock),
    "many columns": Stranger(
        3.0, 0.05, -0.7, 30, 5, 0.01,
        lambda t, a: table(np.arange(len(t)), t, np.sin(a), a, ["ok"] * len(t), header="index,time,x,angle,note"),
        lifted=2.0,
    ),
    "hanging at 180": Stranger(
        0.2, 0.1, 0.35, 60, 10, 0.005, lambda t, a: table(t, (deg(a) + 360) % 360 - 180, header="Time (s),Angle (deg)")
    ),
    "UTF-16, unicode minus": Stranger(
        10.0, 0.03, 0.6, 20, 4, 0.01,
        lambda t, a: table(t, deg(a), header="t [s]\tφ [°]", separator="\t").replace("-", "−"), encoding="utf-16"
    ),
    "columns by number": Stranger(
        0.35, 0.06, 0.45, 90, 9, 0.01, lambda t, a: table(np.gradient(a, t), a, t), options=("--columns", "3,2")
    ),
    "positions in pixels": Stranger(
        0.45, 0.1, 0.5, 60, 8, 0.004,
        lambda t, a: table(t, 300 + 250 * np.sin(a), 20 + 250 * np.cos(a), header="t,x,y"), late=0.3,
    ),
    "Latin-1": Stranger(
        7.5, 0.01, 0.15, 60, 3, 0.002,
        lambda t, a: table(t, deg(a), header="Zeit (s);Auslenkung (°)", separator=";"), encoding="latin-1"
    ),
}  # fmt: skip


def test_there_are_more_than_twenty_strangers():
    assert len(STRANGERS) > 20
    assert min(s.length for s in STRANGERS.values()) == 0.05
    assert max(s.length for s in STRANGERS.values()) == 20
    assert {12, 240} <= {s.fps for s in STRANGERS.values()}


@pytest.fixture(scope="module")
def model(reader, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    reader.save(path)
    return path


@pytest.mark.parametrize("name", STRANGERS)
def test_length_of_a_strangers_pendulum_is_right_within_its_errors(name, model, tmp_path, capsys):
    stranger = STRANGERS[name]
    path = tmp_path / "mine.csv"
    path.write_text(stranger.write(*stranger.record()), encoding=stranger.encoding, newline="")
    arguments = ["--data", str(path), "--model", str(model), "--out", str(tmp_path), "--engine", "numpy", "--json"]
    assert main(["pendulum", *arguments, *stranger.options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["length"] == pytest.approx(stranger.length, rel=0.02)
    assert abs(found["length"] - stranger.length) < 3 * found["length_error"]
    assert abs(found["damping"] - stranger.damping) < 3.5 * found["damping_error"]
    assert abs(found["network"]["length"] - stranger.length) < 3 * found["network"]["length_error"]
    if "positions" not in name:
        assert found["zero"] == pytest.approx(stranger.zero - np.pi * (name == "hanging at 180"), abs=0.02)
    assert found["residual"] < 1.3 * found["noise"]
    if stranger.held:
        assert found["release_time"] == pytest.approx(
            stranger.lifted + stranger.held, abs=0.1 * np.sqrt(stranger.length)
        )
    assert (tmp_path / "mine-pendulum.png").exists()


# --- reading -------------------------------------------------------------------------------------------------

T = np.arange(90) / 30
A = swing(0.8, 0.1, 0.6, T)[0]
NOISY = 0.002 * np.random.default_rng(0).standard_normal((2, 90))
D, MS = np.degrees(A), np.round(1000 * T)


def reads(tmp_path: Path, text: str, **options: object) -> Record:
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return read(path, **options)


@pytest.mark.parametrize(
    ("header", "options"), [("t,x,y", {}), ("Time (s),x (px),y (px)", {}), ("a,b,c", {"columns": ["1", "2", "3"]})]
)
def test_positions_of_the_bob_tell_the_angle_about_the_pivot(tmp_path, header, options):
    x, y = 320 + 200 * np.sin(A), 40 + 200 * np.cos(A)  # pixels, y downwards
    record = reads(tmp_path, table(T, x, y, header=header), **options)
    swing = record.values - record.values.mean()
    np.testing.assert_allclose(np.abs(swing), np.abs(A - A.mean()), atol=1e-4)
    assert "about the pivot" in record.understood


def test_positions_whose_errors_hide_their_arc_are_refused_however_many_there_are():
    rng = np.random.default_rng(0)
    angles = 0.005 * np.sin(np.linspace(0, 30, 8000))
    x, y = (rim + 1e-4 * rng.standard_normal(8000) for rim in (np.sin(angles), np.cos(angles)))
    with pytest.raises(ValueError, match="too short to tell the radius"):
        angles_about_the_pivot(x, y)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (table(T, A, header="Time/s;Angle/rad", separator=";"), {}),
        (table(T, A, separator="   "), {}),
        (table(T, A, header="t, theta", separator="  "), {}),
        (table(A, T), {}),
        (table(T, A, header="Kanal A;Kanal B", separator=";", decimal=","), {}),
        (table(T, A, header="time, angle", separator=", ", decimal=","), {}),
        (table([f'"{t:.6f}"'.replace(".", ",") for t in T], [f'"{a:.6f}"'.replace(".", ",") for a in A]), {}),
        (table(MS, D, header="Elapsed time in ms,Angle in degrees"), {}),
        (table([f"{t:,.1f}" for t in 1000 * T], D, header="time [ms];angle [deg]", separator=";"), {}),
        (table([f"{t:.5f} s" for t in T], [f"{d:.5f}°" for d in D], header="time,angle"), {}),
        (table(T, D, header="t,theta\ns,deg"), {}),
        (table(T, D, header="Angle: run 3\nlength,?,m\nrate,30,Hz\nTime (s),Angle (deg)"), {}),
        (table(T, D, A, header="t (s),theta (deg),theta (rad)"), {}),
        (table(T, A, 0.9 * A, header="time_s,angle,angle_smoothed"), {}),
        (table(T, A, 0.9 * A, header="time_s,angle,angle_error"), {}),
        (table(T, A, np.gradient(A, T), header="t,theta,theta_dot (rad/s)"), {}),
        (table(T, A, separator=";", header="sep=;\ntime;angle"), {}),
        (table(T, A, ["" for _ in T], header="time,angle,"), {}),
        (table([f"| {t:.5f} " for t in T], [f" {a:.6f} |" for a in A], separator="|", header="| t | angle |\n|---|---|"), {}),
        (table(T[::-1], A[::-1], header="time,angle"), {}),
        (table(T, D % 360, header="time (s),angle (deg)"), {}),
        (table([f"{1600000000000 + ms:.0f}" for ms in MS], A, header="timestamp_ms,angle (rad)"), {}),
        (table(T, D, header="time (s),angle (rad)"), {"units": ["deg"]}),
        (table(MS, A, header="time (s),angle (rad)"), {"units": ["ms", "rad"]}),
        (table(T, 2 * A, A, header="t,theta1,theta2"), {"columns": ["T", "theta2"]}),
        (table(2 * T, T, 3 * A, A), {"columns": ["2", "4"]}),
        (table(np.arange(90), A, header="frame,angle (rad)"), {"fps": 30}),
        (table(T, np.arange(90), A, header="time,frame,angle (rad)"), {"columns": ["frame", "angle"], "fps": 30}),
        (table(A, header="angle"), {"columns": ["angle"], "fps": 30}),
        (table(T, A / (2 * np.pi) * 2400, header="t,counts"), {"units": ["s", "2400/rev"]}),
    ],
)  # fmt: skip
def test_times_and_angles_are_read_as_they_were_meant(tmp_path, text, options):
    record = reads(tmp_path, text, **options)
    np.testing.assert_allclose(record.times, T, atol=6e-4)
    np.testing.assert_allclose(record.values, A, atol=2e-5)
    assert "\n" not in record.understood
    assert "90 samples" in record.understood


def test_what_was_understood_is_one_line(tmp_path):
    cells = ["" if k == 3 else f"{d:.4f}".replace(".", ",") for k, d in enumerate(D)]
    record = reads(tmp_path, table(T, cells, header="Zeit;Winkel (°)", separator=";", decimal=","))
    assert record.understood == (
        "mine.csv: semicolons, decimal commas; time from column 1 ('Zeit') in s (no unit given), angle from column 2 "
        "('Winkel (°)') in deg; 89 samples in 2.967 s (1 without a number left out)"
    )


def test_rows_of_equal_rounded_times_are_averaged(tmp_path):
    record = reads(tmp_path, table(np.repeat(T, 2), np.repeat(A, 2) + np.tile([0.01, -0.01], 90), header="time,angle"))
    np.testing.assert_allclose(record.values, A, atol=1e-6)
    assert "90 of equal times averaged" in record.understood


@pytest.mark.parametrize(("turn", "unit"), [(360.0, "deg"), (2 * np.pi, "rad"), (2400.0, "counts")])
def test_rows_of_equal_times_are_averaged_across_the_jump_by_a_turn(tmp_path, turn, unit):
    swing = (np.repeat(A, 2) + np.tile([0.01, -0.01], 90)) * turn / (2 * np.pi)
    text = table(np.repeat(T, 2), swing % turn, header=f"time (s),angle ({unit})")
    record = reads(tmp_path, text, **({"units": ["2400/rev"]} if unit == "counts" else {}))
    np.testing.assert_allclose(record.values - record.values[0], A - A[0], atol=2e-5)


@pytest.mark.parametrize("zone", ["Z", "+00:00", "-05:30", "+0100"])
def test_times_of_day_may_have_a_time_zone(tmp_path, zone):
    record = reads(tmp_path, table([f"2026-11-30T10:59:{t + 50:06.3f}{zone}" for t in T], A, header="time,angle"))
    np.testing.assert_allclose(record.times, T, atol=6e-4)


@pytest.mark.parametrize(("before", "after"), [("11", "12"), ("12", "1")])
@pytest.mark.parametrize("halves", ["AM PM", "PM AM", "a.m. p.m.", "pm am"])
def test_times_of_day_may_have_twelve_hours(tmp_path, before, after, halves):
    first, second = halves.split() if before == "11" else halves.split()[:1] * 2
    clock = [f"{before}:59:{t:06.3f} {first}" if t < 60 else f"{after}:00:{t - 60:06.3f} {second}" for t in T + 58.5]
    record = reads(tmp_path, table([f"11/30/2026 {time}" for time in clock], A, header="time,angle"))
    np.testing.assert_allclose(record.times, T, atol=1.1e-3)


@pytest.mark.parametrize("date", ["", "2026-11-30T"])
@pytest.mark.parametrize("order", [1, -1])
def test_times_of_day_run_on_past_midnight(tmp_path, date, order):
    clock = [f"{date}23:59:{t:06.3f}" if t < 60 else f"{date}00:00:{t - 60:06.3f}" for t in T + 58.5]
    record = reads(tmp_path, table(["", *clock[::order]], ["", *A[::order]], header="time,angle"))
    np.testing.assert_allclose(record.times, T, atol=1.1e-3)
    np.testing.assert_allclose(record.values, A, atol=1e-6)


@pytest.mark.parametrize(("header", "unit"), [("time (s)", 1), ("time (ms)", 1e3), ("time", 1)])
@pytest.mark.parametrize("order", [1, -1])
def test_seconds_since_midnight_run_on_past_it(tmp_path, header, unit, order):
    since = [f"{t * unit:.6f}" for t in (T + 86398.5) % 86400]
    record = reads(tmp_path, table(since[::order], [f"{a:.9f}" for a in A[::order]], header=f"{header},angle"))
    np.testing.assert_allclose(record.times, T, atol=1e-5)
    np.testing.assert_allclose(record.values, A, atol=1e-6)


def test_seconds_that_go_back_elsewhere_than_at_midnight_are_not_a_day_later(tmp_path):
    for start in (86400 - T[-1] - 5, 86000.0):  # 5 s before midnight, and 400 s
        times = np.append(start + T, T)
        text = table([f"{t:.6f}" for t in times], np.tile(A, 2), header="time (s),angle")
        with pytest.raises(ValueError, match=r"line 92: .* goes back from .* to 0; expected one record per file"):
            reads(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "is empty"),
        ("PK\x03\x04", {}, "an archive or a workbook: save the sheet with the record as CSV"),
        ("<?xml version='1.0'?><TrackerData/>", {}, "in Tracker: File, Export, Data File"),
        ("A pendulum.\nIt swings.\n", {}, "has no rows of numbers"),
        ("time,angle\n", {}, "has no rows of numbers"),
        (table(T[:5], A[:5], header="time,angle"), {}, "has 5 rows with a time and an angle; expected at least 12"),
        (table(T, 0 * A + 0.3, header="time,angle"), {}, r"column 2 \('angle'\) is 0.3 in every row"),
        (table(T, np.where(T == 1, np.inf, A), header="time,angle"), {}, "line 32: 'inf' in the midst of numbers"),
        (table(T, ["lost it" if t == 1 else f"{t}" for t in T], header="time,angle"), {}, "line 32: 'lost it'"),
        (table(T, A, header="time,angle") + "mean,0.1\n", {}, "line 92: 'mean'"),
        (2 * table(T, A, header="time,angle"), {}, "line 92: 'time' in the midst of numbers"),
        (table(np.tile(T, 2), np.tile(A, 2), header="time,angle\n"), {}, "line 93: .* goes back from 2.96667 to 0"),
        (table(T, A, header="time,angle") + "3.1,0,5\n", {}, "line 92 has 3 cells; expected 2"),
        (table([f"{t:.3f}" for t in T], [f"{a:.3f}" for a in A], header="time,angle").replace(".", ","), {}, "decimal commas"),
        (table(np.floor(T / 2), A, header="time,angle"), {}, "2 different times in 90 rows, too coarse"),
        (table(np.arange(90), A), {}, "counts 0, 1, 2, ... and has no unit; give --fps N"),
        (table(T, A, header="time (s),angle"), {"columns": ["time"]}, "--columns time names the time alone; .* TIME,ANGLE"),
        (table(np.arange(90), A, header="frame,angle"), {}, "counts frames; give --fps N"),
        (table(A, header="angle"), {}, "no times; give --fps N"),
        (table(T, A, header="time (s),angle"), {"fps": 30}, "is a time in s, so --fps has no meaning"),
        (table(T, A, header="time,angle"), {"fps": -1.0}, "expected a positive number of frames per second"),
        (table(T, np.sin(3 * T), np.sin(7 * T), header="t,x,y"), {}, r"the positions are off a circle .*atan2\(x - x0, y0 - y\)"),
        (table(T, NOISY[0] + 0.1 * A, NOISY[1], header="t,x,y"), {}, "no pivot is found, since their arc is too short"),
        (table(T, A, 0.02 * A, header="t,x,y"), {}, "no pivot is found, since their arc is too short"),
        (table(T, A, header="t,x"), {}, "no column of angles, only .*TIME,X,Y"),
        (table(T, A, header="t (s),Acceleration x (m/s^2)"), {}, "no column of angles"),
        (table(T, A, 0.5 * A, header="t,theta1,theta2"), {}, r"2 columns that could be the angle: column 2 \('theta1'\)"),
        (table(T, A, 0.5 * A), {}, "2 columns that could be the angle.*by name or by number"),
        (table(T, A, A, header="t,gyro x (rad/s),gyro y (rad/s)"), {}, "none of which has the whole swing"),
        (table(T, A, header="t,gyro x"), {}, "has no unit; give --units rad/s or --units deg/s"),
        (table(T, A, header="t,encoder"), {}, "is in counts; give --units N/rev"),
        (table(T, 600 * A), {}, "neither rad nor degrees; give --units N/rev"),
        (table(T, A, header="time,angle"), {"units": ["furlong"]}, "--units 'furlong' is unknown; expected s, ms"),
        (table(T, A, header="time,angle"), {"units": ["rad", "deg"]}, "two units of angle"),
        (table(T, A, header="time,angle"), {"columns": ["time", "theta"]}, "no single column 'theta'; expected .*'angle'"),
        (table(T, A, ["x" for _ in T], header="time,angle,note"), {"columns": ["time", "note"]}, "holds no numbers"),
        (table(0.01 * T, A), {}, "no unit makes this a pendulum"),
    ],
)  # fmt: skip
def test_file_that_can_be_misunderstood_is_refused_with_the_remedy(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        reads(tmp_path, text, **options)


@pytest.mark.parametrize(
    ("text", "quantity", "unit"),
    [
        ("Time (s)", TIME, "s"), ("t/ms", TIME, "ms"), ("time_us", TIME, "µs"), ("Zeit", TIME, None), ("seconds", TIME, "s"),
        ("Frame number", FRAME, None), ("θ", ANGLE, None), ("Winkel in Grad", ANGLE, "deg"), ("φ / °", ANGLE, "deg"),
        ("Angle (rad) Run #1", ANGLE, "rad"), ("position (deg)", ANGLE, "deg"), ("angleDeg", ANGLE, None), ("pitch", ANGLE, None),
        ("Gyroscope y (rad/s)", VELOCITY, "rad/s"), ("Angular velocity", VELOCITY, None), ("omega [deg/s]", VELOCITY, "deg/s"),
        ("dθ/dt", VELOCITY, None), ("x (m)", OTHER, None), ("Acceleration (m/s²)", OTHER, None), ("angle error", OTHER, None),
        ("angular acceleration (rad/s²)", OTHER, None), ("Kanal A", None, None),
    ],
)  # fmt: skip
def test_headings_say_quantity_and_unit(text, quantity, unit):
    found = heading(text)
    assert (found.quantity, found.unit) == (quantity, unit)


# --- the truth about it --------------------------------------------------------------------------------------

LONG = np.arange(600) / 50


def recorded(angles: Array, times: Array = LONG, noise: float = 0.003, **options: object) -> Record:
    noise = noise * np.random.default_rng(5).standard_normal(len(times))
    return Record("mine.csv", times, angles + noise, np.arange(len(times)) + 2, **options)


def test_derivatives_of_a_motion_are_those_of_differences():
    names = ("log length", "damping", "angle", "velocity", "zero", "drift", "drag", "friction", "scale")
    motion = Motion(0.1, ANGLE, np.array([-0.5, 0.1, 0.8, 0.3, 0.05, 0.01, 0.02, 0.01, 1.1]), names)
    times = np.linspace(0.1, 3, 20)
    jacobian = motion.linearised(times)[1]
    for k, step in enumerate(1e-4 * np.eye(len(names))):
        ahead, behind = (Motion(0.1, ANGLE, motion.parameters + s, names).observed(times) for s in (step, -step))
        np.testing.assert_allclose(jacobian[:, k], (ahead - behind) / 2e-4, rtol=1e-3, atol=1e-4)


def test_motion_is_that_of_the_simulation():
    motion = Motion(0.0, ANGLE, np.array([np.log(0.9), 0.2, 1.2, 0.0, 0.0]))
    np.testing.assert_allclose(
        motion.observed(TIMES), trajectories(np.array([0.9]), np.array([0.2]), np.array([1.2]))[0], atol=2e-6
    )


@pytest.mark.parametrize("scale", [0.2, 4.0])
def test_similar_pendulums_have_similar_answers(reader, scale):
    one, other = (pendulum.estimate(reader, recorded(swing(1.0, 0.2, 0.7, LONG)[0], s * LONG)) for s in (1.0, scale))
    assert other.network.length == pytest.approx(scale**2 * one.network.length, rel=1e-5)
    assert other.refined.length == pytest.approx(scale**2 * one.refined.length, rel=1e-6)
    assert other.refined.damping == pytest.approx(one.refined.damping / scale, rel=1e-5)
    assert other.refined.length_error == pytest.approx(scale**2 * one.refined.length_error, rel=1e-3)


def test_mirrored_record_has_the_same_answers(reader):
    angles = swing(0.3, 0.2, 0.7, LONG)[0] + 0.003 * np.random.default_rng(5).standard_normal(len(LONG))
    one, other = (pendulum.estimate(reader, recorded(sign * angles, noise=0)) for sign in (1, -1))
    assert other.refined.length == pytest.approx(one.refined.length, rel=1e-9)
    assert other.network.length == pytest.approx(one.network.length, rel=1e-6)


def test_stated_errors_are_those_of_repeated_records(reader):
    times = LONG[:150]
    angles = swing(0.5, 0.2, 0.6, times)[0]
    rng = np.random.default_rng(0)
    found = [pendulum.estimate(reader, recorded(angles + 0.01 * rng.standard_normal(150), times, 0)) for _ in range(12)]
    off = [(e.refined.length - 0.5) / e.refined.length_error for e in found]
    assert 0.5 < np.sqrt(np.mean(np.square(off))) < 1.6


def test_angular_velocities_of_a_gyroscope_tell_the_length_too(reader, tmp_path):
    velocity = swing(0.6, 0.1, 0.5, LONG)[1]
    noise = 0.02 * np.random.default_rng(0).standard_normal((3, len(LONG)))
    axes = [noise[0] + 0.05, velocity + 0.1 + noise[1], noise[2]]
    header = ",".join(f'"Gyroscope {axis} (rad/s)"' for axis in "xyz")
    record = reads(tmp_path, table(LONG, *axes, header=f'"Time (s)",{header}'))
    assert "angular velocity from column 3 ('Gyroscope y (rad/s)') in rad/s" in record.understood
    found = pendulum.estimate(reader, record)
    assert abs(found.refined.length - 0.6) < 3 * found.refined.length_error < 0.002
    assert found.zero == pytest.approx(0.1, abs=0.01)


def test_angular_velocities_that_were_computed_as_differences_are_no_misfit(reader):
    angles = recorded(swing(0.6, 0.1, 0.5, LONG)[0]).values
    found = pendulum.estimate(reader, recorded(np.gradient(angles, LONG), noise=0, quantity=VELOCITY))
    assert abs(found.refined.length - 0.6) < 3 * found.refined.length_error < 0.006
    assert not any("times the noise" in remark for remark in found.remarks)


def test_degrees_that_nobody_named_are_told_by_the_swing(reader, tmp_path):
    small, wide = (np.degrees(swing(0.8, 0.1, a, LONG)[0]) for a in (0.03, 0.9))
    found = pendulum.estimate(reader, reads(tmp_path, table(LONG, small)))
    assert abs(found.refined.length - 0.8) < 3 * found.refined.length_error < 0.008
    assert any("taken as degrees" in remark for remark in found.remarks)
    found = pendulum.estimate(reader, reads(tmp_path, table(LONG, wide)))
    assert "in deg (no unit given)" in found.understood
    assert found.refined.length == pytest.approx(0.8, rel=1e-3)


def test_unit_that_nobody_knows_is_remarked_upon(reader, tmp_path):
    noisy = swing(0.8, 0.1, 0.5, LONG[:150])[0] + 0.04 * np.random.default_rng(0).standard_normal(150)
    found = pendulum.estimate(reader, reads(tmp_path, table(LONG[:150], noisy, header="time (s),angle")))
    assert any("if they are degrees, the length is" in remark for remark in found.remarks)


def test_misread_samples_are_left_out_and_named(reader):
    angles = swing(0.5, 0.1, 0.6, LONG)[0]
    angles[[50, 300]] += 1.5
    found = pendulum.estimate(reader, recorded(angles))
    assert abs(found.refined.length - 0.5) < 3 * found.refined.length_error < 0.001
    assert any("2 of 600 samples far off are left out (line 52, 302)" in remark for remark in found.remarks)


def test_end_of_a_pendulum_that_was_caught_is_cut_and_named(reader):
    angles = np.where(LONG < 9, swing(0.5, 0.1, 0.6, LONG)[0], 0.1)
    found = pendulum.estimate(reader, recorded(angles))
    assert abs(found.refined.length - 0.5) < 3 * found.refined.length_error < 0.001
    assert 8 < found.end_time < 9
    assert any("is no longer free swing, and is left out" in remark for remark in found.remarks)


def with_force(force: Callable[[float, float], float]) -> Array:
    return integrated(lambda s, y: [y[1], -GRAVITY / 0.6 * np.sin(y[0]) - 0.05 * y[1] + force(s, y[1])], LONG, 0.7)[0]


@pytest.mark.parametrize(
    ("angles", "cause"),
    [
        (with_force(lambda s, v: -0.08 * abs(v) * v), "air drag that grows with the square of the velocity"),
        (with_force(lambda s, v: -0.2 * np.tanh(v / 0.01)), "dry friction"),
        (with_force(lambda s, v: 0.0) + 0.01 * LONG, "a zero that moves by 0.01 rad per second"),
    ],
)
def test_what_does_not_fit_is_named_and_counted_in_the_errors(reader, angles, cause):
    found = pendulum.estimate(reader, recorded(angles))
    assert any(cause in remark for remark in found.remarks)
    assert abs(found.refined.length - 0.6) < 3 * found.refined.length_error < 0.03
    assert found.residual > 1.5 * found.noise


@pytest.mark.parametrize(
    ("angles", "message"),
    [
        (with_force(lambda s, v: np.sin(3.3 * s)), "swings before .* too, .* something drives it"),
        (with_force(lambda s, v: 2 * np.sin(6 * s)), "is not the free swing of a pendulum"),
        (swing(0.6, -0.04, 0.2, LONG)[0], r"the swing grows, with a damping of -0\.0[34]"),
        (
            np.where(LONG < 4, with_force(lambda s, v: 0.0), 0.1),
            "is not the free swing .* Cut the record to the free swing",
        ),
        (1.3 * swing(0.6, 0.1, 0.9, LONG)[0], "angles of 1.3 times their true size"),
        (0.1 * np.sign(np.sin(3 * LONG)), "is not the free swing"),
        (0.02 * LONG, "0 clear turning points"),
        (np.zeros(600), "if it swings at all"),
        (swing(0.6, 14.0, 0.9, LONG)[0], "0 clear turning points"),
        (30 * swing(0.6, 0.1, 0.9, LONG)[0], "over the top.*--units deg"),
        (
            swing(12.0, 0.0, 0.9, LONG)[0][:460],
            r"1.25\d periods of 7.3\d s; expected at least 1.5: record it for longer",
        ),
        (swing(0.6, 0.1, 0.9, 1000 * LONG)[0], "mine.csv"),
        # In which least squares try a pendulum of nanometres, or one that is damped within a sample: hours of integration.
        (
            swing(1.0, 1.0, 0.6, LONG)[0][:300] - 3.0 * (np.arange(300) == 130),
            "expected at least 1.5: record it for longer",
        ),
        # The swing is fitted from the misread sample on, and what follows it is too little.
        (swing(0.05, 0.01, 0.6, LONG)[0][:60] + 3.0 * (np.arange(60) == 56), "does not swing as a pendulum does"),
        # The turning point of the motion that is found first comes after the end.
        (swing(0.05, 0.01, 0.6, LONG)[0][:60] + 3.0 * (np.arange(60) == 45), "mine.csv shows"),
    ],
)
def test_record_that_is_no_pendulum_is_refused_with_the_reason(reader, angles, message):
    with pytest.raises(ValueError, match=message):
        pendulum.estimate(reader, recorded(angles, LONG[: len(angles)]))


def test_gap_is_refused_if_it_is_too_long_for_the_period_only(reader):
    kept = (LONG < 3) | (LONG > 3.6)
    short, long = swing(0.3, 0.1, 0.5, LONG)[0][kept], swing(3.0, 0.05, 0.5, LONG)[0][kept]
    with pytest.raises(ValueError, match=r"a gap of 0.64 s after line 151, with a period of 1.11 s"):
        pendulum.estimate(reader, recorded(short, LONG[kept]))
    assert pendulum.estimate(reader, recorded(long, LONG[kept])).refined.length == pytest.approx(3.0, rel=0.005)


def test_too_few_samples_per_period_are_refused(reader):
    times = np.arange(60) / 5
    with pytest.raises(ValueError, match=r"a sample every 0\.2 s, but swings with a period of about 0\.6"):
        pendulum.estimate(reader, recorded(swing(0.1, 0.05, 0.5, times)[0], times))


def test_wrong_unit_of_time_is_refused(reader, tmp_path):
    with pytest.raises(ValueError, match=r"would be .*e\+05 m long.*Check the unit of the time"):
        pendulum.estimate(reader, reads(tmp_path, table(MS, A, header="time (s),angle (rad)")))


def test_release_out_of_what_the_network_has_learnt_is_remarked_upon(reader):
    found = pendulum.estimate(reader, recorded(swing(0.6, 0.1, 2.5, LONG)[0]))
    assert any(
        "was trained on releases of 0.2 to 1.4 rad, and this record has 2.5" in remark for remark in found.remarks
    )
    assert abs(found.refined.length - 0.6) < 3 * found.refined.length_error < 0.001


# --- the command ---------------------------------------------------------------------------------------------


def test_command_prints_what_it_read_both_answers_and_what_remains(model, tmp_path, capsys):
    path = tmp_path / "mine.csv"
    path.write_text(table(LONG, recorded(swing(0.3, 0.1, 0.6, LONG)[0]).values, header="time (s),angle (rad)"))
    assert (
        main(["pendulum", "--data", str(path), "--model", str(model), "--out", str(tmp_path), "--engine", "numpy"]) == 0
    )
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[:5]] == ["read", "network", "refined", "release", "residual"]
    assert "length 0.2999" in out.splitlines()[2]
    assert "(standard errors)" in out.splitlines()[2]
    assert "mine-pendulum.png" in err


@pytest.mark.parametrize("periods", [6, 20])
def test_figure_shows_the_record_and_the_pendulum_found(reader, tmp_path, periods):
    from matplotlib.image import imread

    times = np.arange(round(periods * 1.1 * 50)) / 50
    angles = np.concatenate([np.full(50, 0.6), swing(0.3, 0.05, 0.6, times)[0]])
    found = pendulum.estimate(reader, recorded(angles, np.arange(len(angles)) / 50))
    image = imread(pendulum.save_figure(found, tmp_path))[..., :3]
    for colour in ((0, 0, 0), (0xC8, 0x44, 0x2D), (0xA0, 0xAE, 0xC0)):
        assert (np.abs(image - np.array(colour) / 255).max(axis=2) < 0.02).sum() > 20


def test_command_refuses_a_bad_record_with_1_and_the_reason_before_it_trains(tmp_path, capsys):
    path = tmp_path / "mine.csv"
    path.write_text(table(T, A, header="t,x"))
    assert main(["pendulum", "--data", str(path), "--engine", "numpy"]) == 1
    err = capsys.readouterr().err
    assert "no column of angles" in err
    assert "training" not in err


@pytest.mark.parametrize("option", ["--model", "--columns", "--units", "--fps"])
def test_options_of_a_record_without_one_are_refused(option, capsys):
    assert main(["pendulum", option, "1", "--engine", "numpy"]) == 1
    assert f"{option} is used with --data only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        (["--data", "mine.csv"], "--models"),
        (["--data", "mine.csv"], "--seeds"),
        (["--data", "mine.csv"], "--jobs"),
        (["--tune"], "--seeds"),
    ],
)
def test_options_that_a_mode_takes_no_notice_of_are_refused(mode, option, capsys):
    assert main(["pendulum", *mode, option, "1", "--engine", "numpy"]) == 1
    assert f"{option} cannot be combined with {mode[0]}, which ignores it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_mean": [0.0] * 31}, "does not read 32 angles to 2 parameters"),
        ({"input_mean": [np.nan] * 32}, r"input_mean of shape \(32,\) .*expected finite numbers of shape \(32,\)"),
        ({"input_scale": 0.0}, r"input_scale of shape \(\) .*expected finite numbers above 0 of shape \(\)"),
        ({"target_mean": [1.0]}, r"target_mean of shape \(1,\) .*expected finite numbers of shape \(2,\)"),
        (
            {"target_scale": [1.0, -1.0]},
            r"target_scale of shape \(2,\) .*expected finite numbers above 0 of shape \(2,\)",
        ),
        ({"target_scale": [1.0, np.inf]}, "target_scale .*expected finite numbers above 0"),
    ],
)
def test_model_file_with_a_scaling_that_makes_no_sense_is_refused(reader, tmp_path, wrong, message):
    arrays = {name: np.asarray(value) for name, value in wrong.items()}
    dataclasses.replace(reader, scaling=dataclasses.replace(reader.scaling, **arrays)).save(
        tmp_path / "net.safetensors"
    )
    with pytest.raises(irnn.ModelFileError, match=message):
        pendulum.Reader.load(tmp_path / "net.safetensors")


def test_model_file_of_another_network_is_refused(tmp_path):
    irnn.Network(3, [irnn.Layer(2)], outputs=1, engine="numpy").save(tmp_path / "net.safetensors")
    with pytest.raises(irnn.ModelFileError, match="not one that the pendulum experiment has saved"):
        pendulum.Reader.load(tmp_path / "net.safetensors")
