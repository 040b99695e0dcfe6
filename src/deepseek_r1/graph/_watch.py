"""`Watch`: has a module changed in a way that its graph cannot follow? Knows no graph."""

from __future__ import annotations

import copy

import torch

from ._state import plain_attributes


class Watch:
    """What a graph took from a module for granted: its parts, and their attributes that are plain values.

    Training flags are among the attributes. Values of parameters and buffers are not: the graph shares them.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
        >>> watch = Watch(net)
        >>> watch.unchanged()
        True
        >>> net[1].p = 0.1
        >>> watch.unchanged()
        False
    """

    def __init__(self, model: torch.nn.Module) -> None:
        parts = list(model.modules())
        self._children = [(part._modules, dict(part._modules)) for part in parts]
        self._values = [
            (part.__dict__, key, copy.deepcopy(value))
            for part in parts
            for key, value in [("training", part.training), *plain_attributes(part).items()]
        ]
        self._tensors = [
            (part.__dict__, key, value)
            for part in parts
            for key, value in part.__dict__.items()
            if isinstance(value, torch.Tensor)
        ]

    def same_parts(self) -> bool:
        """Whether the module is made of the parts it was made of."""
        return all(
            len(now) == len(then) and all(now.get(name) is part for name, part in then.items())
            for now, then in self._children
        )

    def unchanged(self) -> bool:
        """Whether parts and attributes are as they were."""
        return (
            all(store.get(key, self) == value for store, key, value in self._values)
            and all(store.get(key) is value for store, key, value in self._tensors)
            and self.same_parts()
        )


def hooked(model: torch.nn.Module) -> bool:
    """Whether a part of the module, itself left out, has hooks of the user's.

    torch's own hooks (weight normalisation, pruning) compute, and so become part of the graph.
    """
    return any(
        not (getattr(hook, "__module__", None) or "").startswith("torch.")
        for part in model.modules()
        if part is not model
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        for hook in hooks.values()
    )
