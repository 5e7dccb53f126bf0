"""The figures of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

COLOURS = {"implicit-rnn": "#c8442d", "jax": "#2b6cb0", "torch": "#dd9a2c", "torchdeq": "#718096"}
LABELS = {"jax": "JAX, jitted", "torch": "PyTorch, by hand", "torchdeq": "torchdeq"}
MARKERS = {"implicit-rnn": "o", "jax": "s", "torch": "^", "torchdeq": "D"}


def step(result: dict[str, Any], path: Path) -> None:
    """Times of one gradient, a line per case, with how many times faster we are than the best peer."""
    rows = result["rows"]
    figure = Figure(figsize=(8.5, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        times = {name: entry["seconds"] * 1e3 for name, entry in row["results"].items()}
        axes.plot([min(times.values()), max(times.values())], [y, y], color="#cbd5e0", linewidth=2, zorder=1)
        for name, value in times.items():
            axes.scatter(
                value, y, s=70 if name == "implicit-rnn" else 45, color=COLOURS[name], marker=MARKERS[name],
                label=LABELS.get(name, name) if y == 0 else None, zorder=3 if name == "implicit-rnn" else 2,
            )  # fmt: skip
        if row["ratio"]:
            axes.annotate(
                f"{row['ratio']:.1f}×", (1.0, y), xycoords=("axes fraction", "data"), xytext=(8, 0),
                textcoords="offset points", va="center", fontweight="bold", color=COLOURS["implicit-rnn"],
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["name"].replace(" x ", " × ") for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="milliseconds per training gradient", ylabel="neurons × batch")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", which="major", color="#edf2f7")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title("best peer / ours", loc="right", fontsize=9, color=COLOURS["implicit-rnn"])
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def scale(result: dict[str, Any], path: Path) -> None:
    """Time and memory against batch, neurons and layers."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3, sharey="row")
    titles = {
        "batch": "batch, 64 neurons",
        "neurons": "neurons, batch 256",
        "layers": "layers of 32 neurons, batch 1000",
    }
    for (time, memory), (name, rows) in zip(panels.T, result["series"].items(), strict=True):
        at = [row[name] for row in rows]
        time.plot(at, [row["seconds"] * 1e3 for row in rows], color=COLOURS["implicit-rnn"], marker="o")
        memory.plot(at, [row["peak bytes"] / 1e6 for row in rows], color=COLOURS["jax"], marker="s", label="gradient")
        memory.plot(
            at, [row["input bytes"] / 1e6 for row in rows], color="#a0aec0", linestyle="--", label="inputs, given"
        )
        memory.set_xlabel(titles[name])
        for axes in (time, memory):
            axes.set(xscale="log", yscale="log")
            axes.grid(color="#edf2f7")
            axes.spines[["top", "right"]].set_visible(False)
        if name == "layers":
            for axes in (time, memory):
                axes.set_xticks(at, [str(layers) for layers in at])
                axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0, 0].set_ylabel("milliseconds per gradient")
    panels[1, 0].set_ylabel("peak memory (MB)")
    panels[1, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)
