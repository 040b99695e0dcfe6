"""What `trace` reads from a graph and measures of it."""

import inspect

import pytest
import torch
from torch import nn

import deepseek
import deepseek_r1 as dr1
from deepseek_r1.core import CaptureError, ConfigError, InputError
from deepseek_r1.graph import Drawing, Program, capture, trace
from deepseek_r1.graph.drawing import _read


def operators(drawing):
    return {n.id: n for n in drawing.nodes if n.kind == "operator"}


def test_it_is_public_under_both_names(drawing):
    assert dr1.trace is trace is deepseek.trace
    assert isinstance(drawing, Drawing)
    assert repr(drawing) == "Drawing('Net', 12 operators; .save('x.html') draws it)"


def test_nodes_in_program_order_with_shapes_and_modules(drawing):
    assert [n.label for n in drawing.nodes] == [
        "x", "conv2d", "relu", "conv2d", "batch_norm", "add", "relu", "conv2d", "batch_norm", "add", "relu", "mean",
        "linear", "output",
    ]  # fmt: skip
    assert [n.kind for n in drawing.nodes] == ["input", *["operator"] * 12, "output"]
    nodes = operators(drawing)
    assert nodes["conv2d_1"].module == "blocks.0.conv"
    assert nodes["mean"].module == ""
    assert nodes["conv2d_1"].outputs[0].shape == ("batch", 4, 8, 8)
    assert nodes["conv2d_1"].outputs[0].measured == (1, 4, 8, 8)
    assert nodes["conv2d_1"].outputs[0].dtype == "float32"
    assert nodes["add"].inputs == ("relu", "batch_norm")
    assert drawing.nodes[-1].inputs == ("linear",)
    assert nodes["linear"].weights == ("head.weight [10, 4] float32", "head.bias [10] float32")
    assert "dim=[2, 3]" in " ".join(nodes["mean"].attributes)
    assert drawing.sizes == {"batch": "dimension 0 of x, 1 in this run"}


def test_costs_are_those_of_the_given_inputs_not_of_the_doubled_batch(drawing):
    nodes = operators(drawing)
    assert nodes["conv2d"].flops == 2 * 4 * 9 * 64
    assert nodes["conv2d_1"].flops == 2 * 4 * 4 * 9 * 64
    assert nodes["linear"].flops == 2 * 4 * 10
    assert nodes["relu"].flops == 4 * 64
    assert nodes["relu"].read_bytes == nodes["relu"].written_bytes == 4 * 64 * 4
    assert nodes["relu"].bytes == 2 * 4 * 64 * 4
    assert nodes["conv2d"].read_bytes == 4 * (64 + 4 * 9 + 4)
    assert all(n.time_ms > 0 and n.calls == 1 for n in nodes.values())
    assert drawing.total("flops") == sum(n.flops for n in nodes.values())


def test_the_slow_operator_takes_the_time():
    class Net(nn.Module):
        def forward(self, x):
            return (x @ x @ x).relu()

    net = trace(Net(), torch.ones(300, 300))
    nodes = operators(net)
    assert nodes["relu"].time_ms < nodes["matmul"].time_ms < net.total("time") < 2_000


def test_the_users_line_is_named(drawing):
    add = operators(drawing)["add"]
    lines, start = inspect.getsourcelines(type(drawing_block()))
    number = start + next(i for i, line in enumerate(lines) if "return self.act" in line)
    assert add.source == f"{inspect.getsourcefile(type(drawing_block()))}:{number}"
    assert add.code == "return self.act(x + self.norm(self.conv(x)))"
    # torch's own line (in nn/modules/conv.py) is further inside, but nobody wrote it here.
    assert operators(drawing)["conv2d_1"].source == add.source


def drawing_block():
    from .conftest import Block

    return Block(1)


@pytest.mark.parametrize(
    ("frames", "line"),
    [
        (["/me/a.py", f"{torch.__path__[0]}/nn/x.py"], "/me/a.py:1"),
        (["/me/a.py", "/me/b.py", "<eval_with_key>.3"], "/me/b.py:2"),
        (["/me/a.py", dr1.__path__[0] + "/models/digits.py"], "/me/a.py:1"),
        ([dr1.__path__[0] + "/models/digits.py"], dr1.__path__[0] + "/models/digits.py:1"),
        ([f"{torch.__path__[0]}/nn/x.py"], ""),
        ([], ""),
    ],
)
def test_whose_line_it_is(frames, line):
    trace_ = "".join(f'  File "{f}", line {i}, in forward\n    code {i}\n' for i, f in enumerate(frames, 1))
    source, code = _read.source_line(trace_)
    assert source == line
    assert code == (f"code {line.rpartition(':')[2]}" if line else "")


