"""Capturing a module: what the program takes, gives and shares, and what the errors say."""

import copy
import inspect
from collections import OrderedDict

import pytest
import torch
from torch import nn

from deepseek_r1.core import CaptureError, InputError
from deepseek_r1.graph import Program, capture, float64_module, rewrite, to_float64


class Net(nn.Module):
    """Whatever function it is given, with one weight."""

    def __init__(self, function=None):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [1, 2, 5])
def test_any_batch_runs_whatever_batch_was_given(given):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    program = capture(net, torch.randn(given, 1, 4, 4))
    for batch in (0, 1, 2, 7):
        x = torch.randn(batch, 1, 4, 4)
        same(program(x), net(x))
    assert program.input_shapes()[0][1:] == (1, 4, 4)
    assert isinstance(program.input_shapes()[0][0], str)


class Keywords(nn.Module):
    def forward(self, ids, *, mask, scale=2.0):
        return (ids * mask) * scale


def test_keyword_inputs():
    program = capture(Keywords(), {"ids": torch.ones(1, 3), "mask": torch.ones(1, 3)})
    x, m = torch.randn(5, 3), torch.randn(5, 3)
    same(program(ids=x, mask=m), x * m * 2)
    assert program.input_names() == ["ids", "mask"]
    with pytest.raises(InputError, match="captured with inputs"):
        program(x, m)


class Nested(nn.Module):
    def forward(self, pair, table):
        a, (b, c) = pair
        return a + b * c + table["bias"]


def test_nested_inputs_and_mappings():
    inputs = ((torch.ones(1, 3), [torch.ones(1, 3), torch.ones(1, 3)]), {"bias": torch.ones(1, 3)})
    program = capture(Nested(), inputs)
    a, b, c, d = torch.randn(4, 6, 3)
    same(program((a, [b, c]), {"bias": d}), a + b * c + d)


def test_nested_outputs_keep_their_form():
    def many(self, x):
        y = self.linear(x)
        return {"y": y, "nothing": None, "pair": (y + 1, [y.sum(-1), 3]), "again": y}

    net = Net(many)
    program = capture(net, torch.randn(1, 4))
    x = torch.randn(3, 4)
    got, want = program(x), net(x)
    assert list(got) == ["y", "nothing", "pair", "again"]
    assert got["nothing"] is None
    assert got["pair"][1][1] == 3
    assert isinstance(got["pair"], tuple)
    assert isinstance(got["pair"][1], list)
    same(got["pair"][1][0], want["pair"][1][0])
    same(got["again"], want["again"])


def test_ordered_mappings_and_inputs_that_are_no_tensors():
    class Power(nn.Module):
        def forward(self, x, power, flag, nothing):
            return OrderedDict(y=x**power if flag else x)

    program = capture(Power(), (torch.ones(1, 2), 3, True, None))
    x = torch.randn(4, 2)
    same(program(x, 3, True, None)["y"], x**3)


def test_tensors_of_one_size_are_not_made_dynamic():
    class Scaled(nn.Module):
        def forward(self, x, table, scalar):
            return x @ table * scalar

    table, scalar = torch.randn(4, 2), torch.tensor(2.0)
    program = capture(Scaled(), (torch.randn(1, 4), table, scalar))
    assert program.input_shapes()[1:] == [(4, 2), ()]
    x = torch.randn(3, 4)
    same(program(x, table, scalar), x @ table * 2)


def test_dynamic_dimensions_by_name():
    class Mean(nn.Module):
        def forward(self, ids, mask):
            return (ids * mask).sum(1) / mask.sum(1)

    axes = {0: "batch", 1: "sequence"}
    program = capture(Mean(), (torch.rand(2, 5), torch.ones(2, 5)), dynamic_shapes={"ids": axes, "mask": axes})
    for shape in ((1, 9), (4, 3)):
        x = torch.rand(shape)
        same(program(x, torch.ones(shape)), x.mean(1))


def test_names_in_dynamic_shapes_are_checked():
    with pytest.raises(InputError, match=r"dynamic_shapes names \['y'\], but the inputs are \['input'\]"):
        capture(nn.Linear(4, 2), torch.randn(2, 4), dynamic_shapes={"y": {0: "batch"}})


