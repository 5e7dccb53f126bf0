"""``fixed_point`` and ``root``."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from implicit_rnn import options
from implicit_rnn.engines import check_device, check_engine, get_engine
from implicit_rnn.engines.base import LARGE, Engine, JuliaFunction
from implicit_rnn.equations.functions import Function
from implicit_rnn.equations.posing import pose
from implicit_rnn.equations.solution import ImplicitSolution
from implicit_rnn.errors import EngineError, report_failure, warn
from implicit_rnn.options import OnFailure
from implicit_rnn.solution import NON_FINITE, SINGULAR, UNSTABLE
from implicit_rnn.solvers import Anderson, Auto, Chord, Picard, Solver, SolverLike

LONG = 2.0
"""Seconds of solving sample by sample after which a warning names faster ways."""


def fixed_point(
    f: Function,
    z0: ArrayLike,
    *,
    args: Sequence[ArrayLike] = (),
    batched: str | int | Iterable[str | int] = (),
    solver: SolverLike = Auto(),
    vectorized: bool = False,
    jac: Callable[..., Any] | None = None,
    vjp: Callable[..., Any] | None = None,
    scale: ArrayLike | None = None,
    on_failure: OnFailure = "raise",
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
        The start: (n,) for one problem; a number for one unknown, in which case f is given a number and may return one;
        (B, n) for a batch, each row of which is solved on its own. float32 stays float32 with float32 arithmetic, anything
        else is computed in float64.
    args
        The further arguments of f: numbers and arrays. Floats are converted to the dtype of z0 and can be
        differentiated; integers and booleans keep their type. A Python f cannot write to them; its z is a copy.
    batched
        The arguments, by name or position, whose first axis is that of the samples; all others are shared by the batch.
    solver
        ``Auto()``, ``Picard()``, ``Anderson()`` or ``Newton()``; ``NLsolve()`` for Julia code. A sample has converged when
        ``‖f(z) - z‖₂ <= tol · ‖f(z)‖₂``, so that the result does not depend on the unit of z; or, at a solution that is zero to
        rounding, when ``‖f(z) - z‖₂ <= eps · L``, with L the largest ‖f(z)‖₂ so far. ``tol=None`` is 1e-10 in float64 and 1e-6
        in float32. A fixed point is reported as UNSTABLE if Picard iteration would move away from it, unless Picard iteration
        itself led to it, as from a start with a symmetry of f; ``root`` finds solutions of f(z) - z = 0 of any kind.
    vectorized
        Whether a Python f takes any number of samples at once: z (m, n), batched arguments (m, ...), and returns (m, n).
    jac
        The Jacobian ∂f/∂z of a Python f: ``jac(z, *args)`` returns (n, n), a NumPy array or a SciPy sparse matrix; with
        ``vectorized`` it takes the arguments of f and returns (m, n, n). Without ``jac`` and ``vjp`` the Jacobian is found from
        values of f.
    vjp
        The products of a Python f with a vector v (n,): ``vjp(v, z, *args)`` returns a tuple of v times ∂f/∂z, (n,), and of v
        times ∂f/∂argument for each argument, of the shape of the argument; return None for an argument of integers, or for one
        to be differentiated from values of f. With ``vectorized`` v and z are (m, n), and the products are (m, n), (m, ...)
        for batched arguments, and sums over the samples for shared ones.

        Where z0 is a number, both hooks are given numbers and may return numbers. They are checked against the values of f
        along a random direction where derivatives are taken, and at the start of Newton's method, unless its convergence proves
        them correct.

        Beyond 2048 unknowns no dense Jacobian is formed: Newton steps and derivatives are found by GMRES, and by sparse LU if
        ``jac`` returns a sparse matrix or the values of f show that few unknowns are coupled. A gradient then needs ``vjp``, or a
        sparse Jacobian of either origin, unless it is with respect to few numbers.
    scale
        The typical size of z, a number or (n,), for entries of very different sizes: norms are taken of z / scale,
        and a step of tol · √n in these units is small enough.
    on_failure
        What happens if a sample does not converge: "raise" a ``ConvergenceError`` that holds the solution, "warn", or "ignore".
    engine
        Julia code needs "julia" or "auto", Python functions run on every engine. ``None`` reads IMPLICIT_RNN_ENGINE.
    device
        Where Julia code runs: "cpu", or "cuda" for an NVIDIA card, one sample per thread, for many samples of up to 8
        unknowns. If z0 or an argument is an array on the card, so are the value and its derivatives; see the page *On a GPU*.

    Raises
    ------
    ValueError, TypeError
        For arguments out of range or of the wrong type, code that cannot be parsed, an f, jac or vjp that returns the wrong
        shape, and a jac or vjp that contradicts f.
    EngineError
        If Julia code fails, or cannot be run. An exception of a Python f is passed on unchanged, but for those of iterates
        outside its domain, as of ``math.log(-1)`` and ``1 / 0``, where f counts as NaN.
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
    solver: SolverLike = Auto(),
    vectorized: bool = False,
    jac: Callable[..., Any] | None = None,
    vjp: Callable[..., Any] | None = None,
    scale: ArrayLike | None = None,
    on_failure: OnFailure = "raise",
    engine: str | None = None,
    device: str = "cpu",
) -> ImplicitSolution:
    """Solve ``f(z, *args) = 0``.

    A sample has converged when the Newton step is at most ``tol · ‖z‖₂``, whatever the unit of f; or, at a solution that is zero
    to rounding, at most ``eps · L``, with L the largest ‖z‖₂ so far. ``residual`` is the norm of the step divided by the larger
    of ‖z‖₂ and ``eps · L / tol``.

    Parameters
    ----------
    f, z0, args, batched, vectorized, jac, vjp, scale, on_failure, engine, device
        As for ``fixed_point``, except that f returns the values (n,) that are to be zero.
    solver
        ``Newton()`` with a line search, ``NLsolve()`` for Julia code, or ``Auto()``: Newton's method, and then, for samples
        on which it fails, NLsolve for Julia code, and MINPACK's hybrid method for Python functions with a dense Jacobian.

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
    solver: SolverLike,
    vectorized: bool,
    jac: Callable[..., Any] | None,
    vjp: Callable[..., Any] | None,
    scale: ArrayLike | None,
    on_failure: OnFailure,
    engine: str | None,
    device: str,
    root: bool,
) -> ImplicitSolution:
    options.check_on_failure(on_failure)
    chosen = choose_solver(solver, root)
    _check_function(f, vectorized, jac, vjp)
    engine = check_engine(engine)
    check_device_for(f, device, engine)
    equation = pose(f, z0, args, batched, vectorized, jac, vjp, scale, root, device)
    begin = time.perf_counter()
    compiled = engine_for(f, engine).compile_equation(equation)
    try:
        solution = ImplicitSolution.found_by(chosen, equation, compiled)
    except Exception as error:
        arguments = zip(equation.names, equation.args, equation.batched, strict=True)
        suggest_batched(
            error, 0 if equation.single else equation.samples, {n: x.shape for n, x, own in arguments if not own}
        )
        if isinstance(f, JuliaFunction):
            _suggest_julia(error)
        raise
    seconds = time.perf_counter() - begin
    if seconds > LONG and not (vectorized or equation.single or isinstance(f, JuliaFunction)):
        warn(
            f"{equation.samples} samples took {seconds:.1f} s, because f is a Python function that is called for one sample at a "
            "time; if it is plain arithmetic, vectorized=True, with an f that takes all samples at once, or Julia code, "
            "irnn.julia(text), is many times as fast",
            UserWarning,
        )
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


