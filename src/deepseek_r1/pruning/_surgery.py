"""Does the module's own code follow when channels leave? Tried out on a copy, against the masked reference.

A group whose removal the code does not survive is given the integers it needs (`num_heads`, `split_size`), found
among the attributes of the modules on its path, or is pinned with what went wrong.
"""

from __future__ import annotations

import copy
import itertools
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Node

from ..core import DeepSeekError, Report
from ..graph import evaluation, to_float64
from ..graph.quiet import quiet_torch
from ._ledger import Count, Dims
from ._masked import masked_answers
from ._plan import PruningPlan
from ._structure import Group, Structure

#: Names that count channels or heads wherever they stand.
_COUNTING = re.compile(
    r"(num|n)_?(\w+_)?heads?|heads|nhead|all_head_size|(in|out|hidden|inner|intermediate|embed)_(features|channels|size|dim)"
    r"|d_model|dim|width|nf|nx|split_size|channels|planes|num_channels|num_features"
)
#: Largest difference from the reference in float64, relative to its largest answer; and where the module's own code
#: computes in less, at most.
EXACT, NARROW = 1e-9, 2e-4
_MOST_TRIALS = 30


def plan_of(structure: Structure, removed: Any, counts: Iterable[Count] | None = None) -> PruningPlan:
    """The plan that removes these units (a mask)."""
    tensors: dict[str, dict[int, list[int]]] = {}
    for name, dim, kept in structure.kept_at(removed):
        tensors.setdefault(name, {})[dim] = kept.tolist()
    attributes = {}
    for count in structure.counts if counts is None else counts:
        gone = removed[structure.unit_of[count.atoms]]
        if gone.any():
            attributes[(count.module, count.attribute, count.place)] = int((~gone).sum())
    return PruningPlan(tensors=tensors, attributes=attributes)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a cut module answers as the reference does; if not, what went wrong."""

    error: float
    allowed: float
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return not self.reason and self.error <= self.allowed


class Trial:
    """Cuts copies of a module and compares them with the masked reference, in float64 where its code allows."""

    def __init__(self, model: nn.Module, structure: Structure, *, jitter: bool) -> None:
        self.structure = structure
        self.model = _in_double(model, structure)
        if jitter:
            _jitter_(self.model)
        state = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.state = {structure.aliases.get(n, n): t.detach().clone() for n, t in state}
        self._kept: dict[bytes, list[Tensor]] = {}
        self.allowed = self._exactness()

    def _exactness(self) -> float:
        """How far apart the uncut module and the reference are allowed to lie: some code computes in float32 anyway."""
        whole = masked_answers(self.structure, self.structure.mask([]), self.state)
        pairs = zip(answers(self.model, self.structure), whole, strict=True)
        return max(EXACT, min(NARROW, 20 * max((_distance(a, b) for a, b in pairs), default=0.0)))

    def __call__(self, removed: Any, counts: Iterable[Count]) -> Verdict:
        """The verdict on removing these units (a mask)."""
        key = removed.tobytes()
        if key not in self._kept:
            self._kept = {key: masked_answers(self.structure, removed, self.state)}
        try:
            cut = plan_of(self.structure, removed, counts).apply(self.model)
            return self.judge(answers(cut, self.structure), self._kept[key])
        except (DeepSeekError, Exception) as e:
            line = (str(e).strip().splitlines() or [""])[0]
            return Verdict(error=float("inf"), allowed=self.allowed, reason=f"{type(e).__name__}: {line[:160]}")

    def judge(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Verdict:
        """The verdict on answers."""
        if [v.shape for v in found] != [v.shape for v in wanted]:
            return Verdict(error=float("inf"), allowed=self.allowed, reason="its answers have other shapes")
        error = max((_distance(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)
        reason = "" if error <= self.allowed else f"its answers differ from the reference by {error:.2g}"
        return Verdict(error=error, allowed=self.allowed, reason=reason)


def answers(module: nn.Module, structure: Structure) -> list[Tensor]:
    """Flat outputs of a module in evaluation mode on the structure's example inputs, as wide as its weights."""
    args, kwargs = structure.program.example_inputs
    if any(p.dtype == torch.float64 for p in module.parameters()):
        args, kwargs = to_float64((args, kwargs))
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
    with evaluation(module), torch.no_grad(), quiet_torch():
        found = module(*args, **kwargs)
    return [v for v in pytree.tree_leaves(found) if isinstance(v, Tensor)]


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    if a.numel() == 0:
        return 0.0
    same = torch.where(a == b, 0.0, (a - b).abs())
    scale = torch.where(b.isfinite(), b.abs(), 0.0).max()
    error = float(same.max() / scale.clamp(min=1e-12))
    return error if error == error else float("inf")


