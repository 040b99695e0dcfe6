"""What running a module changes in the module itself: its buffers and its attributes. Knows no graph."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

#: What every module has, whoever wrote it; training flags are looked after elsewhere.
_OWN = frozenset(torch.nn.Module().__dict__)
_PLAIN = (int, float, bool, str, complex, bytes, type(None), torch.dtype, torch.device, torch.Size)


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, text and flags alone, so that it can be compared and copied."""
    if isinstance(value, list | tuple | set | frozenset):
        return len(value) <= 64 and all(map(is_plain, value))
    if isinstance(value, dict):
        return len(value) <= 64 and all(is_plain(k) and is_plain(v) for k, v in value.items())
    return isinstance(value, _PLAIN) and not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """The attributes of one module, of the user's making, that are plain values."""
    return {k: v for k, v in module.__dict__.items() if k not in _OWN and is_plain(v)}


@contextlib.contextmanager
def preserved(model: torch.nn.Module) -> Iterator[list[str]]:
    """Whatever runs inside leaves buffers and attributes as they were.

    Gives a list that holds, after the end, the names of attributes which were set inside and are no buffers.
    """
    buffers = [
        (part, name, value, None if value is None else value.detach().clone(), _version(value))
        for part in model.modules()
        for name, value in part._buffers.items()
    ]
    # torch's own layers set nothing that matters; the weights' lists of recurrent ones do change.
    parts = [(n, m) for n, m in model.named_modules() if not type(m).__module__.startswith("torch.")]
    attributes = [(n, m, {k: (v, _copied(v)) for k, v in m.__dict__.items() if k not in _OWN}) for n, m in parts]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for part, name, value, clone, version in buffers:
            if value is not None and clone is not None and _version(value) != version:
                with torch.no_grad(), torch.inference_mode(value.is_inference()):
                    value.copy_(clone)
            part._buffers[name] = value
        for name, part, before in attributes:
            changed += [f"{name}.{key}" if name else key for key in _restore(part, before)]


def _version(value: torch.Tensor | None) -> int:
    return -1 if value is None or value.is_inference() else value._version


def _copied(value: Any) -> Any:
    return copy.deepcopy(value) if is_plain(value) and not isinstance(value, _PLAIN) else value


def _restore(part: torch.nn.Module, before: dict[str, tuple[Any, Any]]) -> list[str]:
    now = part.__dict__
    changed = [key for key in now if key not in _OWN and key not in before]
    for key in changed:
        del now[key]
    for key, (value, clone) in before.items():
        current = now.get(key, _MISSING)
        same = current is value if not is_plain(value) else type(current) is type(clone) and current == clone
        if not same:
            changed.append(key)
            now[key] = clone
    return sorted(changed)


_MISSING = object()
