"""One forward and backward pass of a model on a batch, repeatable without leaving anything behind.

Knows how a step is run, and what is alive around it (gradients, optimizer state). Knows no plan.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...data import tensors
from .._objective import Objective
from .._step import accumulate
from ._apply import buffers_of
from ._meter import measured_peak, storage_bytes
from ._region import copied, preserved_rng_states

#: Large enough for optimizers that keep the state of small tensors in another form.
_PROBE_WIDTH = 128


@dataclass
class Workload:
    """What a plan is made for.

    Attributes:
        batch: one micro-batch, as a loader would give it, on the device.
        accumulates: whether gradients of earlier micro-batches are there when it runs.
    """

    model: nn.Module
    objective: Objective
    batch: Any
    device: torch.device
    precision: str = "fp32"
    optimizer: Optimizer | None = None
    accumulates: bool = False

    def run(self) -> None:
        """Forward and backward pass."""
        accumulate(self.model, self.objective, [self.batch], device=self.device, precision=self.precision)

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that get a gradient, each once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def alive(self) -> list[Tensor]:
        """Every tensor that is there before the step."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        return [
            *self.model.parameters(),
            *self.model.buffers(),
            *(p.grad for p in self.model.parameters() if p.grad is not None),
            *(t for t in tensors([dict(s) for s in state]) if t.device.type == self.device.type),
            *tensors(self.batch),
        ]

    @contextlib.contextmanager
    def traceless(self) -> Iterator[None]:
        """Inside, steps may run; afterwards gradients, buffers and random generators are what they were."""
        gradients = [(p, p.grad) for p in self.model.parameters()]
        copies = copied(buffers_of(self.model))
        own = [module._buffers[name] for module, name, _ in copies]
        with preserved_rng_states(tensors((self.batch,))):
            try:
                self.clear()
                yield
            finally:
                for parameter, gradient in gradients:
                    parameter.grad = gradient
                with torch.no_grad():
                    for (module, name, before), buffer in zip(copies, own, strict=True):
                        module._buffers[name] = buffer
                        if buffer is not None and not torch.equal(buffer, before):
                            buffer.copy_(before)

    def clear(self) -> None:
        """Gradients as a step finds them."""
        for parameter in self.trainable():
            parameter.grad = torch.zeros_like(parameter) if self.accumulates else None


def optimizer_bytes(optimizer: Optimizer | None, parameters: list[nn.Parameter]) -> tuple[int, int]:
    """Bytes of state that an optimizer will still make for these parameters, and what its update takes meanwhile.

    Found by updates of the same kind on a few small parameters, and scaled up: state with the parameters' bytes, what
    an update takes with the bytes of all parameters (or of as many as an optimizer of ours works on together), of the
    largest one, or not at all, as the small ones show.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]} if optimizer else {}
    own = [p for p in parameters if id(p) in groups]
    if optimizer is None or not own:
        return 0, 0
    missing = [p for p in own if p not in optimizer.state]
    group = groups[id(own[0])]
    probes = [_probe(optimizer, group, own[0], count, rows) for count, rows in ((4, 128), (8, 128), (4, 256))]
    if any(probe is None for probe in probes):
        # An optimizer of a shape of its own: as large as Adam's state, with a copy of the parameters on top.
        return 2 * storage_bytes(missing), storage_bytes(own)
    (size, state, few), (_, _, many), (_, _, large) = (probe for probe in probes if probe is not None)
    of_all = max(0.0, (many - few) / size)
    of_largest = max(0.0, (large - few - of_all * size) / (size / 4))
    largest, together = max(p.nbytes for p in own), storage_bytes(own)
    if hasattr(optimizer, "elements_at_once"):
        together = min(together, optimizer.elements_at_once(own) * own[0].element_size())
    transient = few + of_all * (together - size) + of_largest * (min(largest, together) - size / 4)
    return int(state / size * storage_bytes(missing)), max(0, int(transient))


def _probe(
    optimizer: Optimizer, group: dict[str, Any], like: nn.Parameter, count: int, rows: int
) -> tuple[int, int, int] | None:
    """Bytes of some parameters, of the state that an optimizer like this keeps for them, and of its update."""
    twins = [nn.Parameter(torch.zeros(rows, _PROBE_WIDTH, dtype=like.dtype, device=like.device)) for _ in range(count)]
    taken = _settings(type(optimizer))
    settings = {k: v for k, v in group.items() if k in taken}
    try:
        twin = type(optimizer)(twins, **settings)
    except (TypeError, ValueError, RuntimeError):
        return None
    for parameter in twins:
        parameter.grad = torch.zeros_like(parameter)
    with preserved_rng_states(twins):
        twin.step()
        state = [t for s in twin.state.values() for t in tensors(dict(s)) if t.numel() > 1]
        held = [*twins, *(p.grad for p in twins if p.grad is not None), *state]
        before = torch.cuda.memory_allocated(like.device) if like.device.type == "cuda" else storage_bytes(held)
        peak = measured_peak(twin.step, like.device, held, clean=False)
    return storage_bytes(twins), storage_bytes(state), max(0, peak - before)


def _settings(kind: type[Optimizer]) -> set[str]:
    """What an optimizer's class can be given beside the parameters."""
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" in base.__dict__:
            parameters = inspect.signature(base.__dict__["__init__"]).parameters.values()
            names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return names - {"self", "params"}
