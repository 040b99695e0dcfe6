"""AdamW with states of 8 bits, on the device or paged from the CPU's memory.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", https://arxiv.org/abs/2110.02861; paging after
Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core import ConfigError
from ._adamw import adamw_
from ._base import DeviceOptimizer, Layout
from ._blockwise import BLOCK, BlockCode
from ._tick import Tick

#: Tensors of fewer elements keep fp32 states: they are next to nothing, and norms and biases suffer most.
SMALL = 4096
#: Elements updated at once on a GPU: bounds what their fp32 forms take (32 MiB each), and what a page is.
_AT_ONCE = 1 << 23
#: The same on a CPU, at least (1 MiB each), and for each of its threads: less would leave threads without work.
_AT_ONCE_ON_CPU, _AT_ONCE_PER_THREAD = 1 << 18, 1 << 15
#: The states of a large tensor, in the order they are worked on.
_STATES = ("exp_avg", "exp_avg_scale", "exp_avg_root", "exp_avg_root_scale")


@dataclass(frozen=True)
class _Piece:
    """Rows of 256 elements of one parameter: `values` and `grad` are views of them."""

    param: Tensor
    values: Tensor
    grad: Tensor
    rows: slice

    @property
    def padding(self) -> int:
        return (self.rows.stop - self.rows.start) * BLOCK - self.values.numel()


class AdamW8bit(DeviceOptimizer):
    """AdamW whose two moments take one byte an element each, in blocks of 256 with one scale: 0.254 of fp32's bytes.

    The code is the paper's dynamic exponent. Of the second moment its square root is kept, which is what the update
    divides by: kept itself, elements a thousand times smaller than their block's largest would become zero, and their
    updates hundreds of times too large. Parameters and gradients keep their types; the update is made in fp32.

    Args:
        params: parameters, or groups of them, as in torch. `AdamW8bit.from_model` leaves biases and norms undecayed.
        lr: learning rate.
        betas: of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        paged: the 8-bit states live in the CPU's memory (pinned, if the parameters are on a GPU) and are brought to the
            device in pages for each update, the next page while one is worked on.
        capturable: the rate is a tensor on the device, so that a CUDA graph of the step follows its changes.

    Raises:
        ConfigError: an option is out of range, or `paged` and `capturable` are both asked for.

    Example:
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = AdamW8bit(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg"].dtype, optimizer.state[model.bias]["exp_avg"].dtype
        (torch.uint8, torch.float32)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        paged: bool = False,
        capturable: bool = False,
    ) -> None:
        if paged and capturable:
            raise ConfigError(
                "AdamW8bit(paged=True, capturable=True): pages are brought by the host, which a CUDA graph leaves out; "
                "give one of the two."
            )
        self.paged = bool(paged)
        self._codes: dict[torch.device, tuple[BlockCode, BlockCode]] = {}
        self._copies: dict[torch.device, torch.cuda.Stream] = {}
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": capturable},
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "paged": self.paged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._codes, self._copies = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The states as they are: codes in 8 bits. Waits for pages that are still on their way to the CPU."""
        for device in self._copies:
            torch.cuda.synchronize(device)
        return super().state_dict()

    def _layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        if p.numel() < SMALL:
            dtype = torch.promote_types(p.dtype, torch.float32)
            return {"exp_avg": (tuple(p.shape), dtype), "exp_avg_sq": (tuple(p.shape), dtype)}
        rows = -(-p.numel() // BLOCK)
        return {
            name: ((rows,), torch.float32) if name.endswith("scale") else ((rows, BLOCK), torch.uint8)
            for name in _STATES
        }

    def _empty_state(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if p.numel() < SMALL:
            return super()._empty_state(p, shape, dtype)
        # A row with the scale zero is zero, whatever its codes.
        away = self.paged and p.device.type == "cuda"
        return torch.zeros(shape, dtype=dtype, device="cpu" if self.paged else p.device, pin_memory=away)

    def _update(self, params: list[Tensor], group: dict[str, Any], tick: Tick) -> None:
        small = [p for p in params if p.numel() < SMALL]
        if small:
            grads = tick.gradients([p.grad for p in small if p.grad is not None])
            states = [self.state[p] for p in small]
            adamw_(small, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], tick, group)
        pages = list(_pages([p for p in params if p.numel() >= SMALL], _at_once(tick.count.device)))
        fetch = self._fetch_ahead if self.paged and tick.count.is_cuda else self._fetch
        for page, states_of_page in zip(pages, fetch(pages), strict=True):
            self._update_page(page, states_of_page, group, tick)

    def _update_page(self, page: list[_Piece], states: list[Tensor], group: dict[str, Any], tick: Tick) -> None:
        beta1, beta2 = group["betas"]
        signed, unsigned = self._codes_on(tick.count.device)
        (grad,) = tick.gradients([_rows(page)])
        grad = grad.float()
        codes, scales, root_codes, root_scales = states
        moment = signed.decode(codes, scales).mul_(beta1).add_(grad, alpha=1 - beta1)
        square = unsigned.decode(root_codes, root_scales).square_().mul_(beta2)
        root = square.addcmul_(grad, grad, value=1 - beta2).sqrt_()
        new = [*signed.encode(moment), *unsigned.encode(root)]
        if tick.bad is not None:
            new = [torch.where(tick.bad, old, made) for old, made in zip(states, new, strict=True)]
        self._keep(page, new)
        rate = -tick.lr / tick.correction(beta1)
        root.div_(tick.correction(beta2).sqrt().float()).add_(group["eps"])
        update = moment.div_(root).mul_(tick.scalar(rate, 0.0, torch.float32)).view(-1)
        targets = [piece.values for piece in page]
        if group["weight_decay"]:
            factor = tick.scalar(1.0 - tick.lr * group["weight_decay"], 1.0, targets[0].dtype)
            if targets[0].dtype in (torch.float16, torch.bfloat16):
                # 1 - lr * decay is 1 in half precision; so the decay is a part of the update.
                share = tick.scalar(-tick.lr * group["weight_decay"], 0.0, torch.float32)
                update.add_(_rows(page, values=True).float().view(-1).mul_(share))
            else:
                torch._foreach_mul_(targets, factor)
        ends = update.split([piece.values.numel() + piece.padding for piece in page])
        updates = [end[: t.numel()].view(t.shape) for end, t in zip(ends, targets, strict=True)]
        torch._foreach_add_(targets, updates)

    def elements_at_once(self, params: Sequence[Tensor]) -> int:
        """Most elements that an update works on together; large tensors are cut."""
        small = sum(p.numel() for p in params if p.numel() < SMALL)
        return max(small, *(_at_once(p.device) for p in params))

    def _codes_on(self, device: torch.device) -> tuple[BlockCode, BlockCode]:
        if device not in self._codes:
            self._codes[device] = BlockCode(signed=True, device=device), BlockCode(signed=False, device=device)
        return self._codes[device]

    def _fetch(self, pages: list[list[_Piece]]) -> Iterator[list[Tensor]]:
        for page in pages:
            yield [_joined([self.state[piece.param][name][piece.rows] for piece in page]) for name in _STATES]

    def _fetch_ahead(self, pages: list[list[_Piece]]) -> Iterator[list[Tensor]]:
        """As `_fetch`, from the CPU: the copy of the next page runs beside the work on the present one."""
        device = pages[0][0].param.device if pages else torch.device("cuda")
        if device not in self._copies:
            self._copies[device] = torch.cuda.Stream(device)
        copies, work = self._copies[device], torch.cuda.current_stream(device)
        # The step before may still be writing these states.
        copies.wait_stream(work)
        ready: list[tuple[list[Tensor], torch.cuda.Event]] = []
        for number in range(len(pages) + 1):
            if number < len(pages):
                with torch.cuda.stream(copies):
                    parts = [
                        _joined(
                            [
                                self.state[piece.param][name][piece.rows].to(device, non_blocking=True)
                                for piece in pages[number]
                            ]
                        )
                        for name in _STATES
                    ]
                    event = torch.cuda.Event()
                    event.record(copies)
                ready.append((parts, event))
            if number:
                parts, event = ready.pop(0)
                work.wait_event(event)
                for part in parts:
                    part.record_stream(work)
                yield parts

    def _keep(self, page: list[_Piece], new: list[Tensor]) -> None:
        lengths = [piece.rows.stop - piece.rows.start for piece in page]
        for name, values in zip(_STATES, new, strict=True):
            places = [self.state[piece.param][name][piece.rows] for piece in page]
            if self.paged:
                for place, value in zip(places, values.split(lengths), strict=True):
                    place.copy_(value, non_blocking=True)
            else:
                torch._foreach_copy_(places, list(values.split(lengths)))


def _at_once(device: torch.device) -> int:
    if device.type != "cpu":
        return _AT_ONCE
    return max(_AT_ONCE_ON_CPU, _AT_ONCE_PER_THREAD * torch.get_num_threads())


def _pages(params: list[Tensor], at_once: int) -> Iterator[list[_Piece]]:
    """Pieces of parameters with about so many elements together; a large parameter is cut."""
    page: list[_Piece] = []
    size = 0
    for p in params:
        for piece in _pieces(p, at_once):
            if page and size + piece.values.numel() > at_once:
                yield page
                page, size = [], 0
            page.append(piece)
            size += piece.values.numel()
    if page:
        yield page


def _pieces(p: Tensor, at_once: int) -> Iterator[_Piece]:
    assert p.grad is not None, "only parameters with gradients are updated"
    values, grad = p, p.grad
    if p.is_contiguous() and p.grad.is_contiguous():
        values, grad = p.view(-1), p.grad.view(-1)
    # Along the first dimension a view of a part is possible wherever elements lie. It must begin with a row of states.
    inner = values[0].numel()
    unit = BLOCK // math.gcd(inner, BLOCK)
    step = max(1, at_once // (unit * inner)) * unit
    if step >= len(values):
        yield _Piece(p, p, p.grad, slice(0, -(-p.numel() // BLOCK)))
        return
    for first in range(0, len(values), step):
        part = slice(first, min(first + step, len(values)))
        rows = slice(first * inner // BLOCK, -(-part.stop * inner // BLOCK))
        yield _Piece(p, values[part], grad[part], rows)


def _rows(page: list[_Piece], *, values: bool = False) -> Tensor:
    """The page's gradients (or values) in rows of 256, each parameter's last row filled up with zeros."""
    parts: list[Tensor] = []
    for piece in page:
        tensor = piece.values if values else piece.grad
        parts.append(tensor.reshape(-1))
        if piece.padding:
            parts.append(tensor.new_zeros(piece.padding))
    return torch.cat(parts).view(-1, BLOCK)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
