"""The digits: real, whole, fixed; and the manifest's steps reproduce the model's input."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from deepseek_r1.data import digits
from deepseek_r1.runtime import preprocess


def test_it_is_the_whole_of_the_real_set():
    data = digits()
    ours = torch.cat([data.tensors(p)[0] for p in data.parts()]).flatten(1).numpy() * 16
    theirs = load_digits().data
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))
    assert data.labels == tuple("0123456789")
    assert (data.input_shape, data.input_dtype) == ((1, 8, 8), "float32")


def test_the_seed_orders_batches_and_leaves_the_split_alone():
    first, again, other = digits(seed=1), digits(seed=1), digits(seed=2)
    for part in ("train", "val", "test"):
        assert torch.equal(first.tensors(part)[0], other.tensors(part)[0])
    orders = [torch.cat([y for _, y in d.train]).tolist() for d in (first, again, other)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_the_preprocessing_steps_turn_raw_scans_into_model_input():
    source = load_digits()
    rows = {tuple(r): i for i, r in enumerate(source.data.tolist())}
    x = digits().tensors("test")[0].numpy()
    raw = source.images[[rows[tuple(r)] for r in (x.reshape(len(x), -1) * 16).tolist()]]
    assert np.array_equal(preprocess(digits().preprocessing, raw), x)
