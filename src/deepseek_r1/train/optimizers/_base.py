"""What our optimizers have in common: steps that never wait for the device, and states that reload exactly.

Knows nothing about the update rules, models' structure or files.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core import ConfigError, InputError
from ._groups import decay_groups
from ._tick import CHUNK, Tick, chunks

#: Shape and type of a parameter's states by name.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class DeviceOptimizer(Optimizer):
    """Base of the optimizers here; abstract. A subclass gives `_layout` and `_update`.

    It can take the verdict on a step on the device: while `found_inf` (a scalar tensor, 1 for a bad step) is set, a
    bad step changes neither parameters nor states nor counts, and nothing is read by the host. `torch.amp.GradScaler`
    and the `Trainer` use that door. `grad_scale` is what gradients are divided by.

    Args:
        params: parameters, or groups of them as in torch.
        defaults: options of every group; `lr` and `capturable` among them.

    Raises:
        ConfigError: an option is out of range, or a parameter is no real floating tensor.
    """

    _step_supports_amp_scaling = True
    #: For the Trainer: the verdict may be given as a tensor.
    skips_on_device = True

    @classmethod
    def from_model(cls, model: nn.Module, *, lr: float, weight_decay: float = 0.01, **options: Any) -> Any:
        """The optimizer of a whole model, with weight decay on all but biases and norms."""
        return cls(decay_groups(model, weight_decay), lr=lr, **options)  # type: ignore[call-arg]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in torch."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except ConfigError:
            self.param_groups.pop()
            raise
        self._place_rate(group)

    def _check(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        _refuse_unless(_rate(group["lr"]) >= 0, name, "lr", group["lr"], "a finite number >= 0")
        for p in group["params"]:
            if not p.is_floating_point():
                raise ConfigError(f"{name} trains floating-point parameters; one of type {p.dtype} was given.")
        if "weight_decay" in group:
            ok = _number(group["weight_decay"]) and group["weight_decay"] >= 0
            _refuse_unless(ok, name, "weight_decay", group["weight_decay"], "a finite number >= 0")
        for beta in group.get("betas", ()):
            _refuse_unless(_number(beta) and 0 <= beta < 1, name, "betas", group["betas"], "numbers in [0, 1)")
        if "eps" in group:
            _refuse_unless(_number(group["eps"]) and group["eps"] > 0, name, "eps", group["eps"], "a number > 0")
        if "momentum" in group:
            ok = _number(group["momentum"]) and 0 <= group["momentum"] < 1
            _refuse_unless(ok, name, "momentum", group["momentum"], "a number in [0, 1)")

    def _place_rate(self, group: dict[str, Any]) -> None:
        # A graph replays the address of its inputs, so a rate that is to change must be a tensor.
        if group.get("capturable") and group["params"]:
            device = group["params"][0].device
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device)

    def _layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        """Shapes and types of the states of `p`, beside its count."""
        raise NotImplementedError

    def _update(self, params: list[Tensor], group: dict[str, Any], tick: Tick) -> None:
        """Change parameters and states in place. All are on one device, of one type, and have gradients."""
        raise NotImplementedError

    def elements_at_once(self, params: Sequence[Tensor]) -> int:
        """Most elements that an update works on together, with which what it takes meanwhile grows."""
        return max(CHUNK, *(p.numel() for p in params))

    def _empty_state(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        like = tuple(p.shape) == shape
        return (
            torch.zeros_like(p, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)
            if like
            else torch.zeros(shape, dtype=dtype, device=p.device)
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss, or None.

        Raises:
            InputError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params, tick in self._together(group):
                for part in chunks(params):
                    self._update(part, group, tick)
        return loss

    def _together(self, group: dict[str, Any]) -> Iterator[tuple[list[Tensor], Tick]]:
        """Parameters with gradients that share device, type and count, each list with its moment.

        Parameters that have had gradients at the same steps share one count, so that factors that depend on it are
        the same for all and one kernel serves many tensors.
        """
        fresh: dict[torch.device, Tensor] = {}
        present: dict[int, list[Tensor]] = {}
        absent: set[int] = set()
        for p in group["params"]:
            if p.grad is None:
                if p in self.state:
                    absent.add(id(self.state[p]["step"]))
                continue
            if p.grad.layout != torch.strided:
                raise InputError(
                    f"{type(self).__name__} takes dense gradients, and one is sparse; make the embedding with "
                    "sparse=False, or train it with torch.optim.SparseAdam."
                )
            if p not in self.state:
                if p.device not in fresh:
                    fresh[p.device] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] = {"step": fresh[p.device]}
                for name, (shape, dtype) in self._layout(p, group).items():
                    self.state[p][name] = self._empty_state(p, shape, dtype)
            present.setdefault(id(self.state[p]["step"]), []).append(p)
        for key, params in present.items():
            count = self.state[params[0]]["step"]
            if key in absent:
                count = count.clone()
                for p in params:
                    self.state[p]["step"] = count
            tick = self._tick(count, group)
            by_type: dict[torch.dtype, list[Tensor]] = {}
            for p in params:
                by_type.setdefault(p.dtype, []).append(p)
            for same in by_type.values():
                yield same, tick

    def _tick(self, count: Tensor, group: dict[str, Any]) -> Tick:
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        bad = None if found is None else found.to(count.device).reshape(()) != 0
        count.add_(1.0 if bad is None else (~bad).to(count.dtype))
        return Tick(count, bad, None if scale is None else scale.to(count.device), group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave: every state with its own type, on its parameter's device.

        Raises:
            ValueError: the states are of other parameters or of another optimizer.
        """
        # torch would cast every state to its parameter's type, codes of 8 bits included.
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        owners = [(p, group) for group in self.param_groups for p in group["params"]]
        for number, (p, group) in zip(numbers, owners, strict=True):
            if number in state_dict["state"]:
                self.state[p] = self._loaded(p, group, state_dict["state"][number])
        for group in self.param_groups:
            self._place_rate(group)
            self._share_counts(group)

    def _loaded(self, p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        layout: Layout = {"step": ((), torch.float32), **self._layout(p, group)}
        given = {name: (tuple(t.shape), t.dtype) for name, t in saved.items() if isinstance(t, Tensor)}
        if given != layout:
            raise ValueError(
                f"the states of a parameter of shape {tuple(p.shape)} do not fit {type(self).__name__}: they are "
                f"{given}, and {layout} is needed"
            )
        state: dict[str, Any] = {"step": saved["step"].detach().to(p.device, copy=True)}
        for name, (shape, dtype) in self._layout(p, group).items():
            state[name] = self._empty_state(p, shape, dtype).copy_(saved[name])
        return state

    def _share_counts(self, group: dict[str, Any]) -> None:
        counted = [p for p in group["params"] if p in self.state]
        shared: dict[tuple[torch.device, float], Tensor] = {}
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for p in counted:
            by_device[p.device].append(p)
        for device, params in by_device.items():
            values = torch.stack([self.state[p]["step"] for p in params]).tolist()
            for p, value in zip(params, values, strict=True):
                self.state[p]["step"] = shared.setdefault((device, value), self.state[p]["step"])


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rate(value: Any) -> float:
    """A rate to compare with; NaN, which compares with nothing, for what is none."""
    if isinstance(value, Tensor):
        return 0.0 if value.numel() == 1 else math.nan
    return float(value) if _number(value) else math.nan


def _refuse_unless(ok: bool, optimizer: str, option: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{optimizer}({option}={value!r}): {allowed} is needed.")
