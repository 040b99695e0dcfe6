"""Opening a `.pt2` file that somebody else wrote.

`torch.export.load` unpickles without restriction when the safe way fails, so a tampered file can run a shell
command. This reader looks at every entry first, takes weights as raw bytes or through the restricted unpickler, and
hands torch only a graph that passed `_checks`.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..core import ArtifactError, UnsafeFileError
from . import _checks, _compat
from ._capture import precision_of
from ._container import read_member
from .program import Program

_PLAIN = re.compile(
    r"(archive_format|archive_version|version|byteorder|\.data/(serialization_id|version)"
    r"|models/[^/]+\.json|data/(weights|constants)/[^/]+_config\.json|data/weights/weight_\d+"
    r"|data/constants/tensor_\d+|data/sample_inputs/[^/]+\.pt|extra/[^/]+)"
)
_LEGACY = "serialized_exported_program.json"


def load_pt2(path: str | os.PathLike[str]) -> Program:
    """Read a `.pt2` file written by `torch.export.save` (torch 2.8 or later) without running anything in it.

    Raises:
        ArtifactError: damaged, of an older layout, or made by an unknown torch.
        UnsafeFileError: it carries code, custom objects, compiled libraries, or an operator that is not allowed.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"{file} does not exist; give a .pt2 file that torch.export.save wrote.")
    try:
        with zipfile.ZipFile(file) as archive:
            parts = _entries(archive, file)
    except ArtifactError:
        raise
    except Exception as e:  # zipfile raises a dozen unrelated classes for damaged headers
        raise ArtifactError(f"{file} is truncated or damaged: {e}.") from e
    graphs = [name for name in parts if name.startswith("models/")]
    if len(graphs) != 1:
        raise ArtifactError(f"{file} holds {len(graphs)} graphs ({graphs}); a file with exactly one is needed.")
    model = Path(graphs[0]).stem
    graph = _checks.checked_graph(parts[graphs[0]], str(file))
    try:
        state = _tensors(parts, f"data/weights/{model}_weights_config.json", "data/weights/", file)
        constants = _tensors(parts, f"data/constants/{model}_constants_config.json", "data/constants/", file)
        examples = _examples(_restricted(parts[f"data/sample_inputs/{model}.pt"], file, "sample inputs"), file)
        exported = _compat.graph_from_json(graph, state, constants, examples)
        if pytree.tree_structure(examples) != exported.call_spec.in_spec:
            raise ArtifactError(f"{file}: its example inputs do not fit its graph.")
    except ArtifactError:
        raise
    except Exception as e:  # torch fails on a damaged graph wherever it happens to stumble
        raise ArtifactError(
            f"{file} is damaged or was written by another torch: {type(e).__name__}: {str(e)[:300]}"
        ) from e
    return Program(exported=exported, example_inputs=examples, name=file.stem, precision=precision_of(exported))


def _examples(value: Any, file: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs. Exactly of this form: torch unpickles plain bytes once more, without restriction."""
    if not value:
        raise ArtifactError(f"{file} has no example inputs; save it again from the module with torch.export.save.")
    if type(value) is not tuple or [type(part) for part in value] != [tuple, dict]:
        raise UnsafeFileError(f"{file}: its example inputs are no (positional, keyword) inputs. It was not opened.")
    return value


def _entries(archive: zipfile.ZipFile, file: Path) -> dict[str, bytes]:
    infos = [i for i in archive.infolist() if not i.is_dir()]
    if any(i.filename.endswith(_LEGACY) for i in infos):
        raise ArtifactError(
            f"{file} has the layout of an old torch; open it there and save it with torch 2.9 or later."
        )
    if min((i.header_offset for i in infos), default=0):
        raise zipfile.BadZipFile("the end of the archive is missing")
    parts: dict[str, bytes] = {}
    for info in infos:
        name = info.filename
        plain = name.partition("/")[2]
        if not _PLAIN.fullmatch(plain) or plain in parts:
            raise UnsafeFileError(
                f"{file} carries {name!r}, which a captured graph does not need (compiled code, a custom object or "
                "something foreign). It was not opened."
            )
        parts[plain] = read_member(archive, info)
    if parts.get("archive_format", b"").strip() != b"pt2":
        raise ArtifactError(f"{file} is a zip archive but no .pt2 file.")
    return parts


def _restricted(data: bytes, file: Path, what: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(io.BytesIO(data), weights_only=True)
        except Exception as e:  # a damaged pickle fails in any way, and must not reach torch's own reader
            reason = str(e).strip().splitlines()
            raise UnsafeFileError(
                f"{file}: its {what} cannot be read by the restricted unpickler, so they may carry code "
                f"({reason[0][:120] if reason else type(e).__name__}). It was not opened."
            ) from e


def _tensors(parts: dict[str, bytes], config: str, folder: str, file: Path) -> dict[str, torch.Tensor]:
    entries = json.loads(parts[config])["config"]
    raw: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        data = parts[folder + entry["path_name"]]
        if entry["use_pickle"]:
            found[name] = _restricted(data, file, f"weight {name!r}")
            if not isinstance(found[name], torch.Tensor):
                raise UnsafeFileError(f"{file}: {name!r} is a {type(found[name]).__name__}, no tensor.")
            continue
        meta = entry["tensor_meta"]
        dtype = _compat.scalar_type(meta["dtype"])
        if entry["path_name"] not in raw:
            raw[entry["path_name"]] = (
                torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            )
        size, stride = ([d["as_int"] for d in meta[k]] for k in ("sizes", "strides"))
        tensor = torch.as_strided(raw[entry["path_name"]], size, stride, meta["storage_offset"]["as_int"])
        if entry["is_param"]:
            tensor = torch.nn.Parameter(tensor, requires_grad=meta["requires_grad"])
        found[name] = tensor
    return found