def test_training_flags_come_back_each_one():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    net[2].eval()
    program = capture(net, torch.randn(3, 4))
    assert [m.training for m in (net, net[0], net[1], net[2])] == [True, True, True, False]
    x = torch.randn(3, 4)
    assert torch.equal(program(x), program(x)), "the captured graph must not drop anything"

    def bad(self, x):
        raise ValueError("no")

    failing = Net(bad).train()
    with pytest.raises(InputError):
        capture(failing, torch.randn(2, 4))
    assert failing.training


def test_the_program_shares_weights_and_the_reference_does_not_touch_them():
    net = nn.Linear(4, 2)
    program = capture(net, torch.randn(2, 4))
    before = copy.deepcopy(net.state_dict())
    reference = float64_module(program)
    assert reference(*to_float64(program.example_inputs)[0]).dtype == torch.float64
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        net.weight.add_(1.0)
    x = torch.randn(3, 4)
    same(program(x), net(x))


def test_casts_inside_the_graph_follow_the_reference():
    net = Net(lambda self, x: self.linear(x.to(torch.float32)) + torch.arange(4, dtype=torch.float32))
    program = capture(net, torch.randn(2, 4))
    args, _ = to_float64(program.example_inputs)
    assert float64_module(program)(*args).dtype == torch.float64


def branching(self, x):
    if x.sum() > 0:
        return self.linear(x)
    return x


def test_a_branch_on_values_names_the_line_and_the_way_out():
    line = inspect.getsourcelines(branching)[1] + 1
    with pytest.raises(CaptureError) as caught:
        capture(Net(branching), torch.randn(2, 4))
    text = str(caught.value)
    assert f"{__file__}, line {line}, in branching" in text
    assert "if x.sum() > 0:" in text
    for way in ("torch.where", "torch.cond", "method='dynamic'"):
        assert way in text


def test_an_example_input_that_the_model_refuses():
    with pytest.raises(InputError, match=r"the model itself fails on the example inputs .*\(2, 5\)"):
        capture(nn.Linear(4, 2), torch.randn(2, 5))

    def mine(self, x):
        raise KeyError("mine")

    with pytest.raises(InputError, match=r"test_capture\.py, line \d+, in mine"):
        capture(Net(mine), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (lambda x: x, torch.ones(1), r"needs a torch\.nn\.Module, given function"),
        (nn.Linear(2, 2), (), "at least one example input"),
        (nn.Linear(2, 2), {}, "at least one example input"),
        (nn.Linear(2, 2), {"x": torch.ones(1, 2)}, "the model itself fails"),
    ],
)
def test_things_that_cannot_be_captured(model, inputs, message):
    with pytest.raises(InputError, match=message):
        capture(model, inputs)


def test_a_model_for_one_size_only_is_captured_and_says_so():
    net = Net(lambda self, x: self.linear(x) if x.shape[0] == 2 else x * 0)
    program = capture(net, torch.randn(2, 4))
    what, why = program.report.skipped[0]
    assert what == "dynamic batch"
    assert why.startswith("the model fixes dimension 0 of x at the example's size (")
    assert f"{__file__}, line " in why
    assert "x.shape[0] == 2" in why
    assert program.input_shapes() == [(2, 4)]
    with pytest.raises(InputError, match=r"has shape \(2, 4\); given \(3, 4\)"):
        program(torch.randn(3, 4))


def test_a_fixed_batch_is_reported_even_if_the_export_itself_does_not_fail():
    """A module that reshapes with a number of its own is fixed by torch without an error."""
    net = Net(lambda self, x: self.linear(x.reshape(2, 4)))
    program = capture(net, torch.randn(2, 4))
    assert program.input_shapes() == [(2, 4)]
    assert [what for what, _ in program.report.skipped] == ["dynamic batch"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(2, 5),), r"shape \('s\d+', 4\); given \(2, 5\)"),
        ((torch.ones(2, 4, 1),), "given"),
        ((torch.ones(2, 4, dtype=torch.float64),), "dtype torch.float32; given torch.float64"),
        ((torch.ones(2, 4), torch.ones(2)), "captured with inputs"),
        (([1.0],), "captured with inputs"),
        ((3,), "must be a tensor, given int"),
    ],
)
def test_inputs_that_do_not_fit_are_the_callers_mistake(given, message):
    program = capture(nn.Linear(4, 2), torch.randn(2, 4))
    with pytest.raises(InputError, match=message):
        program(*given)


