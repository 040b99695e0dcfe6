"""Saved tensors in 8 bits: what a block keeps for its backward pass is stored as bytes, and read back rounded.

Numbers are rounded to the nearest of 256 levels between the least and the largest of each 256 neighbours, so gradients
are no longer those of the plain model (Chen et al., ActNN, arXiv 2104.14129, show what that does to training).
Integers, booleans and small tensors stay as they are; a number that is not finite spoils its group, as it does a loss.
Knows one call at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ._intercept import undisturbed

#: Numbers that share a least one and a step.
GROUP = 256
#: Smaller tensors stay: launching costs more than their bytes are worth.
_SMALLEST = 4096


class Levels:
    """A tensor in 8 bits.

    Example:
        >>> x = torch.linspace(-1, 1, 1024).reshape(32, 32)
        >>> kept = Levels(x)
        >>> bool((kept.tensor() - x).abs().max() <= 0.5 * (x.max() - x.min()) / 255)
        True
        >>> kept.nbytes
        1056
    """

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._dtype = tensor.shape, tensor.dtype
        # Memory order is kept, so that the kernels of the backward pass find the layout that they found without this.
        strides = tensor.stride()
        self._order = sorted(range(tensor.ndim), key=lambda d: (-strides[d], d))
        flat = tensor.detach().permute(self._order).reshape(-1)
        rest = -len(flat) % GROUP
        if rest:
            flat = torch.cat([flat, flat[-1:].expand(rest)])
        rows = flat.reshape(-1, GROUP)
        low, high = rows.aminmax(dim=1, keepdim=True)
        low, high = low.float(), high.float()
        self._low, self._step = low, (high - low) / 255
        safe = self._step.clamp_min(torch.finfo(torch.float32).tiny)
        self._bytes = ((rows.float() - low) / safe).round_().clamp_(0, 255).to(torch.uint8)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self._bytes.nbytes + self._low.nbytes + self._step.nbytes

    def tensor(self) -> Tensor:
        """The tensor, rounded."""
        rows = torch.addcmul(self._low, self._bytes.float(), self._step)
        shape = [self._shape[d] for d in self._order]
        flat = rows.reshape(-1)[: self._shape.numel()].to(self._dtype).reshape(shape)
        back = [self._order.index(d) for d in range(len(self._order))]
        return flat.permute(back)


def compressed(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block's forward pass with what it saves stored in 8 bits.

    Example:
        >>> layer, x = nn.Linear(64, 64), torch.randn(64, 64, requires_grad=True)
        >>> compressed(layer, (x,), {}).sum().backward()
        >>> torch.allclose(layer.weight.grad, x.sum(0).expand(64, 64), atol=0.5)
        True
    """
    known: dict[Any, tuple[Tensor, Levels]] = {}

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return tensor
        if not _fits(tensor):
            # Detached: the tensor itself would hold the graph that holds it.
            return tensor.detach()
        # Several operators save the same tensor, which is stored once; it lives until the call has ended.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
        if key not in known:
            known[key] = tensor.detach(), Levels(tensor)
        return known[key][1]

    with saved_tensors_hooks(undisturbed(pack), _unpack):
        output = run(*args, **kwargs)
    known.clear()
    return output


def _fits(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.numel() >= _SMALLEST
    # Expanded tensors are stored once however large they look.
    return plain and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and 0 not in tensor.stride()


def _unpack(packed: Any) -> Tensor:
    return packed.tensor() if isinstance(packed, Levels) else packed
