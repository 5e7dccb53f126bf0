"""The figures of a study. Matplotlib is imported at the first use; every function draws into given axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from implicit_rnn.experiments.pendulum.measured import Estimate
from implicit_rnn.experiments.pendulum.models import MODELS
from implicit_rnn.experiments.pendulum.reader import Reader
from implicit_rnn.experiments.pendulum.report import ratio
from implicit_rnn.experiments.pendulum.simulation import TIMES, Pendulums, trajectories
from implicit_rnn.experiments.pendulum.study import Study
from implicit_rnn.files import write_figure
from implicit_rnn.plotting import NEUTRAL, POSITIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray

COLOURS = {
    "ff2": "#718096",
    "ff3": "#2d3748",
    "lateral": "#2b6cb0",
    "lateral-perron": "#c8442d",
    "lateral-monotone": "#319795",
    "feedback": "#2f855a",
    "feedback-perron": "#b7791f",
    "feedback-monotone": "#d53f8c",
    "bptt": "#805ad5",
}
LONG = 12
"""Periods from which on a figure of a record shows a part of it as well."""
FINE = np.linspace(0, TIMES[-1], 400)


def trajectory(ax: Axes, reader: Reader, pendulums: Pendulums, index: int) -> None:
    """A measured trajectory, the true one, and the one for the parameters that a net estimates from it."""
    from scipy.interpolate import CubicSpline

    pendulum = pendulums[index : index + 1]
    drawn: dict[str, tuple[Array, dict[str, Any]]] = {
        "true": (pendulum.parameters[0], {"color": NEUTRAL, "linewidth": 1.2}),
        "from the net": (
            reader.solve(pendulum.measured)[0][0],
            {"color": POSITIVE, "linewidth": 1.8, "linestyle": (0, (4, 2))},
        ),
    }
    for name, ((length, damping), look) in drawn.items():
        angles = trajectories(np.array([length]), np.array([damping]), pendulum.release)[0]
        ax.plot(FINE, CubicSpline(TIMES, angles)(FINE), label=f"{name}: {length:.3f} m, {damping:.3f} s⁻¹", **look)
    ax.plot(TIMES, pendulums.measured[index], "o", color="black", markersize=3.5, label="measured, ±0.02 rad", zorder=3)
    ax.axhline(0, color="#cbd5e0", linewidth=0.8, zorder=0)
    reach = 1.12 * np.abs(pendulums.measured[index]).max()
    ax.set(xlim=(-0.05, TIMES[-1] + 0.05), ylim=(-reach, 1.75 * reach), xlabel="time / s", ylabel="angle / rad")
    ax.legend(loc="upper right", fontsize=8, frameon=False)


def record(axes: Sequence[Axes], found: Estimate) -> None:
    """A record and the pendulum fitted to it; with three axes, a part of it as well; in the last axes the residual."""
    record, motion = found.record, found.motion
    used = (record.times >= motion.begin) & (record.times <= found.end_time)
    quantity = f"{record.quantity} / {found.unit}"
    fine = np.linspace(motion.begin, found.end_time, 2 + int(40 * found.periods))
    curve = motion.observed(fine)
    for ax in axes[:-1]:
        ax.plot(record.times[~used], record.values[~used], ".", color="#a0aec0", markersize=3, label="not used")
        ax.plot(record.times[used], record.values[used], ".", color="black", markersize=3, label="record")
        ax.plot(fine, curve, color=POSITIVE, linewidth=1.2, label="pendulum found")
        ax.axhline(found.zero, color="#cbd5e0", linewidth=0.8, zorder=0)
        ax.set(ylabel=quantity)
    axes[0].set_title(f"{Path(record.name).name}: {found.refined}", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    shown = slice(None) if (~used).any() else slice(1, None)
    axes[0].legend(
        handles[shown], labels[shown], loc="lower left", bbox_to_anchor=(0, 1.12), ncols=3, fontsize=8, frameon=False
    )
    axes[-1].plot(
        record.times[used], record.values[used] - motion.observed(record.times[used]), ".", color=NEUTRAL, markersize=3
    )
    axes[-1].axhline(0, color="#cbd5e0", linewidth=0.8, zorder=0)
    axes[-1].set(ylabel=f"residual / {found.unit}", xlabel="time / s", xlim=axes[0].get_xlim())


def draw_record(found: Estimate, path: Path) -> Path:
    """Write the figure of a record and the pendulum fitted to it; for a long record with the first periods as well."""
    from matplotlib.figure import Figure

    long = found.periods > LONG
    figure = Figure(figsize=(9, 7.5 if long else 5.5), layout="constrained")
    axes = figure.subplots(3 if long else 2, height_ratios=[2, 2, 1] if long else [2, 1])
    record(axes, found)
    if long:
        period = (found.end_time - found.motion.begin) / found.periods
        axes[1].set_xlim(found.motion.begin - period / 4, found.motion.begin + LONG / 2 * period)
    return _save(figure, path)


def predicted_against_true(ax: Axes, true: Array, predicted: Array, quantity: str, nrmse: float, colour: str) -> None:
    """Predictions (B,) of one parameter over the true values, with the line where they agree."""
    low, high = float(true.min()), float(true.max())
    margin = 0.08 * (high - low)
    ticks = np.arange(0, high + margin, 0.25 if high > 1.5 else 0.2)
    ticks = ticks[ticks > low - margin]
    ax.plot([low - margin, high + margin], [low - margin, high + margin], color="black", linewidth=0.9, zorder=3)
    ax.scatter(true, predicted, s=5, color=colour, alpha=0.35, linewidths=0)
    ax.text(0.04, 0.96, f"NRMSE {nrmse:.3f}", transform=ax.transAxes, va="top", fontsize=9)
    ax.set(
        xlim=(low - margin, high + margin),
        ylim=(low - margin, high + margin),
        xlabel=f"true {quantity}",
        ylabel=f"predicted {quantity}",
        xticks=ticks,
        yticks=ticks,
        aspect="equal",
    )


def ratios(ax: Axes, study: Study, reference: str) -> None:
    """The error of every model relative to that of one, seed by seed, with the geometric mean and its interval."""
    names = [name for name in study.outcomes if name != reference][::-1]
    spread = np.random.default_rng(0).uniform(-0.16, 0.16, len(study.seeds))
    for row, name in enumerate(names):
        r = ratio(study, name, reference)
        seeds = np.array(study.totals(name)) / np.array(study.totals(reference))
        ax.scatter(seeds, row + spread, s=12, color=COLOURS[name], alpha=0.35, linewidths=0)
        ax.errorbar(
            r.mean,
            row,
            xerr=[[r.mean - r.low], [r.high - r.mean]],
            fmt="D",
            color="black",
            markerfacecolor=COLOURS[name],
            markersize=6,
            capsize=4,
            linewidth=1.5,
            zorder=3,
        )
        ax.text(
            1.02,
            row,
            f"{r.mean:.3f}\n[{r.low:.3f}, {r.high:.3f}]",
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=8,
        )
    ax.axvline(1, color=NEUTRAL, linewidth=1, linestyle="--", zorder=0)
    ax.set(
        yticks=range(len(names)),
        yticklabels=[MODELS[name].title for name in names],
        ylim=(-0.5, len(names) - 0.5),
        xlabel=f"test error / that of {MODELS[reference].title}",
    )


def learning_curves(ax: Axes, study: Study, names: Sequence[str]) -> None:
    """The validation error against the epoch: median over the seeds, with the band from quartile to quartile."""
    for name in names:
        outcomes = study.outcomes[name]
        epochs = max((outcome.curve_epochs for outcome in outcomes), key=len)
        curves = np.full((len(outcomes), len(epochs)), np.nan)  # the curve of a net that was halted is shorter
        for row, outcome in zip(curves, outcomes, strict=True):
            row[: len(outcome.curve)] = outcome.curve
        low, middle, high = np.nanquantile(curves, (0.25, 0.5, 0.75), axis=0)
        ax.fill_between(epochs, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        ax.semilogy(epochs, middle, color=COLOURS[name], linewidth=1.6, label=MODELS[name].title)
    ax.set(xlabel="epoch", ylabel="validation error (root mean square, normalised)", xlim=(0, None))
    ticks = [
        tick for tick in (0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0) if ax.get_ylim()[0] <= tick <= ax.get_ylim()[1]
    ]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=9)


def draw(study: Study, model: str, index: int, folder: Path) -> list[Path]:
    """Write all figures, those of single nets with that model and seed; returns the files."""
    from matplotlib.figure import Figure

    test = study.test_set()
    reader = study.reader(model, index)
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    errors = (reader.solve(test.measured)[0] - test.parameters) / test.parameters.std(axis=0)
    order = np.argsort((errors**2).sum(axis=1))
    for ax, (share, name) in zip(
        figure.subplots(1, 2),
        ((0.5, "Median error of all test pendulums"), (0.95, "An error that 5 % exceed")),
        strict=True,
    ):
        trajectory(ax, reader, test, int(order[int(share * len(order))]))
        ax.set_title(name, fontsize=11)
    written = [_save(figure, folder / "trajectories.png")]

    compared = [name for name in dict.fromkeys(("ff2", model)) if name in study.outcomes]
    figure = Figure(figsize=(7.5, 3.7 * len(compared)), layout="constrained")
    for row, name in zip(figure.subplots(len(compared), 2, squeeze=False), compared, strict=True):
        predicted = study.reader(name, index).solve(test.measured)[0]
        for ax, k, quantity in zip(row, (0, 1), ("length / m", "damping / s⁻¹"), strict=True):
            nrmse = study.outcomes[name][index].nrmse[k]
            predicted_against_true(ax, test.parameters[:, k], predicted[:, k], quantity, nrmse, COLOURS[name])
            ax.set_title(MODELS[name].title, fontsize=11)
    written.append(_save(figure, folder / "predictions.png"))

    if len(study.outcomes) > 1:
        reference = "ff2" if "ff2" in study.outcomes else next(iter(study.outcomes))
        figure = Figure(figsize=(8.5, 0.65 * len(study.outcomes) + 1), layout="constrained")
        ratios(figure.subplots(), study, reference)
        written.append(_save(figure, folder / "ratios.png"))

    groups = {
        "No promise of an equilibrium": [name for name in study.outcomes if not MODELS[name].guaranteed],
        "One equilibrium guaranteed": [n for n in study.outcomes if MODELS[n].guaranteed or n in ("ff2", "ff3")],
    }
    shown = {title: names for title, names in groups.items() if names}
    figure = Figure(figsize=(5.5 * len(shown), 4.4), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, (title, names) in zip(axes, shown.items(), strict=True):
        learning_curves(ax, study, names)
        ax.set_title(title, fontsize=11)
        ax.label_outer()
    written.append(_save(figure, folder / "learning_curves.png"))
    return written


def _save(figure: Figure, path: Path) -> Path:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    write_figure(path, figure)
    return path
