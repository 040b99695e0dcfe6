"""The solver against brute force, and what it promises over all limits."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_r1.train.memory._solver import (
    RUN,
    RUN_EACH,
    Action,
    Block,
    Chain,
    Choice,
    evaluate,
    every,
    fastest,
    frontier,
    solve,
    uniform,
)


@st.composite
def chains(draw, most=5):
    """Chains with the order of things that real ones have: what is kept takes bytes and saves seconds."""
    blocks = []
    live = draw(st.integers(10, 50))
    for _ in range(draw(st.integers(1, most))):
        saved, forward, boundary = draw(st.integers(0, 60)), draw(st.integers(0, 40)), draw(st.integers(0, 15))
        again = draw(st.integers(1, 20)) / 10
        choices = [
            Choice(name="keep", held=saved, forward=draw(st.integers(0, saved)), backward=0, seconds=0.0),
            Choice(name="recompute", held=0, forward=0, backward=0, seconds=again),
            Choice(
                name="selective",
                held=saved // 2,
                forward=saved // 3,
                backward=draw(st.integers(0, 5)),
                seconds=again / 3,
            ),
        ]
        fit = draw(st.booleans()) or draw(st.booleans())
        blocks.append(
            Block(
                forward_peak=live + forward, gap_peak=live + draw(st.integers(0, 5)),
                backward_peak=live + saved + forward + draw(st.integers(0, 20)), backward_live=live + 3,
                own_forward=forward, boundary=boundary, linked=draw(st.booleans()),
                choices=tuple(choices[: draw(st.integers(2, 3))]) if fit else (choices[0],), forward_seconds=again,
            )
        )  # fmt: skip
        live += boundary
    return Chain(tuple(blocks), floor=draw(st.integers(0, 60)), runs=draw(st.booleans()))


def all_ways(chain):
    """Every list of actions that covers the chain."""
    ends = {}
    for moves in [chain.moves()]:
        del moves
    for action in chain._by_action:
        ends.setdefault(action.first, []).append(action)

    def extend(at):
        if at == len(chain.blocks):
            yield ()
            return
        for action in ends[at]:
            for rest in extend(action.last + 1):
                yield (action, *rest)

    return [evaluate(chain, actions) for actions in extend(0)]


def plain_peak(chain, picks):
    """The peak of blocks treated one by one, walked through forwards and backwards as a step runs."""
    peak, held = chain.floor, []
    for block, pick in zip(chain.blocks, picks, strict=True):
        choice = block.choices[pick]
        peak = max(peak, block.forward_peak + sum(held) + max(0, choice.forward))
        held.append(choice.held)
        peak = max(peak, block.gap_peak + sum(held))
    for block, pick in zip(reversed(chain.blocks), reversed(picks), strict=True):
        held.pop()
        peak = max(peak, block.backward_peak + sum(held) + max(0, block.choices[pick].backward))
    return peak


@settings(max_examples=150, deadline=None)
@given(chains(), st.integers(20, 500))
def test_solve_equals_brute_force(chain, budget):
    possible = [s for s in all_ways(chain) if s.peak <= budget]
    found = solve(chain, budget)
    if not possible:
        assert found is None
    else:
        assert found is not None
        assert found.peak <= budget
        assert found.seconds == pytest.approx(min(s.seconds for s in possible))


@settings(max_examples=100, deadline=None)
@given(chains())
def test_the_peak_of_plain_actions_is_that_of_a_walk_through_the_step(chain):
    for picks in itertools.product(*(range(len(b.choices)) for b in chain.blocks)):
        actions = [Action(k, k, "single", pick) for k, pick in enumerate(picks)]
        assert evaluate(chain, actions).peak == plain_peak(chain, picks)


@settings(max_examples=60, deadline=None)
@given(chains(most=7))
def test_the_frontier_is_monotone_and_no_uniform_way_beats_it(chain):
    found = frontier(chain)
    assert all(a.peak < b.peak and a.seconds > b.seconds for a, b in itertools.pairwise(found))
    for way in uniform(chain):
        best = fastest(found, way.peak)
        assert best is not None
        assert best.seconds <= way.seconds
    keep = evaluate(chain, [Action(k, k) for k in range(len(chain.blocks))])
    assert fastest(found, keep.peak).seconds == 0
    least = min(s.peak for s in all_ways(chain)) if len(chain.blocks) <= 5 else found[0].peak
    assert found[0].peak <= least * 1.02 + 1


def equal_blocks(count, saved=10, boundary=1):
    live = 100
    blocks = []
    for k in range(count):
        here = live + boundary * k
        blocks.append(
            Block(
                forward_peak=here + 2, gap_peak=here + 1, backward_peak=here + saved + 3, backward_live=here + 2,
                own_forward=2, boundary=boundary, linked=k > 0, forward_seconds=1.0,
                choices=(
                    Choice(name="keep", held=saved, forward=saved, backward=0, seconds=0.0),
                    Choice(name="recompute", held=0, forward=0, backward=0, seconds=1.0),
                ),
            )
        )  # fmt: skip
    return Chain(tuple(blocks))


def test_long_chains_are_solved_quickly_and_runs_go_below_single_blocks(slower):
    import time

    chain = equal_blocks(48, saved=4, boundary=4)
    began = time.perf_counter()
    found = frontier(chain)
    assert time.perf_counter() - began < 8 * slower
    alone = evaluate(chain, every(chain.blocks, 1)).peak
    assert found[0].peak < alone, "runs drop the inputs between their blocks"
    assert any(a.kind in (RUN, RUN_EACH) for a in found[0].actions)


def test_every_cuts_where_blocks_are_not_linked():
    chain = equal_blocks(4)
    blocks = [*chain.blocks[:2], chain.blocks[0], chain.blocks[3]]
    assert [(a.first, a.last) for a in every(blocks, 3)] == [(0, 1), (2, 3)]


def test_a_limit_below_the_floor_has_no_solution():
    chain = equal_blocks(2)
    assert solve(Chain(chain.blocks, floor=10**6), 10**5) is None
    assert fastest(frontier(chain), 1) is None
