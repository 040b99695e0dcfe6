"""`DSDataLoader`: torch's DataLoader with a seed. Knows nothing about models or files."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..core import ConfigError


class DSDataLoader(DataLoader[Any]):
    """A drop-in for `torch.utils.data.DataLoader` with the same arguments and one more.

    Args:
        seed: seeds the loader's own generator, so that the order of its epochs depends on nothing else in the
            process. Every new iteration goes on from the generator's state, as in torch.
        *args, **kwargs: as for `torch.utils.data.DataLoader`.

    Raises:
        ConfigError: both `seed` and `generator` were given.

    Example:
        >>> a = DSDataLoader(list(range(6)), batch_size=3, shuffle=True, seed=1)
        >>> b = DSDataLoader(list(range(6)), batch_size=3, shuffle=True, seed=1)
        >>> [batch.tolist() for batch in a] == [batch.tolist() for batch in b]
        True
    """

    def __init__(self, dataset: Dataset[Any], *args: Any, seed: int | None = None, **kwargs: Any) -> None:
        if seed is not None:
            if kwargs.get("generator") is not None:
                raise ConfigError("DSDataLoader(seed=..., generator=...): give one of the two.")
            kwargs["generator"] = torch.Generator().manual_seed(seed)
        super().__init__(dataset, *args, **kwargs)
