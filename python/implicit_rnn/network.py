"""Network: an implicit recurrent network with its parameters, solved and differentiated by an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from implicit_rnn import device_arrays, options, serialization, training
from implicit_rnn.console import html_table
from implicit_rnn.device_arrays import DeviceArray
from implicit_rnn.engines import check_device, check_engine, get_engine
from implicit_rnn.engines.base import CompiledNetwork, Engine, Of, Problem, Program, Quality, Samples
from implicit_rnn.errors import report_failure
from implicit_rnn.model.constraints import Constraint, ConstraintLike, Perron
from implicit_rnn.model.losses import CustomLoss, Loss, LossLike, as_weights
from implicit_rnn.model.topology import INPUT, Layer, Topology
from implicit_rnn.options import OnFailure
from implicit_rnn.solution import MAX_ITERATIONS, NON_FINITE, GradientReport, Solution, check_report, remedy
from implicit_rnn.solvers import Adjoint, AdjointLike, Auto, Implicit, Solver, SolverLike, check_penalty
from implicit_rnn.training.loop import Training
from implicit_rnn.validation import (
    all_finite,
    as_generator,
    as_real,
    as_samples,
    check_memory_of_parameters,
    check_samples,
)

Array = np.ndarray

_PROGRAMS = 16
"""Number of combinations of options whose programs are kept; a new one replaces the oldest."""


class Network:
    """An implicit recurrent network for stationary inputs.

    The state z stacks all N neurons of all layers and is the equilibrium of ``z = f(W x + R z + b)``; the output is a
    linear readout ``y = C z_last + d`` of the last layer, or the values of chosen neurons. Layers count from 0; layer l
    feeds layer l + 1.

    Parameters
    ----------
    inputs
        Number of features of a sample.
    layers
        ``Layer`` objects; a number stands for ``Layer(number)``.
    feedback
        ``True`` for connections from every later to every earlier layer, or pairs (later, earlier).
    skips
        Pairs (earlier, later) of feed-forward connections that skip a layer.
    input_skips
        Layers other than the first that also receive the input.
    outputs
        A number of outputs for the linear readout, or a list of neurons of the state that are the output.
    constraint
        The constraint on the recurrent weights: ``Perron(kappa)`` (one equilibrium, always reached), ``InfNorm``,
        ``Spectral``, ``Monotone`` or ``Free()`` (none).
    dtype
        "float64" or "float32".
    seed
        Of the initial parameters: W ~ N(0, 1/inputs), feed-forward weights N(0, 1/n), recurrent weights N(0, 0.09/n),
        C ~ N(0, 1/n), biases 0.
    engine
        "julia", "numpy", or "auto" for Julia where it is available. ``None`` reads IMPLICIT_RNN_ENGINE. The engine starts
        at its first use.
    device
        Where the Julia engine computes: "cpu", or "cuda" for an NVIDIA card, by CUDA.jl.

    Raises
    ------
    ValueError, TypeError
        For arguments out of range or of the wrong type, here and in all calls; the message says what was expected.
    EngineError
        At the first use, if the engine or the device is not available; in a call, for an option that the engine lacks.
    ConvergenceError
        In a call, for samples that do not reach their equilibrium, depending on its ``on_failure``.
    MemoryError
        If the arrays do not fit in the machine's memory.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8), irnn.Layer(4, "sigmoid")], feedback=True, outputs=1, seed=0)
    >>> net.predict([[0.5, -1.0], [0.2, 0.1]]).shape
    (2, 1)
    >>> net.topology.neurons, net.dtype
    (12, dtype('float64'))
    """

    def __init__(
        self,
        inputs: int,
        layers: Sequence[Layer | int],
        *,
        outputs: int | Sequence[int],
        feedback: bool | Iterable[tuple[int, int]] = False,
        skips: Iterable[tuple[int, int]] = (),
        input_skips: Iterable[int] = (),
        constraint: ConstraintLike = Perron(),
        dtype: DTypeLike = "float64",
        seed: int | None = None,
        engine: str | None = None,
        device: str = "cpu",
    ) -> None:
        if str(constraint).lower() == "none":
            raise ValueError(f"constraint is {constraint!r}; no constraint is Free(), and the default is Perron()")
        constraint = options.choose(Constraint, constraint, "constraint")
        topology = Topology.build(inputs, layers, feedback, skips, input_skips, outputs, constraint)
        self._set_up(topology, dtype, engine, device)
        self._initialise(as_generator(seed))

    def _set_up(self, topology: Topology, dtype: DTypeLike, engine: str | None, device: str) -> None:
        try:
            name = "" if dtype is None else np.dtype(dtype).name
        except TypeError:
            name = ""
        if name not in ("float64", "float32"):
            raise ValueError(f"dtype is {dtype!r}; expected 'float64' or 'float32'")
        check_engine(engine)
        check_device(device)
        self._topology = topology
        self._dtype = np.dtype(name)  # in native byte order
        self._engine_name = engine
        self._device = device
        check_memory_of_parameters(topology.parameters, self.dtype)
        self._adopt(np.zeros(topology.parameters, self.dtype))

    def _adopt(self, parameters: Array) -> None:
        """Adopt these parameters, with nothing compiled yet."""
        self._parameters = parameters
        self._weights = MappingProxyType(self.topology.views(parameters))
        self._engine: Engine | None = None
        self._compiled: CompiledNetwork | None = None
        self._programs: dict[tuple[SolverLike, AdjointLike, LossLike, float], Program] = {}
        self._training: Callable[[], Training | None] = lambda: None  # the last, weakly

    @classmethod
    def from_topology(cls, topology: Topology, dtype: str, engine: str | None = None, device: str = "cpu") -> Network:
        """A network of a given topology, with all parameters zero.

        Parameters
        ----------
        topology
            That of another network, ``net.topology``.
        dtype, engine, device
            As for ``Network``.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> zero = irnn.Network.from_topology(net.topology, "float32")
        >>> zero.parameters.shape == net.parameters.shape, bool(zero.parameters.any())
        (True, False)
        """
        net = cls.__new__(cls)
        net._set_up(topology, dtype, engine, device)
        return net

    def _initialise(self, rng: np.random.Generator) -> None:
        for block in self.topology.blocks:
            if len(block.shape) == 2:
                recurrent = block.source != INPUT and block.source >= block.to
                gain = 0.3 if recurrent else 1.0
                self._weights[block.name][...] = rng.standard_normal(block.shape) * (gain / np.sqrt(block.shape[1]))

    @property
    def topology(self) -> Topology:
        """Layers and connections.

        Examples
        --------
        >>> irnn.Network(2, [irnn.Layer(8), irnn.Layer(4)], outputs=1).topology.neurons
        12
        """
        return self._topology

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameters and of all computations, float64 or float32.

        Examples
        --------
        >>> irnn.Network(2, [irnn.Layer(8)], outputs=1, dtype="float32").dtype
        dtype('float32')
        """
        return self._dtype

    # --- parameters --------------------------------------------------------------------------------------

    @property
    def parameters(self) -> Array:
        """(P,) all parameters: the memory itself, which engines read and write.

        A write takes effect at the next call. Assigning an array copies its values.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> net.parameters.shape
        (105,)
        >>> net.parameters *= 0.5
        >>> net.parameters = np.zeros(105)
        """
        return self._parameters

    @parameters.setter
    def parameters(self, values: ArrayLike) -> None:
        self._parameters[...] = self._vector("parameters", values)

    @property
    def weights(self) -> Mapping[str, Array]:
        """Views of ``parameters`` by name: W, R, b, C, d and, under ``Perron``, the scales a.

        With several layers W[l], R[to,from] and a[layers] name the blocks. Under a constraint the R blocks are the raw
        weights; ``recurrent_weights`` has the constrained weights in force.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> {name: weight.shape for name, weight in net.weights.items()}
        {'W': (8, 2), 'R': (8, 8), 'b': (8,), 'a': (8,), 'C': (1, 8), 'd': (1,)}
        >>> net.weights["b"][...] = 0.1  # takes effect at the next call
        """
        return self._weights

    def named(self, flat: ArrayLike) -> dict[str, Array]:
        """Views of a flat vector by the names of ``weights``.

        Parameters
        ----------
        flat
            A vector (P,), such as a gradient.

        Raises
        ------
        ValueError, TypeError
            For anything but real numbers (P,).

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> loss, gradient = net.loss_and_gradient([[0.5, -1.0]], [[0.3]])
        >>> net.named(gradient)["C"].shape
        (1, 8)
        """
        array = as_real("flat", flat, self.dtype)
        if array.shape != self._parameters.shape:
            raise ValueError(f"flat has shape {array.shape}; expected {self._parameters.shape}")
        return self.topology.views(array)

    @property
    def recurrent_weights(self) -> Array:
        """(N, N) the matrix R in force, with the constraint applied: lateral blocks on the diagonal.

        It is made of ``weights`` at each call, and cannot be written to.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> bool(np.abs(np.linalg.eigvals(net.recurrent_weights)).max() < 0.95)
        True
        """
        R = self.topology.recurrent_weights(self._parameters)
        R.flags.writeable = False
        return R

    @property
    def input_weights(self) -> Array:
        """(N, inputs) the matrix W; zero where no connection exists.

        It is made of ``weights`` at each call, and cannot be written to.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8), irnn.Layer(4)], outputs=1, seed=0)
        >>> net.input_weights.shape, bool(net.input_weights[8:].any())
        ((12, 2), False)
        """
        W = np.zeros((self.topology.neurons, self.topology.inputs), self.dtype)
        for block in self.topology.blocks:
            if block.name.startswith("W"):
                W[self.topology.rows[block.to]] = self._weights[block.name]
        W.flags.writeable = False
        return W

    # --- solving -----------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine, started if necessary; the network keeps it, even if IMPLICIT_RNN_ENGINE changes.

        Raises ``EngineError`` like ``get_engine``.

        Examples
        --------
        >>> irnn.Network(2, [irnn.Layer(8)], outputs=1, engine="numpy").engine.name
        'numpy'
        """
        if self._engine is None:
            self._engine = get_engine(self._engine_name)
        return self._engine

    @property
    def device(self) -> str:
        """Where the engine computes: "cpu" or "cuda"; ``to`` changes it.

        Examples
        --------
        >>> irnn.Network(2, [irnn.Layer(8)], outputs=1).device
        'cpu'
        """
        return self._device

    def to(self, device: str) -> Network:
        """Compute on another device from the next call on. The parameters stay NumPy arrays in host memory.

        Parameters
        ----------
        device
            "cpu" or "cuda".

        Returns
        -------
        The network itself.

        Raises
        ------
        ValueError
            For another name. If the device is not available, the next call raises an ``EngineError``.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, device="cuda")
        >>> net.to("cpu").predict([[0.5, -1.0]]).shape
        (1, 1)
        """
        check_device(device)
        if device != self._device:
            self._device, self._compiled = device, None
            self._programs.clear()
        return self

    def equilibrium(
        self, X: ArrayLike, *, solver: SolverLike = Auto(), z0: ArrayLike | None = None, on_failure: OnFailure = "raise"
    ) -> Solution:
        """The equilibria of samples, with a status and an error for each.

        Parameters
        ----------
        X
            Samples (B, inputs).
        solver
            A solver, or its name: ``Auto()``, ``Picard()``, ``Anderson()``, ``Newton()``, ``Chord()`` or ``NLsolve()``.
        z0
            The start (B, N), by default zero.
        on_failure
            What happens if a sample does not converge: "raise" a ``ConvergenceError`` that holds the solution, "warn", or
            "ignore".

        Returns
        -------
        A ``Solution``, whose ``state`` is (B, N).

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> solution = net.equilibrium([[0.5, -1.0], [0.2, 0.1]])
        >>> solution.state.shape, solution.converged
        ((2, 8), array([ True,  True]))
        """
        x = self._inputs(X)
        start = self._start(z0, len(x))
        options.check_on_failure(on_failure)
        solution = Solution.empty(len(x), self.topology.neurons, self.dtype)
        if isinstance(x, DeviceArray):
            solution = replace(solution, state=self._empty(x, self.topology.neurons))
        self.program(solver).solve(self._parameters, x, start, solution)
        if failure := solution.failure():
            self._report(on_failure, failure, solution.status, solution)
        return solution

    def predict(
        self, X: ArrayLike, *, solver: SolverLike = Auto(), z0: ArrayLike | None = None, on_failure: OnFailure = "raise"
    ) -> Array:
        """The outputs for samples, at their equilibria.

        Parameters
        ----------
        X, solver, z0, on_failure
            As for ``equilibrium``, with samples (B, inputs) and the start (B, N).

        Returns
        -------
        The outputs (B, outputs).

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> net.predict([[0.5, -1.0], [0.2, 0.1]]).shape
        (2, 1)
        """
        outputs = self.read_out(self.equilibrium(X, solver=solver, z0=z0, on_failure=on_failure).state)
        if isinstance(outputs, np.ndarray) and not all_finite(outputs):
            bad = int((~np.isfinite(outputs)).any(axis=1).sum())
            failure = f"{bad} of {len(outputs)} samples have outputs with NaN or infinity"
            self._report(on_failure, failure, np.array([NON_FINITE]))
        return outputs

    def read_out(self, state: Array) -> Array:
        """The outputs of states.

        Parameters
        ----------
        state
            States (B, N).

        Returns
        -------
        The outputs (B, outputs).

        Raises
        ------
        ValueError, TypeError
            For anything but real numbers (B, N).

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> X = [[0.5, -1.0], [0.2, 0.1]]
        >>> bool((net.read_out(net.equilibrium(X).state) == net.predict(X)).all())
        True
        """
        if (there := device_arrays.as_device_array("state", state, self._device)) is None:
            z, neurons = as_real("state", state, self.dtype), self.topology.neurons
            if z.ndim != 2 or z.shape[1] != neurons:
                raise ValueError(f"state has shape {z.shape}; expected (samples, {neurons} neurons)")
            return self.topology.read_out(self._parameters, z)
        z = self._device_rows("state", there, self.topology.neurons, "neurons")
        outputs = self._empty(z, self.topology.output_size)
        self.program().read_out(self._parameters, z, outputs)
        return outputs

    def loss_and_gradient(
        self,
        X: ArrayLike,
        Y: ArrayLike,
        *,
        loss: LossLike = "mse",
        sample_weights: ArrayLike | None = None,
        solver: SolverLike = Auto(),
        adjoint: AdjointLike = Implicit(),
        jacobian_penalty: float = 0.0,
        probe: int = 0,
        on_failure: OnFailure = "raise",
        report: GradientReport | None = None,
    ) -> tuple[float, Array]:
        """The loss of the outputs, and its gradient with respect to all parameters.

        Parameters
        ----------
        X, Y
            Samples (B, inputs) and targets (B, outputs); for "cross_entropy" class labels (B,) as well.
        loss
            "mse", "mae", "huber", "cross_entropy", "binary_cross_entropy" or an object such as ``Huber(delta=0.5)``, or
            ``CustomLoss(function)``, your own; both cross-entropies interpret the outputs as logits.
        sample_weights
            Weights w (B,): the loss is ``Σ_b w_b ℓ_b / Σ_b w_b``.
        solver
            As for ``equilibrium``.
        adjoint
            How the gradient passes through the equilibrium: ``Implicit()``, ``JacobianFree()`` or ``Unrolled(steps)``.
        jacobian_penalty
            Adds this multiple of mean_b ‖J_b‖_F² / N to the loss, with J = D R the Jacobian at the equilibrium (Bai,
            Koltun and Kolter 2021), estimated with one random vector per sample.
        probe
            The seed of that random vector, from 0 to below 2**63; anything else raises ``ValueError`` or ``TypeError``.
        on_failure
            What happens if a sample has no equilibrium, which makes the gradient meaningless: "raise" a
            ``ConvergenceError``, "warn", or "ignore".
        report
            A ``GradientReport.empty(B)``, whose arrays are filled with the status and the residuals of each sample.

        Returns
        -------
        The loss, and its gradient (P,) in the layout of ``parameters``; ``named`` views it by name.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> loss, gradient = net.loss_and_gradient([[0.5, -1.0], [0.2, 0.1]], [[0.3], [0.0]])
        >>> gradient.shape, net.named(gradient)["R"].shape
        ((105,), (8, 8))
        """
        samples = self.samples(X, Y, loss, sample_weights)
        x = samples.X
        options.check_on_failure(on_failure)
        gradient = np.empty_like(self._parameters)
        if not options.is_whole(probe):
            raise TypeError(f"probe must be a whole number from 0 below 2**63, got {probe!r}")
        if not 0 <= probe < 2**63:
            raise ValueError(f"probe must be a whole number from 0 below 2**63, got {probe}")
        check_report(report, len(x))
        program = self.program(solver, adjoint, loss, jacobian_penalty)
        value, quality = program.gradient(self._parameters, samples, gradient, int(probe), report)
        self._report_quality(quality, len(x), on_failure, "the gradient is not that of the loss")
        return value, gradient

    def vjp(
        self,
        X: ArrayLike,
        V: ArrayLike,
        *,
        of: Of = "outputs",
        solver: SolverLike = Auto(),
        adjoint: AdjointLike = Implicit(),
        z0: ArrayLike | None = None,
        on_failure: OnFailure = "raise",
        report: GradientReport | None = None,
    ) -> tuple[Array, Array]:
        """The derivatives of ``Σ_b ⟨V_b, outputs_b⟩`` with respect to the parameters and the samples.

        Parameters
        ----------
        X
            Samples (B, inputs).
        V
            ∂L/∂outputs (B, outputs) of any loss L; the results are then the gradients of L. With ``of="state"`` ∂L/∂state
            (B, N).
        of
            "outputs", or "state" for all neurons.
        z0
            The start (B, N) of the solver, by default zero. If you have the equilibria already, as
            ``equilibrium(X).state`` at the same parameters, pass them here: one evaluation of f confirms each, and nothing
            is solved twice. From a state that is not an equilibrium the solver iterates to ``tol`` as usual. Not for
            ``Unrolled``, whose steps begin at zero.
        solver, adjoint, on_failure, report
            As for ``loss_and_gradient``.

        Returns
        -------
        The derivatives with respect to the parameters (P,), laid out like ``parameters``, and to the samples (B, inputs),
        where row b belongs to sample b alone.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> X, T = np.array([[0.5, -1.0], [0.2, 0.1]]), np.array([[0.3], [0.0]])
        >>> solution = net.equilibrium(X)
        >>> Y = net.read_out(solution.state)
        >>> gradient, dX = net.vjp(X, 2 * (Y - T), z0=solution.state)  # of Σ (Y - T)²
        >>> gradient.shape, dX.shape
        ((105,), (2, 2))
        """
        x, start, adjoint = self._at(X, z0, adjoint)
        v = self._rows("V", V, len(x), self._width(of), of if of == "outputs" else "neurons")
        options.check_on_failure(on_failure)
        check_report(report, len(x))
        gradient, dX = np.empty_like(self._parameters), self._empty(x, self.topology.inputs)
        program = self.program(solver, adjoint)
        quality = program.vjp(self._parameters, x, start, v, of, gradient, dX, report)
        self._report_quality(quality, len(x), on_failure, "the result is not the derivative at an equilibrium")
        return gradient, dX

    def jvp(
        self,
        X: ArrayLike,
        dX: ArrayLike | None = None,
        dparameters: ArrayLike | None = None,
        *,
        of: Of = "outputs",
        solver: SolverLike = Auto(),
        adjoint: AdjointLike = Implicit(),
        z0: ArrayLike | None = None,
        on_failure: OnFailure = "raise",
        report: GradientReport | None = None,
    ) -> Array:
        """The derivative of the outputs, or of the states, along a direction.

        This is the transpose of ``vjp``, for every ``adjoint``; with ``Implicit`` the systems
        ``(I - D R) z′ = D (u′ + R′ z)`` are solved by its ``linear_solver``, and the adjoint
        residuals of a ``report`` are those of these systems.

        Parameters
        ----------
        X
            Samples (B, inputs).
        dX, dparameters
            The direction: (B, inputs) in the samples and (P,) in the parameters, each zero if not given; if both are
            missing, jvp raises ``TypeError``.
        of, z0, solver, adjoint, on_failure, report
            As for ``vjp``, with the start (B, N).

        Returns
        -------
        The derivative (B, outputs), or (B, N) with ``of="state"``.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> X, dX = np.array([[0.5, -1.0]]), np.array([[1.0, 0.0]])
        >>> slope = (net.predict(X + 1e-6 * dX) - net.predict(X - 1e-6 * dX)) / 2e-6
        >>> np.allclose(net.jvp(X, dX), slope, atol=1e-6)
        True
        """
        x, start, adjoint = self._at(X, z0, adjoint)
        if dX is None and dparameters is None:
            raise TypeError("jvp needs a direction: dX (B, inputs), dparameters (P,) or both")
        width = self._width(of)
        inputs = self.topology.inputs
        dx = np.zeros((len(x), inputs), self.dtype) if dX is None else self._rows("dX", dX, len(x), inputs, "features")
        dp = np.zeros_like(self._parameters) if dparameters is None else self._vector("dparameters", dparameters)
        options.check_on_failure(on_failure)
        check_report(report, len(x))
        tangent = self._empty(x, width)
        program = self.program(solver, adjoint)
        quality = program.jvp(self._parameters, x, start, dp, dx, of, tangent, report)
        self._report_quality(quality, len(x), on_failure, "the result is not the derivative at an equilibrium")
        return tangent

    def hessian_vector_product(
        self,
        X: ArrayLike,
        Y: ArrayLike,
        v: ArrayLike,
        *,
        loss: LossLike = "mse",
        sample_weights: ArrayLike | None = None,
        solver: SolverLike = Auto(),
    ) -> Array:
        """The Hessian of the loss with respect to the parameters, times a vector, exactly (Julia engine only).

        Parameters
        ----------
        X, Y, loss, sample_weights, solver
            As for ``loss_and_gradient``: samples (B, inputs), targets (B, outputs) and weights (B,).
        v
            The vector (P,).

        Returns
        -------
        The product (P,).

        Raises
        ------
        EngineError
            On the NumPy engine, and where a sample does not reach its equilibrium.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0, engine="julia")
        >>> X, Y, v = [[0.5, -1.0]], [[0.3]], net.parameters.copy()
        >>> product = net.hessian_vector_product(X, Y, v)
        >>> before = net.loss_and_gradient(X, Y)[1]
        >>> net.parameters += 1e-6 * v
        >>> np.allclose((net.loss_and_gradient(X, Y)[1] - before) / 1e-6, product, atol=1e-4)
        True
        """
        samples = self.samples(X, Y, loss, sample_weights)
        direction = self._vector("v", v)
        product = np.empty_like(self._parameters)
        self.program(solver, loss=loss).hessian_vector_product(self._parameters, samples, direction, product)
        return product

    def spectral_radius(
        self, X: ArrayLike, *, solver: SolverLike = Auto(), z0: ArrayLike | None = None, on_failure: OnFailure = "raise"
    ) -> Array:
        """The spectral radius of the Jacobian D R at the equilibrium of each sample; below 1, the equilibrium attracts.

        In a layered net it is the largest of all stages.

        Parameters
        ----------
        X, solver, z0, on_failure
            As for ``equilibrium``: samples (B, inputs), and the start (B, N).

        Returns
        -------
        The radii (B,).

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> bool(net.spectral_radius([[0.5, -1.0], [0.2, 0.1]]).max() < 0.95)
        True
        """
        x = self._inputs(X)
        state = self.equilibrium(x, solver=solver, z0=z0, on_failure=on_failure).state
        radius = np.empty(len(x))
        self.program(solver).spectral_radius(self._parameters, x, state, radius)
        return radius

    @training.with_settings_of(training.fit_many)
    def fit(self, X: ArrayLike, Y: ArrayLike, **settings: Any) -> training.Run:
        """Train on X (B, inputs) and Y (B, outputs), or labels; the settings are those of ``fit_many``.

        The objective: ``loss``, ``sample_weights``, ``jacobian_penalty``. The method: ``optimizer``, ``schedule``,
        ``epochs``, ``batch_size``, ``clip``, ``solver``, ``adjoint``, ``warm_start``, ``seed``. Stopping: ``validation``,
        ``validation_every``, ``early_stopping``, ``restore_best``, ``guard``, ``on_failure``. Monitoring: ``callbacks``,
        ``callback_every``, ``progress``, ``checkpoint``, and ``resume`` to continue a run. Raises ``TypeError`` for a
        setting that does not exist.

        Examples
        --------
        >>> X = np.linspace(-1, 1, 20)[:, None]
        >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
        >>> run = net.fit(X, X**2, optimizer=irnn.Adam(1e-2), schedule="cosine", epochs=50, batch_size=10, progress=False)
        >>> bool(run.loss[-1] < run.loss[0])
        True
        """
        return training.fit_many([self], X, Y, **settings)[0]

    def program(
        self,
        solver: SolverLike = Auto(),
        adjoint: AdjointLike = Implicit(),
        loss: LossLike = "mse",
        jacobian_penalty: float = 0.0,
    ) -> Program:
        """The compiled program that serves the calls above with these options, for callers to whom microseconds matter.

        It is made at its first use. All programs of a network share its memory; the last 16 are kept.

        Parameters
        ----------
        solver, adjoint, loss, jacobian_penalty
            As for ``loss_and_gradient``.

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> net.program("newton") is net.program("newton")
        True
        """
        choice = (solver, adjoint, loss, jacobian_penalty)
        try:
            program = self._programs.get(choice)
        except TypeError:  # not hashable, so not an option, as is said below
            program = None
        if program is None:
            adjoint = options.choose(Adjoint, adjoint, "adjoint")
            problem = Problem(
                options.choose(Solver, solver, "solver"),
                adjoint,
                options.choose(Loss, loss, "loss"),
                check_penalty(jacobian_penalty, adjoint),
            )
            program = self._programs[choice] = self._compile().program(problem)
            for oldest in list(self._programs)[:-_PROGRAMS]:
                self._programs.pop(oldest, None)  # another thread may have been faster
        return program

    def samples(self, X: ArrayLike, Y: ArrayLike, loss: LossLike, sample_weights: ArrayLike | None) -> Samples:
        """The data for a loss, checked and converted, in host memory or on the network's device.

        Parameters
        ----------
        X, Y, loss, sample_weights
            As for ``loss_and_gradient``: samples (B, inputs), targets (B, outputs) and weights (B,).

        Examples
        --------
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> len(net.samples([[0.5, -1.0], [0.2, 0.1]], [[0.3], [0.0]], "mse", None))
        2
        """
        x = self._inputs(X)
        chosen, outputs = options.choose(Loss, loss, "loss"), self.topology.output_size
        if isinstance(chosen, CustomLoss):  # a function of NumPy arrays
            x = x.numpy() if isinstance(x, DeviceArray) else x
            Y = device_arrays.to_host("Y", Y, self.dtype, self._device)
        there = device_arrays.as_device_array("Y", Y, self._device)
        if there is None:
            targets = chosen.targets("Y", Y, len(x), outputs, self.dtype)
        else:
            targets = self._rows("Y", there, len(x), outputs, "outputs")
            if chosen.bounded:
                chosen.targets("Y", there.numpy(), len(x), outputs, self.dtype)
        weights = device_arrays.to_host("sample_weights", sample_weights, self.dtype, self._device)
        return Samples(x, targets, as_weights("sample_weights", weights, len(x), self.dtype))

    # --- files and words ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the network to a safetensors file, atomically.

        Parameters
        ----------
        path
            The file; ``irnn.load`` reads it.

        Raises
        ------
        OSError
            If it cannot be written; an existing file is kept.
        TypeError
            If the constraint is a class of your own, which ``irnn.load`` could not make again.

        Examples
        --------
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/net.safetensors"
        >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
        >>> net.save(path)
        >>> irnn.load(path)
        Network(2 inputs, [8 tanh lateral], 1 outputs, Perron(kappa=0.95), 105 parameters, float64)
        """
        serialization.save(self, path)

    def summary(self) -> str:
        """Layers, connections and parameter counts as a table.

        Examples
        --------
        >>> print(irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0).summary())
        Network(2 inputs, [8 tanh lateral], 1 outputs, Perron(kappa=0.95), 105 parameters, float64)
        block               shape   parameters
        W                   8 x 2           16
        R                   8 x 8           64
        b                       8            8
        a                       8            8
        C                   1 x 8            8
        d                       1            1
        total                              105
        """
        lines = [f"{'block':<12} {'shape':>12} {'parameters':>12}"]
        lines += [f"{b.name:<12} {' x '.join(map(str, b.shape)):>12} {b.size:>12}" for b in self.topology.blocks]
        lines.append(f"{'total':<12} {'':>12} {self.topology.parameters:>12}")
        return "\n".join([repr(self), *lines])

    def __repr__(self) -> str:
        forms = {"inputs": "{} inputs", "layers": "[{}]", "parameters": "{} parameters"}
        forms |= {name: f"{name} {{}}" for name in ("feedback", "skips", "input skips")}
        return f"Network({', '.join(forms.get(name, '{}').format(fact) for name, fact in self._facts().items())})"

    def _repr_html_(self) -> str:
        return html_table("Network", self._facts())

    def _facts(self) -> dict[str, str]:
        dtype = self.dtype.name if self._device == "cpu" else f"{self.dtype.name} on {self._device}"
        return self.topology.facts() | {"dtype": dtype}

    def __getstate__(self) -> dict[str, Any]:
        made_again = ("_weights", "_engine", "_compiled", "_programs", "_training")
        return {name: value for name, value in self.__dict__.items() if name not in made_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._adopt(np.array(self._parameters))  # a copy, where joblib passes a memmap

    # --- checks and conversions --------------------------------------------------------------------------

    def _compile(self) -> CompiledNetwork:
        if self._compiled is None:
            self._compiled = self.engine.compile(self.topology, self.dtype.name, self._device)
        return self._compiled

    def _inputs(self, X: ArrayLike) -> Array:
        if (there := device_arrays.as_device_array("X", X, self._device)) is not None:
            return self._device_rows("X", there, self.topology.inputs, "features")
        return as_samples("X", X, self.topology.inputs, self.dtype, "features", self.topology.neurons)

    def _rows(self, name: str, value: ArrayLike, samples: int, columns: int, what: str) -> Array:
        if (there := device_arrays.as_device_array(name, value, self._device)) is not None:
            rows = self._device_rows(name, there, columns, what)
        else:
            rows = as_samples(name, value, columns, self.dtype, what)
        check_samples(name, rows, samples)
        return rows

    def _device_rows(self, name: str, array: DeviceArray, columns: int, what: str) -> Array:
        """An array on the network's device, checked."""
        self._compile()  # where the device cannot be had, that is what is to be said
        return device_arrays.as_samples(name, array, columns, self.dtype, what)

    def _empty(self, like: Array, columns: int) -> Array:
        """An array (samples, columns) for results, in the memory where the samples are."""
        shape = (len(like), columns)
        if isinstance(like, DeviceArray):
            return cast("Array", DeviceArray.empty(shape, self.dtype, self._device))
        return np.empty(shape, self.dtype)

    def _start(self, z0: ArrayLike | None, samples: int) -> Array | None:
        return None if z0 is None else self._rows("z0", z0, samples, self.topology.neurons, "neurons")

    def _at(self, X: ArrayLike, z0: ArrayLike | None, adjoint: AdjointLike) -> tuple[Array, Array | None, Adjoint]:
        """The samples, the start and the adjoint of a derivative, checked."""
        x = self._inputs(X)
        adjoint = options.choose(Adjoint, adjoint, "adjoint")
        if z0 is not None and not adjoint.needs_equilibrium:
            raise ValueError(
                f"z0 is the start of a solver, which adjoint={adjoint} does not use: its steps begin at zero"
            )
        return x, self._start(z0, len(x)), adjoint

    def _width(self, of: str) -> int:
        options.check_choice("of", of, get_args(Of))
        return self.topology.output_size if of == "outputs" else self.topology.neurons

    def _vector(self, name: str, value: ArrayLike) -> Array:
        """A vector (P,) of a number for each parameter, checked."""
        vector = as_real(name, value, self.dtype)
        if vector.shape != self._parameters.shape:
            raise ValueError(f"{name} has shape {vector.shape}; expected {self._parameters.shape}")
        return np.ascontiguousarray(vector)

    def _report_quality(self, quality: Quality, samples: int, on_failure: str, consequence: str) -> None:
        """Report samples without equilibrium or adjoint, as ``on_failure`` says."""
        if quality.unconverged:
            failure = (
                f"{quality.unconverged} of {samples} samples did not reach an equilibrium with a solvable adjoint system "
                f"(largest relative residuals {quality.residual:.2g} forward, {quality.adjoint_residual:.2g} adjoint), so "
                f"{consequence}"
            )
            # The statuses of the samples are not known, only this much.
            failed = [NON_FINITE, MAX_ITERATIONS] if np.isnan(quality.residual) else [MAX_ITERATIONS]
            if np.isnan(quality.adjoint_residual) and not np.isnan(quality.residual):
                failure += (
                    ": either the system is singular, or the derivative of the loss overflows; in the second case check the "
                    "targets and the readout: Y, net.weights['C'] and net.weights['d']"
                )
            self._report(on_failure, failure, np.array(failed))

    def _report(self, on_failure: str, failure: str, status: Array, solution: Solution | None = None) -> None:
        ways = remedy(self.topology.constraint.unique, status)
        report_failure(f"{failure}. Remedies: {ways}", on_failure, solution)