def _in_double(model: nn.Module, structure: Structure) -> nn.Module:
    """A copy in float64; as it was where its code cannot run so."""
    wide = copy.deepcopy(model)
    wide.double()
    try:
        answers(wide, structure)
    except Exception:
        return copy.deepcopy(model)
    return wide


def _jitter_(model: nn.Module) -> None:
    """Changes the weights a little, so that no branch is hidden behind a zero: a scale of zero hides a whole block."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                spread = float(p.std()) if p.numel() > 1 else 0.0
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
                p.add_(noise * (0.1 * (spread if spread > 0 else 1.0)))


def some_of(structure: Structure, groups: Iterable[Group]) -> Any:
    """A mask of some units of these groups, a different share of each.

    Code such as `width // heads` follows two groups that shrink in proportion, and no others.
    """
    chosen = [np.zeros(0, dtype=np.int64)]
    for group in groups:
        rng = np.random.default_rng(zlib.crc32(group.name.encode()))
        least = -(-group.size // 4)
        if group.size > 1:
            count = int(rng.integers(least, max(least, group.size - least) + 1))
            chosen.append(rng.permutation(group.units)[:count])
    return structure.mask(np.concatenate(chosen))


def settle(model: nn.Module, structure: Structure, report: Report) -> Structure:
    """The structure with the integers that follow, and without groups that the module's code holds on to."""
    trial = Trial(model, structure, jitter=True)
    plain = list(structure.counts)
    found = {g.name: candidates(model, structure, g) for g in structure.groups}
    safe = [c for cs in found.values() for c in cs if _surely(model, structure, c)]
    counts = [*plain, *safe]
    if trial(some_of(structure, structure.groups), counts).holds:
        return replace(structure, counts=counts)
    held: dict[str, str] = {}
    learned: list[Count] = []
    good: list[Group] = []
    for group in _suspects(trial, structure.groups, counts, good):
        extra, reason = _search(trial, group, plain, found[group.name], safe, learned)
        if extra is None:
            held[group.name] = f"the module's code does not follow ({reason})"
        else:
            learned += extra
            good.append(group)
    own = {c.label for g in good for c in found[g.name]}
    counts = _unique([*plain, *[c for c in safe if c.label in own], *learned])
    if good and not trial(some_of(structure, good), counts).holds:
        good, more = _together(trial, good, counts)
        held.update(more)
    for count in learned:
        report.note(f"{count.label} follows the channels: the module's code needs it")
    return replace(structure.without(held), counts=counts)


def _unique(counts: Iterable[Count]) -> list[Count]:
    return list({c.label: c for c in counts}.values())


def _suspects(trial: Trial, groups: Sequence[Group], counts: Sequence[Count], good: list[Group]) -> list[Group]:
    """Groups that fail by themselves, found by halving; the others are put into `good`."""
    if not groups:
        return []
    if trial(some_of(trial.structure, groups), counts).holds:
        good += groups
        return []
    if len(groups) == 1:
        return list(groups)
    middle = len(groups) // 2
    return [s for part in (groups[:middle], groups[middle:]) for s in _suspects(trial, part, counts, good)]


