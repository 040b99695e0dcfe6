"""Number formats: the words in which quantisation is spoken of. Packing and kernels live elsewhere.

An `IntFormat` maps real numbers to integers; a `LayerFormat` says how one layer is kept and computed. The neutral form
of each (explicit quantize and dequantize nodes in the graph) is described in docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from .errors import ConfigError

#: Precisions of a program with quantised layers: all of 8 bits, all of 4 bits, or several formats in one.
QUANTISED = ("int8", "int4", "mixed")
#: Precisions a Program or an Artifact may name.
PRECISIONS = ("fp64", "fp32", "bf16", "fp16", *QUANTISED)
#: Weights that may share one scale in a 4-bit format.
GROUP_SIZES = (32, 64, 128)


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
#: Stored integers of the 4-bit formats; a group's zero point is one of them.
UINT4 = (0, 15)


@dataclass(frozen=True, kw_only=True)
class LayerFormat:
    """How a layer's weights are stored, and in what it is computed. One of the classes below.

    Attributes:
        version: of the format's meaning, stored with it.

    Example:
        >>> [str(f) for f in (Float32(), Int8Static(), Int4Weight(group_size=32))]
        ['float32', 'int8-static', 'int4-weight-g32']
        >>> LayerFormat.from_dict({"format": "int4-dynamic", "group_size": 128})
        Int4Dynamic(version=1, group_size=128, symmetric=False)
    """

    version: int = 1
    name: ClassVar[str] = ""
    #: Bits of a stored weight.
    weight_bits: ClassVar[int] = 32
    #: What the layer is multiplied with: "float", "static" (int8, ranges fixed by calibration), or "dynamic" (int8,
    #: ranges found at each call).
    activation: ClassVar[str] = "float"

    def __post_init__(self) -> None:
        if type(self) is LayerFormat:
            raise ConfigError(f"LayerFormat() is the base of the formats; take one of {sorted(FORMATS)}.")
        if self.version != 1:
            raise ConfigError(f"{type(self).__name__}(version={self.version!r}): this release knows version 1.")

    def __str__(self) -> str:
        return self.name

    @property
    def is_quantised(self) -> bool:
        """Whether weights are stored as integers."""
        return self.weight_bits <= 8

    def weight_bytes(self, out: int, inputs: int) -> int:
        """Bytes of a weight of `out` rows of `inputs` numbers, with its scales and zero points; no bias."""
        return out * inputs * self.weight_bits // 8 + (5 * out if self.is_quantised else 0)

    def to_dict(self) -> dict[str, Any]:
        """The format as plain values, for `from_dict`."""
        return {"format": self.name, **asdict(self)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LayerFormat:
        """The format that `to_dict` wrote, or a shorter description of it.

        Raises:
            ConfigError: an unknown format, field, version or value.
        """
        rest = dict(values)
        kind = FORMATS.get(rest.pop("format", ""))
        if kind is None:
            raise ConfigError(f"the layer format {values.get('format')!r} is unknown; there are {sorted(FORMATS)}.")
        if unknown := sorted(set(rest) - {f.name for f in fields(kind)}):
            raise ConfigError(f"the layer format {kind.name!r} has no field {unknown[0]!r}.")
        return kind(**rest)


@dataclass(frozen=True, kw_only=True)
class Float32(LayerFormat):
    """The layer as it was."""

    name: ClassVar[str] = "float32"


@dataclass(frozen=True, kw_only=True)
class BFloat16(LayerFormat):
    """Weights and computation in bfloat16; the layer takes and gives float32."""

    name: ClassVar[str] = "bfloat16"
    weight_bits: ClassVar[int] = 16


@dataclass(frozen=True, kw_only=True)
class Int8Static(LayerFormat):
    """int8 weights, one scale an output channel; int8 activations, their ranges fixed by calibration."""

    name: ClassVar[str] = "int8-static"
    weight_bits: ClassVar[int] = 8
    activation: ClassVar[str] = "static"


@dataclass(frozen=True, kw_only=True)
class Int8Dynamic(LayerFormat):
    """int8 weights, one scale an output channel; int8 activations, their range found at each call."""

    name: ClassVar[str] = "int8-dynamic"
    weight_bits: ClassVar[int] = 8
    activation: ClassVar[str] = "dynamic"


@dataclass(frozen=True, kw_only=True)
class Int8Weight(LayerFormat):
    """int8 weights, one scale an output channel; float activations."""

    name: ClassVar[str] = "int8-weight"
    weight_bits: ClassVar[int] = 8


@dataclass(frozen=True, kw_only=True)
class Int4Format(LayerFormat):
    """4-bit weights in groups along the inputs, each group with a scale and a zero point of its own.

    Attributes:
        group_size: 32, 64 or 128 weights.
        symmetric: all zero points in the middle of the range, as some engines want it; else each group's own.
    """

    group_size: int = 64
    symmetric: bool = False
    weight_bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self) is Int4Format:
            raise ConfigError("Int4Format() is the base of two formats; take Int4Weight() or Int4Dynamic().")
        if self.group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, GROUP_SIZES))
            raise ConfigError(f"{type(self).__name__}(group_size={self.group_size!r}): one of {allowed} is needed.")

    def __str__(self) -> str:
        return f"{self.name}-g{self.group_size}{'-symmetric' if self.symmetric else ''}"

    def weight_bytes(self, out: int, inputs: int) -> int:
        """Bytes of a weight of `out` rows of `inputs` numbers, with its scales and zero points; no bias."""
        return out * inputs // 2 + 5 * out * (inputs // self.group_size)


@dataclass(frozen=True, kw_only=True)
class Int4Weight(Int4Format):
    """4-bit weights in groups; float activations."""

    name: ClassVar[str] = "int4-weight"


@dataclass(frozen=True, kw_only=True)
class Int4Dynamic(Int4Format):
    """4-bit weights in groups; int8 activations, their range found at each call."""

    name: ClassVar[str] = "int4-dynamic"
    activation: ClassVar[str] = "dynamic"


#: The layer formats by name.
FORMATS: dict[str, type[LayerFormat]] = {
    kind.name: kind for kind in (Float32, BFloat16, Int8Static, Int8Dynamic, Int8Weight, Int4Weight, Int4Dynamic)
}
