"""What training leaves as it is: left out of checkpoints, and recognised by fingerprints when they are read.

Knows models and their state dicts. Knows neither files nor who froze what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core import InputError

#: What a checkpoint says of a tensor that it leaves out: "shape", "dtype" and "fingerprint".
Left = dict[str, Any]
#: Words of 8 bytes in the blocks of which a fingerprint takes sums: 2 MiB.
_ROWS, _COLUMNS = 256, 1024


@torch.no_grad()
def fingerprint(tensor: Tensor) -> str:
    """64 hexadecimal digits for a tensor's bytes; the same on every device.

    SHA-256 over the bytes, where blocks of 2 MiB are represented by the sums of their rows and columns, exact modulo
    2**64. That costs little more than reading the tensor once, where it lies; it finds changes that happen, not those
    of someone who constructs them.

    Example:
        >>> fingerprint(torch.zeros(3)) == fingerprint(torch.zeros(3)), fingerprint(torch.zeros(3))[:8]
        (True, '15ec7bf0')
        >>> fingerprint(torch.tensor([0.0, 1.0])) == fingerprint(torch.tensor([1.0, 0.0]))
        False
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    size = _ROWS * _COLUMNS * 8
    cut = raw.numel() - raw.numel() % size
    found = hashlib.sha256()
    if cut:
        blocks = raw[:cut].view(torch.int64).view(-1, _ROWS, _COLUMNS)
        for sums in (blocks.sum(1), blocks.sum(2)):
            found.update(sums.cpu().numpy().tobytes())
    found.update(raw[cut:].cpu().numpy().tobytes())
    return found.hexdigest()


def described(tensor: Tensor) -> Left:
    """What a checkpoint says of a tensor in its place."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "fingerprint": fingerprint(tensor)}


def has_adapters(model: nn.Module) -> bool:
    """Whether a part of the model has adapters, which say so by `peft_config` here and in PEFT.

    Example:
        >>> has_adapters(nn.Linear(2, 2))
        False
    """
    found = (getattr(module, "peft_config", None) for module in model.modules())
    return any(isinstance(config, Mapping) and config for config in found)


def frozen_tensors(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a model's state dict that no training changes.

    These are parameters that want no gradient, and buffers that a module's class names in `frozen_buffers`, as layers
    with packed weights do.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False).requires_grad_(False), nn.BatchNorm1d(2))
        >>> list(frozen_tensors(model, model.state_dict()))
        ['0.weight']
    """
    held = ((name, p) for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad)
    found: dict[str, Tensor] = {}
    for name, tensor in (*held, *_packed(model)):
        if (entry := state.get(name)) is None:
            continue
        # A hook may have put something else there; subclasses and sparse tensors have no plain bytes.
        plain = not is_lazy(tensor) and type(entry) in (Tensor, nn.Parameter) and entry.layout == torch.strided
        if plain and not tensor.is_meta and entry.data_ptr() == tensor.data_ptr() and entry.shape == tensor.shape:
            found[name] = entry
    return found


def _packed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules(remove_duplicate=False):
        # Of the class: a wrapper's instance may pass on what is asked of it.
        for name in getattr(type(module), "frozen_buffers", ()):
            if isinstance(buffer := module._buffers.get(name), Tensor):
                yield f"{path}.{name}" if path else name, buffer


class FrozenBase:
    """Decides, checkpoint by checkpoint, what can be left out: what is frozen and still what the user's program made.

    A frozen tensor that was changed since is in the checkpoint like one that is trained.

    Args:
        leave_out: whether anything is left out.
    """

    def __init__(self, leave_out: bool) -> None:
        self._leave_out = leave_out
        self._given: dict[str, Left] | None = None

    def begin(self, model: nn.Module) -> None:
        """Look at the model before anything changes it, by training or from a checkpoint; later calls do nothing."""
        if self._leave_out and self._given is None:
            frozen = frozen_tensors(model, model.state_dict())
            self._given = {name: described(tensor) for name, tensor in frozen.items()}

    def split(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Left]]:
        """The state dict without what is left out, and that."""
        self.begin(model)
        state = dict(model.state_dict())
        given = self._given or {}
        frozen = frozen_tensors(model, state) if given else {}
        left = {name: given[name] for name, t in frozen.items() if name in given and described(t) == given[name]}
        return {name: value for name, value in state.items() if name not in left}, left


def check_frozen(model: nn.Module, left: Mapping[str, Left], where: str) -> None:
    """Raise InputError unless the model has everything that a checkpoint left out; the first difference is named."""
    state = model.state_dict()
    for name, entry in left.items():
        own = state.get(name)
        if not isinstance(own, Tensor):
            what = "this model has not"
        elif (list(own.shape), str(own.dtype)) != (entry["shape"], f"torch.{entry['dtype']}"):
            kind = f"{str(own.dtype).removeprefix('torch.')} of the shape {tuple(own.shape)}"
            what = f"is {kind} in this model and was {entry['dtype']} of the shape {tuple(entry['shape'])}"
        elif described(own)["fingerprint"] != entry["fingerprint"]:
            what = "has other values in this model"
        else:
            continue
        raise InputError(
            f"{where} does not fit: it leaves out {len(left):,} frozen tensors, of which the first that differs is "
            f"{name!r}: it {what}. Make the model from the same weights as the run did; with "
            "TrainingConfig(save_frozen=True) checkpoints hold the frozen ones too."
        )


def taken(left: Mapping[str, Left], base: nn.Module | None, where: str) -> dict[str, Tensor]:
    """What a checkpoint left out, from a model that has it; the tensors are the model's own.

    Raises:
        InputError: something was left out, and `base` is None or does not have it.
    """
    if not left:
        return {}
    if base is None:
        raise InputError(
            f"{where} leaves out {len(left):,} frozen tensors, {next(iter(left))!r} the first; give base=, the model "
            "as the run was given it, from which they are taken."
        )
    check_frozen(base, left, where)
    state = base.state_dict()
    return {name: state[name] for name in left}
