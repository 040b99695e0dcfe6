"""Class labels against a model's outputs: the one rule by which accuracy is counted outside training."""

from __future__ import annotations

from typing import Any

import torch

#: What a first output may be said to hold: "auto" looks at outputs and labels.
TASKS = ("auto", "classes", "values")


def class_dim(output: Any, labels: Any) -> int | None:
    """The dimension of `output` that holds the classes, or None if `labels` are no class indices for it.

    Integer labels of the outputs' shape without dimension 1 (torch's convention), or without the last one.

    Example:
        >>> class_dim(torch.zeros(4, 10), torch.zeros(4, dtype=torch.long))
        1
        >>> class_dim(torch.zeros(4, 10), torch.zeros(4, 10)) is None
        True
    """
    if not (isinstance(labels, torch.Tensor) and isinstance(output, torch.Tensor)) or output.ndim < 2:
        return None
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        return None
    if labels.shape == output.shape[:1] + output.shape[2:]:
        return 1
    return output.ndim - 1 if labels.shape == output.shape[:-1] else None


def class_hits(output: torch.Tensor, labels: Any) -> torch.Tensor | None:
    """Whether each label is the largest output, flat; None if `labels` are no class indices for `output`.

    Example:
        >>> class_hits(torch.eye(2), torch.tensor([0, 0])).tolist()
        [True, False]
    """
    dim = class_dim(output, labels)
    return None if dim is None else (output.argmax(dim) == labels.to(output.device)).flatten()
