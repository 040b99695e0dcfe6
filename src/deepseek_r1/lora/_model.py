"""`PeftModel`: a model whose chosen layers have adapters, and the verbs on them. Knows neither training nor files.

The adapters are put into the model itself; the wrapper adds the verbs, and everything else is the model's.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import ConfigError, InputError
from . import _file as disk
from ._config import LoraConfig, as_config
from ._layer import LoraLayer
from ._put import adapter_dtype, checked, layer_for, outline, replace_module, shared_parameters
from ._quantize import float_linear, is_quantised, weight_count
from ._saved import SavedModule
from ._targets import find_targets, is_conv1d, output_layer, saved_modules


class PeftModel(nn.Module):
    """A model with adapters. Made by `get_peft_model` or `PeftModel.from_pretrained`.

    Called like the model, and has its attributes. Only the adapters that are active are trained, with the biases and
    further modules that their config names.

    Attributes:
        base_model: the model, with adapters in it.
        peft_config: the config of each adapter.
        active_adapters: the names of those that count.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model
        self.peft_config: dict[str, LoraConfig] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.training = model.training
        self._kept: set[str] = set()

    # The model's own.

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The model's own, so that its signature is seen (whether it takes labels, for instance)."""
        return self.base_model.forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(super().__getattr__("base_model"), name)

    def get_base_model(self) -> nn.Module:
        """The model, with the adapters in it."""
        return self.base_model

    @property
    def active_adapter(self) -> str:
        """The first of the active adapters."""
        return self.active_adapters[0]

    def _layers(self) -> Iterator[tuple[str, LoraLayer]]:
        yield from ((p, m) for p, m in self.base_model.named_modules() if isinstance(m, LoraLayer))

    def _saved(self) -> Iterator[tuple[str, SavedModule]]:
        yield from ((p, m) for p, m in self.base_model.named_modules() if isinstance(m, SavedModule))

    # Adapters.

    def add_adapter(self, adapter_name: str, config: LoraConfig, *, autocast_adapter_dtype: bool = True) -> None:
        """Put in a further adapter, with its initial values; the active ones stay active.

        Args:
            autocast_adapter_dtype: keep adapters in float32 where the model is in half precision.

        Raises:
            ConfigError: a name that is taken or cannot be one, or no LoraConfig.
            InputError: the config fits no layer of the model, or wants biases trained beside another adapter.
        """
        config = as_config(config, "add_adapter(config")
        self._check_name(adapter_name)
        if config.bias != "none" and self.peft_config:
            raise InputError(
                f"LoraConfig(bias={config.bias!r}): biases belong to the base model, so only a single adapter can "
                "train them; use bias='none' for further ones."
            )
        modules = outline(self.base_model)
        targets = find_targets(modules, config, output_layer(self.base_model))
        whole = saved_modules(modules, config)
        # Everything is made before anything is put into the model, which an error leaves as it was.
        made: list[tuple[nn.Module, LoraLayer]] = []
        try:
            for path in targets:
                old = self.base_model.get_submodule(path)
                layer = old if isinstance(old, LoraLayer) else layer_for(old, path)
                made.append((old, layer))
                layer.add(adapter_name, config, path, adapter_dtype(layer.base_layer, autocast_adapter_dtype))
        except InputError:
            for _, layer in made:
                layer.remove(adapter_name)
            raise
        for old, layer in made:
            if layer is not old:
                replace_module(self.base_model, old, layer)
        for path in whole:
            old = self.base_model.get_submodule(path)
            saved = old if isinstance(old, SavedModule) else SavedModule(old)
            saved.add(adapter_name)
            if saved is not old:
                replace_module(self.base_model, old, saved)
        turned = any(is_conv1d(layer.base_layer) for _, layer in made)
        self.peft_config[adapter_name] = replace(config, fan_in_fan_out=turned)
        self._refresh()

    def _check_name(self, name: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
            raise ConfigError(
                f"adapter_name={name!r}: letters, digits, '-' and '_' make a name, and it is none of the words that "
                "torch's containers use ('keys', 'values', ...)."
            )
        if name in self.peft_config:
            raise ConfigError(f"there is an adapter {name!r} already; take another name, or delete_adapter({name!r}).")

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let one adapter, or several whose products are added, count; only these are trained from now on.

        Raises:
            InputError: an unknown name.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(dict.fromkeys(adapter_name))
        for name in names:
            self._known(name)
        if any(layer.merged for _, layer in self._layers()):
            raise InputError("adapters are merged; call unmerge_adapter() before another one is set.")
        if not names:
            raise InputError("set_adapter([]): at least one name is needed; `with model.disable_adapter():` uses none.")
        twice = [path for path, saved in self._saved() if len(set(names) & set(saved.adapters)) > 1]
        if twice:
            raise InputError(f"{twice[0]} is trained in full by several of {list(names)}; only one can be active.")
        self.active_adapters = names
        self._refresh()

    def _known(self, name: str) -> None:
        if name not in self.peft_config:
            raise InputError(f"there is no adapter {name!r}; there are {sorted(self.peft_config)}.")

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the only active one, the first of the others becomes active.

        Raises:
            InputError: an unknown name, or it is merged.
        """
        self._known(adapter_name)
        if any(adapter_name in layer.merged for _, layer in self._layers()):
            raise InputError(f"{adapter_name!r} is merged; call unmerge_adapter() first.")
        for _, layer in self._layers():
            if adapter_name in layer.adapters:
                layer.remove(adapter_name)
        for _, saved in self._saved():
            saved.remove(adapter_name)
        del self.peft_config[adapter_name]
        self._kept.discard(adapter_name)
        left = tuple(name for name in self.active_adapters if name != adapter_name)
        self.active_adapters = left or tuple(self.peft_config)[:1]
        self._refresh()

    def _refresh(self) -> None:
        """Let layers know the active adapters, and make exactly what these train trainable."""
        self.base_model.requires_grad_(False)
        trained = [name for name in self.active_adapters if name not in self._kept]
        for _, layer in self._layers():
            layer.activate(self.active_adapters)
            for name in trained:
                for parameter in layer.own_parameters(name) if name in layer.adapters else ():
                    parameter.requires_grad_(True)
        for _, saved in self._saved():
            saved.activate(self.active_adapters)
            for name in saved.active:
                saved.modules_to_save[name].requires_grad_(name in trained)
        biases = {self.peft_config[name].bias for name in trained}
        for _, parameter in self._biases(next((b for b in ("all", "lora_only") if b in biases), "none")):
            parameter.requires_grad_(True)

    def _biases(self, which: str) -> Iterator[tuple[str, nn.Parameter]]:
        if which == "none":
            return
        inside = {id(p) for _, saved in self._saved() for p in saved.parameters()}
        for path, module in self.base_model.named_modules():
            bias = module._parameters.get("bias")
            if bias is None or id(bias) in inside:
                continue
            if which == "all" or path.endswith("base_layer"):
                yield f"{path}.bias", bias

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model as it was before adapters, within a `with` block; merged adapters are taken out for it.

        Trained biases stay as they are: they are the model's own.
        """
        layers = [layer for _, layer in self._layers()]
        merged = any(layer.merged for layer in layers)
        if merged:
            self.unmerge_adapter()
        before: list[tuple[Any, bool]] = [(layer, layer.disabled) for layer in layers]
        before += [(saved, saved.disabled) for _, saved in self._saved()]
        try:
            for part, _ in before:
                part.disabled = True
            yield
        finally:
            for part, was in before:
                part.disabled = was
            if merged:
                self.merge_adapter()

    # Merging.

    def merge_adapter(self) -> None:
        """Put the active adapters into the base weights; calls then cost what the plain model's cost.

        A copy of these weights is kept for `unmerge_adapter`.

        Raises:
            InputError: the base weights are quantised, a merged weight is not finite, or an embedding with an adapter
                is the output layer too.
        """
        self._check_not_tied("merge_adapter")
        self._check_mergeable("merge_adapter")
        for _, layer in self._layers():
            layer.merge()

    def unmerge_adapter(self) -> None:
        """Put back the base weights as they were before `merge_adapter`, to the bit."""
        for _, layer in self._layers():
            layer.unmerge()

    def _check_not_tied(self, verb: str) -> None:
        last = output_layer(self.base_model)
        for path, layer in self._layers():
            if layer.active and layer.base_layer is last and isinstance(last, nn.Embedding):
                raise InputError(
                    f"{verb}: the weight of {path} makes the model's outputs too, where its adapter does not count; "
                    "merged it would. Keep the adapter, or use a model whose output layer has a weight of its own "
                    "(tie_word_embeddings=False)."
                )

    def _check_mergeable(self, verb: str) -> None:
        stored = next((p for p, layer in self._layers() if is_quantised(layer.base_layer) and layer.active), None)
        if stored is not None:
            raise InputError(
                f"{verb}: the weight of {stored} is quantised. The sum with the adapter would have to be rounded to "
                "the same few bits, which loses most of what was learned. Load the adapter onto the float model and "
                "merge there, or call merge_and_unload(dequantize=True) for a float model made from the quantised one."
            )

    @torch.no_grad()
    def merge_and_unload(self, *, dequantize: bool = False) -> nn.Module:
        """The plain model with the active adapters in its weights. Changes the model; the wrapper is of no more use.

        A weight that another module shares (tied embeddings) becomes one of its own.

        Args:
            dequantize: make quantised layers with adapters torch.nn.Linear in float32, with the sum as their weight.

        Raises:
            InputError: base weights are quantised and `dequantize` is False, a merged weight is not finite, or an
                embedding with an adapter is the output layer too.
        """
        self.unmerge_adapter()
        self._check_not_tied("merge_and_unload")
        if not dequantize:
            self._check_mergeable("merge_and_unload")
        shared = shared_parameters(self.base_model)
        for _, layer in list(self._layers()):
            base = layer.base_layer
            if layer.active and is_quantised(base):
                base = float_linear(base, layer.merged_weight(layer.active))
            elif layer.active:
                weight: Any = base.weight
                merged = layer.merged_weight(layer.active)
                if id(weight) in shared:
                    base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
                else:
                    weight.copy_(merged)
            replace_module(self.base_model, layer, base)
        return self._without_wrappers()

    def unload(self) -> nn.Module:
        """The plain model as it was before adapters. Changes the model; the wrapper is of no more use."""
        self.unmerge_adapter()
        self.active_adapters = ()
        for _, layer in list(self._layers()):
            replace_module(self.base_model, layer, layer.base_layer)
        return self._without_wrappers()

    def _without_wrappers(self) -> nn.Module:
        for _, saved in list(self._saved()):
            replace_module(self.base_model, saved, saved.chosen(self.active_adapters))
        self.peft_config, self.active_adapters = {}, ()
        return self.base_model.requires_grad_(True)

    # Counting and files.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are in all; a quantised weight counts as the float one."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trained, weight_count(self)

    def print_trainable_parameters(self) -> tuple[int, int]:
        """Print, and give, how many numbers are trained and how many there are in all."""
        trained, every = self.get_nb_trainable_parameters()
        sys.stdout.write(f"trained: {trained:,} of {every:,} parameters ({100 * trained / max(1, every):.3g} %)\n")
        return trained, every

    def adapter_state_dict(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """An adapter's tensors under the names that PEFT's file gives them.

        Raises:
            InputError: an unknown name.
        """
        self._known(adapter_name)
        found: dict[str, Tensor] = {}
        for path, layer in self._layers():
            if adapter_name in layer.adapters:
                found.update({f"{path}.{name}": t for name, t in disk.layer_tensors(layer, adapter_name).items()})
        for path, saved in self._saved():
            if adapter_name in saved.adapters:
                found.update({f"{path}.{n}": t for n, t in saved.modules_to_save[adapter_name].state_dict().items()})
        found.update(self._biases(self.peft_config[adapter_name].bias))
        return {f"{disk.PREFIX}{name}": tensor for name, tensor in found.items()}

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, selected_adapters: Sequence[str] | None = None
    ) -> Path:
        """Write adapter_config.json and adapter_model.safetensors, which PEFT reads too; each whole or not at all.

        The adapter "default" goes into the directory itself, others into directories of their names in it.

        Raises:
            InputError: an unknown name, or tensors that are not finite.
        """
        folder = Path(save_directory)
        for name in self.peft_config if selected_adapters is None else selected_adapters:
            self._known(name)
            tensors = self.adapter_state_dict(name)
            disk.write(folder if name == "default" else folder / name, self.peft_config[name], tensors, self.base_model)
        return folder

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | os.PathLike[str], adapter_name: str = "default", *,
        is_trainable: bool = False, autocast_adapter_dtype: bool = True,
    ) -> PeftModel:  # fmt: skip
        """A model with an adapter from a directory that `save_pretrained`, or PEFT, wrote. Changes the model.

        Args:
            model: the base model, of the architecture the adapter was trained on.
            is_trainable: whether it is to be trained further; else nothing is trainable, and the model is in
                evaluation mode.

        Raises:
            ArtifactError: a file is missing, damaged, or of another kind of adapter.
            InputError: the adapter is of another architecture; the first tensor that does not fit is named.
        """
        if isinstance(model, PeftModel):
            raise InputError("the model has adapters already; model.load_adapter(directory, name) adds one.")
        found = cls(checked(model))
        try:
            found.load_adapter(
                model_id, adapter_name, is_trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype
            )
        except Exception:
            found.unload()
            raise
        return found if is_trainable else found.eval()

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str = "default", *,
        is_trainable: bool = False, autocast_adapter_dtype: bool = True,
    ) -> None:  # fmt: skip
        """Add an adapter from a directory. It is active if it is the only one.

        Raises:
            ArtifactError, InputError, ConfigError: as `from_pretrained` and `add_adapter`.
        """
        config, tensors = disk.read(Path(model_id))
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
        try:
            disk.fill(self.adapter_state_dict(adapter_name), tensors, self.base_model, str(model_id))
        except InputError:
            self.delete_adapter(adapter_name)
            raise
        if not is_trainable:
            self._kept.add(adapter_name)
        self.set_adapter(self.active_adapters or adapter_name)
