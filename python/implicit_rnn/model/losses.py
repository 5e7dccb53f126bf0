"""The losses: their options, their formulas, and the targets each of them takes.

The loss of B samples is ``Σ_b w_b ℓ(y_b, t_b) / Σ_b w_b``, with w the weights of the samples (1 where none are given), y the
outputs and t the targets. For losses that treat each output separately, ℓ is the mean over the outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from implicit_rnn.errors import without_underflow
from implicit_rnn.options import Option, check_positive
from implicit_rnn.validation import (
    as_array,
    as_real,
    as_targets,
    check_finite,
    check_samples,
    refuse_masked_or_sparse,
    samples_of,
)

Array = np.ndarray


@dataclass(frozen=True)
class Loss(Option):
    """The function to be minimised.

    Examples
    --------
    >>> Y, T = np.array([[2.0], [0.0]]), np.array([[0.0], [0.0]])
    >>> value, gradient = irnn.MSE().value_and_gradient(Y, T, weights=None)
    >>> print(value, gradient.ravel())
    2.0 [2. 0.]
    >>> terms, derivatives = irnn.MSE().values_and_derivatives(Y, T)
    >>> print(terms.ravel(), derivatives.ravel())
    [4. 0.] [4. 0.]
    >>> irnn.CrossEntropy().targets("Y", [1, 0], samples=2, outputs=2, dtype=np.dtype("float64"))
    array([[0., 1.],
           [1., 0.]])
    """

    averaged: ClassVar[bool] = True
    """Whether ℓ is the mean over the outputs rather than their sum."""
    bounded: ClassVar[bool] = False
    """Whether only some numbers are valid targets."""

    @abstractmethod
    def values_and_derivatives(self, Y: Array, T: Array) -> tuple[Array, Array]:
        """The terms of ℓ, one per output, and their derivatives.

        Parameters
        ----------
        Y
            Outputs (..., B, k) in float64.
        T
            Targets (B, k).

        Returns
        -------
        The terms and ∂ℓ/∂Y, both (..., B, k).
        """

    @without_underflow()
    def value_and_gradient(self, Y: Array, T: Array, weights: Array | None) -> tuple[Array, Array]:
        """The loss and its gradient with respect to the outputs.

        Parameters
        ----------
        Y
            Outputs (..., B, k).
        T
            Targets (B, k).
        weights
            Weights (B,) of the samples, with mean 1, or None.

        Returns
        -------
        The loss (...) in float64, and its gradient, of the shape and dtype of Y.
        """
        share = np.full((len(T), 1), 1 / len(T)) if weights is None else (weights / len(T))[:, None]
        if self.averaged:
            share = share / T.shape[1]
        values, derivatives = self.values_and_derivatives(Y.astype(np.float64), T)
        return (values * share).sum(axis=(-2, -1)), (derivatives * share).astype(Y.dtype)

    def targets(self, name: str, Y: ArrayLike, samples: int, outputs: int, dtype: np.dtype) -> Array:
        """Targets as this loss takes them, checked and converted.

        Parameters
        ----------
        name
            Their name in error messages.
        Y
            The targets (samples, outputs); for ``CrossEntropy`` class labels (samples,) as well.
        samples, outputs, dtype
            The expected numbers and dtype.

        Returns
        -------
        The targets (samples, outputs) of that dtype.

        Raises
        ------
        ValueError, TypeError
            For targets that this loss does not accept.
        """
        return as_targets(name, Y, samples, outputs, dtype)


@dataclass(frozen=True)
class MSE(Loss):
    """Mean squared error, ``(y - t)²``.

    Examples
    --------
    >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
    >>> X, Y = [[0.1], [0.2]], [[0.3], [0.5]]
    >>> loss, gradient = net.loss_and_gradient(X, Y, loss=irnn.MSE())
    >>> bool(np.isclose(loss, ((net.predict(X) - Y) ** 2).mean()))
    True
    """

    def values_and_derivatives(self, Y: Array, T: Array) -> tuple[Array, Array]:
        d = Y - T
        return d**2, 2 * d


@dataclass(frozen=True)
class MAE(Loss):
    """Mean absolute error, ``|y - t|``; its derivative at y = t is taken as 0.

    Examples
    --------
    >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
    >>> X, Y = [[0.1], [0.2]], [[0.3], [0.5]]
    >>> loss, gradient = net.loss_and_gradient(X, Y, loss="mae")
    >>> bool(np.isclose(loss, np.abs(net.predict(X) - Y).mean()))
    True
    """

    def values_and_derivatives(self, Y: Array, T: Array) -> tuple[Array, Array]:
        d = Y - T
        return np.abs(d), np.sign(d)


@dataclass(frozen=True)
class Huber(Loss):
    """``d²/2`` for d = |y - t| up to ``delta``, ``delta (d - delta/2)`` beyond (Huber 1964).

    Parameters
    ----------
    delta
        The distance up to which the loss is quadratic.

    Examples
    --------
    >>> terms, slopes = irnn.Huber(delta=0.5).values_and_derivatives(np.array([[0.2], [3.0]]), np.zeros((2, 1)))
    >>> print(terms.ravel().round(3), slopes.ravel())
    [0.02  1.375] [0.2 0.5]
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        check_positive("delta", self.delta)

    def values_and_derivatives(self, Y: Array, T: Array) -> tuple[Array, Array]:
        d = Y - T
        slope = np.clip(d, -self.delta, self.delta)
        return slope * (d - slope / 2), slope


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """``-t log σ(y) - (1 - t) log(1 - σ(y))`` for outputs y that are logits and targets t from 0 to 1.

    Computed as ``max(y, 0) - t y + log(1 + exp(-|y|))``, which neither overflows nor cancels.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> run = net.fit(X, X > 0.2, loss="binary_cross_entropy", optimizer="lbfgs", epochs=20, progress=False)
    >>> probability = 1 / (1 + np.exp(-net.predict(X)))
    >>> float(((probability > 0.5) == (X > 0.2)).mean())
    1.0
    """

    bounded = True

    def values_and_derivatives(self, Y: Array, T: Array) -> tuple[Array, Array]:
        e = np.exp(-np.abs(Y))
        return np.maximum(Y, 0) - T * Y + np.log1p(e), np.where(Y < 0, e, 1) / (1 + e) - T

    def targets(self, name: str, Y: ArrayLike, samples: int, outputs: int, dtype: np.dtype) -> Array:
        """Labels 0 and 1, or probabilities, (samples, outputs)."""
        targets = super().targets(name, Y, samples, outputs, dtype)
        if targets.min() < 0 or targets.max() > 1:
            raise ValueError(
                f"{name} has values from {targets.min():.3g} to {targets.max():.3g}; binary cross-entropy expects labels 0 "
                "and 1, or probabilities between them"
            )
        return targets


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """``-Σ_i t_i log p_i`` with p = softmax(y), for outputs y that are logits and one class per sample.

    Computed with ``log p_i = y_i - max y - log Σ_k exp(y_k - max y)``, which cannot overflow.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> labels = np.digitize(X[:, 0], [-0.5, 0.5])  # three classes: 0, 1, 2
    >>> net = irnn.Network(1, [irnn.Layer(8)], outputs=3, seed=0)
    >>> run = net.fit(X, labels, loss="cross_entropy", optimizer="lbfgs", epochs=40, progress=False)
    >>> float((net.predict(X).argmax(axis=1) == labels).mean())
    1.0
    """

    averaged = False
    bounded = True

    def values_and_derivatives(self, Y: Array, T: Array) -> tuple[Array, Array]:
        y = Y - Y.max(axis=-1, keepdims=True)
        e = np.exp(y)
        partition = e.sum(axis=-1, keepdims=True)
        mass = T.sum(axis=-1, keepdims=True, dtype=np.float64)
        return T * (np.log(partition) - y), mass * e / partition - T

    def targets(self, name: str, Y: ArrayLike, samples: int, outputs: int, dtype: np.dtype) -> Array:
        """Class labels (samples,), whole numbers from 0, or probabilities (samples, outputs) that sum to 1."""
        if outputs < 2:
            raise ValueError(
                "cross-entropy needs an output per class, at least 2; for one output use BinaryCrossEntropy"
            )
        refuse_masked_or_sparse(name, Y)
        array = np.asarray(Y) if hasattr(Y, "iloc") else as_array(name, Y)  # pandas labels may have any dtype
        if array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1):
            return _one_hot(name, array.reshape(-1), samples, outputs, dtype)
        targets = super().targets(name, array, samples, outputs, dtype)
        off = np.abs(targets.sum(axis=1) - 1).max()
        if targets.min() < 0 or off > 1e-5:
            raise ValueError(
                f"{name} must hold class labels (samples,) or probabilities (samples, {outputs}) that sum to 1; its smallest "
                f"value is {targets.min():.3g} and a sum is off by {off:.2g}"
            )
        return targets


