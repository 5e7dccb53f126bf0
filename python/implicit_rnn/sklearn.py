"""Estimators for scikit-learn: ``ImplicitRNNRegressor`` and ``ImplicitRNNClassifier``.

A ``Network`` with the interface that scikit-learn's pipelines, searches and cross-validations expect: data are checked and
scaled, labels encoded, and options are parameters. Needs ``pip install 'implicit-rnn[sklearn]'``.
"""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from numbers import Integral
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, log_expit, log_softmax, softmax

from implicit_rnn import options
from implicit_rnn.engines.base import Samples
from implicit_rnn.errors import without_underflow
from implicit_rnn.model.constraints import ConstraintLike
from implicit_rnn.model.losses import BinaryCrossEntropy, CrossEntropy, Loss, LossLike, as_weights
from implicit_rnn.model.optimizers import LBFGS, Adam, Optimizer, OptimizerLike
from implicit_rnn.model.topology import Layer
from implicit_rnn.network import Network
from implicit_rnn.solvers import Adjoint, AdjointLike, Solver, SolverLike
from implicit_rnn.training.history import Run
from implicit_rnn.training.loop import Training, Watch, refuse_nets_in_training
from implicit_rnn.training.schedules import Constant, Schedule, ScheduleLike
from implicit_rnn.training.settings import Settings
from implicit_rnn.training.stopping import EarlyStopping
from implicit_rnn.validation import as_samples, refuse_masked_or_sparse, warn_of_scale

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import LabelEncoder, StandardScaler
    from sklearn.utils import Tags, check_random_state, compute_class_weight
    from sklearn.utils.multiclass import _check_partial_fit_first_call, check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"implicit_rnn.sklearn needs scikit-learn 1.6 or newer ({error}): pip install 'implicit-rnn[sklearn]'"
    ) from error

__all__ = ["ImplicitRNNClassifier", "ImplicitRNNRegressor"]

Array = np.ndarray
Self = TypeVar("Self", bound="_ImplicitRNN")
Pairs = Iterable[tuple[int, int]]

AUTO_OPTIMIZER = Adam(3e-3, weight_decay=3e-3)
"""The optimiser that "auto" stands for."""
BATCH_SIZE = 200
"""The batch size that "auto" stands for with more samples than this."""
ROUNDING = 16 * float(np.finfo(np.float64).eps)
"""The standard deviation of a column, relative to its mean, up to which it is round-off and the column constant."""
FLOATS = [np.float64, np.float32]


