"""DSDataLoader takes what torch's takes, and a seed."""

import inspect

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from deepseek_r1.core import ConfigError
from deepseek_r1.data import DSDataLoader

pytestmark = pytest.mark.tiny
DATA = TensorDataset(torch.arange(12))


def _epoch(loader):
    return torch.cat([b[0] for b in loader]).tolist()


def test_the_seed_decides_every_epoch_whatever_the_process_did():
    a = DSDataLoader(DATA, 5, True, seed=3)
    torch.manual_seed(99)
    b = DSDataLoader(DATA, 5, True, seed=3)
    assert [_epoch(a), _epoch(a)] == [_epoch(b), _epoch(b)]
    assert _epoch(a) != _epoch(a)


def test_without_a_seed_it_is_torchs_loader():
    torch.manual_seed(1)
    ours = _epoch(DSDataLoader(DATA, batch_size=4, shuffle=True))
    torch.manual_seed(1)
    assert ours == _epoch(DataLoader(DATA, batch_size=4, shuffle=True))
    assert isinstance(DSDataLoader(DATA), DataLoader)


def test_every_argument_of_torchs_loader_is_taken():
    defaults = {
        name: p.default
        for name, p in inspect.signature(DataLoader.__init__).parameters.items()
        if name not in ("self", "dataset")
    }
    loader = DSDataLoader(DATA, **defaults)
    assert len(loader) == 12


def test_seed_and_generator_together_are_an_error():
    with pytest.raises(ConfigError, match="one of the two"):
        DSDataLoader(DATA, seed=1, generator=torch.Generator())
