"""A library of operators as plain C functions: opened, checked and described. Knows no torch.

The layout of the structures is that of `include/deepseek_r1/core/abi.h`.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import InputError
from ..core.atomic import sha256_file

ABI_VERSION = 1
MAX_DIMS = 16
#: Numbers of `dr1::DType`, by name.
DTYPES = ("float32", "float64", "bfloat16", "float16", "int8", "uint8", "int16", "int32", "int64", "bool")
FORWARD, BACKWARD, DERIVATIVE = 0, 1, 2
_SYMBOLS = ("dr1_abi_version", "dr1_op_count", "dr1_op_describe", "dr1_op_shape", "dr1_op_run")
#: dr1_tensor: data, sizes, strides, ndim, dtype, device type, device index.
_TENSOR = struct.Struct(f"=Q{MAX_DIMS}q{MAX_DIMS}q4i")
_MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_PADDING = [0] * MAX_DIMS
_ERROR_BYTES = 2048


class _Context(ctypes.Structure):
    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("parallel", ctypes.c_void_p),
        ("thread_number", ctypes.c_void_p),
        ("team_size", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Value(ctypes.Union):
    _fields_ = (("real", ctypes.c_double), ("integer", ctypes.c_int64))


class _Call(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint32),
        ("run_pass", ctypes.c_uint32),
        ("context", ctypes.POINTER(_Context)),
        ("attributes", ctypes.POINTER(_Value)),
        ("tensors", ctypes.c_char_p),
        ("tensor_count", ctypes.c_uint64),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_uint64),
    )


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """A number that the caller sets; `kind` is "float", "int" or "bool"."""

    name: str
    kind: str
    default: float | int | bool


@dataclass(frozen=True, kw_only=True)
class Description:
    """What an operator says of itself."""

    name: str
    inputs: int
    outputs: int
    attributes: tuple[Attribute, ...]
    backward: bool
    shape: bool
    dtypes: tuple[str, ...]
    output_dtype: str | None
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Team:
    """Addresses of three functions that lend a thread team; zeros where there is none."""

    parallel: int = 0
    thread_number: int = 0
    team_size: int = 0


def pack_tensor(
    data: int, sizes: Sequence[int], strides: Sequence[int], dtype: int, device_type: int, device_index: int
) -> bytes:
    """One `dr1_tensor`."""
    n = len(sizes)
    rest = _PADDING[n:]
    return _TENSOR.pack(data, *sizes, *rest, *strides, *rest, n, dtype, device_type, device_index)


#: A gradient that nobody wants.
NO_TENSOR = _TENSOR.pack(*[0] * (1 + 2 * MAX_DIMS), -1, 0, 0, 0)


class Library:
    """A shared library of operators.

    Args:
        path: the file; it is loaded, and what it registers is read.

    Raises:
        InputError: no such file, no library for this machine, none of operators, or one of another ABI version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).resolve()
        check_file(self.path)
        self.sha256 = sha256_file(self.path)
        try:
            self._functions = ctypes.CDLL(str(self.path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        except OSError as e:
            raise InputError(f"{self.path} could not be loaded: {e}. Build it on this machine.") from e
        self._check_symbols()
        count = self._functions.dr1_op_count
        count.restype = ctypes.c_uint32
        self.ops: dict[str, tuple[int, Description]] = {}
        for number in range(int(count())):
            description = self._describe(number)
            if description.name in self.ops:
                raise InputError(f"{self.path} registers the operator {description.name!r} twice.")
            self.ops[description.name] = (number, description)
        self._run = self._functions.dr1_op_run
        self._run.argtypes = [ctypes.POINTER(_Call)]

    def _check_symbols(self) -> None:
        missing = [name for name in _SYMBOLS if not hasattr(self._functions, name)]
        if missing:
            raise InputError(
                f"{self.path} is no library of operators: it has no {', '.join(missing)}. Include "
                "<deepseek_r1/core/operator.h>, end the file with DR1_REGISTER_OP, and build it with "
                "`deepseek-r1 build-op`."
            )
        version = self._functions.dr1_abi_version
        version.restype = ctypes.c_uint32
        if (found := int(version())) != ABI_VERSION:
            raise InputError(
                f"{self.path} has ABI version {found}; this release of deepseek-r1 runs version {ABI_VERSION}. Build "
                "it again with this release's `deepseek-r1 build-op`."
            )

    def _describe(self, number: int) -> Description:
        describe = self._functions.dr1_op_describe
        describe.argtypes, describe.restype = [ctypes.c_uint32], ctypes.c_char_p
        text = describe(number)
        try:
            return parse_description(json.loads(text or b""))
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{self.path}: operator {number} does not describe itself rightly: {e}.") from e

    @property
    def descriptions(self) -> list[Description]:
        """The operators, in the order they were registered."""
        return [about for _, about in self.ops.values()]

    def shape(self, op: str, ndims: Sequence[int], attributes: Sequence[Any]) -> str:
        """What the operator's shape function writes for inputs of these numbers of dimensions."""
        number, description = self.ops[op]
        text, error = ctypes.create_string_buffer(8192), ctypes.create_string_buffer(_ERROR_BYTES)
        values = _values(description, attributes)
        counts = (ctypes.c_uint32 * len(ndims))(*ndims)
        arguments = (ctypes.c_uint32(number), counts, values, text, ctypes.c_uint64(len(text)), error)
        if self._functions.dr1_op_shape(*arguments, ctypes.c_uint64(_ERROR_BYTES)):
            raise InputError(f"the operator {op!r}: {error.value.decode(errors='replace')}")
        return text.value.decode()

    def run(
        self, op: str, which: int, tensors: Sequence[bytes], attributes: Sequence[Any], *,
        threads: int, stream: int = 0, team: Team = Team(),
    ) -> None:  # fmt: skip
        """One pass over packed tensors. Raises InputError with the operator's own message."""
        number, description = self.ops[op]
        context = _Context(stream, team.parallel, team.thread_number, team.team_size, threads, 0)
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        call = _Call(
            number, which, ctypes.pointer(context), _values(description, attributes), b"".join(tensors), len(tensors),
            ctypes.cast(error, ctypes.c_char_p), _ERROR_BYTES,
        )  # fmt: skip
        if self._run(ctypes.byref(call)):
            raise InputError(f"the operator {op!r}: {error.value.decode(errors='replace')}")


def _values(description: Description, given: Sequence[Any]) -> Any:
    values = (_Value * max(1, len(given)))()
    for slot, attribute, value in zip(values, description.attributes, given, strict=False):
        if attribute.kind == "float":
            slot.real = float(value)
        else:
            slot.integer = int(value)
    return values


def parse_description(data: Any) -> Description:
    """A description from its JSON form.

    Raises:
        ValueError, KeyError, TypeError: not one.
    """
    kinds = {"f": "float", "i": "int", "b": "bool"}
    attributes = tuple(
        Attribute(name=_plain(a["name"]), kind=kinds[a["type"]], default=bool(d) if a["type"] == "b" else d)
        for a in data["attributes"]
        for d in [a["default"]]
    )
    dtypes = tuple(data["dtypes"])
    output = data["output_dtype"]
    if not dtypes or not {*dtypes, *([output] if output else [])} <= set(DTYPES):
        raise ValueError(f"dtypes {dtypes}, output {output}")
    return Description(
        name=_plain(data["name"]), inputs=int(data["inputs"]), outputs=int(data["outputs"]), attributes=attributes,
        backward=bool(data["backward"]), shape=bool(data["shape"]), dtypes=dtypes, output_dtype=output,
        devices=tuple(data["devices"]),
    )  # fmt: skip


def _plain(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name, re.ASCII):
        raise ValueError(f"the name {name!r} is not lower case letters, digits and underscores")
    return name


def describe(path: str | os.PathLike[str]) -> list[Description] | None:
    """The operators of a library, which is loaded for that; None if it was built for another kind of machine.

    Raises:
        InputError: no library of operators.
    """
    if machine_of(Path(path)) not in (None, own_machine()):
        return None
    return Library(path).descriptions


def own_machine() -> str:
    """This machine's architecture, as Linux names it."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def machine_of(path: Path) -> str | None:
    """The architecture that an ELF file was built for; None if it is no such file."""
    with path.open("rb") as f:
        head = f.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    number = int.from_bytes(head[18:20], "little")
    return _MACHINES.get(number, f"machine {number}")


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a whole shared library for this machine. Runs nothing of it."""
    if not path.is_file():
        raise InputError(f"{path} does not exist or is no file; build it with `deepseek-r1 build-op`.")
    with path.open("rb") as f:
        head = f.read(64)
        if platform.system() != "Linux":
            return
        if head[:4] != b"\x7fELF":
            raise InputError(f"{path} is no shared library (no ELF file). Give what `deepseek-r1 build-op` wrote.")
        if len(head) < 64 or head[4] != 2 or head[5] != 1:
            raise InputError(f"{path} is truncated, or no 64-bit little-endian library.")
        if (built_for := machine_of(path)) != own_machine():
            raise InputError(
                f"{path} was built for {built_for}, this machine is {own_machine()}; build it for this one."
            )
        (kind,) = struct.unpack_from("<H", head, 16)
        if kind != 3:
            raise InputError(f"{path} is no shared library (ELF type {kind}); link it with -shared.")
        # A segment beyond the end of the file would end the process as soon as the loader touches it.
        offset, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
        f.seek(offset)
        table = f.read(size * count)
    whole = path.stat().st_size
    if len(table) < size * count or size < 56:
        raise InputError(f"{path} is truncated; build it again.")
    for i in range(count):
        start, _, _, length = struct.unpack_from("<QQQQ", table, i * size + 8)
        if start + length > whole:
            raise InputError(
                f"{path} is truncated: {whole} bytes, its parts reach to {start + length}. Build it again."
            )
