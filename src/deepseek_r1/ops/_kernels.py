"""An operator's passes on torch tensors: allocate, pack, run. Knows a library and tensors, not torch's dispatcher."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..core import InputError
from ._library import (
    BACKWARD,
    DERIVATIVE,
    DTYPES,
    FORWARD,
    MAX_DIMS,
    NO_TENSOR,
    Description,
    Library,
    Team,
    pack_tensor,
)
from ._shapes import output_shapes

_NUMBER = {getattr(torch, name): i for i, name in enumerate(DTYPES)}
_DEVICE = {"cpu": 0, "cuda": 1}


@cache
def torch_team() -> Team:
    """torch's own OpenMP threads, so that an operator shares them instead of competing with them."""
    try:
        functions = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        found = [ctypes.cast(getattr(functions, name), ctypes.c_void_p).value or 0 for name in names]
    except (OSError, AttributeError):  # a torch built on other threads; the library then starts its own
        return Team()
    return Team(*found)


class Kernels:
    """Forward, its allocation alone, and the gradients of one operator."""

    def __init__(self, library: Library, name: str) -> None:
        self.library = library
        self.name = name
        self.about: Description = library.ops[name][1]
        self._shape_text = functools.lru_cache(maxsize=64)(functools.partial(library.shape, name))

    def allocate(self, inputs: Sequence[torch.Tensor], attributes: Sequence[Any]) -> list[torch.Tensor]:
        """Outputs with nothing in them yet; also what tracing sees.

        Raises:
            InputError: the inputs' dtypes, devices or shapes do not fit.
        """
        self._check(inputs)
        dtype = functools.reduce(torch.promote_types, [t.dtype for t in inputs])
        if self.about.output_dtype:
            dtype = getattr(torch, self.about.output_dtype)
        first = inputs[0]
        if self.about.shape:
            text = self._shape_text(tuple(t.ndim for t in inputs), tuple(attributes))
            shapes = output_shapes(text, [t.shape for t in inputs])
            return [torch.empty(s, dtype=dtype, device=first.device) for s in shapes]
        if all(t.shape == first.shape for t in inputs[1:]):
            return [torch.empty_like(first, dtype=dtype, requires_grad=False) for _ in range(self.about.outputs)]
        try:
            shape = torch.broadcast_shapes(*[t.shape for t in inputs])
        except RuntimeError as e:
            shapes_given = ", ".join(str(tuple(t.shape)) for t in inputs)
            raise InputError(f"the operator {self.name!r}: the inputs' shapes do not broadcast: {shapes_given}") from e
        return [torch.empty(shape, dtype=dtype, device=first.device) for _ in range(self.about.outputs)]

    def forward(self, inputs: Sequence[torch.Tensor], attributes: Sequence[Any]) -> list[torch.Tensor]:
        """The outputs."""
        outputs = self.allocate(inputs, attributes)
        self._run(FORWARD, [*inputs, *outputs], attributes)
        return outputs

    def gradients(
        self, gradients: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor],
        attributes: Sequence[Any], wanted: Sequence[bool],
    ) -> list[torch.Tensor]:  # fmt: skip
        """The gradient of each wanted input, laid out as `empty_like` has it; an empty tensor for the others."""
        found = self.allocate_gradients(inputs, wanted)
        if self.about.backward:
            into = [t if w else None for t, w in zip(found, wanted)]
            self._run(BACKWARD, [*gradients, *inputs, *outputs, *into], attributes)
            return found
        try:
            full = torch.broadcast_shapes(*[t.shape for t in (*inputs, *gradients)])
        except RuntimeError as e:
            raise InputError(
                f"the operator {self.name!r} changes shapes, so that its derivative cannot be found; give it a "
                "backward(...)"
            ) from e
        shares: list[list[torch.Tensor | None]] = []
        for x, place, w in zip(inputs, found, wanted):
            if not w:
                shares.append([None] * len(gradients))
            elif full == x.shape and len(gradients) == 1:
                shares.append([place])
            else:
                # What is summed afterwards is kept in at least float32.
                dtype = torch.promote_types(x.dtype, torch.float32)
                shares.append([torch.empty(full, dtype=dtype, device=x.device) for _ in gradients])
        self._run(DERIVATIVE, [*inputs, *gradients, *[s for row in shares for s in row]], attributes)
        for place, row in zip(found, shares):
            given = [s for s in row if s is not None]
            if given and given[0] is not place:
                place.copy_(functools.reduce(torch.add, given).sum_to_size(place.shape))
        return found

    @staticmethod
    def allocate_gradients(inputs: Sequence[torch.Tensor], wanted: Sequence[bool]) -> list[torch.Tensor]:
        """Where the gradients will be."""
        return [torch.empty_like(t) if w else t.new_empty(0) for t, w in zip(inputs, wanted)]

    def _run(self, which: int, tensors: Sequence[torch.Tensor | None], attributes: Sequence[Any]) -> None:
        device = next(t.device for t in tensors if t is not None)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self.library.run(
            self.name, which, [NO_TENSOR if t is None else packed_tensor(t) for t in tensors], attributes,
            threads=torch.get_num_threads(), stream=stream, team=torch_team(),
        )  # fmt: skip

    def _check(self, inputs: Sequence[torch.Tensor]) -> None:
        first = inputs[0]
        for number, t in enumerate(inputs):
            what = f"the operator {self.name!r}, input {number}"
            if str(t.dtype).removeprefix("torch.") not in self.about.dtypes:
                raise InputError(f"{what} has dtype {t.dtype}; it takes {', '.join(self.about.dtypes)}.")
            if t.layout is not torch.strided:
                raise InputError(f"{what} has the layout {t.layout}; give a dense tensor.")
            if t.ndim > MAX_DIMS:
                raise InputError(f"{what} has {t.ndim} dimensions; at most {MAX_DIMS} are possible.")
            if t.device != first.device:
                raise InputError(f"{what} is on {t.device}, input 0 on {first.device}; put them on one device.")
        if first.device.type not in (*self.about.devices, "meta"):
            raise InputError(
                f"the operator {self.name!r} runs on {' and '.join(self.about.devices)}, not on {first.device}. "
                + ("Build its library with --cuda." if first.device.type == "cuda" else "Move the inputs.")
            )


def packed_tensor(t: torch.Tensor) -> bytes:
    """A tensor as the operators' libraries take it; the tensor must outlive what is given."""
    device = t.device
    return pack_tensor(
        t.data_ptr(), t.shape, t.stride(), _NUMBER[t.dtype], _DEVICE[device.type], device.index or 0
    )  # fmt: skip
