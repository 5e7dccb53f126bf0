"""The door to JAX: a network as a pure function, and equations written in JAX."""

from __future__ import annotations

import copy
import importlib
import sys

import numpy as np
import pytest
from conftest import OF_A_NUMBER, make_net, make_oscillating, make_overflowing

import implicit_rnn as irnn

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import implicit_rnn.jax as door  # noqa: E402

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64


@pytest.fixture(autouse=True)
def double():
    """64-bit numbers, in the threads of compiled code, too, which a context of ``enable_x64`` does not reach."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(name="p")
def parameters_of_the_net(net):
    return door.parameters(net)


@pytest.fixture(name="f")
def function_of_the_net(net):
    return door.function(net, solver=irnn.Auto(tol=1e-13))


def close(found, expected, rtol=1e-9, atol=1e-11):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=rtol, atol=atol)


def with_parameters(net, p):
    other = copy.copy(net)
    for name, weights in other.weights.items():
        weights[...] = p[name]
    return other


# --- a network as a function ---------------------------------------------------------------------------------


def test_the_engine_starts_where_code_is_compiled_and_not_in_a_thread_of_jax(monkeypatch, X):
    net, asked = make_net("numpy"), []
    f, p = door.function(net), door.parameters(net)
    monkeypatch.setattr("implicit_rnn.network.get_engine", asked.append)
    jax.jit(f).lower(p, X)  # without running it
    assert asked == ["numpy"]
    monkeypatch.delenv("IMPLICIT_RNN_ENGINE", raising=False)
    monkeypatch.setattr("implicit_rnn.equations.solving.get_engine", asked.append)
    jax.jit(lambda a: door.root(irnn.julia("(z, a) -> z .- a"), jnp.ones(1), args=(a,))).lower(1.0)
    assert asked == ["numpy", "julia"]


def test_function_gives_the_outputs_of_the_network_with_and_without_jit(net, f, p, X):
    expected = net.predict(X)
    close(f(p, X), expected)
    close(jax.jit(f)(p, X), expected)
    close(jax.jit(f)(p, X.reshape(3, 4, 3)), expected.reshape(3, 4, 2))
    close(f(p, X[0]), expected[0])


def test_function_is_pure(net, f, p, X):
    before = net.parameters.copy()
    doubled = jax.tree.map(lambda w: 2 * w, p)
    close(f(doubled, X), with_parameters(net, doubled).predict(X))
    close(f(p, X), net.predict(X))
    np.testing.assert_array_equal(net.parameters, before)


@pytest.mark.parametrize("of", ["outputs", "state"])
def test_check_grads_passes_for_parameters_and_inputs(net, p, X, of):
    f = door.function(net, of=of, solver=irnn.Auto(tol=1e-13))
    check_grads(f, (p, X[:3]), order=1)
    check_grads(jax.jit(f), (p, X[:3]), order=1)


def test_value_and_gradient_are_those_of_the_network(net, f, p, X, Y):
    value, gradient = jax.jit(jax.value_and_grad(lambda p: ((f(p, X) - Y) ** 2).sum(1).mean()))(p)
    expected, flat = net.loss_and_gradient(X, Y)
    scale = expected / value
    for name, part in net.named(flat).items():
        close(scale * gradient[name], part, rtol=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_over_parameters_over_samples_and_over_both(net, f, p, X, compiled):
    nets = [with_parameters(net, jax.tree.map(lambda w, k=k: k * w, p)) for k in (0.5, 1.0)]
    both = jax.tree.map(lambda *w: jnp.stack(w), *(door.parameters(each) for each in nets))
    split = jnp.asarray(X.reshape(2, 6, 3))
    wrap = jax.jit if compiled else lambda g: g
    close(wrap(jax.vmap(f, (0, None)))(both, X), [each.predict(X) for each in nets])
    close(wrap(jax.vmap(f, (None, 0)))(p, split), [net.predict(part) for part in split])
    close(wrap(jax.vmap(f))(both, split), [each.predict(part) for each, part in zip(nets, split, strict=True)])
    close(wrap(jax.vmap(jax.vmap(f, (None, 0)), (0, None)))(both, split)[1, 0], nets[1].predict(split[0]))


def test_vmap_of_the_gradient_gives_that_of_each_sample(net, f, p, X):
    each = jax.jit(jax.vmap(jax.grad(lambda p, x: f(p, x).sum()), (None, 0)))(p, X)
    for k in range(3):
        expected, _ = net.vjp(X[k : k + 1], np.ones((1, 2)))
        for name, part in net.named(expected).items():
            close(each[name][k], part, rtol=1e-7, atol=1e-9)


def test_sample_without_equilibrium_is_an_error_that_says_so(engine):
    net = make_oscillating(engine)
    f = door.function(net, solver="picard")
    with pytest.raises(Exception, match="1 of 2 samples did not reach an equilibrium"):
        jax.block_until_ready(jax.jit(f)(door.parameters(net), np.array([[0.1], [5.0]])))


def test_outside_compiled_code_errors_are_those_of_the_network(engine):
    net = make_oscillating(engine)
    p = door.parameters(net)
    with pytest.raises(irnn.ConvergenceError, match="1 of 2 samples"):
        door.function(net, solver="picard")(p, np.array([[0.1], [5.0]]))
    with pytest.raises(ValueError, match="X has NaN or infinity in 1 of 2 samples, first in sample 1"):
        door.function(net)(p, np.array([[0.1], [np.nan]]))


@pytest.mark.parametrize("compiled", [False, True])
def test_sample_without_equilibrium_that_is_left_out_does_not_spoil_the_gradient(engine, compiled):
    net, X, known = (
        make_overflowing(engine),
        jnp.array([[1.0, 1e150], [2.0, 0], [3.0, 0]]),
        np.array([False, True, True]),
    )
    f, p = door.function(net, on_failure="ignore"), door.parameters(net)

    def loss(p, X):
        return jnp.where(known[:, None], f(p, X), 0).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1))) if compiled else jax.grad(loss, (0, 1))
    expected = jax.grad(lambda p, X: f(p, X).sum(), (0, 1))(p, X[known])
    (dp, dX), (dp_known, dX_known) = gradient(p, X), expected
    assert dp_known["W"].any()
    jax.tree.map(close, dp, dp_known)
    close(dX, np.concatenate([np.zeros((1, 2)), dX_known]))


def test_no_samples_give_no_outputs_and_gradients_of_zero(f, p, X):
    assert f(p, X[:0]).shape == jax.jit(f)(p, X[:0]).shape == (0, 2)
    gradient = jax.grad(lambda p: f(p, X[:0]).sum())(p)
    assert all((part == 0).all() for part in gradient.values())


def test_second_derivatives_are_refused_in_so_many_words(f, p, X):
    with pytest.raises(TypeError, match=r"first derivatives only.*hessian_vector_product"):
        jax.hessian(lambda x: f(p, x).sum())(X[0])


@pytest.mark.parametrize("wrap", [lambda g: g, jax.jit])
@pytest.mark.parametrize("map_samples", [lambda g: g, lambda g: lambda p, X: jax.vmap(lambda x: g(p, x))(X)])
def test_jacobians_in_forward_mode_are_those_in_reverse_mode(f, p, X, wrap, map_samples):
    g = map_samples(f)
    expected = jax.jacrev(f, (0, 1))(p, X[:2])
    for derive in (lambda g: wrap(jax.jacfwd(g, (0, 1))), lambda g: jax.jacfwd(wrap(g), (0, 1))):
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-7, atol=1e-9), derive(g)(p, X[:2]), expected)
    assert jax.jacfwd(wrap(f))(p, X[:0])["W"].shape == (0, 2, *p["W"].shape)


def test_a_network_may_be_part_of_an_equation(engine):
    net = irnn.Network(inputs=1, layers=[4], outputs=1, seed=0, dtype="float32", engine=engine)
    f, p, a = door.function(net), door.parameters(net), jnp.array([[0.5], [2.0]], "float32")

    @jax.jit
    def solve(p, a):
        return door.root(lambda z, p, a: z + z**3 - f(p, z) - a, 0 * a, args=(p, a), batched="a")

    z = np.asarray(solve(p, a))
    close(z + z**3 - net.predict(z), a, rtol=1e-5)
    slope = 1 + 3 * z**2 - net.jvp(z, np.ones_like(z))
    dp, da = jax.grad(lambda p, a: solve(p, a).sum(), (0, 1))(p, a)
    close(da, 1 / slope, rtol=1e-4)
    for name, part in net.named(net.vjp(z, 1 / slope)[0]).items():
        close(dp[name], part, rtol=1e-3, atol=1e-5)


def test_bad_input_is_refused_by_name(X):
    net = make_net("numpy")
    f, p = door.function(net), door.parameters(net)
    with pytest.raises(ValueError, match=r"X has shape \(12, 2\); expected \(\.\.\., 3\)"):
        f(p, X[:, :2])
    with pytest.raises(
        TypeError, match=r"X has dtype float32, but the network has float64; convert it, \.astype\('float64'\)"
    ):
        f(p, X.astype(np.float32))
    with pytest.raises(TypeError, match="W has dtype int"):
        f(p | {"W": np.zeros(p["W"].shape, int).tolist()}, X)
    with pytest.raises(ValueError, match="the parameters have the shapes"):
        f(p | {"W": p["W"][:2]}, X)
    with pytest.raises(TypeError, match="the parameters are a list; expected a dictionary"):
        f(list(p.values()), X)
    with pytest.raises(TypeError, match="net is 3"):
        door.function(3)
    with pytest.raises(ValueError, match="Unrolled"):
        door.function(net, adjoint=irnn.Unrolled(3))
    with pytest.raises(ValueError, match=r"solver is 'newtom'.*did you mean Newton"):
        door.function(net, solver="newtom")
    with pytest.raises(ValueError, match="on_failure is 'stop'"):
        door.function(net, on_failure="stop")
    with enable_x64(False):
        for call in (lambda: door.parameters(net), lambda: f(p, X), lambda: jax.jit(f)(p, X)):
            with pytest.raises(TypeError, match="jax_enable_x64"):
                call()


# Julia collects its garbage in these calls, on threads of XLA.
@pytest.mark.julia
def test_ten_thousand_calls_from_compiled_code_end(X):
    net = make_net("julia", dtype="float32")
    f, p, x = door.function(net), door.parameters(net), jnp.asarray(X, jnp.float32)
    steps = 1000

    @jax.jit
    def descend(p):
        def step(p, _):
            value, g = jax.value_and_grad(lambda p: (f(p, x) ** 2).mean())(p)
            return jax.tree.map(lambda w, d: w - jnp.float32(0.01) * d, p, g), value

        return jax.lax.scan(step, p, None, length=steps)

    for _ in range(5):  # a call forward and one back in each step
        p, values = jax.block_until_ready(descend(p))
    assert values[-1] < 1e-3


# --- equations -----------------------------------------------------------------------------------------------

COUPLING = 0.3 * np.random.default_rng(0).standard_normal((3, 3))
DRIVE = np.random.default_rng(1).standard_normal((2, 3))


def tanh(z, W, x):
    return jnp.tanh(W @ z + x)


@pytest.mark.parametrize("solver", ["picard", "anderson", "newton", "auto"])
def test_fixed_point_of_each_sample_with_and_without_jit(solver):
    def solve(W, x):
        return door.fixed_point(tanh, np.zeros((2, 3)), args=(W, x), batched="x", solver=solver)

    for z in (solve(COUPLING, DRIVE), jax.jit(solve)(COUPLING, DRIVE)):
        close(z, np.tanh(z @ COUPLING.T + DRIVE))


@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit])
@OF_A_NUMBER
def test_one_unknown_may_be_a_number(f, wrap):
    def z(a, start=1.0):
        return door.root(f, start, args=(a,))

    expected = irnn.root(lambda z, a: z**3 + z - a, 1.0, args=(2.5,))
    assert wrap(z)(2.5).shape == ()
    close(wrap(z)(2.5), expected.value)
    close(wrap(jax.grad(z))(2.5), expected.vjp(1.0)["a"])
    for values, one in zip(
        wrap(jax.vmap(jax.value_and_grad(z)))(np.full(2, 2.5)), jax.value_and_grad(z)(2.5), strict=True
    ):
        close(values, np.full(2, one))
    close(wrap(jax.vmap(z))(np.full(2, 2.5), np.array([1.0, 3.0])), np.full(2, expected.value))


def test_check_grads_passes_for_equations_to_the_second_order():
    def solve(W, x):
        start = np.zeros((2, 3))
        return door.root(lambda z, W, x: tanh(z, W, x) - z, start, args=(W, x), batched=[1])

    check_grads(jax.jit(solve), (COUPLING, DRIVE), order=1)
    kepler = jax.jit(lambda e: door.root(lambda E, e: E - e * jnp.sin(E) - 1, np.ones(1), args=(e,)))
    check_grads(kepler, (0.5,), order=2)


@pytest.mark.parametrize("second", [jax.hessian, lambda f: jax.grad(jax.jacfwd(f))], ids=["hessian", "forward"])
def test_second_derivatives_of_equations_within_scan_are_those_of_a_loop(second):
    def step(x, a):  # of the implicit Euler method
        return door.root(lambda z, x, a: z - x + a * z**3, x, args=(x, a))

    def scanned(a):
        return jax.lax.scan(lambda x, _: (step(x, a), None), jnp.ones(1), length=2)[0][0]

    close(second(scanned)(0.1), jax.grad(jax.grad(lambda a: step(step(jnp.ones(1), a), a)[0]))(0.1), rtol=1e-8)


def test_equations_do_without_promotion_of_ranks():
    with jax.numpy_rank_promotion("raise"):
        close(jax.grad(lambda a: door.fixed_point(lambda z, a: a * z + 1, jnp.ones(1), args=(a,))[0])(0.5), 4.0)


def test_vmap_over_equations():
    def z(a):
        return door.fixed_point(lambda z, a: jnp.cos(a * z), np.array([0.5]), args=(a,))[0]

    a = np.linspace(0.1, 1.2, 5)
    expected = irnn.fixed_point(lambda z, a: np.cos(a * z), np.full((5, 1), 0.5), args=(a[:, None],), batched="a").value
    close(jax.vmap(z)(a), expected[:, 0])
    close(jax.jit(jax.vmap(jax.grad(z)))(a), [jax.grad(z)(each) for each in a], rtol=1e-8)


def test_what_an_equation_closes_over_counts_as_an_argument():
    def by_argument(a):
        return door.fixed_point(lambda z, a: jnp.cos(a * z), np.array([0.5]), args=(a,))[0]

    def by_closure(a):
        return door.fixed_point(lambda z: jnp.cos(a * z), np.array([0.5]))[0]

    def by_both(a):  # the derivative has a part of either
        return door.fixed_point(lambda z, b: jnp.cos(jnp.sqrt(a * b) * z), np.array([0.5]), args=(a,))[0]

    a = np.array([0.3, 0.8])
    for transform in (lambda f: f, jax.grad, jax.jacfwd, lambda f: jax.grad(jax.grad(f))):
        f = transform(by_argument)
        expected = [f(each) for each in a]
        for closure in (by_closure, by_both):
            f, of_compiled = transform(closure), transform(jax.jit(closure))
            close([f(each) for each in a], expected, rtol=1e-8)
            close(jax.vmap(f)(a), expected, rtol=1e-8)
            close(jax.jit(jax.vmap(f))(a), expected, rtol=1e-8)
            close([of_compiled(each) for each in a], expected, rtol=1e-8)


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, lambda f: jax.grad(jax.grad(f))])
def test_outside_compiled_code_failures_are_told_whatever_an_equation_closes_over(transform):
    with pytest.raises(irnn.ConvergenceError, match="1 of 1 samples did not converge"):
        transform(lambda a: door.root(lambda z: z**2 + a, np.ones(1))[0])(1.0)
    solver = irnn.Newton(max_iterations=2)
    with pytest.raises(irnn.ConvergenceError, match="1 of 1 samples did not converge"):
        transform(lambda a: door.root(lambda z: z**2 - a, np.array([90.0]), solver=solver)[0])(1.0)


def test_solution_is_a_good_start_in_compiled_code():
    solve = jax.jit(lambda z, a: door.fixed_point(lambda z, a: jnp.cos(a * z), z, args=(a,), batched="a"))
    a = np.linspace(0.1, 1.2, 5)[:, None]
    z = solve(np.full((5, 1), 0.5), a)
    for nearby in (0, 1e-16, 1e-12, 1e-10, 1e-8):
        close(solve(z * (1 + nearby), a), z, rtol=1e-9)
    close(jax.lax.fori_loop(0, 9, lambda _, z: solve(z, a), np.full((5, 1), 0.5)), z)


@pytest.mark.parametrize("a", [2**40, np.array([2**40]), np.int64(2**31), np.array([2**63], np.uint64)], ids=repr)
def test_whole_numbers_that_would_be_cut_are_refused(a):
    with enable_x64(False):
        np.testing.assert_array_equal(door.root(lambda z, a: z - a, jnp.ones(1), args=(np.array([2**30]),)), 2**30)
        with pytest.raises(
            ValueError, match=r"args\[0\] has whole numbers beyond those that JAX has here; pass floats"
        ):
            door.root(lambda z, a: z - a, jnp.ones(1), args=(a,))


def test_arguments_may_be_pytrees():
    def f(z, p, x):
        return jnp.tanh(p["W"] @ z + p["b"][0] * p["b"][1] + x[0])

    p, x = {"W": COUPLING, "b": [np.arange(3.0), 0.5]}, (DRIVE,)

    def by_tree(p, x):
        return door.fixed_point(f, np.zeros((2, 3)), args=(p, x), batched="x")

    def by_arrays(p, x):
        args = (p["W"], p["b"][0] * p["b"][1] + x[0])
        return door.fixed_point(tanh, np.zeros((2, 3)), args=args, batched="x")

    for wrap in (lambda g: g, jax.jit):
        close(wrap(by_tree)(p, x), by_arrays(p, x))
        found, expected = (jax.jacrev(wrap(g), (0, 1))(p, x) for g in (by_tree, by_arrays))
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-8), found, expected)
    with pytest.raises(ValueError, match=r"args\[0\]\['W'\] has shape \(3, 3\); expected \(2, \.\.\.\)"):
        door.fixed_point(f, np.zeros((2, 3)), args=(p, x), batched=["p", "x"])
    with pytest.raises(TypeError, match=r"args\[0\]\['W'\] is a set; expected a number or an array"):
        door.fixed_point(f, np.zeros((2, 3)), args=({"W": {1.0}}, x))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
@pytest.mark.parametrize("held", [False, True], ids=["argument", "closure"])
def test_arguments_may_be_complex(wrap, held):
    def sizes(c):  # |c|² of each sample
        if held:
            return door.root(lambda z: z - (c * c.conj()).real, np.ones(2))
        return door.root(lambda z, c: z - (c * c.conj()).real, np.ones((2, 1)), args=(c,), batched="c")[:, 0]

    c = jnp.array([1 + 2j, 3 - 1j]) if held else jnp.array([[1 + 2j], [3 - 1j]])
    close(wrap(sizes)(c), [5, 10])
    close(wrap(jax.grad(lambda c: sizes(c).sum()))(c), 2 * c.conj())


def test_random_numbers_of_a_key_may_drive_an_equation():
    def drift(z, key):
        return 0.5 * z + jax.random.normal(key, (1,))

    key = jax.random.PRNGKey(0)
    close(door.fixed_point(drift, np.zeros(1), args=(key,)), 2 * jax.random.normal(key, (1,)))
    with pytest.raises(TypeError, match=r"args\[0\] is a random key .*jax\.random\.key_data"):
        door.fixed_point(drift, np.zeros(1), args=(jax.random.key(0),))


def test_answer_in_compiled_code_does_not_depend_on_the_unit():
    sizes = 10.0 ** np.arange(-18, 19, 4)[:, None]
    z = jax.jit(lambda a: door.root(lambda z, a: z**2 - a, 3 * sizes, args=(a,), batched="a"))(4 * sizes**2)
    close(z / sizes, np.full_like(sizes, 2.0), rtol=1e-9)


@pytest.mark.parametrize(
    ("f", "start"), [(lambda z: z**2 + 1, 1.0), (lambda z: 1 / (z - 1), 1 + 1e-13), (lambda z: jnp.sqrt(z) + 1, 1e-12)]
)
def test_equation_without_a_root_is_nan_in_compiled_code_and_an_error_outside(f, start):
    assert np.isnan(jax.jit(lambda z0: door.root(f, z0))(np.array([start]))).all()
    with pytest.raises(irnn.ConvergenceError):
        door.root(f, np.array([start]))


def test_root_from_a_far_start_is_as_exact_as_from_a_near_one_in_compiled_code():
    start = np.array([[1e-12], [1.0], [1e8], [1e15]])
    close(jax.jit(lambda z: door.root(lambda z: z**2 - 2, z))(start), np.full((4, 1), np.sqrt(2)), rtol=1e-10)


def test_roots_far_below_the_start_are_found_in_compiled_code():
    start, a = np.array([[1e20], [1.0], [1.0], [1.3]]), np.array([[2.0], [1e-52], [0.0], [0.0]])
    z = jax.jit(lambda z, a: door.root(lambda z, a: z * z - a, z, args=(a,), batched="a"))(start, a)
    close(z, np.sqrt(a), rtol=1e-14)
    hidden = jax.jit(lambda z: door.root(lambda z: jnp.sin(z + jnp.pi), z))(np.ones(1))  # by rounding
    assert abs(hidden[0]) < 1e-15


def test_infinity_where_f_vanishes_is_no_root_in_compiled_code():
    start = np.array(
        [[1.0], [0.1]], np.float32
    )  # in which Newton's steps come to where exp(-z²) is too small for a number
    z = jax.jit(lambda z: door.root(lambda z: z * jnp.exp(-(z**2)), z))(start)
    assert np.isnan(z[0, 0])
    assert z[1, 0] == 0


def test_derivatives_are_nan_where_the_jacobian_is_singular():
    def z(a):
        return door.root(lambda z, a: z**2 - a, jnp.ones(1), args=(a,))[0]

    assert np.isnan(jax.grad(z)(0.0))
    assert np.isnan(jax.jacfwd(z)(0.0))
    at_a_fold = jax.grad(lambda a: door.root(lambda z, a: jnp.sin(z) - a, jnp.ones(1), args=(a,))[0])
    assert np.isnan(at_a_fold(1.0))  # the start is near it
    assert at_a_fold(1 - 1e-8) == pytest.approx(1 / np.sqrt(2e-8), rel=1e-3)
    assert jax.grad(z)(4.0) == pytest.approx(0.25)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: lambda b: jax.vmap(f)(jnp.array([b, b]))[1]])
@pytest.mark.parametrize(
    "f",
    [
        lambda z, a, b: z**2 - a * b,
        lambda z, a, b: z - jnp.sqrt(a * b),  # NaN
        pytest.param("(z, a, b) -> z .^ 2 .- a .* b", marks=pytest.mark.julia),
    ],
)
def test_sample_that_failed_does_not_spoil_what_it_shares_where_it_is_left_out(f, wrap):
    f = irnn.julia(f) if isinstance(f, str) else f
    a = jnp.array([1.0, -1.0, 4.0])

    def solutions(b):
        z = door.root(f, jnp.ones((3, 1)), args=(a, b), batched="a", on_failure="ignore")
        return z[:, 0]

    solutions, b = wrap(solutions), 2.0
    known = jnp.array([True, False, True])
    close(jnp.isfinite(solutions(b)), known)
    close(jax.grad(lambda b: jnp.where(known, solutions(b), 0).sum())(b), (1 + 2) / 2 / b**0.5)
    close(jax.grad(lambda b: solutions(b)[0])(b), 1 / 2 / b**0.5)
    assert np.isnan(jax.grad(lambda b: solutions(b).sum())(b))
    close(jnp.isfinite(jax.jacfwd(solutions)(b)), known)
    close(jnp.isfinite(jax.jacrev(solutions)(b)), known)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_sample_that_failed_does_not_spoil_what_it_shares_where_each_is_mapped_for_itself(wrap):
    def solutions(a, b):
        return jax.vmap(lambda a: door.root(lambda z, a: z - jnp.sqrt(a * b), jnp.ones(1), args=(a,))[0])(a)

    def loss(b):
        z = solutions(jnp.array([1.0, -1.0, 4.0]), b)
        return jnp.where(jnp.isfinite(z), z, 0).sum()

    close(wrap(jax.grad(loss))(2.0), (1 + 2) / 2 / 2**0.5)
    close(wrap(jax.grad(jax.grad(loss)))(2.0), -(1 + 2) / 4 / 2**1.5)
    own, shared = wrap(jax.grad(lambda a, b: solutions(a, b).sum(), (0, 1)))(jnp.array([1.0, -1.0]), 2.0)
    close(own, [2**0.5 / 2, np.nan])
    assert np.isnan(shared)


def test_a_sample_that_failed_has_no_derivative_even_where_f_has():
    def z(b):
        return door.root(lambda z, b: z - jnp.sqrt(-1.0) - b, jnp.ones(1), args=(b,), on_failure="ignore")[0]

    assert np.isnan(jax.grad(z)(2.0))
    assert np.isnan(jax.jacfwd(z)(2.0))


@pytest.mark.parametrize("f", [lambda z, a, b: z**2 - a * b, lambda z, a, b: z - jnp.sqrt(a * b)])
def test_sample_that_failed_does_not_spoil_second_derivatives_either(f):
    def loss(b):
        a = jnp.array([1.0, -1.0])
        z = door.root(f, jnp.ones((2, 1)), args=(a, b), batched="a", on_failure="ignore")
        return jnp.where(jnp.isfinite(z), z, 0).sum()

    close(jax.grad(jax.grad(loss))(2.0), -1 / 4 / 2**1.5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_an_equation_may_be_of_another_precision_than_its_start(wrap):
    def z(a):
        return door.root(lambda z, a: jnp.array([2.0]) * z**2 - a, jnp.ones(1, "float32"), args=(a,))[0]

    for dtype in ("float64", "bfloat16"):
        a = jnp.asarray(8, dtype)
        assert (wrap(z)(a).dtype, wrap(jax.grad(z))(a).dtype) == (jnp.float32, dtype)
        close(wrap(jax.grad(z))(a).astype("float64"), 0.125, rtol=1e-6)


def minus(z, a):
    return z - a


@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit], ids=["plain", "jit"])
@pytest.mark.parametrize(
    ("f", "z0", "settings", "error", "message"),
    [
        (lambda z: z[:1], np.ones(2), {}, ValueError, r"f returned an array of shape \(1,\); expected \(2,\)"),
        (lambda z: z * jnp.ones(3), 1.0, {}, ValueError, r"of shape \(3,\); expected a number, as z is one"),
        (lambda z: None, np.ones(2), {}, TypeError, "f returned None; expected an array of float64"),
        (lambda z: z.astype(int), np.ones(2), {}, TypeError, r"f returned .*int.*; expected an array of float64"),
        (jnp.sin, np.ones(2), {"solver": "picard"}, ValueError, "Picard iterates z = f"),
        (jnp.sin, np.ones((0, 2)), {}, ValueError, r"z0 has shape \(0, 2\)"),
        (jnp.sin, np.zeros(2, int), {}, TypeError, "z0 has shape"),
        (jnp.sin, {"x": np.zeros(2)}, {}, TypeError, r"z0 is a dict; expected one array, \(n,\) or \(B, n\)"),
        (3, np.zeros(2), {}, TypeError, "f is 3; expected a function"),
        (minus, np.zeros(2), {}, ValueError, "f takes z and 1 argument"),
        (minus, np.ones(2), {"args": 2.0}, TypeError, "args is a float; expected a tuple of arguments"),
        (minus, np.ones(2), {"args": ("text",)}, TypeError, r"args\[0\] is a str; expected a number or an array"),
        (minus, COUPLING, {"args": (np.ones(2),), "batched": "a"}, ValueError, r"\(2,\); expected \(3, .* 3 samples"),
        (minus, COUPLING, {"args": (COUPLING[:, :1],)}, ValueError, "the 3 rows of a belong to .*, name a in batched"),
        (minus, COUPLING[:, :2], {"args": (np.ones(3),)}, TypeError, "the 3 rows of a belong to .* name a in batched"),
    ],
)
def test_bad_equations_are_refused_by_name(wrap, f, z0, settings, error, message):
    with pytest.raises(error, match=message):
        wrap(lambda: door.root(f, z0, **settings))()


def branches(z, a):
    return z if z[0] > 0 else a


def test_a_function_that_jax_cannot_trace_is_told_so_in_the_words_of_jax():
    with pytest.raises(TypeError, match=r"tracing the function branches at .*test_jax\.py") as caught:
        door.root(branches, np.ones((3, 1)), args=(np.ones((3, 1)),))
    assert "batched" not in str(caught.value)


# --- equations in Julia code ---------------------------------------------------------------------------------


@pytest.mark.julia
@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit])
def test_julia_code_has_the_solution_and_the_derivatives_of_the_same_function_in_jax(wrap):
    def solve(f):
        return lambda a, s: door.root(f, np.ones((3, 2)), args=(a, s, 2), batched="a")

    julia = solve(irnn.julia("(z, a, s, k) -> [s[1] * z[1] - z[2]^2 - a[1], z[1] * z[k] + s[2] * z[2] - a[2]]"))
    same = solve(lambda z, a, s, k: jnp.stack([s[0] * z[0] - z[1] ** 2 - a[0], z[0] * z[1] + s[1] * z[1] - a[1]]))
    a, s = np.array([[1.0, 2.0], [1.5, 1.8], [0.5, 1.0]]), np.array([2.0, 0.5])
    close(wrap(julia)(a, s), same(a, s))
    for differentiate in (jax.jacrev, jax.jacfwd):
        for found, expected in zip(
            wrap(differentiate(julia, (0, 1)))(a, s), differentiate(same, (0, 1))(a, s), strict=True
        ):
            close(found, expected, rtol=1e-7, atol=1e-9)
    close(jax.vmap(julia, (0, None))(np.stack([a, 2 * a]), s), np.stack([same(a, s), same(2 * a, s)]))


@pytest.mark.julia
def test_second_derivatives_of_julia_code_are_refused_in_so_many_words():
    def z(a):
        return door.root(irnn.julia("(z, a) -> z .^ 2 .- a"), jnp.ones(1), args=(a,))[0]

    assert jax.grad(z)(4.0) == pytest.approx(0.25)
    with pytest.raises(
        TypeError, match="has first derivatives only, and this differentiates them again; write f in JAX"
    ):
        jax.grad(jax.grad(z))(4.0)


def test_a_function_of_jax_cannot_run_on_a_device():
    with pytest.raises(ValueError, match="a Python function cannot run on device='cuda'; write it as Julia code"):
        door.root(lambda z: z, np.ones(2), device="cuda")


# --- versions and units --------------------------------------------------------------------------------------


def test_jax_that_is_too_old_is_refused_with_its_version(monkeypatch):
    monkeypatch.delitem(sys.modules, "implicit_rnn.jax")
    monkeypatch.setattr(jax, "__version_info__", (0, 4, 34))
    monkeypatch.setattr(jax, "__version__", "0.4.34")
    with pytest.raises(ImportError, match=r"needs JAX 0.4.35 or newer, and this is 0.4.34: pip install -U jax"):
        importlib.import_module("implicit_rnn.jax")


@pytest.mark.parametrize(
    ("dtype", "unit"), [("float32", 1e-23), ("float32", 1e25), ("float64", 1e-170), ("float64", 1e160)]
)
def test_squares_of_conditions_may_vanish_or_overflow_in_compiled_code(dtype, unit):
    start, a = jnp.ones(1, dtype), jnp.asarray(2, dtype)
    z = jax.jit(lambda a: door.root(lambda z, a: unit * (z**2 - a), start, args=(a,)))(a)
    np.testing.assert_allclose(z, np.sqrt(2), rtol=1e-6 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_units_of_single_conditions_and_unknowns_do_not_matter(compiled, rng):
    units, rows = (10.0 ** rng.permutation(np.linspace(-15, 15, 4)) for _ in range(2))
    M, a = rng.standard_normal((4, 4)) + 3 * np.eye(4), jnp.linspace(1, 2, 4)

    def solve(units, rows):
        def of(a):
            return door.root(lambda z, a: rows * (M @ (z / units) + (z / units) ** 3 / 4 - a), units, args=(a,)) / units

        of = jax.jit(of) if compiled else of
        return of(a), jax.jacobian(of)(a)

    for found, expected in zip(solve(units, rows), solve(np.ones(4), np.ones(4)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
