"""Packed rows give the losses and gradients that their samples give alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.data import DSDataLoader, block_mask, per_sample_loss, sample_weights

pytestmark = pytest.mark.tiny
VOCABULARY, WIDTH, HEADS = 31, 16, 2


class Causal(nn.Module):
    """Two blocks with learned positions, in float64 or float32."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, position_ids, mask):
        x = self.tokens(input_ids) + self.positions(position_ids)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            x = x + out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2))
        return self.head(x)


def _samples(count=23, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        n = int(torch.randint(2, 20, (), generator=g))
        ids = torch.randint(VOCABULARY, (n,), generator=g)
        labels = ids.clone()
        labels[: n // 3] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def _token_losses(logits, labels):
    """Of each token's prediction of the next one, in the place of the next one."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    return F.pad(losses, (1, 0))


def _alone(net, samples):
    losses, weights = [], []
    for sample in samples:
        ids, labels = sample["input_ids"][None], sample["labels"][None]
        n = ids.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        tokens = _token_losses(net(ids, torch.arange(n)[None], mask), labels)
        counted = (labels != -100) & (torch.arange(n) > 0)
        losses.append(tokens.sum() / counted.sum())
        weights.append(counted.sum())
    return torch.stack(losses), torch.stack(weights)


def _gradients(net):
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    net.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_those_of_the_samples_alone(dtype):
    torch.manual_seed(0)
    net, samples = Causal().to(dtype), _samples()
    alone, counts = _alone(net, samples)
    alone.mean().backward()
    by_sample = _gradients(net)
    alone, counts = _alone(net, samples)
    ((alone * counts).sum() / counts.sum()).backward()
    by_token = _gradients(net)

    loader = DSDataLoader(samples, batching="packed", max_length=32, batch_size=100, model_shifts_labels=True)
    (batch,) = loader
    assert len(batch["input_ids"]) < len(samples) / 2

    def losses():
        logits = net(batch["input_ids"], batch["position_ids"], block_mask(batch["sequence_ids"]))
        return _token_losses(logits, batch["labels"]), batch["labels"] != -100

    tokens, counted = losses()
    found = per_sample_loss(tokens, batch["sequence_ids"], counted)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    order = [list(row) for _, rows in loader.plan().batches_of(_in_order(samples), mixed=False) for row in rows]
    expected = alone.detach()[[i for row in order for i in row]]
    assert (found.detach() - expected).abs().max() <= tolerance
    found.mean().backward()
    assert (_gradients(net) - by_sample).abs().max() <= tolerance

    for per, wanted in (("sample", by_sample), ("token", by_token)):
        tokens, counted = losses()
        weights = sample_weights(batch["sequence_ids"], counted, per=per)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
        (tokens * weights).sum().backward()
        assert (_gradients(net) - wanted).abs().max() <= max(tolerance, 1e-6)


def _in_order(samples):
    import numpy as np

    return np.arange(len(samples))


def test_attending_to_neighbours_would_be_noticed():
    torch.manual_seed(0)
    net, samples = Causal(), _samples()
    alone, _ = _alone(net, samples)
    (batch,) = DSDataLoader(samples, batching="packed", max_length=32, batch_size=100, model_shifts_labels=True)
    everything = torch.ones(32, 32, dtype=torch.bool).tril()
    logits = net(batch["input_ids"], batch["position_ids"], everything)
    found = per_sample_loss(_token_losses(logits, batch["labels"]), batch["sequence_ids"], batch["labels"] != -100)
    assert abs(float((found.mean() - alone.mean()).detach())) > 1e-4


def test_without_causality_a_sample_sees_all_of_itself():
    mask = block_mask(torch.tensor([[1, 1, 2, 0]]), causal=False)[0, 0]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_padding_neither_counts_nor_spoils():
    ids = torch.tensor([[1, 2, 2, 0]])
    losses = torch.tensor([[2.0, 4.0, 6.0, float("inf")]], requires_grad=True)
    found = per_sample_loss(losses, ids)
    assert found.tolist() == [2.0, 5.0]
    found.sum().backward()
    assert losses.grad.tolist() == [[1.0, 0.5, 0.5, 0.0]]
    # A sample of which nothing counts is no sample.
    assert per_sample_loss(losses, ids, torch.tensor([[False, True, True, True]])).tolist() == [5.0]


def test_shapes_are_checked():
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(InputError, match="shift sequence_ids too"):
        per_sample_loss(torch.zeros(2, 3), ids)
    with pytest.raises(InputError, match="the mask"):
        sample_weights(ids, torch.ones(2, 3))
    with pytest.raises(InputError, match="integers"):
        block_mask(torch.ones(2, 4))
    with pytest.raises(ConfigError, match="per='row'"):
        sample_weights(ids, per="row")
