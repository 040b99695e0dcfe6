"""What each pass changes, and what it must leave alone."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.core import ConfigError
from deepseek_r1.graph import PASSES, capture, simplify

aten = torch.ops.aten


class Wrap(nn.Module):
    """A function with parameters as a module."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Module | nn.Parameter):
                setattr(self, name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x, y=None, z=None):
        return self.function(self, *(v for v in (x, y, z) if v is not None))


def targets(program):
    return [n.target for n in program.exported.graph.nodes if n.op == "call_function"]


def run(function, *inputs, only=None, dynamic=None, **tensors):
    """The captured program and the simplified one, compared on the inputs."""
    net = Wrap(function, **tensors).eval()
    program = capture(net, inputs, dynamic_shapes=dynamic)
    shapes = program.input_shapes()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    after = simplify(program, only)
    assert program.input_shapes() == shapes, "a pass fixed a size of the program that it was given"
    assert [[isinstance(d, str) for d in s] for s in after.input_shapes()] == [
        [isinstance(d, str) for d in s] for s in shapes
    ]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()), "verifying must not touch the model"
    outputs = []
    for one in (program, after):
        net.load_state_dict(state)
        with torch.no_grad():
            outputs.append((one(*[i.clone() for i in inputs]), {k: v.clone() for k, v in net.state_dict().items()}))
    net.load_state_dict(state)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    return program, after


def unchanged(function, *inputs, only, **tensors):
    program, after = run(function, *inputs, only=(only,), **tensors)
    return after is program


# Batch normalisation


def norm(kind, width):
    layer = kind(width)
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.weight.uniform_(-2, 2)
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Linear(6, 4), norm(nn.BatchNorm1d, 4)], (3, 6)),
        ([nn.Linear(6, 4, bias=False), norm(nn.BatchNorm1d, 4)], (3, 6)),
        ([nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), norm(nn.BatchNorm2d, 6)], (2, 4, 5, 5)),
        ([nn.ConvTranspose1d(4, 6, 3, bias=False), norm(nn.BatchNorm1d, 6)], (2, 4, 5)),
        ([norm(nn.BatchNorm1d, 6), nn.Linear(6, 4)], (3, 6)),
        ([norm(nn.BatchNorm2d, 4), nn.Conv2d(4, 6, 3, groups=2)], (2, 4, 6, 6)),
        ([norm(nn.BatchNorm2d, 4), nn.Conv2d(4, 6, 3, padding="valid", bias=False)], (2, 4, 6, 6)),
        ([nn.Conv2d(3, 4, 3), norm(nn.BatchNorm2d, 4), nn.Conv2d(4, 2, 1)], (2, 3, 6, 6)),
        ([nn.Conv2d(3, 4, 3), norm(nn.BatchNorm2d, 4), nn.ReLU(inplace=True)], (2, 3, 6, 6)),
    ],
)
def test_batch_norm_goes_into_the_layer_beside_it(layers, shape):
    program, after = run(lambda m, x: m.net(x), torch.randn(shape), net=nn.Sequential(*layers))
    assert aten.batch_norm.default in targets(program)
    assert aten.batch_norm.default not in targets(after)
    assert after.source is program


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([norm(nn.BatchNorm2d, 4), nn.Conv2d(4, 6, 3, padding=1)], (2, 4, 6, 6)),  # zeros are padded behind it
        ([norm(nn.BatchNorm2d, 4), nn.Conv2d(4, 6, 3, padding="same")], (2, 4, 6, 6)),
        ([norm(nn.BatchNorm2d, 4), nn.ConvTranspose2d(4, 6, 3)], (2, 4, 6, 6)),
        ([nn.Linear(6, 4), norm(nn.BatchNorm1d, 4)], (3, 4, 6)),  # dimension 1 is no feature of the layer
        ([norm(nn.BatchNorm1d, 4), nn.Linear(4, 4)], (3, 4, 4)),
        ([nn.Linear(4, 4), nn.ReLU(), norm(nn.BatchNorm1d, 4)], (3, 4)),
    ],
)
def test_batch_norm_that_cannot_be_folded_stays(layers, shape):
    assert unchanged(lambda m, x: m.net(x), torch.randn(shape), only="fold_batch_norm", net=nn.Sequential(*layers))


