"""Weights of samples and tokens in a batch: against the formula, in micro-batches, and from a domain mixture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.core import InputError
from deepseek_r1.data import DomainAdapter, DomainMixture, DSDataLoader, per_sample_loss
from deepseek_r1.models import Llama, LlamaConfig
from deepseek_r1.train import Objective, Trainer, TrainingConfig
from deepseek_r1.train._evaluate import predict

from .token_models import LENGTH, VOCAB, equal, made, rows, step, token_batch

WEIGHTS = torch.tensor([0.5, 2.0, 1.25, 0.25], dtype=torch.float64)
TOKENS = torch.linspace(0.5, 3, 4 * LENGTH, dtype=torch.float64).reshape(4, LENGTH)


def _logits(model, batch):
    output = model(**{k: v for k, v in batch.items() if k != "labels"})
    return output if isinstance(output, torch.Tensor) else output.logits


def _token_losses(name, model, batch):
    """[B, L], each loss at its label, 0 where it does not count."""
    logits, labels = _logits(model, batch), batch["labels"].clone()
    if name == "logits":
        return F.cross_entropy(logits, labels, reduction="none"), labels != -100
    if name != "hf bert":
        labels[:, 0] = -100
        if (ids := batch.get("sequence_ids")) is not None:
            labels[:, 1:][ids[:, 1:] != ids[:, :-1]] = -100
            labels[ids == 0] = -100
        logits = F.pad(logits[:, :-1], (0, 0, 1, 0))
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), labels != -100


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _check(name, model, batch, expected):
    wanted = _gradients(model, expected)
    found = step(model, [batch])
    kept = {n: g.clone() for n, g in found[0].items()}
    assert found[1].loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, gradient in wanted.items():
        torch.testing.assert_close(kept[key], gradient, rtol=1e-5, atol=1e-7)
    equal(step(model, [batch], micro_batch_size=1), (kept, found[1]))
    equal(step(model, rows(batch, slice(0, 1), slice(1, 4)), micro_batch_size=2), (kept, found[1]))


LANGUAGE = ["llama", "gpt2", "logits", "hf llama", "hf gpt2", "hf bert"]


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("tokens", [False, True])
def test_a_sample_counts_by_its_weight(name, tokens):
    model, batch = made(name), token_batch()
    losses, counts = _token_losses(name, model, batch)
    each = TOKENS * counts if tokens else counts.double()
    means = (losses * each).sum(1) / each.sum(1)
    batch |= {"loss_weight": WEIGHTS} | ({"token_weights": TOKENS} if tokens else {})
    _check(name, model, batch, (WEIGHTS * means).mean())


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_token_counts_by_its_weight(name):
    model, batch = made(name), token_batch(all_ignored=(3,))
    losses, counts = _token_losses(name, model, batch)
    expected = (losses * TOKENS * counts).sum() / (TOKENS * counts).sum()
    _check(name, model, batch | {"token_weights": TOKENS}, expected)


def test_samples_packed_into_a_row_have_weights_of_their_own():
    model, batch = made("llama"), token_batch()
    batch["sequence_ids"] = torch.tensor([[1] * 4 + [2] * 4, [1] * 7 + [0], [1, 1, 1, 2, 2, 3, 3, 3], [1] * 8])
    weights = torch.tensor([[1.0, 2, 0], [3, 0, 0], [0.5, 0.25, 4], [1.5, 0, 0]])
    losses, counts = _token_losses("llama", model, batch)
    means = per_sample_loss(losses, batch["sequence_ids"], counts)
    present = [weights[row, i - 1] for row, ids in enumerate(batch["sequence_ids"]) for i in (1, 2, 3)
               if (counts[row] & (ids == i)).any()]  # fmt: skip
    _check("llama", model, batch | {"loss_weight": weights}, (torch.stack(present) * means).mean())


@pytest.mark.parametrize("kind", ["mse", "bool", "own"])
def test_other_losses_weigh_samples_too(kind):
    torch.manual_seed(0)
    model = _Row().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    y = torch.rand(4, 2, dtype=torch.float64)
    y = y > 0.5 if kind == "bool" else y
    given = nn.SmoothL1Loss() if kind == "own" else None
    loss = given or (F.binary_cross_entropy_with_logits if kind == "bool" else F.mse_loss)
    each = torch.stack([loss(model(x[i : i + 1]), y[i : i + 1].to(x)) for i in range(4)])
    batch = {"x": x, "labels": y, "loss_weight": WEIGHTS}
    expected = (each * WEIGHTS).mean()
    wanted = _gradients(model, expected)
    found = step(model, [batch], given)
    kept = {n: g.clone() for n, g in found[0].items()}
    assert found[1].loss.item() == pytest.approx(expected.item())
    for name, gradient in wanted.items():
        torch.testing.assert_close(kept[name], gradient, rtol=1e-6, atol=1e-8)
    equal(step(model, [batch], given, micro_batch_size=3), (kept, found[1]))


class _Row(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


class _Taking(_Row):
    def forward(self, x, loss_weight):
        return self.layer(x) * loss_weight[:, None]


def test_a_model_that_names_the_weight_gets_it():
    model, x = _Taking(), torch.randn(4, 3)
    loss, output = Objective(model)(model, (), {"x": x, "loss_weight": WEIGHTS.float()}, torch.zeros(4, 2))
    assert torch.equal(loss, output.square().mean())


def test_what_cannot_be_weighed_is_said():
    model, batch = made("own loss"), token_batch()
    with pytest.raises(InputError, match=r"the model's own loss takes none"):
        step(model, [batch | {"loss_weight": WEIGHTS}])
    with pytest.raises(InputError, match=r"the given loss takes none"):
        step(made("logits"), [batch | {"token_weights": TOKENS}], F.cross_entropy)
    with pytest.raises(InputError, match=r"loss_weight of shape \(4, 3\)"):
        step(made("logits"), [batch | {"loss_weight": WEIGHTS[:, None].expand(4, 3)}])
    with pytest.raises(InputError, match="floating tensor"):
        step(made("logits"), [batch | {"loss_weight": torch.ones(4, dtype=torch.long)}])
    with pytest.raises(InputError, match="give labels too"):
        made("llama")(batch["input_ids"], token_weights=TOKENS)


class _Domain(DomainAdapter):
    domain_terms = ((7, 8),)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        ids = torch.tensor([1, 7, 8, 9 + i % 3, 2][: 4 + i % 2])
        return {"input_ids": ids, "labels": ids, "token_weights": self.term_weights(ids, weight=3.0)}


@pytest.mark.parametrize("batching", ["fixed", "buckets", "packed"])
def test_a_domain_mixture_trains_a_language_model(batching):
    general = [{"input_ids": (ids := torch.randint(3, VOCAB, (5,))), "labels": ids, "token_weights": torch.ones(5)}
               for _ in range(10)]  # fmt: skip
    domain = (
        _Domain() if batching != "fixed" else [s for s in map(_Domain().__getitem__, range(6)) if len(s["labels"]) == 5]
    )
    mixture = DomainMixture(domain, general, lambda_domain=0.7, lambda_general=0.3, mode="loss")
    more = {"fixed": {}, "buckets": {"multiple": 8}, "packed": {"max_length": 16}}[batching]
    loader = DSDataLoader(mixture, batch_size=4, batching=batching, shuffle=True, seed=0, **more)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                              num_attention_heads=2, max_position_embeddings=16))  # fmt: skip
    config = TrainingConfig(
        device="cpu", schedule="staged", stages=3, micro_batch_size=2 if batching != "packed" else None
    )
    trainer = Trainer(model, loader, loader, lr=1e-2, config=config)
    trainer.train(epochs=6)
    assert trainer.history[-1]["val_loss"] < 0.8 * trainer.history[0]["val_loss"]
    inputs = [{k: v for k, v in next(iter(loader)).items() if k != "labels"}]
    assert len(predict(model, inputs, device=torch.device("cpu"))) == len(inputs[0]["input_ids"])


class _Called(nn.Linear):
    """An output layer that is more than its weight."""

    def forward(self, x):
        return super().forward(x) * 1.5


def test_an_output_layer_that_has_to_be_called_weighs_alike():
    model, batch = made("llama"), token_batch()
    layer = _Called(16, VOCAB, bias=False).double()
    layer.weight = model.lm_head.weight
    model.lm_head = layer
    losses, counts = _token_losses("llama", model, batch)
    expected = (losses * TOKENS * counts).sum() / (TOKENS * counts).sum()
    _check("llama", model, batch | {"token_weights": TOKENS}, expected)