def check_device_for(f: Function, device: str, engine: str | None = None) -> None:
    """Errors for a device that does not exist, or on which f cannot run."""
    check_device(device)
    if device == "cpu":
        return
    if not isinstance(f, JuliaFunction):
        raise ValueError(f"a Python function cannot run on device={device!r}; write it as Julia code, irnn.julia(text)")
    engine_for(f, check_engine(engine))  # if it is not available, that is the error to raise for arrays on the device


def choose_solver(solver: SolverLike, root: bool) -> Solver:
    """The solver, or the one of that name; ``ValueError`` for one that cannot solve such equations."""
    solver = options.choose(Solver, solver, "solver")
    if isinstance(solver, Chord):
        raise ValueError("Chord shares a matrix among the samples of a network; for equations use Newton() or Auto()")
    if root and isinstance(solver, (Picard, Anderson)):
        raise ValueError(
            f"{solver.name} iterates z = f(z); for f(z) = 0 use Newton(), NLsolve() or Auto(), or fixed_point of z + β f(z)"
        )
    return solver


def engine_for(f: Function, engine: str) -> Engine:
    """The engine of that name that solves equations of f, started."""
    if not isinstance(f, JuliaFunction):
        return get_engine("numpy")
    if engine == "numpy":
        raise EngineError(
            "Julia code runs on the Julia engine only, and the NumPy engine was chosen (by engine or IMPLICIT_RNN_ENGINE); "
            "choose engine='julia' or give f as a Python function"
        )
    return get_engine("julia")


