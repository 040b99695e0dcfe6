"""Random small graphs, with views, writes and repeated work: simplified, they answer and write as before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.graph import capture, simplify

#: Each takes the state and one or two values [rows, 6] and gives another.
STEPS = [
    lambda m, a, b: a + b,
    lambda m, a, b: a * 1,
    lambda m, a, b: a.clone(),
    lambda m, a, b: a * torch.sigmoid(a),
    lambda m, a, b: a / (1 + torch.exp(-a)),
    lambda m, a, b: 0.5 * a * (1 + torch.erf(a / 2**0.5)),
    lambda m, a, b: m.one(a),
    lambda m, a, b: m.two(a),
    lambda m, a, b: m.norm(m.one(a)),
    lambda m, a, b: m.two(m.norm(a)),
    lambda m, a, b: (a - a.mean(-1, True)) / torch.sqrt(a.var(-1, False, True) + 1e-3),
    lambda m, a, b: a * torch.rsqrt((a * a).mean(-1, keepdim=True) + 1e-3),
    lambda m, a, b: a.view(-1, 2, 3).transpose(1, 2).transpose(2, 1).reshape(-1, 6),
    lambda m, a, b: a[:],
    lambda m, a, b: a.tanh().relu_(),
    lambda m, a, b: a.tanh().add_(b),
    lambda m, a, b: a + m.table.cos() * 2,
    lambda m, a, b: a + m.state.add_(0.25),
    lambda m, a, b: (lambda t: (t.view(-1, 3, 2)[:, 0].mul_(2), t)[1])(a.sin()),
    lambda m, a, b: (lambda t: (t.exp(), t.view(-1).neg_(), t.exp())[2])(b.sin()),
    lambda m, a, b: torch.softmax((a @ b.T) * 0.5, -1) @ a,
    lambda m, a, b: torch.cat([a]),
    lambda m, a, b: a.to(torch.float32),
]


class Random(nn.Module):
    def __init__(self, recipe, outputs):
        super().__init__()
        self.recipe, self.outputs = recipe, outputs
        torch.manual_seed(0)
        self.one, self.two, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.norm.running_var.uniform_(0.5, 2)
        self.register_buffer("state", torch.zeros(6))
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x):
        values = [x]
        for step, a, b in self.recipe:
            values.append(STEPS[step](self, values[a % len(values)], values[b % len(values)]))
        return [values[o % len(values)] for o in self.outputs]


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    recipe=st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 9), st.integers(0, 9)), max_size=8),
    outputs=st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
def test_a_simplified_graph_answers_and_writes_as_before(recipe, outputs):
    net = Random(recipe, outputs).eval()
    program = capture(net, torch.randn(3, 6), dynamic_shapes={"x": {0: "rows"}})
    after = simplify(program)
    state = net.state.clone()
    seen = []
    for one in (program, after):
        net.state.copy_(state)
        x = torch.linspace(-2, 2, 24).view(4, 6)
        with torch.no_grad():
            first = [v.clone() for v in one(x)]
            again = one(x)
        # A caller who writes to one output sees the others change exactly as before.
        again[0].add_(1)
        seen.append((first, [v.clone() for v in again], x, net.state.clone()))
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
