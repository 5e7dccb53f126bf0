"""The door to PyTorch: a network as a layer, and equations written in PyTorch."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
from conftest import OF_A_NUMBER, make_net, make_oscillating, make_overflowing

import implicit_rnn as irnn

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.data import DataLoader, Dataset, TensorDataset  # noqa: E402

from implicit_rnn.torch import ImplicitRNN, fixed_point, root  # noqa: E402


def make_deep(engine, **settings):
    layers = [irnn.Layer(4), irnn.Layer(3, "sigmoid")]
    return irnn.Network(3, layers, outputs=2, feedback=True, input_skips=[1], seed=3, engine=engine, **settings)


def vector(arrays):
    """As in ``Network.parameters``: blocks one after the other, column by column."""
    return np.concatenate([array.detach().numpy().reshape(-1, order="F") for array in arrays])


def flat(layer):
    return vector(layer.parameters())


@pytest.fixture
def layer(engine):
    return ImplicitRNN(make_net(engine))


@pytest.fixture
def x(X):
    return torch.from_numpy(X)


# --- a network as a layer ------------------------------------------------------------------------------------


def test_layer_gives_the_outputs_of_the_network_in_the_shape_of_its_inputs(layer, x):
    expected = layer.net.predict(x.numpy())
    np.testing.assert_array_equal(layer(x).detach(), expected)
    np.testing.assert_allclose(layer(x[0]).detach(), expected[0], rtol=1e-9)
    np.testing.assert_array_equal(layer(x.reshape(3, 4, 3)).detach(), expected.reshape(3, 4, 2))


def test_parameters_are_the_memory_of_the_network(layer, x):
    assert [name for name, _ in layer.named_parameters()] == list(layer.net.weights)
    np.testing.assert_array_equal(flat(layer), layer.net.parameters)
    layer.net.parameters[...] *= 2
    np.testing.assert_array_equal(flat(layer), layer.net.parameters)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    np.testing.assert_array_equal(flat(layer), layer.net.parameters)


@pytest.mark.parametrize("of", ["outputs", "state"])
@pytest.mark.parametrize("make", [make_net, make_deep])
def test_gradcheck_passes_for_inputs_and_parameters(engine, make, of, x):
    layer = ImplicitRNN(make(engine), of=of, solver=irnn.Auto(tol=1e-13))
    inputs = (x[:4].clone().requires_grad_(), *layer.parameters())
    assert gradcheck(lambda x, *_: layer(x), inputs)


def test_gradient_of_a_loss_is_that_of_the_network(layer, x, Y):
    loss = nn.functional.mse_loss(layer(x), torch.from_numpy(Y))
    loss.backward()
    value, gradient = layer.net.loss_and_gradient(x.numpy(), Y, loss="mse")
    found = vector(p.grad for p in layer.parameters())
    scale = value / loss.item()  # torch averages over the outputs too
    np.testing.assert_allclose(scale * found, gradient, rtol=1e-8, atol=1e-10)


def test_gradient_through_a_second_use_of_the_layer(layer, x):
    layer.net.parameters[...] *= 0.5
    once, twice = layer(x), layer(2 * x)
    (once * twice).sum().backward()
    p, g = layer.net.parameters, vector(w.grad for w in layer.parameters())
    direction = np.random.default_rng(0).standard_normal(len(p))

    def value(h):
        net = copy.deepcopy(layer.net)
        net.parameters = p + h * direction
        solver = irnn.Auto(tol=1e-13)
        return (net.predict(x.numpy(), solver=solver) * net.predict(2 * x.numpy(), solver=solver)).sum()

    assert g @ direction == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-6)


def test_second_derivatives_are_refused_in_so_many_words(layer, x):
    (g,) = torch.autograd.grad(layer(x).sum(), layer.W, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*hessian_vector_product"):
        g.sum().backward()


def test_transforms_of_functions_map_and_differentiate_the_layer_in_reverse_mode_only(layer, x):
    each = torch.func.vmap(layer)(x)
    torch.testing.assert_close(each, layer(x))
    J = torch.func.jacrev(layer)(x[:2])
    torch.testing.assert_close(J, torch.autograd.functional.jacobian(layer, x[:2]))
    weights = {name: w.detach() for name, w in layer.named_parameters()}
    one = torch.func.grad(lambda w, x: torch.func.functional_call(layer, w, x).sum())
    torch.testing.assert_close(torch.func.vmap(one, (None, 0))(weights, x)["W"][1], one(weights, x[1])["W"])
    with pytest.raises(RuntimeError, match=r"reverse mode only.*Network\.jvp"):
        torch.func.jacfwd(layer)(x)
    with pytest.raises(RuntimeError, match="one cotangent at a time: leave out vectorize=True"):
        torch.autograd.functional.jacobian(layer, x, vectorize=True)


def test_no_samples_give_no_outputs_and_gradients_of_zero(layer, x):
    x = x[:0].clone().requires_grad_()
    y = layer(x)
    assert y.shape == (0, 2)
    y.sum().backward()
    assert x.grad.shape == (0, 3)
    assert not vector(w.grad for w in layer.parameters()).any()


def test_parameters_may_be_parametrised(layer, x):
    class Half(nn.Module):
        def forward(self, w):
            return w / 2

    halved = copy.deepcopy(layer.net)
    halved.weights["R"][...] /= 2
    nn.utils.parametrize.register_parametrization(layer, "R", Half())
    torch.testing.assert_close(layer(x).detach(), torch.from_numpy(halved.predict(x.numpy())))
    layer(x).sum().backward()
    expected, _ = halved.vjp(x.numpy(), np.ones((12, 2)))
    np.testing.assert_allclose(layer.parametrizations.R.original.grad, halved.named(expected)["R"] / 2, atol=1e-9)
    np.testing.assert_array_equal(layer.net.weights["R"], layer.R.detach())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
@pytest.mark.parametrize("fused", [False, True])
def test_optimisers_change_the_network_as_they_do_a_layer_of_rows(optimizer, fused, x):
    kind = getattr(torch.optim, optimizer)
    if fused and optimizer not in ("SGD", "Adam", "AdamW"):
        pytest.skip("this optimiser is not fused")
    layer = ImplicitRNN(make_net("numpy"))
    rows = {name: w.detach().clone(memory_format=torch.contiguous_format) for name, w in layer.named_parameters()}
    settings = {"lr": 0.01} | ({"fused": True} if fused else {})
    ours, others = kind(layer.parameters(), **settings), kind(rows.values(), **settings)
    for _ in range(3):
        ours.zero_grad()
        layer(x).square().sum().backward()
        for name, w in layer.named_parameters():
            rows[name].grad = w.grad.contiguous()
        ours.step()
        others.step()
    for name, w in layer.named_parameters():
        torch.testing.assert_close(w.detach(), rows[name])
        np.testing.assert_array_equal(layer.net.weights[name], w.detach())


def test_transforms_of_functions_see_the_parameters_they_are_given(layer, x):
    weights = {name: 0.5 * w.detach() for name, w in layer.named_parameters()}
    halved = copy.deepcopy(layer.net)
    halved.parameters /= 2
    y = torch.func.functional_call(layer, weights, x)
    np.testing.assert_allclose(y.detach(), halved.predict(x.numpy()), rtol=1e-9)
    g = torch.func.grad(lambda w: torch.func.functional_call(layer, w, x).sum())(weights)
    expected, _ = halved.vjp(x.numpy(), np.ones((12, 2)))
    np.testing.assert_allclose(vector(g.values()), expected, atol=1e-9)


@pytest.mark.parametrize("way", ["deepcopy", "save", "state_dict", "assign", "double", "replaced", "data"])
def test_network_follows_the_parameters_whatever_torch_does_to_them(engine, way, x):
    layer = ImplicitRNN(make_net(engine, dtype="float32"))
    expected = layer(x.float()).detach()
    other = ImplicitRNN(make_net(engine, dtype="float32", seed=99))
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "save":
        torch.save(layer, stream := io.BytesIO())
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    elif way in ("state_dict", "assign"):
        other.load_state_dict(layer.state_dict(), assign=way == "assign")
    elif way == "double":
        other = copy.deepcopy(layer).double()
        assert other.net.dtype == np.float64
        x = x.double()
    else:
        weights = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
        for name, weight in weights.items():
            if way == "data":
                getattr(other, name).data = weight
            else:
                setattr(other, name, nn.Parameter(weight))
    np.testing.assert_allclose(other(x.to(other.W.dtype)).detach(), expected, rtol=1e-5, atol=1e-6)
    assert other.net is not layer.net
    np.testing.assert_array_equal(flat(other), other.net.parameters)
    with torch.no_grad():
        other.W += 1
    np.testing.assert_array_equal(flat(other), other.net.parameters)


def test_network_has_the_data_that_parameters_were_given_before_the_layer_is_called(layer, x):
    for weight in layer.parameters():
        weight.data = weight.data * 0.5
    np.testing.assert_array_equal(flat(layer), layer.net.parameters)
    np.testing.assert_array_equal(layer.net.predict(x.numpy()), layer(x).detach())


def test_network_of_a_layer_is_not_replaced_by_one_whose_parameters_would_be_lost(layer, engine):
    other = make_net(engine, seed=99)
    expected = other.parameters.copy()
    with pytest.raises(AttributeError, match=r"make another layer, ImplicitRNN\(net\)"):
        layer.net = other
    np.testing.assert_array_equal(other.parameters, expected)


def test_parameters_that_read_the_memory_of_each_other_are_copied_before_they_are_written(layer, x):
    R, W = layer.R.detach().clone(), layer.W.detach().clone()
    layer.R.data, layer.W.data = layer.R.data.T, layer.R.data[:, : W.shape[1]]
    layer(x)
    np.testing.assert_array_equal(layer.net.weights["R"], R.T)
    np.testing.assert_array_equal(layer.net.weights["W"], R[:, : W.shape[1]])


def test_parameters_of_another_module_are_not_taken_over_by_a_functional_call(layer, engine, x):
    other = ImplicitRNN(make_net(engine, seed=99))
    before, expected = layer.net.parameters.copy(), other(x).detach()
    torch.testing.assert_close(torch.func.functional_call(layer, dict(other.named_parameters()), x), expected)
    np.testing.assert_array_equal(layer.net.parameters, before)
    other.net.parameters *= 0
    assert not any(weight.any() for weight in other.parameters())  # still the memory of its own network


def test_tied_parameters_give_both_layers_what_they_are(engine, x):
    one, other = ImplicitRNN(make_net(engine)), ImplicitRNN(make_net(engine, seed=99))
    other.W = one.W
    for factor in (1.0, 2.0):
        with torch.no_grad():
            one.W.mul_(factor)
        for layer in (one, other):
            y = layer(x).detach()
            np.testing.assert_array_equal(flat(layer), layer.net.parameters)
            np.testing.assert_array_equal(y, layer.net.predict(x.numpy()))


def test_parameters_that_cannot_be_shared_among_processes_are_not_silently_copied(layer, x):
    expected = layer(x).detach()
    with pytest.raises(RuntimeError, match=r"memory of its network and cannot be shared.*state_dict"):
        nn.Sequential(layer).share_memory()
    torch.testing.assert_close(layer(x).detach(), expected)


def test_negated_views_count_as_the_numbers_they_show(layer, x):
    torch.testing.assert_close(layer(torch._neg_view(x)), layer(-x))
    given = x.clone().requires_grad_()
    ones = torch.ones(len(x), 2, dtype=x.dtype)
    torch.testing.assert_close(
        *(torch.autograd.grad(layer(given), given, v)[0] for v in (torch._neg_view(ones), -ones))
    )


def test_training_in_a_model_with_other_layers_lowers_the_loss(engine):
    torch.manual_seed(0)
    net = irnn.Network(4, [8], outputs=4, dtype="float32", seed=0, engine=engine)
    model = nn.Sequential(nn.Linear(2, 4), ImplicitRNN(net), nn.Tanh(), nn.Linear(4, 1))
    x = torch.rand(64, 2) * 2 - 1
    y = x[:, :1] * x[:, 1:]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        for xb, yb in DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(xb), yb)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


class Outputs(Dataset):
    """What a layer gives for samples, computed in the process that asks for them."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return self.layer(self.x[k]).detach()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_feed_a_model_whose_engine_runs_already(engine, context):
    x = torch.rand(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x.square().sum(1, keepdim=True)
    results = []
    for workers in ({}, {"num_workers": 2, "multiprocessing_context": context}):
        torch.manual_seed(0)
        model = nn.Sequential(ImplicitRNN(make_net(engine)), nn.Linear(2, 1, dtype=torch.float64))
        model(x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for xb, yb in DataLoader(TensorDataset(x, y), batch_size=8, **workers):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(xb), yb).backward()
            optimizer.step()
        results.append(model(x).detach())
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_layer_works_in_a_worker_process_or_says_how_to_start_it(layer, engine, context, x):
    expected = layer(x[:4]).detach()
    loader = DataLoader(Outputs(layer, x[:4]), batch_size=4, num_workers=1, multiprocessing_context=context)
    if (engine, context) == ("julia", "fork"):
        with pytest.raises(irnn.EngineError, match=r'DataLoader.*multiprocessing_context="spawn"'):
            next(iter(loader))
    else:
        torch.testing.assert_close(next(iter(loader)), expected, rtol=1e-9, atol=1e-9)


def test_compiled_model_computes_the_same(layer, x):
    model = nn.Sequential(layer, nn.Tanh())
    compiled = torch.compile(model, backend="aot_eager")
    np.testing.assert_allclose(compiled(x).detach(), model(x).detach(), rtol=1e-12)
    compiled(x).sum().backward()
    assert layer.W.grad is not None


def test_frozen_parameters_get_no_gradient(layer, x):
    layer.R.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.R.grad is None
    assert layer.W.grad is not None


def test_sample_without_equilibrium_that_is_left_out_does_not_spoil_the_gradient(engine):
    layer = ImplicitRNN(make_overflowing(engine), on_failure="ignore")
    x = torch.tensor([[1.0, 1e150], [2.0, 0], [3.0, 0]], dtype=torch.float64, requires_grad=True)
    known = torch.tensor([False, True, True])

    def gradients(y):
        return torch.autograd.grad(y.sum(), [x, *layer.parameters()])

    found, expected = gradients(torch.where(known[:, None], layer(x), 0)), gradients(layer(x[known]))
    assert expected[1].any()
    for part, expected_part in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, expected_part, rtol=1e-12)


