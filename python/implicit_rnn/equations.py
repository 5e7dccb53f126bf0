"""Fixed points and roots of any function, with derivatives by the implicit function theorem.

The function is Julia code given as text, which is compiled and runs at full speed for millions of samples, or a Python
function on NumPy arrays, which needs no Julia.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from implicit_rnn import options
from implicit_rnn.device_arrays import DeviceArray, check_dtype, check_finite, lent
from implicit_rnn.engines import DEVICES, check_engine, get_engine
from implicit_rnn.engines.base import LARGE, CompiledEquation, Engine, Equation, JuliaFunction, SingularSolution
from implicit_rnn.errors import ConvergenceError, ConvergenceWarning, EngineError
from implicit_rnn.solution import NON_FINITE, SINGULAR, UNSTABLE, Solution
from implicit_rnn.solvers import Anderson, Auto, Chord, Picard, Solver
from implicit_rnn.validation import all_finite, as_array, as_real

__all__ = ["ImplicitSolution", "JuliaFunction", "fixed_point", "julia", "root"]

Array = np.ndarray
Function = JuliaFunction | Callable[..., Any]


# --- functions -----------------------------------------------------------------------------------------------

_HEADS = (re.compile(r"\s*\((?P<names>[^()]*)\)\s*->"), re.compile(r"\s*(?P<names>\w+)\s*->"))
_LONG_HEAD = re.compile(r"\s*function\s*\((?P<names>[^()]*)\)")
_PARAMETER = re.compile(r"(?P<name>[^\W\d]\w*!?)\s*(::[^=,]+)?")


def julia(text: str) -> JuliaFunction:
    """A function given as Julia code, for ``fixed_point`` and ``root``.

    The code sees each sample as a vector z, arguments as numbers and arrays indexed as in NumPy but from 1, and it may use
    Julia's LinearAlgebra. It is compiled at its first use, once per text. It must be differentiable by ForwardDiff.jl, so
    parameters should not be declared Float64. Broadcast formulas on vectors of up to 8 entries are the fastest; these
    vectors cannot be written to. From 4096 samples on such formulas are evaluated for many samples at once, in double
    precision, in vector registers and on all threads; code that branches on values (``if``, ``?:``; not ``ifelse``) is run
    for one sample at a time.

    Parameters
    ----------
    text
        One anonymous function, ``(z, a) -> cos.(a .* z)`` or ``function (z, a) … end``; the names of its parameters behind
        the first name the arguments.

    Raises
    ------
    TypeError
        For anything but a string.
    ValueError
        For text of another form.

    Examples
    --------
    >>> kepler = irnn.julia("(E, M, e) -> M .+ e .* sin.(E)")
    >>> kepler.arguments
    ('M', 'e')
    >>> solution = irnn.fixed_point(kepler, [1.0], args=(1.0, 0.3), engine="julia")
    >>> print(solution.value.round(6))
    [1.288091]
    """
    if not isinstance(text, str):
        raise TypeError(f"text is {text!r}; expected Julia code as a string, such as '(z, a) -> cos.(a .* z)'")
    for head in (*_HEADS, _LONG_HEAD):
        if match := head.match(text):
            return JuliaFunction(text, _parameters(match["names"], text)[1:])
    raise ValueError(
        f"the Julia code {text!r} is not of the form '(z, a) -> expression' or 'function (z, a) … end', the code of one "
        "function of z and its arguments"
    )


def _parameters(names: str, text: str) -> tuple[str, ...]:
    found = []
    for part in names.split(",") if names.strip() else []:
        match = _PARAMETER.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"the Julia code {text!r} has the parameter {part.strip()!r}; expected plain names, without defaults, keywords "
                "or splats"
            )
        found.append(match["name"])
    if not found:
        raise ValueError(f"the Julia code {text!r} has no parameters; expected z and then the arguments")
    if len(set(found)) < len(found):
        raise ValueError(f"the Julia code {text!r} names a parameter twice")
    return tuple(found)


def _argument_names(f: Function, count: int) -> tuple[str, ...]:
    """The names of the arguments behind z; ``ValueError`` if f does not take ``count`` of them."""
    names, least, most = _julia_parameters(f) if isinstance(f, JuliaFunction) else _python_parameters(f)
    if not least <= count <= most:
        listed = f" ({', '.join(names)})" if names else ""
        number = least if count < least else most
        raise ValueError(f"f takes z and {number} argument{'s'[: number != 1]}{listed}; args has {count}")
    if len(names) == count:
        return names
    return (*names[:count], *(f"args[{index}]" for index in range(len(names), count)))


def _julia_parameters(f: JuliaFunction) -> tuple[tuple[str, ...], int, float]:
    return f.arguments, len(f.arguments), len(f.arguments)


def _python_parameters(f: Callable[..., Any]) -> tuple[tuple[str, ...], int, float]:
    """Names behind the first, and how few and how many arguments may follow it."""
    if type(f) is FunctionType and not f.__dict__:  # as its signature would say, in no time
        code = f.__code__
        names = code.co_varnames[1 : code.co_argcount]
        most = np.inf if code.co_flags & inspect.CO_VARARGS else len(names)
        return names, max(code.co_argcount - len(f.__defaults__ or ()) - 1, 0), most
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):  # some builtins do not tell
        return (), 0, np.inf
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in positional) - 1
    splat = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    return tuple(p.name for p in positional[1:]), max(least, 0), np.inf if splat else len(positional) - 1


# --- solving -------------------------------------------------------------------------------------------------


def fixed_point(
    f: Function,
    z0: ArrayLike,
    *,
    args: Sequence[ArrayLike] = (),
    batched: str | int | Iterable[str | int] = (),
    solver: Solver | str = Auto(),
    vectorized: bool = False,
    jac: Callable[..., Any] | None = None,
    vjp: Callable[..., Any] | None = None,
    scale: ArrayLike | None = None,
    on_failure: str = "raise",
    engine: str | None = None,
    device: str = "cpu",
) -> ImplicitSolution:
    """Solve ``z = f(z, *args)``.

    Parameters
    ----------
    f
        Julia code, ``julia("(z, a) -> cos.(a .* z)")``, or a Python function on NumPy arrays. It is given one sample z (n,)
        and returns (n,). A Python function is differentiated by the complex step where that gives the right derivative,
        else by central differences.
    z0
        The start: (n,) for one problem or a number for one unknown, which f is then given as a number and may answer by one;
        (B, n) for a batch, each row of which is solved for itself. float32 stays float32 with float32 arithmetic, all else is
        done in float64.
    args
        The further arguments of f: numbers and arrays. Those of floats are converted to the dtype of z0 and can be
        differentiated; integers and booleans remain what they are.
    batched
        The arguments, by name or position, whose first axis counts the samples; all others are shared by the batch.
    solver
        ``Auto()``, ``Picard()``, ``Anderson()`` or ``Newton()``; ``NLsolve()`` for Julia code. A sample has converged when
        ``‖f(z) - z‖₂ <= max(tol · ‖f(z)‖₂, eps · L)``, L the largest ‖f(z)‖₂ seen on the way, so that the answer does not depend
        on the unit of z; ``tol=None`` is 1e-10 in float64 and 1e-6 in float32. A fixed point is reported as UNSTABLE if Picard
        iteration would move away from it; ``root`` finds solutions of f(z) - z = 0 of any kind.
    vectorized
        A Python f takes any number of samples at once: z (m, n), batched arguments (m, ...), and returns (m, n).
    jac
        The Jacobian ∂f/∂z of a Python f: ``jac(z, *args)`` returns (n, n), a NumPy array or a sparse matrix of SciPy; with
        ``vectorized`` it takes what f takes and returns (m, n, n). Without it, and without ``vjp``, it is found from values of f.
    vjp
        The products of a Python f with a vector v (n,): ``vjp(v, z, *args)`` returns a tuple of v times ∂f/∂z, (n,), and of v
        times ∂f/∂argument for each argument, of the shape of the argument; None stands for an argument of integers, or one that
        is to be differentiated from values of f. With ``vectorized`` v and z are (m, n), and the products are (m, n), (m, ...)
        for batched arguments, and sums over the samples for shared ones.

        Both hooks are given numbers, and may answer by numbers, where z0 is a number. They are compared with the values of f
        along a random direction where derivatives are taken, and where Newton's method begins unless its way proves them right.

        Beyond 2048 unknowns no dense Jacobian is made: Newton steps and derivatives are found by GMRES, and by sparse LU where
        ``jac`` gives a sparse matrix or the values of f show that few unknowns are coupled. A gradient then needs ``vjp``, or a
        sparse Jacobian of either origin, unless it is with respect to few numbers.
    scale
        The typical size of z, a number or (n,), where its entries are of very different sizes: norms are taken of z / scale,
        and a step of tol · √n in these units is small enough.
    on_failure
        What happens if a sample does not converge: "raise" a ``ConvergenceError`` that holds the solution, "warn", or "ignore".
    engine
        Julia code needs "julia" or "auto", Python functions run on every engine. ``None`` reads IMPLICIT_RNN_ENGINE.
    device
        Where Julia code runs: "cpu", or "cuda" for an NVIDIA card, one sample on each of its threads, for many samples of up to 8
        unknowns. If z0 or an argument is an array on the card, so are the value and its derivatives; see the page *On a GPU*.

    Raises
    ------
    ValueError, TypeError
        For arguments out of range or of the wrong kind, code that cannot be parsed, an f, jac or vjp that returns the wrong
        shape, and a jac or vjp that contradicts f.
    EngineError
        If Julia code fails, or cannot be run. What a Python f raises is passed on as it is.
    ConvergenceError
        See ``on_failure``.

    Examples
    --------
    >>> solution = irnn.fixed_point(lambda z, a: np.cos(a * z), [0.5], args=(0.8,))
    >>> print(solution.value.round(6))
    [0.801418]
    >>> print(solution.vjp([1.0])["a"].round(6))  # dz/da
    -0.324205

    A batch, of which each sample has an ``a`` of its own:

    >>> a = np.array([[0.2], [0.8]])
    >>> solution = irnn.fixed_point(lambda z, a: np.cos(a * z), [[0.5], [0.5]], args=(a,), batched="a")
    >>> print(solution.value.round(6).ravel())
    [0.980821 0.801418]
    """
    return _solve(f, z0, args, batched, solver, vectorized, jac, vjp, scale, on_failure, engine, device, root=False)


def root(
    f: Function,
    z0: ArrayLike,
    *,
    args: Sequence[ArrayLike] = (),
    batched: str | int | Iterable[str | int] = (),
    solver: Solver | str = Auto(),
    vectorized: bool = False,
    jac: Callable[..., Any] | None = None,
    vjp: Callable[..., Any] | None = None,
    scale: ArrayLike | None = None,
    on_failure: str = "raise",
    engine: str | None = None,
    device: str = "cpu",
) -> ImplicitSolution:
    """Solve ``f(z, *args) = 0``.

    A sample has converged when the Newton step is at most ``max(tol · ‖z‖₂, eps · L)``, L the largest ‖z‖₂ seen on the way,
    whatever the unit of f; ``residual`` is that step over that size.

    Parameters
    ----------
    f, z0, args, batched, vectorized, jac, vjp, scale, on_failure, engine, device
        As for ``fixed_point``, but that f returns what is to be zero, (n,).
    solver
        ``Newton()`` with a line search, ``NLsolve()`` for Julia code, or ``Auto()``, which is the first and, for Julia code,
        the second on samples that the first gave up.

    Raises
    ------
    ValueError, TypeError, EngineError, ConvergenceError
        As ``fixed_point``.

    Examples
    --------
    >>> solution = irnn.root(lambda z, a: z**2 - a, [1.0], args=(2.0,))
    >>> print(solution.value.round(6))
    [1.414214]
    >>> print(solution.jacobian("a").round(6))  # 1 / (2 z)
    [[0.353553]]
    """
    return _solve(f, z0, args, batched, solver, vectorized, jac, vjp, scale, on_failure, engine, device, root=True)


def _solve(
    f: Function,
    z0: ArrayLike,
    args: Sequence[ArrayLike],
    batched: str | int | Iterable[str | int],
    solver: Solver | str,
    vectorized: bool,
    jac: Callable[..., Any] | None,
    vjp: Callable[..., Any] | None,
    scale: ArrayLike | None,
    on_failure: str,
    engine: str | None,
    device: str,
    root: bool,
) -> ImplicitSolution:
    options.check_on_failure(on_failure)
    chosen = choose_solver(solver, root)
    _check_function(f, vectorized, jac, vjp)
    engine = check_engine(engine)
    check_device(f, device, engine)
    equation = _pose(f, z0, args, batched, vectorized, jac, vjp, scale, root, device)
    compiled = _engine(f, engine).compile_equation(equation)
    solution = ImplicitSolution.starting(equation, compiled)
    compiled.solve(chosen, solution)
    solution._lock()
    if np.count_nonzero(solution.status) and (failure := solution.failure()):
        _report(on_failure, failure, solution, chosen)
    return solution


def _check_function(f: Function, vectorized: bool, jac: object, vjp: object) -> None:
    if isinstance(f, str):
        raise TypeError(f"f is the string {f!r}; pass Julia code as irnn.julia(text)")
    if not isinstance(f, JuliaFunction) and not callable(f):
        raise TypeError(f"f is {f!r}; expected irnn.julia(text) or a function")
    if options.check_flag("vectorized", vectorized) and isinstance(f, JuliaFunction):
        raise ValueError("vectorized=True is for Python functions; Julia code is always given one sample, at no cost")
    for name, hook in (("jac", jac), ("vjp", vjp)):
        if hook is not None and isinstance(f, JuliaFunction):
            raise ValueError(f"{name} is for Python functions; Julia code is differentiated exactly without it")
        if hook is not None and not callable(hook):
            raise TypeError(f"{name} is a {type(hook).__name__}; expected a function, see help(irnn.fixed_point)")


def check_device(f: Function, device: str, engine: str | None = None) -> None:
    """Errors for a device that there is not, or that is not for f."""
    options.check_choice("device", device, DEVICES)
    if device == "cpu":
        return
    if not isinstance(f, JuliaFunction):
        raise ValueError(f"a Python function cannot run on device={device!r}; write it as Julia code, irnn.julia(text)")
    _engine(f, check_engine(engine))  # where it cannot be had, that is what is to be said of arrays on the device


def choose_solver(solver: Solver | str, root: bool) -> Solver:
    """The solver, or that of this name; ``ValueError`` for one that solves no such equations."""
    solver = options.choose(Solver, solver, "solver")
    if isinstance(solver, Chord):
        raise ValueError("Chord shares a matrix among the samples of a network; for equations use Newton() or Auto()")
    if root and isinstance(solver, (Picard, Anderson)):
        raise ValueError(
            f"{solver.name} iterates z = f(z); for f(z) = 0 use Newton(), NLsolve() or Auto(), or fixed_point of z + β f(z)"
        )
    return solver


def _engine(f: Function, engine: str) -> Engine:
    if not isinstance(f, JuliaFunction):
        return get_engine("numpy")
    if engine == "numpy":
        raise EngineError(
            "Julia code runs on the Julia engine only, and the NumPy engine was chosen (by engine or IMPLICIT_RNN_ENGINE); "
            "choose engine='julia' or give f as a Python function"
        )
    return get_engine("julia")


def _report(on_failure: str, failure: str, solution: ImplicitSolution, solver: Solver) -> None:
    remedies = ["another z0", "a larger max_iterations", "another solver"]
    if not solution.equation.root:
        remedies.insert(2, "Picard(damping)")
    if (solution.status == NON_FINITE).any():
        remedies.insert(0, "where NaN or infinity came up, look whether args are finite and f is at z0")
    if (solution.status == UNSTABLE).any():
        remedies = ["another z0", "irnn.root of f(z) - z, which also finds fixed points that Picard iteration leaves"]
    if (solution.status == SINGULAR).any():
        remedies = ["another z0, since the Jacobian has no inverse where the iteration came to"]
        if not isinstance(solver, Auto):
            remedies.append("Auto(), which tries more ways")
    equation = solution.equation
    if equation.n > LARGE and equation.jac is None and not isinstance(equation.f, JuliaFunction):
        remedies.append("jac= as a sparse matrix, which is factorised where GMRES does not solve the Newton steps")
    message = f"{failure}. Remedies: {', '.join(remedies)}"
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    if on_failure == "warn":
        warnings.warn(message, ConvergenceWarning, stacklevel=4)


# --- what was posed ------------------------------------------------------------------------------------------


def _pose(
    f: Function,
    z0: ArrayLike,
    args: Sequence[ArrayLike],
    batched: Any,
    vectorized: bool,
    jac: Callable[..., Any] | None,
    vjp: Callable[..., Any] | None,
    scale: ArrayLike | None,
    root: bool,
    device: str,
) -> Equation:
    start, shape = _start(z0, device)
    names = _argument_names(f, len(check_arguments(args)))
    per_sample = _positions(batched, names)
    arrays = tuple([_argument(name, value, start.dtype, device) for name, value in zip(names, args, strict=True)])
    for index in sorted(per_sample):
        own = arrays[index].shape
        if len(shape) < 2:
            raise ValueError(
                f"batched has {names[index]!r}, but z0 of shape {start[0].shape} is one problem; a batch is (B, n)"
            )
        if not own or own[0] != len(start):
            raise ValueError(
                f"{names[index]} has shape {own}; expected ({len(start)}, ...), as z0 has {len(start)} samples"
            )
    flags = tuple([index in per_sample for index in range(len(arrays))])
    sizes = _sizes(scale, start)
    return Equation(f, root, start, arrays, flags, names, shape, sizes, vectorized, jac, vjp, device)


def check_arguments(args: Sequence[Any]) -> Sequence[Any]:
    """``args``; ``TypeError`` unless it is a tuple or list."""
    if type(args) is not tuple and (isinstance(args, (str, bytes)) or not isinstance(args, Sequence)):
        raise TypeError(f"args is a {type(args).__name__}; expected a tuple of arguments, such as args=(a,)")
    return args


def _sizes(scale: ArrayLike | None, start: Array) -> Array | None:
    if scale is None:
        return None
    sizes = as_real("scale", _as_array("scale", scale), start.dtype)
    n = start.shape[1]
    if sizes.shape not in ((), (n,)):
        raise ValueError(f"scale has shape {sizes.shape}; expected a number or ({n},), a size for each entry of z")
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError(f"scale must be positive and finite, got {scale!r}")
    return np.array(np.broadcast_to(sizes, n))


def _start(z0: ArrayLike, device: str) -> tuple[Array, tuple[int, ...]]:
    array = _lent_or_array("z0", z0, device)
    if array.ndim > 2 or array.size == 0:
        raise ValueError(
            f"z0 has shape {array.shape}; expected a number or (n,) for one problem, or (B, n) for a batch, none of them 0"
        )
    if isinstance(array, DeviceArray):
        if array.dtype not in (np.float32, np.float64):
            raise TypeError(f"z0 has dtype {array.dtype}; expected float32 or float64")
        there = array if array.ndim == 2 else array.reshape(1, -1)
        check_finite("z0", there)
        return cast("Array", there), array.shape
    dtype = np.dtype(np.float32 if array.dtype.newbyteorder("=") == np.float32 else np.float64)
    start = np.ascontiguousarray(as_real("z0", array, dtype))
    start = start if start.ndim == 2 else start.reshape(1, -1)
    if not all_finite(start):
        bad = np.flatnonzero(~np.isfinite(start).all(axis=1))
        raise ValueError(f"z0 has NaN or infinity in {len(bad)} of {len(start)} samples, first in sample {bad[0]}")
    return start, array.shape


_KEPT = {"b": np.dtype(np.bool_), "i": np.dtype(np.int64), "u": np.dtype(np.int64)}
"""What becomes of arguments that are no floats, by their kind."""


def _argument(name: str, value: ArrayLike, dtype: np.dtype, device: str) -> Array:
    array = _lent_or_array(name, value, device)
    if array.size == 0:
        raise ValueError(f"{name} has shape {array.shape} and no entries")
    if isinstance(array, DeviceArray):
        check_dtype(name, array, dtype, "z0")
        return cast("Array", array)
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} has integers beyond 2**63 - 1")
    array = np.array(as_real(name, array, _KEPT.get(array.dtype.kind, dtype)))
    array.flags.writeable = False  # it belongs to the solution, and f may be a Python function
    return array


def _lent_or_array(name: str, value: ArrayLike, device: str) -> Array | DeviceArray:
    there = lent(name, value, device)
    return _as_array(name, value) if there is None else there


def _as_array(name: str, value: ArrayLike) -> Array:
    try:
        return as_array(name, value)
    except ValueError as error:
        raise TypeError(f"{name} cannot be read as an array: {error}") from None


def positions(f: Function, count: int, batched: str | int | Iterable[str | int]) -> set[int]:
    """The positions of the arguments named in ``batched``, of ``count`` arguments of f; ``ValueError`` for others."""
    return _positions(batched, _argument_names(f, count))


def _positions(batched: Any, names: tuple[str, ...]) -> set[int]:
    listed = (batched,) if isinstance(batched, (str, int, np.integer)) else batched
    if not isinstance(listed, Iterable) or getattr(listed, "shape", (0,)) == ():
        raise TypeError(f"batched is {batched!r}; expected names or positions of arguments, such as 'a' or (0,)")
    return {_position(key, names, "batched has") for key in listed}


def _position(key: object, names: tuple[str, ...], subject: str) -> int:
    known = f"the arguments are {', '.join(map(repr, names))}" if names else "f has no arguments besides z"
    if isinstance(key, str):
        if key in names:
            return names.index(key)
        raise ValueError(f"{subject} {key!r}, which is not an argument of f; {known}")
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        if 0 <= key < len(names):
            return int(key)
        raise ValueError(f"{subject} {key}, which is not the position of an argument (they count from 0); {known}")
    raise TypeError(f"{subject} {key!r}; expected the name or the position of an argument; {known}")


# --- solutions -----------------------------------------------------------------------------------------------


_NO_BOUND = np.full(1, np.nan)
"""The bound of every sample: none is certified."""
_NO_BOUND.flags.writeable = False


@dataclass(frozen=True, repr=False)
class ImplicitSolution(Solution):
    """The solution of ``fixed_point`` or ``root``, and its derivatives with respect to the arguments.

    ``status``, ``iterations`` (evaluations of f), ``residual`` and ``rate`` are per sample, (B,); no ``bound`` is certified.

    Examples
    --------
    >>> solution = irnn.root(lambda z, a, b: z**2 - a * b, [1.0], args=(2.0, 8.0))
    >>> solution.value, solution.names, solution.converged
    (array([4.]), ('a', 'b'), array([ True]))
    >>> irnn.ImplicitSolution.starting(solution.equation, solution.compiled).value  # as it was before the solve
    array([1.])
    >>> print(solution.failure())
    None
    """

    equation: Equation = field(kw_only=True)
    compiled: CompiledEquation = field(kw_only=True)

    @classmethod
    def starting(cls, equation: Equation, compiled: CompiledEquation) -> ImplicitSolution:
        """A solution whose arrays an engine will fill, with the start in ``state``.

        Parameters
        ----------
        equation, compiled
            What is to be solved, and the handle that solves it.
        """
        samples = equation.samples
        residual, rate = np.empty(samples), np.empty(samples)
        bound = np.ndarray(samples, buffer=_NO_BOUND, strides=(0,))
        arrays = (np.empty(samples, np.int8), np.empty(samples, np.int32), residual, rate, bound)
        start = equation.start
        state = cast("Array", DeviceArray.copy_of(start, equation.device)) if equation.lent else start.copy()
        return cls(state, *arrays, equation=equation, compiled=compiled)

    def _lock(self) -> None:
        """Let nobody write to the state, at which derivatives are taken; an array on a device cannot be locked."""
        if isinstance(self.state, np.ndarray):
            self.state.flags.writeable = False

    def __setstate__(self, state: dict[str, Any]) -> None:  # the arrays of a pickle or deep copy can be written to
        self.__dict__.update(state)
        self._lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arguments."""
        return self.equation.names

    @property
    def value(self) -> Array:
        """The solution, of the shape of z0; of unconverged samples the last finite iterate.

        Derivatives are taken at it, so it cannot be written to; ``value.copy()`` can.
        """
        return self.state.reshape(self.equation.shape)

    def vjp(self, v: ArrayLike) -> dict[str, Array]:
        """The products vᵀ ∂value/∂argument, by the implicit function theorem.

        From c(z, args) = 0 follows ∂z/∂args = -(∂c/∂z)⁻¹ ∂c/∂args.

        Parameters
        ----------
        v
            Of the shape of ``value``, (n,) or (B, n): of a scalar loss L(value) it is ∂L/∂value, and the result ∂L/∂argument.

        Returns
        -------
        The products for all arguments that are floats, by name, each of the shape of its argument; those of shared arguments
        are summed over the batch.

        Raises
        ------
        ConvergenceError
            Where the Jacobian of the equation is singular at a solution, and if v is not zero for a sample that has not
            converged.
        ValueError, TypeError
            For a bad v.

        Examples
        --------
        >>> solution = irnn.root(lambda z, a, b: z**2 - a * b, [1.0], args=(2.0, 8.0))
        >>> {name: float(product.round(6)) for name, product in solution.vjp([1.0]).items()}
        {'a': 1.0, 'b': 0.25}
        """
        rows = self._rows(v)
        if not (converged := self.converged).all():
            here = rows.numpy() if isinstance(rows, DeviceArray) else rows
            failed = here.any(axis=1) & ~converged
            if failed.any():
                self._no_derivative(failed, "; v must be zero for them")
        gradients = self._differentiate(lambda: self.compiled.vjp(rows))
        return {name: g for name, g in zip(self.equation.names, gradients, strict=True) if g is not None}

    def jacobian(self, argument: str | int) -> Array:
        """The derivatives ∂value/∂argument.

        Parameters
        ----------
        argument
            Its name or position.

        Returns
        -------
        (n, size), or (B, n, size) for a batch, with ``size`` the entries of the argument, of one sample if it is batched, in C
        order. Rows of samples that have not converged are NaN.

        Raises
        ------
        ConvergenceError
            As for ``vjp``, and for a single problem that has not converged.
        ValueError
            For an unknown argument.
        TypeError
            For one that is not of floats.

        Examples
        --------
        >>> solution = irnn.root(lambda z, A, b: A @ z - b, [0.0, 0.0], args=([[2.0, 0.0], [0.0, 4.0]], [1.0, 1.0]))
        >>> print(solution.jacobian("b").round(6))  # the inverse of A
        [[0.5  0.  ]
         [0.   0.25]]
        """
        index = _position(argument, self.equation.names, "the Jacobian was asked for")
        if not self.equation.is_differentiable(index):
            dtype = self.equation.args[index].dtype
            raise TypeError(
                f"{self.equation.names[index]} is an argument of {dtype}, which has no derivative; pass it as floats"
            )
        wanted = self.converged
        if self.equation.single and not wanted.all():
            self._no_derivative(~wanted, "")
        J: Array = self._differentiate(lambda: self.compiled.jacobian(index, wanted))
        return J.reshape(J.shape[1:]) if self.equation.single else J

    def failure(self) -> str | None:
        """A sentence on the samples that did not converge, or None where all did."""
        sentence = super().failure()
        return sentence and sentence.replace("reach an equilibrium", "converge")

    def _rows(self, v: ArrayLike) -> Array:
        """The vectors to multiply with, (B, n), where they are."""
        array = _lent_or_array("v", v, self.equation.device)
        if array.shape != self.value.shape:
            raise ValueError(f"v has shape {array.shape}; expected {self.value.shape}, the shape of the value")
        if isinstance(array, DeviceArray):
            check_dtype("v", array, self.state.dtype, "the solution")
            there = array.reshape(self.state.shape)
            check_finite("v", there)
            return cast("Array", there)
        rows = np.ascontiguousarray(as_real("v", array, self.state.dtype)).reshape(self.state.shape)
        if not all_finite(rows):
            raise ValueError("v has NaN or infinity")
        return rows

    def _no_derivative(self, failed: Array, remedy: str) -> None:
        raise ConvergenceError(
            f"{failed.sum()} of {len(failed)} samples did not converge (first sample {np.flatnonzero(failed)[0]}) and have no "
            f"derivative{remedy}",
            self,
        )

    def _differentiate(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except SingularSolution as error:
            where = "the solution" if self.equation.single else f"the solution of sample {error.sample}"
            raise ConvergenceError(
                f"the Jacobian of the equation is singular at {where}, or so nearly that its error decides: there the solution "
                "has no derivative (it ceases to exist, or is not the only one nearby)",
                self,
            ) from None

    def __repr__(self) -> str:
        return (
            f"ImplicitSolution({'root' if self.equation.root else 'fixed point'} of shape {self.value.shape}, "
            f"{self.converged.sum()} of {len(self.status)} converged, iterations up to {self.iterations.max()}, "
            f"residual up to {self.residual.max():.2g})"
        )
