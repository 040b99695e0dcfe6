"""`plan_memory`: a training step of a model under a limit of memory.

Measures (`_profile`), solves (`_solver`), tries the result in a real step, corrects, and says what it chose and why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...core import ConfigError, InputError, Report, probe
from ...data import to_device
from .._objective import LossFunction, Objective
from ._apply import COMPRESS, KEEP, OFFLOAD, PARTIAL, RECOMPUTE, Applied, BlockPlan
from ._profile import SHARES, Profile, profile
from ._solver import Chain, Solution, fastest, frontier
from ._workload import Workload

GB = 1e9
_ROUNDS = 3
#: Share of what is free that "auto" leaves to others (fragments, libraries, the rest of the program).
_MARGIN_CUDA, _MARGIN_CPU = 0.08, 0.3
_CLOSE = 0.01


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What each block of a model does with the tensors that its backward pass needs.

    Attributes:
        budget_bytes: the limit it was made for.
        predicted_peak_bytes: most bytes alive on the device in a step, as computed from measured blocks, or, where
            trying showed that to be wrong by more than 1 %, as corrected by that.
        measured_peak_bytes: the same, measured in a step under the plan.
        unconstrained_peak_bytes: what keeping everything takes (computed).
        minimum_bytes: the smallest limit that a plan was found for (computed).
        alive_bytes: of all these, what is not the activations': parameters, gradients, optimizer state, the batch
            (on CUDA also what else this process has on the device).
        extra_seconds: what a step costs over keeping everything (computed from measured parts).
        step_seconds: forward and backward pass under the plan, measured once.
        blocks: what is done, block by block in the order of the forward pass.
        buffers: for each block the buffers (module inside it, name) that a forward pass changes.
        compiled: whether the blocks run through `torch.compile`.
        report: what was chosen and why.
    """

    budget_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    unconstrained_peak_bytes: int
    minimum_bytes: int
    alive_bytes: int
    extra_seconds: float
    step_seconds: float
    blocks: tuple[BlockPlan, ...]
    buffers: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict, repr=False)
    compiled: bool = False
    report: Report = field(repr=False, compare=False)

    @property
    def why_not_recorded(self) -> str:
        """Why a step under this plan cannot be recorded as a CUDA graph; empty if it can."""
        if any(block.action == OFFLOAD for block in self.blocks):
            return "copies to CPU memory are in the step"
        again = [block for block in self.blocks if block.action not in (KEEP, PARTIAL, COMPRESS)]
        if any(block.draws for block in again):
            return "recomputing puts the random generators back, which a recording cannot hold"
        return ""

    def applied(self, model: nn.Module) -> Applied:
        """The model with this plan in force inside a `with` block, or until `.remove()` is called on the result.

        Parameters, names, hooks and classes stay as they are; evaluation under `torch.no_grad()` is not touched.

        Raises:
            InputError: the model lacks a block of the plan.
        """
        return Applied(model, self.blocks, buffers=self.buffers, compiled=self.compiled)


