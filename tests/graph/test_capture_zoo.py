"""Every architecture of the zoo is captured once and then runs at any batch and length."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree
from zoo import ENTRIES, entry

from deepseek_r1.core import InputError
from deepseek_r1.graph import Program, as_inputs, capture

NAMES = [e.name for e in ENTRIES]


def close(given, wanted):
    given, wanted = pytree.tree_leaves(given), pytree.tree_leaves(wanted)
    assert len(given) == len(wanted)
    for a, b in zip(given, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def run(function, inputs):
    args, kwargs = as_inputs(inputs)
    with torch.no_grad():
        return function(*args, **kwargs)


def sizes(one):
    """(batch, length) to be tried; a length of 1 is a step of a decoder."""
    lengths = [one.small_length] if one.length is None else [one.small_length, one.small_length + 3, 1]
    if one.name == "wav2vec2_base":  # convolutions without padding need some samples
        lengths = [one.small_length, one.small_length + 37]
    return [(batch, length) for batch in (0, 1, 2, 3) for length in lengths]


def compare(one, program, net, *, small, shapes):
    """Asserts equal answers; gives the shapes at which the module itself refuses."""
    refused = []
    for batch, length in shapes:
        inputs = one.inputs(small=small, batch=batch, length=length, seed=batch)
        try:
            wanted = run(net, inputs)
        except RuntimeError:
            refused.append((batch, length))
            continue
        close(run(program, inputs), wanted)
    return refused


@pytest.mark.parametrize("name", NAMES)
def test_one_capture_serves_every_batch_and_length(name):
    one = entry(name)
    net, inputs = one.make(small=True)
    program = capture(net, inputs)
    assert program.report.skipped == []
    shapes = program.input_shapes()
    fixed = [place for place in one.dynamic if not isinstance(shapes[place[0]][place[1]], str)]
    assert not fixed, f"{fixed} of {program.signature}"
    refused = compare(one, program, net, small=True, shapes=sizes(one))
    assert all(batch == 0 for batch, _ in refused), "the module itself runs at every size tried but an empty batch"
    if one.field == "image":
        assert all(isinstance(size, int) for size in shapes[0][1:]), "images keep their size"


@pytest.mark.parametrize("name", ["resnet50", "lstm_classifier", "gpt2_decode", "bert_base"])
def test_a_saved_program_of_the_zoo_answers_the_same(name, tmp_path):
    one = entry(name)
    net, inputs = one.make(small=True)
    again = Program.load(capture(net, inputs).save(tmp_path / "program.dr1"))
    other = one.inputs(small=True, batch=3, length=one.small_length + 1)
    close(run(again, other), run(net, other))


def test_the_length_that_a_position_table_allows_is_known():
    program = capture(*entry("clip_text").make(small=True))
    with pytest.raises(InputError, match=r"(?s)must be .*77; given 78.*Expected: inputs_0: int64\[s\d+, s\d+\] on cpu"):
        program(torch.zeros(2, 78, dtype=torch.long))


@pytest.mark.parametrize("name", NAMES)
def test_real_sizes_are_what_the_zoo_says(name):
    one = entry(name)
    with torch.device("meta"):
        net = one.build(False)
    assert sum(p.numel() for p in net.parameters()) == one.parameters
    told = one.shapes.split("[")[1].split("]")[0]
    first = pytree.tree_leaves(as_inputs(one.inputs()))[0]
    assert told == ", ".join(map(str, first.shape))


def test_the_zoo_is_wide_enough():
    assert len(set(NAMES)) == len(NAMES) >= 20
    assert {e.field for e in ENTRIES} >= {"image", "text", "speech", "table"}
    with pytest.raises(LookupError, match="there are resnet50"):
        entry("resnet51")


@pytest.mark.slow  # minutes: real weights of 34 networks
@pytest.mark.parametrize("name", NAMES)
def test_real_sizes_are_captured_too(name):
    one = entry(name)
    net, inputs = one.make()
    program = capture(net, inputs)
    assert program.report.skipped == []
    longer = [(2, one.length + 5)] if one.length and name != "clip_text" else [(2, one.length)]
    assert compare(one, program, net, small=False, shapes=longer) == []
