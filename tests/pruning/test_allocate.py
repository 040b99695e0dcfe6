"""How many channels each group keeps: properties that must hold whatever the network."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deepseek_r1.pruning import PruningPlan
from deepseek_r1.pruning._allocate import Bill, Ladder, choose, parameters_of, stops
from deepseek_r1.pruning._importance import Importance
from deepseek_r1.pruning._splits import blocks
from deepseek_r1.pruning._structure import structure_of

from .nets import IMAGE, inverted

STRUCTURE = structure_of(inverted().eval(), IMAGE)


@given(st.integers(1, 300), st.integers(1, 80), st.sampled_from([1, 2, 4, 8, 16, 32]), st.floats(0.01, 1))
def test_stops_go_down_to_what_must_stay(size, width, step, least):
    found = stops(size, width, step, least)
    assert found[0] == size
    assert all(a > b >= 1 for a, b in pairwise(found))
    assert all(n >= least * size - 1e-6 for n in found)
    if size >= 3 * step and width == 1:
        assert all(n % step == 0 for n in found[1:])


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 1.0), st.sampled_from([1, 2, 4]))
def test_the_limit_is_met_or_everything_is_gone(seed, share, step):
    rng = np.random.default_rng(seed)
    importance = Importance(scores=rng.random(STRUCTURE.number) ** 3)
    ladders = [Ladder(g, importance, step, 0.1) for g in STRUCTURE.groups]
    weigh = parameters_of(STRUCTURE)
    whole = Bill(STRUCTURE, weigh).total
    choice = choose(STRUCTURE, ladders, weigh, share * whole)
    removed = STRUCTURE.mask(choice.removed())
    sizes = {name: list(shape) for name, shape in STRUCTURE.shapes.items()}
    for name, dim, kept in STRUCTURE.kept_at(removed):
        sizes[name][dim] = kept.size
    # The bill agrees with what is cut in the end.
    assert choice.cost == sum(weigh(n) * np.prod(s) for n, s in sizes.items())
    if choice.cost > share * whole:
        assert all(choice.rungs[ladder.group.name] == len(ladder.stops) - 1 for ladder in ladders)
    # The least important of each group are gone.
    for group in STRUCTURE.groups:
        gone = removed[group.units]
        scores = importance.scores[group.units]
        assert not gone.any() or scores[gone].max() <= scores[~gone].min()


@given(st.data())
def test_plans_after_each_other_are_one(data):
    size = data.draw(st.integers(1, 30))
    first = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    second = sorted(data.draw(st.sets(st.integers(0, len(first) - 1), min_size=1)))
    both = PruningPlan(tensors={"w": {0: first}}).then(PruningPlan(tensors={"w": {0: second}}))
    assert both.tensors["w"][0] == [first[i] for i in second]
    assert PruningPlan.from_dict(both.to_dict()).tensors == both.tensors


@given(st.lists(st.integers(1, 6), max_size=5), st.integers(0, 2**16))
def test_blocks_have_equal_products(sizes, seed):
    rng = np.random.default_rng(seed)
    new: list[int] = []
    for size in sizes:
        if new and rng.random() < 0.4:
            new[-1] *= size
        else:
            new.append(size)
    pairs = list(blocks(sizes, new))
    assert [d for left, _ in pairs for d in left] == list(range(len(sizes)))
    assert [d for _, right in pairs for d in right] == list(range(len(new)))
    for left, right in pairs:
        assert np.prod([sizes[d] for d in left]) == np.prod([new[d] for d in right])
