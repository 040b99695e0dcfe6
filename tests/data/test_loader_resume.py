"""A loader put to where another was gives the batches that were left, and reads no others where that is exact."""

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, WeightedRandomSampler

from deepseek_r1.core import InputError
from deepseek_r1.data import DSDataLoader


class Ragged(Dataset):
    """Samples with fixed lengths and numbers drawn from all three generators."""

    def __init__(self, count=24, draws=True):
        self.lengths = [1 + (7 * i) % 11 for i in range(count)]
        self.draws, self.read = draws, []

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        self.read.append(i)
        n = self.lengths[i]
        noise = [random.random(), float(np.random.random()), float(torch.rand(()))] if self.draws else [0.0] * 3
        return {"input_ids": [i + 1] * n, "noise": np.array(noise)}


class Flat(Ragged):
    def __getitem__(self, i):
        return super().__getitem__(i)["noise"], i


class Stream(IterableDataset):
    def __init__(self):
        self.source = Ragged()

    def __iter__(self):
        return (self.source[i] for i in range(len(self.source)))


MODES = {
    "fixed": {"batch_size": 4},
    "buckets": {"batch_size": 4, "batching": "buckets", "multiple": 4, "max_shapes": 2},
    "packed": {"batch_size": 2, "batching": "packed", "max_length": 16},
}


def _loader(mode, data=None, **more):
    if data is None:
        data = Flat() if mode == "fixed" else Ragged()
    return DSDataLoader(data, **MODES[mode], **more)


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _after(loader, passes, batches):
    """Leave the loader after some batches of a pass; give its state and what would have come."""
    for _ in range(passes):
        list(loader)
    iterator = iter(loader) if batches else loader
    for _ in range(min(batches, 5)):
        next(iterator)
    state = loader.state_dict()
    process = random.getstate(), np.random.get_state(), torch.get_rng_state()
    rest = [_plain(b) for b in iterator]
    return state, process, rest, [_plain(b) for b in loader]


def _put_back(process):
    random.setstate(process[0])
    np.random.set_state(process[1])
    torch.set_rng_state(process[2])


def _written_and_read(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=12, deadline=None)
@given(passes=st.integers(0, 2), batches=st.integers(0, 6), seed=st.integers(0, 5))
def test_with_a_seed_the_rest_is_the_same_whatever_the_process_draws(mode, shuffle, passes, batches, seed):
    state, _, rest, following = _after(_loader(mode, shuffle=shuffle, seed=seed), passes, batches)
    torch.manual_seed(99)
    before = torch.get_rng_state(), random.getstate()
    again = _loader(mode, shuffle=shuffle, seed=seed)
    again.load_state_dict(_written_and_read(state))
    assert [_plain(b) for b in again] == rest
    assert [_plain(b) for b in again] == following
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.tiny
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_without_a_seed_the_order_is_the_same_and_the_process_goes_on(mode, batches):
    torch.manual_seed(5)
    state, process, rest, following = _after(_loader(mode, shuffle=True), 1, batches)
    torch.manual_seed(77)
    again = _loader(mode, shuffle=True)
    again.load_state_dict(state)
    if batches:
        iterator = iter(again)
        _put_back(process)
        assert [_plain(b) for b in iterator] == rest
    else:
        _put_back(process)
        assert [_plain(b) for b in again] == rest
    assert [_plain(b) for b in again] == following


@pytest.mark.tiny
def test_the_order_comes_back_where_nobody_puts_the_process_back():
    torch.manual_seed(5)
    state, _, rest, _ = _after(_loader("packed", Ragged(draws=False), shuffle=True), 1, 2)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    again = _loader("packed", Ragged(draws=False), shuffle=True)
    again.load_state_dict(state)
    assert [_plain(b) for b in again] == rest
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.tiny
@pytest.mark.parametrize("mode", MODES)
def test_skipped_samples_are_not_read(mode):
    state, _, rest, _ = _after(_loader(mode, shuffle=True, seed=0), 0, 3)
    data = Flat() if mode == "fixed" else Ragged()
    again = _loader(mode, data, shuffle=True, seed=0)
    again.load_state_dict(state)
    if mode != "fixed":
        again.plan()
        data.read.clear()
    given = list(again)
    assert len(given) == len(rest)
    assert len(data.read) < len(data)
    assert len(data.read) == len(set(data.read))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers(mode, seed, persistent):
    more = {"shuffle": True, "num_workers": 2, "seed": seed, "persistent_workers": persistent}
    torch.manual_seed(1)
    # Without a seed, what living workers have drawn in passes before cannot be brought back.
    passes = 1 if seed is not None or not persistent else 0
    state, process, rest, following = _after(_loader(mode, **more), passes, 2)
    torch.manual_seed(2)
    again = _loader(mode, **more)
    again.load_state_dict(state)
    iterator = iter(again)
    _put_back(process)
    assert [_plain(b) for b in iterator] == rest
    assert [_plain(b) for b in again] == following