@dataclass(eq=False, repr=False)
class _ImplicitRNN(BaseEstimator, metaclass=ABCMeta):
    """The base of both estimators: parameters, checks and scaling of data, the network and its training."""

    layers: Sequence[int | Layer] = (32,)
    _: KW_ONLY
    activation: str = "tanh"
    feedback: bool | Pairs = False
    skips: Pairs = ()
    input_skips: Iterable[int] = ()
    constraint: ConstraintLike = "perron"
    optimizer: OptimizerLike | Literal["auto"] = "auto"
    learning_rate: float | None = None
    weight_decay: float | None = None
    schedule: ScheduleLike = "constant"
    epochs: int = 200
    batch_size: int | Literal["auto"] = "auto"
    clip: float | None = None
    jacobian_penalty: float = 0.0
    solver: SolverLike = "auto"
    adjoint: AdjointLike = "implicit"
    scale: bool = True
    early_stopping: bool | EarlyStopping = False
    validation_fraction: float = 0.1
    warm_start: bool = False
    random_state: int | np.random.RandomState | None = None
    dtype: str = "float64"
    engine: str | None = None
    verbose: bool = False

    # --- what each knows of its targets ------------------------------------------------------------------

    @abstractmethod
    def _fit_targets(self, y: Array, weights: Array | None) -> None:
        """Learn from the first targets, or from all possible labels, what later targets must agree with."""

    @abstractmethod
    def _encode(self, y: Array) -> Array:
        """The targets in the form that the loss takes; ``ValueError`` if they do not agree with the first ones."""

    @property
    @abstractmethod
    def _outputs(self) -> int:
        """The number of outputs of the network."""

    @property
    @abstractmethod
    def _chosen_loss(self) -> Loss:
        """The loss to be minimised."""

    def _weights_of(self, y: Array, weights: Array | None, known: Array | None) -> Array | None:
        """The weights of samples with these targets, from the caller's weights; ``ValueError`` for invalid targets."""
        return weights

    # --- training ----------------------------------------------------------------------------------------

    def _fit(self: Self, *data: Any, **how: Any) -> Self:
        """``_fit_network``, all or nothing: an error or Ctrl-C leaves no untrained network behind."""
        with self._undone_if_it_fails():
            return self._fit_network(*data, **how)

    @contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        before, fitted = dict(self.__dict__), hasattr(self, "network_")
        if fitted:  # because training changes it in place
            refuse_nets_in_training([self.network_])
            parameters, random = self.network_.parameters.copy(), self._random.get_state()
        try:
            yield
        except BaseException:  # including Ctrl-C
            self.__dict__.clear()
            self.__dict__.update(before)
            if fitted:
                self.network_.parameters = parameters
                self._random.set_state(random)
            raise

    @without_underflow()
    def _fit_network(
        self: Self, X: Any, y: Any, sample_weight: Any, partial: bool, known: Any = None, **checks: Any
    ) -> Self:
        """One more epoch if ``partial``, else a whole training, which continues the last one with ``warm_start``.

        ``known`` are all possible labels, where not all of them may be present.
        """
        self._check_parameters()
        for name, array in (("X", X), ("y", y)):
            refuse_masked_or_sparse(name, array)
        first = not hasattr(self, "network_") or not (partial or self.warm_start)
        X, y = validate_data(self, X, y, reset=first, dtype=FLOATS, order="C", **checks)
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
            weights = np.ldexp(
                weights, -np.frexp(weights.max())[1]
            )  # so that their sums neither overflow nor underflow
            counted = weights > 0  # a sample of weight zero must not affect scaling, batches and validation either
            if not counted.any():
                raise ValueError("sample_weight is zero for all samples; expected a weight above zero")
            X, y, weights = X[counted], y[counted], weights[counted]
        if first:
            self._random = check_random_state(self.random_state)
        stopping = self._check_partial() if partial else self._early_stopping()
        weights = self._weights_of(y, weights, known)
        held_out = None
        if stopping is not None:
            (X, y, weights), held_out = self._split(X, y, weights)
        if first:
            self._input_scaler = self._scaler_of("X", X, weights)
            self._fit_targets(y if known is None else known, weights)
        self._take_network(X.shape[1], first)
        samples = self._samples(X, y, weights)
        warn_of_scale("X", samples.X)
        validation = None if held_out is None else self._samples(*held_out)
        run = self._train(samples, validation, 1 if partial else self.epochs, stopping)
        self.loss_curve_: list[float] = [*self.loss_curve_, *run.loss.tolist()]
        if stopping is not None:
            self.validation_loss_curve_: list[float] = [*self.validation_loss_curve_, *run.validation_loss.tolist()]
        self.n_iter_ = len(self.loss_curve_)
        return self

    def _train(
        self, samples: Samples, validation: Samples | None, epochs: int, early_stopping: EarlyStopping | None
    ) -> Run:
        """Train the network, from the last state of the optimiser if it is of the same kind."""
        largest = len(samples) if self._minimises_all_at_once() else min(BATCH_SIZE, len(samples))
        settings = Settings.checked(
            len(samples),
            self._chosen_loss,
            optimizer=self._chosen_optimizer(),
            schedule=self.schedule,
            epochs=epochs,
            batch_size=largest if self.batch_size == "auto" else self.batch_size,
            solver=self.solver,
            adjoint=self.adjoint,
            clip=self.clip,
            jacobian_penalty=self.jacobian_penalty,
            seed=self._draw_seed(),
            early_stopping=early_stopping,
        )
        training = Training([self.network_], samples, validation, settings)
        if self._optimizer_state is not None:
            kind, state = self._optimizer_state
            if kind == settings.optimizer.name and state.shape == training.trainer.state().shape:
                training.trainer.restore(state)
        (run,) = training.run(Watch((), 1, None, bool(self.verbose), "warn"))
        self._optimizer_state: tuple[str, Array] | None = settings.optimizer.name, training.trainer.state()
        return run

    def _take_network(self, features: int, first: bool) -> None:
        """Make the network, or check that the existing one agrees with the parameters."""
        net = Network(
            features,
            self._chosen_layers(),
            outputs=self._outputs,
            feedback=self.feedback,
            skips=self.skips,
            input_skips=self.input_skips,
            constraint=self.constraint,
            dtype=self.dtype,
            seed=self._draw_seed() if first else 0,
            engine=self.engine,
        )
        if first:
            self.network_ = net
            self.loss_curve_, self.validation_loss_curve_ = [], []
            self._optimizer_state = None
        elif (net.topology, net.dtype) != (self.network_.topology, self.network_.dtype):
            raise ValueError(
                f"the parameters describe {net}, but what was fitted is {self.network_}, from which warm_start and "
                "partial_fit cannot go on; fit with warm_start=False, or set the parameters back"
            )

    def _samples(self, X: Array, y: Array, weights: Array | None) -> Samples:
        net = self.network_
        return Samples(
            self._inputs(X),
            self._chosen_loss.targets("y", self._encode(y), len(X), net.topology.output_size, net.dtype),
            as_weights("sample_weight", weights, len(X), net.dtype),
        )

    def _inputs(self, X: Array) -> Array:
        topology = self.network_.topology
        scaled = self._input_scaler.transform(X)
        return as_samples("X", scaled, topology.inputs, self.network_.dtype, "features", topology.neurons)

    def _split(self, X: Array, y: Array, weights: Array | None) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """The samples for training, and those for validation."""
        arrays = [X, y] if weights is None else [X, y, weights]
        try:
            parts = train_test_split(
                *arrays,
                test_size=self.validation_fraction,
                random_state=self._draw_seed(),
                stratify=y if isinstance(self, ClassifierMixin) else None,
            )
        except ValueError as error:
            raise ValueError(
                f"early_stopping cannot hold out validation_fraction={self.validation_fraction} of {len(X)} samples: {error}; "
                "set another fraction, or early_stopping=False"
            ) from error
        learnt, watched = parts[::2], parts[1::2]
        return (*learnt, None)[:3], (*watched, None)[:3]

    # --- parameters --------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        """Check the parameters that nothing else checks, or only under another name."""
        for name in ("scale", "warm_start"):
            options.check_flag(name, getattr(self, name))
        if not isinstance(self.verbose, bool | np.bool_ | Integral):
            raise TypeError(f"verbose must be True, False or a whole number, got {self.verbose!r}")
        options.check_fraction("validation_fraction", self.validation_fraction)
        if self.clip is not None:
            options.check_positive("clip", self.clip)

    def _scaler_of(self, name: str, array: Array, weights: Array | None) -> StandardScaler:
        """The scaler with the mean and standard deviation of the columns of an array."""
        scaler = StandardScaler(with_mean=self.scale, with_std=self.scale)
        with np.errstate(over="ignore", invalid="ignore"):
            # Computed from differences from the first sample, since sums of a large common part would lose digits.
            scaler.fit(np.nan_to_num(array - array[0]), sample_weight=weights)
        if self.scale:
            scaler.mean_ += array[0]
            scaler.scale_[np.sqrt(scaler.var_) <= ROUNDING * np.abs(scaler.mean_)] = 1
            known = np.isfinite(scaler.var_) & ((scaler.var_ > 0) | (np.ptp(array, axis=0) == 0))
            if not known.all():
                k = int(known.argmin())
                raise ValueError(
                    f"column {k} of {name}, with entries up to {np.abs(array[:, k]).max():.3g}, has a variance that "
                    "overflows or underflows and cannot be scaled; give it, or its sample_weight, in other units"
                )
        return scaler

    def _draw_seed(self) -> int:
        return int(self._random.randint(np.iinfo(np.int32).max))

    def _chosen_layers(self) -> list[int | Layer]:
        if not isinstance(self.layers, Iterable):
            raise TypeError(f"layers must be a sequence of sizes or Layer objects such as (32,), got {self.layers!r}")
        return [  # of which Network refuses those that are none
            Layer(int(layer), self.activation) if options.is_whole(layer) and layer > 0 else layer
            for layer in self.layers
        ]

    def _chosen_optimizer(self) -> Optimizer:
        """The optimiser, with the estimator's ``learning_rate`` and ``weight_decay`` if given."""
        auto = isinstance(self.optimizer, str) and self.optimizer == "auto"
        optimizer = AUTO_OPTIMIZER if auto else options.choose(Optimizer, self.optimizer, "optimizer")
        given = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        changes = {name: value for name, value in given.items() if value is not None}
        options.check_names(optimizer.name, "option", changes, optimizer.options())
        return replace(optimizer, **changes)

    def _early_stopping(self) -> EarlyStopping | None:
        if isinstance(self.early_stopping, EarlyStopping):
            return self.early_stopping
        if not isinstance(self.early_stopping, bool | np.bool_):
            raise TypeError(f"early_stopping must be True, False or an EarlyStopping, got {self.early_stopping!r}")
        return EarlyStopping() if self.early_stopping else None

    def _check_partial(self) -> None:
        """Refuse options that need a fixed end of training or all data at once."""
        if self.early_stopping:
            raise ValueError("partial_fit cannot stop early: it sees no validation samples; set early_stopping=False")
        if self._minimises_all_at_once():
            raise ValueError("partial_fit needs an optimizer for minibatches such as Adam; LBFGS needs all samples")
        if options.choose(Schedule, self.schedule, "schedule") != Constant():
            raise ValueError(
                f"partial_fit has no end by which schedule={self.schedule!r} could go; set schedule='constant'"
            )

    def _minimises_all_at_once(self) -> bool:
        return isinstance(self._chosen_optimizer(), LBFGS)

    # --- prediction --------------------------------------------------------------------------------------

    @without_underflow()
    def _predict_outputs(self, X: Any) -> Array:
        """The outputs (B, outputs) of the network."""
        check_is_fitted(self, "network_")
        refuse_masked_or_sparse("X", X)
        inputs = self._inputs(validate_data(self, X, reset=False, dtype=FLOATS, order="C"))
        adjoint = options.choose(Adjoint, self.adjoint, "adjoint")
        return self.network_.predict(
            inputs,
            solver=adjoint.reader(options.choose(Solver, self.solver, "solver")),
            on_failure="raise" if adjoint.needs_equilibrium else "ignore",
        )


