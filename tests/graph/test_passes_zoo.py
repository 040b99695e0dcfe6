"""Every architecture of the zoo, simplified, answers as before at any size, and no pass is refused on it."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree
from zoo import ENTRIES, entry

from deepseek_r1.graph import as_inputs, capture, simplify

#: A few at every run; the others take a minute together.
QUICK = {"resnet50", "gpt2_decode", "lstm_classifier", "unet"}


def run(function, inputs):
    args, kwargs = as_inputs(inputs)
    with torch.no_grad():
        return pytree.tree_leaves(function(*args, **kwargs))


@pytest.mark.parametrize(
    "name", [e.name if e.name in QUICK else pytest.param(e.name, marks=pytest.mark.slow) for e in ENTRIES]
)
def test_a_simplified_architecture_answers_as_before(name):
    one = entry(name)
    program = capture(*one.make(small=True))
    after = simplify(program)
    assert after.report.skipped == []
    assert after is program or after.report["operators"].after >= 1
    for batch, length in ((1, None), (3, None if one.length is None else one.small_length + 1)):
        inputs = one.inputs(small=True, batch=batch, length=length)
        for a, b in zip(run(after, inputs), run(program, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
