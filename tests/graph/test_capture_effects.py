"""What cannot be captured and what the error says; what a graph changes in its module; sizes it must refuse."""

from __future__ import annotations

import inspect
import random
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.core import ArtifactError, CaptureError, InputError
from deepseek_r1.graph import Program, capture, rewrite
from deepseek_r1.graph._conditions import evaluate, holds
from deepseek_r1.graph._watch import Watch


class Net(nn.Module):
    """Whatever function it is given, with one layer."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


@dataclass
class Pair:
    a: object


def branch(self, x):
    return x if x.sum() > 0 else -x


def loop(self, x):
    while x.norm() > 1:
        x = x / 2
    return x


def item(self, x):
    return x[: int(x.argmax()) + 1]


def tolist(self, x):
    return x * max(x.sum(1).tolist())


def repeat(self, x):
    for _ in range(int(x.abs().sum())):
        x = x + 1
    return x


def numpy(self, x):
    return torch.from_numpy(np.sin(x.numpy()))


def sparse(self, x):
    return torch.sparse.mm(x.to_sparse(), self.linear.weight)


@pytest.mark.parametrize(
    ("function", "line", "ways"),
    [
        (branch, "x.sum() > 0", ["deepseek.jit.trace", "torch.where", "torch.cond"]),
        (loop, "while x.norm() > 1", ["deepseek.jit.trace"]),
        (item, "int(x.argmax())", [".item()", "torch.index_select"]),
        (tolist, ".tolist()", [".item()"]),
        (repeat, "range(int(", ["deepseek.jit.trace(model) keeps loops"]),
        (numpy, "x.numpy()", ["NumPy cannot take part", "torch function of the same name"]),
        (sparse, "to_sparse()", ["tensor operations"]),
    ],
)
def test_a_failure_names_the_users_line_and_a_way_out(function, line, ways):
    with pytest.raises(CaptureError) as caught:
        capture(Net(function), torch.full((2, 4), 2.0))
    text = str(caught.value)
    lines, first = inspect.getsourcelines(function)
    number = first + next(i for i, code in enumerate(lines) if line in code)
    assert f"{__file__}, line {number}, in {function.__name__}:" in text
    assert line in text
    for way in [*ways, "method='dynamic'"]:
        assert way in text


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (Net(lambda self, x: Pair(x)), torch.ones(2, 4), ["register_dataclass", "tuple, list, dict"]),
        (
            Net(lambda self, x, p: x + p.a),
            (torch.ones(2, 4), Pair(1.0)),
            ["An input is an object", "register_dataclass"],
        ),
    ],
)
def test_objects_that_are_no_nests(model, inputs, words):
    with pytest.raises(CaptureError) as caught:
        capture(model, inputs)
    text = str(caught.value)
    assert f"Net.forward in {__file__}, line " in text
    for word in words:
        assert word in text


def test_scripted_modules():
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(nn.Linear(4, 2))
    with pytest.raises(CaptureError, match="Capture the Python module that it was scripted from"):
        capture(scripted, torch.ones(2, 4))


@pytest.mark.parametrize(
    "outside", [lambda: random.random(), lambda: float(np.random.rand()), lambda: time.perf_counter_ns() % 1000 + 1.0]
)
def test_numbers_from_outside_are_not_silently_burnt_in(outside):
    net = Net(lambda self, x: x * (1 + outside()))
    try:
        notes = capture(net, torch.ones(2, 4)).report.notes
    except CaptureError as error:
        notes = [str(error)]
    told = ("takes something from outside that a graph cannot hold", "what it takes from outside torch is fixed")
    assert any(words in note for note in notes for words in told)


def test_the_users_random_state_is_left_alone():
    linear, noisy = nn.Linear(4, 2), Net(lambda self, x: x + torch.rand_like(x))
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    wanted = random.random(), np.random.rand(), torch.rand(1)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    capture(linear, torch.ones(2, 4))
    capture(noisy, torch.ones(2, 4))
    assert (random.random(), np.random.rand(), torch.rand(1)) == wanted


def test_randomness_of_torch_stays_random():
    program = capture(Net(lambda self, x: x + torch.rand_like(x)), torch.ones(2, 4))
    assert not torch.equal(program(torch.ones(2, 4)), program(torch.ones(2, 4)))


class Mutable(nn.Module):
    """A ring of the last rows and a counter, both buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ring", torch.zeros(3, 4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.ring.index_copy_(0, (self.calls % 3).reshape(1), x.mean(0, keepdim=True))
        self.calls += 1
        return self.ring.sum(0) + x


def test_a_cache_in_buffers_is_the_modules_own(tmp_path):
    net, twin = Mutable(), Mutable()
    program = capture(net, torch.ones(1, 4))
    assert net.calls == 0, "capturing runs nothing for good"
    assert program.updates() == (["calls", "ring"], [])
    assert any("updates the module's own buffers calls, ring" in note for note in program.report.notes)
    for number in range(5):
        x = torch.randn(number + 1, 4)
        torch.testing.assert_close(program(x), twin(x))
    assert net.calls == 5
    torch.testing.assert_close(net.ring, twin.ring)
    again = Program.load(program.save(tmp_path / "cache.dr1"))
    assert again.updates() == program.updates()
    x = torch.randn(2, 4)
    torch.testing.assert_close(again(x), twin(x))
    torch.testing.assert_close(again(x), twin(x))
    assert net.calls == 5, "a saved program has buffers of its own"