def test_batch_norm_in_training_mode_stays():
    def function(m, x):
        return F.batch_norm(m.conv(x), m.mean, m.variance, training=True)

    made = {"conv": nn.Conv2d(2, 3, 1), "mean": torch.zeros(3), "variance": torch.ones(3)}
    _, after = run(function, torch.randn(2, 2, 4, 4), **made)
    assert aten.batch_norm.default in targets(after)
    assert sum(n.target is aten.batch_norm.default for n in after.exported.graph.nodes) == 1


# Identities


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x * 1 + 0) * 2,
        lambda m, x: (1.0 * x).relu(),
        lambda m, x: (x / 1 - 0).relu(),
        lambda m, x: x.to(torch.float32).relu(),
        lambda m, x: x.clone().relu(),
        lambda m, x: x.view(x.shape).relu(),
        lambda m, x: x[:, :, :].relu(),
        lambda m, x: torch.cat([x]).relu(),
        lambda m, x: x.permute(0, 2, 1).permute(0, 2, 1).relu(),
        lambda m, x: x.transpose(1, 2).transpose(-1, -2).relu(),
        lambda m, x: x.permute(0, 1, 2).relu(),
        lambda m, x: x.expand(-1, -1, -1).relu(),
        lambda m, x: (x**1).relu(),
    ],
)
@pytest.mark.parametrize("dynamic", [None, {"x": {0: "a", 1: "b", 2: "c"}}])
def test_what_gives_its_input_back_goes(function, dynamic):
    _, after = run(function, torch.randn(2, 3, 4), only=("remove_identities",), dynamic=dynamic)
    assert len(targets(after)) == 1, targets(after)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.clone(),  # the caller may write to the output
        lambda m, x: x + 0,
        lambda m, x: torch.cat([x]),
        lambda m, x: x.to(torch.float32, copy=True),
        lambda m, x: x.clone().relu_(),
        lambda m, x: (x.clone().add_(1), x),
        lambda m, x: x.narrow(2, 0, 2).relu(),
        lambda m, x: x.transpose(1, 2).transpose(0, 1).relu(),
        lambda m, x: (x * 2 + 1) / 3,
        lambda m, x: x * m.counter.add_(1),  # one now, two at the next call
        lambda m, x: (x.long() * 1.0).relu(),
    ],
)
def test_what_only_looks_like_an_identity_stays(function):
    program, after = run(function, torch.randn(2, 3, 4), only=("remove_identities",), counter=torch.tensor(0.0))
    kept = [t for t in targets(program) if "assert" not in str(t)]
    assert [t for t in targets(after) if "assert" not in str(t)] == kept


def test_a_number_that_is_written_to_is_no_constant():
    def function(m, x):
        y = x * m.counter
        m.counter.add_(1)
        return y.relu()

    _, after = run(function, torch.randn(3), counter=torch.tensor(1.0))
    first, *rest = (float(after(torch.ones(3))[0]) for _ in range(3))
    assert rest == [first + 1, first + 2]


# Constants


def test_constants_are_folded_once():
    def function(m, x):
        table = torch.sin(torch.arange(4.0) * m.weight).unsqueeze(0)
        return x @ (table * 2).expand(4, 4)

    _, after = run(function, torch.randn(3, 4), only=("fold_constants",), weight=nn.Parameter(torch.randn(4)))
    assert targets(after) == [aten.expand.default, aten.matmul.default]
    assert "weight" not in after.exported.state_dict
    assert "weight" in after.source.exported.state_dict