@dataclass(eq=False, repr=False, kw_only=True)
class ImplicitRNNRegressor(RegressorMixin, _ImplicitRNN):
    """Regression of one or many targets by the equilibrium of an implicit recurrent network.

    Parameters
    ----------
    layers
        The sizes of the layers, or ``Layer`` objects.
    activation
        The activation of layers given by their size: tanh, sigmoid, softplus, relu, elu, gelu, silu or identity.
    feedback, skips, input_skips, constraint
        Connections between layers, and the constraint on the recurrent weights, as in ``Network``.
    loss
        "mse", "mae", "huber" or an object such as ``Huber(delta=0.5)``, in the units of the scaled targets; classification
        losses are refused.
    optimizer
        An object such as ``Adam(beta1=0.8)``, or a name as in ``Network.fit``; "auto" is ``Adam(0.003, weight_decay=0.003)``.
    learning_rate, weight_decay
        If given, they replace the optimiser's own. Weight decay λ is a penalty ``λ ‖p‖² / 2`` on all parameters.
    schedule
        How the learning rate changes in the course of ``fit``: "constant", "cosine", "one_cycle", ...
    epochs
        Passes over the data in a call of ``fit``.
    batch_size
        Samples per step. "auto" takes all samples, at most 200; with LBFGS always all.
    clip, jacobian_penalty, solver, adjoint
        As in ``Network.fit``.
    scale
        Whether to scale every feature and every target to (weighted) mean 0 and standard deviation 1, and predictions back.
    early_stopping
        ``True``, or an ``EarlyStopping``: ends the training when the loss on held-out samples no longer improves.
    validation_fraction
        The share of held-out samples, the same in every class.
    warm_start
        Whether another ``fit`` continues with the current parameters, scaling and state of the optimiser.
    random_state
        The seed of the initial parameters, the order of the samples, and the choice of held-out samples.
    dtype
        "float64" or "float32".
    engine
        "julia", "numpy", or ``None`` for what is available, as in ``Network``.
    verbose
        Whether to show a progress bar on stderr.

    Attributes
    ----------
    network_
        The ``Network``, from scaled features to scaled targets.
    n_iter_
        Number of epochs since training last started afresh.
    loss_curve_
        The mean training loss of each of these epochs.
    validation_loss_curve_
        The loss on the held-out samples after each epoch, with ``early_stopping``; otherwise empty.
    n_features_in_
        The number of features.
    feature_names_in_
        Their names, if X had names that are strings.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> ImplicitRNNRegressor(random_state=0).fit(X, y).predict(X[:2]).shape
    (2,)
    """

    loss: LossLike = "mse"

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> ImplicitRNNRegressor:
        """Train; with integer weights, one batch and no Jacobian penalty the result is that of samples repeated so often.

        Parameters
        ----------
        X
            (B, features) the samples.
        y
            (B,) or (B, targets) their targets.
        sample_weight
            (B,) weights of the samples, none below zero; ``None`` for all equal.

        Raises
        ------
        ValueError, TypeError
            For data or parameters out of range or of the wrong kind.
        """
        return self._fit(X, y, sample_weight, partial=False, multi_output=True, y_numeric=True)

    def partial_fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> ImplicitRNNRegressor:
        """Train for one epoch on these samples, from where the last call of ``fit`` or ``partial_fit`` ended.

        The samples of the first call decide the scale.

        Parameters
        ----------
        X, y, sample_weight
            As in ``fit``, as are the errors.
        """
        return self._fit(X, y, sample_weight, partial=True, multi_output=True, y_numeric=True)

    def predict(self, X: ArrayLike) -> Array:
        """The targets (B,) or (B, targets), in the shape of the training targets.

        Parameters
        ----------
        X
            (B, features) the samples.

        Raises
        ------
        ConvergenceError
            Where a sample has no equilibrium.
        """
        outputs = self._predict_outputs(X).astype(np.float64)  # the units of the targets may need this range
        return np.asarray(self._target_scaler.inverse_transform(outputs).reshape((-1, *self._target_shape)))

    def _fit_targets(self, y: Array, weights: Array | None) -> None:
        if y.dtype.kind in "mM":
            raise TypeError(f"y has dtype {y.dtype}; expected numbers: divide it by a unit, y / np.timedelta64(1, 's')")
        self._target_shape = y.shape[1:]
        self._target_scaler = self._scaler_of("y", self._columns(y), weights)

    def _encode(self, y: Array) -> Array:
        if y.shape[1:] != self._target_shape:
            shape = f"(samples, {self._target_shape[0]})" if self._target_shape else "(samples,)"
            raise ValueError(f"y has shape {y.shape}; expected {shape}, as it was at first")
        return np.asarray(self._target_scaler.transform(self._columns(y)))

    @staticmethod
    def _columns(y: Array) -> Array:
        """Targets of any kind of numbers, also booleans and digits, as (B, targets)."""
        return y.reshape(len(y), -1).astype(np.float64)

    @property
    def _outputs(self) -> int:
        return int(self._target_scaler.n_features_in_)

    @property
    def _chosen_loss(self) -> Loss:
        loss = options.choose(Loss, self.loss, "loss")
        if loss.bounded:
            raise ValueError(
                f"loss={self.loss!r} is one of classification, whose outputs are logits; expected one of numbers such as 'mse', "
                "'mae' or 'huber', or use ImplicitRNNClassifier"
            )
        return loss

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


