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
        "pass remove_identities": True,
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


def spoil(module):
    relu = next(n for n in module.graph.nodes if n.target is aten.relu.default)
    relu.target = aten.neg.default
    return 1


def test_without_a_wrong_pass_the_others_are_used(monkeypatch):
    monkeypatch.setitem(PASSES, "spoil", spoil)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout()).eval()
    program = capture(net, torch.randn(3, 4))
    after = simplify(program, ("spoil", "remove_identities"), strict=False)
    assert targets(after) == [aten.linear.default, aten.relu.default]
    assert after.report.ok
    assert after.source is program
    [(what, why)] = after.report.skipped
    assert what == "pass spoil"
    assert "changed the program's answers by" in why


def crash(module):
    raise RuntimeError("no such thing\nsecond line")


def misshape(module):
    linear = next(n for n in module.graph.nodes if n.target is aten.linear.default)
    linear.target, linear.args = aten.bmm.default, linear.args[:2]
    return 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (crash, r"'crash' failed \(RuntimeError: no such thing\)"),
        (misshape, "'misshape' left a graph that does not run"),
    ],
)
def test_a_pass_that_crashes_is_refused_by_name(monkeypatch, wrong, message):
    monkeypatch.setitem(PASSES, wrong.__name__, wrong)
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4))
    with pytest.raises(CaptureError, match=message):
        simplify(program, (wrong.__name__,))
    assert simplify(program, (wrong.__name__,), strict=False).report.skipped[0][0] == f"pass {wrong.__name__}"


def test_a_pass_that_is_right_at_the_example_sizes_only_is_refused(monkeypatch):
    def freeze(module):
        view = next(n for n in module.graph.nodes if n.target is aten.view.default)
        view.args = (view.args[0], [-1, 10])
        return 1

    class Flat(nn.Module):
        def forward(self, x):
            return x.view(x.shape[0], x.shape[1] * 2).cumsum(0)

    monkeypatch.setitem(PASSES, "freeze", freeze)
    program = capture(Flat(), torch.randn(2, 5, 2), dynamic_shapes={"x": {0: "batch", 1: "length"}})
    with pytest.raises(CaptureError, match="the passes up to 'freeze' together"):
        simplify(program, ("freeze",))
    assert [what for what, _ in simplify(program, ("freeze",), strict=False).report.skipped] == ["pass freeze"]


def test_a_pass_that_loses_a_write_is_refused(monkeypatch):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(2))

        def forward(self, x):
            self.count.add_(x.sum())
            return x * 2

    def lose(module):
        add = next(n for n in module.graph.nodes if n.target is aten.add_.Tensor)
        module.graph.erase_node(add)
        return 1

    monkeypatch.setitem(PASSES, "lose", lose)
    with pytest.raises(CaptureError, match="'lose' changed"):
        simplify(capture(Counter(), torch.randn(3)), ("lose",))


def test_a_quantised_program_comes_back_as_it_is():
    quantized = torch.ops.quantized_decomposed

    class Quantised(nn.Module):
        def forward(self, x):
            limits = (0.1, 0, -128, 127, torch.int8)
            y = quantized.quantize_per_tensor(x, *limits)
            return quantized.dequantize_per_tensor(y, *limits) + quantized.dequantize_per_tensor(y, *limits) * 1

    program = capture(Quantised(), torch.randn(3, 4))
    after = simplify(program)
    assert targets(after) == targets(program)
    assert after.report.skipped[-1][0] == "passes"


def test_half_precision_is_judged_by_its_own_rounding():
    net = normed(2).to(torch.bfloat16)
    program = capture(net, torch.randn(2, 2, 6, 6, dtype=torch.bfloat16))
    after = simplify(program)
    assert aten.batch_norm.default not in targets(after)
    assert after.report.ok


def test_weights_that_no_pass_touched_are_shared_and_the_source_is_named():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).eval()
    program = capture(net, torch.randn(2, 1, 2, 2))
    after = simplify(program)
    assert after.source is program
    assert simplify(after).source in (None, program)
    pointers = {t.data_ptr() for t in after.exported.state_dict.values()}
    assert net[3].weight.data_ptr() in pointers
    assert net[0].weight.data_ptr() not in pointers
    with torch.no_grad():
        net[0].weight.mul_(2)
    x = torch.randn(3, 1, 2, 2)
    torch.testing.assert_close(simplify(after.source)(x), net(x))


def test_an_operator_without_float64_is_judged_in_its_own_type():
    @torch.library.custom_op("deepseek_r1_tests::single", mutates_args=())
    def single(x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32, "single precision only"
        return x + 1

    single.register_fake(lambda x: torch.empty_like(x))

    class Custom(nn.Module):
        def forward(self, x):
            return torch.nn.functional.dropout(single(x), 0.5, False) * 2

    after = simplify(capture(Custom(), torch.randn(3)))
    assert aten.dropout.default not in targets(after)
    assert after.report.skipped[-1][0] == "float64"


def test_buffers_made_in_inference_mode_do_not_count_as_written_to():
    net = normed(2)
    with torch.inference_mode():
        net[1].num_batches_tracked = torch.tensor(0)
    after = simplify(capture(net.requires_grad_(False), torch.randn(2, 2, 6, 6)))
    assert aten.batch_norm.default not in targets(after)
