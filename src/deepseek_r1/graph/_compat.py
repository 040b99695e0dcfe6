"""torch's private serialisation of an exported graph, in one place, for torch 2.11 and later.

Dies when torch offers a public way to get a graph as JSON without its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._export.serde import serialize as _serde
from torch.export import ExportedProgram


def graph_to_json(exported: ExportedProgram) -> bytes:
    """The graph and its signature as JSON, without weights, constants and example inputs."""
    try:
        artifact = _serde.serialize(
            exported, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
        )
    except TypeError:  # torch before 2.13 has no such switches and serialises everything
        artifact = _serde.serialize(exported)
    data: bytes = artifact.exported_program
    return data


def graph_from_json(
    data: bytes, state_dict: dict[str, torch.Tensor], constants: dict[str, torch.Tensor], example_inputs: Any
) -> ExportedProgram:
    """The exported program of a graph that was checked before; nothing is unpickled."""
    stores: Any = (state_dict, constants, example_inputs)  # the annotations say bytes; plain values are taken as well
    return _serde.deserialize(_serde.SerializedArtifact(data, *stores))


def scalar_type(number: int) -> torch.dtype:
    """The dtype behind a number in torch's JSON schema."""
    table: dict[int, torch.dtype] = _serde._SERIALIZE_TO_TORCH_DTYPE
    return table[number]
