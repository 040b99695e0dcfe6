"""The loss and the metrics, chosen by a stated rule where the user gives none. Knows nothing about loops.

The rule, in this order:
1. the model's output has a `loss` (an attribute or a dict entry): that;
2. integer labels, and outputs with one dimension more (classes in dimension 1): cross entropy;
3. boolean labels of the outputs' shape: binary cross entropy with logits;
4. floating labels of the outputs' shape: mean squared error;
5. anything else: an InputError that lists shapes and types.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import InputError
from ._counted import IGNORED_CLASS, counted, loss_counter, own_counter, whole_labels
from ._weighted import (
    Weights,
    counting,
    from_logits,
    mean_of,
    of_each_sample,
    shifts_of,
    spread,
    take_weights,
    unknown,
    weight_entries,
)  # fmt: skip

LossFunction = Callable[[Any, Any], Tensor]
Penalty = Callable[[nn.Module], Tensor]

_OWN = "the model's own loss"
_PIECES = "steps of several pieces: micro-batches and the batches of a step were weighted by their "
_BY_SAMPLES = (
    f"{_PIECES}samples, as nothing says what the given loss is a mean over. If it averages over the labels that are "
    "not -100, give it an attribute counted_labels: a function of the labels that says how many count"
)
_BY_LABELS = (
    f"{_PIECES}labels that are not -100, as nothing says what the model's own loss is a mean over. If it is another "
    "mean (for example because the model shifts labels by one), give the model a method counted_labels(labels, "
    "**inputs) that says how many count"
)


class Objective:
    """The loss of a model on a batch: the user's function, or the rule's choice made at the first batch.

    Args:
        penalties: functions of the model that a training step adds to the loss once, whatever its micro-batches.

    Attributes:
        name: what the loss is, once it is known.
        reason: why, if the rule chose it; empty if the user did.
        split_note: for the Report, how steps of several pieces were weighted where that had to be assumed; else empty.
        penalties: those that were given.

    Example:
        >>> objective = Objective(nn.Linear(4, 3))
        >>> loss, output = objective(nn.Linear(4, 3), (torch.zeros(2, 4),), {}, torch.tensor([0, 2]))
        >>> objective.name, tuple(output.shape)
        ('cross entropy', (2, 3))
    """

    def __init__(self, model: nn.Module, loss: LossFunction | None = None, penalties: Iterable[Penalty] = ()) -> None:
        if loss is not None and not callable(loss):
            raise InputError(f"loss={loss!r}: a function of (outputs, labels) is needed, as nn.MSELoss().")
        self._model, self.penalties = model, list(penalties)
        for penalty in self.penalties:
            if not callable(penalty):
                raise InputError(f"penalties has {penalty!r}; functions of the model that give a scalar are needed.")
        self._loss, self._given = loss, loss is not None
        self.reason, self.split_note = "", ""
        self.name = "" if loss is None else getattr(loss, "__name__", type(loss).__name__)
        # A model in the manner of transformers computes its own loss when it is given the labels.
        named = inspect.signature(model.forward).parameters
        self._wants_labels = loss is None and "labels" in named
        self._takes_weights = self._wants_labels and "token_weights" in named
        self._entries = weight_entries(model)

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], labels: Any
    ) -> tuple[Tensor, Any]:
        """Run `forward` and give (loss, output). The loss is the mean over the batch's samples, or labels that count.

        Keyword inputs `loss_weight` [B] and `token_weights` (of the labels' shape) are taken out and weigh it; see
        `_weighted`. A model that takes `token_weights` is given them with the labels.

        Raises:
            InputError: no rule fits, the loss is no scalar, or weights came that it cannot take.
        """
        kwargs, weights = take_weights(kwargs, self._entries)
        factor: Tensor | None = None
        if self._wants_labels and labels is not None:
            kwargs = {**kwargs, "labels": labels}
            if weights is not None and self._takes_weights and whole_labels(labels):
                kwargs["token_weights"], factor = self._for_model(labels, weights)
        output = forward(*args, **kwargs)
        if self._loss is None:
            self._loss, self.name, self.reason = choose_loss(output, labels)
        if labels is None:
            loss = self._without_labels(output)
        elif weights is None or factor is not None:
            loss = self._loss(output, labels)
        else:
            loss = self._weighted(output, labels, weights)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"the loss ({self.name}) gave {what}; a scalar tensor is needed (reduction='mean').")
        loss = loss if loss.ndim == 0 else loss.reshape(())
        return (loss if factor is None else loss * factor), output

    def _for_model(self, labels: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Weights of tokens for a model whose loss is the weighted mean, and what that is then multiplied with."""
        counts = counting(labels, bool(shifts_of(self._model)), weights.sequence_ids)
        each, size = spread(counts, weights)
        # Of about the size of one: a product of a loss in fp16 has no small numbers.
        return each * labels.shape[-1], each.sum() / torch.where(size == 0, 1, size)

    def _weighted(self, output: Any, labels: Any, weights: Weights) -> Tensor:
        """The loss of a batch with weights, where the model does not weigh it."""
        loss = self._loss
        assert loss is not None, "chosen at the first output"
        if self._given:
            return of_each_sample(loss, output, labels, weights)
        if self.name == _OWN:
            shifts = shifts_of(self._model)
            if shifts is None or not whole_labels(labels):
                raise unknown("the model's own loss")
            return from_logits(prediction(output), labels, shifts, weights)
        kind, _ = _label_kind(prediction(output), labels)
        counts = labels != IGNORED_CLASS if kind == "class" else torch.ones_like(labels, dtype=torch.bool)
        return mean_of(_ELEMENTWISE[kind](output, labels), *spread(counts, weights))

    def counted(self, kwargs: Mapping[str, Any], labels: Any) -> Tensor | None:
        """How many labels the loss of these is a mean over, a scalar on their device; None: it is one over samples.

        The loss of a whole is the mean of its pieces' losses weighted by this. Asked after the first call only, when
        it is known which loss it is.
        """
        if not whole_labels(labels):
            return None
        _, weights = take_weights(kwargs, self._entries)
        if weights is not None:
            shifts = self.name == _OWN and bool(shifts_of(self._model))
            return None if self._given else spread(counting(labels, shifts, weights.sequence_ids), weights)[1]
        if self._given:
            counter = loss_counter(self._loss)
            if counter is None and labels.ndim > 1:
                self.split_note = _BY_SAMPLES
            return None if counter is None else counter(labels, kwargs)
        if self.name == _OWN:
            counter = own_counter(self._model)
            if counter is not None:
                return counter(labels, kwargs)
            if labels.ndim > 1:
                self.split_note = _BY_LABELS
        return counted(labels)

    def _without_labels(self, output: Any) -> Any:
        # The model's own loss, or one of the user's that needs none.
        assert self._loss is not None, "chosen at the first batch"
        try:
            return self._loss(output, None)
        except (AttributeError, TypeError) as e:
            raise InputError(
                f"a batch has no labels, and the loss ({self.name}) needs them: {e}. Let the train_loader and the "
                "val_loader give (inputs, labels) or a dict with 'labels' in every batch."
            ) from e

    def penalty(self) -> Tensor | None:
        """The sum of all penalties at the model's present weights; None if there are none.

        Raises:
            InputError: a penalty is no scalar tensor.
        """
        total: Tensor | None = None
        for penalty in self.penalties:
            value = penalty(self._model)
            if not isinstance(value, Tensor) or value.numel() != 1:
                what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"the penalty {penalty_name(penalty)} gave {what}; a scalar tensor is needed.")
            total = value.reshape(()) if total is None else total + value.reshape(())
        return total


