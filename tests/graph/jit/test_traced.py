"""What surrounds the rewriting: guards, sizes, closures, modules, gradients, sources, and the Program."""

from __future__ import annotations

import functools
import linecache
import subprocess
import sys
import types

import pytest
import torch

import deepseek_r1 as dr1
from deepseek_r1.core import CaptureError, InputError
from deepseek_r1.graph import jit

ONES = torch.ones(3)


def doubled(x, times=2):
    if x.sum() > 0:
        return x * times
    return x - times


def test_the_other_branch_is_right_at_once():
    traced = jit.trace(doubled, ONES)
    assert torch.equal(traced(-ONES), doubled(-ONES))
    assert torch.equal(traced(ONES), doubled(ONES))
    assert traced.kept == {"cond": 1}
    assert len(traced.programs) == 1


def test_without_example_inputs_the_first_call_captures():
    traced = jit.trace(doubled)
    with pytest.raises(InputError, match="nothing was captured yet"):
        traced.program
    assert traced.kept == {}
    traced(ONES)
    assert isinstance(traced.program, dr1.Program)
    assert traced.program.name == "doubled"
    assert repr(traced) == "Traced(doubled, 1 captured)"


def test_any_batch_without_another_capture():
    traced = jit.trace(doubled)
    for n in (1, 2, 5):
        x = torch.randn(n, 4)
        assert torch.equal(traced(x), doubled(x))
    assert traced(torch.zeros(0, 4)).shape == (0, 4)
    assert len(traced.programs) == 1


def test_other_shapes_and_types_are_captured_again():
    traced = jit.trace(doubled)
    for x in (torch.ones(3, 4), torch.ones(3, 5), torch.ones(3), torch.ones(3).double(), torch.ones(3, 4)):
        found = traced(x)
        assert torch.equal(found, doubled(x))
        assert found.dtype == x.dtype
    # Sizes vary within one graph; a rank and a type each have their own.
    assert len(traced.programs) == 3


def test_python_values_are_guards():
    traced = jit.trace(doubled)
    assert traced(ONES, 3)[0] == 3
    assert traced(ONES, times=4)[0] == 4
    assert traced(-ONES, 3)[0] == -4
    assert len(traced.programs) == 2
    assert traced(ONES, True)[0] == 1, "True is another value than 1"


def test_the_number_of_graphs_is_bounded():
    traced = jit.trace(doubled, max_variants=2)
    traced(ONES, 1), traced(ONES, 2)
    with pytest.raises(CaptureError, match=r"captured 2 times already, and none fits: times is 3 now\. .*max_variants"):
        traced(ONES, 3)
    assert traced(ONES, 1)[0] == 1


def closed_over():
    weight, power = torch.tensor(2.0), 1

    def function(x):
        return x * weight**power if x.sum() > 0 else x - weight

    def change(new_weight=None, new_power=None):
        nonlocal weight, power
        weight = weight if new_weight is None else new_weight
        power = power if new_power is None else new_power

    return function, change, weight


def test_closures_are_kept_alive():
    function, change, weight = closed_over()
    traced = jit.trace(function)
    assert traced(ONES)[0] == 2
    weight.mul_(2)
    assert traced(ONES)[0] == 4
    assert len(traced.programs) == 1, "a tensor changed in place is the same tensor"
    change(new_power=2)
    assert traced(ONES)[0] == 16
    change(new_weight=torch.tensor(3.0))
    assert traced(ONES)[0] == 9
    assert traced(-ONES)[0] == -4


SETTINGS = {"scale": 2.0, "layers": [1, 2]}


def reads_a_global(x):
    for layer in SETTINGS["layers"]:
        x = x + layer if x.sum() > 0 else x - layer
    return x * SETTINGS["scale"]


def test_global_values_are_guards(monkeypatch):
    traced = jit.trace(reads_a_global)
    assert traced(ONES)[0] == 8
    monkeypatch.setitem(SETTINGS, "scale", 3.0)
    assert traced(ONES)[0] == 12
    monkeypatch.setitem(SETTINGS, "layers", [1, 2, 3])
    assert traced(ONES)[0] == 21
    assert len(traced.programs) == 3


class Options:
    depth = 2


OPTIONS = types.ModuleType("options")
OPTIONS.shift = 1.0


class Pipe:
    def __init__(self):
        self.sign = 1

    @property
    def direction(self):
        return [self.sign, "text"]

    def run(self, x):
        for _ in range(Options.depth):
            x = x * self.direction[0] + OPTIONS.shift
        return x if x.sum() > 0 else x - 1