def test_the_model_is_left_as_it_was():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout()
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("cache", torch.zeros(2, 3))

        def forward(self, x):
            self.calls.add_(1)
            self.cache[0] = x[0]
            return self.drop(x) + self.calls + self.cache.sum()

    net = Counting().train()
    program = capture(net, torch.ones(2, 3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, random = torch.ones(2, 3), torch.get_rng_state()
    drawn = trace(program, x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert net.drop.training
    assert torch.equal(x, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), random)
    assert operators(drawn)["add_"].written_bytes == 4


def test_a_program_draws_itself_with_its_own_inputs_or_others(tmp_path):
    program = capture(nn.Sequential(nn.Linear(4, 2), nn.Tanh()), torch.randn(3, 4))
    assert operators(trace(program))["linear"].flops == 2 * 3 * 4 * 2
    assert operators(trace(program, torch.randn(5, 4)))["linear"].flops == 2 * 5 * 4 * 2
    with pytest.raises(InputError, match="has shape"):
        trace(program, torch.randn(5, 3))
    again = trace(Program.load(program.save(tmp_path / "p.dr1")))
    assert [n.label for n in again.nodes] == [n.label for n in trace(program).nodes]


@pytest.mark.parametrize("quantised", [False, True])
def test_rewritten_programs_are_drawn(quantised):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
    program = dr1.graph.simplify(capture(net, torch.randn(2, 1, 6, 6)))
    if quantised:
        data = [(torch.randn(4, 1, 6, 6), torch.zeros(4, dtype=torch.long)) for _ in range(2)]
        program = dr1.quantize(net, dataset=data)
        program = getattr(program, "program", program)
    drawn = trace(program)
    labels = [n.label for n in drawn.nodes]
    assert "batch_norm" not in labels
    assert ("dequantize_per_tensor" in labels) is quantised
    assert not any("unknown" in note for note in drawn.notes)


class Keywords(nn.Module):
    def forward(self, ids, *, mask, scale=2.0):
        return ids * mask * scale


def test_inputs_by_name_and_names_of_sizes():
    inputs = {"ids": torch.ones(2, 3), "mask": torch.ones(2, 3), "scale": 3.0}
    axes = {0: "rows", 1: "tokens"}
    drawn = trace(Keywords(), inputs, dynamic_shapes={"ids": axes, "mask": axes}, name="keywords")
    assert drawn.name == "keywords"
    assert drawn.nodes[0].outputs[0].shape == ("rows", "tokens")
    assert [n.label for n in drawn.nodes if n.kind == "input"] == ["ids", "mask"]
    assert drawn.sizes == {"rows": "dimension 0 of ids, 2 in this run", "tokens": "dimension 1 of ids, 3 in this run"}


def test_sizes_made_of_others_keep_their_names():
    class Flat(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0] * 4, -1).relu()

    drawn = trace(Flat(), torch.ones(3, 4, 5))
    assert operators(drawn)["relu"].outputs[0].shape[0] == "4*batch"
    assert any(note.startswith("not drawn, because they only compute with sizes: ") for note in drawn.notes)


def test_a_model_of_a_fixed_size_is_measured_at_that_size():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, -1) if x.shape[0] == 2 else x.reshape(1, -1)

    drawn = trace(Fixed(), torch.ones(1, 4))
    assert any("batch of 2" in note or "holds for" in note for note in drawn.notes)


def test_control_flow_is_nested_and_its_costs_add_up(branching):
    nodes = operators(branching)
    scopes = {i: [s.path for s in n.scopes] for i, n in nodes.items()}
    assert scopes["true_graph_0/sin"] == ["cond", "true"]
    assert scopes["cond"] == ["cond"]
    assert scopes["while_loop_body_graph_0/relu"] == ["while_loop", "body"]
    assert nodes["true_graph_0/linear"].calls == 1
    assert nodes["false_graph_0/cos"].calls == 0
    assert nodes["false_graph_0/cos"].time_ms is None
    assert nodes["while_loop_cond_graph_0/lt"].calls == 4
    body = nodes["while_loop_body_graph_0/linear"]
    assert body.calls == 3
    assert body.flops == 3 * 2 * 3 * 4 * 4
    assert nodes["while_loop"].flops == nodes["while_loop"].bytes == 0
    # x goes into both branches; what the branches give goes on to the operator that chooses.
    assert nodes["false_graph_0/cos"].inputs == ("x",)
    assert {"gt", "true_graph_0/sin", "false_graph_0/cos"} <= set(nodes["cond"].inputs)
    assert "without costs, because these inputs do not take their branch: 2 operators" in branching.notes
    assert nodes["true_graph_0/sin"].source.startswith(__file__.replace("test_trace", "conftest"))


def test_outputs_of_a_nest_are_named_by_their_place(branching):
    outputs = {n.label: n for n in branching.nodes if n.kind == "output"}
    assert list(outputs) == ["output['a']", "output['pair'][0]", "output['pair'][1]", "output['steps']"]
    assert outputs["output['pair'][1]"].inputs == ("split",)
    assert outputs["output['pair'][1]"].outputs[0].shape == ("batch", 2)


def test_an_operator_of_somebody_else_has_no_flops_and_says_so():
    @torch.library.custom_op("drawn_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Net(nn.Module):
        def forward(self, x):
            return twice(x) + 1

    drawn = trace(Net(), torch.ones(2, 3))
    assert operators(drawn)["twice"].flops is None
    assert operators(drawn)["twice"].read_bytes == 24
    assert "FLOPs unknown: drawn_test.twice.default" in drawn.notes
    assert drawn.total("flops") == 6


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (nn.Linear(4, 2), None, InputError, "needs inputs"),
        (nn.Linear(4, 2), torch.ones(2, 3), InputError, "fails on the example inputs"),
        (print, torch.ones(2), InputError, "given builtin_function_or_method"),
        (type("Wild", (nn.Module,), {"forward": lambda s, x: x if x.sum() > 0 else -x})(), torch.ones(2), CaptureError,
         "branches on the values"),
    ],
)  # fmt: skip
def test_bad_input(model, inputs, error, message):
    with pytest.raises(error, match=message):
        trace(model, inputs)


def test_bad_rounds():
    with pytest.raises(ConfigError, match="3 or more"):
        trace(nn.Linear(4, 2), torch.ones(1, 4), rounds=2)


def test_rounds_end_in_time():
    drawn = trace(nn.Linear(4, 2), torch.ones(1, 4), rounds=10**6, max_seconds=0.2)
    assert 3 <= drawn.facts["rounds"] < 10**5
