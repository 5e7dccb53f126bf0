"""What can be said of a swing before any pendulum is fitted to it: its period, a smooth version, its turning points."""

from __future__ import annotations

import numpy as np

Array = np.ndarray

BINS = 24
"""Per period: averages over bins of that width lose 0.3 % of the amplitude and most of the noise of a dense record."""
PROMINENCE = 0.15
"""How far a turning point that counts must stand out, relative to the range of the record."""


def rough_period(times: Array, values: Array) -> float:
    """The period of the strongest oscillation, in the unit of the times, by a Fourier transform.

    The times need not be even. Amplitudes are weighted by the square root of the frequency, so that a pendulum held still
    before its release, which is a step, does not pass for a slow oscillation.
    """
    interval = float(np.median(np.diff(times)))
    count = min(int((times[-1] - times[0]) / interval) + 1, 1 << 20)
    grid = np.linspace(times[0], times[-1], max(count, 8))
    even = np.interp(grid, times, values)
    even = (even - even.mean()) * np.hanning(len(even) + 2)[1:-1]
    padded = 1 << int(np.ceil(np.log2(8 * len(even))))
    frequencies = np.fft.rfftfreq(padded, grid[1] - grid[0])
    weighted = np.sqrt(frequencies) * np.abs(np.fft.rfft(even, padded))
    weighted[frequencies < 0.75 / (times[-1] - times[0])] = 0
    return float(1 / frequencies[int(np.argmax(weighted))])


def binned(times: Array, values: Array, period: float) -> tuple[Array, Array]:
    """Mean times (m,) and mean values (m, ...) of bins of a ``BINS``-th of a period; sparser records stay as they are."""
    bins = np.floor((times - times[0]) / (period / BINS)).astype(int)
    first = np.flatnonzero(np.diff(bins, prepend=-1))
    counts = np.diff(np.append(first, len(times)))
    sums = np.add.reduceat(values, first, axis=0)
    return np.add.reduceat(times, first) / counts, (sums.T / counts).T


def turning_points(times: Array, values: Array, period: float) -> tuple[Array, Array]:
    """Times and values of the clear turning points, in order."""
    from scipy.interpolate import CubicSpline
    from scipy.signal import find_peaks

    spline = CubicSpline(*binned(times, values, period))
    fine = np.linspace(times[0], times[-1], 2 + int(4 * BINS * (times[-1] - times[0]) / period))
    smooth = spline(fine)
    peaks = [
        find_peaks(sign * smooth, prominence=PROMINENCE * np.ptp(smooth), distance=1.4 * BINS)[0] for sign in (1, -1)
    ]
    found = np.sort(np.concatenate(peaks))
    return fine[found], smooth[found]


def centre(turning: Array, values: Array) -> float:
    """The middle of the swing: the median over neighbouring turning points, in which the decay cancels."""
    if len(turning) < 3:
        return float(values.max() + values.min()) / 2
    return float(np.median((turning[:-2] + 2 * turning[1:-1] + turning[2:]) / 4))
