"""Small networks with the structures that pruning has to understand, and a config that measures no time."""

import pytest
import torch

from deepseek_r1.pruning import PruneConfig


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick():
    """A config with fixed steps and no timing."""
    return PruneConfig(channel_step=1, timing_rounds=0, samples=16)