# --- custom --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class CustomLoss(Loss):
    """A custom loss: the weighted mean of a function's values over the samples.

    Both engines support it; on the Julia engine the equilibria and the gradient through them are still computed in Julia, but
    every training step returns to Python for its loss.

    Parameters
    ----------
    function
        ``(outputs, targets) -> (values, derivatives)``: it takes the outputs y (B, outputs) in float64 and the targets
        t, an array of B numbers or rows passed on unchanged, and returns the values ℓ (B,), one per sample, and the
        derivatives ∂ℓ_b/∂y_b (B, outputs). It is called with batches of any size and must treat all samples alike. Outputs and
        targets are copies, which it may write to, and NumPy arrays wherever the network computes: data on a card are copied to
        host memory once.

    Raises
    ------
    TypeError
        If it cannot be called, or its results are not real numbers.
    ValueError
        For results of other shapes, and, at the first call, for derivatives that do not match the values.

    Examples
    --------
    >>> def quantile(y, t, q=0.9):  # Koenker and Bassett 1978
    ...     d = t - y
    ...     return np.maximum(q * d, (q - 1) * d)[:, 0], np.where(d > 0, -q, 1 - q)
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> run = net.fit(X, X**2, loss=irnn.CustomLoss(quantile), epochs=50, progress=False)
    >>> bool(run.loss[-1] < run.loss[0])
    True
    """

    function: Callable[[Array, Array], tuple[ArrayLike, ArrayLike]]

    averaged = False
    _verified = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must take outputs and targets, got {self.function!r}")

    # Compared by identity: callable objects may hold arrays, which have no truth value, or a state in which equal ones differ.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, CustomLoss) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[int, ...]:
        """Equal for the same function; a bound method is a new object at each access."""
        f = self.function
        return (id(f.__self__), id(f.__func__)) if isinstance(f, MethodType) else (id(f),)

    def __repr__(self) -> str:
        named = hasattr(self.function, "__qualname__")
        what = f"{self.function.__module__}.{self.function.__qualname__}" if named else repr(self.function)
        return f"{self.name}({what})"

    def options(self) -> dict[str, Any]:
        """The function itself, which ``asdict`` would copy."""
        return {"function": self.function}

    def values_and_derivatives(self, Y: Array, T: Array) -> tuple[Array, Array]:
        """Net by net, with the values as (..., B, 1)."""
        if Y.ndim > 2:
            values, derivatives = zip(*(self.values_and_derivatives(y, T) for y in Y), strict=True)
            return np.stack(values), np.stack(derivatives)
        values, derivatives = self._call(Y, T)
        if not self._verified:
            self._verify(Y[:_VERIFIED], T[:_VERIFIED])
            object.__setattr__(self, "_verified", True)
        return values[:, None], derivatives

    def _call(self, Y: Array, T: Array) -> tuple[Array, Array]:
        result = self.function(Y.copy(), T.copy())
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise TypeError(f"{self} returned {type(result).__name__}; expected (values, derivatives)")
        arrays = []
        for what, array, shape in zip(("values", "derivatives"), result, (Y.shape[:1], Y.shape), strict=True):
            arrays.append(as_real(f"the array of {what} from {self}", array, np.dtype(np.float64)))
            if arrays[-1].shape != shape:
                raise ValueError(
                    f"{self} returned {what} of shape {arrays[-1].shape}; expected {shape}: for outputs (B, k) values (B,), one "
                    "per sample, and derivatives (B, k)"
                )
        return arrays[0], arrays[1]

    def _verify(self, Y: Array, T: Array) -> None:
        """``ValueError`` unless, in most samples, the derivative lies between the one-sided difference quotients.

        At a kink of the loss this admits every subgradient. The tolerances allow for a function that computes in float32.
        """
        direction = np.random.default_rng(0).choice([-1.0, 1.0], Y.shape)
        h = 1e-3 * np.maximum(1, np.abs(Y).max())
        values, derivatives = self._call(Y, T)
        along = (derivatives * direction).sum(axis=1)
        right = (self._call(Y + h * direction, T)[0] - values) / h
        left = (values - self._call(Y - h * direction, T)[0]) / h
        size = np.maximum(np.maximum(np.abs(left), np.abs(right)), np.abs(along))
        margin = 1e-2 * size + 1e-6 * np.abs(values) / h
        off = (along < np.minimum(left, right) - margin) | (along > np.maximum(left, right) + margin)
        if off.mean() > 0.5:
            k = int(np.argmax(off))
            raise ValueError(
                f"the derivatives that {self} returns are not those of its values: in sample {k} the derivative along "
                f"{direction[k].tolist()} is {along[k]:.4g}, the difference quotient {(left[k] + right[k]) / 2:.4g}; expected in "
                "each row the derivative of the value of that sample, not divided by the number of samples"
            )

    def targets(self, name: str, Y: ArrayLike, samples: int, outputs: int, dtype: np.dtype) -> Array:
        """Numbers of any real dtype, (samples, ...)."""
        array = as_array(name, Y)
        check_samples(name, array, samples)
        if array.dtype.kind not in "biu":
            array = as_real(name, array, np.dtype(np.float64))
            if not np.isfinite(array).all():
                raise ValueError(f"{name} has NaN or infinity; let further columns say what is missing")
        return np.ascontiguousarray(array)