def test_batch_norm_trains_through_its_graph():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.0)).train()
    twin = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.0)).train()
    twin.load_state_dict(net.state_dict())
    program = capture(net, torch.randn(4, 4), train=True)
    assert net[1].num_batches_tracked == 0
    assert net[1].running_mean.abs().sum() == 0
    assert program.updates()[0] == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    for batch in (4, 7):
        x = torch.randn(batch, 4)
        program(x).square().sum().backward()
        twin(x).square().sum().backward()
    for (name, a), (_, b) in zip(net.state_dict().items(), twin.state_dict().items()):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(net[0].weight.grad, twin[0].weight.grad)
    assert capture(net, torch.randn(4, 4)).updates() == ([], []), "the evaluation graph changes nothing"
    assert net.training


def test_inputs_that_the_module_changes_are_changed():
    net = Net(lambda self, x: x.add_(1) * 2)
    x = torch.zeros(2, 4)
    program = capture(net, x)
    assert x.sum() == 0, "the example is the user's"
    assert program.updates() == ([], ["x"] if "x" in program.input_names() else program.input_names())
    given = torch.zeros(3, 4)
    assert program(given).sum() == 24
    assert given.sum() == 12


def test_attributes_that_forward_sets_are_told_and_put_back():
    def remember(self, x):
        self.last = x.shape[0]
        self.hidden = x * 2
        return self.hidden

    net = Net(remember)
    program = capture(net, torch.ones(2, 4))
    assert not hasattr(net, "hidden")
    assert sum("forward sets" in note for note in program.report.notes) == 2


@pytest.mark.parametrize(
    ("function", "right", "wrong", "words"),
    [
        (
            lambda self, x: x * 2 if x.shape[1] % 4 == 0 else x,
            (3, 12),
            (3, 6),
            r"Eq\(Mod\(args_0\.shape\[1\], 4\), 0\)",
        ),
        (lambda self, x: x * 2 if x.shape[0] * x.shape[1] > 10 else x, (1, 11), (1, 9), r"> 10"),
        (lambda self, x: x if x.shape[0] == 1 else x * 2, (2, 8), (1, 8), r"args_0\.shape\[0\] >= 2"),
        (lambda self, x: x if x.shape[1] == 1 else x * 2, (1, 8), (2, 1), r"args_0\.shape\[1\] >= 2"),
    ],
)
def test_sizes_for_which_the_model_would_branch_otherwise_are_refused(function, right, wrong, words, tmp_path):
    net = Net(function)
    program = capture(net, torch.ones(2, 8))
    programs = [program, rewrite(program, lambda module: 1), Program.load(program.save(tmp_path / "p.dr1"))]
    for one in programs:
        assert torch.equal(one(torch.ones(right)), net(torch.ones(right)))
        with pytest.raises(InputError, match=rf"(?s){words}.*Expected: args_0: float32\[s\d+, s\d+\] on cpu"):
            one(torch.ones(wrong))


def test_sizes_that_depend_on_each_other():
    net = Net(lambda self, x, y: torch.cat([x, x[:, :1]], 1) + y)
    program = capture(net, (torch.ones(2, 5), torch.ones(2, 6)))
    for batch, length in ((1, 9), (4, 1), (3, 2)):
        assert program(torch.ones(batch, length), torch.ones(batch, length + 1)).sum() == 2 * batch * (length + 1)
    with pytest.raises(InputError, match=r"must be s\d+ \+ 1, here 8; given 9"):
        program(torch.ones(2, 7), torch.ones(2, 9))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((torch.ones(2, 4).double(), torch.ones(2, dtype=torch.long)), "has dtype torch.float32; given torch.float64"),
        ((torch.ones(2, 4), torch.ones(2)), "has dtype torch.int64; given torch.float32"),
        ((torch.ones(2, 4, 1), torch.ones(2, dtype=torch.long)), r"given \(2, 4, 1\)"),
        ((torch.ones(2, 4), torch.ones(3, dtype=torch.long)), "must agree in the size"),
        ((torch.ones(2, 4, device="meta"), torch.ones(2, dtype=torch.long)), "is on cpu; given on meta"),
        ((torch.ones(2, 4),), "captured with inputs"),
    ],
)
def test_what_does_not_fit_is_answered_with_the_signature(inputs, words):
    program = capture(Net(lambda self, x, i: self.linear(x) * i.unsqueeze(1)), (torch.ones(2, 4), torch.arange(2)))
    with pytest.raises(
        InputError, match=rf"(?s){words}.*Expected: .*float32\[s\d+, 4\] on cpu, .*int64\[s\d+\] on cpu"
    ):
        program(*inputs)


