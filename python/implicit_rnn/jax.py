"""Networks as JAX functions, and fixed points and roots of functions written in JAX, with exact gradients.

The engines are called via host memory; compiled code calls networks, and equations in Julia code, by
``jax.pure_callback``.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, get_args

import numpy as np

from implicit_rnn import equations
from implicit_rnn.engines import check_engine
from implicit_rnn.engines.base import LARGEST_CHANGE, Of
from implicit_rnn.engines.numpy.operators import SWEEPS
from implicit_rnn.engines.numpy.roots import EQUAL_TERMS
from implicit_rnn.engines.numpy.sizes import SLOW
from implicit_rnn.engines.numpy.solvers import decreases
from implicit_rnn.equations import Function, JuliaFunction
from implicit_rnn.equations.functions import argument_names
from implicit_rnn.equations.posing import check_arguments, positions
from implicit_rnn.equations.solving import check_device_for, choose_solver, engine_for, suggest_batched
from implicit_rnn.network import Network
from implicit_rnn.options import OnFailure, check_choice, check_on_failure, choose
from implicit_rnn.solvers import AdjointLike, Auto, Implicit, Solver, SolverLike, at_equilibrium, tolerance

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError(f"implicit_rnn.jax needs JAX ({error}): pip install 'implicit-rnn[jax]'") from error
if jax.__version_info__ < (0, 4, 35):  # older versions cannot map callbacks
    raise ImportError(f"implicit_rnn.jax needs JAX 0.4.35 or newer, and this is {jax.__version__}: pip install -U jax")

__all__ = ["fixed_point", "function", "parameters", "root"]

Array = np.ndarray
Parameters = dict[str, Any]


# --- networks ------------------------------------------------------------------------------------------------


def parameters(net: Network) -> Parameters:
    """The parameters of a network as a pytree: arrays by the names of ``Network.weights``, copied.

    Parameters
    ----------
    net
        The network.

    Raises
    ------
    TypeError
        For a float64 network where JAX has no 64-bit numbers.

    Examples
    --------
    >>> net = irnn.Network(inputs=2, layers=[8], outputs=1, dtype="float32", seed=0)
    >>> {name: w.shape for name, w in parameters(net).items()}
    {'W': (8, 2), 'R': (8, 8), 'b': (8,), 'a': (8,), 'C': (1, 8), 'd': (1,)}
    """
    _check_precision(net.dtype)
    return {name: jnp.array(weights) for name, weights in net.weights.items()}


def function(
    net: Network,
    *,
    of: Of = "outputs",
    solver: SolverLike = Auto(),
    adjoint: AdjointLike = Implicit(),
    on_failure: OnFailure = "raise",
) -> Callable[[Parameters, Any], jax.Array]:
    """The network as a pure function ``(parameters, X) -> outputs``.

    It has first derivatives by the implicit function theorem with respect to both, and works under ``jit``, ``grad``,
    ``jvp`` and ``vmap``, over parameters, over X or over both: samples that share their parameters are solved in one call.

    Parameters
    ----------
    net
        Provides the topology and the engine; its own parameters, which ``parameters(net)`` returns, are not used.
    of
        "outputs" for the outputs of the network, "state" for the equilibrium of all neurons.
    solver, adjoint, on_failure
        As in ``Network.equilibrium`` and ``Network.vjp``. Errors under ``jit``, ``vmap`` and ``grad`` arrive as a
        ``jax.errors.JaxRuntimeError`` with the message of the ``ConvergenceError``.

    Returns
    -------
    A function of a pytree as made by ``parameters`` and of X (..., inputs), whose value is (..., outputs) or (..., N), all of
    the dtype of the network.

    Raises
    ------
    TypeError
        If ``net`` is not a ``Network``, and for a float64 network where JAX has no 64-bit numbers; in a call, for
        parameters or inputs of another dtype, and for second derivatives.
    ValueError
        For invalid settings; in a call, for parameters or inputs of the wrong shape, or with NaN or infinity.
    ConvergenceError
        In a call, for samples without equilibrium, depending on ``on_failure``.

    Examples
    --------
    >>> net = irnn.Network(inputs=2, layers=[8], outputs=1, dtype="float32", seed=0)
    >>> f, p = function(net), parameters(net)
    >>> gradient = jax.jit(jax.grad(lambda p, X: (f(p, X) ** 2).mean()))(p, jnp.ones((5, 2), "float32"))
    >>> gradient["R"].shape
    (8, 8)
    """
    if not isinstance(net, Network):
        raise TypeError(f"net is {net!r}; expected a Network")
    check_choice("of", of, get_args(Of))
    _check_precision(net.dtype)
    check_on_failure(on_failure)
    host = _Host(net, of, choose(Solver, solver, "solver"), at_equilibrium(adjoint), on_failure)

    solve, push = _of_first_order(host.solve, _OF_A_NETWORK), jax.jit(host.push)

    @jax.custom_jvp
    def call(p: jax.Array, x: jax.Array) -> jax.Array:
        return solve(p, x)[0]

    @call.defjvp
    def derivative(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        y, state = solve(*primals)
        return y, push((*primals, state), *tangents)

    shapes = {name: weights.shape for name, weights in net.weights.items()}

    def apply(parameters: Parameters, X: Any) -> jax.Array:
        _check_precision(net.dtype)  # checked again, as it can be switched off
        if not isinstance(parameters, dict):
            raise TypeError(
                f"the parameters are a {type(parameters).__name__}; expected a dictionary as from parameters(net)"
            )
        found = {name: np.shape(weights) for name, weights in parameters.items()}
        if found != shapes:
            raise ValueError(f"the parameters have the shapes {found}; expected {shapes}")
        x, weights = jnp.asarray(X), {name: jnp.asarray(parameters[name]) for name in shapes}
        for name, array in (("X", x), *weights.items()):
            if array.dtype != net.dtype:
                raise TypeError(
                    f"{name} has dtype {array.dtype}, but the network has {net.dtype}; convert it, .astype({net.dtype.name!r})"
                )
        if x.ndim == 0 or x.shape[-1] != net.topology.inputs:
            raise ValueError(f"X has shape {x.shape}; expected (..., {net.topology.inputs})")
        flat = jnp.concatenate([jnp.ravel(each.T) for each in weights.values()])  # blocks are stored column by column
        rows = x.reshape(-1, x.shape[-1])
        _ = net.engine  # started here: compiled code may call from another thread, in which Julia cannot start
        y = call(flat, rows) if _are_traced(flat, rows) else host.outputs(flat, rows)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return apply


_OF_A_NETWORK = (
    "a network has first derivatives only in JAX, and this differentiates them again; Network.hessian_vector_product gives "
    "exact products with the Hessian of a loss"
)


def _of_first_order(function: Callable[..., Any], message: str) -> Callable[..., Any]:
    """The function, which refuses to be differentiated, since it is already part of a derivative."""
    guarded = jax.custom_jvp(function)

    @guarded.defjvp
    def refuse(*_: Any) -> None:
        raise TypeError(message)

    return guarded


class _Host:
    """The part outside JAX: a private network, for parameters p (P,) that come with the call, one call at a time."""

    def __init__(self, net: Network, of: Of, solver: SolverLike, adjoint: AdjointLike, on_failure: OnFailure) -> None:
        self._net = copy.copy(net)
        self._of, self._solver, self._adjoint, self._on_failure = of, solver, adjoint, on_failure
        self._lock = threading.Lock()
        topology = net.topology
        self._sizes = (topology.neurons if of == "state" else topology.output_size, topology.neurons)

    def solve(self, p: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The outputs (B, outputs) and the states (B, N) for x (B, inputs)."""
        shapes = tuple(jax.ShapeDtypeStruct((len(x), size), self._net.dtype) for size in self._sizes)
        y, state = jax.pure_callback(self._solve, shapes, p, x, vmap_method="expand_dims")
        return y, state

    def push(self, kept: tuple[jax.Array, ...], dp: jax.Array, dx: jax.Array) -> jax.Array:
        """The tangent (B, outputs) at p, x and the states, as a linear function of dp and dx whose transpose JAX knows.

        It is the last part of the solution of ``dp = a, dx = b, dy - J (dp, dx) = 0``, since JAX has no other linear function
        that has its own transpose and can be mapped. The matrix matters only for second derivatives, which are refused.
        """
        like = partial(jax.ShapeDtypeStruct, dtype=self._net.dtype)
        p, x, _ = kept
        ends, rows = [p.size, p.size + x.size], (len(x), self._sizes[0])

        def solve(_: Any, u: jax.Array) -> jax.Array:
            dp, dx, _ = jnp.split(u, ends)
            dy = jax.pure_callback(self._push, like(rows), *kept, dp, dx.reshape(x.shape), vmap_method="expand_dims")
            return u.at[ends[1] :].add(dy.ravel())

        def solve_transposed(_: Any, u: jax.Array) -> jax.Array:
            v, shapes = u[ends[1] :].reshape(rows), (like(p.shape), like(x.shape))
            parts = jax.pure_callback(self._pull_back, shapes, *kept, v, vmap_method="expand_dims")
            return u.at[: ends[1]].add(jnp.concatenate([part.ravel() for part in parts]))

        u = jnp.concatenate([dp, dx.ravel(), jnp.zeros(rows, dp.dtype).ravel()])
        solution: jax.Array = jax.lax.custom_linear_solve(lambda u: u, u, solve, solve_transposed)
        return solution[ends[1] :].reshape(rows)

    def _solve(self, p: Array, x: Array) -> tuple[Array, ...]:
        if p.size == p.shape[-1]:  # vmap over x alone: one network for all samples
            y, state = self._solve_one(np.reshape(p, -1), np.reshape(x, (-1, x.shape[-1])))
            return tuple(array.reshape(*x.shape[:-1], -1) for array in (y, state))
        return _each(self._solve_one, (p, 1), (x, 2))

    def _push(self, p: Array, x: Array, state: Array, dp: Array, dx: Array) -> Array:
        return _each(self._push_one, (p, 1), (x, 2), (state, 2), (dp, 1), (dx, 2))[0]

    def _pull_back(self, p: Array, x: Array, state: Array, v: Array) -> tuple[Array, ...]:
        return _each(self._pull_back_one, (p, 1), (x, 2), (state, 2), (v, 2))

    def outputs(self, p: jax.Array, x: jax.Array) -> jax.Array:
        """The outputs (B, outputs) for concrete p (P,) and x (B, inputs), with errors raised directly."""
        return jnp.asarray(self._solve_one(np.asarray(p), np.asarray(x))[0])

    def _solve_one(self, p: Array, x: Array) -> tuple[Array, Array]:
        if not len(x):
            y, state = (np.empty((0, size), self._net.dtype) for size in self._sizes)
            return y, state
        with self._lock:
            self._net.parameters = p
            state = self._net.equilibrium(x, solver=self._solver, on_failure=self._on_failure).state
            return (state if self._of == "state" else self._net.read_out(state)), state

    def _push_one(self, p: Array, x: Array, state: Array, dp: Array, dx: Array) -> tuple[Array]:
        if not len(x):
            return (np.empty((0, self._sizes[0]), self._net.dtype),)
        with self._at(p, state) as settings:
            return (self._net.jvp(x, dx, dp, **settings),)

    def _pull_back_one(self, p: Array, x: Array, state: Array, v: Array) -> tuple[Array, Array]:
        if not len(x):
            return np.zeros_like(p), np.zeros_like(x)
        if not (counts := v.any(axis=1)).all():  # one without equilibrium would make the gradient NaN
            gradient, part = self._pull_back_one(p, x[counts], state[counts], v[counts])
            dx = np.zeros_like(x)
            dx[counts] = part
            return gradient, dx
        with self._at(p, state) as settings:
            return self._net.vjp(x, v, **settings)

    @contextmanager
    def _at(self, p: Array, state: Array) -> Iterator[dict[str, Any]]:
        """The network with the parameters p, and the settings of its derivatives at the states."""
        with self._lock:
            self._net.parameters = p
            yield {
                "of": self._of,
                "z0": np.nan_to_num(state, nan=0, posinf=0, neginf=0),
                "solver": self._solver,
                "adjoint": self._adjoint,
                "on_failure": self._on_failure,
            }


