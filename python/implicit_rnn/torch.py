"""Networks as PyTorch layers, and fixed points and roots of functions written in PyTorch, with exact gradients.

The engines work in the memory of the tensors: on the CPU, and on an NVIDIA card for layers whose network is on it and for
equations in Julia code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any, get_args

import numpy as np

from implicit_rnn import equations
from implicit_rnn.device_arrays import DeviceArray, is_on_device
from implicit_rnn.engines.base import LARGEST_CHANGE, Of
from implicit_rnn.engines.numpy.operators import equilibration
from implicit_rnn.equations import Function, JuliaFunction
from implicit_rnn.equations.functions import argument_names
from implicit_rnn.equations.posing import check_arguments, positions
from implicit_rnn.equations.solution import named_samples
from implicit_rnn.equations.solving import check_device_for
from implicit_rnn.errors import ConvergenceError, warn
from implicit_rnn.network import Network
from implicit_rnn.options import OnFailure, check_choice, check_on_failure, choose
from implicit_rnn.solvers import AdjointLike, Auto, Implicit, Solver, SolverLike, at_equilibrium

try:
    import torch
    from torch import Tensor, nn
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
except ImportError as error:
    raise ImportError(
        f"implicit_rnn.torch needs PyTorch ({error}): pip install 'implicit-rnn[torch]', or see pytorch.org"
    ) from error

__all__ = ["ImplicitRNN", "fixed_point", "root"]


# --- networks ------------------------------------------------------------------------------------------------


class ImplicitRNN(nn.Module):
    """A network as a layer: differentiable in its parameters and in its inputs, by the implicit function theorem.

    The parameters, under the names of ``Network.weights``, share memory with the network: changes by a PyTorch optimiser are
    visible in ``net`` at once, and vice versa. The layer runs in the precision of the network, on the CPU; or on an
    NVIDIA card with a network of ``device="cuda"``, where inputs and outputs stay on the card, and parameters on the card
    are copied to ``net`` in each call. Derivatives are of first order, in reverse mode.

    Parameters
    ----------
    net
        The network. ``layer.double()`` and ``layer.float()`` give the layer another network of that precision.
    of
        "outputs" for the outputs of the network, "state" for the equilibrium of all neurons.
    solver, adjoint, on_failure
        As in ``Network.equilibrium`` and ``Network.vjp``.

    Raises
    ------
    TypeError
        If ``net`` is not a ``Network``; in a call, for inputs with another dtype or on another device than the parameters,
        and if the parameters are no longer float32 or float64.
    ValueError
        For invalid settings; in a call, for inputs or parameters of the wrong shape, and inputs with NaN or infinity.
    ConvergenceError
        In a call or its backward pass, for samples without equilibrium, depending on ``on_failure``.

    Examples
    --------
    >>> net = irnn.Network(inputs=4, layers=[8], outputs=2, dtype="float32", seed=0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), ImplicitRNN(net), torch.nn.Softmax(-1))
    >>> model(torch.zeros(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        net: Network,
        *,
        of: Of = "outputs",
        solver: SolverLike = Auto(),
        adjoint: AdjointLike = Implicit(),
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if not isinstance(net, Network):
            raise TypeError(f"net is {net!r}; expected a Network")
        check_choice("of", of, get_args(Of))
        self._net = net
        self.of = of
        check_on_failure(on_failure)
        self.solver = choose(Solver, solver, "solver")
        self.adjoint, self.on_failure = at_equilibrium(adjoint), on_failure
        self._own: dict[str, nn.Parameter | None] = {}
        for name, weights in net.weights.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(weights)))
        self.register_load_state_dict_post_hook(_share_memory)

    @property
    def net(self) -> Network:
        """The network, with the current parameters of the layer; a copy where these are parametrised."""
        return self.network(getattr(self, name) for name in self._net.weights)

    @net.setter
    def net(self, _: object) -> None:
        raise AttributeError(
            "the network of a layer cannot be replaced: make another layer, ImplicitRNN(net), or copy the parameters of a net of "
            "this kind, layer.net.parameters = net.parameters"
        )

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """The outputs (..., outputs), or the states (..., N).

        Parameters
        ----------
        x
            The inputs (..., inputs), of the dtype of the parameters.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; expected a tensor (..., {self._net.topology.inputs})")
        weights = tuple(getattr(self, name) for name in self._net.weights)  # they may be parametrised
        tensor = weights[0]
        if x.device != tensor.device or (x.device.type != "cpu" and not is_on_device(x, self._net.device)):
            raise TypeError(
                f"x is on {x.device} and the parameters are on {tensor.device}, but the network computes on {self._net.device}: "
                "keep this layer on the CPU, layer.cpu(), and call layer(x.cpu()).to(x.device); or, on an NVIDIA card, "
                "layer.net.to('cuda') and layer.to(x.device)"
            )
        _refuse_tracing()
        if x.layout != torch.strided:
            raise TypeError(f"x has the layout {x.layout}; expected a dense tensor: pass x.to_dense()")
        if x.dtype != tensor.dtype:
            raise TypeError(
                f"x has dtype {x.dtype}, but the parameters have {tensor.dtype}; convert x, or the layer by .float() or .double()"
            )
        if x.ndim == 0 or x.shape[-1] != self._net.topology.inputs:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., {self._net.topology.inputs})")
        y, _ = _Equilibrium.apply(self, x.reshape(-1, x.shape[-1]), *weights)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def network(self, weights: Iterable[Tensor]) -> Network:
        """The network with these parameters: ``net`` for the layer's own, another network in a ``functional_call``.

        Parameters
        ----------
        weights
            Tensors in the order and of the shapes of ``parameters()``.
        """
        tensors = dict(zip(self._net.weights, weights, strict=True))
        if all(_same_memory(tensors[name], view) for name, view in self._net.weights.items()):
            return self._net
        dtype = _common_dtype(tensors)
        for name, view in self._net.weights.items():
            if tensors[name].shape != view.shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected {view.shape}")
        net, own = self._net, self._has(tensors)
        if not own or net.dtype.name != dtype:
            net = Network.from_topology(self._net.topology, dtype, self._net.engine.name, self._net.device)
        # Copied first, as they may share memory.
        values = {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}
        for name, view in net.weights.items():
            view[...] = values[name]
        if own:
            self._net = net
            for name, view in net.weights.items():
                parameter = self._own[name]
                if parameter is not None and parameter.device.type == "cpu":
                    parameter.data = torch.from_numpy(view)
        return net

    def _has(self, tensors: dict[str, Tensor]) -> bool:
        """Whether these are the layer's own parameters, not substitutes from ``functional_call``."""
        return all(
            (own := self._own.get(name)) is not None
            and own is self._parameters.get(name)
            and own.data_ptr() == tensor.data_ptr()
            for name, tensor in tensors.items()
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for every module; the network follows the new parameter.

        Parameters
        ----------
        name, param
            One of the names of ``Network.weights``, and the parameter.
        """
        super().register_parameter(name, param)
        self._own[name] = param

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ImplicitRNN:
        super()._apply(fn, recurse)
        self._own = dict(self._parameters)
        shared = any(parameter is not None and parameter.is_shared() for parameter in self._own.values())
        _share_memory(self)
        if shared:
            raise RuntimeError(
                "the parameters of an ImplicitRNN layer are the memory of its network and cannot be shared among processes by "
                "share_memory(): send state_dict() or gradients between them, as DistributedDataParallel does"
            )
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # a pickle or deep copy separates their memory
        super().__setstate__(state)
        _share_memory(self)

    def extra_repr(self) -> str:
        """The text for ``repr`` of the layer."""
        return f"{self._net!r}, of={self.of!r}"


def _share_memory(layer: ImplicitRNN, _: object = None) -> None:
    """Make the network use the memory of parameters that have been given other memory."""
    own = [layer._parameters.get(name) for name in layer._net.weights]  # None where it is parametrised
    if all(weights is not None and weights.device.type == "cpu" for weights in own):
        layer.network(own)


def _common_dtype(tensors: dict[str, Tensor]) -> str:
    """The name of the dtype that all parameters have, float32 or float64."""
    found = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    if len(set(found.values())) > 1:
        raise TypeError(
            f"the parameters have the dtypes {found}; expected one for all: layer.float() or layer.double()"
        )
    dtype = found.popitem()[1]
    if dtype not in ("float32", "float64"):
        raise TypeError(
            f"an ImplicitRNN layer computes in float32 or float64, not in {dtype}: convert the other layers only, and call it "
            "as layer(x.float()); layer.float() restores this one"
        )
    return dtype


def _same_memory(tensor: Tensor, view: np.ndarray) -> bool:
    strides = tuple(stride * tensor.element_size() for stride in tensor.stride())
    return tensor.data_ptr() == view.ctypes.data and strides == view.strides


def _refuse_tracing() -> None:
    """``RuntimeError`` where PyTorch traces the call, since the result for these tensors would be recorded as a constant."""
    modes = {type(mode).__name__ for mode in _get_current_dispatch_mode_stack()}
    if torch.jit.is_tracing() or modes & {"ProxyTorchDispatchMode", "FakeTensorMode"}:
        raise RuntimeError(
            "a layer or an equation of implicit_rnn runs outside PyTorch, and cannot be traced by torch.jit or make_fx, nor "
            "exported; torch.compile leaves it out by itself"
        )


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().resolve_neg().contiguous().numpy()


def _to_engine(tensor: Tensor, device: str) -> Any:
    """A tensor as an engine argument, without a copy: an array, or the tensor itself if it is on the device."""
    whole = tensor.detach().resolve_neg().contiguous()
    return whole if is_on_device(whole, device) else whole.numpy()


def _tensor(array: np.ndarray | DeviceArray) -> Tensor:
    """A tensor on the memory of the array, or on a copy where that cannot be written to."""
    if isinstance(array, DeviceArray):
        return torch.from_dlpack(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _one_by_one(function: Any, info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, ...]:
    """The rule that ``torch.vmap`` needs for an ``autograd.Function``: its stacked outputs, and the axes of stacking."""
    parts = [
        function.apply(
            *(each if axis is None else each.select(axis, k) for each, axis in zip(given, in_dims, strict=True))
        )
        for k in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(part) for part in zip(*parts, strict=True))
    return outputs, (0,) * len(outputs)


def _of_one_cotangent(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass; ``RuntimeError`` with the remedy where PyTorch gives it a batch of cotangents."""

    def checked(ctx: Any, *cotangents: Tensor) -> Any:
        try:
            return backward(ctx, *cotangents)
        except RuntimeError as error:
            if "Batching rule not implemented" not in str(error):
                raise
            raise RuntimeError(
                "a layer or an equation of implicit_rnn is differentiated with one cotangent at a time: leave out vectorize=True "
                "or is_grads_batched=True"
            ) from error

    return checked


class _InReverseMode(torch.autograd.Function):
    """An operation of an engine, which has no derivatives in forward mode."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "a layer or an equation of implicit_rnn has derivatives in reverse mode only, such as by torch.autograd.grad, or "
            "torch.func.jacrev of a layer; Network.jvp has products with the Jacobian of a network"
        )


class _Equilibrium(_InReverseMode):
    """(layer, x (B, inputs), *parameters) -> outputs, and the states for the backward pass."""

    @staticmethod
    def forward(layer: ImplicitRNN, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        net = layer.network(weights)
        if not len(x):
            sizes = net.topology.neurons if layer.of == "state" else net.topology.output_size, net.topology.neurons
            return x.new_empty(0, sizes[0]), x.new_empty(0, sizes[1])
        state = net.equilibrium(_to_engine(x, net.device), solver=layer.solver, on_failure=layer.on_failure).state
        z = _tensor(state)
        return z.clone() if layer.of == "state" else _tensor(net.read_out(state)), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        layer, *tensors = inputs
        ctx.layer = layer
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, ...]:
        return _one_by_one(_Equilibrium, info, in_dims, *given)

    @staticmethod
    @_of_one_cotangent
    def backward(ctx: Any, v: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Pullback.apply(ctx.layer, v, *ctx.saved_tensors)


class _Pullback(torch.autograd.Function):
    """(layer, cotangent (B, outputs), states, x, *parameters) -> the cotangents of x and of the parameters."""

    @staticmethod
    def forward(layer: ImplicitRNN, v: Tensor, state: Tensor, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        if not len(x):
            return torch.zeros_like(x), *map(torch.zeros_like, weights)
        if not (counts := v.ne(0).any(dim=1)).all():  # a sample without equilibrium would make the gradient NaN
            part, *gradients = _Pullback.forward(layer, v[counts], state[counts], x[counts], *weights)
            return torch.zeros_like(x).masked_scatter_(counts[:, None], part), *gradients
        net = layer.network(weights)
        gradient, dx = net.vjp(
            _to_engine(x, net.device),
            _to_engine(v, net.device),
            of=layer.of,
            solver=layer.solver,
            adjoint=layer.adjoint,
            z0=_to_engine(state.nan_to_num(0, 0, 0), net.device),
            on_failure=layer.on_failure,
        )
        parts = [torch.from_numpy(part).to(x.device) for part in net.named(gradient).values()]
        return _tensor(dx), *parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is saved."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, ...]:
        return _one_by_one(_Pullback, info, in_dims, *given)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "an ImplicitRNN layer has first derivatives only, and this differentiates its gradient again (create_graph=True); "
            "Network.hessian_vector_product gives exact products with the Hessian of a loss"
        )


# --- equations -----------------------------------------------------------------------------------------------


def fixed_point(
    f: Function,
    z0: Tensor,
    *,
    args: Sequence[Tensor] = (),
    batched: str | int | Iterable[str | int] = (),
    solver: SolverLike = Auto(),
    vectorized: bool = False,
    scale: Tensor | None = None,
    on_failure: OnFailure = "raise",
    device: str = "cpu",
) -> Tensor:
    """The solution of ``z = f(z, *args)`` with f written in PyTorch or Julia, differentiable in the arguments.

    Every sample is solved on its own, as by ``implicit_rnn.fixed_point``, with the derivatives of f from autograd. Gradients
    come from the implicit function theorem, ``∂z/∂args = -(∂c/∂z)⁻¹ ∂c/∂args`` with c = f(z) - z, and so do second
    derivatives; the iterations of the solver are not recorded. Julia code has first derivatives only.

    Parameters
    ----------
    f
        A function of tensors, given one sample z (n,) and returning (n,), which is mapped over a batch by
        ``torch.func.vmap``; with ``vectorized`` it takes any number of samples at once, z (m, n) and batched arguments (m, ...).
        Or Julia code, ``implicit_rnn.julia(text)``.
    z0
        The start: a tensor (n,), float32 or float64; without an axis for one unknown, in which case f is given such a tensor and
        may return one; or (B, n) for a batch. f is evaluated in this precision, even under ``autocast``.
    args
        The further arguments of f: tensors and numbers.
    batched, solver, vectorized, scale, on_failure
        As in ``implicit_rnn.fixed_point``. ``scale`` is a number or (n,).
    device
        Where Julia code runs: "cpu", or "cuda" for an NVIDIA card. Floating-point tensors on the card are read without a copy,
        and if z0 or an argument is on the card, so is the solution.

    Returns
    -------
    The solution, of the shape of z0.

    Raises
    ------
    ValueError, TypeError
        For arguments out of range or of the wrong kind, and an f that returns the wrong shape.
    ConvergenceError
        For samples that do not converge, depending on ``on_failure``; in the backward pass, if the derivative of
        such a sample is needed, or of one with a singular Jacobian.

    Examples
    --------
    >>> a = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    >>> z = fixed_point(lambda z, a: torch.cos(a * z), torch.tensor([0.5], dtype=torch.float64), args=(a,))
    >>> z.sum().backward()
    >>> a.grad
    tensor([-0.3242], dtype=torch.float64)
    """
    return _solve(equations.fixed_point, f, z0, args, batched, solver, vectorized, scale, on_failure, device)


def root(
    f: Function,
    z0: Tensor,
    *,
    args: Sequence[Tensor] = (),
    batched: str | int | Iterable[str | int] = (),
    solver: SolverLike = Auto(),
    vectorized: bool = False,
    scale: Tensor | None = None,
    on_failure: OnFailure = "raise",
    device: str = "cpu",
) -> Tensor:
    """The solution of ``f(z, *args) = 0`` with f written in PyTorch or Julia, differentiable in the arguments.

    Parameters
    ----------
    f, z0, args, batched, solver, vectorized, scale, on_failure, device
        As for ``fixed_point``, except that f (n,) is to be zero, and ``solver`` is one of ``implicit_rnn.root``.

    Returns
    -------
    The solution, of the shape of z0.

    Raises
    ------
    ValueError, TypeError, ConvergenceError
        As ``fixed_point``.

    Examples
    --------
    >>> a = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    >>> z = root(lambda z, a: z**2 - a, torch.ones(1, dtype=torch.float64), args=(a,))
    >>> z.sum().backward()
    >>> print(f"{z.item():.6f} {a.grad.item():.6f}")
    1.414214 0.353553
    """
    return _solve(equations.root, f, z0, args, batched, solver, vectorized, scale, on_failure, device)


_IN_FULL = partial(torch.autocast, "cpu", enabled=False)
"""Disables ``autocast``: only in the precision of the start can an equation be solved to its tolerance."""


class _Conditions:
    """The conditions c(z, args) = 0 of a batch: f(z) - z, or f(z) for a root, and their Jacobians."""

    def __init__(self, f: Callable[..., Tensor], batched: Sequence[bool], vectorized: bool, root: bool) -> None:
        self.f = f if vectorized else torch.func.vmap(f, in_dims=(0, *(0 if each else None for each in batched)))
        self.batched = batched
        self.root = root

    def values(self, z: Tensor, *args: Tensor) -> Tensor:
        """c (m, n), in the precision of z, whatever the precision of values that f closes over."""
        f = self.f(z, *args).to(z.dtype)
        return f if self.root else f - z

    def jacobians(self, z: Tensor, *args: Tensor) -> Tensor:
        """∂f/∂z (m, n, n), as a function that can be differentiated."""
        try:
            values, pull = torch.func.vjp(lambda z: self.f(z, *args), z)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise RuntimeError(
                "an equation cannot be solved within saved_tensors_hooks or save_on_cpu, with which torch.func does not work: "
                "leave it outside them, and let torch.utils.checkpoint have use_reentrant=True"
            ) from error
        units = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        return torch.func.vmap(lambda unit: pull(unit.expand_as(values))[0], out_dims=1)(units)

    def derivatives(self, z: Tensor, *args: Tensor) -> Tensor:
        """∂c/∂z (m, n, n)."""
        jacobians = self.jacobians(z, *args)
        return jacobians if self.root else jacobians - torch.eye(z.shape[1], dtype=z.dtype, device=z.device)

    def terms_of_arguments(self, z: Tensor, args: Sequence[Tensor], c: Tensor) -> Tensor:
        """The largest (m, n) of the terms of c due to each floating-point argument, whose rounding errors c inherits."""
        perturbation, terms = 2.0**-10, torch.zeros_like(c)
        for k, x in enumerate(args):
            if x.is_floating_point():
                moved = (self.values(z, *args[:k], x + perturbation * x, *args[k + 1 :]) - c).abs() / perturbation
                terms = torch.fmax(terms, torch.where(moved.isfinite(), moved, 0))
        return terms

    @torch.no_grad()
    def equilibrated(self, z: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scales for the rows (m, n, 1) and columns (m, 1, n) of A = ∂c/∂z that equilibrate it, and where it is regular (m,).

        A is regular if it has an inverse and changes little within the error of the solution z, relative to A.
        """
        A, c = self.derivatives(z, *args), self.values(z, *args)
        left, right = (torch.from_numpy(scales) for scales in equilibration(A.numpy()))
        doubt = torch.finfo(z.dtype).eps * self.terms_of_arguments(z, args, c)
        scaled, doubtful = left * A * right, left * (c + torch.copysign(doubt, c))[..., None]
        error, info = torch.linalg.solve_ex(scaled, doubtful)
        nearby = self.derivatives(z - (right.mT * error)[..., 0], *args)
        change = torch.linalg.solve_ex(scaled, left * (nearby - A) * right)[0]
        return left, right, (info == 0) & (change.abs().sum(1).amax(1) <= LARGEST_CHANGE)


class _Solution(_InReverseMode):
    """(solve, conditions, start, *arguments) -> the solutions (B, n)."""

    @staticmethod
    def forward(ctx: Any, solve: Callable[..., Any], conditions: _Conditions, start: Tensor, *args: Tensor) -> Tensor:
        solution = solve(*map(_numpy, (start, *args)))
        z = _tensor(solution.state)
        ctx.conditions, ctx.solution = conditions, solution
        ctx.save_for_backward(z, *args)
        return z

    @staticmethod
    @_of_one_cotangent
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        z, *args = ctx.saved_tensors
        has_cotangent = _numpy(v).any(axis=1)
        failed = has_cotangent & ~ctx.solution.converged
        if failed.any():
            raise ConvergenceError(
                f"{failed.sum()} of {len(failed)} samples did not converge (first sample {failed.argmax()}) and have no "
                "derivative; leave them out of what is differentiated",
                ctx.solution,
            )
        wanted = [k for k, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        # Second derivatives are with respect to the saved z and to v, which then matters even where it is zero.
        rows = torch.from_numpy(ctx.solution.converged if torch.is_grad_enabled() else has_cotangent)
        if not wanted or not rows.any():  # f may not accept an empty batch
            return None, None, None, *(torch.zeros_like(arg) if k in wanted else None for k, arg in enumerate(args))
        z = z[rows]

        def given(*changed: Tensor) -> list[Tensor]:
            full = dict(enumerate(args)) | dict(zip(wanted, changed, strict=False))
            return [full[k][rows] if each else full[k] for k, each in enumerate(ctx.conditions.batched)]

        with _IN_FULL():
            left, right, regular = ctx.conditions.equilibrated(z, *given())
            if (bad := ~regular).any():
                where = rows.nonzero()[bad].ravel().tolist()
                raise ConvergenceError(
                    f"the Jacobian of the equation is singular at the solution of {named_samples(where)}, or so nearly that its "
                    "error decides: there the solution has no derivative",
                    ctx.solution,
                )
            scaled = left * ctx.conditions.derivatives(z, *given()) * right
            λ = (left * torch.linalg.solve(scaled.mT, right.mT * v[rows][..., None]))[..., 0]
            _, pull = torch.func.vjp(
                lambda *changed: ctx.conditions.values(z, *given(*changed)), *(args[k] for k in wanted)
            )
            found = dict(zip(wanted, pull(-λ), strict=True))
        return None, None, None, *(found.get(k) for k in range(len(args)))


class _JuliaSolution(_InReverseMode):
    """(solve, device, start, *arguments) -> the solution of an equation in Julia code."""

    @staticmethod
    def forward(ctx: Any, solve: Callable[..., Any], device: str, start: Tensor, *args: Tensor) -> Tensor:
        ctx.solution, ctx.device = solve(start, *args), device
        z = _tensor(ctx.solution.value)
        ctx.save_for_backward(z, *args)
        return z

    @staticmethod
    @_of_one_cotangent
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        _, *args = ctx.saved_tensors  # the first detects changes of the solution in place
        return None, None, None, *_JuliaPullback.apply(ctx.solution, ctx.device, v, *args)


class _JuliaPullback(torch.autograd.Function):
    """(solution, device, cotangent, *arguments) -> the cotangents of the arguments, None for integers."""

    @staticmethod
    def forward(
        ctx: Any, solution: equations.ImplicitSolution, device: str, v: Tensor, *args: Tensor
    ) -> tuple[Tensor | None, ...]:
        products = solution.vjp(_to_engine(v, device))
        found = zip(map(products.get, solution.names), args, strict=True)
        return tuple(None if product is None else _tensor(product).to(arg.device) for product, arg in found)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "an equation in Julia code has first derivatives only, and this differentiates its gradient again "
            "(create_graph=True); write f in PyTorch"
        )


@torch.compiler.disable
def _solve(
    pose: Callable[..., equations.ImplicitSolution],
    f: Function,
    z0: Tensor,
    args: Sequence[Tensor],
    batched: str | int | Iterable[str | int],
    solver: SolverLike,
    vectorized: bool,
    scale: Tensor | None,
    on_failure: OnFailure,
    device: str,
) -> Tensor:
    if not isinstance(f, JuliaFunction) and not callable(f):
        raise TypeError(f"f is {f!r}; expected a function of tensors, or irnn.julia(text)")
    check_device_for(f, device)
    _refuse_tracing()
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "a solution cannot be taken through the transforms of torch.func (vmap, grad, jacrev): solve many problems as a "
            "batch with batched=, and differentiate by backward() or torch.autograd.grad"
        )
    _check_start(z0)
    tensors = [_argument(f"args[{k}]", arg) for k, arg in enumerate(check_arguments(args))]
    _check_place("z0", z0, device)
    for k, tensor in enumerate(tensors):
        _check_place(f"args[{k}]", tensor, device)
    floats = [tensor.to(z0.dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
    settings: dict[str, Any] = {
        "solver": solver,
        "scale": None if scale is None else _numpy(_argument("scale", scale).cpu()),
        "on_failure": on_failure,
    }
    if isinstance(f, JuliaFunction):

        def solve_julia(start: Tensor, *args: Tensor) -> equations.ImplicitSolution:
            given = [_to_engine(arg, device) if arg.is_floating_point() else _numpy(arg.cpu()) for arg in args]
            return pose(
                f,
                _to_engine(start, device),
                args=given,
                batched=batched,
                vectorized=vectorized,
                device=device,
                **settings,
            )

        return _JuliaSolution.apply(solve_julia, device, z0, *floats)

    per_sample = positions(batched, argument_names(f, len(tensors)))
    one = f if vectorized or z0.ndim else _of_number(f)
    conditions = _Conditions(one, [k in per_sample for k in range(len(tensors))], vectorized, pose is equations.root)

    def solve(start: np.ndarray, *arrays: np.ndarray) -> equations.ImplicitSolution:
        return pose(
            _on_arrays(conditions.f),
            start,
            args=arrays,
            batched=sorted(per_sample),
            vectorized=True,
            jac=_on_arrays(conditions.jacobians),
            **settings,
        )

    start = torch.atleast_2d(z0)
    solution = _Solution.apply(solve, conditions, start, *floats)
    _warn_of_lost_gradients(conditions, start, floats)
    return solution.reshape(z0.shape)


def _check_start(z0: Tensor) -> None:
    if not isinstance(z0, Tensor):
        raise TypeError(f"z0 is a {type(z0).__name__}; expected a tensor (), (n,) or (B, n) of float32 or float64")
    shape = tuple(z0.shape)
    if z0.dtype not in (torch.float32, torch.float64) or z0.ndim > 2:
        raise TypeError(
            f"z0 has shape {shape} and dtype {z0.dtype}; expected a tensor (), (n,) or (B, n) of float32 or float64"
        )
    if not z0.numel():
        raise ValueError(f"z0 has shape {shape}; expected (n,) or (B, n), none of them 0")


def _of_number(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f of a number as a function of z (1,)."""

    @wraps(f)
    def g(z: Tensor, *args: Tensor) -> Tensor:
        value = _returned(f(z[0], *args))
        if value.shape not in ((), (1,)):
            raise ValueError(f"f returned a tensor of shape {tuple(value.shape)}; expected a number, as z is one")
        return value.reshape(1)

    return g


def _check_place(name: str, tensor: Tensor, device: str) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has the layout {tensor.layout}; expected a dense tensor: pass {name}.to_dense()")
    if tensor.device.type != "cpu" and not is_on_device(tensor, device):
        raise TypeError(
            f"{name} is on {tensor.device}, and the equation is solved on {device!r}: pass {name}.cpu(); or, on an "
            "NVIDIA card, Julia code for f with device='cuda'"
        )


def _warn_of_lost_gradients(conditions: _Conditions, start: Tensor, args: Sequence[Tensor]) -> None:
    """Warn if f depends on tensors that require gradients but are not among its arguments; they get no gradients."""
    if not torch.is_grad_enabled():
        return
    value = conditions.f(*(tensor.detach().clone() for tensor in (start, *args)))
    if isinstance(value, Tensor) and value.requires_grad:
        warn(
            "f uses tensors that require gradients and are not among args, such as parameters of a module: they will get none. "
            "Pass them in args, f(z, *args), or detach() them",
            UserWarning,
        )


def _argument(name: str, value: Any) -> Tensor:
    try:
        return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor or a number") from error


def _on_arrays(f: Callable[..., Tensor]) -> Callable[..., np.ndarray]:
    """The function of tensors as a function of arrays, see ``_tensor``."""

    @wraps(f)  # whose names of arguments messages give
    @torch.no_grad()
    @_IN_FULL()
    def g(*arrays: np.ndarray) -> np.ndarray:
        return _returned(f(*map(_tensor, arrays))).resolve_neg().numpy()

    return g


def _returned(value: object) -> Tensor:
    """What f returned, which must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"f returned a {type(value).__name__}; expected a tensor")
    return value