@dataclass(eq=False, repr=False, kw_only=True)
class ImplicitRNNClassifier(ClassifierMixin, _ImplicitRNN):
    """Classification into two or more classes by the equilibrium of an implicit recurrent network.

    The loss is the cross-entropy.

    Parameters
    ----------
    class_weight
        Weights of the classes, which multiply those of their samples; "balanced" for the inverse of the weighted class
        frequencies, ``None`` for all equal.
    layers, activation, ...
        All others are those of ``ImplicitRNNRegressor``.

    Attributes
    ----------
    classes_
        The labels, sorted.
    network_, n_iter_, loss_curve_, validation_loss_curve_, n_features_in_, feature_names_in_
        Those of ``ImplicitRNNRegressor``; the outputs of the network are logits.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> ImplicitRNNClassifier(random_state=0).fit(X, y).predict_proba(X[:2]).shape
    (2, 3)
    """

    class_weight: Mapping[Any, float] | str | None = None

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> ImplicitRNNClassifier:
        """Train; with integer weights, one batch and no Jacobian penalty the result is that of samples repeated so often.

        Parameters
        ----------
        X
            (B, features) the samples.
        y
            (B,) their labels, of any kind.
        sample_weight
            (B,) weights of the samples, none below zero; ``None`` for all equal.

        Raises
        ------
        ValueError, TypeError
            For data or parameters out of range or of the wrong kind.
        """
        return self._fit(X, y, sample_weight, partial=False)

    def partial_fit(
        self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> ImplicitRNNClassifier:
        """Train for one epoch on these samples, from where the last call of ``fit`` or ``partial_fit`` ended.

        The samples of the first call decide the scale.

        Parameters
        ----------
        X, y, sample_weight
            As in ``fit``, as are the errors.
        classes
            All possible labels; required in the first call.
        """
        with self._undone_if_it_fails():
            _check_partial_fit_first_call(self, classes)
            if len(self.classes_) < 2:
                raise ValueError(
                    f"classes has 1 class, {self.classes_.tolist()[0]!r}; expected all there can be, 2 or more"
                )
            return self._fit_network(X, y, sample_weight, partial=True, known=self.classes_)

    def predict(self, X: ArrayLike) -> Array:
        """The most probable class (B,) of each sample; errors as in ``decision_function``.

        Parameters
        ----------
        X
            (B, features) the samples.
        """
        decision = self.decision_function(X)
        chosen = decision > 0 if decision.ndim == 1 else decision.argmax(axis=1)
        return np.asarray(self.classes_[chosen.astype(np.intp)])

    def decision_function(self, X: ArrayLike) -> Array:
        """The logits (B, classes); for two classes only that of the second (B,).

        Parameters
        ----------
        X
            (B, features) the samples.

        Raises
        ------
        ConvergenceError
            Where a sample has no equilibrium.
        """
        outputs = self._predict_outputs(X)
        return outputs[:, 0] if len(self.classes_) == 2 else outputs

    @without_underflow()
    def predict_proba(self, X: ArrayLike) -> Array:
        """The probabilities (B, classes), in the order of ``classes_``; errors as in ``decision_function``.

        Parameters
        ----------
        X
            (B, features) the samples.
        """
        decision = self.decision_function(X)
        if decision.ndim == 1:
            return np.stack([expit(-decision), expit(decision)], axis=1)
        return np.asarray(softmax(decision, axis=1))

    @without_underflow()
    def predict_log_proba(self, X: ArrayLike) -> Array:
        """The logarithms of the probabilities (B, classes), which are finite; errors as in ``decision_function``.

        Parameters
        ----------
        X
            (B, features) the samples.
        """
        decision = self.decision_function(X)
        if decision.ndim == 1:
            return np.stack([log_expit(-decision), log_expit(decision)], axis=1)
        return np.asarray(log_softmax(decision, axis=1))

    def _fit_targets(self, y: Array, weights: Array | None) -> None:
        self._label_encoder = LabelEncoder().fit(y)
        self.classes_ = self._label_encoder.classes_
        if len(self.classes_) < 2:
            where = "" if weights is None else ", where weights are above zero"
            raise ValueError(f"y has 1 class, {self.classes_.tolist()[0]!r}{where}; expected 2 or more classes")

    def _encode(self, y: Array) -> Array:
        if len(
            unseen := np.setdiff1d(y, self.classes_)
        ):  # the encoder would truncate them to the dtype of the known labels
            raise ValueError(
                f"y contains previously unseen labels: {unseen.tolist()}; expected some of {self.classes_.tolist()}"
            )
        labels = self._label_encoder.transform(y)
        return labels[:, None].astype(np.float64) if len(self.classes_) == 2 else labels

    def _weights_of(self, y: Array, weights: Array | None, known: Array | None) -> Array | None:
        check_classification_targets(y)
        if y.dtype == np.float64 and np.abs(y).max() >= 2**53:  # labels that are integers, as from a nullable column
            raise ValueError(
                f"y has labels up to {np.abs(y).max():.20g} in floating point, where whole numbers from 2**53 on are one; pass "
                "y.astype('int64')"
            )
        if self.class_weight is None:
            return weights
        encoder = LabelEncoder().fit(y if known is None else known)
        labels = encoder.transform(y)
        if not isinstance(self.class_weight, Mapping) and not self._balances:
            raise ValueError(
                f"class_weight is {self.class_weight!r}; expected a dict of the weights of classes, 'balanced' or None"
            )
        if self._balances:
            totals = np.bincount(labels, weights)
            of_class = totals.sum() / (len(totals) * np.where(totals > 0, totals, np.inf))
        else:
            of_class = compute_class_weight(self.class_weight, classes=encoder.classes_, y=y)
        if not (valid := np.isfinite(of_class) & (of_class >= 0)).all():
            bad = valid.argmin()
            raise ValueError(
                f"class_weight gives class {encoder.classes_.tolist()[bad]!r} the weight {of_class[bad]}; expected finite "
                "numbers, none below zero"
            )
        return np.asarray(of_class[labels] if weights is None else of_class[labels] * weights)

    @property
    def _balances(self) -> bool:
        # An array would be compared with the string entry by entry.
        return isinstance(self.class_weight, str) and self.class_weight == "balanced"

    def _check_partial(self) -> None:
        super()._check_partial()
        if self._balances:
            raise ValueError(
                "partial_fit cannot balance classes of which it sees a part; pass class_weight as a dict of their weights"
            )

    @property
    def _outputs(self) -> int:
        return 1 if len(self.classes_) == 2 else len(self.classes_)

    @property
    def _chosen_loss(self) -> Loss:
        return BinaryCrossEntropy() if len(self.classes_) == 2 else CrossEntropy()
