"""Two 4-bit numbers in a byte, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_r1.core import InputError
from deepseek_r1.ops import pack_uint4, unpack_uint4


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 5), max_size=3), half=st.integers(0, 9), seed=st.integers(0, 99))
def test_packing_loses_nothing_and_halves_the_bytes(shape, half, seed):
    values = torch.randint(0, 16, (*shape, 2 * half), generator=torch.Generator().manual_seed(seed))
    packed = pack_uint4(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, half)
    assert torch.equal(unpack_uint4(packed).long(), values)


@pytest.mark.parametrize(
    ("values", "message"), [([1, 2, 3], "even length"), ([16, 0], "given 0 to 16"), ([-1, 0], "given -1 to 0")]
)
def test_what_does_not_fit(values, message):
    with pytest.raises(InputError, match=message):
        pack_uint4(torch.tensor(values))
