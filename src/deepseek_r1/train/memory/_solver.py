"""Which part of a chain of blocks keeps, which recomputes, so that the step is fastest under a limit of memory.

Plain numbers in, plain numbers out: knows no tensors and no modules. The structure is that of Rotor (Beaumont et al.,
arXiv 1911.13214) and Rockmate (Zhao et al., arXiv 2307.01236): options inside a block, dynamic programming over the
chain, the limit held at every position of the forward and of the backward pass.

All bytes are relative to one measured step, the base, in which every block is recomputed from its own input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

#: States kept at one position; more are thinned out, which costs speed of the plan found, never its limit.
_STATES = 512
_STEPS = 96
SINGLE, RUN, RUN_EACH = "single", "run", "run, each block again"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to treat one block.

    Attributes:
        name: what the executor does ("keep", "recompute", "selective 1", "offload").
        held: bytes it holds from the end of its forward to the beginning of its backward pass, more than recomputing.
        forward: bytes its forward pass takes at its peak, more than recomputing.
        backward: the same of its backward pass.
        seconds: what it costs over keeping everything.
    """

    name: str
    held: int
    forward: int
    backward: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Block:
    """One position of the chain, in the order of the forward pass.

    Attributes:
        forward_peak, gap_peak, backward_peak: highest bytes of the base during its forward pass, between it and the
            next block, and from the arrival of its output's gradient to that of the block before.
        backward_live: bytes of the base when the gradient of its output arrives.
        own_forward: bytes its forward pass takes at its peak if nothing is kept.
        boundary: bytes of its input that nobody needs if it is recomputed together with the block before.
        linked: whether that is possible.
        choices: the first is "keep"; a block that can be recomputed has "recompute" as the second.
        forward_seconds: its forward pass.
    """

    forward_peak: int
    gap_peak: int
    backward_peak: int
    backward_live: int
    own_forward: int
    boundary: int
    linked: bool
    choices: tuple[Choice, ...]
    forward_seconds: float = 0.0


@dataclass(frozen=True)
class Action:
    """Blocks `first` to `last` treated in one way: one block by one of its choices, or several recomputed together."""

    first: int
    last: int
    kind: str = SINGLE
    choice: int = 0


@dataclass(frozen=True)
class Solution:
    """A whole chain's actions with the peak and the extra seconds that the numbers say."""

    actions: tuple[Action, ...]
    peak: int
    seconds: float


@dataclass(frozen=True)
class _Move:
    action: Action
    need: int
    held: int
    seconds: float


@dataclass
class Chain:
    """Blocks in order, and the bytes that no choice changes.

    Attributes:
        floor: highest bytes outside forward and backward pass (the optimizer's update).
        runs: whether blocks may be recomputed together.
    """

    blocks: tuple[Block, ...]
    floor: int = 0
    runs: bool = True
    _moves: list[list[_Move]] = field(default_factory=list, repr=False)
    _by_action: dict[Action, _Move] = field(default_factory=dict, repr=False)

    def moves(self) -> list[list[_Move]]:
        """Every action by its first block, with what it needs above the bytes held by the blocks before it."""
        if not self._moves:
            for first in range(len(self.blocks)):
                here = [_single(self.blocks, first, c) for c in range(len(self.blocks[first].choices))]
                if self.runs:
                    here += _runs(self.blocks, first)
                self._by_action.update({move.action: move for move in here})
                self._moves.append(_undominated(here))
        return self._moves

    def move(self, action: Action) -> _Move:
        """What one action needs, holds and costs."""
        self.moves()
        return self._by_action[action]


def _single(blocks: Sequence[Block], at: int, index: int) -> _Move:
    block, choice = blocks[at], blocks[at].choices[index]
    need = max(
        block.forward_peak + max(0, choice.forward),
        block.gap_peak + choice.held,
        block.backward_peak + max(0, choice.backward),
    )
    return _Move(Action(at, at, SINGLE, index), need, choice.held, choice.seconds)


