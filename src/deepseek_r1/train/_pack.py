"""Nested values of a training state as JSON beside a flat dict of tensors, and back. Knows nothing about files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import InputError

#: Gives the copy of a tensor that goes under a name.
Copy = Callable[[str, Tensor], Tensor]


def pack(value: Any, tensors: dict[str, Tensor], where: str, copy: Copy | None = None) -> Any:
    """A JSON form of `value`; tensors go into `tensors` under the path at which they stand.

    Tensors that are the same memory are stored once; views of common memory are copied apart.

    Args:
        copy: gives each tensor's copy in host memory. None: what is on the CPU and contiguous goes in as it is.

    Raises:
        InputError: a value that can be neither a tensor nor JSON; its path is named.

    Example:
        >>> out = {}
        >>> pack({"a": torch.zeros(1), 3: (1, None)}, out, "s")
        {'dict': [['a', {'tensor': 's.a'}], [3, {'tuple': [1, None]}]]}
        >>> list(out)
        ['s.a']
    """
    return _pack(value, tensors, where, {}, copy)


def _pack(value: Any, tensors: dict[str, Tensor], where: str, seen: dict[Any, str], copy: Copy | None) -> Any:
    if isinstance(value, Tensor):
        return _pack_tensor(value, tensors, where, seen, copy)
    if isinstance(value, Mapping):
        prefix = f"{where}." if where else ""
        return {"dict": [[_key(k, where), _pack(v, tensors, f"{prefix}{k}", seen, copy)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        parts = [_pack(v, tensors, f"{where}.{i}", seen, copy) for i, v in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"{where} is of type {type(value).__name__}, which a checkpoint cannot hold; tensors, arrays, numbers, texts, "
        "lists, tuples and dicts can be saved."
    )


def _key(key: Any, where: str) -> Any:
    if isinstance(key, str | int) and not isinstance(key, bool):
        return key
    raise InputError(f"{where} has the key {key!r}; a checkpoint's keys are texts or integers.")


def _pack_tensor(
    value: Tensor, tensors: dict[str, Tensor], where: str, seen: dict[Any, str], copy: Copy | None
) -> dict[str, Any]:
    same: Any = id(value)
    if value.numel() and value.layout == torch.strided:
        same = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
    if same not in seen:
        name = where
        while name in tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
            name += "_"
        tensors[name] = _apart(value, name, seen) if copy is None else copy(name, value.detach())
        seen[same] = name
    return {"tensor": seen[same]}


def _apart(value: Tensor, name: str, seen: dict[Any, str]) -> Tensor:
    kept = value.detach().to("cpu").contiguous()
    storage = ("storage", kept.untyped_storage().data_ptr())
    # Views into memory that others use as well are copied apart: safetensors stores no shared memory.
    if storage in seen or kept.untyped_storage().nbytes() != kept.numel() * kept.element_size():
        kept = kept.clone()
    seen[storage] = name
    return kept


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given. Raises KeyError or ValueError if the parts do not fit together."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {k: unpack(v, tensors) for k, v in value["dict"]}
    if "tuple" in value:
        return tuple(unpack(v, tensors) for v in value["tuple"])
    if "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    raise ValueError(f"an entry with the keys {list(value)} is unknown")
