"""An operator whose inputs are known but for the first: what can be prepared is prepared once.

For graphs that are run operator by operator and many times: a call takes a third of the time of one through torch's
dispatcher. There is no autograd and no tracing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from ._kernels import packed_tensor, torch_team
from ._library import FORWARD
from ._register import kernels_of
from ._shapes import output_shapes


class BoundOp(torch.nn.Module):
    """A registered operator of one output with all inputs but the first, and all attributes, given.

    Args:
        name: of the operator.
        fixed: the other inputs, contiguous tensors on the CPU.
        attributes: all of them, in their order.
        dtype: of the first input and of the output.

    Raises:
        InputError: no such operator; in a call, what the operator itself refuses.
    """

    def __init__(
        self, name: str, fixed: Sequence[torch.Tensor], attributes: Sequence[Any], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self._kernels, self._dtype = kernels_of(name), dtype
        # Held, because the operator is given their addresses.
        self._fixed, self._attributes = tuple(fixed), tuple(attributes)
        self._packed = [packed_tensor(t) for t in fixed]
        self._shape = lru_cache(maxsize=64)(self._output_shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The operator on `x`."""
        if x.dtype is not self._dtype or x.device.type != "cpu" or x.layout is not torch.strided:
            return self._kernels.forward((x, *self._fixed), self._attributes)[0]
        result = torch.empty(self._shape(x.shape), dtype=self._dtype)
        self._kernels.library.run(
            self._kernels.name, FORWARD, [packed_tensor(x), *self._packed, packed_tensor(result)], self._attributes,
            threads=torch.get_num_threads(), team=torch_team(),
        )  # fmt: skip
        return result

    def _output_shape(self, shape: torch.Size) -> list[Any]:
        shapes = [shape, *[t.shape for t in self._fixed]]
        text = self._kernels.library.shape(self._kernels.name, [len(s) for s in shapes], self._attributes)
        return output_shapes(text, shapes)[0]