def test_values_of_classes_modules_and_properties_are_guards(monkeypatch):
    pipe = Pipe()
    traced = jit.trace(pipe.run)
    for _ in range(2):
        assert traced(ONES)[0] == 3
    assert len(traced.programs) == 1
    monkeypatch.setattr(Options, "depth", 3)
    assert traced(ONES)[0] == 4
    monkeypatch.setattr(OPTIONS, "shift", 0.5)
    assert traced(ONES)[0] == 2.5
    pipe.sign = -1
    assert traced(ONES)[0] == -1.5
    assert len(traced.programs) == 4


def test_conditions_on_sizes_hold_or_are_captured_again():
    def even_or_odd(x):
        if x.shape[0] % 2 == 0:
            return x * 2 if x.sum() > 0 else x
        return x * 3

    traced = jit.trace(even_or_odd)
    assert [traced(torch.ones(n))[0].item() for n in (4, 3, 6, 5)] == [2, 3, 2, 3]
    assert len(traced.programs) == 2


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.flag = True

    def forward(self, x):
        y = self.norm(self.inner(x))
        if self.flag and y.sum() > 0:
            y = y * 2
        return y


def test_a_module_trains_as_it_is_and_answers_from_the_graph():
    torch.manual_seed(0)
    net = Net()
    traced = jit.trace(net)
    x = torch.randn(6, 4)
    before = net.norm.running_mean.clone()
    traced(x).sum().backward()
    assert net.inner.weight.grad is not None
    assert not torch.equal(net.norm.running_mean, before), "training mode is Python's own"
    assert traced.programs == []
    net.eval()
    torch.testing.assert_close(traced(x), net(x))
    assert set(traced.program.exported.state_dict) == set(net.state_dict()), "names are the module's"
    with torch.no_grad():
        net.inner.weight.add_(1)
    torch.testing.assert_close(traced(-x), net(-x))
    assert len(traced.programs) == 1
    net.flag = False
    torch.testing.assert_close(traced(x), net(x))
    net.inner.weight = torch.nn.Parameter(torch.ones(4, 4))
    torch.testing.assert_close(traced(x), net(x))
    assert "forward" not in net.__dict__
    assert not net.training


def test_a_training_step_goes_through_the_graph():
    torch.manual_seed(0)
    layer, shift = torch.nn.Linear(3, 3).eval(), torch.nn.Parameter(torch.zeros(3))

    def loss(x):
        y = layer(x) + shift
        return y.square().mean() if y.sum() > 0 else y.abs().mean()

    traced, x = jit.trace(loss), torch.randn(5, 3)
    found = torch.autograd.grad(traced(x), [layer.weight, layer.bias, shift])
    wanted = torch.autograd.grad(loss(x), [layer.weight, layer.bias, shift])
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)
    assert "Cond" in type(traced(x).grad_fn).__name__, "the graph itself is differentiated"


def test_a_loop_of_no_turns_has_pythons_gradient():
    def halve(x):
        while x.sum() > 10:
            x = x / 2
        return x

    traced = jit.trace(halve)
    for scale in (1.0, 8.0):
        x = (torch.ones(3) * scale).requires_grad_()
        (gradient,) = torch.autograd.grad(traced(x).sum(), x)
        assert gradient[0] == (1.0 if scale == 1 else 0.25)


def test_detached_values_inside():
    def scaled(x):
        y = x.detach() * 2 if x.sum() > 0 else x
        return (x * y.detach()).sum() * x.sum().item()

    x = torch.ones(3, requires_grad=True)
    found, wanted = (torch.autograd.grad(f(x), x)[0] for f in (jit.trace(scaled), scaled))
    assert torch.equal(found, wanted)


def test_grad_switches_inside():
    def scaled(x):
        with torch.no_grad():
            mean = x.mean() if x.sum() > 0 else x.max()
        return x * mean

    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(jit.trace(scaled)(x).sum(), x)
    assert torch.equal(gradient, torch.ones(3))