def test_the_report_counts_operators_and_names_inputs():
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4), name="mine")
    assert (program.name, program.report.title) == ("mine", "capture mine")
    assert program.report["operators"].after == 2
    assert "input input: ['s" in program.report.notes[0]
    assert program.precision == "fp32"
    assert program.parent is None
    assert isinstance(program, Program)
    assert program.parameters_bytes == (16 + 4) * 4


def same_rewritten(module):
    """A rewrite that changes something, so that the graph is captured again."""
    return 1


def test_a_size_for_which_the_model_would_branch_otherwise_is_refused(tmp_path):
    program = capture(Net(lambda self, x: self.linear(x) if x.shape[0] < 5 else x * 0), torch.randn(3, 4))
    programs = [program, rewrite(program, same_rewritten), Program.load(program.save(tmp_path / "p.dr1"))]
    programs.append(Program.load(programs[1].save(tmp_path / "q.dr1")))
    for one in programs:
        for batch in (0, 1, 4):
            same(one(x := torch.randn(batch, 4)), program.module()(x))
        with pytest.raises(InputError, match="must be 0 to 4; given 5"):
            one(torch.randn(5, 4))


def test_inputs_that_must_agree_in_a_size():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b if a.shape[0] == b.shape[0] else a * 0

    program = capture(Sum(), (torch.ones(2, 3), torch.ones(2, 3)))
    assert program(torch.ones(4, 3), torch.ones(4, 3)).sum() == 24
    with pytest.raises(InputError, match=r"must agree in the size s.*: 4 against 1"):
        program(torch.ones(4, 3), torch.ones(1, 3))


def test_a_dimension_that_was_asked_for_and_is_fixed_is_an_error():
    net = Net(lambda self, x: self.linear(x.reshape(2, 4)))
    with pytest.raises(CaptureError, match="asks for dimension 0 of x to vary, but the model fixes"):
        capture(net, torch.randn(2, 4), dynamic_shapes={"x": {0: "batch"}})


def test_an_export_that_fails_with_a_dynamic_batch_falls_back_to_the_examples(monkeypatch):
    from deepseek_r1.graph import _capture

    real = _capture.torch_export

    def fussy(model, args, kwargs, spec):
        if spec is not None:
            raise RuntimeError("no dynamic sizes today")
        return real(model, args, kwargs, spec)

    monkeypatch.setattr(_capture, "torch_export", fussy)
    program = capture(nn.Linear(4, 2), torch.randn(3, 4))
    assert program.input_shapes() == [(3, 4)]
    assert [what for what, _ in program.report.skipped] == ["dynamic lengths", "dynamic batch"]
    assert "sizes only" in program.report.skipped[1][1]
    assert "no dynamic sizes today" in program.report.skipped[1][1]
    with pytest.raises(CaptureError, match="no dynamic sizes today"):
        capture(nn.Linear(4, 2), torch.randn(3, 4), dynamic_shapes={"input": {0: "batch"}})


def test_names_of_inputs_that_are_no_tensors():
    class Flags(nn.Module):
        def forward(self, flag, x, nothing=None, *, text="a"):
            return x + 1 if flag and text == "a" else x

    program = capture(Flags(), {"flag": True, "x": torch.ones(2, 3), "nothing": None, "text": "a"})
    assert program.input_names() == ["flag", "x", "nothing", "text"]
    assert len(program.input_shapes()[1]) == 2
    assert program(flag=True, x=torch.ones(4, 3), nothing=None, text="a").sum() == 24
    with pytest.raises(InputError, match="'flag'"):
        program(flag=False, x=torch.ones(4, 3), nothing=None, text="a")