def _runs(blocks: Sequence[Block], first: int) -> list[_Move]:
    """Runs of two and more blocks from `first` on: recomputed as a whole, or once more block by block."""
    found: list[_Move] = []
    if len(blocks[first].choices) < 2:
        return found
    freed, forward = 0, blocks[first].forward_peak
    filled = [0]
    again = blocks[first].choices[1].seconds
    light = blocks[first].forward_seconds
    filled.append(blocks[first].choices[0].held)
    for last in range(first + 1, len(blocks)):
        block = blocks[last]
        if not block.linked or len(block.choices) < 2:
            break
        # While this block runs, its own input is there; those between the run's first and it are gone.
        forward = max(forward, block.forward_peak - freed)
        freed += block.boundary
        gap = block.gap_peak - freed
        again += block.choices[1].seconds
        inside = range(first, last + 1)
        together = max(
            blocks[k].backward_peak + filled[k - first] + max(0, blocks[k].choices[0].backward) for k in inside
        )
        together = max(together, _refill(blocks, first, last, filled))
        each = max(max(blocks[k].backward_peak for k in inside), _refill(blocks, first, last, None))
        found.append(_Move(Action(first, last, RUN), max(forward, gap, together), -freed, again))
        found.append(_Move(Action(first, last, RUN_EACH), max(forward, gap, each), -freed, again + light))
        light += block.forward_seconds
        filled.append(filled[-1] + block.choices[0].held)
    return found


def _refill(blocks: Sequence[Block], first: int, last: int, filled: list[int] | None) -> int:
    """Highest bytes while a run's blocks compute again, which begins when the last one's gradient is there."""
    peak, missing = 0, 0
    for k in range(last, first - 1, -1):
        own = blocks[k].own_forward
        if filled is not None:
            own += max(0, blocks[k].choices[0].forward) + filled[k - first]
        peak = max(peak, blocks[last].backward_live - missing + own)
        missing += blocks[k].boundary
    return peak


def _undominated(moves: list[_Move]) -> list[_Move]:
    kept: list[_Move] = []
    for move in sorted(moves, key=lambda m: (m.seconds, m.need, m.held)):
        if not any(
            other.action.last == move.action.last and other.need <= move.need and other.held <= move.held
            for other in kept
        ):
            kept.append(move)
    return kept


def solve(chain: Chain, budget: float) -> Solution | None:
    """The fastest way through the chain that never holds more than `budget` bytes; None if there is none.

    Example:
        >>> keep, again = (Choice(name=n, held=h, forward=h, backward=0, seconds=s)
        ...                for n, h, s in (("keep", 8, 0.0), ("recompute", 0, 1.0)))
        >>> block = Block(forward_peak=10, gap_peak=10, backward_peak=18, backward_live=10, own_forward=8, boundary=2,
        ...               linked=True, choices=(keep, again))
        >>> chain = Chain((block, block, block), runs=False)
        >>> [a.choice for a in solve(chain, 26).actions], solve(chain, 17)
        ([1, 0, 0], None)
    """
    size = len(chain.blocks)
    if chain.floor > budget:
        return None
    memory = [np.zeros(1, np.int64) if k == 0 else np.empty(0, np.int64) for k in range(size + 1)]
    seconds = [m.astype(float) for m in memory]
    came: list[np.ndarray] = [np.full((len(m), 3), -1, np.int64) for m in memory]
    arriving: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in range(size + 1)]
    for at in range(size):
        if at:
            memory[at], seconds[at], came[at] = _prune(arriving[at])
        for number, move in enumerate(chain.moves()[at]):
            (fits,) = np.nonzero(memory[at] + move.need <= budget)
            if len(fits):
                back = np.stack([np.full(len(fits), at), fits, np.full(len(fits), number)], axis=1)
                arriving[move.action.last + 1].append(
                    (memory[at][fits] + move.held, seconds[at][fits] + move.seconds, back)
                )
    if size:
        memory[size], seconds[size], came[size] = _prune(arriving[size])
    if not len(memory[size]):
        return None
    return _walk_back(chain, came, int(np.lexsort((memory[size], seconds[size]))[0]))


