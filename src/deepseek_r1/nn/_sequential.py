"""`Sequential` that also takes its modules as one list. Knows nothing about what they compute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch.nn


class Sequential(torch.nn.Sequential):
    """`torch.nn.Sequential`, with the same keys in its state, that accepts one list or tuple of modules as well.

    Args:
        modules: modules one by one, one list or tuple of them, or one OrderedDict of name -> module.

    Raises:
        TypeError: something in it is no module (torch's own error).

    Example:
        >>> import torch
        >>> net = Sequential([torch.nn.Linear(4, 8), torch.nn.ReLU()])
        >>> list(net.state_dict())
        ['0.weight', '0.bias']
    """

    def __init__(
        self, *modules: torch.nn.Module | Iterable[torch.nn.Module] | OrderedDict[str, torch.nn.Module]
    ) -> None:
        if len(modules) == 1 and isinstance(modules[0], list | tuple):
            modules = tuple(modules[0])
        super().__init__(*modules)  # type: ignore[arg-type]
