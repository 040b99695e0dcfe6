"""Length buckets and packed rows out of datasets and streams: forms, fillings, lengths, and what is refused."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, WeightedRandomSampler

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.data import DSDataLoader, unpack_batch

pytestmark = pytest.mark.tiny


def _lengths(count=60, most=40, seed=0):
    return np.minimum(np.random.default_rng(seed).zipf(1.3, count), most).tolist()


def _dicts(count=60, most=40):
    """Sample i has tokens 100 i, 100 i + 1, ..., so that every token names its sample."""
    return [
        {"input_ids": list(range(100 * i + 1, 100 * i + 1 + n)), "labels": [i] * n, "score": float(i), "n": n}
        for i, n in enumerate(_lengths(count, most))
    ]


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        yield from self.samples


def _unpacked(batch):
    """Samples by number, as they lie in packed rows."""
    found = {}
    for ids, labels, sequence, position, score in zip(
        *(batch[name] for name in ("input_ids", "labels", "sequence_ids", "position_ids", "score")), strict=True
    ):
        assert ((sequence == 0) == (ids == 0)).all()
        for number in range(1, int(sequence.max()) + 1):
            mine = sequence == number
            assert position[mine].tolist() == list(range(int(mine.sum())))
            i = int(labels[mine][0])
            assert i not in found
            assert float(score[number - 1]) == i
            found[i] = {"input_ids": ids[mine].tolist(), "labels": labels[mine].tolist()}
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_packed_rows_hold_every_sample_whole(shuffle):
    samples = _dicts()
    loader = DSDataLoader(samples, batching="packed", max_length=80, batch_size=4, shuffle=shuffle, seed=1)
    for _ in range(2):
        found, batches = {}, list(loader)
        for batch in batches:
            assert batch["input_ids"].shape[1] == 80
            assert batch["score"].shape[1] == loader.plan().most_samples
            found |= _unpacked(batch)
        assert len(batches) == len(loader)
        assert found == {i: {k: s[k] for k in ("input_ids", "labels")} for i, s in enumerate(samples)}
    assert loader.report["fill"].after > 0.9
    assert {len(b["input_ids"]) for b in batches[:-1]} == {4}


def test_shuffled_rows_differ_between_passes_and_are_the_same_for_a_seed():
    def passes(seed):
        loader = DSDataLoader(_dicts(), batching="packed", max_length=64, shuffle=True, seed=seed)
        return [[b["input_ids"].tolist() for b in loader] for _ in range(2)]

    assert passes(1) == passes(1)
    assert passes(1)[0] != passes(1)[1]
    assert passes(1)[0] != passes(2)[0]


@pytest.mark.parametrize("shuffle", [False, True])
def test_buckets_hold_every_sample_in_few_shapes(shuffle):
    samples = _dicts(200)
    loader = DSDataLoader(samples, batching="buckets", max_shapes=3, multiple=8, batch_size=7, shuffle=shuffle, seed=1)
    seen, shapes = [], set()
    batches = list(loader)
    for batch in batches:
        shapes.add(tuple(batch["input_ids"].shape))
        for ids, labels, mask, n, score in zip(
            *(batch[k] for k in ("input_ids", "labels", "attention_mask", "n", "score")), strict=True
        ):
            i = int(score)
            seen.append(i)
            assert int(mask.sum()) == int(n)
            assert ids[: int(n)].tolist() == samples[i]["input_ids"]
            assert labels.tolist() == samples[i]["labels"] + [-100] * (len(ids) - int(n))
            assert not ids[int(n) :].any()
    assert sorted(seen) == list(range(200))
    assert len(batches) == len(loader) == 29
    assert len(shapes) <= 4
    assert {length for _, length in shapes} <= set(loader.plan().shapes)


def test_max_tokens_makes_batches_of_about_one_cost():
    loader = DSDataLoader(_dicts(300), batching="buckets", multiple=8, max_tokens=128, shuffle=True, seed=0)
    sizes = [batch["input_ids"].numel() for batch in loader]
    assert max(sizes) <= 128
    assert loader.batch_size is None
    capped = DSDataLoader(_dicts(300), batching="buckets", multiple=8, max_tokens=128, batch_size=5)
    assert max(len(batch["n"]) for batch in capped) == 5


def test_drop_last_leaves_full_batches_only():
    for batching in ("buckets", "packed"):
        loader = DSDataLoader(
            _dicts(50), batching=batching, max_length=40, batch_size=6, drop_last=True, shuffle=True, seed=0
        )
        batches = list(loader)
        assert {len(b["input_ids"]) for b in batches} == {6}
        assert len(batches) == len(loader)


def test_auto_looks_at_the_samples():
    ragged, even = _dicts(), [{"x": torch.zeros(3), "y": i} for i in range(9)]
    assert DSDataLoader(ragged, batching="auto").batching == "buckets"
    assert DSDataLoader(even, batching="auto").batching == "fixed"
    assert DSDataLoader(ragged, batching="auto", collate_fn=len).batching == "fixed"
    assert DSDataLoader(["a", "bc"], batching="auto").batching == "fixed"
    assert DSDataLoader(Stream(ragged), batching="auto").batching == "fixed"
    assert "differ in length" in DSDataLoader(ragged, batching="auto").report.notes[0]


def test_ragged_samples_in_fixed_batches_fail_as_in_torch():
    with pytest.raises(RuntimeError, match="each element in list of batch should be of equal size"):
        list(DSDataLoader(_dicts(), batch_size=8))


def test_samples_may_be_tuples_or_token_lists():
    pairs = [(torch.arange(1, n + 1), torch.arange(1, n + 1) * 10) for n in (3, 5, 2)]
    ((ids, labels),) = DSDataLoader(pairs, batching="buckets", multiple=4, batch_size=3)
    assert ids.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]]
    assert labels[0].tolist() == [10, 20, 30] + [-100] * 5
    (batch,) = DSDataLoader(pairs, batching="packed", max_length=5, batch_size=3)
    args, kwargs, labels = unpack_batch(batch)
    assert not args
    assert sorted(kwargs) == ["input_ids", "position_ids", "sequence_ids"]
    assert labels.shape == kwargs["input_ids"].shape == (2, 5)
    by_sample = [(torch.ones(n), n) for n in (3, 5, 2)]
    (batch,) = DSDataLoader(by_sample, batching="packed", max_length=5, batch_size=3)
    assert batch[1].shape == (2, 2)
    assert sorted(batch[1].flatten().tolist()) == [-100, 2, 3, 5]
    (batch,) = DSDataLoader([[7, 8], [9]], batching="packed", max_length=4)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 0]]
    (batch,) = DSDataLoader([[7, 8], [9]], batching="buckets", multiple=2, batch_size=2)
    assert batch.tolist() == [[7, 8], [9, 0]]


def test_tokens_may_be_vectors():
    samples = [{"x": torch.full((n, 2), float(n)), "y": n} for n in (3, 1)]
    (batch,) = DSDataLoader(samples, batching="packed", max_length=4)
    assert batch["x"].shape == (1, 4, 2)
    assert batch["x"][0, :, 0].tolist() == [3, 3, 3, 1]


def test_fillings_can_be_given():
    (batch,) = DSDataLoader(
        [{"input_ids": [5], "labels": [1]}, {"input_ids": [5, 6], "labels": [1, 2]}], batching="buckets",
        batch_size=2, multiple=2, padding={"input_ids": 9, "labels": -1},
    )  # fmt: skip
    assert batch["input_ids"].tolist() == [[5, 9], [5, 6]]
    assert batch["labels"].tolist() == [[1, -1], [1, 2]]


def test_a_models_shift_never_crosses_samples():
    samples = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    (batch,) = DSDataLoader(samples, batching="packed", max_length=6, model_shifts_labels=True)
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100]]


def test_lengths_come_from_the_dataset_a_field_or_a_function():
    class Known(Dataset):
        lengths = (2, 3, 4)
        read = 0

        def __len__(self):
            return 3

        def __getitem__(self, i):
            self.read += 1
            return {"input_ids": [1] * self.lengths[i], "other": [2] * 7}

    data = Known()
    loader = DSDataLoader(data, batching="packed", max_length=9)
    assert len(loader) == 1
    assert data.read <= 3  # to see the fields, not the lengths
    by_field = DSDataLoader(_dicts(), batching="packed", max_length=64, length="labels")
    by_function = DSDataLoader(_dicts(), batching="packed", max_length=64, length=lambda s: s["n"])
    assert len(by_field) == len(by_function)
    with pytest.raises(InputError, match=r"length='text' is no field of the samples; they have \['input_ids'"):
        len(DSDataLoader(_dicts(), batching="packed", max_length=64, length="text"))
    data.lengths = (1,)
    with pytest.raises(InputError, match="1 entries, and the dataset has 3"):
        len(DSDataLoader(data, batching="packed", max_length=9))


def test_looking_for_lengths_draws_nothing():
    class Drawing(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            torch.rand(1)
            return [1] * (i + 1)

    before = torch.get_rng_state()
    len(DSDataLoader(Drawing(), batching="packed", max_length=8))
    DSDataLoader(Drawing(), batching="auto")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("batching", ["packed", "buckets"])
def test_too_long_samples(stream, batching):
    samples = [{"input_ids": [i] * n} for i, n in enumerate((3, 30, 5), start=1)]
    arguments = {"batching": batching, "max_length": 8, "batch_size": 4}
    if stream and batching == "buckets":
        arguments["shapes"] = (8,)

    def loader(**more):
        return DSDataLoader(Stream(samples) if stream else samples, **arguments, **more)

    with pytest.raises(InputError, match=r"sample 1 has 30 tokens, more than max_length=8.*truncate"):
        list(loader())
    for too_long, kept in (("truncate", [3, 8, 5]), ("skip", [3, 5])):
        mine = loader(too_long=too_long)
        tokens = torch.cat([b["input_ids"].flatten() for b in mine])
        counts = [int((tokens == i).sum()) for i in (1, 2, 3)]
        assert [c for c in counts if c] == kept
        assert mine.report["samples too long"].after == 1
        assert "1 samples of more than 8 tokens" in mine.report.skipped[0][0]


def test_what_cannot_be_planned_is_named():
    def refused(samples, message, **more):
        with pytest.raises(InputError, match=message):
            list(DSDataLoader(samples, **{"batching": "packed", "max_length": 8, **more}))

    refused([[1], [], [2]], "sample 1 has no tokens")
    refused([{"text": "abc"}], "tokenise the texts first")
    refused([{"ids": [1, 2]}, {"other": [1]}], "differ in their fields|no tokens in field")
    refused([], "the dataset is empty")
    refused([[1] * 20, [1] * 30], "every sample has more than", too_long="skip")
    refused([[1.5, 2.5], "text"], "type str was given")


def test_a_dataset_whose_lengths_change_is_noticed():
    class Growing(Dataset):
        grown = 0

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return [1] * (4 + self.grown)

    for batching in ("packed", "buckets"):
        data = Growing()
        loader = DSDataLoader(data, batching=batching, max_length=8, multiple=4, batch_size=2)
        len(loader)
        data.grown = 3
        with pytest.raises(InputError, match="longer now than when"):
            list(loader)


def test_what_excludes_each_other_is_refused():
    samples = _dicts()

    def refused(message, dataset=samples, **arguments):
        with pytest.raises(ConfigError, match=message):
            DSDataLoader(dataset, **arguments)

    refused("needs max_length", batching="packed")
    refused("one of 'auto', 'fixed', 'buckets', 'packed'", batching="rows")
    refused("one of 'error', 'truncate', 'skip'", batching="packed", max_length=8, too_long="cut")
    refused("max_length=0", batching="packed", max_length=0)
    refused("belongs to length buckets or packing", max_length=8)
    refused("are for batching='buckets'", batching="packed", max_length=8, max_tokens=64)
    refused("decides itself", batching="buckets", batch_size=None)
    refused("leave collate_fn out", batching="packed", max_length=8, collate_fn=len)
    refused("needs shapes", Stream(samples), batching="buckets")
    refused("shapes=", batching="buckets", shapes=(0,))
    refused("device='tpu'|'cuda' or left", device="meta")
    if not torch.cuda.is_available():
        refused("no CUDA device", device="cuda")
    with pytest.raises(ConfigError, match="is for batching"):
        DSDataLoader(samples).plan()


def test_a_collate_function_sees_the_samples_of_a_bucket():
    loader = DSDataLoader(_dicts(), batching="buckets", multiple=8, batch_size=4, collate_fn=lambda s: s)
    for batch in loader:
        lengths = [s["n"] for s in batch]
        assert len(batch) <= 4
        assert max(lengths) <= 40


def test_samplers_that_draw_some_samples_only_have_no_length_beforehand():
    sampler = WeightedRandomSampler([1.0] * 60, 25)
    loader = DSDataLoader(_dicts(), batching="packed", max_length=64, sampler=sampler)
    with pytest.raises(TypeError, match="which samples the sampler draws"):
        len(loader)
    ids = [int(i) for b in loader for i in b["sequence_ids"].amax(1)]
    assert sum(ids) == 25


def test_streams_are_packed_and_counted():
    samples = _dicts(200)
    loader = DSDataLoader(Stream(samples), batching="packed", max_length=80, batch_size=3, window=4)
    found = {}
    for batch in loader:
        found |= _unpacked(batch)
    assert sorted(found) == list(range(200))
    assert loader.report["samples"].after == 200
    assert loader.report["fill"].after > 0.85
    with pytest.raises(TypeError, match="no length before it is read"):
        len(loader)


def test_streams_are_bucketed():
    loader = DSDataLoader(Stream(_dicts(100)), batching="buckets", shapes=(8, 40), batch_size=6)
    seen, shapes = [], set()
    for batch in loader:
        shapes.add(tuple(batch["input_ids"].shape))
        seen += batch["score"].tolist()
    assert sorted(seen) == list(range(100))
    assert len(shapes) <= 3


def test_an_empty_stream_gives_nothing():
    assert list(DSDataLoader(Stream([]), batching="packed", max_length=8)) == []


def test_subsets_and_single_batches():
    part = Subset(_dicts(), [3, 5, 9])
    (batch,) = DSDataLoader(part, batching="packed", max_length=200, batch_size=50)
    assert sorted(_unpacked(batch)) == [3, 5, 9]


def test_the_largest_batch_of_buckets_is_known_beforehand():
    texts = [{"input_ids": [1] * n} for n in [3] * 8 + [16] * 6 + [40] * 9]
    state = torch.get_rng_state()
    for options in ({"batch_size": 4}, {"max_tokens": 64, "batch_size": 4}, {"batch_size": 4, "drop_last": True}):
        loader = DSDataLoader(texts, batching="buckets", multiple=8, shuffle=True, seed=1, **options)
        largest = loader.largest_batch()["input_ids"]
        assert loader.passes_begun == 0
        assert largest.numel() == max(batch["input_ids"].numel() for batch in loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert DSDataLoader(texts, batching="packed", max_length=64).largest_batch() is None
    assert DSDataLoader(list(range(4))).largest_batch() is None
