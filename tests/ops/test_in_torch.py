"""Registered operators in torch's own machinery and in this package's: compile, capture, the race, the Trainer."""

import copy
import json
import subprocess
import sys

import pytest
import torch

import deepseek
import deepseek_r1 as dr1
from deepseek_r1.graph import Program


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 16)
        self.add_module("swish", dr1.ops.Swish())
        self.last = torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.swish(self.first(x)))


@pytest.fixture
def net(swish):
    torch.manual_seed(0)
    return Net()


def plain(net, x):
    return net.last(torch.nn.functional.silu(net.first(x)))


def test_the_module_the_function_and_torchs_operator_are_one(swish, net):
    x = torch.randn(4, 8)
    assert dr1.ops.Swish is deepseek.ops.Swish is swish
    assert type(net.swish).__module__ == "deepseek_r1.ops"
    assert torch.equal(dr1.ops.swish(x), torch.ops.dr1.swish(x))
    assert {"swish", "Swish", "register_custom_op"} <= set(dir(dr1.ops))
    torch.testing.assert_close(net(x), plain(net, x))


def test_copies_and_files_of_a_model(net, tmp_path):
    x = torch.randn(2, 8)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    torch.save(net.swish, tmp_path / "module.pt")
    with torch.serialization.safe_globals([dr1.ops.Swish, set]):
        assert isinstance(torch.load(tmp_path / "module.pt", weights_only=True), dr1.ops.Swish)
    assert not net.swish.state_dict()


@pytest.mark.parametrize(
    "name", ["swish", "affine", "blend", "gated_norm", "spread", "sine_cosine", "root", "pair_sum"]
)
def test_torchs_own_checks(swish, gated_norm, operators, name):
    inputs = {
        "blend": lambda: (torch.randn(3, 4), torch.randn(4), torch.randn(3, 1)),
        "gated_norm": lambda: (torch.randn(3, 4), torch.randn(3, 4)),
        "root": lambda: (torch.rand(3, 4) + 1,),
    }.get(name, lambda: (torch.randn(3, 4),))()
    trains = name not in ("pair_sum", "spread")
    inputs = tuple(t.requires_grad_(trains) for t in inputs)
    results = torch.library.opcheck(getattr(torch.ops.dr1, name).default, inputs)
    assert set(results.values()) == {"SUCCESS"}


# Inductor's own use of a part of torch that torch has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_break_forwards_and_backwards(net, backend):
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    for n in (5, 2, 9):
        x = torch.randn(n, 8, requires_grad=True)
        compiled(x).square().sum().backward()
        found = [x.grad.clone(), net.first.weight.grad.clone()]
        net.zero_grad()
        x.grad = None
        plain(net, x).square().sum().backward()
        torch.testing.assert_close(found, [x.grad, net.first.weight.grad], rtol=1e-4, atol=1e-5)
        net.zero_grad()


def test_captured_with_a_batch_of_any_size(net, tmp_path):
    program = dr1.capture(net, torch.randn(1, 8))
    assert any("dr1.swish" in str(n.target) for n in program.exported.graph.nodes)
    path = program.save(tmp_path / "net.dr1")
    for each in (program, Program.load(path)):
        for n in (0, 1, 7):
            x = torch.randn(n, 8)
            torch.testing.assert_close(each(x), plain(net, x))


def test_captured_where_shapes_change(operators):
    class Pairs(torch.nn.Module):
        def forward(self, x):
            return operators.pair_sum(x).relu()

    program = dr1.capture(Pairs(), torch.randn(4, 6), dynamic_shapes={"x": {0: "rows", 1: "columns"}})
    for shape in ((2, 2), (3, 10), (1, 8)):
        assert program(torch.ones(shape)).shape == (shape[0], shape[1] // 2)


def test_a_saved_program_in_another_process(net, tmp_path):
    program = dr1.capture(net, torch.randn(2, 8))
    path = program.save(tmp_path / "net.dr1")
    x = torch.randn(3, 8)
    torch.save(x, tmp_path / "x.pt")
    code = """
import json, sys, torch
from deepseek_r1 import ops
from deepseek_r1.core import UnsafeFileError
from deepseek_r1.graph import Program
path, x, libraries = sys.argv[1:]
try:
    Program.load(path)
except UnsafeFileError as e:
    assert "load its library first" in str(e), e
else:
    raise AssertionError("the operator is not known here")
for name, library in json.loads(libraries).items():
    ops.register_custom_op(name, library)
print(json.dumps(Program.load(path)(torch.load(x, weights_only=True)).tolist()))
"""
    libraries = json.dumps({name: str(p) for name, p in dr1.ops.libraries().items() if name == "swish"})
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "x.pt"), libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), plain(net, x))


def test_the_race_leaves_out_what_cannot_run_it(net):
    fast = dr1.optimize(net, example_inputs=torch.randn(16, 8), engines=["eager", "onnxruntime"])
    reasons = dict(fast.report.skipped)
    assert fast.engine == "eager"
    assert "dr1.swish" in reasons["onnxruntime fp32"]
    x = torch.randn(5, 8)
    torch.testing.assert_close(fast(x), plain(net, x))


def test_it_trains_under_the_trainer(net):
    x = torch.randn(256, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    trainer = dr1.Trainer(net, loader, lr=2e-2)
    trainer.train(epochs=12)
    losses = [loss for _, loss in trainer.losses]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


def test_autocast(net):
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(4, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert net.first.weight.grad.isfinite().all()