class Counter(torch.nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        if x.sum() > 0:
            return x + self.calls
        return x


@pytest.mark.parametrize("in_place", [True, False])
def test_buffers_change_once_a_call(in_place):
    counter = Counter(in_place).eval()
    traced = jit.trace(counter)
    assert [traced(ONES)[0].item() for _ in range(3)] == [2, 3, 4]
    assert counter.calls == 3
    assert len(traced.programs) == 1


def test_inputs_change_once_a_call():
    def add_one(x):
        x += 1
        return x * 2 if x.sum() > 0 else x

    traced, x = jit.trace(add_one), torch.zeros(3)
    assert traced(x)[0] == 2
    assert x[0] == 1
    assert traced(x)[0] == 4
    assert x[0] == 2


class Base(torch.nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Derived(Base):
    def forward(self, x):
        if x.max() > 5:
            return super().forward(x) - 1
        return super().forward(x)


def test_super_is_followed():
    traced, plain = jit.trace(Derived().eval()), Derived()
    for x in (ONES, ONES * 9, -ONES):
        assert torch.equal(traced(x), plain(x))
    assert traced.kept["cond"] == 3


class Recogniser:
    """No module, but it holds one."""

    def __init__(self):
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 3).eval()
        self.__gain = 2

    def run(self, x):
        return self.layer(x) * self.__gain if x.sum() > 0 else x

    @jit.trace
    def also(self, x):
        return self.run(x) + 1

    def louder(self):
        self.__gain = 5


def test_methods_of_any_object():
    recogniser = Recogniser()
    traced = jit.trace(recogniser.run)
    torch.testing.assert_close(traced(ONES), recogniser.run(ONES))
    recogniser.louder()
    torch.testing.assert_close(traced(ONES), recogniser.run(ONES))
    torch.testing.assert_close(recogniser.also(ONES), recogniser.run(ONES) + 1)
    assert recogniser.also is recogniser.also
    traced(ONES).sum().backward()
    assert recogniser.layer.weight.grad is not None


@functools.lru_cache
def cached(x):
    return x * 2 if x.sum() > 0 else x


@torch.no_grad()
def frozen(x):
    return x * 2 if x.sum() > 0 else x


def test_decorators_of_libraries():
    assert torch.equal(jit.trace(cached)(-ONES), -ONES)
    traced = jit.trace(frozen, ONES)
    assert torch.equal(traced(-ONES), -ONES)
    assert not traced(ONES.clone().requires_grad_()).requires_grad
    assert traced.kept == {"cond": 1}


def test_nests_go_in_and_come_out():
    def nested(batch, *, scale=1.0):
        y = batch["x"]
        if y.sum() > 0:
            y = y + batch["more"][0] * scale
        return {"y": y, "constant": 3, "nothing": None}

    traced = jit.trace(nested, {"batch": {"x": ONES, "more": [ONES]}})
    found = traced({"x": ONES, "more": [ONES]}, scale=2.0)
    assert found["y"][0] == 3
    assert (found["constant"], found["nothing"]) == (3, None)
    assert traced(batch={"x": -ONES, "more": [ONES]})["y"][0] == -1


def test_torch_cond_itself_is_kept():
    def written_out(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    traced = jit.trace(written_out)
    for x in (ONES, -ONES):
        assert torch.equal(traced(x), x.sin() if x.sum() > 0 else x.cos())
    assert traced.kept == {"cond": 1}


def test_the_rewritten_source_can_be_read():
    source = jit.trace(doubled).source
    assert source.startswith("def doubled(x, times=None):")
    assert "_dr.if_(" in source


def test_what_has_no_source_is_refused():
    scope = {}
    exec("def made(x):\n    return x", scope)
    with pytest.raises(CaptureError, match=r"made has no source that can be read .*exec"):
        jit.trace(scope["made"])
    for builtin in (len, torch.relu):
        with pytest.raises(CaptureError, match="not written in Python"):
            jit.trace(builtin)
    with pytest.raises(InputError, match=r"needs a function or an nn\.Module, given int"):
        jit.trace(3)


def test_a_file_that_changed_is_noticed(tmp_path, monkeypatch):
    file = tmp_path / "moving_source.py"
    file.write_text("def moving(x):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import moving_source

    file.write_text("import os\n\n\ndef other(x):\n    return x\n")
    with pytest.raises(CaptureError, match="was changed after it was imported"):
        jit.trace(moving_source.moving)


def test_inputs_that_fit_nothing():
    traced = jit.trace(doubled)
    with pytest.raises(InputError, match="was given a object"):
        traced(object())
    with pytest.raises(InputError, match="itself fails on these inputs: AttributeError"):
        traced("text")
    with pytest.raises(TypeError, match="missing a required argument"):
        traced()


def test_the_program_is_raced_saved_and_loaded(tmp_path):
    traced = jit.trace(doubled, torch.ones(4, 3))
    fast = dr1.optimize(traced.program, engines=["onnxruntime"])
    again = dr1.Program.load(traced.program.save(tmp_path / "doubled.dr1"))
    for x in (torch.ones(4, 3), -torch.ones(2, 3)):
        torch.testing.assert_close(fast(x), doubled(x))
        torch.testing.assert_close(again(x), doubled(x))


def test_the_names_people_write():
    code = """
import sys, deepseek
assert "torch" not in sys.modules
import deepseek.jit
assert "torch" not in sys.modules
from deepseek.jit import trace
import deepseek_r1
assert deepseek_r1.jit.trace is trace is deepseek.jit.trace
assert "jit" in dir(deepseek) and "jit" in dir(deepseek_r1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_traced_function_is_followed_by_another():
    inner = jit.trace(doubled)
    outer = jit.trace(lambda x: inner(x) + inner(-x))
    for x in (ONES, -ONES):
        assert torch.equal(outer(x), doubled(x) + doubled(-x))
    assert outer.kept == {"cond": 2}


def test_partial_functions():
    traced = jit.trace(functools.partial(doubled, times=5))
    assert (traced(ONES)[0], traced(-ONES)[0]) == (5, -6)


def test_with_and_return():
    def returns_at_the_end(x):
        y = x + 1
        with torch.no_grad():
            if y.sum() > 0:
                return y * 2
            y = y - 1
            return y.abs()

    def returns_before(x):
        with torch.no_grad():
            if x.sum() > 0:
                return x
        return x - 1

    traced = jit.trace(returns_at_the_end)
    for x in (ONES, -3 * ONES):
        assert torch.equal(traced(x), returns_at_the_end(x))
    with pytest.raises(CaptureError, match="a return inside a `with`"):
        jit.trace(returns_before)


def test_asking_for_gradients_runs_the_original():
    def asks(x):
        return x * 2 if x.requires_grad and x.sum() > 0 else x

    traced = jit.trace(asks)
    assert traced(ONES)[0] == 1
    assert traced(ONES.clone().requires_grad_())[0] == 2


def test_assignment_expressions():
    def remembers(x):
        if (total := x.sum()) > 0:
            x = x * total
        return x, total

    traced = jit.trace(remembers)
    for x in (ONES, -ONES):
        assert torch.equal(traced(x)[0], remembers(x)[0])
    for body in ("while (n := x.sum()) > 0: x = x - 1", "y = x if (x.sum() > 0 and (z := x.sum()) > 1) else -x"):
        with pytest.raises(CaptureError, match=":="):
            jit.trace(typed(f"def f(x):\n    {body}\n    return x\n"))


def test_else_of_a_loop_that_nothing_leaves():
    def finishes(x):
        while x.sum() < 6:
            x = x + 1
        else:
            if x.max() > 5:
                return x * 10
            x = x - 1
        return x

    traced = jit.trace(finishes)
    for x in (ONES, -ONES, 6 * ONES):
        assert torch.equal(traced(x), finishes(x))


def typed(text):
    """A function as one typed in a session, whose source Python remembers."""
    name = f"<typed {len(text)} {text[:20]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    scope = {"torch": torch}
    exec(compile(text, name, "exec"), scope)
    return scope["f"]


def decode(logits, end):
    tokens, count = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device), 0
    for row in logits:
        token = row.argmax()
        if token == end:
            break
        tokens[count] = token
        count += 1
    return tokens, count


def bubble_sort(x):
    y = x.clone()
    for i in range(y.shape[0]):
        for j in range(y.shape[0] - 1):
            if y[j] > y[j + 1]:
                swapped = y[j].clone()
                y[j] = y[j + 1]
                y[j + 1] = swapped
        y = y + 0 * i
    return y


def test_small_algorithms():
    traced = jit.trace(decode)
    for logits, end in ((torch.eye(4), 2), (torch.eye(4), 9), (torch.eye(5)[:, :4], 0)):
        found, wanted = traced(logits, torch.tensor(end)), decode(logits, end)
        assert torch.equal(found[0], wanted[0])
        assert found[1] == wanted[1]
    assert len(traced.programs) == 1
    sort = jit.trace(bubble_sort)
    for values in ([3.0, 1, 2, 5], [1.0, 2, 3], [5.0, 3, 2, 1, 7]):
        assert torch.equal(sort(torch.tensor(values)), torch.tensor(sorted(values)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    traced = jit.trace(decode)
    for logits, end in ((torch.eye(4), 2), (torch.eye(5)[:, :4], 0)):
        found, wanted = traced(logits.cuda(), torch.tensor(end).cuda()), decode(logits, end)
        assert torch.equal(found[0].cpu(), wanted[0])
        assert found[1] == wanted[1]