def _each(function: Callable[..., tuple[Array, ...]], *arrays: tuple[Any, int]) -> tuple[Array, ...]:
    """The function of arrays with that many axes each, looped over leading axes from vmap, of size 1 where nothing is mapped."""
    whole = [(np.asarray(array), axes) for array, axes in arrays]
    lead = np.broadcast_shapes(*(array.shape[: array.ndim - axes] for array, axes in whole))
    views = [np.broadcast_to(array, lead + array.shape[array.ndim - axes :]) for array, axes in whole]
    results = [function(*(view[index] for view in views)) for index in np.ndindex(*lead)]
    return tuple(np.reshape(np.stack(parts), lead + parts[0].shape) for parts in zip(*results, strict=True))


def _are_traced(*arrays: Any) -> bool:
    """Whether JAX is transforming or compiling operations on these arrays."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def _check_precision(dtype: np.dtype) -> None:
    if dtype == np.float64 and not jax.config.jax_enable_x64:
        raise TypeError(
            "the network has dtype float64, and JAX has no 64-bit numbers here: jax.config.update('jax_enable_x64', True), or "
            "Network(..., dtype='float32')"
        )


# --- equations -----------------------------------------------------------------------------------------------


def fixed_point(
    f: Function,
    z0: Any,
    *,
    args: Sequence[Any] = (),
    batched: str | int | Iterable[str | int] = (),
    solver: SolverLike = Auto(),
    on_failure: OnFailure = "raise",
    device: str = "cpu",
) -> jax.Array:
    """The solution of ``z = f(z, *args)`` with f written in JAX, differentiable in the arguments, any number of times.

    It is also differentiable in values that f closes over. With f in Julia code it is differentiable once.

    Every sample is solved on its own, as by ``implicit_rnn.fixed_point``, with the derivatives of f from JAX. Derivatives of
    the solution come from the implicit function theorem, ``∂z/∂args = -(∂c/∂z)⁻¹ ∂c/∂args`` with c = f(z) - z, in forward and
    in reverse mode. They are NaN where ∂c/∂z is singular, and for samples that have not converged; with a cotangent of zero such
    samples do not affect the gradient of shared arguments. Under ``jit`` and ``vmap``, where nothing outside JAX may call f, the
    iteration is a damped Newton method within JAX, with the same criterion; samples that do not converge are NaN there, and
    ``solver`` only provides the tolerance and the largest number of iterations. This method also finds fixed points that Picard
    iteration would move away from.

    Julia code is also called from compiled code; an error there is raised by JAX, with the message of the engine. Where ∂c/∂z is
    singular its derivatives are an error.

    Parameters
    ----------
    f
        A function of arrays, given one sample z (n,) and returning (n,); it is mapped over a batch by ``jax.vmap``. Or Julia
        code, ``implicit_rnn.julia(text)``.
    z0
        The start: (n,), float32 or float64; a number for one unknown, in which case f is given a number and may return one;
        or (B, n) for a batch.
    args
        The further arguments of f: arrays, numbers, and pytrees of them; for Julia code arrays and numbers.
    batched
        As in ``implicit_rnn.fixed_point``; in a pytree each leaf has an axis of samples.
    solver, on_failure
        As in ``implicit_rnn.fixed_point``.
    device
        Where Julia code runs: "cpu", or "cuda" for an NVIDIA card, to which the arrays are copied via host memory,
        wherever JAX has them.

    Returns
    -------
    The solution, of the shape of z0.

    Raises
    ------
    ValueError, TypeError
        For arguments out of range or of the wrong kind, and an f that returns the wrong shape.
    ConvergenceError
        For samples that do not converge, depending on ``on_failure``; not under ``jit`` and ``vmap``.

    Examples
    --------
    >>> z = lambda a: fixed_point(lambda z, a: jnp.cos(a * z), jnp.array([0.5]), args=(a,))[0]
    >>> print(f"{jax.jit(jax.grad(z))(0.8):.4f}")
    -0.3242
    """
    return _solve(equations.fixed_point, f, z0, args, batched, solver, on_failure, device)


def root(
    f: Function,
    z0: Any,
    *,
    args: Sequence[Any] = (),
    batched: str | int | Iterable[str | int] = (),
    solver: SolverLike = Auto(),
    on_failure: OnFailure = "raise",
    device: str = "cpu",
) -> jax.Array:
    """The solution of ``f(z, *args) = 0`` with f written in JAX, differentiable in the arguments, any number of times.

    Or with f in Julia code, differentiable once.

    Parameters
    ----------
    f, z0, args, batched, solver, on_failure, device
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
    >>> z = lambda a: root(lambda z, a: z**2 - a, jnp.ones(1), args=(a,))[0]
    >>> print(f"{z(2.0):.4f} {jax.grad(z)(2.0):.4f} {jax.grad(jax.grad(z))(2.0):.4f}")
    1.4142 0.3536 -0.0884
    """
    return _solve(equations.root, f, z0, args, batched, solver, on_failure, device)


def _solve(
    pose: Callable[..., equations.ImplicitSolution],
    f: Function,
    z0: Any,
    args: Sequence[Any],
    batched: str | int | Iterable[str | int],
    solver: SolverLike,
    on_failure: OnFailure,
    device: str,
) -> jax.Array:
    if not isinstance(f, JuliaFunction) and not callable(f):
        raise TypeError(f"f is {f!r}; expected a function of arrays, or irnn.julia(text)")
    check_device_for(f, device)
    start = _start(z0)
    batch = jnp.atleast_2d(start)
    check_on_failure(on_failure)
    chosen = choose_solver(solver, pose is equations.root)
    given = tuple(check_arguments(args))
    whole = isinstance(f, JuliaFunction)
    paths, tree = jax.tree_util.tree_flatten_with_path(given, lambda part: whole and part is not given)
    names = [f"args{jax.tree_util.keystr(path)}" for path, _ in paths]
    arrays = [_argument(name, leaf) for name, (_, leaf) in zip(names, paths, strict=True)]
    arrays = [array.astype(start.dtype) if jnp.issubdtype(array.dtype, np.floating) else array for array in arrays]
    of_f = argument_names(f, len(given))
    own = positions(batched, of_f)
    per_sample = {k for k, (path, _) in enumerate(paths) if path[0].idx in own}
    for k in per_sample:
        if not arrays[k].ndim or len(arrays[k]) != len(batch):
            raise ValueError(
                f"{names[k]} has shape {arrays[k].shape}; expected ({len(batch)}, ...), as z0 has {len(batch)} samples"
            )
    if isinstance(f, JuliaFunction):
        engine_for(f, check_engine(None))  # started here, too
        in_julia = _JuliaProblem(pose, f, sorted(per_sample), chosen, on_failure, device)
        return _julia_solution(in_julia, batch, arrays).reshape(start.shape)
    sample = [batch[0], *(array[0] if k in per_sample else array for k, array in enumerate(arrays))]
    equation = _of_leaves(f, tree) if start.ndim else _of_number(_of_leaves(f, tree))
    try:
        _check_value(equation, sample, start.ndim == 0)
    except (TypeError, ValueError) as error:
        if isinstance(error, jax.errors.JAXTypeError):  # of a tracer, whose shape it tells in any case
            raise
        places = [path[0].idx for path, _ in paths]
        shapes = {of_f[k]: array.shape for k, array in zip(places, arrays, strict=True) if k not in own}
        suggest_batched(error, len(batch) if start.ndim == 2 else 1, shapes)
        raise
    f, held, traced = _hoist(lambda z, *leaves: equation(z, *leaves).astype(z.dtype), sample)
    axes = (0, *(0 if k in per_sample else None for k in range(len(arrays))), *(None for _ in held))
    F, J = jax.vmap(f, axes), jax.vmap(jax.jacfwd(f), axes)
    problem = _Problem(pose, F, J, sorted(per_sample), chosen, on_failure, traced)
    return _solution(problem, batch, [*arrays, *held]).reshape(start.shape)


def _start(z0: Any) -> jax.Array:
    try:
        start = jnp.asarray(z0)
    except (TypeError, ValueError) as error:
        raise TypeError(f"z0 is a {type(z0).__name__}; expected one array, (n,) or (B, n)") from error
    if start.ndim > 2 or start.dtype not in (np.float32, np.float64):
        raise TypeError(
            f"z0 has shape {start.shape} and dtype {start.dtype}; expected a number, (n,) or (B, n) of float32 or float64"
        )
    if not start.size:
        raise ValueError(f"z0 has shape {start.shape}; expected (n,) or (B, n), none of them 0")
    return jnp.asarray(start, start.dtype)  # numbers of Python have a weak type, which would change on the way


def _argument(name: str, value: Any) -> jax.Array:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number or an array of numbers") from error
    except OverflowError:
        cut = True
    else:  # JAX silently truncates NumPy arrays
        whole = isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "iu"
        cut = whole and bool((value.astype(array.dtype) != value).any())
    if cut:
        raise ValueError(
            f"{name} has whole numbers beyond those that JAX has here; pass floats, or "
            "jax.config.update('jax_enable_x64', True)"
        )
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name} is a random key of dtype {array.dtype}; pass its numbers, jax.random.key_data({name})")
    return array


def _of_leaves(f: Callable[..., jax.Array], tree: Any) -> Callable[..., jax.Array]:
    """f as a function of z and the leaves of its arguments."""
    return wraps(f)(lambda z, *leaves: f(z, *jax.tree.unflatten(tree, leaves)))  # JAX names the f of the user in errors


def _of_number(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """f of a number, and of leaves, as a function of z (1,)."""
    return wraps(f)(lambda z, *leaves: jax.tree.map(jnp.atleast_1d, f(z[0], *leaves)))


def _check_value(f: Callable[..., jax.Array], sample: Sequence[jax.Array], number: bool) -> None:
    """Errors unless f of z and the arguments of one sample is like z, or if z is a number, one, too."""
    z, found = sample[0], jax.eval_shape(f, *sample)
    if not isinstance(found, jax.ShapeDtypeStruct) or not jnp.issubdtype(found.dtype, np.floating):
        raise TypeError(f"f returned {found}; expected an array of {z.dtype}")
    if found.shape != z.shape:
        expected = "a number, as z is one" if number else f"{z.shape}, the shape of one z"
        raise ValueError(f"f returned an array of shape {found.shape}; expected {expected}")


def _hoist(
    f: Callable[..., jax.Array], sample: Sequence[jax.Array]
) -> tuple[Callable[..., jax.Array], list[jax.Array], bool]:
    """f with its differentiable closed-over values as further arguments; these; and whether it closes over other tracers."""
    if not _closes_over_tracers(f, sample):
        return f, [], False
    converted, held = jax.closure_convert(f, *sample)
    return converted, list(held), _closes_over_tracers(converted, [*sample, *held])


def _closes_over_tracers(f: Callable[..., jax.Array], sample: Sequence[jax.Array]) -> bool:
    return _are_traced(*jax.make_jaxpr(f)(*sample).consts)


@dataclass(frozen=True, eq=False)
class _Problem:
    """An equation of a batch of samples: how it is posed and solved, with f and its Jacobian ∂f/∂z for all samples."""

    pose: Callable[..., equations.ImplicitSolution]
    f: Callable[..., jax.Array]
    jacobian: Callable[..., jax.Array]
    batched: list[int]
    solver: Solver
    on_failure: OnFailure
    traced: bool

    @property
    def root(self) -> bool:
        return self.pose is equations.root

    def conditions(self, z: jax.Array, args: Sequence[jax.Array]) -> jax.Array:
        """c (B, n), zero at the solution."""
        return self.f(z, *args) if self.root else self.f(z, *args) - z

    def derivatives(self, z: jax.Array, args: Sequence[jax.Array]) -> jax.Array:
        """∂c/∂z (B, n, n)."""
        J = self.jacobian(z, *args)
        return J if self.root else J - jnp.eye(z.shape[1], dtype=z.dtype)[None]

    def equilibrated(self, z: jax.Array, args: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scales for the rows (B, n, 1) and columns (B, 1, n) of A = ∂c/∂z that equilibrate it, and where it is regular (B, 1).

        A is regular if it has an inverse and changes little within the error of the solution z, relative to A.
        """
        A, c = self.derivatives(z, args), self.conditions(z, args)
        left, right = _equilibration(A)
        doubt = jnp.finfo(z.dtype).eps * self.terms_of_arguments(z, args, c)
        near = self.derivatives(z - _solved(A, c + jnp.copysign(doubt, c), left, right), args)
        change = jnp.linalg.solve(left * A * right, left * (near - A) * right)
        regular = (jnp.abs(change).sum(1).max(1) <= LARGEST_CHANGE)[:, None] & jnp.isfinite(z).all(1, keepdims=True)
        left, right = (jnp.where(regular[..., None], x, 1) for x in (left, right))
        return left, right, regular

    def terms_of_arguments(self, z: jax.Array, args: Sequence[jax.Array], c: jax.Array) -> jax.Array:
        """The largest (B, n) of the terms of c due to each floating-point argument, whose rounding errors c inherits."""
        perturbation, terms = 2.0**-10, jnp.zeros_like(c)
        for k, x in enumerate(args):
            if jnp.issubdtype(x.dtype, np.floating):
                moved = (
                    jnp.abs(self.conditions(z, [*args[:k], x + perturbation * x, *args[k + 1 :]]) - c) / perturbation
                )
                terms = jnp.fmax(terms, jnp.where(jnp.isfinite(moved), moved, 0))
        return terms


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solution(problem: _Problem, start: jax.Array, args: Sequence[jax.Array]) -> jax.Array:
    """The solutions (B, n)."""
    if problem.traced or _are_traced(start, *args):
        return _newton(problem, start, args)
    dtypes = [start.dtype, *(array.dtype for array in args)]
    solution = problem.pose(
        _on_arrays(problem.f, dtypes),
        np.asarray(start),
        args=[_real(np.asarray(array)) for array in args],
        batched=problem.batched,
        solver=problem.solver,
        vectorized=True,
        jac=_on_arrays(problem.jacobian, dtypes),
        on_failure=problem.on_failure,
    )
    return jnp.where(solution.converged[:, None], solution.state, np.nan)


