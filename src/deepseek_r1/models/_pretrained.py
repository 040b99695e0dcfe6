"""`PretrainedModel`: an architecture that reads and writes the weight files of Hugging Face.

A subclass names its parameters as the files do, so that no table of names is needed. Knows no architecture.
"""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from ..core import ArtifactError, InputError, Report
from ._settings import ModelConfig
from ._weight_files import CONFIG, find_directory, read_json, read_tensors, write_model

C = TypeVar("C", bound=ModelConfig)

#: Names of the weights of a normalisation in files converted from TensorFlow.
_OLD_NAMES = (re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias")
#: The largest file that is written; larger models become several.
SHARD_BYTES = 5_000_000_000


class PretrainedModel(nn.Module, Generic[C]):
    """Base of the reference architectures: loading, saving and counting.

    Attributes:
        config: the configuration it was built from.
        load_report: after `from_pretrained`, the Report of what was read, what is new and what was not used.
    """

    #: The type of `config`.
    config_class: ClassVar[type[ModelConfig]]
    #: The class of transformers that reads what `save_pretrained` writes.
    architecture: ClassVar[str]
    #: What the names of all tensors but the head's begin with; files of the bare body have it not.
    prefix: ClassVar[str] = ""
    #: Names of submodules that a file may lack, as the classifier of a pretrained body.
    heads: ClassVar[tuple[str, ...]] = ()
    #: Tensors of other tasks' heads, which are not used and reported, and tensors that hold nothing (masks, positions).
    other_heads: ClassVar[str] = r"(?!)"
    without_content: ClassVar[str] = r"(?!)"
    #: Short names -> repositories.
    repositories: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    config: C
    load_report: Report | None

    def __init__(self, config: C) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise InputError(
                f"{type(self).__name__}({type(config).__name__}): a {self.config_class.__name__} is needed; weights "
                f"from a directory are loaded by {type(self).__name__}.from_pretrained."
            )
        self.config = config
        self.load_report = None

    @abstractmethod
    def init_module(self, module: nn.Module, name: str) -> None:
        """Draw the first weights of one module, as the architecture's paper does."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for name, module in self.named_modules():
            self.init_module(module, name)

    def from_file(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a file as this module stores it."""
        return tensor

    def to_file(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of this module as the file stores it."""
        return tensor

    def tied(self) -> Mapping[str, str]:
        """Names of tensors that a file may repeat -> the tensor they are equal to."""
        return {}

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, dtype: torch.dtype | str = torch.float32, **changes: Any
    ) -> Self:
        """The model of a directory in the layout of Hugging Face, in eval mode.

        Nothing is downloaded. A name that is no directory is looked up in the cache that programs of Hugging Face
        keep on this machine (`HF_HUB_CACHE`, `HF_HOME`).

        Args:
            source: a directory with `config.json` and `model.safetensors` (or its shards, or `pytorch_model.bin`, of
                which only tensors are read), a repository `org/name`, or a short name such as "bert-base".
            dtype: the type of the weights, or "auto" for the one in the file.
            changes: fields of the configuration that replace the file's, as `num_labels=3`.

        Raises:
            InputError: nothing was found; the message lists where it was looked for.
            ConfigError: the configuration is of another architecture, or has what this implementation lacks.
            ArtifactError: a tensor is missing, unknown or of another shape, or the file is damaged.
        """
        if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(f"dtype={dtype!r}: a floating type such as torch.float32, or 'auto', is needed.")
        folder = find_directory(source, cls.repositories)
        config, unread = cls.config_class.from_hf(read_json(folder / CONFIG), **changes)
        # Without memory at first: weights are read, not drawn and then overwritten.
        with torch.device("meta"):
            model = cls(config)  # type: ignore[arg-type]
        fitting = _Fitting(model, renewable="num_labels" in changes)
        for name, tensor in read_tensors(folder):
            fitting.take(name, tensor, None if dtype == "auto" else dtype)  # type: ignore[arg-type]
        new = fitting.check(folder)
        model._fill(fitting.state, new)
        model.load_report = fitting.report(f"{cls.__name__} from {folder}", new, unread)
        return model.eval()

    @torch.no_grad()
    def _fill(self, state: dict[str, Tensor], new: list[str]) -> None:
        self.load_state_dict(state, strict=False, assign=True)
        kind = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
        for head in new:
            self.get_submodule(head).to_empty(device="cpu").to(kind)
            for name, module in self.get_submodule(head).named_modules(prefix=head):
                self.init_module(module, name)
        for module in self.modules():
            reset = getattr(module, "reset_buffers", None)
            if reset is not None:
                reset(torch.device("cpu"))

    def save_pretrained(self, directory: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> Path:
        """Write `config.json` and `model.safetensors` (or shards of at most `shard_bytes`) into a directory.

        transformers reads them as the class named in `config.json`. Other files of the directory stay, each file is
        whole or not there.

        Returns:
            The directory.

        Raises:
            InputError: the module has other tensors than its architecture, for example adapters.
        """
        state = self.state_dict()
        with torch.device("meta"):
            plain = type(self)(self.config).state_dict()
        shapes, expected = ({(name, t.shape) for name, t in tensors.items()} for tensors in (state, plain))
        if changed := sorted({name for name, _ in shapes ^ expected}):
            raise InputError(
                f"the module is no plain {type(self).__name__} of its config any more: {len(changed)} tensors were "
                f"added, are gone or have another shape, first {changed[0]!r}. Merge or remove what was put into it, "
                "or save it as a checkpoint or a Program."
            )
        kind = next(t.dtype for t in state.values() if t.is_floating_point())
        config = {
            **self.config.to_hf(),
            "architectures": [self.architecture],
            "dtype": str(kind).removeprefix("torch."),
        }
        tensors = {name: self.to_file(name, tensor) for name, tensor in state.items()}
        write_model(Path(directory), config, tensors, shard_bytes)
        return Path(directory)


@dataclass
class _Fitting:
    """The tensors of a file as they are put into a model, and what does not fit."""

    model: PretrainedModel[Any]
    renewable: bool
    state: dict[str, Tensor] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)
    repeated: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.expected = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}

    def take(self, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
        """Put one tensor where it belongs."""
        key = self._key(name)
        if key not in self.expected:
            if key in self.model.tied():
                self.repeated[key] = tensor
            elif re.match(self.model.other_heads, name):
                self.unused.append(name)
            elif not re.fullmatch(self.model.without_content, key):
                self.unknown.append(f"{name} {list(tensor.shape)}")
            return
        fitted = self.model.from_file(key, tensor)
        if tuple(fitted.shape) != self.expected[key]:
            expected = list(self.model.to_file(key, torch.empty(self.expected[key], device="meta")).shape)
            self.misshapen[key] = f"{name} is {list(tensor.shape)}, expected {expected}"
            return
        kind = (dtype or fitted.dtype) if fitted.is_floating_point() else fitted.dtype
        self.state[key] = fitted.to(kind, copy=True, memory_format=torch.contiguous_format)

    def _key(self, name: str) -> str:
        for pattern, new in _OLD_NAMES:
            name = pattern.sub(new, name)
        if name in self.expected or name.startswith(self.model.prefix):
            return name
        longer = self.model.prefix + name
        body = longer in self.expected or re.fullmatch(self.model.without_content, longer)
        return longer if body else name

    def check(self, folder: Path) -> list[str]:
        """The heads that are to be new.

        Raises:
            ArtifactError: something else does not fit; the first of each kind is named.
        """
        new = [head for head in self.model.heads if self._is_new(head)]
        for head in new:
            for key in [k for k in self.state if k.startswith(head + ".")]:
                del self.state[key]
        outside = [k for k in self.expected if not k.startswith(tuple(h + "." for h in new))]
        wrong = [text for key, text in self.misshapen.items() if key in outside]
        missing = [f"{k} {list(self.expected[k])}" for k in outside if k not in self.state and k not in self.misshapen]
        found = [
            f"{len(names)} {what}, first: {names[0]}"
            for what, names in (("of another shape", wrong), ("missing", missing), ("unknown", self.unknown))
            if names
        ]
        for key, tensor in self.repeated.items():
            twin = self.model.tied()[key]
            if not found and not torch.equal(tensor.to(self.state[twin].dtype), self.state[twin]):
                found.append(f"{key} differs from {twin}, while config.json says that they are one tensor")
        if found:
            raise ArtifactError(
                f"the tensors in {folder} are not those of this {type(self.model).__name__}: {'; '.join(found)}."
            )
        return new

    def _is_new(self, head: str) -> bool:
        keys = [k for k in self.expected if k.startswith(head + ".")]
        absent = not any(k in self.state or k in self.misshapen for k in keys)
        return absent or (self.renewable and any(k in self.misshapen for k in keys))

    def report(self, title: str, new: list[str], unread: list[str]) -> Report:
        """What was read, what is new, what was not used."""
        report = Report(title)
        report.add("tensors read", len(self.state))
        report.add("parameters", sum(p.numel() for p in self.model.parameters()))
        for head in new:
            why = (
                "the file's has another size"
                if any(k.startswith(head + ".") for k in self.misshapen)
                else "not in the file"
            )
            report.note(f"{head} is new, with random weights: {why}. Train it before use.")
        report.facts["new"] = new
        if self.unused:
            report.skip(f"{len(self.unused)} tensors, first {self.unused[0]}", "they belong to another task's head")
        if unread:
            report.skip(f"keys of config.json: {', '.join(unread)}", "nothing in this implementation reads them")
        return report