def test_the_order_of_keyword_inputs_says_nothing():
    program = capture(Net(lambda self, x, scale: x * scale), {"x": torch.ones(2, 4), "scale": torch.ones(2, 4) * 3})
    assert program(scale=torch.ones(3, 4) * 5, x=torch.ones(3, 4)).sum() == 60


def test_an_empty_batch_is_no_example():
    with pytest.raises(InputError, match="give a batch of 1 or more"):
        capture(nn.Linear(4, 2), torch.ones(0, 4))


def test_a_recurrent_net_with_its_state_first():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.LSTM(3, 5, num_layers=2, batch_first=True)

        def forward(self, x, state):
            return self.body(x, state)

    net = Step().eval()
    program = capture(net, (torch.randn(1, 4, 3), (torch.randn(2, 1, 5), torch.randn(2, 1, 5))))
    assert program.report.skipped == []
    for batch, length in ((1, 4), (3, 7), (2, 1)):
        inputs = torch.randn(batch, length, 3), (torch.randn(2, batch, 5), torch.randn(2, batch, 5))
        torch.testing.assert_close(program(*inputs), net(*inputs))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{"bidirectional": True}, {"batch_first": True, "num_layers": 2}])
def test_recurrent_layers_keep_their_length(kind, options):
    net = getattr(nn, kind)(3, 5, **options).eval()
    program = capture(net, torch.randn(4, 6, 3))
    assert all(isinstance(size, str) for size in program.input_shapes()[0][:2])
    for shape in ((4, 6, 3), (1, 2, 3), (7, 1, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), net(x))


def test_models_of_transformers_are_taken_as_they_are(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    net = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.randint(40, (2, 6))
    with torch.no_grad():
        prompt = net(input_ids=ids)
        program = capture(net, {"input_ids": ids})
        answer = program(input_ids=ids[:1])
        assert type(answer) is type(prompt)
        torch.testing.assert_close(answer.logits, prompt.logits[:1])
        step = {"input_ids": ids[:, :1], "past_key_values": prompt.past_key_values}
        length = prompt.past_key_values.get_seq_length()
        decode = capture(net, step)
        assert prompt.past_key_values.get_seq_length() == length, "the example cache did not grow"
        other = {"input_ids": ids[:1, :1], "past_key_values": net(input_ids=ids[:1, :3]).past_key_values}
        twin = {"input_ids": ids[:1, :1], "past_key_values": net(input_ids=ids[:1, :3]).past_key_values}
        torch.testing.assert_close(decode(**other).logits, net(**twin).logits)
    again = Program.load(program.save(tmp_path / "gpt2.dr1"))
    torch.testing.assert_close(again(input_ids=ids)["logits"], prompt.logits)
    assert set(again(input_ids=ids)["past_key_values"]) == {"key_cache", "value_cache"}


def test_conditions_in_a_file_are_read_as_arithmetic_only(tmp_path):
    program = capture(Net(lambda self, x: x), torch.ones(2, 4))
    bad = [("__import__('os').system('x')",), ("size_0_0.real > 1",), ("[size_0_0]",), ("size_9_9 > 1",), (3,)]
    for conditions in bad:
        with pytest.raises((ArtifactError, TypeError, ValueError)):
            file = replace(program, conditions=conditions).save(tmp_path / "bad.dr1")
            Program.load(file)(torch.ones(2, 4))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 9))
def test_conditions_mean_what_python_means(a, b, k):
    names = {"s1": a, "s2": b}
    assert evaluate(f"s1*{k} + s2 - 3", names) == a * k + b - 3
    assert evaluate(f"(s1//{k}) % s2", names) == (a // k) % b
    assert holds(f"Eq(Mod(s1, {k}), 0)", names) == (a % k == 0)
    assert holds("Ne(s1, s2)", names) == (a != b)
    assert holds("Max(s1, s2) >= Min(s1, s2)", names)
    assert holds(f"(s1 > {k}) & (s2 <= 50)", names) == (a > k)
    assert holds("Mod(s2, s1) >= 0", names) == (a > 0)


@pytest.mark.parametrize(
    "text", ["s1.bit_length()", "open('x')", "lambda: 1", "s1 if s1 else 2", "x9", "'a'*9", "s1 < 2 < 3"]
)
def test_what_is_no_arithmetic_is_refused(text):
    with pytest.raises(ValueError, match="no arithmetic"):
        evaluate(text, {"s1": 1})
    with pytest.raises(ValueError, match="too long"):
        evaluate("1 + " * 200 + "1", {})
    with pytest.raises(ValueError, match="no condition"):
        evaluate("1 +", {})


def test_a_watch_sees_attributes_parts_and_constants():
    net = Net(branch)
    net.levels = [1, 2]
    net.table = torch.ones(2)
    watch = Watch(net)
    assert watch.unchanged()
    net.levels.append(3)
    assert not watch.unchanged()
    net.levels.pop()
    assert watch.unchanged()
    net.table = torch.ones(2)
    assert not watch.unchanged()
    watch = Watch(net)
    net.linear = nn.Linear(4, 4)
    assert not watch.same_parts()