def test_with_a_seed_the_number_of_workers_changes_nothing():
    def batches(workers):
        loader = _loader("packed", shuffle=True, seed=4, num_workers=workers)
        return [_plain(b) for _ in range(2) for b in loader]

    assert batches(0) == batches(1) == batches(2)
    state, _, rest, _ = _after(_loader("packed", shuffle=True, seed=4, num_workers=2), 1, 2)
    again = _loader("packed", shuffle=True, seed=4)
    again.load_state_dict(state)
    assert [_plain(b) for b in again] == rest


@pytest.mark.tiny
def test_a_seeded_loader_leaves_the_process_alone():
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    list(_loader("packed", shuffle=True, seed=1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.tiny
@pytest.mark.parametrize("arguments", [{"batch_size": None}, {"batching": "packed", "max_length": 16}])
def test_streams_are_read_up_to_the_place(arguments):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    state, process, rest, _ = _after(DSDataLoader(Stream(), **arguments), 0, 3)
    again = DSDataLoader(Stream(), **arguments)
    again.load_state_dict(state)
    iterator = iter(again)
    _put_back(process)
    assert [_plain(b) for b in iterator] == rest


@pytest.mark.tiny
def test_a_sampler_that_draws_as_it_goes_comes_back():
    def loader():
        generator = torch.Generator().manual_seed(0)
        return _loader("fixed", sampler=WeightedRandomSampler([1.0] * 24, 24, generator=generator), seed=1)

    state, _, rest, following = _after(loader(), 1, 2)
    again = loader()
    again.load_state_dict(state)
    assert [_plain(b) for b in again] == rest
    assert [_plain(b) for b in again] == following


@pytest.mark.tiny
def test_a_finished_pass_is_followed_by_the_next():
    loader = _loader("packed", shuffle=True, seed=0)
    list(loader)
    state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 0)
    following = [_plain(b) for b in loader]
    again = _loader("packed", shuffle=True, seed=0)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert [_plain(b) for b in again] == following


@pytest.mark.tiny
def test_a_state_survives_the_loader_it_is_put_into():
    """In the same process, in the middle of another pass."""
    loader = _loader("packed", shuffle=True, seed=0)
    state, _, rest, _ = _after(loader, 0, 2)
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict(state)
    assert [_plain(b) for b in loader] == rest


@pytest.mark.parametrize("more", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_a_loader_in_the_middle_of_a_pass_is_freed_at_once(more):
    """Iterators that wait for the garbage collector would be collected in forked workers too, and end others there."""
    import gc
    import weakref

    gc.disable()
    try:
        loader = _loader("packed", shuffle=True, **more)
        iterator = iter(loader)
        next(iterator)
        alive = weakref.ref(loader), weakref.ref(iterator._source)
        del loader, iterator
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


@pytest.mark.tiny
def test_states_that_do_not_fit_are_refused():
    loader = _loader("packed")
    with pytest.raises(InputError, match="no state of a DSDataLoader"):
        loader.load_state_dict({"epoch": 1})
    state = loader.state_dict()
    with pytest.raises(InputError, match="version 9; this release reads 1"):
        loader.load_state_dict({**state, "version": 9})
    with pytest.raises(InputError, match="batching='packed', and this one has 'buckets'"):
        _loader("buckets").load_state_dict(state)
    again = _loader("packed")
    again.load_state_dict({**state, "batch": 1000})
    with pytest.raises(InputError, match="after batch 1000 of a pass, but there are only"):
        list(again)


@pytest.mark.tiny
def test_a_dataset_that_follows_the_pass_is_told_which_it_is():
    class Following(Ragged):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __getitem__(self, i):
            return {"input_ids": [self.epoch] * self.lengths[i]}

    loader = _loader("packed", Following())
    for epoch in range(2):
        for batch in loader:
            assert set(batch["input_ids"][batch["sequence_ids"] > 0].tolist()) == {epoch}
    again = _loader("packed", Following())
    again.load_state_dict(loader.state_dict())
    assert set(next(iter(again))["input_ids"].flatten().tolist()) <= {0, 2}
