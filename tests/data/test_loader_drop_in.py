"""Where nothing more is asked, DSDataLoader gives what torch's loader gives, draws and fails as it does."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from deepseek_r1.core import InputError
from deepseek_r1.data import DSDataLoader


class Drawing(torch.utils.data.Dataset):
    """Every sample has numbers out of all three generators."""

    def __init__(self, count=13):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        return torch.tensor([i, random.random(), np.random.random(), float(torch.rand(()))], dtype=torch.float64)


class Counting(IterableDataset):
    def __init__(self, count=10, promised=None):
        self.count, self.promised = count, promised

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for i in range(first, self.count, step):
            yield torch.tensor([i, random.random()])

    def __len__(self):
        if self.promised is None:
            raise TypeError
        return self.promised


class Together(TensorDataset):
    def __getitems__(self, keys):
        return [self[k] for k in keys]


ARGUMENTS = {
    "plain": {},
    "batches": {"batch_size": 4},
    "shuffled": {"batch_size": 4, "shuffle": True},
    "drop last": {"batch_size": 4, "shuffle": True, "drop_last": True},
    "unbatched": {"batch_size": None},
    "unbatched, shuffled": {"batch_size": None, "shuffle": True},
    "larger than the dataset": {"batch_size": 100, "shuffle": True},
    "collate": {"batch_size": 3, "collate_fn": len},
    "sampler": {"batch_size": 3, "sampler": SubsetRandomSampler([1, 5, 7, 9, 11])},
    "replacement": {"batch_size": 3, "sampler": WeightedRandomSampler([1.0] * 13, 40)},
    "batch sampler": {"batch_sampler": BatchSampler(RandomSampler(range(13)), 5, False)},
}


def _seed(value=7):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def _everything(loader, passes=2):
    _seed()
    given = [[batch if isinstance(batch, int) else batch.tolist() for batch in loader] for _ in range(passes)]
    return given, random.random(), float(np.random.random()), float(torch.rand(()))


@pytest.mark.tiny
@pytest.mark.parametrize("name", ARGUMENTS)
def test_batches_and_draws_are_torchs(name):
    ours, torchs = DSDataLoader(Drawing(), **ARGUMENTS[name]), DataLoader(Drawing(), **ARGUMENTS[name])
    assert len(ours) == len(torchs)
    assert _everything(ours) == _everything(torchs)


@pytest.mark.tiny
def test_a_generator_decides_as_in_torch():
    def generator():
        return torch.Generator().manual_seed(3)

    torchs = _everything(DataLoader(Drawing(), 4, True, generator=generator()), 3)
    assert _everything(DSDataLoader(Drawing(), 4, True, generator=generator()), 3) == torchs
    orders = [
        [batch[:, 0].tolist() for _ in range(3) for batch in loader]
        for loader in (DSDataLoader(Drawing(), 4, True, seed=3), DataLoader(Drawing(), 4, True, generator=generator()))
    ]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("more", [{}, {"persistent_workers": True}, {"prefetch_factor": 3}])
def test_workers_draw_what_torchs_workers_draw(more):
    arguments = {"batch_size": 3, "shuffle": True, "num_workers": 2, **more}
    assert _everything(DSDataLoader(Drawing(), **arguments)) == _everything(DataLoader(Drawing(), **arguments))


@pytest.mark.tiny
@pytest.mark.parametrize("arguments", [{"batch_size": 4}, {"batch_size": None}, {"batch_size": 4, "drop_last": True}])
def test_streams_are_torchs(arguments):
    assert _everything(DSDataLoader(Counting(), **arguments)) == _everything(DataLoader(Counting(), **arguments))


def test_streams_in_workers_are_torchs():
    ours, torchs = DSDataLoader(Counting(), 3, num_workers=2), DataLoader(Counting(), 3, num_workers=2)
    assert _everything(ours) == _everything(torchs)


def _note_dataset(worker_id):
    info = get_worker_info()
    info.dataset.count = 13 if isinstance(info.dataset, Drawing) and info.id == worker_id else 0


def test_a_workers_own_start_sees_the_users_dataset():
    assert len(list(DSDataLoader(Drawing(), 5, num_workers=1, worker_init_fn=_note_dataset))) == 3


@pytest.mark.tiny
def test_many_samples_are_asked_for_at_once_where_the_dataset_can():
    data = Together(torch.arange(7))
    assert [b[0].tolist() for b in DSDataLoader(data, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.tiny
def test_two_passes_at_once_do_not_meet():
    loader = DSDataLoader(Drawing(), 1, sampler=SequentialSampler(range(13)), seed=0)
    for a, b in zip(loader, loader, strict=True):
        assert a[0, 0] == b[0, 0]
        assert a[0, 1] != b[0, 1]


@pytest.mark.tiny
def test_what_the_dataset_raises_stays_what_it_is_and_names_the_sample():
    class Broken(Drawing):
        def __getitem__(self, i):
            if i == 5:
                raise KeyError("no such file")
            return super().__getitem__(i)

    with pytest.raises(KeyError, match="no such file") as caught:
        list(DSDataLoader(Broken(), 2))
    assert caught.value.__notes__ == ["While sample 5 was read, for batch 3 of pass 1."]


class BrokenFar(Drawing):
    def __getitem__(self, i):
        if i == 5:
            return {}["in the depth"]
        return super().__getitem__(i)


def test_a_workers_traceback_is_readable():
    with pytest.raises(KeyError) as caught:
        list(DSDataLoader(BrokenFar(), 2, num_workers=1))
    text = str(caught.value)
    assert "Caught KeyError in DataLoader worker process 0" in text
    assert 'return {}["in the depth"]' in text
    assert "While sample 5 was read, for batch 3 of pass 1." in text


@pytest.mark.tiny
def test_a_dataset_that_ends_before_its_length_is_no_silent_end():
    class Short(Drawing):
        def __getitem__(self, i):
            if i > 3:
                raise StopIteration
            return super().__getitem__(i)

    with pytest.raises(InputError, match="StopIteration for sample 4"):
        list(DSDataLoader(Short(), 2))


@pytest.mark.tiny
def test_a_stream_that_ends_before_its_length_is_told():
    loader = DSDataLoader(Counting(10, promised=20), 4)
    assert len(list(loader)) == 3
    assert any("ended after 3 batches; len(dataset) promised 5" in note for note in loader.report.notes)