_VERIFIED = 64
"""Number of samples on which derivatives are compared with difference quotients."""


LossLike = Loss | Literal["mse", "mae", "huber", "cross_entropy", "binary_cross_entropy"]
"""A loss, or the name of one with its default options."""


# --- weights of samples --------------------------------------------------------------------------------------


def as_weights(name: str, value: ArrayLike | None, samples: int, dtype: np.dtype) -> Array | None:
    """Sample weights (samples,), scaled to a mean of 1, so that the loss is ``Σ_b w_b ℓ_b / B``; None stays None.

    Raises ``TypeError``/``ValueError`` for wrong shapes, negative weights and a sum of zero.
    """
    if value is None:
        return None
    weights = as_real(name, value, np.dtype(np.float64))
    if weights.shape != (samples,):
        raise ValueError(f"{name} has shape {weights.shape}; expected ({samples},), one weight per sample")
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() > 0):
        raise ValueError(f"{name} must be finite and not negative, with a sum above zero")
    weights = weights / weights.max()  # the sum of large ones would overflow
    return np.ascontiguousarray(weights / weights.mean(), dtype)


def _one_hot(name: str, labels: Array, samples: int, classes: int, dtype: np.dtype) -> Array:
    if labels.dtype.kind == "f":
        check_finite(name, labels[:, None])
        if (labels == np.round(labels)).all():
            raise TypeError(
                f"{name} has dtype {labels.dtype}; class labels must be whole numbers from 0: pass {name}.astype(int)"
            )
    if not (labels.dtype.kind in "biu" or all(isinstance(label, int | np.integer) for label in labels)):
        raise TypeError(
            f"{name} has dtype {labels.dtype}; class labels must be whole numbers from 0: "
            f"classes, labels = np.unique({name}, return_inverse=True) makes such labels, and classes[k] is the name of label k"
        )
    if len(labels) != samples:
        raise ValueError(f"{name} has {len(labels)} samples, {samples_of(name)} has {samples}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{name} has labels from {labels.min()} to {labels.max()}; with {classes} outputs they must lie from 0 to "
            f"{classes - 1}"
        )
    targets = np.zeros((samples, classes), dtype)
    targets[np.arange(samples), labels.astype(np.int64)] = 1
    return targets
