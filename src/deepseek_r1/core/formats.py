"""Number formats: the words in which quantisation is spoken of. Packing and kernels live elsewhere.

The neutral form (see docs/architecture.md): activations affine int8 per tensor, weights symmetric int8 per output
channel, as explicit quantize/dequantize pairs in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError

#: Precisions a Program or an Artifact may name.
PRECISIONS = ("fp64", "fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class IntFormat:
    """A signed integer format with an affine or symmetric mapping: real = scale * (stored - zero_point).

    Attributes:
        bits: width of the stored integer, 2 to 8.
        symmetric: zero point fixed at 0, and the most negative code unused (as ONNX Runtime's kernels expect).
        per_channel: one scale for each output channel instead of one for the tensor.

    Example:
        >>> IntFormat(bits=8, symmetric=True).range
        (-127, 127)
        >>> IntFormat(bits=8, symmetric=False).range
        (-128, 127)
    """

    bits: int = 8
    symmetric: bool = True
    per_channel: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"IntFormat(bits={self.bits!r}): 2 to 8 bits are allowed.")

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest stored integer."""
        half = 2 ** (self.bits - 1)
        return (-half + 1 if self.symmetric else -half), half - 1


#: Activations of the neutral int8 form.
INT8_ACTIVATION = IntFormat(bits=8, symmetric=False, per_channel=False)
#: Weights of the neutral int8 form.
INT8_WEIGHT = IntFormat(bits=8, symmetric=True, per_channel=True)
