"""The norm of all gradients: any mixture of types, sparse ones, no look at the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_r1.train import Objective, train_step
from deepseek_r1.train._clip import clip_grad_norm_

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def with_grads(kinds, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    params = []
    for i, dtype in enumerate(kinds):
        p = nn.Parameter(torch.zeros(i + 2, 3, dtype=dtype))
        p.grad = (scale * torch.randn(p.shape, generator=g, dtype=torch.float64)).to(dtype)
        params.append(p)
    return params


@settings(deadline=None, max_examples=30)
@given(kinds=st.lists(st.sampled_from(TYPES), min_size=1, max_size=6), share=st.sampled_from([0.1, 0.9, 2.0]))
def test_the_norm_is_that_of_all_numbers(kinds, share):
    params = with_grads(kinds)
    before = [p.grad.double().clone() for p in params]
    norm = torch.cat([g.flatten() for g in before]).norm()
    total = clip_grad_norm_([*params, nn.Parameter(torch.zeros(1))], share * norm.item())
    torch.testing.assert_close(total.double(), norm, rtol=1e-5, atol=0)
    for p, g in zip(params, before):
        rough = p.dtype in (torch.float16, torch.bfloat16)
        torch.testing.assert_close(p.grad.double(), min(share, 1.0) * g, rtol=1e-2 if rough else 1e-5, atol=1e-6)


def test_torch_agrees():
    ours, theirs = with_grads([torch.float32] * 3), with_grads([torch.float32] * 3)
    torch.testing.assert_close(clip_grad_norm_(ours, 0.5), nn.utils.clip_grad_norm_(theirs, 0.5))
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p.grad, q.grad)


def test_fp16_norms_do_not_overflow():
    params = with_grads([torch.float16] * 2, scale=30_000.0)
    for p in params:
        p.grad.clamp_(-60_000, 60_000)
    total = clip_grad_norm_(params, 1.0)
    assert total.dtype == torch.float32
    assert 65_504 < total.item() < 1e6
    assert torch.cat([p.grad.float().flatten() for p in params]).norm().item() == pytest.approx(1.0, rel=1e-2)


def test_sparse_gradients_are_added_up_and_clipped():
    table, dense_table = (nn.Embedding(5, 2, sparse=s) for s in (True, False))
    dense_table.load_state_dict(table.state_dict())
    index = torch.tensor([1, 3, 3])
    for t in (table, dense_table):
        t(index).sum().backward()
    assert torch.equal(clip_grad_norm_(table.parameters(), 0.5), clip_grad_norm_(dense_table.parameters(), 0.5))
    torch.testing.assert_close(table.weight.grad.to_dense(), dense_table.weight.grad)
    model = nn.Sequential(table, nn.Linear(2, 3))
    batch = (index, torch.tensor([0, 1, 2]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert train_step(model, [batch], optimizer, Objective(model), clip_grad_norm=0.1).bad is False


def test_nothing_to_clip_and_bad_gradients():
    assert clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0
    params = with_grads([torch.float32, torch.float64])
    params[0].grad[0, 0] = torch.nan
    assert torch.isnan(clip_grad_norm_(params, 1.0))


def test_it_never_waits_for_the_device():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero")
            return func(*args, **(kwargs or {}))

    with Watch():
        clip_grad_norm_(with_grads(TYPES), 1.0)
