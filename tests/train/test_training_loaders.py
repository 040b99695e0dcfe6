"""Loaders that fail, end early or have less than a batch: said plainly, with the place where it began."""

from __future__ import annotations

import os
import signal
import traceback

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from deepseek_r1.core import ConfigError, InputError, NonFiniteLossError
from deepseek_r1.data import DSDataLoader
from deepseek_r1.train import Trainer, TrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Broken(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        if i == 9:
            raise ZeroDivisionError("sample nine")
        return torch.ones(3), i % 2


def train(loader, epochs=1, **fields):
    return Trainer(nn.Linear(3, 2), loader, lr=1e-2, config=TrainingConfig(device="cpu", **fields)).train(epochs)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_dataset_is_shown_with_its_place(workers):
    with pytest.raises(InputError, match=r"batch 3 of epoch 1: ZeroDivisionError: sample nine") as error:
        train(DataLoader(Broken(), batch_size=4, num_workers=workers))
    text = "".join(traceback.format_exception(error.value))
    assert "test_training_loaders.py" in text
    assert 'raise ZeroDivisionError("sample nine")' in text, "the worker's own traceback is there"
    if workers:
        assert "test_training_loaders.py, line" in str(error.value), "and its last line in the message"


class Failing(Dataset):
    """Does what it is told at sample 20."""

    def __init__(self, what):
        self.what = what

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == 20:
            self.what()
        return torch.ones(3), i % 2


class Uneven(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.ones(3 + i), i % 2


def _corrupt():
    raise KeyError("sample 20 is corrupt")


def _refuse():
    raise InputError("sample 20 has no label.\n  It needs one")


def _wrong_type():
    raise TypeError("no tensor here")


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)


def _message(loader):
    with pytest.raises(InputError) as error:
        train(loader)
    return str(error.value), error.value.__cause__


@pytest.mark.parametrize("kind", [DataLoader, DSDataLoader])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_itself_is_kept_and_not_taken_for_one_of_shapes(kind, workers):
    for what, text in ((_corrupt, "KeyError: 'sample 20 is corrupt'"), (_wrong_type, "TypeError: no tensor here")):
        message, cause = _message(kind(Failing(what), batch_size=8, num_workers=workers))
        assert message.startswith(f"the loader failed while making batch 3 of epoch 1: {text}")
        assert "same shape" not in message
        assert "\n" not in message
        assert ("While sample 20 was read" in message) is (kind is DSDataLoader)
        assert isinstance(cause, KeyError | TypeError)


@pytest.mark.parametrize("kind", [DataLoader, DSDataLoader])
def test_what_a_worker_refuses_comes_with_its_batch(kind):
    message, cause = _message(kind(Failing(_refuse), batch_size=8, num_workers=1))
    assert message.startswith("the loader failed while making batch 3 of epoch 1: InputError: sample 20 has no label.")
    assert "Traceback" not in message
    assert isinstance(cause, InputError)
    assert "_refuse" in str(cause)


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_several_shapes_are_told_how_to_fit(workers):
    message, _ = _message(DataLoader(Uneven(), batch_size=4, num_workers=workers))
    assert "batch 1 of epoch 1" in message
    assert "Every sample of a batch must have the same shape: pad or crop" in message


# On a busy machine torch may hear of the death late, while the loader is cleared away.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_was_killed_is_about_memory():
    message, _ = _message(DataLoader(Failing(_killed), batch_size=8, num_workers=1))
    assert "/dev/shm" in message
    assert "memory ran out" in message
    assert "same shape" not in message


class Short:
    """Promises more than it gives."""

    def __len__(self):
        return 6

    def __iter__(self):
        return iter([(torch.rand(4, 3), torch.randint(0, 2, (4,))) for _ in range(4)])


def test_a_loader_that_ends_early_is_told():
    report = train(Short(), epochs=2)
    assert report["steps"].after == 8
    assert report.skipped == [
        ("batches 5 to 6 of epoch 1", "the loader has 6 by its length and ended after 4"),
        ("batches 5 to 6 of epoch 2", "the loader has 6 by its length and ended after 4"),
    ]


def test_a_batch_larger_than_the_dataset():
    few = TensorDataset(torch.rand(5, 3), torch.zeros(5, dtype=torch.long))
    report = train(DataLoader(few, batch_size=64), epochs=2)
    assert report["steps"].after == 2
    assert any("batch of 64 is larger than the dataset of 5 samples" in note for note in report.notes)
    with pytest.raises(InputError, match=r"drop_last=True drops the only one.*5 samples.*batch size is 64"):
        train(DataLoader(few, batch_size=64, drop_last=True))


@pytest.mark.parametrize("precision", ["int8", "fp64", "float16", None, 16])
def test_a_precision_that_is_not_supported(precision):
    with pytest.raises(ConfigError, match=r"precision=.*one of 'auto', 'fp32', 'bf16', 'fp16'"):
        TrainingConfig(precision=precision)


def test_the_batch_that_is_no_number_is_named_within_a_step():
    loader = [(torch.rand(4, 3), torch.randint(0, 2, (4,))) for _ in range(6)]
    loader[3][0][1, 1] = float("inf")
    with pytest.raises(
        NonFiniteLossError, match=r"step 2 \(epoch 1\), batches 3 to 4: .*in batch 4, the batch's inputs"
    ):
        train(loader, gradient_accumulation_steps=2)
    with pytest.raises(NonFiniteLossError, match=r"step 4 \(epoch 1\), batch 4: "):
        train(loader)
