"""The constraints on the recurrent weights: the guarantee, the formula, the exact derivative and the certificate of each.

Arrays have a leading axis of S nets: raw weights K and weights in force R (S, n, n), learnt scales (S, n), or (S, 0) for a
constraint without scales. ``bounds`` (n,) bounds the slope of each neuron's activation; L = diag(bounds).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from implicit_rnn.model.activations import ACTIVATIONS
from implicit_rnn.norms import scaled_norm
from implicit_rnn.options import Option, check_fraction

Array = np.ndarray


@dataclass(frozen=True)
class Constraint(Option):
    """A constraint on the recurrent weights R; L is the bound on the slope of the activation.

    Examples
    --------
    The formulas, for one net of two neurons with raw weights K, whose slopes are bounded by 1:

    >>> constraint, K = irnn.InfNorm(0.5), np.array([[[0.0, 2.0], [0.1, 0.1]]])
    >>> scales, bounds = np.empty((1, 0)), np.ones(2)
    >>> R = constraint.apply(K, scales, bounds)
    >>> R
    array([[[0. , 0.5],
            [0.1, 0.1]]])
    >>> dK, dscales = constraint.pullback(K, scales, bounds, R, dR=np.ones((1, 2, 2)))
    >>> dK.shape, dscales.shape
    ((1, 2, 2), (1, 0))
    >>> constraint.pushforward(K, scales, bounds, R, dK=np.ones((1, 2, 2)), dscales=scales)
    array([[[0.25, 0.  ],
            [1.  , 1.  ]]])
    >>> constraint.certify(R, scales, bounds, residual=np.full((1, 1, 2), 1e-6))
    array([[[2.e-06, 2.e-06]]])
    >>> constraint.unique
    True
    >>> irnn.Monotone().check_activations(["gelu"])
    Traceback (most recent call last):
    ValueError: the constraint Monotone needs activations whose slope is never negative, which gelu is not; choose ...
    """

    @property
    @abstractmethod
    def unique(self) -> bool:
        """Whether every input has exactly one equilibrium."""

    scaled: ClassVar[bool] = False
    """Whether each stage has learnt scales in addition to K."""
    needs_increasing: ClassVar[bool] = False
    """Whether the guarantee holds only for activations whose slope is never negative."""

    @abstractmethod
    def apply(self, K: Array, scales: Array, bounds: Array) -> Array:
        """The recurrent weights R in force.

        Parameters
        ----------
        K
            Raw weights (S, n, n).
        scales
            Learnt scales (S, n), or (S, 0) for a constraint without.
        bounds
            Bounds (n,) on the slopes of the activations.

        Returns
        -------
        R (S, n, n).
        """

    @abstractmethod
    def pullback(self, K: Array, scales: Array, bounds: Array, R: Array, dR: Array) -> tuple[Array, Array]:
        """∂L/∂K and ∂L/∂scales from dR = ∂L/∂R.

        Parameters
        ----------
        K, scales, bounds
            As for ``apply``: (S, n, n), (S, n) and (n,).
        R
            The result of ``apply``, (S, n, n).
        dR
            ∂L/∂R (S, n, n).

        Returns
        -------
        ∂L/∂K (S, n, n) and ∂L/∂scales, of the shape of ``scales``.
        """

    @abstractmethod
    def pushforward(self, K: Array, scales: Array, bounds: Array, R: Array, dK: Array, dscales: Array) -> Array:
        """The derivative of R along a direction.

        Parameters
        ----------
        K, scales, bounds, R
            As for ``pullback``: (S, n, n), (S, n), (n,) and (S, n, n).
        dK, dscales
            The direction, of the shapes (S, n, n) and (S, n) of K and scales.

        Returns
        -------
        The derivative (S, n, n).
        """

    @abstractmethod
    def certify(self, R: Array, scales: Array, bounds: Array, residual: Array) -> Array:
        """Elementwise bounds on |z - z*|, from bounds on the residuals.

        Parameters
        ----------
        R, scales, bounds
            Weights in force (S, n, n), and the rest as for ``apply``: (S, n) and (n,).
        residual
            Bounds (S, B, n) on |f(u + Rz) - z|.

        Returns
        -------
        The bounds (S, B, n), NaN if there are none.
        """

    def check_activations(self, names: Iterable[str]) -> None:
        """Refuse activations for which the guarantee does not hold.

        Parameters
        ----------
        names
            The names of the activations.

        Raises
        ------
        ValueError
            If the guarantee does not hold for one of them.
        """
        falling = sorted({name for name in names if not ACTIVATIONS[name].increasing})
        if self.needs_increasing and falling:
            raise ValueError(
                f"the constraint {self.name} needs activations whose slope is never negative, which {', '.join(falling)} is "
                "not; choose another activation, or Perron, InfNorm or Spectral"
            )


@dataclass(frozen=True)
class Free(Constraint):
    """No constraint, as in Sanokowski (arXiv 2010.10564): there may be several equilibria, unstable or unreachable ones.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, constraint=irnn.Free(), seed=0)
    >>> bool((net.recurrent_weights == net.weights["R"]).all())
    True
    >>> net.equilibrium([[0.5, -1.0]]).bound
    array([nan])
    """

    unique = False

    def apply(self, K: Array, scales: Array, bounds: Array) -> Array:
        return K

    def pullback(self, K: Array, scales: Array, bounds: Array, R: Array, dR: Array) -> tuple[Array, Array]:
        return dR, scales

    def pushforward(self, K: Array, scales: Array, bounds: Array, R: Array, dK: Array, dscales: Array) -> Array:
        return dK

    def certify(self, R: Array, scales: Array, bounds: Array, residual: Array) -> Array:
        return np.full_like(residual, np.nan)


# --- rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InfNorm(Constraint):
    """Every row of L|R| sums to at most ``kappa``: a contraction in the maximum norm.

    Parameters
    ----------
    kappa
        Largest sum of a row, in (0, 1).

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, constraint=irnn.InfNorm(0.9), seed=0)
    >>> net.weights["R"][...] = 5.0
    >>> np.abs(net.recurrent_weights).sum(axis=1).round(12)
    array([0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    """

    kappa: float = 0.95

    unique = True

    def __post_init__(self) -> None:
        check_fraction("kappa", self.kappa)

    def apply(self, K: Array, scales: Array, bounds: Array) -> Array:
        """R_ij = c_i K_ij with c_i = min(1, κ / (L_i Σ_j |K_ij|))."""
        return _row_factors(self.kappa, K, bounds)[0] * K

    def pullback(self, K: Array, scales: Array, bounds: Array, R: Array, dR: Array) -> tuple[Array, Array]:
        """∂L/∂K_ij = c_i (dR_ij - [c_i < 1] sign(K_ij) Σ_k dR_ik K_ik / Σ_k |K_ik|)."""
        factors, total = _row_factors(self.kappa, K, bounds)
        return factors * (dR - np.sign(K) * _relative(dR * K, total, factors, -1)), scales

    def pushforward(self, K: Array, scales: Array, bounds: Array, R: Array, dK: Array, dscales: Array) -> Array:
        """c_i (dK_ij - [c_i < 1] K_ij Σ_k sign(K_ik) dK_ik / Σ_k |K_ik|)."""
        factors, total = _row_factors(self.kappa, K, bounds)
        return factors * (dK - _relative(np.sign(K) * dK, total, factors, -1) * K)

    def certify(self, R: Array, scales: Array, bounds: Array, residual: Array) -> Array:
        """‖(I - D R)⁻¹‖ <= 1/(1 - κ), D = f′, in the maximum norm."""
        return np.asarray(residual.max(axis=-1, keepdims=True) / (1 - self.kappa) * np.ones(residual.shape[-1]))


@dataclass(frozen=True)
class Perron(InfNorm):
    """R = e^{-A} K e^{A} with a learnt diagonal A and rows of L|K| summing to at most ``kappa``: the default.

    One equilibrium, global convergence of Picard iteration and a certified error bound, at little cost in
    expressiveness (El Ghaoui et al. 2021, well-posedness by the Perron-Frobenius eigenvalue of L|R|).

    Parameters
    ----------
    kappa
        Largest sum of a row, in (0, 1): a bound on the rate of Picard iteration.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, constraint=irnn.Perron(0.9), seed=0)
    >>> net.weights["R"][...] = 5.0  # whatever the weights, the promise holds
    >>> bool(np.abs(np.linalg.eigvals(net.recurrent_weights)).max() <= 0.9 + 1e-12)
    True
    >>> bool(net.equilibrium([[0.5, -1.0]]).bound[0] < 1e-8)
    True
    """

    scaled = True

    def apply(self, K: Array, scales: Array, bounds: Array) -> Array:
        """R_ij = e^{a_j - a_i} c_i K_ij, with the c of ``InfNorm``."""
        return super().apply(K, scales, bounds) * _scaling(scales)

    def pullback(self, K: Array, scales: Array, bounds: Array, R: Array, dR: Array) -> tuple[Array, Array]:
        """∂L/∂K as for ``InfNorm``, from dR_ij e^{a_j - a_i}; ∂L/∂a_k = Σ_i dR_ik R_ik - Σ_j dR_kj R_kj."""
        dK, _ = super().pullback(K, scales, bounds, R, dR * _scaling(scales))
        flow = dR * R
        return dK, flow.sum(axis=-2) - flow.sum(axis=-1)

    def pushforward(self, K: Array, scales: Array, bounds: Array, R: Array, dK: Array, dscales: Array) -> Array:
        """That of ``InfNorm`` times e^{a_j - a_i}, and R_ij (a′_j - a′_i)."""
        rows = super().pushforward(K, scales, bounds, R, dK, dscales)
        return rows * _scaling(scales) + R * (dscales[:, None, :] - dscales[:, :, None])

    def certify(self, R: Array, scales: Array, bounds: Array, residual: Array) -> Array:
        """That of ``InfNorm`` for e^{A} z."""
        scaling = _exponentials(scales)[:, None, :]
        return super().certify(R, scales, bounds, scaling * residual) / scaling


def _row_factors(kappa: float, K: Array, bounds: Array) -> tuple[Array, Array]:
    total = np.abs(K).sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        factors = np.minimum(1, (kappa / bounds)[:, None].astype(K.dtype) / total)
    return factors, total


def _relative(terms: Array, size: Array, factor: Array, axis: int | tuple[int, int]) -> Array:
    """Σ terms / size where the factor is below 1, elsewhere zero, since the size may be tiny or zero there."""
    return np.where(factor < 1, terms.sum(axis=axis, keepdims=True) / np.where(factor < 1, size, 1), 0)


def _exponentials(scales: Array) -> Array:
    """e^a up to a common factor, since only quotients matter; the factor keeps e^a of large a from overflowing."""
    ends = scales.max(axis=-1, keepdims=True), scales.min(axis=-1, keepdims=True)
    return np.asarray(np.exp(scales - (ends[0] / 2 + ends[1] / 2)))


def _scaling(scales: Array) -> Array:
    e = _exponentials(scales)
    return np.asarray(e[:, None, :] / e[:, :, None])


# --- whole matrices ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WholeMatrix(Constraint):
    """R = c K with c = limit / size(K) where that is below 1, for a size that is homogeneous in K.

    Examples
    --------
    >>> size, u, v = irnn.Spectral(0.9).size(np.array([[[3.0, 0.0], [0.0, 1.0]]]))
    >>> size, irnn.Spectral(0.9).limit
    (array([3.]), 0.9)
    """

    unique = True

    @property
    @abstractmethod
    def limit(self) -> float:
        """The largest size allowed."""

    @abstractmethod
    def size(self, M: Array) -> tuple[Array, Array, Array]:
        """The size of a matrix and its derivative.

        Parameters
        ----------
        M
            L K (S, n, n).

        Returns
        -------
        The size (S,), and vectors u, v (S, n) such that its derivative with respect to M is u vᵀ.
        """

    def apply(self, K: Array, scales: Array, bounds: Array) -> Array:
        return self._factor(K, bounds)[0] * K

    def pullback(self, K: Array, scales: Array, bounds: Array, R: Array, dR: Array) -> tuple[Array, Array]:
        """∂L/∂K = c (dR - [c < 1] ⟨dR, K⟩ / size ∂size/∂K)."""
        factor, size, derivative = self._factor(K, bounds)
        return factor * (dR - _relative(dR * K, size, factor, (-2, -1)) * derivative), scales

    def pushforward(self, K: Array, scales: Array, bounds: Array, R: Array, dK: Array, dscales: Array) -> Array:
        """c (dK - [c < 1] ⟨∂size/∂K, dK⟩ / size K)."""
        factor, size, derivative = self._factor(K, bounds)
        return factor * (dK - _relative(derivative * dK, size, factor, (-2, -1)) * K)

    def _factor(self, K: Array, bounds: Array) -> tuple[Array, Array, Array]:
        """c and the size (S, 1, 1), at least tiny, and the derivative of the size with respect to K (S, n, n)."""
        size, u, v = self.size(bounds[:, None] * K)
        size = np.maximum(size, np.finfo(K.dtype).tiny)[:, None, None]
        return np.minimum(1, self.limit / size), size, (bounds * u)[:, :, None] * v[:, None, :]


@dataclass(frozen=True)
class Spectral(WholeMatrix):
    """The largest singular value of L R is at most ``rho``: a contraction in the Euclidean norm.

    Parameters
    ----------
    rho
        Largest singular value, in (0, 1).

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, constraint=irnn.Spectral(0.9), seed=0)
    >>> net.weights["R"][...] = 5.0
    >>> print(f"{np.linalg.norm(net.recurrent_weights, 2):.6f}")
    0.900000
    """

    rho: float = 0.95

    def __post_init__(self) -> None:
        check_fraction("rho", self.rho)

    @property
    def limit(self) -> float:
        return self.rho

    def size(self, M: Array) -> tuple[Array, Array, Array]:
        """The largest singular value, with its singular vectors."""
        left, values, right = _of_finite(np.linalg.svd, M)
        return values[:, 0], left[:, :, 0], right[:, 0, :]

    def certify(self, R: Array, scales: Array, bounds: Array, residual: Array) -> Array:
        """‖(I - D R)⁻¹‖₂ <= 1/(1 - ρ)."""
        size = scaled_norm(residual)[..., None]
        return np.asarray(np.broadcast_to(size / (1 - self.rho), residual.shape))


@dataclass(frozen=True)
class Monotone(WholeMatrix):
    """I - (L R + RᵀL)/2 ⪰ ``margin`` I: one equilibrium (Winston and Kolter 2020), which Picard may not reach.

    Holds for activations whose slope is never negative, hence not for gelu and silu.

    Parameters
    ----------
    margin
        Smallest eigenvalue m of I - (L R + RᵀL)/2, in (0, 1).

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, constraint=irnn.Monotone(0.1), seed=0)
    >>> net.weights["R"][...] = [[0, 5] * 4, [-5, 0] * 4] * 4  # rotation may be strong
    >>> R = net.recurrent_weights
    >>> bool(np.linalg.eigvalsh((R + R.T) / 2).max() <= 0.9 + 1e-12), bool(np.linalg.norm(R, 2) > 1)
    (True, True)
    >>> net.equilibrium([[0.5, -1.0]]).converged
    array([ True])
    """

    margin: float = 0.05

    needs_increasing = True

    def __post_init__(self) -> None:
        check_fraction("margin", self.margin)

    @property
    def limit(self) -> float:
        return 1 - self.margin

    def size(self, M: Array) -> tuple[Array, Array, Array]:
        """The largest eigenvalue of the symmetric part, with its eigenvector twice."""
        eigenvalues, vectors = _of_finite(np.linalg.eigh, (M + np.swapaxes(M, -1, -2)) / 2)
        return eigenvalues[:, -1], vectors[:, :, -1], vectors[:, :, -1]

    def certify(self, R: Array, scales: Array, bounds: Array, residual: Array) -> Array:
        """‖(I - D R)⁻¹‖₂ <= 1 + ‖L R‖₂/m."""
        size = scaled_norm(residual)[..., None]
        norms = _of_finite(np.linalg.svd, bounds[:, None] * R)[1].max(axis=-1)[:, None, None]
        return np.asarray(np.broadcast_to((1 + norms / self.margin) * size, residual.shape))


def _of_finite(decompose: Callable[[Array], Sequence[Array]], M: Array) -> list[Array]:
    """The parts of the decompositions of matrices (S, n, n); for NaN and infinity, which LAPACK refuses, they are NaN."""
    finite = np.isfinite(M).all(axis=(-2, -1))
    parts = [part.copy() for part in decompose(np.where(finite[:, None, None], M, 0))]
    for part in parts:
        part[~finite] = np.nan
    return parts


ConstraintLike = Constraint | Literal["free", "perron", "inf_norm", "spectral", "monotone"]
"""A constraint, or the name of one with its default options."""
