"""The result of a solve."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from implicit_rnn import options


class Status(IntEnum):
    """How the solve of one sample ended; a solution's ``status`` holds the numbers.

    The page *How to choose* explains what each means and what to do about it.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> solution = net.equilibrium([[0.5, -1.0]], solver=irnn.Picard(max_iterations=3), on_failure="ignore")
    >>> irnn.Status(solution.status[0]).name
    'MAX_ITERATIONS'
    """

    CONVERGED = 0
    MAX_ITERATIONS = 1
    DIVERGED = 2
    NON_FINITE = 3
    UNSTABLE = 4
    SINGULAR = 5


CONVERGED, MAX_ITERATIONS, DIVERGED, NON_FINITE, UNSTABLE, SINGULAR = (int(status) for status in Status)
# Plain numbers to compare arrays with: NumPy looks up attributes on the class of an operand, which is slow for a member of an
# enumeration, and a KeyboardInterrupt during the lookup is lost in Python 3.10 and 3.11.


@dataclass(frozen=True)
class Solution:
    """The equilibria of a batch of B samples, as plain NumPy arrays.

    Attributes
    ----------
    state
        (B, N) the state z of all neurons; for unconverged samples the last finite iterate. For samples on a device it is an
        array there, with a method ``numpy``.
    status
        (B,) ``Status`` of each sample.
    iterations
        (B,) evaluations of f, the largest number of any stage.
    residual
        (B,) relative residual ‖f(u + Rz) - z‖₂ / max(‖f(u + Rz)‖₂, 1e-3 √n), the worst of any stage.
    rate
        (B,) quotient of the last two residuals: the observed contraction rate.
    bound
        (B,) certified bound on max |z - z*|, NaN where the constraint provides none.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> solution = net.equilibrium([[0.5, -1.0], [0.2, 0.1]])
    >>> solution.state.shape, solution.status, solution.converged
    ((2, 8), array([0, 0], dtype=int8), array([ True,  True]))
    >>> bool(solution.bound.max() < 1e-8)  # certified: no entry of the state is further from the equilibrium
    True
    >>> print(solution.failure())
    None
    >>> irnn.Solution.empty(samples=2, neurons=8, dtype=np.dtype("float64")).state.shape
    (2, 8)
    """

    state: np.ndarray
    status: np.ndarray
    iterations: np.ndarray
    residual: np.ndarray
    rate: np.ndarray
    bound: np.ndarray

    @classmethod
    def empty(cls, samples: int, neurons: int, dtype: np.dtype) -> Solution:
        """A solution whose arrays an engine will fill.

        Parameters
        ----------
        samples, neurons, dtype
            B, N and the type of the states.
        """
        return cls(
            np.empty((samples, neurons), dtype),
            np.empty(samples, np.int8),
            np.empty(samples, np.int32),
            np.empty(samples),
            np.empty(samples),
            np.empty(samples),
        )

    @property
    def converged(self) -> np.ndarray:
        """(B,) whether each sample reached its equilibrium."""
        return np.asarray(self.status == CONVERGED)

    def failure(self) -> str | None:
        """A sentence on the samples that did not converge, or None where all did."""
        if not np.count_nonzero(self.status):  # the quickest look
            return None
        failed = ~self.converged
        kinds = ", ".join(
            f"{count} {Status(code).name.lower()}"
            for code, count in zip(*np.unique(self.status[failed], return_counts=True), strict=True)
        )
        worst = np.max(self.residual[failed])
        return (
            f"{failed.sum()} of {len(failed)} samples did not reach an equilibrium ({kinds}; largest relative residual "
            f"{worst:.2g}, first sample {np.flatnonzero(failed)[0]})"
        )

    def __repr__(self) -> str:
        return (
            f"Solution({self.state.shape[0]} samples of {self.state.shape[1]} neurons, {self.converged.sum()} converged, "
            f"iterations up to {self.iterations.max()}, residual up to {self.residual.max():.2g})"
        )


def remedy(unique: bool, status: np.ndarray | None = None) -> str:
    """Remedies for samples that ended without equilibrium, with these ``status`` (B,); ``unique``: under a constraint."""
    failed = np.array([MAX_ITERATIONS]) if status is None else status[status != CONVERGED]
    ways = []
    if (failed == NON_FINITE).any():
        ways.append("if NaN or infinity occurred, check that net.parameters are finite and not very large")
    if not np.isin(failed, (NON_FINITE, SINGULAR)).all():
        ways.append("raise max_iterations, loosen tol or damp the solver")
    if (failed == SINGULAR).any():
        ways.append("where the Jacobian is singular, use another start z0 or Anderson(), which needs no Jacobian")
    if not unique:
        ways.append("constraint=Perron() guarantees one equilibrium that is always reached")
    return "; ".join(ways)


@dataclass(frozen=True)
class GradientReport:
    """Status and residuals of the solves behind a gradient, for each of B samples.

    Attributes
    ----------
    status
        (B,) ``Status`` of the forward solve.
    residual
        (B,) relative residual of the forward solve, as in ``Solution``.
    adjoint_residual
        (B,) relative residual of the adjoint system, the worst of any stage; NaN where the system was singular.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> X, Y = [[0.5, -1.0], [0.2, 0.1]], [[0.3], [0.0]]
    >>> report = irnn.GradientReport.empty(2)
    >>> loss, gradient = net.loss_and_gradient(X, Y, report=report)
    >>> report.status, bool(report.adjoint_residual.max() < 1e-10)
    (array([0, 0], dtype=int8), True)
    """

    status: np.ndarray
    residual: np.ndarray
    adjoint_residual: np.ndarray

    @classmethod
    def empty(cls, samples: int) -> GradientReport:
        """A report whose arrays an engine will fill.

        Parameters
        ----------
        samples
            B, the number of samples of the gradient.

        Raises
        ------
        ValueError, TypeError
            For anything but a whole number from 1.
        """
        options.check_count("samples", samples)
        return cls(np.empty(samples, np.int8), np.empty(samples), np.empty(samples))


def check_report(report: GradientReport | None, samples: int) -> None:
    """``TypeError`` or ``ValueError`` unless the report is None, or one for that many samples."""
    if report is None:
        return
    if not isinstance(report, GradientReport):
        raise TypeError(f"report is {report!r}; expected GradientReport.empty({samples})")
    for name, array in vars(report).items():
        what, kind = ("whole numbers", "i") if name == "status" else ("floats", "f")
        if not isinstance(array, np.ndarray) or array.dtype.kind != kind:
            came = f"has dtype {array.dtype}" if isinstance(array, np.ndarray) else f"is a {type(array).__name__}"
            raise TypeError(f"report.{name} {came}; expected an array of {what}: use GradientReport.empty({samples})")
        if array.shape != (samples,):
            raise ValueError(
                f"report.{name} has shape {array.shape}, X has {samples} samples; use GradientReport.empty({samples})"
            )