def test_a_chain_of_constants_is_rounded_once():
    def function(m, x):
        return x + torch.cos(torch.arange(4000.0) * m.step)

    program = capture(Wrap(function, step=torch.tensor(0.1)), torch.zeros(2, 4000))
    after = simplify(program, ("fold_constants",))
    exact = torch.cos(torch.arange(4000.0, dtype=torch.float64) * torch.tensor(0.1).double())
    assert float((after(torch.zeros(2, 4000))[0].double() - exact).abs().max()) < 1e-7


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + m.weight.t(),  # a view costs nothing
        lambda m, x: x + torch.ones(600, 600).mul(2).sum() * 0 + torch.rand(()) * 0,  # random
        lambda m, x: x + m.weight.add_(1) * 2,
        lambda m, x: x + (m.weight.repeat(300, 300) + 1).mean(),  # larger than what it came from
    ],
)
def test_what_is_no_constant_or_too_large_stays(function):
    program, after = run(function, torch.randn(4, 4), only=("fold_constants",), weight=torch.randn(4, 4))
    special = (aten.rand.default, aten.add_.Tensor, aten.repeat.default, aten.t.default)
    assert [t for t in targets(after) if t in special] == [t for t in targets(program) if t in special]


def test_sizes_of_the_input_are_no_constants():
    def function(m, x):
        return x + torch.arange(x.shape[1]) * 2

    dynamic = {"x": {0: "batch", 1: "length"}}
    _, after = run(function, torch.randn(2, 5), dynamic=dynamic)
    assert after(torch.zeros(3, 9))[0].tolist() == list(range(0, 18, 2))


# Repeated work


def test_equal_expressions_are_computed_once():
    def function(m, x):
        return torch.exp(x * 2) + torch.exp(x * 2).sum() + torch.exp(x * 2.0).mean()

    _, after = run(function, torch.randn(3, 4), only=("share_subexpressions",))
    assert targets(after).count(aten.exp.default) == 2, "2 and 2.0 are not the same argument"


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x.exp(), x.exp()),  # the caller may write to one of two outputs
        lambda m, x: x.exp().add_(1) + x.exp(),
        lambda m, x: torch.rand_like(x) * 0 + torch.rand_like(x) * 0 + x,
        lambda m, x: F.dropout(x, 0.5, True) * 0 + F.dropout(x, 0.5, True) * 0 + x,
        lambda m, x: x.exp() * m.state.mul_(2).sum() + x.cos() * m.state.mul_(2).sum(),
        lambda m, x: x.exp() - m.state.exp() + m.state.add_(1).sum() + m.state.exp(),
    ],
)
def test_what_only_looks_equal_is_computed_again(function):
    assert unchanged(function, torch.randn(3), only="share_subexpressions", state=torch.ones(3))


def test_a_value_written_between_two_reads_is_read_twice():
    def function(m, x):
        y = x + 1
        z = y.view(-1)
        a = y.exp()
        z.mul_(2)
        return a + y.exp()

    _, after = run(function, torch.randn(3, 2))
    assert targets(after).count(aten.exp.default) == 2


def test_dead_code_goes_with_the_first_pass_and_writes_and_random_numbers_stay():
    def function(m, x):
        x.exp().sum()
        m.count.add_(1)
        torch.rand(3)
        return x.clone() * 2

    _, after = run(function, torch.randn(3), count=torch.zeros(1))
    assert aten.exp.default not in targets(after)
    assert {aten.add_.Tensor, aten.rand.default} <= set(targets(after))