class MemoryPlanner:
    """Plans for one model and batch under any limit: measured once, solved for each.

    Plans of one planner are monotone: a smaller limit never has a higher peak, a larger one never a slower step.

    Args:
        model, batch, objective, device, precision, optimizer, accumulates, offload, compiled, compress: see
            `plan_memory`.
        shares: of what blocks compiled by inductor save by themselves, that are tried (torch's
            `activation_memory_budget`, one for each block). None: 0.7 and 0.4 if `compiled`, else none.

    Example:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))
        >>> planner = MemoryPlanner(net, (torch.randn(256, 64), torch.randn(256, 64)))
        >>> plan = planner.plan(planner.unconstrained_bytes * 0.8 / 1e9)
        >>> plan.measured_peak_bytes <= plan.budget_bytes
        True
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        objective: Objective | LossFunction | None = None,
        *,
        device: torch.device | str | None = None,
        precision: str = "fp32",
        optimizer: Optimizer | None = None,
        accumulates: bool = False,
        offload: bool | None = None,
        compiled: bool = False,
        shares: Sequence[float] | None = None,
        compress: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"plan_memory(model={type(model).__name__}): an nn.Module is needed.")
        if precision not in ("fp32", "bf16", "fp16"):
            raise ConfigError(f"plan_memory(precision={precision!r}): 'fp32', 'bf16' or 'fp16' is needed.")
        first = next(model.parameters(), None)
        place = (
            torch.device(device) if device is not None else first.device if first is not None else torch.device("cpu")
        )
        if first is not None and first.device.type != place.type:
            raise InputError(f"the model is on {first.device}, the plan is for {place}; move the model there first.")
        goal = objective if isinstance(objective, Objective) else Objective(model, objective)
        self.workload = Workload(model, goal, to_device(batch, place), place, precision, optimizer, accumulates)
        was = [(module, module.training) for module in model.modules()]
        tried = (SHARES if compiled else ()) if shares is None else shares
        self.profile: Profile = profile(
            self.workload, offload=offload, compiled=compiled, shares=tried, compress=compress
        )
        assert all(module.training is before for module, before in was), "measuring leaves modes alone"
        self._chain = self.profile.chain
        self._frontier = frontier(self._chain)
        self._tried: list[tuple[Solution, int, float]] = []
        self._made_plans: list[MemoryPlan] = []

    @property
    def unconstrained_bytes(self) -> int:
        """Peak of keeping everything."""
        return self._frontier[-1].peak

    @property
    def minimum_bytes(self) -> int:
        """The smallest limit that a plan was found for."""
        tried = [real for _, real, _ in self._tried]
        return min([self._frontier[0].peak, *tried])

    @property
    def alive_bytes(self) -> int:
        """What is not the activations': parameters, gradients, optimizer state, the batch."""
        return self.profile.alive

    def plan(self, budget_gb: float | str = "auto") -> MemoryPlan:
        """The fastest plan whose peak, measured in a step, is not above the limit.

        Args:
            budget_gb: 10**9 bytes, of everything alive on the device; "auto": what is free, less a margin.

        Raises:
            ConfigError: no number above zero, or less than the minimum, which the message gives.
        """
        budget = self._budget(budget_gb)
        larger = [made for made in self._made_plans if made.budget_bytes >= budget >= made.measured_peak_bytes]
        if larger:
            # What a larger limit was given fits this one too.
            return replace(min(larger, key=lambda made: made.budget_bytes), budget_bytes=budget)
        for _ in range(_ROUNDS):
            solution = fastest(self._frontier, budget)
            if solution is None:
                break
            if any(entry[0].actions == solution.actions and entry[1] <= budget for entry in self._tried):
                break
            intervals, seconds = self.profile.run(self.profile.blocks(solution.actions))
            real = max(self._chain.floor, *(interval.peak for interval in intervals))
            self._tried.append((solution, real, seconds))
            error = real - solution.peak
            if real <= budget and abs(error) <= _CLOSE * real:
                break
            self._correct(error)
        least = max((m.measured_peak_bytes for m in self._made_plans if m.budget_bytes <= budget), default=0)
        within = [entry for entry in self._tried if least <= entry[1] <= budget]
        if not within:
            raise self._too_small(budget)
        chosen, real, seconds = min(within, key=lambda entry: (entry[0].seconds, entry[1]))
        if abs(chosen.peak - real) > _CLOSE * real:
            chosen = replace(chosen, peak=real)
        made = self._made(budget, chosen, real, seconds)
        self._made_plans.append(made)
        return made

    def _correct(self, error: int) -> None:
        """Move the numbers by an observed error."""
        moved = tuple(
            replace(
                b, forward_peak=b.forward_peak + error, gap_peak=b.gap_peak + error,
                backward_peak=b.backward_peak + error, backward_live=b.backward_live + error,
            )
            for b in self._chain.blocks
        )  # fmt: skip
        self._chain = Chain(moved, self._chain.floor, self._chain.runs)
        self._frontier = frontier(self._chain)

    def _budget(self, given: float | str) -> int:
        if given == "auto":
            return automatic_budget(self.workload.device, self.profile.alive)
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given) or given <= 0:
            raise ConfigError(f"memory_gb={given!r}: a number > 0 (in 10**9 bytes) or 'auto' is needed.")
        return int(given * GB)

    def _too_small(self, budget: int) -> ConfigError:
        alive, least = self.alive_bytes / GB, self.minimum_bytes / GB
        return ConfigError(
            f"memory_gb={budget / GB:.4g} is less than a step of this model takes on this batch: at least {least:.4g} "
            f"GB ({alive:.4g} GB of them parameters, gradients, optimizer state and the batch). Give that much, or "
            "lower micro_batch_size."
        )

    def _made(self, budget: int, solution: Solution, real: int, seconds: float) -> MemoryPlan:
        blocks = self.profile.blocks(solution.actions)
        made = MemoryPlan(
            budget_bytes=budget, predicted_peak_bytes=solution.peak, measured_peak_bytes=real,
            unconstrained_peak_bytes=self.unconstrained_bytes, minimum_bytes=self.minimum_bytes,
            alive_bytes=self.alive_bytes, extra_seconds=solution.seconds, step_seconds=seconds, blocks=blocks,
            buffers=dict(self.profile.buffers), compiled=self.profile.compiled, report=Report("memory plan"),
        )  # fmt: skip
        _describe(made, self.profile)
        return made


