"""Workers are tried where data is waited for, kept where waiting falls, and never change the data."""

import time

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset, get_worker_info

from deepseek_r1.core import ConfigError
from deepseek_r1.data import DSDataLoader
from deepseek_r1.data import _tuning as tuning
from deepseek_r1.data._tuning import Setting, Tuner


def _tuner(cores=8, **more):
    return Tuner(Setting(), workers=True, prefetch=True, cores=cores, **more)


@pytest.mark.tiny
def test_a_reader_that_does_not_wait_stays_without_workers():
    tuner = _tuner()
    tuner.ended(waited_s=1.0, computed_s=99.0, batches=100)
    assert tuner.setting == Setting()
    assert tuner.decisions == ["0 workers: waiting takes 1.0% of the time"]


@pytest.mark.tiny
def test_cheap_batches_and_short_passes_are_not_worth_a_process():
    cheap, short = _tuner(), _tuner()
    cheap.ended(waited_s=10.0, computed_s=0.1, batches=50_000)
    short.ended(waited_s=0.5, computed_s=0.1, batches=50)
    assert cheap.setting == short.setting == Setting()
    assert "handing one over" in cheap.decisions[0]
    assert "less than starting workers costs" in short.decisions[0]


@pytest.mark.tiny
def test_as_many_workers_are_tried_as_keep_up_with_the_reader():
    tuner = _tuner()
    tuner.ended(waited_s=30.0, computed_s=10.0, batches=100)
    assert tuner.setting == Setting(3, 2)
    tuner.ended(waited_s=5.0, computed_s=10.0, batches=100)
    assert tuner.setting == Setting(6, 2)
    tuner.ended(waited_s=4.8, computed_s=10.0, batches=100)
    # Six are no better than three: next, three that read further ahead.
    assert tuner.setting == Setting(3, 4)
    tuner.ended(waited_s=0.2, computed_s=10.0, batches=100)
    assert tuner.setting == Setting(3, 4)
    assert [d.rsplit("; ")[-1] for d in tuner.decisions[:3]] == [
        "kept", "back to 3 workers, 2 batches ahead each", "kept",
    ]  # fmt: skip


@pytest.mark.tiny
def test_a_trial_that_slows_the_work_between_batches_is_called_off():
    tuner = _tuner(cores=2)
    tuner.ended(waited_s=5.0, computed_s=10.0, batches=100)
    assert tuner.setting == Setting(1, 2)
    tuner.ended(waited_s=1.0, computed_s=16.0, batches=100)
    assert tuner.setting == Setting()
    assert "the work between batches became slower" in tuner.decisions[0]
    # And is not tried again.
    tuner.ended(waited_s=5.0, computed_s=10.0, batches=100)
    assert tuner.setting == Setting()


@pytest.mark.tiny
def test_no_more_workers_than_cores():
    tuner = _tuner(cores=2)
    tuner.ended(waited_s=90.0, computed_s=1.0, batches=100)
    assert tuner.setting == Setting(2, 2)


class Slow(Dataset):
    """Waits as a disk does, without computing."""

    def __init__(self, seconds=0.02, count=16):
        self.seconds, self.count = seconds, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        time.sleep(self.seconds)
        return torch.tensor([i, int(get_worker_info() is not None)])


def test_a_slow_dataset_gets_workers_and_keeps_its_order(monkeypatch):
    monkeypatch.setattr(tuning, "_LEAST_WAIT_S", 0.1)
    torch.manual_seed(0)
    # With living workers, starting them is not paid for in every pass.
    loader = DSDataLoader(Slow(), 2, True, seed=1, num_workers="auto", prefetch_factor="auto", persistent_workers=True)
    plain = DSDataLoader(Slow(0), 2, True, seed=1)
    loader._tuner.cores = 2
    workers = []
    for _ in range(3):
        given = []
        for batch in loader:
            time.sleep(0.03)
            given.append(batch[:, 0].tolist())
        workers.append(int(batch[0, 1]))
        assert given == [b[:, 0].tolist() for b in plain]
    assert workers[0] == 0
    assert workers[1] == 1
    assert any("tried 2 workers" in note and "ms a batch" in note for note in loader.report.notes)


@pytest.mark.tiny
def test_a_cheap_dataset_stays_without_workers():
    loader = DSDataLoader(TensorDataset(torch.arange(4000)), 8, num_workers="auto", prefetch_factor="auto")
    for _ in range(3):
        for _ in loader:
            pass
        assert loader.num_workers == 0
    assert loader.report["workers"].after == 0


class Unfit(Slow):
    """Can only be read where it was made."""

    def __getitem__(self, i):
        if get_worker_info() is not None and i == 9:
            raise RuntimeError("opened elsewhere")
        return super().__getitem__(i)


def test_a_dataset_that_workers_cannot_read_is_read_without_them(monkeypatch):
    monkeypatch.setattr(tuning, "_LEAST_WAIT_S", 0.1)
    loader = DSDataLoader(Unfit(), 2, True, seed=1, num_workers="auto")
    expected = DSDataLoader(Slow(0), 2, True, seed=1)
    for _ in range(3):
        assert [b[:, 0].tolist() for b in loader] == [b[:, 0].tolist() for b in expected]
    assert loader.num_workers == 0
    assert any("reading failed in them (RuntimeError)" in note for note in loader.report.notes)


@pytest.mark.tiny
def test_streams_get_no_workers_by_themselves():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(10))

    loader = DSDataLoader(Stream(), 2, num_workers="auto", prefetch_factor="auto")
    assert len(list(loader)) == 5
    assert loader.num_workers == 0
    assert any("a stream of its own" in note for note in loader.report.notes)


@pytest.mark.tiny
def test_words_other_than_auto_are_refused():
    with pytest.raises(ConfigError, match="num_workers='many'"):
        DSDataLoader([1], num_workers="many")
    with pytest.raises(ConfigError, match="multiprocessing_context"):
        DSDataLoader([1], num_workers="auto", multiprocessing_context="spawn")
    loader = DSDataLoader([1], num_workers=0, prefetch_factor="auto")
    assert next(iter(loader)).tolist() == [1]


@pytest.mark.tiny
def test_waiting_and_work_are_told_apart():
    loader = DSDataLoader(Slow(0.001, 10), 1)
    for _ in loader:
        time.sleep(0.004)
    report = loader.report
    assert 1 <= report["waiting for a batch"].after < 4
    assert report["between batches"].after >= 3