def _search(
    trial: Trial, group: Group, plain: list[Count], found: list[Count], safe: list[Count], learned: list[Count]
) -> tuple[list[Count] | None, str]:
    """Integers with which the code follows a group; None and what went wrong if there are none."""
    removed = some_of(trial.structure, [group])
    own = [c for c in found if c.label in {s.label for s in safe}]
    names = {(c.attribute, c.place) for c in learned}
    # What one layer needs, its neighbours need too.
    likely = [c for c in found if (c.attribute, c.place) in names]
    sets = [own, [], _unique([*own, *likely]), likely, _unique([*own, *found]), *([c] for c in found)]
    sets += [_unique([*own, c]) for c in found]
    sets += [list(pair) for pair in itertools.combinations(found, 2)]
    sets += [[c for c in found if c is not left] for left in found]
    reason = ""
    different = {frozenset(c.label for c in chosen): chosen for chosen in sets}
    for chosen in list(different.values())[:_MOST_TRIALS]:
        verdict = trial(removed, [*plain, *chosen])
        if verdict.holds:
            return chosen, ""
        reason = reason or verdict.reason
    return None, reason


def _together(trial: Trial, groups: Sequence[Group], counts: list[Count]) -> tuple[list[Group], dict[str, str]]:
    """Groups that hold one after the other, and why the rest does not."""
    kept: list[Group] = []
    held = {}
    for group in groups:
        verdict = trial(some_of(trial.structure, [*kept, group]), counts)
        if verdict.holds:
            kept.append(group)
        else:
            held[group.name] = f"the module's code does not follow together with other groups ({verdict.reason})"
    return kept, held


def candidates(model: nn.Module, structure: Structure, group: Group) -> list[Count]:
    """Integers of modules on a group's path that are as large as one of its dimensions."""
    mine = structure.mask(group.units)
    found: dict[str, Count] = {}
    for path, atoms in _dimensions(structure):
        if not mine[structure.unit_of[atoms]].any():
            continue
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        for attribute, place in _equal_to(module, atoms.size):
            count = Count(module=path, attribute=attribute, atoms=atoms, place=place)
            found.setdefault(count.label, count)
    return list(found.values())


def _dimensions(structure: Structure) -> Iterable[tuple[str, Any]]:
    """(module, atoms of a dimension that its calls see), for modules around each operator."""
    seen: set[tuple[str, int, int, int]] = set()
    for node in structure.values:
        if node.op != "call_function":
            continue
        paths = _paths(node)
        for source in (*node.all_input_nodes, node):
            known = structure.values.get(source, ())
            for dims in known if isinstance(known, list) else [known]:
                yield from _fresh(paths, dims, seen)


def _fresh(paths: Sequence[str], dims: Dims, seen: set[tuple[str, int, int, int]]) -> Iterable[tuple[str, Any]]:
    for atoms in dims:
        if atoms is not None and atoms.size:
            for path in paths:
                key = (path, atoms.size, int(atoms[0]), int(atoms[-1]))
                if key not in seen:
                    seen.add(key)
                    yield path, atoms


def _paths(node: Node) -> list[str]:
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path).removeprefix("L['self']").removeprefix(".") for path, _ in stack.values()]


def _equal_to(module: nn.Module, size: int) -> list[tuple[str, int | None]]:
    found: list[tuple[str, int | None]] = []
    # The sizes of torch's own layers follow their tensors anyway, unless they have none.
    if type(module).__module__.startswith("torch.nn") and any(True for _ in module.parameters(recurse=False)):
        return found
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool) and value == size:
            found.append((name, None))
        elif isinstance(value, tuple | list) and not name.startswith("_") and len(value) <= 8:
            found += [(name, i) for i, v in enumerate(value) if type(v) is int and v == size]
    return found


def _surely(model: nn.Module, structure: Structure, count: Count) -> bool:
    """Whether an integer surely counts this dimension: by its name, and as nothing else there is as long."""
    if type(model.get_submodule(count.module)).__module__.startswith("torch.nn") or not _COUNTING.fullmatch(
        count.attribute
    ):
        return False
    if "head" in count.attribute:
        return True
    mine = np.unique(structure.unit_of[count.atoms])
    others = (a for path, a in _dimensions(structure) if path == count.module and a.size == count.atoms.size)
    return all(np.array_equal(np.unique(structure.unit_of[a]), mine) for a in others)
