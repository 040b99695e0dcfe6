"""The default loss and metrics: the stated rule, case by case."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.core import InputError
from deepseek_r1.train import Objective, Trainer, TrainingConfig
from deepseek_r1.train._objective import accuracy, choose_loss, default_metrics

pytestmark = pytest.mark.tiny


def test_integer_labels_with_one_more_output_dimension_are_classes():
    out, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 0])
    loss, name, reason = choose_loss(out, labels)
    assert name == "cross entropy"
    assert "(4,)" in reason
    assert torch.equal(loss(out, labels), F.cross_entropy(out, labels))
    pixels, map_labels = torch.randn(2, 3, 5, 5), torch.randint(0, 3, (2, 5, 5), dtype=torch.uint8)
    assert torch.equal(
        choose_loss(pixels, map_labels)[0](pixels, map_labels), F.cross_entropy(pixels, map_labels.long())
    )


def test_boolean_labels_are_logits_targets():
    out, labels = torch.randn(4, 2), torch.rand(4, 2) > 0.5
    loss, name, _ = choose_loss(out, labels)
    assert name == "binary cross entropy with logits"
    assert torch.equal(loss(out, labels), F.binary_cross_entropy_with_logits(out, labels.float()))


def test_floating_labels_are_regression():
    out, labels = torch.randn(4, 1), torch.randn(4, 1, dtype=torch.float64)
    loss, name, _ = choose_loss(out, labels)
    assert name == "mean squared error"
    assert torch.equal(loss(out, labels), F.mse_loss(out, labels.float()))


@pytest.mark.parametrize("kind", [dict, lambda **k: SimpleNamespace(**k)])
def test_the_models_own_loss_wins(kind):
    output = kind(loss=torch.tensor(3.0), logits=torch.randn(2, 2))
    loss, name, _ = choose_loss(output, torch.tensor([0, 1]))
    assert name == "the model's own loss"
    assert loss(output, None).item() == 3.0


def test_logits_of_a_structured_output_are_compared():
    output = {"loss": None, "logits": torch.randn(2, 3)}
    assert choose_loss(output, torch.tensor([0, 1]))[1] == "cross entropy"


@pytest.mark.parametrize(
    ("output", "labels", "says"),
    [
        (torch.zeros(4, 1), torch.zeros(4), r"\(4, 1\) of float32.*\(4,\) of float32.*reshape the labels to \(4, 1\)"),
        (torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.long), r"squeeze\(1\)"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "Pass loss="),
        (torch.zeros(4), torch.zeros(4, dtype=torch.long), "int64"),
        ((torch.zeros(4), torch.zeros(4)), torch.zeros(4), "Pass loss="),
        (torch.zeros(4, 3), None, "no labels"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 3, 0]), "0 to 3 were given.*3 classes"),
    ],
)
def test_what_fits_no_rule_is_refused_with_shapes(output, labels, says):
    with pytest.raises(InputError, match=says):
        choose_loss(output, labels)


def test_a_given_loss_is_used_as_it_is():
    model = nn.Linear(3, 2)
    objective = Objective(model, nn.L1Loss())
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    loss, output = objective(model, (x,), {}, y)
    assert torch.equal(loss, F.l1_loss(output, y))
    assert (objective.name, objective.reason) == ("L1Loss", "")
    with pytest.raises(InputError, match=r"shape \(4, 2\).*scalar"):
        Objective(model, nn.L1Loss(reduction="none"))(model, (x,), {}, y)
    with pytest.raises(InputError, match="function of"):
        Objective(model, "mse")


class OwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x, labels=None):
        logits = self.head(x)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels) * 2, "logits": logits}


def test_a_model_that_takes_labels_is_given_them_unless_the_user_has_a_loss():
    model, x, y = OwnLoss(), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    objective = Objective(model)
    loss, output = objective(model, (), {"x": x}, y)
    assert torch.equal(loss, F.cross_entropy(output["logits"], y) * 2)
    given = Objective(model, lambda output, labels: F.cross_entropy(output["logits"], labels))
    loss, output = given(model, (), {"x": x}, y)
    assert output["loss"] is None
    assert torch.equal(loss, F.cross_entropy(output["logits"], y))


def test_default_metrics_follow_the_labels():
    out = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    labels = torch.tensor([0, 0, -100])
    assert float(default_metrics(out, labels)["accuracy"](out, labels)) == 0.5
    assert float(default_metrics(out, out > 1)["accuracy"](out, out > 1)) == 0.5
    assert float(default_metrics(out, out + 1)["mae"](out, out + 1)) == 1.0
    assert default_metrics(out, None) == {}
    tokens = {"loss": torch.tensor(1.0), "logits": torch.zeros(2, 5, 5)}
    assert default_metrics(tokens, torch.zeros(2, 5, dtype=torch.long)) == {}, "tokens may be shifted"
    assert float(accuracy(torch.eye(3), torch.tensor([0, 1, 0]))) == pytest.approx(2 / 3)


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(), F.cross_entropy])
def test_a_batch_without_labels_later_on_is_named(loss):
    model = nn.Linear(2, 3)
    whole, bare = (torch.randn(4, 2), torch.randint(0, 3, (4,))), torch.randn(4, 2)
    config = TrainingConfig(device="cpu")
    with pytest.raises(InputError, match=r"no labels, and the loss \(.*\) needs them.*val_loader"):
        Trainer(model, [whole, bare], config=config, loss=loss).train(epochs=1)
    with pytest.raises(InputError, match="no labels") as caught:
        Trainer(model, [whole], [whole, bare], config=config, loss=loss).train(epochs=1)
    assert caught.value.__notes__ == ["in the batch after 4 samples of the evaluation"]


def test_a_loss_that_needs_no_labels_is_given_none():
    model = nn.Linear(2, 3)
    objective = Objective(model, lambda output, _: output.square().mean())
    loss, output = objective(model, (torch.ones(1, 2),), {}, None)
    assert torch.equal(loss, output.square().mean())
