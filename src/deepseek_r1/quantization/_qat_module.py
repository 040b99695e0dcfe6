"""`QATModule`: a quantised program as a module that trains, and back. Knows the neutral form, no loss and no loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..core import ArtifactError, InputError, atomic
from ..graph import Program, rewrite
from ..graph.editing import argument, constant_of, constant_value, own_weights
from ..ops import pack_uint4
from ._fake import FakeActivation, FakeRows, FakeWeight
from ._layers import CONVOLUTIONS

aten = torch.ops.aten
_q = torch.ops.quantized_decomposed
_LAYERS = (*CONVOLUTIONS, aten.linear.default)
_WEIGHTS = (_q.dequantize_per_channel.default, _q.dequantize_per_channel_group.default)
_PROGRAM, _STATE = "program.dr1", "state.safetensors"


class QATModule(nn.Module):
    """A quantised Program with its rounding made trainable; called like the module it came from.

    Before any training it answers as the Program does. Weights, biases and norms train, and with them the steps of all
    grids and the zero points of activations (`nn.Parameter`s named `log_scale` and `zero`). Batch normalisation was
    folded into the weights before, so that there are no statistics to drift.

    Args:
        start: a quantised Program that has its float parent.

    Raises:
        InputError: the Program is not quantised, or came without its parent.

    Example:
        >>> from deepseek_r1.quantization import quantize
        >>> program = quantize(nn.Linear(8, 4), dataset=[torch.randn(32, 8)])
        >>> module, x = QATModule(program), torch.randn(3, 8)
        >>> torch.allclose(module(x), program(x), atol=1e-6)
        True
        >>> module(x).sum().backward()
        >>> module.to_program().precision
        'int8'
    """

    def __init__(self, start: Program) -> None:
        super().__init__()
        if not isinstance(start, Program) or start.precision not in ("int8", "int4", "mixed"):
            raise InputError(f"QATModule({type(start).__name__}): a quantised Program is needed, as quantize gives it.")
        if start.parent is None:
            raise InputError("QATModule: the Program came without its float parent; save it with_parent=True.")
        self.start = start
        module: Any = start.exported.module(check_guards=False)
        own_weights(module)
        body = GraphModule(module, module.graph)
        #: Submodule of the body -> name of the node in the start's graph that it stands for.
        self._places: dict[str, str] = {}
        self._trained: set[str] = set()
        self._put_fakes(body, _float_weights(start))
        self._free_parameters(body)
        body.graph.eliminate_dead_code()
        body.graph.lint()
        body.delete_all_unused_submodules()
        _forget_unused(body)
        body.recompile()
        self.body = body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module that was captured."""
        return self.body(*args, **kwargs)

    @property
    def fakes(self) -> list[FakeActivation | FakeWeight]:
        """The roundings whose grids are learned."""
        return [m for m in self.body.modules() if isinstance(m, FakeActivation | FakeWeight)]

    def _put_fakes(self, body: GraphModule, exact: dict[str, Tensor]) -> None:
        for number, node in enumerate(list(body.graph.nodes)):
            made: nn.Module | None = None
            args: tuple[Any, ...] = ()
            replaced = [node]
            if node.target is _q.quantize_per_tensor.default:
                made, args = FakeActivation(node.args[1], node.args[2]), (node.args[0],)
                replaced = list(node.users)
            elif node.target is _q.dequantize_per_token.default:
                made, args = FakeRows(), (node.args[0].args[0],)
            elif node.target in _WEIGHTS and node.name in exact:
                made = _fake_weight(body, node, exact[node.name])
            if made is None:
                continue
            name = f"fake_{number}"
            body.add_submodule(name, made)
            self._places[name] = node.name
            with body.graph.inserting_before(node):
                call = body.graph.call_module(name, args)
            for old in replaced:
                old.replace_all_uses_with(call)

    def _free_parameters(self, body: GraphModule) -> None:
        """Make parameters of weights and biases, which folding left as buffers; and let all parameters train."""
        for node in body.graph.nodes:
            for source in (argument(node, 1), argument(node, 2)) if node.target in _LAYERS else ():
                value = constant_of(body, source)
                if value is not None and value.dtype == torch.float32 and not isinstance(value, nn.Parameter):
                    _set(body, str(source.target), nn.Parameter(value.detach().clone()))
        for name, parameter in body.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
                if not name.startswith("fake_"):
                    self._trained.add(name)

    def to_program(self) -> Program:
        """The Program with what was learned: the same neutral form, which every engine runs."""
        fakes = dict(self.body.named_children())

        def change(module: GraphModule) -> None:
            nodes = {node.name: node for node in module.graph.nodes}
            for name, place in self._places.items():
                fake, node = fakes.get(name), nodes[place]
                if isinstance(fake, FakeActivation):
                    for one in (node, *node.users):
                        one.args = (one.args[0], *fake.affine(), *one.args[3:])
                elif isinstance(fake, FakeWeight):
                    values, scales = fake.stored()
                    _set(module, _store_of(node.args[0]), pack_uint4(values) if fake.range[0] == 0 else values)
                    _set(module, str(node.args[1].target), scales.clone())
            state = dict(self.body.named_parameters())
            for name in self._trained & set(state):
                _set(module, name, nn.Parameter(state[name].detach().clone()))

        return rewrite(self.start, change)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the module to a new directory, whole or not at all, from which `load` makes it again."""
        target = Path(path)
        with atomic.atomic_dir(target) as folder:
            self.start.save(folder / _PROGRAM)
            save_file({k: v.detach().clone().contiguous() for k, v in self.state_dict().items()}, folder / _STATE)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QATModule:
        """The module that `save` wrote. Raises ArtifactError; runs no code from the files."""
        folder = Path(path)
        for name in (_PROGRAM, _STATE):
            if not (folder / name).is_file():
                raise ArtifactError(f"{folder} is no saved QATModule: it has no {name}.")
        module = cls(Program.load(folder / _PROGRAM))
        try:
            module.load_state_dict(load_file(folder / _STATE))
        except (RuntimeError, SafetensorError) as e:
            raise ArtifactError(f"{folder / _STATE} is damaged or of another module: {e}") from e
        return module


def _float_weights(start: Program) -> dict[str, Tensor]:
    """Node that dequantises a weight -> the float weight of the parent's layer at the same place."""
    assert start.parent is not None
    pairs = []
    for program in (start, start.parent):
        module = program.module()
        pairs.append((module, [n for n in module.graph.nodes if n.target in _LAYERS]))
    (_, layers), (parent, originals) = pairs
    assert len(layers) == len(originals), "the parent has as many layers"
    found: dict[str, Tensor] = {}
    for layer, original in zip(layers, originals):
        source, weight = layer.args[1], constant_of(parent, argument(original, 1))
        if isinstance(source, Node) and source.target in _WEIGHTS and weight is not None:
            found[source.name] = weight
    return found


def _fake_weight(module: GraphModule, node: Node, exact: Tensor) -> FakeWeight:
    values, scales, zeros = (constant_value(module, node.args[i]) for i in range(3))
    assert values is not None
    assert scales is not None
    grouped = node.target is _q.dequantize_per_channel_group.default
    return FakeWeight(exact, values.reshape(exact.shape), scales, zeros if grouped else None)


def _store_of(node: Any) -> str:
    """The name of the constant that an expression of one constant begins with."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    part = module.get_submodule(owner)
    delattr(part, leaf)
    if isinstance(tensor, nn.Parameter):
        part.register_parameter(leaf, tensor)
    else:
        part.register_buffer(leaf, tensor)


def _forget_unused(body: GraphModule) -> None:
    """Drop the stored integers, which fakes have taken the place of."""
    used = {str(n.target) for n in body.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in body.graph.nodes if n.op == "call_module"}
    stores = [*body.named_parameters(remove_duplicate=False), *body.named_buffers(remove_duplicate=False)]
    for name, _ in stores:
        owner, _, leaf = name.rpartition(".")
        if name not in used and owner not in called:
            delattr(body.get_submodule(owner), leaf)