def test_sample_without_equilibrium_is_an_error_forward(engine):
    layer = ImplicitRNN(make_oscillating(engine), solver="picard")
    with pytest.raises(irnn.ConvergenceError, match="1 of 2 samples"):
        layer(torch.tensor([[0.1], [5.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, r"x has dtype torch.float32.*\.double\(\)"),
        (torch.zeros(2, 4, dtype=torch.float64), ValueError, r"shape \(2, 4\); expected \(\.\.\., 3\)"),
        (torch.full((2, 3), torch.nan, dtype=torch.float64), ValueError, "NaN"),
        (torch.zeros(2, 3, dtype=torch.float64, device="meta"), TypeError, "x is on meta.*CPU"),
        ([[0.0, 0.0, 0.0]], TypeError, r"x is a list; expected a tensor"),
        (torch.eye(3, dtype=torch.float64).to_sparse(), TypeError, r"layout torch.sparse_coo; .* x\.to_dense\(\)"),
    ],
)
def test_bad_input_is_refused_by_name(bad, error, message):
    with pytest.raises(error, match=message):
        ImplicitRNN(make_net("numpy"))(bad)


def test_bad_settings_are_refused_by_name():
    with pytest.raises(TypeError, match="net is 3; expected a Network"):
        ImplicitRNN(3)
    with pytest.raises(ValueError, match="of is 'logits'"):
        ImplicitRNN(make_net("numpy"), of="logits")
    with pytest.raises(ValueError, match="Unrolled"):
        ImplicitRNN(make_net("numpy"), adjoint=irnn.Unrolled(3))
    with pytest.raises(ValueError, match=r"solver is 'newtom'.*did you mean Newton"):
        ImplicitRNN(make_net("numpy"), solver="newtom")
    with pytest.raises(ValueError, match="on_failure is 'stop'"):
        ImplicitRNN(make_net("numpy"), on_failure="stop")


def test_parameters_of_another_shape_do_not_spread_over_those_of_the_network(layer, x):
    with pytest.raises(ValueError, match=r"W has shape \(1, 3\); expected \(\d, 3\)"):
        torch.func.functional_call(layer, {"W": torch.zeros(1, 3, dtype=x.dtype)}, x)


def test_parameters_of_two_precisions_are_refused(layer, x):
    with pytest.raises(TypeError, match=r"expected one for all: layer\.float\(\) or layer\.double\(\)"):
        torch.func.functional_call(layer, {"R": layer.R.detach().float()}, x)


def test_half_precision_is_refused_and_can_be_taken_back(layer, x):
    expected = layer(x)
    with pytest.raises(
        TypeError, match="computes in float32 or float64, not in float16: convert the other layers only"
    ):
        layer.half()
    torch.testing.assert_close(layer.double()(x), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [lambda f, x: torch.jit.trace(f, x), lambda f, x: make_fx(f)(x)], ids=["jit", "fx"])
def test_tracing_which_would_keep_one_answer_for_all_inputs_is_refused(layer, x, trace):
    for f in (layer, lambda a: root(lambda z, a: z**2 - a, torch.ones_like(x), args=(a,), batched="a")):
        with pytest.raises(RuntimeError, match=r"cannot be traced by torch\.jit or make_fx, nor exported"):
            trace(f, x.abs())


# --- equations -----------------------------------------------------------------------------------------------

COUPLING = 0.3 * torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DRIVE = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ZEROS = torch.zeros(2, 3, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["picard", "anderson", "newton", "auto"])
def test_fixed_point_of_each_sample(solver):
    z = fixed_point(lambda z, W, x: torch.tanh(W @ z + x), ZEROS, args=(COUPLING, DRIVE), batched="x", solver=solver)
    torch.testing.assert_close(z, torch.tanh(z @ COUPLING.T + DRIVE), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("vectorized", [False, True])
def test_derivatives_of_a_solution_of_first_and_second_order(vectorized):
    def f(z, W, x):
        return torch.tanh((z @ W.T if vectorized else W @ z) + x) - z

    def solve(W, x):
        return root(f, ZEROS, args=(W, x), batched=[1], vectorized=vectorized, solver=irnn.Newton(tol=1e-13))

    arguments = COUPLING.clone().requires_grad_(), DRIVE.clone().requires_grad_()
    assert gradcheck(solve, arguments)
    assert gradgradcheck(solve, arguments)


def test_one_problem_and_its_gradient_agree_with_implicit_rnn_fixed_point():
    a = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    z = fixed_point(lambda z, a: torch.cos(a * z), torch.tensor([0.5], dtype=torch.float64), args=(a,))
    z.sum().backward()
    expected = irnn.fixed_point(lambda z, a: np.cos(a * z), [0.5], args=(0.8,))
    assert z.item() == pytest.approx(expected.value[0], rel=1e-9)
    assert a.grad.item() == pytest.approx(expected.vjp([1.0])["a"], rel=1e-8)


def test_a_function_of_another_precision_than_its_start_has_derivatives():
    two, a = torch.tensor([2.0], dtype=torch.float64), torch.tensor([8.0], requires_grad=True)
    z = root(lambda z, a: two * z**2 - a, torch.ones(1), args=(a,))
    z.backward()
    assert (z.dtype, a.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(a.grad, torch.tensor([0.125]))


def test_a_negated_view_may_be_the_cotangent_of_a_solution():
    a = torch.tensor([4.0], requires_grad=True)
    root(lambda z, a: z**2 - a, torch.ones(1), args=(a,)).backward(torch._neg_view(torch.ones(1)))
    torch.testing.assert_close(a.grad, torch.tensor([-0.25]))


def test_unconverged_samples_raise_and_have_no_derivative():
    def f(z, a):
        return z**2 + a

    a = torch.tensor([[1.0], [-4.0]], dtype=torch.float64, requires_grad=True)
    start = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(irnn.ConvergenceError, match="1 of 2 samples"):
        root(f, start, args=(a,), batched="a")
    z = root(f, start, args=(a,), batched="a", on_failure="ignore")
    assert z[1].item() == pytest.approx(2)
    z[1].sum().backward(retain_graph=True)
    np.testing.assert_allclose(a.grad, [[0], [-0.25]])
    with pytest.raises(irnn.ConvergenceError, match="no derivative"):
        z.sum().backward()


def test_rounding_does_not_give_a_double_root_a_derivative():
    a = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[0.3], [1.2], [2.5]], dtype=torch.float64)
    z = root(lambda z, a: torch.sin(z) - a, start, args=(a,), batched="a")
    with pytest.raises(irnn.ConvergenceError, match="singular at the solution"):
        z.sum().backward()


def test_equations_are_solved_in_full_precision_under_autocast():
    A, b = torch.tensor([[0.3, -0.7], [0.2, 0.4]]), torch.tensor([0.1, 0.2], requires_grad=True)

    def solve():
        z = fixed_point(lambda z, A, b: torch.tanh(A @ z) + b, torch.zeros(2), args=(A, b))
        return z, torch.autograd.grad(z.sum(), b)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = solve()
    for each, expected in zip(found, solve(), strict=True):
        assert torch.equal(each, expected)


def test_a_singular_solution_has_no_derivative_and_does_not_spoil_that_of_others():
    a = torch.tensor([[4.0], [0.0], [0.0]], dtype=torch.float64, requires_grad=True)
    z = root(lambda z, a: z**2 - a, torch.ones(3, 1, dtype=torch.float64), args=(a,), batched="a")
    z[0].sum().backward(retain_graph=True)
    np.testing.assert_allclose(a.grad, [[0.25], [0], [0]])
    with pytest.raises(irnn.ConvergenceError, match="singular at the solution of samples 1, 2,"):
        z.sum().backward()


def test_a_solution_does_not_depend_on_its_start_even_if_that_asks_for_a_gradient():
    start = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    (fixed_point(torch.cos, start) + start).sum().backward()
    assert start.grad.item() == 1


def test_cotangents_that_are_all_zero_give_gradients_of_zero_whatever_f_makes_of_no_samples():
    a = torch.tensor([8.0], dtype=torch.float64, requires_grad=True)
    z = root(lambda z, a: z.reshape(-1) ** 3 - a, torch.ones(2, 1).double(), args=(a,))
    (0 * z).sum().backward()
    assert a.grad.item() == 0


def test_gradients_that_a_function_keeps_to_itself_are_told():
    module = nn.Linear(2, 2, dtype=torch.float64)
    message = r"uses tensors that require gradients and are not among args.*Pass them"
    with pytest.warns(UserWarning, match=message) as caught:
        fixed_point(lambda z: torch.tanh(module(z)) / 2, ZEROS[0, :2])
    assert caught[0].filename == __file__
    with torch.no_grad():
        fixed_point(lambda z: torch.tanh(module(z)) / 2, ZEROS[0, :2])
    weights = dict(module.named_parameters())
    names = list(weights)

    def f(z, *values):
        return torch.tanh(torch.func.functional_call(module, dict(zip(names, values, strict=True)), z)) / 2

    fixed_point(f, ZEROS[0, :2], args=tuple(weights.values())).sum().backward()
    assert module.weight.grad.shape == (2, 2)


def test_neither_the_default_device_nor_the_default_precision_of_pytorch_counts_for_an_equation():
    z0, a = torch.ones(1, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    with torch.device("meta"):
        z = root(lambda z, a, b, c: a * z - b - c.sum(), z0, args=(a, 0.1, np.zeros(2)[::-1]))
        z.sum().backward()
    assert (z.item(), a.grad.item()) == (0.05, -0.025)


def test_transforms_of_functions_of_a_solution_are_refused_with_the_remedy():
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match=r"torch\.func.*batched=.*backward\(\)"):
            transform(lambda a: root(lambda z, a: z**3 - a, torch.ones(1, dtype=a.dtype), args=(a,))[0])(
                torch.ones(2, dtype=torch.float64)
            )


@pytest.mark.parametrize(
    "f", [pytest.param(irnn.julia("(z, a) -> z .^ 2 .- a"), marks=pytest.mark.julia), lambda z, a: z**2 - a]
)
def test_forward_mode_and_batches_of_cotangents_of_a_solution_are_refused_with_the_remedy(f):
    def solve(a):
        return root(f, torch.ones_like(a), args=(a,))

    a = torch.tensor([4.0], dtype=torch.float64)
    assert torch.autograd.functional.jacobian(solve, a).item() == pytest.approx(1 / 4)
    with pytest.raises(RuntimeError, match="one cotangent at a time: leave out vectorize=True"):
        torch.autograd.functional.jacobian(solve, a, vectorize=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="reverse mode only"):
        solve(forward_ad.make_dual(a, a))


def test_hooks_of_saved_tensors_around_an_equation_are_refused_with_the_remedy():
    a = torch.tensor([4.0], requires_grad=True)
    with torch.autograd.graph.save_on_cpu(), pytest.raises(RuntimeError, match="have use_reentrant=True"):
        root(lambda z, a: z**2 - a, torch.ones(1), args=(a,))


def test_a_function_that_pytorch_cannot_map_is_told_so_in_the_words_of_pytorch():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z**3

    with pytest.raises(RuntimeError, match="must override the setup_context staticmethod"):
        root(lambda z: Cube.apply(z) - 8, torch.ones(1), vectorized=True)


def test_a_compiled_function_may_solve():
    a = torch.tensor([2.0], dtype=torch.float64)
    solve = torch.compile(lambda a: root(lambda z, a: z**2 - a, torch.ones_like(a), args=(a,)), backend="eager")
    torch.testing.assert_close(solve(a), a.sqrt())


def minus(z, a):
    return z - a


@pytest.mark.parametrize(
    ("f", "z0", "settings", "error", "message"),
    [
        (3, ZEROS, {}, TypeError, "f is 3; expected a function"),
        (torch.sin, np.zeros(2), {}, TypeError, "expected a tensor"),
        (torch.sin, ZEROS[0, :0], {}, ValueError, r"z0 has shape \(0,\)"),
        (torch.sin, ZEROS, {"scale": "small"}, TypeError, "scale is a str; expected a tensor or a number"),
        (lambda z: [z], ZEROS, {}, TypeError, "f returned a list; expected a tensor"),
        (lambda z: 1, ZEROS[0, 0], {}, TypeError, "f returned a int; expected a tensor"),
        (lambda z: z * torch.ones(3), ZEROS[0, 0], {}, ValueError, r"\(3,\); expected a number, as z is one"),
        (minus, ZEROS, {}, ValueError, "f takes z and 1 argument"),
        (minus, ZEROS, {"args": (None,)}, TypeError, r"args\[0\] is a NoneType; expected a tensor or a number"),
        (minus, ZEROS, {"args": 2.0}, TypeError, "args is a float; expected a tuple of arguments"),
        (minus, ZEROS, {"args": (ZEROS[:1],), "batched": "a"}, ValueError, r"\(1, 3\); expected \(2, .* 2 samples"),
        (minus, ZEROS, {"args": (ZEROS,)}, ValueError, "the 2 rows of a belong to the samples, .* name a in batched"),
        (minus, ZEROS, {"args": (torch.zeros(2, device="meta"),)}, TypeError, r"args\[0\] is on meta"),
        (minus, ZEROS, {"args": (torch.zeros(2).to_sparse(),)}, TypeError, r"torch.sparse_coo; .* args\[0\].to_dense"),
    ],
)
def test_bad_equations_are_refused_by_name(f, z0, settings, error, message):
    with pytest.raises(error, match=message):
        root(f, z0, **settings)


@OF_A_NUMBER
def test_one_unknown_may_be_a_number(f):
    a = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    z = root(f, torch.tensor(1.0, dtype=torch.float64), args=(a,))
    z.backward()
    expected = irnn.root(lambda z, a: z**3 + z - a, 1.0, args=(2.5,))
    assert (z.shape, a.grad.shape) == ((), ())
    assert z.item() == pytest.approx(float(expected.value))
    assert a.grad.item() == pytest.approx(float(expected.vjp(1.0)["a"]))


@pytest.mark.julia
def test_julia_code_has_the_solution_and_the_derivatives_of_the_same_function_in_pytorch():
    a, s = torch.tensor([[1.0, 2.0], [1.5, 1.8], [0.5, 1.0]]).double(), torch.tensor([2.0, 0.5]).double()
    results = []
    for f in (
        irnn.julia("(z, a, s, k) -> [s[1] * z[1] - z[2]^2 - a[1], z[1] * z[k] + s[2] * z[2] - a[2]]"),
        lambda z, a, s, k: torch.stack([s[0] * z[0] - z[1] ** 2 - a[0], z[0] * z[1] + s[1] * z[1] - a[1]]),
    ):
        leaves = a.clone().requires_grad_(), s.clone().requires_grad_()
        z = root(f, torch.ones(3, 2).double(), args=(*leaves, 2), batched="a")
        (z**2).sum().backward()
        results.append([z.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "f", [pytest.param(irnn.julia("(z, a) -> z .^ 2 .- a"), marks=pytest.mark.julia), lambda z, a: z**2 - a]
)
def test_a_solution_that_was_changed_in_place_is_not_silently_differentiated_where_it_is_not_one(f):
    a = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    z = root(f, torch.ones(1).double(), args=(a,))
    z += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.julia
def test_julia_code_has_first_derivatives_only():
    a = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    z = root(irnn.julia("(z, a) -> z .^ 2 .- a"), torch.ones(1).double(), args=(a,))
    (slope,) = torch.autograd.grad(z.sum(), a, create_graph=True)
    assert slope.item() == pytest.approx(0.5 / 2**0.5)
    with pytest.raises(RuntimeError, match="an equation in Julia code has first derivatives only"):
        slope.sum().backward()


def test_a_function_of_pytorch_cannot_run_on_a_device():
    with pytest.raises(ValueError, match="a Python function cannot run on device='cuda'; write it as Julia code"):
        root(lambda z: z, torch.ones(2), device="cuda")


def test_derivatives_of_an_equation_of_every_order():
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    derivative = root(lambda z, a: z**2 - a, torch.ones(1, dtype=torch.float64), args=(a,)).sum()
    factor = 1.0
    for order in range(1, 7):
        (derivative,) = torch.autograd.grad(derivative, a, create_graph=True)
        factor *= 1.5 - order
        assert float(derivative.detach()) == pytest.approx(factor * 2 ** (0.5 - order), rel=1e-9)


def test_units_of_single_conditions_and_unknowns_do_not_matter(rng):
    scales = (torch.from_numpy(10.0 ** rng.permutation(np.linspace(-15, 15, 4))) for _ in range(2))
    M, a = (
        torch.from_numpy(rng.standard_normal((4, 4))) + 3 * torch.eye(4),
        torch.linspace(1, 2, 4, dtype=torch.float64),
    )

    def solve(units, rows):
        def of(a):
            f = lambda z, a: rows * (M @ (z / units) + (z / units) ** 3 / 4 - a)  # noqa: E731
            return root(f, units, args=(a,)) / units

        return of(a), torch.autograd.functional.jacobian(of, a)

    one = torch.ones(4, dtype=torch.float64)
    for found, expected in zip(solve(*scales), solve(one, one), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
