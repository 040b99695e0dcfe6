"""What the benchmarks of quantisation compare with: intervals, frontiers, data that never overlap, descriptions."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_r1.core import FORMATS, LayerFormat
from quantization import corpora, effective_bits, intervals, nets, page, search, sources, train

_numbers = st.floats(-100, 100, allow_nan=False)


@given(st.lists(_numbers, min_size=2, max_size=30), st.integers(0, 1000))
def test_an_interval_holds_its_mean_and_nothing_differs_from_itself(losses, seed):
    assert intervals.mean_difference(losses, losses, seed=seed) == (0.0, 0.0, 0.0)
    low, mean, high = intervals.mean_difference(losses, [0.0] * len(losses), seed=seed)
    assert mean == pytest.approx(np.mean(losses), abs=1e-9)
    assert min(losses) - 1e-9 <= low <= high <= max(losses) + 1e-9


def test_samples_of_one_photograph_count_as_one():
    draw = np.random.default_rng(0)
    clusters = np.repeat(np.arange(6), 50)
    losses = draw.normal(size=6)[clusters] + 0.01 * draw.normal(size=300)
    alone = intervals.mean_difference(losses, np.zeros(300))
    together = intervals.mean_difference(losses, np.zeros(300), clusters)
    assert together[2] - together[0] > 3 * (alone[2] - alone[0])


_points = st.lists(
    st.fixed_dictionaries({"loss": st.floats(0, 10), "latency": st.floats(0.1, 10)}), min_size=1, max_size=12
)


@given(_points)
def test_the_frontier_is_what_nobody_beats(points):
    named = {str(i): p for i, p in enumerate(points)}
    kept = search.frontier(named)
    for label, point in named.items():
        beaten = any(
            named[k]["loss"] <= point["loss"] and named[k]["latency"] <= point["latency"] for k in kept if k != label
        )
        assert beaten or label in kept


@given(_points, _points)
def test_who_is_better_at_equal_latency_and_at_equal_loss(ours, others):
    for other in others:
        found = search.against(ours, other)
        fast = [p for p in ours if p["latency"] <= other["latency"] * (1 + search.EQUAL)]
        assert found["lower_loss"] == any(p["loss"] < other["loss"] for p in fast)
        if found["lower_latency"]:
            assert found["latency_at_equal_loss"] < other["latency"]


def test_a_prediction_is_judged_by_its_error_and_its_order():
    found = search.prediction_quality([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    assert found["mape"] == pytest.approx(0.1)
    assert found["spearman"] == pytest.approx(1.0)
    assert search.prediction_quality([3.0, 2.0, 1.0], [1.0, 2.0, 3.0])["spearman"] == pytest.approx(-1.0)


def test_neighbours_and_what_two_embeddings_share():
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert float(nets.retrieval_hits(rows, rows).min()) == 1.0
    assert float(nets.retrieval_hits(3 * rows, rows).min()) == 1.0, "the length of an embedding does not matter"
    assert not bool((nets.neighbours(rows) == torch.arange(40)[:, None]).any()), "nobody is his own neighbour"
    other = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    assert float(nets.retrieval_hits(other, rows).mean()) < 0.6


def test_what_calibrates_does_not_judge():
    assert not set(sources.CALIBRATION_PHOTOGRAPHS) & set(sources.HELD_OUT_PHOTOGRAPHS)
    assert not set(sources.CALIBRATION_RECORDINGS) & set(sources.HELD_OUT_RECORDINGS)
    image = corpora.photograph("chelsea")
    trained, held_out = train.photo_side("chelsea", True), train.photo_side("chelsea", False)
    assert torch.equal(torch.cat([trained, held_out], 2), image)


def test_pictures_depend_on_their_seed_alone():
    x, y = corpora.glyphs(8, "train", 5)
    again, _ = corpora.glyphs(8, "train", 5)
    assert torch.equal(x, again)
    assert x.shape == (8, 1, 32, 32)
    assert float(x.abs().max()) <= 1
    assert not torch.equal(x, corpora.glyphs(8, "train", 6)[0])
    assert int(y.max()) < len(corpora.LETTERS)
    assert float(corpora.letters("held-out").flatten(2).sum(2).min()) > 0, "every letter has ink"


def test_photographs_are_cut_with_their_clusters():
    crops, clusters = sources.photograph_crops(("chelsea", "coffee"), 2, seed=0)
    assert crops.shape == (4, 3, 224, 224)
    assert clusters == [0, 1, 0, 1]


@pytest.mark.parametrize("name", sorted(n for n, kind in FORMATS.items() if kind().is_quantised))
def test_formats_are_told_apart_in_the_words_of_a_peer(name):
    own = json.dumps(effective_bits._signature(effective_bits.recipe(FORMATS[name]())), sort_keys=True)
    others = [f() for n, f in FORMATS.items() if n != name and f().is_quantised]
    assert own not in [json.dumps(effective_bits._signature(effective_bits.recipe(f)), sort_keys=True) for f in others]


def test_an_assignment_survives_json():
    for fmt in search.FORMATS:
        assert LayerFormat.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt


def test_a_peer_that_failed_has_a_row():
    row = {"name": "net", "metric": "accuracy", "higher_is_better": True, "rivals": {"NNCF": {"failed": "no | such"}}}
    head, body, below = page.ptq({"rows": [row]})
    assert len(body[0]) == len(head)
    assert "no / such" in body[0][2]
    assert below == []