def plan_memory(
    model: nn.Module,
    batch: Any,
    objective: Objective | LossFunction | None = None,
    budget_gb: float | str = "auto",
    *,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    optimizer: Optimizer | None = None,
    accumulates: bool = False,
    offload: bool | None = None,
    compiled: bool = False,
    compress: bool = False,
) -> MemoryPlan:
    """Choose what each block keeps, recomputes or offloads, so that a training step stays below a limit.

    One forward pass finds the chain of blocks; one step with everything recomputed, and each kind of block by itself,
    are measured; the fastest combination under the limit is solved for, run once and measured. Gradients are those
    of the plain model (on deterministic kernels to the bit). The model's parameters, gradients, buffers and the random
    generators are afterwards what they were. Nothing is planned inside blocks whose calls depend on outside state.

    Args:
        model: in training mode, on the device.
        batch: one micro-batch, as the loader gives it.
        objective: a function of (outputs, labels), an `Objective`, or None for the default loss.
        budget_gb: 10**9 bytes, of everything that is alive on the device: parameters, gradients, optimizer state and
            activations; "auto": what is free, less a margin.
        device: None: the model's.
        precision: "fp32", "bf16" or "fp16" (autocast).
        optimizer: its state, also the part that its first step will make, and its update are counted. None: neither.
        accumulates: gradients of earlier micro-batches are there (several micro-batches for a step).
        offload: whether blocks may be offloaded to page-locked CPU memory. None: on CUDA.
        compiled: run blocks through `torch.compile`. Blocks that are compiled already stay so either way.
        compress: whether blocks may save in 8 bits, after which gradients are rounded.

    Raises:
        ConfigError: the limit is less than the minimum, which the message gives, or no number.
        InputError: no block of the model is called, or a block does something else when it runs a second time.

    Sources: Chen et al., arXiv 1604.06174; Beaumont et al., arXiv 1911.13214; Zhao et al., arXiv 2307.01236.

    Example:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))
        >>> plan = plan_memory(net, (torch.randn(256, 64), torch.randn(256, 64)), budget_gb=1)
        >>> {block.action for block in plan.blocks}
        {'keep'}
        >>> with plan.applied(net):
        ...     net(torch.randn(256, 64)).sum().backward()
    """
    planner = MemoryPlanner(
        model, batch, objective, device=device, precision=precision, optimizer=optimizer, accumulates=accumulates,
        offload=offload, compiled=compiled, compress=compress,
    )  # fmt: skip
    return planner.plan(budget_gb)


def automatic_budget(device: torch.device, alive: int) -> int:
    """What "auto" means: bytes that this process may have alive on a device, less a margin.

    Args:
        alive: bytes that are alive whatever a plan does.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return int(free + reserved - _MARGIN_CUDA * total)
    return int(alive + (1 - _MARGIN_CPU) * available_memory())


def available_memory() -> int:
    """Bytes of CPU memory that can be taken without swapping, as far as the system tells."""
    total = probe().memory_bytes
    try:
        with open("/proc/meminfo") as f:
            lines = dict(line.split(":", 1) for line in f)
        return min(total or 1 << 62, int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        return total // 2


def _describe(plan: MemoryPlan, measured: Profile) -> None:
    report = plan.report
    report.add(
        "peak memory", plan.measured_peak_bytes / GB, before=plan.unconstrained_peak_bytes / GB, unit="GB",
        how="after: one step under the plan, measured; before: everything kept, computed from measured blocks",
    )  # fmt: skip
    report.add("limit", plan.budget_bytes / GB, unit="GB")
    report.add("predicted peak", plan.predicted_peak_bytes / GB, unit="GB", how="measured blocks, corrected by trying")
    report.add("smallest limit possible", plan.minimum_bytes / GB, unit="GB", how="computed from measured blocks")
    report.add("not activations", plan.alive_bytes / GB, unit="GB", how="parameters, gradients, optimizer state, batch")
    plain = max(plan.step_seconds - plan.extra_seconds, 1e-9)
    report.add(
        "time of forward and backward pass", 1 + plan.extra_seconds / plain, before=1.0, unit="x",
        how="blocks timed by themselves; 1 is everything kept",
    )  # fmt: skip
    report.check("the measured peak is below the limit", plan.measured_peak_bytes <= plan.budget_bytes)
    report.note(summary(plan))
    if any(block.action == COMPRESS for block in plan.blocks):
        report.note("blocks that compress save in 8 bits: gradients are rounded")
    for unit in measured.units:
        if unit.why:
            report.skip(f"recomputing {unit.name}", unit.why)
    for kind in measured.kinds.values():
        for name, why in kind.refused.items():
            report.skip(f"{name} recomputation of one kind of block", why)


def summary(plan: MemoryPlan) -> str:
    """One sentence on what a plan does.

    Example:
        >>> block = BlockPlan(modules=("0",), calls=(0,))
        >>> nbytes = dict.fromkeys(("budget_bytes", "predicted_peak_bytes", "measured_peak_bytes"), 2)
        >>> nbytes |= dict.fromkeys(("unconstrained_peak_bytes", "minimum_bytes", "alive_bytes"), 1)
        >>> summary(MemoryPlan(**nbytes, extra_seconds=0.0, step_seconds=1.0, blocks=(block,), report=Report("")))
        '1 block: 1 keep; all fits'
    """
    runs = Counter(block.run for block in plan.blocks if block.action == RECOMPUTE)
    words: Callable[[BlockPlan], str] = lambda b: f"{b.action} in runs" if runs[b.run] > 1 else b.action  # noqa: E731
    count = Counter(words(block) for block in plan.blocks)
    total = len(plan.blocks)
    parts = ", ".join(f"{n} {word}" for word, n in count.most_common())
    why = "all fits" if set(count) == {KEEP} else "the fastest combination found under the limit"
    return f"{total} block{'s' if total != 1 else ''}: {parts}; {why}"