# Names for functions that were written out


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), aten.gelu.default),
        (lambda x: x * 0.5 * (1 + torch.erf(x * 0.7071067811865476)), aten.gelu.default),
        (lambda x: (torch.erf(x / 2**0.5) + 1) * (x / 2), aten.gelu.default),
        (lambda x: x * ((torch.erf(x / 2**0.5) + 1) * 0.5), aten.gelu.default),
        (gelu_tanh, aten.gelu.default),
        (lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))), aten.gelu.default),
        (lambda x: x * torch.sigmoid(x), aten.silu.default),
        (lambda x: x * (1 / (1 + torch.exp(-x))), aten.silu.default),
        (lambda x: x / (1 + torch.exp(-x)), aten.silu.default),
        (lambda x: 1 / (1 + torch.exp(-x)), aten.sigmoid.default),
        (lambda x: x * F.relu6(x + 3) / 6, aten.hardswish.default),
        (lambda x: x * (F.hardtanh(x + 3, 0.0, 6.0) / 6), aten.hardswish.default),
        (lambda x: F.relu6(x + 3) / 6, aten.hardsigmoid.default),
    ],
)
def test_activations_get_their_name_back(function, name):
    _, after = run(lambda m, x: function(m.layer(x)).sin(), torch.randn(2, 3, 8), layer=nn.Linear(8, 8))
    assert targets(after) == [aten.linear.default, name, aten.sin.default]


def test_the_factor_before_an_activation_is_not_its_own():
    _, after = run(lambda m, x: 0.5 * (x * 2) * (1 + torch.erf(x * 2 / 2**0.5)), torch.randn(2, 8))
    assert aten.gelu.default in targets(after)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: 0.5 * x * (1 + torch.tanh(0.79788 * (x + 0.044715 * x**3))),  # another constant
        lambda m, x: 0.5 * x * (1 + torch.erf(x)),
        lambda m, x: x * torch.sigmoid(1.702 * x),
        lambda m, x: x[:, :1] * torch.sigmoid(x),
        lambda m, x: x.double() * torch.sigmoid(x),
        lambda m, x: torch.sigmoid(x) * x.add_(1),
        lambda m, x: 1 + torch.exp(-x),
        lambda m, x: x * F.relu6(x + 3) / 5,
    ],
)
def test_what_only_looks_like_an_activation_stays(function):
    assert unchanged(function, torch.randn(2, 8), only="name_activations")


def layer_norm(m, x, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * m.w + m.b


def weights():
    return {"w": nn.Parameter(torch.rand(8) + 1), "b": nn.Parameter(torch.randn(8))}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (layer_norm, aten.layer_norm.default),
        (lambda m, x: m.b + m.w * ((x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, False, True) + 1e-6)),
         aten.layer_norm.default),
        (lambda m, x: (x - x.mean((1, 2), True)) / (x.var((1, 2), False, True) + 1e-6) ** 0.5, aten.layer_norm.default),
        (lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), aten.rms_norm.default),
        (lambda m, x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6), aten.rms_norm.default),
    ],
)  # fmt: skip
def test_norms_get_their_name_back(function, name):
    _, after = run(function, torch.randn(2, 3, 8), dynamic={"x": {0: "batch"}}, **weights())
    assert targets(after) == [name]
    assert set(after.exported.state_dict) <= {"w", "b"}


def test_a_norm_of_any_batch_and_length():
    dynamic = {"x": {0: "batch", 1: "length"}}
    program, after = run(layer_norm, torch.randn(2, 3, 8), dynamic=dynamic, **weights())
    x = torch.randn(4, 7, 8)
    torch.testing.assert_close(after(x), program(x), rtol=1e-4, atol=1e-5)
    assert targets(after) == [aten.layer_norm.default]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, True, True) + 1e-6),  # Bessel's correction
        lambda m, x: (x - x.mean(-1, True)) / (x.var(-1, False, True).sqrt() + 1e-6),
        lambda m, x: (x - x.mean(1, True)) / torch.sqrt(x.var(1, False, True) + 1e-6),  # not the last dimension
        lambda m, x: (x - x.mean(-1, True)) / torch.sqrt(x.var((1, 2), False, True) + 1e-6),
        lambda m, x: x / torch.sqrt(x.var(-1, False, True) + 1e-6),
        lambda m, x: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6),
    ],
)
def test_what_only_looks_like_a_norm_stays(function):
    assert unchanged(function, torch.randn(2, 3, 8), only="name_norms")