@_solution.defjvp
def _derivative(problem: _Problem, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    start, args = jax.tree.map(jnp.asarray, primals)  # old versions of JAX leave Python numbers here
    z = _solution(problem, start, args)
    left, right, regular = problem.equilibrated(*jax.lax.stop_gradient((z, args)))
    # NaN would turn zero cotangents into NaN: in z, and in what f computes from it and from the arguments of its sample.
    at = _of_regular(jnp.where(jnp.isfinite(z), z, jax.lax.stop_gradient(start)), regular)
    args = [_of_regular(x, regular) if k in problem.batched else x for k, x in enumerate(args)]
    # Where no sample is regular, a sum passes on the NaN in place of f.
    some = jnp.any(regular)

    def known(args: Sequence[jax.Array]) -> list[jax.Array]:
        return [jnp.where(some, x, jax.lax.stop_gradient(x)) for x in args]

    def conditions(args: Sequence[jax.Array]) -> jax.Array:
        return jnp.where(some, problem.conditions(at, known(args)), sum(x.real.sum() for x in args)).astype(z.dtype)

    _, c = jax.jvp(conditions, (args,), (tangents[1],))
    A = jnp.where(regular[..., None], problem.derivatives(at, known(args)), jnp.eye(z.shape[1], dtype=z.dtype))
    return z, _where_regular(regular, -_solved(A, c, left, right))


def _of_regular(x: jax.Array, regular: jax.Array) -> jax.Array:
    """x (B, ...) with the first sample that is regular (B, 1) in place of those that are not."""
    return jnp.where(regular.reshape(-1, *(1,) * (x.ndim - 1)), x, jax.lax.stop_gradient(x)[jnp.argmax(regular)])


def _where_regular(regular: jax.Array, change: jax.Array) -> jax.Array:
    """The change (B, n) of the solutions, NaN for samples that are not regular (B, 1), whose cotangents become NaN, too.

    A cotangent of zero stays zero, so that a sample that was left out of a loss does not spoil the gradient of shared
    arguments. Its transpose therefore overflows before it multiplies by zero; a ``where`` would give zeros, a factor of NaN
    always NaN.
    """
    largest = jnp.where(regular, 1, jnp.finfo(change.dtype).max).astype(change.dtype)
    none = jnp.where(regular, 1, 0).astype(change.dtype)
    return change * none * largest * largest + jnp.where(regular, 0, np.nan).astype(change.dtype)


def _solved(A: jax.Array, b: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """A⁻¹ b (B, n) by left A right, which is equilibrated."""
    x: jax.Array = right[:, 0] * jnp.linalg.solve(left * A * right, left * b[..., None])[..., 0]
    return x


@jax.jit
def _equilibration(A: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As ``engines.numpy.operators.equilibration``."""
    exponents = jnp.where((A == 0) | ~jnp.isfinite(A), -jnp.inf, jnp.log2(jnp.abs(A)))
    left, right = jnp.zeros_like(A[:, :, :1]), jnp.zeros_like(A[:, :1])

    def sweep(_: Any, scales: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scaled = exponents + scales[0] + scales[1]
        largest = (scaled.max(axis=axis, keepdims=True) for axis in (2, 1))
        left, right = (x - jnp.where(jnp.isfinite(y), y, 0) / 2 for x, y in zip(scales, largest, strict=True))
        return left, right

    limits = jnp.finfo(A.dtype)
    left, right = jax.lax.fori_loop(0, SWEEPS, sweep, (left, right))
    left, right = (jnp.exp2(jnp.clip(jnp.round(x), limits.minexp, limits.maxexp - 1)) for x in (left, right))
    return left, right


def _on_arrays(f: Callable[..., jax.Array], dtypes: Sequence[np.dtype]) -> Callable[..., Array]:
    """The JAX function as a function of real NumPy arrays, compiled; its arguments have the dtypes they were given with."""
    compiled = jax.jit(f)

    def g(*arrays: Array) -> Array:
        given = [_of_real(array, d).astype(d, copy=False) for array, d in zip(arrays, dtypes, strict=True)]
        return np.asarray(compiled(*given))

    return g


def _real(x: Array) -> Array:
    """Complex numbers with a last axis of their two parts, which the solvers of equations take."""
    return np.stack([x.real, x.imag], axis=-1) if x.dtype.kind == "c" else x


def _of_real(x: Array, dtype: np.dtype) -> Array:
    return x[..., 0] + 1j * x[..., 1] if dtype.kind == "c" else x


def _newton(problem: _Problem, start: jax.Array, args: Sequence[jax.Array]) -> jax.Array:
    """Newton's method with steps that are halved until ‖c‖ shrinks; NaN for samples that do not converge.

    A sample has converged when its step is at most ``tol ‖z‖``; or at most ``eps L``, with L the largest ‖z‖ so far, and either
    no part of the step reduces ‖c‖, or it leads to z = 0, which is a root and then the solution. It must be at a root, not at a
    pole, an infinity or an infinite slope: either steps become smaller and ‖c‖ has halved, or ∂c/∂z is about the same two steps
    further, as where the start is a root to rounding. Where c is zero and ∂c/∂z singular, as where all terms of f underflow, the
    last steps must have been small.
    """
    eps = float(jnp.finfo(start.dtype).eps)
    tol = tolerance(problem.solver.tol, start.dtype)

    def norm(x: jax.Array) -> jax.Array:
        unit = jnp.abs(x).max(axis=1, keepdims=True)  # squares would overflow or underflow
        unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1)
        return unit[:, 0] * jnp.linalg.norm(x / unit, axis=1)

    def newton_step(A: jax.Array, c: jax.Array) -> jax.Array:
        return -jnp.linalg.solve(A, c[..., None])[..., 0]

    def sizes_of_terms(A: jax.Array, z: jax.Array, step: jax.Array) -> jax.Array:
        return (jnp.abs(A) * (jnp.abs(z) + jnp.abs(step))[:, None]).sum(2)

    def row_weights(terms: jax.Array) -> jax.Array:
        """Of conditions whose terms differ, as in engines.numpy.roots."""
        differ = (terms.max(1) > EQUAL_TERMS * terms.min(1)) & (terms.min(1) > 0) & jnp.isfinite(terms).all(1)
        return jnp.where(differ[:, None], 1 / terms, 1)

    def is_steady(z: jax.Array, c: jax.Array, step: jax.Array, weights: jax.Array) -> jax.Array:
        further = problem.derivatives(z + 2 * step + 8 * eps * z, args)
        return norm(weights * (jnp.einsum("bij,bj->bi", further, step) + c)) <= norm(weights * c) / 2

    def is_found(z: jax.Array, c: jax.Array, step: jax.Array, weights: jax.Array) -> jax.Array:
        """Whether it is rounding that keeps ‖c‖ from shrinking, rather than conditions that outweigh others."""
        terms = sizes_of_terms(problem.derivatives(z, args), z, step)
        of_terms = jnp.where(terms > 0, 1 / terms, 1)
        ahead = problem.conditions(z + step, args)
        return is_steady(z, c, step, weights) & ~(norm(ahead * of_terms) < norm(c * of_terms) / 1e3)

    def lingers(step: jax.Array, last: Any, largest: jax.Array) -> jax.Array:
        length = norm(step)
        return (length <= eps * largest) & ((length > SLOW * last) | (length <= eps**2 * largest))

    def vanishes(z: jax.Array) -> jax.Array:
        return (problem.conditions(jnp.zeros_like(z), args) == 0).all(axis=1)

    def is_done(
        z: jax.Array, c: jax.Array, step: jax.Array, last: Any, before: Any, largest: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """``last`` is the length of the previous step, and ``before`` the ‖c‖ there; both zero at the start."""
        length, merit = norm(step), norm(weights * c)
        near = length <= tol * norm(z)
        doubtful = near & (merit > 0) & ~((length < last) & (merit <= before / 2))
        steady = jax.lax.cond(jnp.any(doubtful), is_steady, lambda *_: jnp.zeros_like(near), z, c, step, weights)
        return (near & (~doubtful | steady)) | ((merit == 0) & (last <= eps * largest))

    def moves(z: jax.Array, step: jax.Array, share: jax.Array) -> jax.Array:
        return share * norm(step) > eps * norm(z)

    def advance(state: Any) -> Any:
        """Evaluate f at the end of a step; first at the start, with steps of zero."""
        z, c, step, share, largest, done, weights, count = state
        trial = z + share[:, None] * step
        c_trial = problem.conditions(trial, args)
        good = decreases(norm(weights * c_trial), norm(weights * c), share) & jnp.isfinite(norm(trial))
        better = (count == 0) | (good & moves(z, step, share) & ~done)
        z, c_new = (jnp.where(better[:, None], new, old) for new, old in ((trial, z), (c_trial, c)))
        A = problem.derivatives(z, args)
        step_new = jnp.where(better[:, None], newton_step(A, c_new), step)
        weights = jnp.where(count == 0, row_weights(sizes_of_terms(A, z, step_new)), weights)
        largest = jnp.maximum(largest, norm(z))
        last, before = norm(step), norm(weights * c)
        done = done | (better & is_done(z, c_new, step_new, last, before, largest, weights))
        lingering = (count > 0) & better & ~done & lingers(step_new, last, largest)
        zero = lingering & jax.lax.cond(jnp.any(lingering), vanishes, lambda _: lingering, z)
        step_new, done = jnp.where(zero[:, None], -z, step_new), done | zero
        return z, c_new, step_new, jnp.where(better, 1, share / 2), largest, done, weights, count + 1

    def goes_on(state: Any) -> jax.Array:
        z, _, step, share, _, done, _, count = state
        return (count == 0) | ((count < problem.solver.max_iterations) & jnp.any(moves(z, step, share) & ~done))

    none, largest = jnp.zeros_like(start), jnp.zeros_like(start[:, 0])
    first = (start, none, none, jnp.ones_like(largest), largest, largest > 0, jnp.ones_like(start), 0)
    z, c, step, share, largest, done, weights, _ = jax.lax.while_loop(goes_on, advance, first)
    stuck = ~done & ~moves(z, step, share) & (norm(step) <= eps * largest)
    done = done | (stuck & jax.lax.cond(jnp.any(stuck), is_found, lambda *_: stuck, z, c, step, weights))
    return jnp.where(done[:, None], z + jnp.where(jnp.isfinite(step), step, 0), np.nan)


# --- equations in Julia code -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _JuliaProblem:
    """An equation of a batch of samples, solved outside JAX for a start and arguments that come with the call."""

    pose: Callable[..., equations.ImplicitSolution]
    f: JuliaFunction
    batched: list[int]
    solver: Solver
    on_failure: OnFailure
    device: str

    def solution(self, start: Any, args: Sequence[Any]) -> equations.ImplicitSolution:
        return self.pose(
            self.f,
            np.asarray(start),
            args=[np.asarray(array) for array in args],
            batched=self.batched,
            solver=self.solver,
            on_failure=self.on_failure,
            device=self.device,
        )

    def values(self, start: Any, *args: Any) -> Array:
        """The solutions (B, n), NaN for samples that have not converged."""
        solution = self.solution(start, args)
        return np.where(solution.converged[:, None], solution.state, np.nan).astype(start.dtype)

    def jacobians(self, start: Any, *args: Any) -> list[Array]:
        """The derivatives (B, n, size) of the solutions with respect to each floating-point argument."""
        solution = self.solution(start, args)
        return [solution.jacobian(k) for k, array in enumerate(args) if array.dtype.kind == "f"]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _julia_solution(problem: _JuliaProblem, start: jax.Array, args: Sequence[jax.Array]) -> jax.Array:
    """The solutions (B, n)."""
    z: jax.Array = _outside(problem.values, jax.ShapeDtypeStruct(start.shape, start.dtype), start, *args)
    return z


@_julia_solution.defjvp
def _julia_derivative(problem: _JuliaProblem, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    start, args = primals
    floats = [k for k, array in enumerate(args) if array.dtype.kind == "f"]
    sizes = [args[k].size // (len(start) if k in problem.batched else 1) for k in floats]
    shapes = [jax.ShapeDtypeStruct((*start.shape, size), start.dtype) for size in sizes]
    take = _of_first_order(
        lambda *arrays: _outside(problem.jacobians, shapes, *arrays),
        "an equation in Julia code has first derivatives only, and this differentiates them again; write f in JAX",
    )
    change, regular = jnp.zeros_like(start), jnp.ones((len(start), 1), bool)
    for k, J in zip(floats, take(start, *args), strict=True):
        known = jnp.isfinite(J)
        regular &= known.all((1, 2))[:, None]
        along = tangents[1][k].reshape(-1, J.shape[-1])
        along = jnp.broadcast_to(along, (len(start), J.shape[-1]))
        change += jnp.einsum("bij,bj->bi", jnp.where(known, J, 0), along)
    return _julia_solution(problem, start, args), _where_regular(regular, change)


def _outside(function: Callable[..., Any], shapes: Any, *arrays: jax.Array) -> Any:
    """The result of the function of NumPy arrays, called at once or when the compiled code runs."""
    if _are_traced(*arrays):
        return jax.pure_callback(function, shapes, *arrays, vmap_method="sequential")
    return jax.tree.map(jnp.asarray, function(*map(np.asarray, arrays)))
