"""The call that trains: its arguments, checked."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, cast

from numpy.typing import ArrayLike

from implicit_rnn import options
from implicit_rnn.device_arrays import to_host
from implicit_rnn.engines.base import Samples
from implicit_rnn.errors import CheckpointError
from implicit_rnn.files import as_path
from implicit_rnn.model.guard import Guard
from implicit_rnn.model.losses import CustomLoss, Loss, LossLike, as_weights
from implicit_rnn.model.optimizers import Adam, OptimizerLike
from implicit_rnn.options import OnFailure, Option
from implicit_rnn.solvers import AdjointLike, Auto, Implicit, SolverLike
from implicit_rnn.training.checkpoints import Checkpoint, read
from implicit_rnn.training.history import Run
from implicit_rnn.training.loop import Training, Watch, refuse_nets_in_training
from implicit_rnn.training.schedules import ScheduleLike
from implicit_rnn.training.settings import Settings
from implicit_rnn.training.snapshot import Snapshot
from implicit_rnn.training.stopping import Callback, EarlyStopping
from implicit_rnn.validation import as_samples, warn_of_scale

if TYPE_CHECKING:
    from implicit_rnn.network import Network


def fit_many(
    nets: Sequence[Network],
    X: ArrayLike,
    Y: ArrayLike,
    *,
    optimizer: OptimizerLike = Adam(),
    epochs: int = 100,
    batch_size: int | None = None,
    loss: LossLike = "mse",
    sample_weights: ArrayLike | None = None,
    schedule: ScheduleLike = "constant",
    solver: SolverLike = Auto(),
    adjoint: AdjointLike = Implicit(),
    clip: float | None = None,
    jacobian_penalty: float = 0.0,
    warm_start: bool = False,
    validation: tuple[ArrayLike, ...] | None = None,
    validation_every: int = 1,
    restore_best: bool = False,
    early_stopping: EarlyStopping | None = None,
    guard: Guard = Guard(),
    callbacks: Sequence[Callback] | Callback = (),
    callback_every: int = 1,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | Run | Sequence[Run] | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
) -> list[Run]:
    """Train nets of one topology, each from its own parameters, on the same samples.

    Training many small nets in one call costs little more than the arithmetic.

    Parameters
    ----------
    nets
        Networks of equal topology, dtype, engine and device; their parameters are updated in place.
    X, Y
        Samples (B, inputs) and targets (B, outputs); for ``loss="cross_entropy"`` class labels (B,) as well.
    optimizer
        ``SGD``, ``Momentum``, ``Nesterov``, ``Adam``, ``AdamW``, ``RMSProp`` or ``LBFGS`` with their options.
    epochs, batch_size
        Passes over the data, and samples per step; ``None`` takes all samples at once.
    loss
        "mse", "mae", "huber", "cross_entropy", "binary_cross_entropy" or an object such as ``Huber(delta=0.5)``, or
        your own ``CustomLoss(function)``.
    sample_weights
        Weights w (B,) of the samples: the loss is ``Σ_b w_b ℓ_b / Σ_b w_b``. For a minibatch of m samples it is
        ``Σ_b w_b ℓ_b / m`` with the weights scaled to a mean of 1 over all samples.
    schedule
        How the learning rate changes: ``Constant()``, ``Cosine()``, ``Step()``, ``OneCycle()`` or ``WarmUp()``.
    solver, adjoint
        How equilibria are found and how gradients pass through them, see ``Network.loss_and_gradient``.
    clip
        Largest Euclidean norm of a gradient; longer ones are scaled down to it.
    jacobian_penalty
        Adds this multiple of mean_b ‖J_b‖_F² / N to the loss, see ``Network.loss_and_gradient``.
    warm_start
        Whether the solver starts each sample from its equilibrium in the previous epoch rather than from zero, which saves
        iterations but stores nets × B × neurons numbers. Equilibria and gradients are the same to the
        tolerance of the solver where a constraint makes them unique; under ``Free`` they may differ. A sample that does
        not converge starts from zero in the next epoch, as do all when a run is resumed. Not for ``Unrolled`` and ``LBFGS``.
    validation, validation_every
        Samples (V, inputs), targets (V, outputs) and optionally their weights (V,), on which the loss is evaluated every
        ``validation_every`` epochs.
    restore_best
        Leave the nets with the parameters of their lowest validation loss rather than the last.
    early_stopping
        An ``EarlyStopping``: ends the training of a net whose validation loss no longer improves.
    guard
        Halts the training of a net that goes wrong; the net gets its last good parameters.
    callbacks, callback_every
        Functions that are called with a ``Progress`` for each net in training every ``callback_every`` epochs, after the
        validation of that epoch. One that returns True, rather than False or None, ends the training of the net; one
        that raises ``StopTraining`` ends the training of all nets.
    checkpoint
        A ``Checkpoint`` or its path: writes the state of the run to a file, at the start, at intervals, at the end, and
        before Ctrl-C or another exception leaves the call.
    resume
        The path of such a file, or the result of an earlier call (a ``Run``, or a list of them for several nets): the run
        continues from there and ends, bit by bit, as if it had never stopped (with ``warm_start`` to the tolerance). Data,
        nets, engine and all settings that affect the result must be those of the earlier call; ``epochs``, which counts from
        the start of the run, may change where the schedule does not depend on it (``Constant``, ``Step``, and ``WarmUp`` to
        one of these). The current parameters of the nets are ignored, except to detect nets in another order than their
        runs. A run that a callback ended continues; of several nets, those that were trained to its end.
    seed
        The seed of the order of the minibatches, which is the same on every engine; None draws one at random.
    progress
        A progress bar on stderr; ``None`` shows it on a terminal and in a notebook.
    on_failure
        What happens when samples do not reach their equilibrium or the guard halts a net: "raise", "warn" (once for
        each) or "ignore".

    Returns
    -------
    One ``Run`` per net.

    Raises
    ------
    ValueError, TypeError
        For bad data or options.
    CheckpointError
        If ``resume`` names a file that is not a checkpoint or is damaged, belongs to another run (the message says what
        differs) or to these nets in another order, or is a ``Run`` that already has all its epochs.
    OSError
        If a checkpoint cannot be written; the previous one and the parameters are kept.
    RuntimeError
        For a net that another call is training.
    ConvergenceError
        With ``on_failure="raise"``.
    KeyboardInterrupt
        At Ctrl-C, at once, after the ``checkpoint`` has been written, for the last epoch at whose end Python had control. A
        single net then has the parameters of its last step, several nets those of an earlier epoch.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> nets = [irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=seed) for seed in range(3)]
    >>> runs = irnn.fit_many(nets, X, X**2, optimizer=irnn.Adam(0.05), epochs=50, batch_size=5, progress=False)
    >>> [bool(run.loss[-1] < run.loss[0]) for run in runs]
    [True, True, True]
    """
    _check_nets(nets)
    first = nets[0]
    chosen = options.choose(Loss, loss, "loss")
    samples = first.samples(X, Y, chosen, sample_weights)
    warn_of_scale("X", samples.X)
    if not (chosen.bounded or isinstance(chosen, CustomLoss)):
        warn_of_scale("Y", samples.Y)
    held_out = None if validation is None else _held_out(first, chosen, validation)
    settings = Settings.checked(
        len(samples),
        chosen,
        optimizer=optimizer,
        schedule=schedule,
        epochs=epochs,
        batch_size=len(samples) if batch_size is None else batch_size,
        solver=solver,
        adjoint=adjoint,
        clip=clip,
        jacobian_penalty=jacobian_penalty,
        seed=seed,
        validation_every=validation_every,
        early_stopping=early_stopping,
        restore_best=restore_best,
        guard=guard,
        warm_start=warm_start,
    )
    if held_out is None and (settings.restore_best or settings.early_stopping is not None):
        needs = "restore_best" if settings.restore_best else "early_stopping"
        raise ValueError(f"{needs} needs validation=(X, Y), whose loss says which parameters are best")
    watch = Watch(
        callbacks=_callbacks(callbacks),
        callback_every=options.check_count("callback_every", callback_every),
        checkpoint=_checkpoint(checkpoint),
        progress=None if progress is None else options.check_flag("progress", progress),
        on_failure=options.check_on_failure(on_failure),
    )
    training = Training(nets, samples, held_out, settings)
    if resume is not None:
        _resume(training, resume)
    return training.run(watch)


def _check_nets(nets: Sequence[Network]) -> None:
    from implicit_rnn.network import Network

    if not isinstance(nets, Sequence) or not all(isinstance(net, Network) for net in nets):
        raise TypeError(f"nets must be a list of Network, got {nets!r}; one net is trained by net.fit(X, Y)")
    if not nets:
        raise ValueError("nets is empty")
    if len(set(map(id, nets))) < len(nets):
        raise ValueError("nets has the same Network twice; expected one for each training, such as copy.deepcopy(net)")
    for k, net in enumerate(nets):
        for name in ("topology", "dtype", "engine", "device"):
            if getattr(net, name) != getattr(nets[0], name):
                one, other = (each if name == "topology" else getattr(each, name) for each in (nets[0], net))
                raise ValueError(
                    "all nets of one call must have the same topology, dtype, engine and device, but the "
                    f"{name} of nets[0] and nets[{k}] differ: {one} and {other}"
                )
    refuse_nets_in_training(nets)  # here already, since resuming writes to them before they are trained
    if not all(net.parameters.flags.writeable for net in nets):
        raise ValueError(
            "the parameters of a net cannot be written to; set net.parameters.flags.writeable = True to train it"
        )


def _held_out(net: Network, loss: Loss, validation: tuple[ArrayLike, ...]) -> Samples:
    """The samples of ``validation``, in host memory, where their loss is evaluated."""
    if not isinstance(validation, tuple | list) or len(validation) not in (2, 3):
        came = (
            f"{len(validation)} of them" if isinstance(validation, tuple | list) else f"a {type(validation).__name__}"
        )
        raise TypeError(f"validation must be a tuple of samples, targets and optionally their weights, got {came}")
    arrays = [to_host(f"validation[{k}]", array, net.dtype, net.device) for k, array in enumerate(validation)]
    X, Y, weights = (*arrays, None)[:3]
    x = as_samples("validation[0]", X, net.topology.inputs, net.dtype, "features", net.topology.neurons)
    y = loss.targets("validation[1]", Y, len(x), net.topology.output_size, net.dtype)
    return Samples(x, y, as_weights("validation[2]", weights, len(x), net.dtype))


def _callbacks(callbacks: Sequence[Callback] | Callback) -> tuple[Callback, ...]:
    listed = callbacks if isinstance(callbacks, list | tuple) else (callbacks,)
    for callback in listed:
        if not callable(callback):
            raise TypeError(f"callbacks must be functions that are called with a Progress, got {callback!r}")
    return tuple(listed)


def _checkpoint(checkpoint: Checkpoint | str | os.PathLike[str] | None) -> Checkpoint | None:
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    if isinstance(checkpoint, str | os.PathLike):
        return Checkpoint(as_path(checkpoint, "checkpoint"))
    raise TypeError(f"checkpoint must be a path or a Checkpoint, got {checkpoint!r}")


def _resume(training: Training, resume: str | os.PathLike[str] | Run | Sequence[Run]) -> None:
    epochs = training.settings.epochs
    if isinstance(resume, str | os.PathLike):
        path = as_path(resume, "resume")
        read(path).restore(training, str(path), epochs)
        return
    runs = [resume] if isinstance(resume, Run) else resume
    if not isinstance(runs, list | tuple) or not runs or not all(isinstance(run, Run) for run in runs):
        raise TypeError(f"resume must be the path of a checkpoint, a Run, or the Runs of several nets, got {resume!r}")
    if len(set(map(id, runs))) < len(runs):
        raise CheckpointError("resume has the same Run twice; expected the list that one call of fit_many returned")
    parts = [run.snapshot for run in runs if run.snapshot is not None]
    if len(parts) < len(runs):
        raise CheckpointError("resume has no state to continue from; expected a Run that fit has returned")
    whole = Snapshot.join(parts)
    # A script that is run again may find its checkpoint finished; a call that resumes from a Run is meant to train.
    whole.restore(training, "resume", epochs - 1 if whole.going_on.any() else epochs)


P = ParamSpec("P")
Many = Callable[Concatenate[Sequence["Network"], ArrayLike, ArrayLike, P], list[Run]]
One = Callable[Concatenate["Network", ArrayLike, ArrayLike, P], Run]


def with_settings_of(many: Many[P]) -> Callable[[Callable[..., Run]], One[P]]:
    """A decorator that gives the method that trains one net the settings of the function that trains many.

    Type checkers, editors and ``inspect.signature`` see them, and a misspelt one is refused with a suggestion.
    """
    settings = list(inspect.signature(many).parameters.values())[1:]

    def decorate(one: Callable[..., Run]) -> One[P]:
        names = [setting.name for setting in settings[2:]]
        homes = {s.name: s.default for s in settings if isinstance(s.default, Option)}
        homes["early_stopping"] = EarlyStopping()

        @wraps(one)
        def fit(net: Network, *data: Any, **given: Any) -> Run:
            for name in sorted(given.keys() - names):
                option = "learning_rate" if name == "lr" else name
                if place := next((place for place, home in homes.items() if option in home.options()), None):
                    raise TypeError(
                        f"{one.__name__} has no setting {name}, which is an option of {place}: pass "
                        f"{place}={homes[place].name}({option}=...)"
                    )
            options.check_names(one.__name__, "setting", given.keys() - {"X", "Y"}, names)
            return one(net, *data, **given)

        signature = inspect.signature(one)
        described = signature.replace(parameters=[signature.parameters["self"], *settings])
        fit.__signature__ = described  # type: ignore[attr-defined]
        return cast("One[P]", fit)

    return decorate