# Attention


def attend(q, k, v, mask=lambda s: s, scale=0.25):
    return torch.softmax(mask(q @ k.transpose(-1, -2) * scale), -1) @ v


def qkv(heads=2, length=5, keys=7):
    return torch.randn(3, heads, length, 8), torch.randn(3, heads, keys, 8), torch.randn(3, heads, keys, 4)


CAUSAL = torch.ones(5, 7, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "function",
    [
        lambda m, q, k, v: attend(q, k, v),
        lambda m, q, k, v: torch.softmax((q / 3) @ (k * 2).transpose(2, 3), -1) @ v,
        lambda m, q, k, v: F.dropout(torch.softmax(q @ k.permute(0, 1, 3, 2) / 8**0.5, 3), 0.1, False) @ v,
        lambda m, q, k, v: torch.einsum("bhij,bhjd->bhid", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1), v),
        lambda m, q, k, v: attend(q, k, v, lambda s: s.masked_fill(~m.causal, float("-inf"))),
        lambda m, q, k, v: attend(q, k, v, lambda s: torch.where(m.causal, s, float("-inf"))),
        lambda m, q, k, v: attend(q, k, v, lambda s: torch.where(m.causal, s, m.least)),
        lambda m, q, k, v: attend(q, k, v, lambda s: s.masked_fill(~m.causal[None], -1e9)),
        lambda m, q, k, v: attend(q, k, v, lambda s: m.bias + s),
        lambda m, q, k, v: attend(q, k, v, lambda s: (s + m.bias).masked_fill(~m.causal, -1e30) + m.bias[0]),
    ],
)
def test_attention_gets_its_name_back(function):
    least = torch.tensor(torch.finfo(torch.float32).min)
    axes = {name: {0: "batch"} for name in "xyz"}
    _, after = run(function, *qkv(), dynamic=axes, causal=CAUSAL, bias=torch.randn(2, 5, 7), least=least)
    assert targets(after).count(aten.scaled_dot_product_attention.default) == 1
    assert not {aten.softmax.int, aten.matmul.default} & set(targets(after))


def test_attention_with_a_mask_that_depends_on_the_length():
    def function(m, q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return attend(q, k, v, lambda s: s.masked_fill(~mask, float("-inf")))

    axes = {0: "batch", 2: "length"}
    program, after = run(function, *qkv(keys=5), dynamic={"x": axes, "y": axes, "z": axes})
    inputs = [torch.randn(2, 2, 11, n) for n in (8, 8, 4)]
    torch.testing.assert_close(after(*inputs), program(*inputs))
    assert aten.scaled_dot_product_attention.default in targets(after)
    assert after.input_shapes()[0][1] == 2


def test_attention_of_any_width_stays():
    axes = {name: {0: "batch", 3: name} for name in "xyz"}
    _, after = run(lambda m, q, k, v: attend(q, k, v), *qkv(), dynamic=axes)
    assert aten.softmax.int in targets(after)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, q, k, v: (lambda w: (w @ v, w))(torch.softmax(q @ k.transpose(-1, -2), -1)),  # weights are returned
        lambda m, q, k, v: torch.softmax(q @ k.transpose(-1, -2), -2) @ v,
        lambda m, q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1, dtype=torch.float64).float() @ v,
        lambda m, q, k, v: attend(q, k, v, lambda s: s.masked_fill(~m.causal, -100.0)),
        lambda m, q, k, v: attend(q[:, :, None], k[:, :, None], v[:, :, None]),
        lambda m, q, k, v: attend(q, k[:, :1], v[:, :1]),
        lambda m, q, k, v: F.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), 0.0, True) @ v,
    ],
)
def test_what_only_looks_like_attention_stays(function):
    assert unchanged(function, *qkv(), only="fuse_attention", causal=CAUSAL)