def penalty_name(penalty: Penalty) -> str:
    """What a penalty is called: a function's name, or an object's class."""
    return str(getattr(penalty, "__name__", type(penalty).__name__))


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model's output carries, or None."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def prediction(output: Any) -> Any:
    """The tensor of an output that labels are compared with: the output itself, or its `logits`."""
    if isinstance(output, Tensor):
        return output
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def choose_loss(output: Any, labels: Any) -> tuple[LossFunction, str, str]:
    """The default loss for this output and these labels: (function, name, reason).

    Raises:
        InputError: no rule fits; the message lists shapes and types.

    Example:
        >>> choose_loss(torch.zeros(2, 3), torch.zeros(2, 3))[1]
        'mean squared error'
    """
    if own_loss(output) is not None:
        return lambda output, _: _present(own_loss(output)), _OWN, "the model's output has a loss"
    if labels is None:
        raise InputError(
            "the batches have no labels and the model's output has no loss. Let the loader give (inputs, labels) or a "
            "dict with 'labels', or pass loss= a function of (outputs, labels)."
        )
    kind, shape = _label_kind(prediction(output), labels)
    if kind == "class":
        _check_classes(prediction(output), labels)
        return (
            lambda output, labels: F.cross_entropy(prediction(output), labels.long()),
            "cross entropy",
            f"integer labels {shape} and outputs with one dimension more (the classes, in dimension 1)",
        )
    if kind == "bool":
        return (
            lambda output, labels: F.binary_cross_entropy_with_logits(prediction(output), _like(output, labels)),
            "binary cross entropy with logits",
            f"boolean labels of the outputs' shape {shape}",
        )
    if kind == "float":
        return (
            lambda output, labels: F.mse_loss(prediction(output), _like(output, labels)),
            "mean squared error",
            f"floating labels of the outputs' shape {shape}",
        )
    raise InputError(
        f"no default loss fits outputs {_describe(output)} with labels {_describe(labels)}. Pass loss= a function of "
        "(outputs, labels), or give integer labels with outputs (N, classes, ...), or labels of the outputs' shape."
        + _hint(prediction(output), labels)
    )


