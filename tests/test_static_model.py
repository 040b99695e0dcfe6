"""`@deepseek.model`: classes whose instances run, train, travel and change as static graphs."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepseek
import deepseek_r1 as dr1
from deepseek_r1.core import CaptureError, InputError
from deepseek_r1.graph import capture
from deepseek_r1.module import model


class Plain(nn.Module):
    """The class as a user writes it; `Static` is the same, decorated."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv1d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 2)
        self.scale = 1.0
        self.register_buffer("mask", torch.ones(width), persistent=False)
        self.runs = []

    def forward(self, x, extra=None):
        self.runs.append(1)  # Python only: tells how often the lines below really run
        y = torch.relu(self.norm(self.conv(x))).mean(-1) * self.mask
        y = self.head(self.drop(y)) * self.scale
        return y if extra is None else y + extra


@model
class Static(Plain):
    def forward(self, x, extra=None):
        y = torch.relu(self.norm(self.conv(x))).mean(-1) * self.mask
        y = self.head(self.drop(y)) * self.scale
        return y if extra is None else y + extra


def pair(seed=0):
    torch.manual_seed(seed)
    plain = Plain()
    static = Static()
    static.load_state_dict(plain.state_dict())
    return plain, static


def x_of(batch, length=6, seed=1):
    return torch.randn(batch, 3, length, generator=torch.Generator().manual_seed(seed))


def count(net):
    return len(dr1.static_programs(net))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_graph_serves_every_batch_and_length():
    plain, static = pair()
    plain.eval(), static.eval()
    assert count(static) == 0
    for batch, length in ((1, 6), (4, 6), (2, 9), (3, 1), (0, 6), (1, 1)):
        same(static(x_of(batch, length)), plain(x_of(batch, length)))
    assert count(static) == 1


def test_training_follows_the_plain_class_step_by_step():
    plain, static = pair()
    targets = torch.tensor([0, 1, 1, 0, 1])
    runs = []
    for net in (plain, static):
        net.drop.p = 0.0
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        losses = []
        for step in range(5):
            loss = F.cross_entropy(net(x_of(5, 6 + step, step)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, net.eval()(x_of(2))))
    same(torch.tensor(runs[1][0]), torch.tensor(runs[0][0]))
    same(runs[1][1], runs[0][1])
    for name, value in plain.state_dict().items():
        same(static.state_dict()[name], value)
    assert static.norm.num_batches_tracked == 5
    assert count(static) == 2, "one graph for training, one for evaluation"


def test_gradients_reach_the_inputs_and_a_second_order():
    plain, static = pair()
    grads = []
    for net in (plain.eval(), static.eval()):
        x = x_of(2).requires_grad_()
        (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), net.head.weight)
        grads.append((first, second))
    same(grads[1][0], grads[0][0])
    same(grads[1][1], grads[0][1])


def test_dropout_drops_in_training_only():
    _, static = pair()
    x = x_of(8)
    assert not torch.equal(static(x), static(x))
    static.eval()
    assert torch.equal(static(x), static(x))
    static.train()
    static.norm.eval()  # a third way to run: frozen statistics
    before = static.norm.running_mean.clone()
    static(x)
    assert torch.equal(static.norm.running_mean, before)
    assert count(static) == 3
    static.norm.train()
    static(x)
    assert not torch.equal(static.norm.running_mean, before)
    assert count(static) == 3


