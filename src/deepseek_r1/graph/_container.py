"""The file of a Program (`.dr1`): a zip archive with torch's JSON graph and safetensors. Nothing in it is pickled.

program.json          kind, schema version, name, precision, the nest of the example inputs, aliases
graph.json            the graph
weights.safetensors   parameters, buffers, constants
examples.safetensors  tensors of the example inputs
parent.dr1            the float parent of a quantised program, if any
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch.export.graph_signature import ConstantArgument

from ..core import PRECISIONS, ArtifactError, InputError, Report, atomic
from ..core.manifest_json import parse
from . import _checks, _compat
from ._conditions import names_of
from ._foreign_nests import plain_nest
from .program import Program

SCHEMA_VERSION = 1
KIND = "deepseek-r1 program"
_MEMBERS = {"program.json", "graph.json", "weights.safetensors", "examples.safetensors", "parent.dr1"}


def save(program: Program, path: str | os.PathLike[str]) -> Path:
    """Write `program` to `path`."""
    atomic.write_bytes(path, to_bytes(program))
    return Path(path)


def to_bytes(program: Program) -> bytes:
    """The file's content."""
    exported = program.exported
    store = {f"state:{k}": v for k, v in exported.state_dict.items()}
    for name, value in exported.constants.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"the program holds {name!r}, a {type(value).__name__}; only tensors can be saved.")
        store[f"constant:{name}"] = value
    texts = [s.arg.value for s in exported.graph_signature.output_specs if isinstance(s.arg, ConstantArgument)]
    if any(isinstance(v, str) for v in texts):
        raise InputError(
            f"{program.name!r} gives text ({texts}); torch cannot read such a graph back. Give tensors only."
        )
    tensors, aliases = _without_aliases(store)
    leaves, tree = pytree.tree_flatten(program.example_inputs)
    example_tensors = {
        str(i): v.detach().cpu().contiguous() for i, v in enumerate(leaves) if isinstance(v, torch.Tensor)
    }
    plain = [None if isinstance(v, torch.Tensor) else v for v in leaves]
    about = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "torch": torch.__version__,
        "name": program.name,
        "precision": program.precision,
        "tree": pytree.treespec_dumps(tree),
        "tensor_leaves": sorted(map(int, example_tensors)),
        "plain_leaves": plain,
        "aliases": aliases,
        "parameters": {k: v.requires_grad for k, v in exported.state_dict.items() if isinstance(v, torch.nn.Parameter)},
        "conditions": list(program.conditions),
        "report": program.report.to_dict(),
    }
    try:
        about_bytes = json.dumps(about).encode()
    except TypeError as e:
        raise InputError(
            f"an example input of {program.name!r} cannot be saved (tensors, numbers, text only): {e}"
        ) from e
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("program.json", about_bytes)
        archive.writestr("graph.json", _compat.graph_to_json(exported))
        archive.writestr("weights.safetensors", tensors_to_bytes(tensors))
        archive.writestr("examples.safetensors", tensors_to_bytes(example_tensors))
        if program.parent is not None:
            archive.writestr("parent.dr1", to_bytes(program.parent))
    return out.getvalue()


def _without_aliases(store: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in store.items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), str(tensor.device))
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        # A clone, because two different views of one storage may not go into a safetensors file.
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def load(path: str | os.PathLike[str]) -> Program:
    """Read a program from a file."""
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"{file} does not exist or is no file; give a .dr1 file that Program.save wrote.")
    return from_bytes(file.read_bytes(), str(file))


