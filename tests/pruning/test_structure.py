"""Which channels belong together, and that removing them is the same as switching them off."""

import numpy as np
import pytest
import torch
from torch import nn

from deepseek_r1.core import Report
from deepseek_r1.graph import capture
from deepseek_r1.models import DigitsNet
from deepseek_r1.pruning._masked import masked_answers
from deepseek_r1.pruning._structure import structure_of
from deepseek_r1.pruning._surgery import EXACT, Trial, answers, plan_of, settle

from .nets import EVERY, IDS, IMAGE, Encoder, Sized, Tied, grouped, half_of, inverted, residual


def _settled(model, example):
    report = Report("test")
    return settle(model.eval(), structure_of(model, example), report), report


@pytest.mark.parametrize("name", EVERY)
def test_removing_is_switching_off(name):
    build, example = EVERY[name]
    model = build().eval()
    structure, _ = _settled(model, example)
    assert structure.groups
    trial = Trial(model, structure, jitter=True)
    rng = np.random.default_rng(0)
    for _ in range(3):
        chosen = [rng.permutation(g.units)[: rng.integers(0, g.size)] for g in structure.groups]
        removed = structure.mask(np.concatenate(chosen))
        verdict = trial(removed, structure.counts)
        assert verdict.holds, verdict.reason
        assert verdict.error <= EXACT
    plan = plan_of(structure, removed, structure.counts)
    cut = plan.apply(model)
    # What is left can be trained, saved and captured like any module.
    assert type(cut) is type(model)
    cut.train()(example).sum().backward()
    plan.apply(build()).load_state_dict(cut.state_dict())
    assert capture(cut.eval(), example)(example).shape == model(example).shape


@pytest.mark.parametrize("name", EVERY)
def test_a_wrong_cut_is_noticed(name):
    build, example = EVERY[name]
    model = build().eval()
    structure, _ = _settled(model, example)
    trial = Trial(model, structure, jitter=True)
    removed = half_of(structure, structure.groups)
    other = structure.mask(np.concatenate([g.units[0::2][: len(g.units[1::2])] for g in structure.groups]))
    right = trial(removed, structure.counts)
    assert right.holds
    cut = plan_of(structure, other, structure.counts).apply(trial.model)
    assert not trial.judge(answers(cut, structure), masked_answers(structure, removed, trial.state)).holds


def test_groups_of_a_residual_network():
    structure, _ = _settled(residual(), IMAGE)
    sizes = {g.name: (g.size, len(g.members)) for g in structure.groups}
    # The stem's channels lie in the block behind it, through the addition; inner ones in their own block only.
    assert sizes == {"0": (8, 10), "1.a": (8, 6), "2.a": (16, 6), "2.b": (16, 8)}
    assert structure.pinned == {"5": "it is an output of the model"}


def test_depthwise_and_gates_leave_with_their_channels():
    structure, _ = _settled(inverted(), IMAGE)
    members = {m[0] for m in structure.group("1.expand.0").members}
    assert {"1.depth.0.weight", "1.down.weight", "1.up.weight", "1.up.bias", "1.project.0.weight"} <= members
    cut = plan_of(structure, half_of(structure, [structure.group("1.expand.0")])).apply(inverted())
    assert (cut[1].depth[0].groups, cut[1].depth[0].in_channels, cut[1].depth[1].num_features) == (12, 12, 12)


def test_flattened_maps_leave_as_a_whole():
    structure, _ = _settled(inverted(), IMAGE)
    assert ("5.weight", 1, 4) in structure.group("0").members


def test_whole_groups_or_places_of_each():
    structure, _ = _settled(grouped(), IMAGE)
    assert {g.name: (g.size, g.width) for g in structure.groups} == {"0": (8, 4), "4": (12, 2), "6": (12, 2)}
    cut = plan_of(structure, half_of(structure, structure.groups)).apply(grouped())
    assert (cut[1].num_groups, cut[2].groups, cut[2].in_channels) == (4, 4, 16)
    assert (cut[5].num_groups, cut[6].groups, cut[6].in_channels) == (2, 2, 12)


def test_heads_and_gated_units():
    structure, _ = _settled(Encoder(), IDS)
    assert structure.group("blocks.0.attention.qkv").size == 4
    assert structure.group("blocks.0.attention.qkv").width == 18
    assert {m[0] for m in structure.group("blocks.1.gate").members} == {
        "blocks.1.gate.weight", "blocks.1.up.weight", "blocks.1.down.weight",
    }  # fmt: skip
    cut = plan_of(structure, half_of(structure, structure.groups)).apply(Encoder())
    assert cut.blocks[0].attention.heads == 2
    assert cut.blocks[0].norm1.normalized_shape == (12,)


def test_integers_that_the_code_needs_are_found():
    build, example = EVERY["by_hand"]
    structure, report = _settled(build(), example)
    assert len(structure.groups) == 5
    assert any("attention.total follows" in note for note in report.notes)
    cut = plan_of(structure, half_of(structure, [structure.group("blocks.0.attention.q")])).apply(build())
    assert (cut.blocks[0].attention.n_heads, cut.blocks[0].attention.total) == (2, 12)
    assert (cut.blocks[1].attention.n_heads, cut.blocks[1].attention.total) == (4, 24)


def test_a_size_in_the_code_pins_its_group_and_is_said():
    structure, report = _settled(Sized(), torch.randn(4, 6))
    assert {g.name for g in structure.groups} == {"first", "a"}
    assert "does not follow" in structure.pinned["fixed"]
    assert any(note.startswith("left follows") for note in report.notes)


def test_tied_weights_stay_tied():
    structure, _ = _settled(Tied(), IDS)
    cut = plan_of(structure, half_of(structure, structure.groups)).apply(Tied())
    assert cut.head.weight is cut.embed.weight
    assert (cut.embed.embedding_dim, cut.head.in_features, cut.norm.normalized_shape) == (8, 8, (8,))


def test_the_digits_network():
    model = DigitsNet(width=8).eval()
    structure, _ = _settled(model, torch.randn(2, 1, 8, 8))
    assert len(structure.groups) == 5


def test_an_operator_that_is_not_understood_pins_and_is_named():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()).sort(-1).values)

    structure, _ = _settled(Sorted(), torch.randn(3, 4))
    assert [g.name for g in structure.groups] == ["a"]
    assert "aten.sort.default is not understood" in structure.pinned["b"]


def test_skipped_layers_keep_their_channels():
    structure = structure_of(residual().eval(), IMAGE, skip=("1.a",))
    assert "1.a" not in {g.name for g in structure.groups}
    assert structure.pinned["1.a"] == "'1.a' is in the skip list"


def test_softmax_over_channels_pins_them():
    model = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 2)).eval()
    assert "softmax" in structure_of(model, torch.randn(2, 4)).pinned["0"]
