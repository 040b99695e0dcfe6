"""Mixtures keep their proportions at every place, terms are found where they stand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.data import DomainAdapter, DomainMixture, DSDataLoader, term_mask

pytestmark = pytest.mark.tiny


class Clinic(DomainAdapter):
    """Never calls super().__init__()."""

    domain_terms = [[7, 8]]

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"input_ids": [7, 8] * (1 + i % 4), "n": i}


def test_a_subclass_needs_no_call_of_super_and_the_base_says_what_is_missing():
    assert Clinic(3)[2]["n"] == 2
    with pytest.raises(NotImplementedError, match="DomainAdapter needs __len__"):
        len(DomainAdapter())
    with pytest.raises(NotImplementedError, match="needs __getitem__"):
        DomainAdapter()[0]


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_proportions_hold_in_every_prefix_of_every_pass(domain, general, n_domain, n_general, epoch):
    if domain + general == 0:
        return
    mixture = DomainMixture(range(n_domain), range(100, 100 + n_general), domain / 10, general / 10, length=40)
    share = domain / (domain + general)
    seen = 0
    for number in range(epoch + 1):
        mixture.set_epoch(number)
        for i in range(40):
            seen += mixture.is_domain(i)
            assert (mixture[i] < 100) == mixture.is_domain(i)
            assert abs(seen - share * (number * 40 + i + 1)) < 1 + 1e-9
            assert type(mixture.is_domain(i)) is bool


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 100))
def test_sources_are_used_up_before_they_come_again(n_domain, n_general, seed):
    mixture = DomainMixture(range(n_domain), range(100, 100 + n_general), seed=seed)
    drawn = {0: [], 1: []}
    for epoch in range(3):
        mixture.set_epoch(epoch)
        for i in range(len(mixture)):
            source, there = mixture.place(i)
            drawn[source].append(there)
    for source, count in ((0, n_domain), (1, n_general)):
        whole = len(drawn[source]) // count
        for cycle in range(whole):
            assert sorted(drawn[source][cycle * count : (cycle + 1) * count]) == list(range(count))


def test_samples_are_found_in_any_order_and_the_seed_decides():
    def samples(seed, order):
        mixture = DomainMixture(range(50), range(100, 120), seed=seed)
        found = {i: mixture[i] for i in order(range(len(mixture)))}
        return [found[i] for i in sorted(found)]

    assert samples(1, list) == samples(1, reversed)
    assert samples(1, list) != samples(2, list)


def test_as_loss_weights_every_sample_counts_by_its_share():
    mixture = DomainMixture(Clinic(3), Clinic(12), mode="loss")
    samples = [mixture[i] for i in range(len(mixture))]
    weights = torch.tensor([s["loss_weight"] for s in samples])
    assert len(samples) == 15
    assert float(weights[:3].sum() / weights.sum()) == pytest.approx(0.7)
    assert float(weights.mean()) == pytest.approx(1.0)
    with pytest.raises(InputError, match="must be dicts, not int"):
        DomainMixture(range(3), range(3), mode="loss")[0]


def test_a_packed_mixture_resumes_in_the_middle_of_its_second_stage():
    def loader():
        mixture = DomainMixture(Clinic(14), Clinic(5), seed=3)
        return DSDataLoader(mixture, batching="packed", max_length=16, batch_size=2)

    first = loader()
    list(first)
    iterator = iter(first)
    next(iterator)
    state, rest = first.state_dict(), [b["n"].tolist() for b in iterator]
    assert first.dataset.epoch == 1
    again = loader()
    again.load_state_dict(state)
    assert [b["n"].tolist() for b in again] == rest


def test_proportions_that_make_no_sense_are_refused():
    for arguments, message in (
        ((-1, 1), "lambda_domain=-1"),
        ((0, 0), "one of the two must not be 0"),
        ((0.7, float("nan")), "lambda_general=nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            DomainMixture(range(3), range(3), *arguments)
    with pytest.raises(ConfigError, match="mode='both'"):
        DomainMixture(range(3), range(3), mode="both")
    with pytest.raises(ConfigError, match="length=0"):
        DomainMixture(range(3), range(3), length=0)
    with pytest.raises(InputError, match="the general dataset is empty"):
        DomainMixture(range(3), range(0))
    assert len(DomainMixture(range(0), range(4), 0, 1)) == 4
    with pytest.raises(IndexError):
        DomainMixture(range(3), range(3))[99]


_terms = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), _terms, st.integers(1, 5))
def test_terms_are_found_as_a_plain_search_finds_them(tokens, terms, samples):
    owners = [1 + i * samples // len(tokens) for i in range(len(tokens))]
    for own in (None, owners):
        expected = [False] * len(tokens)
        for term in terms:
            for i in range(len(tokens) - len(term) + 1):
                inside = own is None or own[i] == own[i + len(term) - 1]
                if tokens[i : i + len(term)] == term and inside:
                    expected[i : i + len(term)] = [True] * len(term)
        given_owners = None if own is None else torch.tensor([own])
        found = term_mask(torch.tensor([tokens]), terms, sequence_ids=given_owners)
        assert found.tolist() == [expected]


def test_terms_that_cannot_be_looked_for():
    with pytest.raises(InputError, match="empty term"):
        term_mask(torch.tensor([1]), [[]])
    with pytest.raises(InputError, match="integers"):
        term_mask(torch.rand(3), [[1]])
    with pytest.raises(InputError, match="one "):
        term_mask(torch.tensor([1, 2]), [[1]], sequence_ids=torch.tensor([1]))
    assert Clinic(1).term_weights(torch.tensor([[7, 7, 8]]), weight=4).tolist() == [[1, 4, 4]]
