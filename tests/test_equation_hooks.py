"""The hooks jac and vjp of Python functions, and equations of very many unknowns or arguments."""

from __future__ import annotations

import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
from scipy import sparse

import implicit_rnn as irnn
from implicit_rnn import Auto, ConvergenceError, EngineError, Newton, fixed_point, root
from implicit_rnn.errors import DerivativeWarning

# --- one problem and a batch ---------------------------------------------------------------------------------


def net(z, R, x, k):
    return np.tanh(R @ z + k * x)


def net_jac(z, R, x, k):
    return (1 - net(z, R, x, k) ** 2)[:, None] * R


def net_vjp(v, z, R, x, k):
    s = v * (1 - net(z, R, x, k) ** 2)
    return R.T @ s, np.outer(s, z), k * s, None


def rows_net(z, R, x, k):
    return np.tanh(z @ R.T + k * x)


def rows_net_jac(z, R, x, k):
    return (1 - rows_net(z, R, x, k) ** 2)[..., None] * R


def rows_net_vjp(v, z, R, x, k):
    s = v * (1 - rows_net(z, R, x, k) ** 2)
    return s @ R, s.T @ z, k * s, None


HOOKS = {"jac": {"jac": net_jac}, "vjp": {"vjp": net_vjp}, "both": {"jac": net_jac, "vjp": net_vjp}}
ROWS_HOOKS = {
    "jac": {"jac": rows_net_jac},
    "vjp": {"vjp": rows_net_vjp},
    "both": {"jac": rows_net_jac, "vjp": rows_net_vjp},
}