# Products with constants


@pytest.mark.parametrize(
    ("function", "views"),
    [
        (lambda m, x: torch.addmm(m.b, x.view(-1, 8), m.w).view(x.shape[0], x.shape[1], 6), 0),
        (lambda m, x: torch.addmm(m.b, x.view(-1, 8), m.w), 1),
        (lambda m, x: torch.addmm(m.b, x.view(-1, 8), m.w).view(x.shape[1], x.shape[0], 6), 2),
        (lambda m, x: (x @ m.w).relu(), 0),
        (lambda m, x: torch.mm(x[:, 0], m.w), 0),
    ],
)
def test_products_with_a_constant_are_linear_layers(function, views):
    made = {"w": nn.Parameter(torch.randn(8, 6)), "b": nn.Parameter(torch.randn(6))}
    program, after = run(function, torch.randn(2, 3, 8), only=("name_linears",), **made)
    assert targets(after).count(aten.linear.default) == 1
    assert not {aten.addmm.default, aten.mm.default, aten.matmul.default} & set(targets(after))
    assert targets(after).count(aten.view.default) == views
    x = torch.randn(5, 4, 8)
    torch.testing.assert_close(after(x), program(x))


def test_a_matrix_that_is_used_twice_is_kept_once():
    def function(m, x):
        return torch.tanh(torch.tanh(x @ m.w) @ m.w)

    program, after = run(function, torch.randn(3, 8), only=("name_linears",), w=nn.Parameter(torch.randn(8, 8)))
    assert targets(after).count(aten.linear.default) == 2
    assert after.parameters_bytes == program.parameters_bytes


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5),
        lambda m, x: torch.addmm(x.sum(0)[:6], x, m.w),
        lambda m, x: torch.addmm(m.c, x, m.w),  # a bias for each row
        lambda m, x: x @ x.T,
        lambda m, x: m.w.T @ x.T,
        lambda m, x: x @ m.b8,
    ],
)
def test_products_that_are_no_linear_layers_stay(function):
    made = {"w": torch.randn(8, 6), "b": torch.randn(6), "c": torch.randn(8, 6), "b8": torch.randn(8)}
    assert unchanged(function, torch.randn(8, 8), only="name_linears", **made)


# Linear layers with one input


def test_linear_layers_with_one_input_become_one():
    def function(m, x):
        heads = lambda t: t.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)  # noqa: E731
        return F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))

    made = {name: nn.Linear(8, 8) for name in "qkv"}
    dynamic = {"x": {0: "batch", 1: "length"}}
    program, after = run(function, torch.randn(2, 3, 8), only=("merge_linears",), dynamic=dynamic, **made)
    assert targets(after).count(aten.linear.default) == 1
    x = torch.randn(5, 4, 8)
    torch.testing.assert_close(after(x), program(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.a(x).relu() + m.b(x + 1),
        lambda m, x: (m.a(x), m.b(x)),  # two outputs would share memory
        lambda m, x: m.a(x).relu() + m.c(x).relu(),  # one has a bias
        lambda m, x: m.a(x).relu_() + m.b(x),
        lambda m, x: m.a(x).view(-1) * m.b(x).view(-1),
        lambda m, x: F.linear(x, x) + F.linear(x, x),
    ],
)
def test_linear_layers_that_cannot_be_merged_stay(function):
    made = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4, bias=False)}
    assert unchanged(function, torch.randn(4, 4), only="merge_linears", **made)


def test_a_pass_nobody_knows_is_refused():
    program = capture(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(ConfigError, match=r"fold_everything.*there are remove_identities"):
        simplify(program, ["fold_everything"])


def test_the_docs_list_every_pass_with_its_first_line():
    page = (Path(__file__).parents[2] / "docs" / "static-graphs.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(name, inspect.getdoc(function).splitlines()[0]) for name, function in PASSES.items()]