def test_the_capture_itself_leaves_no_trace():
    plain, static = pair()
    plain.drop.p = static.drop.p = 0.0
    state = torch.random.get_rng_state()
    plain(x_of(4)), static(x_of(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, a), (_, b) in zip(plain.named_buffers(), static.named_buffers()):
        same(b, a), name
    assert "_static_graphs" not in static.state_dict()
    assert list(static.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    ("change", "more"),
    [
        (lambda n: setattr(n, "scale", 3.0), 1),
        (lambda n: setattr(n, "head", nn.Linear(8, 2)), 1),
        (lambda n: n.mask.mul_(2.0), 0),
        (lambda n: setattr(n, "mask", torch.full((8,), 3.0)), 0),
        (lambda n: n.load_state_dict({k: v + 1 for k, v in n.state_dict().items()}), 0),
        (lambda n: n.load_state_dict({k: v * 2 for k, v in n.state_dict().items()}, assign=True), 0),
        (lambda n: setattr(n.head, "weight", nn.Parameter(torch.ones(2, 8))), 0),
        (lambda n: nn.init.zeros_(n.head.bias), 0),
    ],
)
def test_what_changes_in_the_module_changes_its_answers(change, more):
    plain, static = pair()
    plain.eval(), static.eval()
    x = x_of(3)
    static(x), plain(x)
    for net in (plain, static):
        torch.manual_seed(5)
        change(net)
    same(static(x), plain(x))
    same(static(x_of(5)), plain(x_of(5)))
    assert sum(p.signature is not None for p in dr1.static_programs(static)) <= 1 + more


def test_another_dtype_after_capture():
    plain, static = pair()
    plain.eval(), static.eval()
    static(x_of(2))
    plain.double(), static.double()
    same(static(x_of(2).double()), plain(x_of(2).double()))
    assert static(x_of(2).double()).dtype == torch.float64
    plain.float(), static.float()
    same(static(x_of(2)), plain(x_of(2)))


def test_another_rank_or_nest_takes_another_graph():
    @model
    class Any(nn.Module):
        def forward(self, x, *, more=None, flag=False):
            y = x * 2 if not flag else -x
            return {"y": y, "rank": x.ndim, "more": None if more is None else more["a"] + 1}

    net = Any()
    assert net(torch.ones(2, 3))["rank"] == 2
    assert net(torch.ones(2, 3, 4))["rank"] == 3
    assert net(torch.ones(2, 3), flag=True)["y"].sum() == -6
    assert net(torch.ones(2, 3), more={"a": torch.ones(2)}, flag=True)["more"].sum() == 4
    assert net(torch.ones(5, 3), flag=True, more={"a": torch.ones(2)})["more"].sum() == 4
    assert count(net) == 4
    assert net(torch.ones(4, 4), flag=True)["y"].sum() == -16
    assert count(net) == 4


def test_a_size_that_the_module_fixes_takes_another_graph():
    @model
    class Even(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[1] % 2 == 0 else x * 3

    net = Even()
    for length in (4, 6, 5, 7, 8, 9):
        assert net(torch.ones(2, length))[0, 0] == (2 if length % 2 == 0 else 3)
    assert count(net) == 2


def test_copies_and_pickles_are_instances_that_capture_anew():
    _, static = pair()
    static.eval()
    x = x_of(3)
    wanted = static(x)
    clones = [copy.deepcopy(static), copy.copy(static), pickle.loads(pickle.dumps(static))]  # noqa: S301  our own bytes
    buffer = io.BytesIO()
    torch.save(static, buffer)
    buffer.seek(0)
    clones.append(torch.load(buffer, weights_only=False))
    for clone in clones:
        assert type(clone) is Static
        assert count(clone) == 0
        same(clone(x), wanted)
    with torch.no_grad():
        clones[0].head.weight.zero_()
    same(static(x), wanted)
    assert not torch.equal(clones[0](x), wanted)


def test_subclasses_are_static_as_a_whole():
    class Child(Static):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(2, 2)

        def forward(self, x):
            return self.more(super().forward(x))

    net = Child().eval()
    assert isinstance(net, Static)
    assert isinstance(net, Plain)
    y = net(x_of(3))
    same(y, net.more(Static.forward(net, x_of(3))))
    programs = dr1.static_programs(net)
    assert any("more.weight" in p.exported.state_dict for p in programs)

    class Grandchild(Child):
        pass

    grand = Grandchild().eval()
    grand(x_of(2))
    assert count(grand) == 1


def test_static_parts_of_a_static_module_are_one_graph():
    @model
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Static(), Static()

        def forward(self, x):
            return self.a(x) + self.b(x)

    net = Whole().eval()
    net(x_of(2))
    assert (count(net), count(net.a), count(net.b)) == (1, 0, 0)
    outer = nn.ModuleList([net])
    assert outer[0](x_of(3)).shape == (3, 2)
    net.a(x_of(1))
    assert count(net.a) == 1


def test_hooks_on_the_module_and_on_its_parts():
    _, static = pair()
    static.eval()
    x = x_of(2)
    wanted = static(x)
    seen = []
    own = static.register_forward_hook(lambda m, args, out: out + 1)
    same(static(x), wanted + 1)
    part = static.head.register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    same(static(x), wanted + 1)
    assert len(seen) == 1
    assert isinstance(seen[0], torch.Tensor)
    part.remove()
    own.remove()
    same(static(x), wanted)
    assert len(seen) == 1
    assert count(static) == 1


def test_a_first_call_with_a_hook_of_its_own_captures_without_it():
    _, static = pair()
    static.eval()
    handle = static.register_forward_hook(lambda m, args, out: out + 1)
    first = static(x_of(2))
    assert count(static) == 1
    handle.remove()
    same(static(x_of(2)), first - 1)


def test_torchs_own_hooks_become_part_of_the_graph():
    @model
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

        def forward(self, x):
            return self.linear(x)

    net = Normed()
    net(torch.randn(2, 4)).sum().backward()
    assert count(net) == 1
    assert net.linear.parametrizations.weight.original0.grad is not None


def test_inference_mode_and_autocast():
    plain, static = pair()
    plain.eval(), static.eval()
    with torch.inference_mode():
        x = x_of(2)
        same(static(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = static(x_of(2)), plain(x_of(2))
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        a.sum().backward()
    assert static.head.weight.grad is not None
    assert static(x_of(2)).dtype == torch.float32


def test_exports_compilers_and_transforms_see_the_plain_module():
    plain, static = pair()
    plain.eval(), static.eval()
    x = x_of(2)
    exported = torch.export.export(static, (x,))
    same(exported.module()(x), plain(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its tracer old, and warns of what it burns in
        same(torch.jit.trace(static, x)(x), plain(x))
    state = {k: v.double() for k, v in plain.state_dict().items()}
    buffers = {"mask": plain.mask.double()}
    same(torch.func.functional_call(static, {**state, **buffers}, (x.double(),)), plain.double()(x.double()))
    plain.float()
    zeros = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    assert static(x).abs().sum() > 0
    assert torch.func.functional_call(static, zeros, (x,)).abs().sum() == 0
    same(static(x), plain(x))
    per_sample = torch.func.vmap(lambda v: static(v[None])[0])(x)
    same(per_sample, plain(x))
    same(capture(static, x)(x), plain(x))


def test_a_branch_on_values_is_an_error_with_the_line():
    @model
    class Branch(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(CaptureError, match=r"(?s)test_static_model\.py, line \d+, in forward.*if x\.sum.*jit\.trace"):
        Branch()(torch.ones(2, 3))


def test_a_fallback_runs_what_cannot_be_captured():
    attempts = []

    @model(fallback=True)
    class Branch(nn.Module):
        def forward(self, x):
            attempts.append(1)
            return x if x.sum() > 0 else -x

    net = Branch()
    assert net(-torch.ones(2)).sum() == 2
    tried = len(attempts)
    assert net(torch.ones(5)).sum() == 5
    assert len(attempts) == tried + 1, "what failed once is not tried again"
    assert count(net) == 0


def test_state_in_plain_attributes_is_refused_and_put_back():
    @model
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    net = Counting()
    with pytest.raises(CaptureError, match=r"Counting\.forward sets calls, .*register_buffer"):
        net(torch.ones(2))
    assert net.calls == 0


def test_state_in_buffers_is_kept():
    @model
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("keys", torch.zeros(4, 3))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.keys = torch.cat([self.keys[1:], x.mean(0, keepdim=True)])
            self.calls += 1
            return self.keys.sum(0) + x

    net = Cache()
    for number in range(1, 6):
        net(torch.full((2, 3), float(number)))
    assert net.keys[:, 0].tolist() == [2, 3, 4, 5]
    assert net.calls == 5
    assert count(net) == 1


def test_the_modules_own_error_is_what_the_caller_sees():
    _, static = pair()
    with pytest.raises(RuntimeError, match="channels"):
        static(torch.randn(2, 5, 6))
    static.eval()(x_of(2))
    with pytest.raises(RuntimeError, match="channels"):
        static(torch.randn(2, 5, 6))
    with pytest.raises(TypeError, match="unexpected keyword"):
        static(x_of(2), nothing=1)


def test_the_verbs_of_the_house_take_it():
    class Net(Static):
        pass

    net = Net().eval()
    wanted = net(x_of(4))
    fast = dr1.optimize(net, example_inputs=x_of(4), engines=["onnxruntime"])
    same(fast(x_of(4)), wanted)
    data = [(x_of(8, seed=i), torch.randint(0, 2, (8,))) for i in range(3)]
    before = net.head.weight.detach().clone()
    report = dr1.Trainer(net, data, lr=1e-2).train(epochs=1)
    assert report["steps"].after == 3
    assert not torch.equal(net.head.weight, before)


def test_names_and_mistakes():
    assert deepseek.model is dr1.model is model
    with pytest.raises(InputError, match="stands before a class"):
        model(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"capture or deepseek_r1\.optimize"):
        model(lambda x: x)
    assert Static.__name__ == "Static"
    assert list(__import__("inspect").signature(Static.forward).parameters) == ["self", "x", "extra"]