def _prune(arriving: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States that no other beats in both bytes and seconds, by rising bytes."""
    if not arriving:
        return np.empty(0, np.int64), np.empty(0), np.empty((0, 3), np.int64)
    memory, seconds, back = (np.concatenate(parts) for parts in zip(*arriving, strict=True))
    order = np.lexsort((seconds, memory))
    best = np.minimum.accumulate(seconds[order])
    first = np.ones(len(order), bool)
    first[1:] = best[1:] < best[:-1]
    kept = order[first]
    if len(kept) > _STATES:
        kept = kept[np.unique(np.linspace(0, len(kept) - 1, _STATES).round().astype(int))]
    return memory[kept], seconds[kept], back[kept]


def _walk_back(chain: Chain, came: list[np.ndarray], state: int) -> Solution:
    actions: list[Action] = []
    at = len(chain.blocks)
    while at > 0:
        before, previous, number = (int(v) for v in came[at][state])
        actions.append(chain.moves()[before][number].action)
        at, state = before, previous
    return evaluate(chain, tuple(reversed(actions)))


def evaluate(chain: Chain, actions: Sequence[Action]) -> Solution:
    """Peak and seconds of given actions."""
    held, peak, seconds = 0, chain.floor, 0.0
    for action in actions:
        move = chain.move(action)
        peak, held, seconds = max(peak, held + move.need), held + move.held, seconds + move.seconds
    return Solution(tuple(actions), peak, seconds)


def uniform(chain: Chain) -> list[Solution]:
    """What people do by hand: every block in one way, or runs of k blocks recomputed."""
    blocks = chain.blocks
    most = max((len(b.choices) for b in blocks), default=0)
    found = [[Action(k, k, SINGLE, min(c, len(b.choices) - 1)) for k, b in enumerate(blocks)] for c in range(most)]
    if chain.runs:
        found += [every(blocks, k, kind) for k in range(2, len(blocks) + 1) for kind in (RUN, RUN_EACH)]
    return [evaluate(chain, actions) for actions in found]


def every(blocks: Sequence[Block], length: int, kind: str = RUN) -> list[Action]:
    """Runs of `length` blocks, cut where blocks are not linked; a run of one is recomputed alone."""
    actions: list[Action] = []
    at = 0
    while at < len(blocks):
        last = at
        while last + 1 < len(blocks) and last + 1 - at < length and _joins(blocks, at, last + 1):
            last += 1
        alone = Action(at, at, SINGLE, min(1, len(blocks[at].choices) - 1))
        actions.append(alone if last == at else Action(at, last, kind))
        at = last + 1
    return actions


def _joins(blocks: Sequence[Block], first: int, block: int) -> bool:
    return blocks[block].linked and len(blocks[first].choices) > 1 and len(blocks[block].choices) > 1


def frontier(chain: Chain) -> tuple[Solution, ...]:
    """Solutions by rising peak and falling seconds, from the least memory there is to keeping everything.

    It depends on the chain alone. A choice from it by a limit is therefore monotone: a smaller limit never gives a
    higher peak, a larger one never a slower step.
    """
    candidates = uniform(chain)
    # Block by block, so that a plain mixture of two choices is never missed by the grid.
    top = max(s.peak for s in candidates)
    lowest = min(s.peak for s in candidates)
    bottom = max([chain.floor, *(min(m.need for m in moves) for moves in chain.moves()[:1])])
    step = max(1, (top - min(bottom, lowest)) // _STEPS)
    budget = top
    while True:
        found = solve(chain, budget)
        if found is None:
            break
        candidates.append(found)
        budget = min(found.peak - 1, budget - step)
    candidates += _least(chain, budget, min(s.peak for s in candidates), max(1, step // 16))
    return _envelope(candidates)


def _least(chain: Chain, below: int, above: int, precision: int) -> list[Solution]:
    """Solutions on the way to the least memory, between a limit that is too small and one that is met."""
    found: list[Solution] = []
    while above - below > precision:
        middle = (above + below) // 2
        solution = solve(chain, middle)
        if solution is None:
            below = middle
        else:
            found.append(solution)
            above = solution.peak
    return found


def _envelope(candidates: Iterable[Solution]) -> tuple[Solution, ...]:
    kept: list[Solution] = []
    for solution in sorted(candidates, key=lambda s: (s.peak, s.seconds, len(s.actions))):
        if not kept or solution.seconds < kept[-1].seconds:
            kept.append(solution)
    return tuple(kept)


def fastest(solutions: Sequence[Solution], budget: float) -> Solution | None:
    """The fastest of a frontier whose peak is not above `budget`."""
    return max((s for s in solutions if s.peak <= budget), key=lambda s: s.peak, default=None)