def problem(rng: np.random.Generator, n: int = 4, samples: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return 0.4 * rng.standard_normal((n, n)) / np.sqrt(n), rng.standard_normal((samples, n))


def assert_same_derivatives(a: Any, b: Any, v: np.ndarray) -> None:
    for name, gradient in b.vjp(v).items():
        np.testing.assert_allclose(a.vjp(v)[name], gradient, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(a.jacobian(name), b.jacobian(name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("solver", [Auto(), Newton()])
def test_hooks_give_the_derivatives_that_values_of_f_give(hooks, solver, rng):
    R, x = problem(rng)
    settings: dict[str, Any] = {"args": (R, x, 2), "batched": "x", "solver": solver}
    given = fixed_point(net, np.zeros((5, 4)), **settings, **HOOKS[hooks])
    rows = fixed_point(rows_net, np.zeros((5, 4)), vectorized=True, **settings, **ROWS_HOOKS[hooks])
    plain = fixed_point(net, np.zeros((5, 4)), **settings)
    v = rng.standard_normal((5, 4))
    for sol in (given, rows):
        np.testing.assert_allclose(sol.value, plain.value, rtol=1e-9)
        assert_same_derivatives(sol, plain, v)
    one = fixed_point(net, np.zeros(4), args=(R, x[0], 2), solver=solver, **HOOKS[hooks])
    assert_same_derivatives(one, fixed_point(net, np.zeros(4), args=(R, x[0], 2), solver=solver), v[0])


def test_hooks_serve_functions_that_take_no_complex_numbers(rng):
    def f(z, a):
        return np.array([float(a[0] * z[1] ** 2 - 1), float(z[0] - a[1] * z[1])])

    def vjp(v, z, a):
        return (np.array([v[1], 2 * a[0] * z[1] * v[0] - a[1] * v[1]]), np.array([z[1] ** 2 * v[0], -z[1] * v[1]]))

    sol = root(f, [1.0, 1.0], args=([4.0, 3.0],), vjp=vjp)
    np.testing.assert_allclose(sol.value, [1.5, 0.5])
    np.testing.assert_allclose(sol.jacobian("a"), [[-3 / 16, 0.5], [-1 / 16, 0]], atol=1e-14)


def test_hooks_of_one_unknown_may_be_numbers():
    def f(z, a):
        return z**2 - a

    hooks: dict[str, Any] = {"jac": lambda z, a: 2 * z, "vjp": lambda v, z, a: (2 * z * v, -v)}
    for start in (1.0, [1.0], [[1.0], [2.0]]):
        sol = root(f, start, args=(2.0,), **hooks)
        np.testing.assert_allclose(sol.value, np.full(np.shape(start), np.sqrt(2)))
        gradient = sol.vjp(np.ones(np.shape(start)))["a"]
        np.testing.assert_allclose(gradient, np.size(start) / (2 * np.sqrt(2)))


def test_hooks_in_float32(rng):
    R, x = (a.astype(np.float32) for a in problem(rng))
    sol = fixed_point(net, np.zeros(4, np.float32), args=(R, x[0], 2), solver=Newton(), **HOOKS["both"])
    assert sol.vjp(np.ones(4))["R"].dtype == np.float32
    exact = fixed_point(net, np.zeros(4), args=(R, x[0], 2))
    np.testing.assert_allclose(sol.vjp(np.ones(4))["R"], exact.vjp(np.ones(4))["R"], rtol=1e-4, atol=1e-5)


def test_sparse_jacobian_of_few_unknowns(rng):
    R, x = problem(rng)
    sol = fixed_point(net, np.zeros(4), args=(R, x[0], 2), jac=lambda *a: sparse.csr_matrix(net_jac(*a)))
    assert_same_derivatives(sol, fixed_point(net, np.zeros(4), args=(R, x[0], 2)), np.ones(4))


# --- hooks that are wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [1e-3, 1.0])
def test_jac_that_contradicts_f_is_refused(error, rng):
    R, x = problem(rng)

    def jac(z, R, x, k):
        J = net_jac(z, R, x, k)
        J[2, 1] *= 1 + error
        return J

    sol = fixed_point(net, np.zeros(4), args=(R, x[0], 2), jac=jac)
    with pytest.raises(
        ValueError, match=r"jac contradicts f: with respect to z, .*in entry 2 .*a difference of .* relative"
    ):
        sol.vjp(np.ones(4))
    with pytest.raises(ValueError, match=r"jac contradicts f: .*at z0 of sample 0"):
        fixed_point(net, np.zeros((5, 4)), args=(R, x, 2), batched="x", jac=jac, solver=Newton())


@pytest.mark.parametrize(("place", "name"), [(0, "z"), (1, "R"), (2, "x")])
def test_vjp_that_contradicts_f_is_refused(place, name, rng):
    R, x = problem(rng)

    def vjp(v, z, R, x, k):
        products = list(net_vjp(v, z, R, x, k))
        products[place].reshape(-1)[-1] += 1e-3
        return tuple(products)

    sol = fixed_point(net, np.zeros(4), args=(R, x[0], 2), vjp=vjp)
    with pytest.raises(ValueError, match=f"vjp contradicts f: with respect to {name}, .*at the solution"):
        sol.vjp(np.ones(4))


def test_products_of_a_wrong_vjp_are_looked_at_in_rows_of_small_scale_too():
    solution = root(
        lambda z, a: np.array([1e8 * (z[0] - a[0]), z[0] + z[1] - a[1]]),
        [0.5, 0.5],
        args=([1.0, 2.0],),
        vjp=lambda v, z, a: (np.array([1e8 * v[0] + v[1], v[1]]), np.array([-1e8 * v[0], -7 * v[1]])),
    )
    with pytest.raises(ValueError, match="vjp contradicts f: with respect to a"):
        solution.jacobian("a")


def test_rows_of_a_wrong_jac_are_all_looked_at(rng):
    R, x = problem(rng)

    def jac(z, R, x, k):
        return rows_net_jac(z, R, x, k) * np.where(np.arange(len(z)) == 3, 0.99, 1)[:, None, None]

    sol = fixed_point(rows_net, np.zeros((5, 4)), args=(R, x, 2), batched="x", vectorized=True, jac=jac)
    with pytest.raises(ValueError, match="at the solution of sample 3"):
        sol.vjp(np.ones((5, 4)))


def test_hook_at_a_kink_is_used_with_a_warning():
    def f(z, a):
        return np.abs(np.real(a) - 1) + 0.5 * np.maximum(np.real(z), 0)

    sol = fixed_point(f, [0.0], args=(1.0,), jac=lambda z, a: [[0.5]], on_failure="ignore")
    with (
        pytest.warns(DerivativeWarning, match="jac could not be compared with f"),
        pytest.warns(DerivativeWarning, match="f has no trustworthy derivative with respect to a"),
    ):
        sol.jacobian("a")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_hook_at_a_kink_where_one_starts_is_not_refused(dtype, rng):
    R, x = (0.3 * rng.standard_normal(shape).astype(dtype) for shape in ((3, 3), 3))
    sol = fixed_point(
        lambda z, x: np.where(R @ z > 0, R @ z, 0) + x,
        np.zeros(3, dtype),
        args=(x,),
        jac=lambda z, x: (R @ z > 0)[:, None] * R,
        solver=Newton(),
    )
    np.testing.assert_allclose(sol.value, np.maximum(R @ sol.value, 0) + x, rtol=1e-5)


BAD_HOOKS = {
    "jac of another shape": (
        {"jac": lambda z, a: np.ones(2)},
        ValueError,
        r"jac returned .* of shape \(2,\); expected .*\(2, 2\)",
    ),
    "jac of text": ({"jac": lambda z, a: "J"}, ValueError, r"jac returned .*; expected real numbers of shape \(2, 2\)"),
    "jac complex": ({"jac": lambda z, a: 1j * np.eye(2)}, ValueError, "jac returned an array of complex128"),
    "jac no function": ({"jac": np.eye(2)}, TypeError, "jac is a ndarray; expected a function"),
    "vjp no tuple": ({"vjp": lambda v, z, a: v}, ValueError, "vjp returned a ndarray; expected a tuple of 2, for z, a"),
    "vjp too short": (
        {"vjp": lambda v, z, a: (v,)},
        ValueError,
        "vjp returned 1 products; expected a tuple of 2, for z, a",
    ),
    "vjp without z": ({"vjp": lambda v, z, a: (None, v)}, ValueError, "vjp returned None for z"),
    "vjp of another shape": ({"vjp": lambda v, z, a: (v, v[:1])}, ValueError, r"vjp returned for a .* of shape \(1,\)"),
}


@pytest.mark.parametrize("case", BAD_HOOKS)
def test_bad_hooks_are_refused(case):
    hooks, error, message = BAD_HOOKS[case]
    with pytest.raises(error, match=message):
        fixed_point(lambda z, a: np.cos(a * z), [0.5, 0.2], args=([0.8, 0.9],), **hooks).vjp([1.0, 1.0])


def test_hooks_are_not_refused_for_the_rounding_of_f(rng):
    """Conditions that are small as the difference of large terms, and a slope that is small as one."""

    def f(z, x):
        return np.tanh(x) - z

    for x in (0.008, 7.3, 8.0):
        hooks: dict[str, Any] = {"vjp": lambda v, z, x: (-v, v * (1 - np.tanh(x) ** 2)), "jac": lambda z, x: -np.eye(1)}
        sol = root(f, np.zeros((1, 1)), args=([[x]],), batched="x", **hooks)
        plain = root(f, np.zeros((1, 1)), args=([[x]],), batched="x")
        slope = 1 / np.cosh(x) ** 2
        np.testing.assert_allclose(sol.vjp([[1.0]])["x"], [[slope]], rtol=1e-8)
        np.testing.assert_allclose(plain.vjp([[1.0]])["x"], [[slope]], rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_derivative_below_the_rounding_of_a_difference_is_that_of_the_complex_step(dtype):
    def f(z, w, x):
        return np.tanh(w * z + x) - z

    w, x = dtype(0.01), dtype(4.5)
    sol = root(f, np.ones(1, dtype), args=(w, x))
    z = float(sol.value[0])
    slope = 1 / np.cosh(0.01 * z + 4.5) ** 2
    np.testing.assert_allclose(
        sol.vjp([1.0])["w"], slope * z / (1 - 0.01 * slope), rtol=1e-8 if dtype == np.float64 else 1e-2
    )


# --- large arguments -----------------------------------------------------------------------------------------


class Counted:
    def __init__(self, f: Any) -> None:
        self.f, self.calls = f, 0
        self.__wrapped__ = f  # whose arguments have names

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.f(*args)


def test_gradient_of_a_large_argument_takes_few_evaluations(rng):
    n = 60
    W, x = 0.5 * rng.standard_normal((n, n)) / np.sqrt(n), rng.standard_normal(n)
    f = Counted(lambda z, W, x: np.tanh(W @ z + x))
    sol = fixed_point(f, np.zeros(n), args=(W, x))
    v = rng.standard_normal(n)
    f.calls = 0
    gradient = sol.vjp(v)
    assert f.calls < W.size / 4
    D = 1 - sol.value**2
    λ = D * np.linalg.solve((np.eye(n) - D[:, None] * W).T, v)
    np.testing.assert_allclose(gradient["W"], np.outer(λ, sol.value), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(gradient["x"], λ, rtol=1e-9)


def test_gradient_of_a_large_argument_takes_one_product_with_vjp(rng):
    n = 200
    R, x = problem(rng, n, 1)
    f, vjp = Counted(net), Counted(net_vjp)
    sol = fixed_point(f, np.zeros(n), args=(R, x[0], 1), vjp=vjp)
    f.calls = 0
    gradient = sol.vjp(np.ones(n))
    assert f.calls + vjp.calls < 150
    D = 1 - sol.value**2
    λ = D * np.linalg.solve((np.eye(n) - D[:, None] * R).T, np.ones(n))
    np.testing.assert_allclose(gradient["R"], np.outer(λ, sol.value), rtol=1e-8, atol=1e-9)


def test_groups_of_entries_are_right_where_what_couples_depends_on_them(rng):
    """Entries above 0 go to the first output and those below to the second: a pattern of its own at each argument."""
    a = rng.standard_normal(400)

    def f(z, a):
        above = np.real(a) > 0
        return np.array([np.sum(np.where(above, a, 0) ** 2), np.sum(np.where(above, 0, a) ** 3)]) / 400 + 0 * z

    J = fixed_point(f, np.zeros(2), args=(a,)).jacobian("a")
    np.testing.assert_allclose(J, [np.where(a > 0, 2 * a, 0) / 400, np.where(a > 0, 0, 3 * a**2) / 400], atol=1e-15)


def test_groups_of_entries_are_not_trusted_where_f_ignores_nan(rng):
    a = rng.uniform(0.5, 1, 400)
    J = fixed_point(lambda z, a: np.nan_to_num(a.reshape(2, 200)).sum(axis=1) + 0 * z, np.zeros(2), args=(a,)).jacobian(
        "a"
    )
    np.testing.assert_allclose(J, np.kron(np.eye(2), np.ones(200)))


# --- very many unknowns --------------------------------------------------------------------------------------

N = 20_000


def ring(z, a, k):
    return np.tanh(k * np.roll(z, 1) + 0.2 * np.roll(z, -1) + a)


def ring_jac(z, a, k):
    D, i = 1 - ring(z, a, k) ** 2, np.arange(len(z))
    entries = np.r_[k * D, 0.2 * D], (np.r_[i, i], np.r_[(i - 1) % len(z), (i + 1) % len(z)])
    return sparse.csr_matrix(entries, (len(z), len(z)))


def ring_vjp(v, z, a, k):
    s = v * (1 - ring(z, a, k) ** 2)
    return k * np.roll(s, -1) + 0.2 * np.roll(s, 1), s, np.sum(s * np.roll(z, 1))


RING_HOOKS: dict[str, dict[str, Any]] = {"none": {}, "jac": {"jac": ring_jac}, "vjp": {"vjp": ring_vjp}}


@pytest.fixture(scope="module")
def ring_problem() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    a, v = rng.standard_normal(N), rng.standard_normal(N)
    z = np.zeros(N)
    for _ in range(200):
        z = ring(z, a, 0.3)
    from scipy.sparse.linalg import spsolve

    λ = spsolve((sparse.identity(N) - ring_jac(z, a, 0.3)).T.tocsc(), v)
    return {"a": a, "v": v, "z": z, "gradient": ring_vjp(λ, z, a, 0.3)[1:]}


@pytest.mark.parametrize(
    ("solve", "hooks"),
    [("Auto", "none"), ("root", "none"), ("Anderson", "jac"), ("root", "jac"), ("Newton", "vjp"), ("root", "vjp")],
)
def test_many_unknowns_need_no_dense_jacobian(hooks, solve, ring_problem):
    tracemalloc.start()
    given = RING_HOOKS[hooks]
    if solve == "root":
        negated: dict[str, Any] = {
            "none": {},
            "jac": {"jac": lambda z, a, k: sparse.identity(N) - ring_jac(z, a, k)},
            "vjp": {
                "vjp": lambda v, z, a, k: tuple((v if i == 0 else 0) - w for i, w in enumerate(ring_vjp(v, z, a, k)))
            },
        }
        sol = root(lambda z, a, k: z - ring(z, a, k), np.zeros(N), args=(ring_problem["a"], 0.3), **negated[hooks])
    else:
        sol = fixed_point(ring, np.zeros(N), args=(ring_problem["a"], 0.3), solver=solve, **given)
    gradient = sol.vjp(ring_problem["v"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * N * N / 20
    np.testing.assert_allclose(sol.value, ring_problem["z"], atol=1e-8)
    np.testing.assert_allclose(gradient["a"], ring_problem["gradient"][0], atol=1e-7)
    np.testing.assert_allclose(gradient["k"], ring_problem["gradient"][1], rtol=1e-6)


@pytest.mark.parametrize("hook", [False, True], ids=["values", "vjp"])
def test_stiff_system_of_many_unknowns_is_factorised(hook):
    n = 5000

    def diffusion(z, b):
        return 2 * z - np.append(0, z[:-1]) - np.append(z[1:], 0) + 1e-6 * z**3 - b

    def diffusion_vjp(v, z, b):
        return (2 + 3e-6 * z**2) * v - np.append(0, v[:-1]) - np.append(v[1:], 0), -v

    sol = root(diffusion, np.zeros(n), args=(np.full(n, 1e-5),), vjp=diffusion_vjp if hook else None)
    c = diffusion(sol.value, np.full(n, 1e-5))
    assert np.abs(c).max() < 1e-10
    J = sparse.diags([2 + 3e-6 * sol.value**2, -np.ones(n - 1), -np.ones(n - 1)], [0, 1, -1], format="csc")
    from scipy.sparse.linalg import spsolve

    np.testing.assert_allclose(sol.vjp(np.ones(n))["b"], spsolve(J, np.ones(n)), rtol=1e-6)


def test_many_unknowns_all_coupled():
    n = 4000
    mean = Counted(lambda z, a, k: np.tanh(k * z.mean() + 0.3 * z + a))
    a = np.linspace(-1, 2, n)
    sol = fixed_point(mean, np.zeros(n), args=(a.tolist(), 0.2))
    with pytest.raises(
        EngineError, match=r"products with the transposed Jacobian of f.*give vjp=, or jac= as a sparse matrix"
    ):
        sol.vjp(np.ones(n))

    def of_k(z, k):
        return np.tanh(k * z.mean() + 0.3 * z + a)

    # With respect to few numbers no transposed system is needed.
    gradient = fixed_point(of_k, np.zeros(n), args=(0.2,)).vjp(np.ones(n))["k"]
    h = 1e-4
    values = [fixed_point(of_k, np.zeros(n), args=(0.2 + t,), solver=Newton()).value.sum() for t in (h, -h)]
    np.testing.assert_allclose(gradient, (values[0] - values[1]) / (2 * h), rtol=1e-6)


def test_many_unknowns_that_gmres_does_not_solve_are_told_of_jac():
    n = 3000
    weights = np.linspace(1, 1e6, n) ** 2
    shuffled = np.random.default_rng(0).permutation(n)

    def f(z):
        return weights * z + 1e3 * np.cumsum(z[shuffled])[shuffled] / n - 1 + z.sum() * 1e-3

    with pytest.raises(ConvergenceError, match="jac= as a sparse matrix"):
        root(f, np.ones(n), solver=Newton(max_iterations=3))


def test_many_unknowns_whose_coupling_f_hides_are_told_of_nan():
    def rectified_ring(z, a):
        s = 0.5 * np.roll(z, 1) + a
        return np.where(s > 0, s, 0)

    sol = fixed_point(rectified_ring, np.zeros(3000), args=(np.sin(np.arange(3000)),))
    with pytest.raises(EngineError, match=r"or turns NaN into numbers, as np\.where does"):
        sol.vjp(np.ones(3000))


def test_repelling_fixed_point_of_many_unknowns_is_reported():
    n = 3000
    sol = fixed_point(
        lambda z: np.tanh(1.5 * z + 0.01 * np.roll(z, 1)), np.full(n, 1e-9), solver=Newton(), on_failure="ignore"
    )
    assert sol.status[0] == irnn.Status.UNSTABLE


def test_many_unknowns_that_are_not_coupled_at_all():
    sol = fixed_point(lambda z, a: np.tanh(a), np.zeros(3000), args=(np.linspace(-1, 1, 3000),), solver=Newton())
    np.testing.assert_allclose(sol.vjp(np.ones(3000))["a"], 1 - sol.value**2)


@pytest.mark.parametrize("n", [150, 600])
def test_products_give_the_matrix_where_gmres_does_not_do(n, rng):
    Q, P = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    A = Q * np.geomspace(1e-6, 1, n) @ P
    b = A @ rng.standard_normal(n)
    sol = root(lambda z, b: A @ z - b, np.zeros(n), args=(b,), vjp=lambda v, z, b: (A.T @ v, -v))
    np.testing.assert_allclose(A @ sol.value, b, rtol=1e-7, atol=1e-9)
    v = A.T @ rng.standard_normal(n)
    np.testing.assert_allclose(A.T @ sol.vjp(v)["b"], v, rtol=1e-6, atol=1e-7)


def test_singular_solution_of_many_unknowns_has_no_derivative():
    sol = root(lambda z, a: (z - a) ** 2, np.full(3000, 1.5), args=(np.ones(3000),))
    with pytest.raises(ConvergenceError, match="singular at the solution"):
        sol.vjp(np.ones(3000))


# --- one problem at a time -----------------------------------------------------------------------------------


def test_one_problem_is_solved_as_in_a_batch(rng):
    """The way of a single problem is another one, to the same numbers."""

    def cubic(z, a):
        return z**3 + z - a

    def cosine(z, a):
        return np.cos(a * z)

    a = rng.uniform(0.1, 0.9, (20, 3))
    for solve, f in ((root, cubic), (fixed_point, cosine)):
        batch = solve(f, np.ones((20, 3)), args=(a,), batched="a")
        for k, own in enumerate(a):
            one = solve(f, np.ones(3), args=(own,))
            np.testing.assert_allclose(one.value, batch.value[k], rtol=1e-14)
            assert one.iterations[0] == batch.iterations[k]


def test_one_problem_with_a_wrong_complex_step_is_solved():
    for f in (lambda z: np.real(z) ** 2 - 2 + 1e6 * (z - np.real(z)), lambda z: np.array([float(z[0]) ** 2 - 2])):
        np.testing.assert_allclose(root(f, [1.0]).value, [np.sqrt(2)], rtol=1e-9)


def test_real_part_of_a_complex_value_is_not_taken_for_a_real_value():
    """For complex z the root of a negative number exists, with the real part 0."""
    sol = root(lambda z: np.sqrt(z) + z + 3, [-3.0], on_failure="ignore")
    assert not sol.converged.any()


def test_start_that_is_near_a_root_is_examined_with_care():
    wrong = Counted(lambda z: (z - 1) * np.where(np.imag(z) == 0, 1, 1e12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(root(wrong, [1 + 1e-5]).value, [1.0], rtol=1e-10)


@pytest.mark.julia
def test_many_unknowns_that_do_not_depend_on_an_argument_have_a_derivative_of_zero():
    f = irnn.julia("(z, a, b) -> 2 .* z .- a .- 0.1 .* sum(z) ./ length(z) .+ 0 .* b")
    sol = root(f, np.zeros(2500), args=(1.0, 1.0), engine="julia")
    assert not sol.jacobian("b").any()
    np.testing.assert_allclose(sol.jacobian("a"), 1 / 1.9)


@pytest.mark.parametrize("hook", [False, True], ids=["values", "vjp"])
def test_complex_step_that_is_wrong_in_small_terms_of_a_stiff_system_gives_no_gradient(hook):
    n = 2500

    def with_drag(z, b):  # of |z| z the complex step gives half the derivative
        return (2 * z - np.append(0, z[:-1]) - np.append(z[1:], 0)) * n**2 + np.abs(z) * z - b

    def its_vjp(v, z, b):
        return (2 * v - np.append(0, v[:-1]) - np.append(v[1:], 0)) * n**2 + 2 * np.abs(z) * v, -v.sum()

    sol = root(with_drag, np.zeros(n), args=(10.0,), vjp=its_vjp if hook else None)
    with pytest.raises(ConvergenceError, match="GMRES did not solve the linear system of 2500 unknowns"):
        sol.vjp(np.ones(n))