def from_bytes(data: bytes, where: str) -> Program:
    """Read a program from a file's content; `where` names it in messages."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = set(archive.namelist())
            if not {"program.json", "graph.json", "weights.safetensors", "examples.safetensors"} <= names <= _MEMBERS:
                raise ArtifactError(f"{where} is no Program file: it holds {sorted(names)}.")
            parts = {info.filename: read_member(archive, info) for info in archive.infolist()}
    except ArtifactError:
        raise
    except Exception as e:  # zipfile raises a dozen unrelated classes for damaged headers
        raise ArtifactError(f"{where} is truncated or damaged: {e}. Save the program again.") from e
    about = _about(parts["program.json"], where)
    graph = _checks.checked_graph(parts["graph.json"], where)
    about["tree"] = plain_nest(about["tree"])
    _checks.check_tree(about["tree"], where, of_inputs=True)
    try:
        stored = tensors_from_bytes(parts["weights.safetensors"])
        examples = tensors_from_bytes(parts["examples.safetensors"])
        stored |= {alias: stored[original] for alias, original in about["aliases"].items()}
        leaves = [examples[str(i)] if i in about["tensor_leaves"] else v for i, v in enumerate(about["plain_leaves"])]
        example_inputs = pytree.tree_unflatten(leaves, pytree.treespec_loads(about["tree"]))
        # One Parameter object for all names of a tied weight keeps them tied.
        made: dict[int, torch.nn.Parameter] = {}
        state: dict[str, torch.Tensor] = {}
        for name, tensor in stored.items():
            kind, _, plain = name.partition(":")
            if kind == "state" and plain in about["parameters"]:
                grad = bool(about["parameters"][plain])
                state[plain] = made.setdefault(id(tensor), torch.nn.Parameter(tensor, requires_grad=grad))
            elif kind == "state":
                state[plain] = tensor
        constants = {name.partition(":")[2]: t for name, t in stored.items() if name.startswith("constant:")}
        exported = _compat.graph_from_json(graph, state, constants, tuple(example_inputs))
        return Program(
            exported=exported,
            example_inputs=(tuple(example_inputs[0]), dict(example_inputs[1])),
            name=about["name"],
            precision=about["precision"],
            parent=from_bytes(parts["parent.dr1"], f"{where}:parent.dr1") if "parent.dr1" in parts else None,
            conditions=_conditions(about, where),
            report=Report.from_dict(about["report"]),
        )
    except ArtifactError as e:
        if where in str(e):
            raise
        raise ArtifactError(f"{where} is damaged: {e}") from e
    except Exception as e:  # torch fails on a damaged graph wherever it happens to stumble
        reason = f"{type(e).__name__}: {str(e)[:300]}"
        raise ArtifactError(f"{where} is damaged or of another torch ({about['torch']}): {reason}") from e


def _conditions(about: dict[str, Any], where: str) -> tuple[str, ...]:
    """The conditions on sizes; files of earlier releases have none."""
    texts = about.get("conditions", [])
    try:
        for text in texts:
            names_of(text)
    except (TypeError, ValueError) as e:
        raise ArtifactError(f"{where}: the conditions on sizes are damaged: {e}") from e
    return tuple(texts)


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member of an archive in which nothing is compressed and nothing stands before the first member.

    Raises:
        zipfile.BadZipFile: otherwise, or its checksum is wrong.
    """
    # A small file that unpacks to gigabytes is no graph.
    if info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{info.filename!r} is compressed")
    # The end of a truncated archive may be that of an archive inside it.
    if min(i.header_offset for i in archive.infolist()):
        raise zipfile.BadZipFile("the end of the archive is missing")
    return archive.read(info)


def _about(data: bytes, where: str) -> dict[str, Any]:
    about = parse(data, f"{where}: program.json", kind=KIND, schema_version=SCHEMA_VERSION)
    wanted: dict[str, type] = {
        "torch": str, "name": str, "precision": str, "tree": str, "tensor_leaves": list, "plain_leaves": list,
        "aliases": dict, "parameters": dict, "report": dict,
    }  # fmt: skip
    wrong = [key for key, kind in wanted.items() if not isinstance(about.get(key), kind)]
    if wrong or about["precision"] not in PRECISIONS:
        raise ArtifactError(f"{where}: program.json lacks or misstates {', '.join(wrong) or 'precision'}.")
    return about
