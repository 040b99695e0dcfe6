"""Rewrites of a Program, each verified, and a wrong one refused by name."""

import pytest
import torch
from torch import nn

from deepseek_r1.core import CaptureError
from deepseek_r1.graph import PASSES, capture, fold_batch_norm, rewrite, simplify

aten = torch.ops.aten


def targets(program):
    return [n.target for n in program.exported.graph.nodes if n.op == "call_function"]


def normed(dims, affine=True, bias=False, **options):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 4, 3, bias=bias, **options)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4, affine=affine)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if affine:
            norm.weight.uniform_(-2, 2)
            norm.bias.normal_()
    return nn.Sequential(conv, norm, nn.Dropout(0.3)).eval()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("affine", "bias"), [(True, False), (True, True), (False, True)])
def test_batch_norm_is_folded_into_convolutions(dims, affine, bias):
    net = normed(dims, affine, bias, groups=2)
    program = capture(net, torch.randn(2, 2, *[6] * dims))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    after = simplify(program)
    assert aten.batch_norm.default not in targets(after)
    assert aten.dropout.default not in targets(after)
    for batch in (1, 3):
        x = torch.randn(batch, 2, *[6] * dims)
        torch.testing.assert_close(after(x), net(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert {c.name: c.passed for c in after.report.checks} == {
        "pass fold_batch_norm": True,
        "pass remove_dropout": True,
    }
    assert aten.batch_norm.default in targets(program), "the program that was given stays as it is"


def test_a_shared_convolution_is_not_folded():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    program = capture(Two(), torch.randn(2, 1, 5, 5))
    assert fold_batch_norm(program) is program


def test_one_weight_with_two_norms_is_folded_twice_and_stays_right():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.a, self.b = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
            with torch.no_grad():
                self.a.running_var.fill_(0.3)
                self.b.running_mean.fill_(1.5)

        def forward(self, x):
            return self.b(self.conv(self.a(self.conv(x))))

    net = Tied().eval()
    program = fold_batch_norm(capture(net, torch.randn(2, 2, 4, 4)))
    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(program(x), net(x), rtol=1e-4, atol=1e-5)
    assert aten.batch_norm.default not in targets(program)


def test_a_wrong_pass_is_refused_by_name(monkeypatch):
    def spoil(module):
        relu = next(n for n in module.graph.nodes if n.target is aten.relu.default)
        relu.target = aten.neg.default
        return 1

    monkeypatch.setitem(PASSES, "spoil", spoil)
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4))
    with pytest.raises(CaptureError, match="the pass 'spoil' changed the program's answers by"):
        simplify(program, ("spoil",))


def test_a_pass_that_gives_nan_is_refused(monkeypatch):
    def spoil(module):
        relu = next(n for n in module.graph.nodes if n.target is aten.relu.default)
        relu.target = aten.log.default
        return 1

    monkeypatch.setitem(PASSES, "spoil", spoil)
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4))
    with pytest.raises(CaptureError, match="'spoil'"):
        simplify(program, ("spoil",))


def test_a_pass_that_loses_an_output_is_refused(monkeypatch):
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, x * 2

    def lose(module):
        output = next(n for n in module.graph.nodes if n.op == "output")
        output.args = ((output.args[0][0], output.args[0][0]),)
        return 1

    monkeypatch.setitem(PASSES, "lose", lose)
    with pytest.raises(CaptureError, match="'lose'"):
        simplify(capture(Pair(), torch.randn(3, 4)), ("lose",))


def test_rewriting_keeps_nested_and_keyword_inputs():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1)

        def forward(self, pair, *, table, power):
            return {"y": self.norm(self.conv(pair[0])) + pair[1][0] * table["z"], "power": power}

    def made(n):
        x = torch.randn(n, 1, 4)
        return (x, [x]), {"z": x}

    class Wrapped(Deep):
        def forward(self, pair, table):
            return super().forward(pair, table=table, power=2)

    net = Wrapped().eval()
    after = simplify(capture(net, made(1)))
    assert aten.batch_norm.default not in targets(after)
    for n in (1, 4):
        pair, table = made(n)
        torch.testing.assert_close(after(pair, table)["y"], net(pair, table)["y"])
    keywords = Deep().eval()
    pair, table = made(3)
    after = simplify(capture(keywords, {"pair": pair, "table": table, "power": 2}))
    assert aten.batch_norm.default not in targets(after)
    pair, table = made(5)
    torch.testing.assert_close(after(pair=pair, table=table, power=2)["y"], keywords(pair, table=table, power=2)["y"])


def test_a_rewrite_that_changes_nothing_gives_the_same_program():
    program = capture(nn.Linear(4, 2), torch.randn(2, 4))
    assert rewrite(program, lambda module: 0) is program
    assert simplify(program) is program
