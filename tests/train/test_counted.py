"""Micro-batches and accumulation where the loss is a mean over tokens: the gradients of the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.data import unpack_batch
from deepseek_r1.train import Objective, Trainer, TrainingConfig
from deepseek_r1.train._device_step import device_step

from .token_models import MODELS, VOCAB, equal, llama, made, rows, step, token_batch


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ignored", [(), (3,)], ids=["", "a row of nothing"])
def test_pieces_give_what_the_whole_batch_gives(name, ignored):
    model, batch = made(name), token_batch(all_ignored=ignored)
    whole = step(model, [batch])
    equal(step(model, [batch], micro_batch_size=1), whole)
    equal(step(model, [batch], micro_batch_size=3), whole)
    parts = rows(batch, slice(0, 1), slice(1, 2), slice(2, 4))
    found = step(model, parts)
    equal(found, whole)
    equal(step(model, parts, micro_batch_size=1), whole)
    assert ("labels that are not -100" in found[2].split_note) is (name == "own loss")
    assert whole[2].split_note == ""


def test_packed_rows_of_a_language_model_too():
    model, batch = made("llama"), token_batch()
    batch["sequence_ids"] = torch.tensor([[1] * 4 + [2] * 4, [1] * 7 + [0], [1, 2, 3, 4, 5, 6, 0, 0], [1] * 8])
    equal(step(model, [batch], micro_batch_size=1), step(model, [batch]))


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(ignore_index=3),
        nn.CrossEntropyLoss(weight=torch.linspace(0.1, 3, VOCAB, dtype=torch.float64)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
)
def test_losses_of_torch_are_known(loss):
    model, batch = made("logits"), token_batch()
    if getattr(loss, "ignore_index", -100) == 3:
        batch["labels"] = torch.where(batch["labels"] == -100, 3, batch["labels"])
    found = step(model, [batch], loss, micro_batch_size=1)
    equal(found, step(model, [batch], loss))
    assert not found[2].split_note


def test_a_function_may_say_what_it_averages_over_and_else_the_report_tells():
    def loss(output, labels):
        return F.cross_entropy(output, labels)

    batch = token_batch()
    config = TrainingConfig(device="cpu", micro_batch_size=1)
    notes = Trainer(made("logits"), [batch], config=config, loss=loss).train(epochs=1).notes
    assert any("weighted by their samples" in note for note in notes)
    whole = step(made("logits"), [batch], loss)
    with pytest.raises(AssertionError):
        equal(step(made("logits"), [batch], loss, micro_batch_size=1), whole)
    loss.counted_labels = lambda labels: (labels != -100).sum()
    equal(step(made("logits"), [batch], loss, micro_batch_size=1), whole)
    notes = Trainer(made("logits"), [batch], config=config, loss=loss).train(epochs=1).notes
    assert not any("weighted by" in note for note in notes)


def test_classes_that_do_not_count_are_no_samples():
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([1, -100, -100, 0, 3])
    equal(step(model, [(x, y)], micro_batch_size=2), step(model, [(x, y)]))


def test_a_mean_over_samples_stays_one():
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 2, (5, 2))

    def loss(output, labels):
        return (output - labels).square().mean()

    equal(step(model, [(x, y)], loss, micro_batch_size=2), step(model, [(x, y)], loss))


def test_a_step_without_a_label_changes_nothing():
    model, batch = made("llama"), token_batch(all_ignored=range(4))
    gradients, result, _ = step(model, [batch], micro_batch_size=2)
    assert result.loss.item() == 0
    assert not any(g.any() for g in gradients.values())


def test_the_started_step_of_a_gpu_weights_alike():
    model, batch = made("llama").float(), token_batch()
    results = []
    for micro in (None, 1):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        window = [unpack_batch(batch)[1] | {"labels": batch["labels"]}]
        loss, bad, norm = device_step(
            model, window, optimizer, Objective(model), torch.zeros(()), device=torch.device("cpu"),
            precision="fp32", micro_batch_size=micro, clip_grad_norm=None,
        )  # fmt: skip
        assert not bad
        results.append((loss, norm))
    torch.testing.assert_close(*results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_recorded_steps_of_a_gpu_weight_alike():
    trained = []
    for micro in (None, 1):
        torch.manual_seed(0)
        model = llama()
        config = TrainingConfig(device="cuda", precision="fp32", micro_batch_size=micro)
        batches = [token_batch(seed=seed) for seed in range(6)]
        report = Trainer(model, batches, config=config, lr=1e-3).train(epochs=1)
        assert any("whole steps, for 1 shape" in note for note in report.notes)
        trained.append([p.detach().cpu() for p in model.parameters()])
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"micro_batch_size": 1}, {"micro_batch_size": 2, "memory_gb": 1}])
def test_a_trainer_with_pieces_or_a_limit_of_memory_steps_alike(options):
    trained = []
    for more in ({}, options):
        model = made("llama")
        config = TrainingConfig(device="cpu", **more)
        trainer = Trainer(model, [token_batch()], config=config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        trainer.train(epochs=2)
        trained.append((trainer.history[-1]["train_loss"], *model.parameters()))
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-7)
