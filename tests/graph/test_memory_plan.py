"""Plans of memory: no two values that are needed at one time overlap, and no place is larger than it must be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.core import CaptureError
from deepseek_r1.graph import buffer_plan, capture, simplify
from deepseek_r1.graph._memory_plan import Buffer, place

aten = torch.ops.aten


def overlap(a, b):
    at_one_time = a.start <= b.end and b.start <= a.end
    return at_one_time and a.offset < b.offset + b.size_bytes and b.offset < a.offset + a.size_bytes


BUFFERS = st.lists(
    st.builds(
        lambda size, start, length: Buffer(name="b", size_bytes=size, start=start, end=start + length),
        st.integers(1, 1000), st.integers(0, 20), st.integers(0, 8),
    ),
    max_size=25,
)  # fmt: skip


@given(BUFFERS, st.sampled_from([1, 64]))
def test_no_two_buffers_of_one_time_overlap(buffers, alignment):
    plan = place(buffers, alignment)
    assert len(plan.buffers) == len(buffers)
    for i, a in enumerate(plan.buffers):
        assert a.offset % alignment == 0
        assert not any(overlap(a, b) for b in plan.buffers[:i])
    assert plan.arena_bytes == max((b.offset + b.size_bytes for b in plan.buffers), default=0)
    live = [sum(b.size_bytes for b in plan.buffers if b.start <= t <= b.end) for t in range(30)]
    assert plan.bound_bytes == max(live)
    assert plan.bound_bytes <= plan.arena_bytes <= plan.total_bytes


def test_a_chain_needs_two_buffers():
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    plan = buffer_plan(capture(net, torch.randn(2, 64)))
    assert [b.size_bytes for b in plan.buffers] == [512] * 5
    assert (plan.total_bytes, plan.arena_bytes, plan.bound_bytes) == (5 * 512, 2 * 512, 2 * 512)
    assert buffer_plan(capture(net, torch.randn(2, 64)), torch.randn(8, 64)).arena_bytes == 8 * 512


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        y = self.layer(x)
        z = y.view(-1, 4, 4).transpose(1, 2)  # views of y
        w = torch.relu_(self.layer(x + 1))  # written in place
        return z.reshape(-1, 16) + w + y, w[:, :1]


def test_views_and_writes_share_memory_and_outputs_are_the_callers():
    program = capture(Branches(), torch.randn(4, 16))
    plan = buffer_plan(program)
    names = {b.name for b in plan.buffers}
    assert names == {"linear", "add", "reshape", "add_1"}, "w and the sum leave the graph"
    [y] = [b for b in plan.buffers if b.name == "linear"]
    nodes = list(program.exported.module(check_guards=False).graph.nodes)
    assert nodes[y.end].name == "add_2"


def live_bytes(program, inputs):
    """The most bytes that values between operators take while the graph really runs."""
    module = program.exported.module(check_guards=False)
    last = {s: n for n in module.graph.nodes for s in n.all_input_nodes}
    env, held, worst = {}, {}, 0
    output = next(n for n in module.graph.nodes if n.op == "output")

    def storages(value):
        flat = value if isinstance(value, list | tuple) else [value]
        return {
            v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in flat if isinstance(v, torch.Tensor)
        }

    foreign = set()
    queue = iter(inputs)
    for node in module.graph.nodes:
        if node is output:
            break
        if node.op == "placeholder":
            env[node] = next(queue)
        elif node.op == "get_attr":
            env[node] = module.get_parameter(node.target)
        else:
            load = lambda n: env[n]  # noqa: E731
            args, kwargs = (torch.fx.node.map_arg(a, load) for a in (node.args, node.kwargs))
            env[node] = node.target(*args, **kwargs)
        if node.op != "call_function":
            foreign |= set(storages(env[node]))
        held[node] = storages(env[node])
        now = {p: size for sizes in held.values() for p, size in sizes.items() if p not in foreign}
        worst = max(worst, sum(now.values()))
        for source in [s for s, user in last.items() if user is node]:
            env.pop(source), held.pop(source)
    return worst


def test_the_bound_is_what_a_real_run_holds():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 64, 3), nn.Flatten(), nn.Sigmoid())
    x = torch.randn(4, 3, 16, 16)
    program = capture(net, x)
    plan = buffer_plan(program)
    with torch.no_grad():
        output = net(x).untyped_storage().nbytes()
        assert plan.bound_bytes <= live_bytes(program, [x]) <= plan.bound_bytes + output


def test_sizes_that_depend_on_values_are_said_to():
    class Picked(nn.Module):
        def forward(self, x):
            return x.nonzero() * 2 + 1

    with pytest.raises(CaptureError, match="not known before it runs"):
        buffer_plan(capture(Picked(), torch.randn(4, 4)))


def test_simplify_tells_what_it_did_to_memory():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return (torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v).relu()

    inputs = tuple(torch.randn(2, 2, 64, 8) for _ in range(3))
    batch = {0: "batch"}
    program = capture(Attention(), inputs, dynamic_shapes={"q": batch, "k": batch, "v": batch})
    row = simplify(program).report["activations, planned"]
    assert row.after < row.before / 2
