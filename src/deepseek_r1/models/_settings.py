"""What configurations of architectures share: checks with messages, activation functions, the way from config.json.

Knows no architecture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from ..core import ConfigError

#: Activation functions by the names that configuration files use.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "swish": F.silu,
}

PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of the configurations. A subclass says what it is called in files and which of their keys it reads.

    The fields of a subclass have the names of the keys in `config.json`.
    """

    #: Value of "model_type" in config.json.
    model_type: ClassVar[str] = ""
    #: Keys of config.json that would change the numbers, with the values that this code computes.
    only: ClassVar[Mapping[str, Sequence[Any]]] = {}
    #: Keys that change no output of this code: special tokens, caches, heads of other tasks.
    unused: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], **changes: Any) -> tuple[Self, list[str]]:
        """The configuration that a `config.json` describes, and its keys that nothing here reads.

        Args:
            changes: fields that replace those of the file.

        Raises:
            ConfigError: another architecture, a value this code does not compute, or an unknown change.
        """
        given = data.get("model_type", cls.model_type)
        if given != cls.model_type:
            raise ConfigError(f"config.json is of a model of type {given!r}; {cls.__name__} reads {cls.model_type!r}.")
        for key, allowed in cls.only.items():
            if key in data and data[key] not in allowed:
                listed = " or ".join(repr(a) for a in allowed)
                raise ConfigError(f"config.json has {key}={data[key]!r}; this implementation computes only {listed}.")
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(changes) - names):
            raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}; its fields: {', '.join(sorted(names))}.")
        fields = cls.read_hf(data)
        if changes.get("num_labels", fields.get("num_labels")) != fields.get("num_labels"):
            fields.pop("label_names", None)
        fields.update(changes)
        known = names | set(cls.only) | cls.unused | _BOOKKEEPING
        return cls(**fields), sorted(set(data) - known)

    @classmethod
    def read_hf(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Fields from the keys of a `config.json`."""
        names = {f.name for f in dataclasses.fields(cls)}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names}

    def to_hf(self) -> dict[str, Any]:
        """The keys of `config.json`."""
        data: dict[str, Any] = {"model_type": self.model_type}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            data[field.name] = list(value) if isinstance(value, tuple) else value
        return data

    def refuse(self, name: str, allowed: str) -> None:
        """Raise the ConfigError of a field's value."""
        raise ConfigError(f"{type(self).__name__}({name}={getattr(self, name)!r}): the value must be {allowed}.")

    def check_counts(self, *names: str) -> None:
        """Every named field is an integer of at least 1."""
        for name in names:
            if not _is_count(getattr(self, name)):
                self.refuse(name, "an integer >= 1")

    def check_counts_of(self, *names: str) -> None:
        """Every named field is a tuple of integers of at least 1, and not empty."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value or not all(_is_count(v) for v in value):
                self.refuse(name, "a tuple of integers >= 1")

    def check_sides(self, *names: str) -> None:
        """Every named field is an integer of at least 1, or two: height and width."""
        for name in names:
            value = getattr(self, name)
            both = isinstance(value, tuple) and len(value) == 2 and all(_is_count(v) for v in value)
            if not both and not _is_count(value):
                self.refuse(name, "an integer >= 1, or a tuple of height and width")

    def check_shares(self, *names: str) -> None:
        """Every named field is a probability of dropout."""
        for name in names:
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                self.refuse(name, "a number of at least 0 and below 1")

    def check_positive(self, *names: str) -> None:
        """Every named field is a number above 0."""
        for name in names:
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                self.refuse(name, "a number above 0")

    def check_flags(self, *names: str) -> None:
        """Every named field is True or False."""
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self.refuse(name, "True or False")

    def check_activation(self, name: str) -> None:
        """The named field is the name of an activation function."""
        if getattr(self, name) not in ACTIVATIONS:
            self.refuse(name, "one of " + ", ".join(repr(a) for a in ACTIVATIONS))

    def check_padding(self) -> None:
        """`pad_token_id` is a token of the vocabulary, or None."""
        pad, words = getattr(self, "pad_token_id", None), getattr(self, "vocab_size", 0)
        if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < words):
            self.refuse("pad_token_id", f"None or a token from 0 to {words - 1}")

    def check_heads(self, size: str, heads: str) -> None:
        """One field is a multiple of another."""
        if getattr(self, size) % getattr(self, heads):
            self.refuse(size, f"a multiple of {heads}={getattr(self, heads)}")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ModelConfig):
    """What all classifiers have.

    Attributes:
        num_labels: classes, or values where the task is a regression.
        label_names: the classes' names, or () for LABEL_0 and so on.
        problem_type: "regression", "single_label_classification", "multi_label_classification", or None: told from
            the labels, see `classification_loss`.
    """

    num_labels: int = 2
    label_names: tuple[str, ...] = ()
    problem_type: str | None = None

    def __post_init__(self) -> None:
        self.check_counts("num_labels")
        if self.label_names and len(self.label_names) != self.num_labels:
            self.refuse("label_names", f"() or {self.num_labels} names (num_labels)")
        if self.problem_type not in PROBLEM_TYPES:
            self.refuse("problem_type", "one of " + ", ".join(repr(p) for p in PROBLEM_TYPES))

    @classmethod
    def read_hf(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Fields from the keys of a `config.json`; the classes are its `id2label`."""
        fields = super().read_hf(data)
        labels = data.get("id2label")
        if isinstance(labels, Mapping):
            fields["num_labels"] = len(labels)
            fields["label_names"] = tuple(str(labels[k]) for k in sorted(labels, key=int))
        return fields

    def to_hf(self) -> dict[str, Any]:
        """The keys of `config.json`."""
        data = super().to_hf()
        count, names = data.pop("num_labels"), data.pop("label_names")
        names = names or [f"LABEL_{i}" for i in range(count)]
        data["id2label"] = {str(i): name for i, name in enumerate(names)}
        data["label2id"] = {name: i for i, name in enumerate(names)}
        return data


#: What every config.json may have and no output depends on.
_KEYS = """
    _name_or_path architectures auto_map chunk_size_feed_forward dtype id2label label2id model_type output_attentions
    output_hidden_states return_dict task_specific_params torch_dtype torchscript transformers_version use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id gradient_checkpointing
"""
_BOOKKEEPING = frozenset(_KEYS.split())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