def suggest_batched(error: Exception, samples: int, shared: Mapping[str, tuple[int, ...]]) -> None:
    """Say at an error about shapes which arguments look as if they belonged to the samples and were not named in batched.

    ``samples`` is less than 2 where there is no batch, and ``shared`` are the shapes of the arguments that it shares.
    """
    if (
        samples < 2
        or len(error.args) != 1
        or not re.search("shape|size|dimension|broadcast", str(error), re.IGNORECASE)
    ):
        return
    if names := [name for name, shape in shared.items() if shape[:1] == (samples,)]:
        text, those = str(error).rstrip(" ."), " and ".join(names)
        error.args = (
            f"{text}. If the {samples} rows of {those} belong to the samples, as those of z0 do, name {those} in batched",
        )


_OF_PYTHON = (
    (
        r"MethodError: no method matching [^(]*\(.*::(Vector|Matrix|Array)",
        "a dot makes an operation one of each entry, as in z .^ 2 or sin.(z)",
    ),
    (r"BoundsError.* at index \[0", "indices count from 1"),
    ("UndefVarError", "f knows its arguments, Julia and its LinearAlgebra; pass other values in args"),
)
"""What newcomers to Julia write as in Python, by the error that it leads to, and the remedy."""


def _suggest_julia(error: Exception) -> None:
    """Say at an error in Julia code how Julia says what a user of Python may mean."""
    for pattern, remedy in _OF_PYTHON:
        if isinstance(error, EngineError) and re.search(pattern, str(error)):
            error.args = (f"{error}; {remedy}", *error.args[1:])


def _report(on_failure: str, failure: str, solution: ImplicitSolution, solver: Solver) -> None:
    remedies = ["another z0", "a larger max_iterations", "another solver"]
    if not solution.equation.root:
        remedies.insert(2, "Picard(damping)")
    if (solution.status == NON_FINITE).any():
        remedies.insert(0, "if NaN or infinity occurred, check that args and f(z0) are finite")
    if (solution.status == UNSTABLE).any():
        remedies = ["another z0", "irnn.root of f(z) - z, which also finds fixed points that repel Picard iteration"]
    if (solution.status == SINGULAR).any():
        remedies = [
            "another z0, since the Jacobian has no inverse where the iteration ended",
            "a larger tol or scale= where z is small compared with the terms of f, whose rounding errors it inherits",
        ]
        if not isinstance(solver, Auto):
            remedies.append("Auto(), which tries more methods")
    equation = solution.equation
    if equation.n > LARGE and equation.jac is None and not isinstance(equation.f, JuliaFunction):
        remedies.append("jac= as a sparse matrix, which is factorised where GMRES does not solve the Newton steps")
    report_failure(f"{failure}. Remedies: {', '.join(remedies)}", on_failure, solution)