#: The rule's losses, one number a label.
_ELEMENTWISE: dict[str, LossFunction] = {
    "class": lambda output, labels: F.cross_entropy(prediction(output), labels.long(), reduction="none"),
    "bool": lambda output, labels: F.binary_cross_entropy_with_logits(
        prediction(output), _like(output, labels), reduction="none"
    ),
    "float": lambda output, labels: F.mse_loss(prediction(output), _like(output, labels), reduction="none"),
}


def _like(output: Any, labels: Tensor) -> Tensor:
    return labels.to(prediction(output).dtype)


def _present(loss: Tensor | None) -> Tensor:
    if loss is None:
        raise InputError("the model's output had a loss before and has none now; give labels in every batch.")
    return loss


def _label_kind(output: Any, labels: Any) -> tuple[str, tuple[int, ...]]:
    """Which default fits ("class", "bool", "float", or "" for none), with the labels' shape."""
    if not isinstance(output, Tensor) or not isinstance(labels, Tensor) or not output.is_floating_point():
        return "", ()
    shape = tuple(labels.shape)
    if labels.dtype == torch.bool or labels.is_floating_point():
        kind = "bool" if labels.dtype == torch.bool else "float"
        return (kind if output.shape == labels.shape else ""), shape
    same = output.ndim == labels.ndim + 1 and output.shape[:1] == labels.shape[:1]
    whole = not labels.is_complex() and same and output.shape[2:] == labels.shape[1:]
    return ("class" if whole else ""), shape


def _check_classes(output: Tensor, labels: Tensor) -> None:
    # On a GPU a label out of range kills the process's CUDA context; so the first batch is looked at here.
    kept = labels[labels != IGNORED_CLASS]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= output.shape[1]):
        raise InputError(
            f"class labels from {int(kept.min())} to {int(kept.max())} were given, but the model's outputs "
            f"{tuple(output.shape)} have {output.shape[1]} classes (0 to {output.shape[1] - 1})."
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_describe(v) for v in value) + ")"
    return type(value).__name__


def _hint(output: Any, labels: Any) -> str:
    if not isinstance(output, Tensor) or not isinstance(labels, Tensor):
        return ""
    if output.numel() == labels.numel() and output.shape != labels.shape:
        return f" The two hold equally many numbers: reshape the labels to {tuple(output.shape)}."
    if labels.ndim == output.ndim and labels.ndim > 1 and labels.shape[1] == 1:
        return " The labels have a dimension of length 1 too many: labels.squeeze(1)."
    return ""


def default_metrics(output: Any, labels: Any) -> dict[str, LossFunction]:
    """Accuracy for class and boolean labels, mean absolute error for floating ones, otherwise nothing.

    Example:
        >>> metrics = default_metrics(torch.zeros(2, 3), torch.tensor([0, 1]))
        >>> float(metrics["accuracy"](torch.eye(3)[:2], torch.tensor([0, 2])))
        0.5
    """
    kind, _ = _label_kind(prediction(output), labels)
    if kind == "class" and (own_loss(output) is None or labels.ndim == 1):
        return {"accuracy": accuracy}
    if kind == "bool":
        return {"accuracy": lambda output, labels: ((prediction(output) > 0) == labels).float().mean()}
    if kind == "float":
        return {"mae": lambda output, labels: (prediction(output).float() - labels.float()).abs().mean()}
    return {}


def accuracy(output: Any, labels: Tensor) -> Tensor:
    """Share of labels that equal the largest output (classes in dimension 1); labels of -100 do not count."""
    hit = prediction(output).argmax(dim=1) == labels
    kept = labels != IGNORED_CLASS
    return (hit & kept).sum() / kept.sum().clamp(min=1)
