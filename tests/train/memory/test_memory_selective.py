"""Which operators of a block are worth keeping."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from deepseek_r1.train.memory._region import Region
from deepseek_r1.train.memory._selective import _most_seconds, _Op, contexts, operator_sets


class Feedforward(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_what_runs_after_the_last_saved_tensor_is_never_kept():
    torch.manual_seed(0)
    block, x = Feedforward(), torch.randn(256, 64, requires_grad=True)
    sets = operator_sets(lambda: block(x), torch.device("cpu"))
    names = {operator for kept in sets for operator in kept}
    # Nothing saves the output of the second multiplication, though it takes half of the time.
    assert ("aten.addmm.default", 0) in names
    assert ("aten.addmm.default", 1) not in names


def test_gradients_with_any_set_are_those_without():
    torch.manual_seed(0)
    block, x = Feedforward(), torch.randn(256, 64, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    for kept in operator_sets(lambda: block(x), torch.device("cpu")):
        output = Region(contexts=contexts(kept)).call(block, (x,), {})
        found = torch.autograd.grad(output.square().sum(), [x, *block.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.01])
def test_the_operators_kept_are_the_best_of_all_sets_within_the_bytes(share):
    draw = torch.Generator().manual_seed(3)
    seconds, sizes = torch.rand(8, generator=draw).tolist(), torch.randint(1, 40, (8,), generator=draw).tolist()
    ops = [_Op((str(i), 0), s, n << 20, True, False) for i, (s, n) in enumerate(zip(seconds, sizes, strict=True))]
    limit = share * sum(op.nbytes for op in ops)
    every = (c for size in range(9) for c in itertools.combinations(ops, size))
    best = max(sum(op.seconds for op in c) for c in every if sum(op.nbytes for op in c) <= limit)
    kept = _most_seconds(ops, limit)
    assert sum(op.nbytes for op in ops if op.key in kept) <= limit
    assert sum(op.seconds for op in ops if op.key in kept) == pytest.approx(best)


def test_a_second_backward_pass_computes_again_what_the_first_has_used():
    torch.manual_seed(0)
    block, x = Feedforward(), torch.randn(16, 64, requires_grad=True)
    kept = operator_sets(lambda: block(x), torch.device("cpu"))[0]
    loss = Region(contexts=contexts(kept)).call(block, (x,), {}).square().sum()
    first = torch.autograd.grad(loss, block.parameters(), retain_graph=True)
    second = torch.autograd.grad(loss, block.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_kept_output_that_was_changed_in_place_later_is_computed_again():
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8)), torch.randn(4, 8, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    keep, reuse = contexts(frozenset({("aten.addmm.default", 0)}))
    output = Region(contexts=(keep, reuse)).call(layer, (x,), {})
    ((held, _),) = keep.stored.values()
    held.zero_()
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)
