"""Batches on the GPU before they are asked for: whole, in order, and not overwritten while they are worked on."""

import pytest
import torch
from torch.utils.data import Dataset

from deepseek_r1.data import DSDataLoader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Large(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == 33 and getattr(self, "breaks", False):
            raise ValueError("sample 33")
        return {"x": torch.full((1 << 18,), float(i)), "n": i}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", [None, 1])
def test_batches_are_those_of_the_cpu(workers, seed):
    loader = DSDataLoader(Large(), 4, num_workers=workers, seed=seed, device="cuda")
    sums = []
    for batch in loader:
        assert batch["x"].device.type == "cuda"
        # Work that is still running when the next copy begins.
        x = batch["x"]
        for _ in range(50):
            x = x * 1.0
        sums.append((x.mean(1), batch["n"]))
        del batch
    for mean, n in sums:
        assert torch.equal(mean.cpu(), n.cpu().float())
    assert len(sums) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_at_its_own_batch(workers):
    data = Large()
    data.breaks = True
    given = 0
    with pytest.raises(ValueError, match="sample 33"):
        for _ in DSDataLoader(data, 4, num_workers=workers, seed=0, device="cuda"):
            given += 1
    assert given == 8


def test_a_pass_left_early_counts_what_was_given():
    loader = DSDataLoader(Large(), 4, num_workers=2, seed=0, device="cuda")
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    assert state["batch"] == 3
    again = DSDataLoader(Large(), 4, seed=0, device="cuda")
    again.load_state_dict(state)
    assert next(iter(again))["n"].tolist() == next(iterator)["n"].tolist()
