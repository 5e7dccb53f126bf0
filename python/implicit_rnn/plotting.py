"""Figures of networks and runs. Matplotlib is imported at the first use; every function draws into given axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from implicit_rnn import options
from implicit_rnn.validation import all_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from implicit_rnn.network import Network
    from implicit_rnn.training import Run

Array = np.ndarray

POSITIVE, NEGATIVE, NEUTRAL = "#c8442d", "#2b6cb0", "#4a5568"


def decision_surface(net: Network, ax: Axes, X: Array, Y: Array, *, reach: float = 1.5, points: int = 121) -> None:
    """The first output of a net with two inputs over the plane, with samples marked by whether their targets are above zero.

    Parameters
    ----------
    net
        The network.
    ax
        Matplotlib's axes.
    X, Y
        Samples (B, 2) and targets (B,).
    reach, points
        The plane is [-reach, reach]², with that many points along each axis, at least two.

    Raises
    ------
    ValueError, TypeError
        For a net with another number of inputs, samples or targets of another shape, and an invalid plane.

    Examples
    --------
    >>> from matplotlib import pyplot
    >>> from implicit_rnn import plotting
    >>> net = irnn.Network(2, [irnn.Layer(2)], outputs=[0], seed=0)
    >>> X, Y = np.array([[-1.0, 1.0], [1.0, 1.0]]), np.array([1.0, -1.0])
    >>> plotting.decision_surface(net, pyplot.figure().gca(), X, Y, points=11)
    """
    if net.topology.inputs != 2:
        raise ValueError(f"net has {net.topology.inputs} inputs; expected 2, the axes of the plot")
    X, Y = np.asarray(X), np.ravel(Y)
    if X.ndim != 2 or X.shape[1] != 2 or len(Y) != len(X):
        raise ValueError(f"X has shape {X.shape} and Y {len(Y)} targets; expected (B, 2) and B")
    options.check_positive("reach", reach)
    if options.check_count("points", points) < 2:
        raise ValueError(f"points must be 2 or more, got {points}")
    grid = np.linspace(-reach, reach, points)
    plane = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    surface = net.predict(plane, on_failure="ignore")[:, 0].reshape(points, points)
    image = ax.imshow(
        surface,
        origin="lower",
        extent=(-reach, reach, -reach, reach),
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        interpolation="bilinear",
    )
    ax.contour(grid, grid, surface, levels=[0], colors="black", linewidths=1, linestyles="--")
    for above, marker, label in ((True, "o", "target +"), (False, "s", "target −")):
        points_x, points_y = X[(Y > 0) == above].T
        ax.scatter(
            points_x,
            points_y,
            s=80,
            c="white",
            marker=marker,
            edgecolors="black",
            linewidths=1.5,
            label=label,
            zorder=3,
        )
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04, label="output")
    ax.set(xlabel="$x_1$", ylabel="$x_2$")
    ax.locator_params(nbins=3)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def loss_curve(run: Run, ax: Axes) -> None:
    """Training and validation loss against the epoch, with the best epoch marked.

    The scale is logarithmic, unless a loss is negative, as a custom loss can be, or all are zero.

    Parameters
    ----------
    run
        What ``fit`` returned; ``run.plot()`` does the same.
    ax
        Matplotlib's axes.

    Examples
    --------
    >>> from matplotlib import pyplot
    >>> from implicit_rnn import plotting
    >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
    >>> run = net.fit([[0.1], [0.2]], [[0.3], [0.5]], epochs=3, progress=False)
    >>> plotting.loss_curve(run, pyplot.figure().gca())
    """
    from matplotlib.ticker import MaxNLocator

    marker = "o" if len(run.loss) == 1 else None  # a line through one point is invisible
    ax.plot(np.arange(1, len(run.loss) + 1), run.loss, color=NEUTRAL, label="training", marker=marker)
    if len(run.validation_loss):
        ax.plot(run.validation_epochs, run.validation_loss, color=POSITIVE, label="validation")
        if run.best_epoch is not None:
            best = run.validation_loss[run.validation_epochs == run.best_epoch]
            ax.plot(run.best_epoch, best, "o", color=POSITIVE, label=f"best, epoch {run.best_epoch}")
        ax.legend(frameon=False)
    losses = np.append(run.loss, run.validation_loss)
    if (losses > 0).any() and not (losses < 0).any():
        ax.set_yscale("log")
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    ax.set(xlabel="epoch", ylabel="loss")
    ax.spines[["top", "right"]].set_visible(False)


def topology(net: Network, ax: Axes, *, labels: bool | None = None) -> None:
    """The graph of a net's weights: inputs at the left, a column of neurons per layer, outputs at the right.

    Width shows the size of a weight, colour its sign; under a constraint the weights in force are drawn.

    Parameters
    ----------
    net
        The network.
    ax
        Matplotlib's axes.
    labels
        Whether the numbers are written beside the arrows; by default in nets of up to four neurons.

    Raises
    ------
    ValueError
        For weights that are not finite.

    Examples
    --------
    >>> from matplotlib import pyplot
    >>> from implicit_rnn import plotting
    >>> plotting.topology(irnn.Network(2, [irnn.Layer(2)], outputs=[0], seed=0), pyplot.figure().gca())
    """
    places = _places(net)
    labels = net.topology.neurons <= 4 if labels is None else labels
    W, R = net.input_weights, net.recurrent_weights
    if not (all_finite(W) and all_finite(R)):
        raise ValueError("the net has weights with NaN or infinity, which cannot be drawn; look at net.weights")
    largest = max(np.abs(W).max(), np.abs(R).max(), 1e-12)
    for to, source in zip(*np.nonzero(W), strict=True):
        _arrow(ax, places[("x", source)], places[("z", to)], W[to, source], largest, labels, 0.0)
    for to, source in zip(*np.nonzero(R), strict=True):
        if to == source:
            _loop(ax, places[("z", to)], R[to, to], largest, labels)
        else:
            same_column = places[("z", to)][0] == places[("z", source)][0]
            backwards = places[("z", to)][0] < places[("z", source)][0]
            _arrow(
                ax,
                places[("z", source)],
                places[("z", to)],
                R[to, source],
                largest,
                labels,
                0.35 if same_column or backwards else 0.0,
            )
    outputs = set(net.topology.read_neurons.tolist())
    for (kind, k), (x, y) in places.items():
        face = "#edf2f7" if kind == "x" else "#fefcbf" if k in outputs else "white"
        ax.scatter(x, y, s=620, c=face, edgecolors="black", zorder=3)
        ax.text(x, y, f"${kind}_{{{k + 1}}}$", ha="center", va="center", zorder=4)
    xs, ys = np.array(list(places.values())).T
    ax.set(xlim=(xs.min() - 0.4, xs.max() + 0.6), ylim=(ys.min() - 0.7, ys.max() + 0.8))
    ax.set_aspect("equal")
    ax.axis("off")


def _places(net: Network) -> dict[tuple[str, int], tuple[float, float]]:
    def column(count: int) -> Array:
        return np.linspace(1, -1, count) * min(1.0, 0.5 * count) if count > 1 else np.zeros(1)

    places = {("x", k): (0.0, float(y)) for k, y in enumerate(column(net.topology.inputs))}
    for layer, rows in enumerate(net.topology.rows):
        ys = column(rows.stop - rows.start)
        places |= {("z", rows.start + k): (2.0 * (layer + 1), float(y)) for k, y in enumerate(ys)}
    return places


def _arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    weight: float,
    largest: float,
    labels: bool,
    bend: float,
) -> None:
    _draw(ax, start, end, bend, 14, weight, largest)
    if labels:
        a, b = np.array(start), np.array(end)
        across = np.array([(b - a)[1], -(b - a)[0]])
        middle = a + (0.5 if bend else 0.3) * (b - a) + (0.5 * bend + (0.09 if bend else 0.06)) * across
        _label(ax, middle[0], middle[1], weight)


def _loop(ax: Axes, place: tuple[float, float], weight: float, largest: float, labels: bool) -> None:
    x, y = place
    up = 1 if y >= 0 else -1
    _draw(ax, (x - 0.12, y + 0.1 * up), (x + 0.12, y + 0.1 * up), -1.9 * up, 6, weight, largest)
    if labels:
        _label(ax, x, y + 0.48 * up, weight)


def _draw(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    bend: float,
    shrink: float,
    weight: float,
    largest: float,
) -> None:
    look = {
        "arrowstyle": "-|>",
        "shrinkA": shrink,
        "shrinkB": shrink,
        "connectionstyle": f"arc3,rad={bend}",
        "color": POSITIVE if weight > 0 else NEGATIVE,
        "linewidth": 0.5 + 3 * abs(weight) / largest,
        "alpha": 0.35 + 0.65 * abs(weight) / largest,
    }
    ax.annotate("", end, start, arrowprops=look)


def _label(ax: Axes, x: float, y: float, weight: float) -> None:
    ax.text(
        x,
        y,
        f"{round(weight, 2) + 0.0:.2f}",  # no -0.00
        fontsize=8,
        ha="center",
        va="center",
        zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
    )
