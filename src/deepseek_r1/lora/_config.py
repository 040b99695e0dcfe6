"""`LoraConfig`: which layers get adapters, and of which kind. Field names and file are PEFT's. Knows no modules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..core import ArtifactError, ConfigError
from ._foreign import ForeignFields, kind_of, unknown

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

#: Initial values that PEFT knows and that only matter before the first step, so that files with them can be read.
_FOREIGN_INITS = ("orthogonal", "eva", "loftq")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(ForeignFields):
    """Low-rank adapters: a frozen weight W becomes W + s B A with A of `r` rows and B of `r` columns.

    The scale s is `lora_alpha / r`. Frozen: derive another with `dataclasses.replace`.

    Attributes:
        r: rank.
        lora_alpha: scale of the adapters, times r.
        target_modules: the layers that get adapters: names, where "q_proj" stands for every module whose path ends in
            it; a regular expression that matches whole paths; "all-linear" for every linear layer but the output
            layer; None for the query and value projections of the attention layers.
        lora_dropout: share of an adapter's inputs that is set to zero in training.
        bias: biases that are trained: "none", "all", or "lora_only" for those of layers with adapters.
        modules_to_save: names of further modules that are trained in full and saved with the adapters, such as a new
            classifier.
        use_rslora: the scale becomes lora_alpha / sqrt(r) (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732).
        use_dora: each output has its own trained magnitude, and W + s B A gives the direction only (Liu et al., DoRA,
            2024, https://arxiv.org/abs/2402.09353).
        layers_to_transform: an index or indices; only layers of a numbered list ("layers.3.") get adapters.
        layers_pattern: name of that list ("layers"), or names; None: the first numbered one in a path.
        rank_pattern: other ranks, name or regular expression of the end of a path -> r.
        alpha_pattern: the same for lora_alpha.
        exclude_modules: names or a regular expression of layers that get none.
        fan_in_fan_out: weights are stored [in, out]; settled by itself from the layers (GPT-2's `Conv1D`).
        init_lora_weights: True: A as Kaiming's uniform, B zero; "gaussian": A normal with a deviation of 1 / r, B
            zero; False: both random, so that the adapter changes the model at once (for tests).
        task_type: None or PEFT's name of the task. "SEQ_CLS" and "TOKEN_CLS" add a classifier (`classifier`, `score`)
            to modules_to_save, "QUESTION_ANS" `qa_outputs`.

    PEFT's further fields (`inference_mode`, `revision`, `lora_bias`, ...) are taken where they change nothing, and not
    kept; another value is an error.

    Raises:
        ConfigError: a field has a value that is not allowed; the message says what is.

    Example:
        >>> LoraConfig(r=16, target_modules=["q_proj", "v_proj"], use_rslora=True).scaling("model.q_proj")
        2.0
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: Sequence[str] | str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: Sequence[str] | str | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    task_type: str | None = None

    def __post_init__(self, *foreign: Any) -> None:
        super().__post_init__(*foreign)
        if not _count(self.r):
            self._refuse("r", "an integer >= 1")
        if not _number(self.lora_alpha) or self.lora_alpha <= 0:
            self._refuse("lora_alpha", "a finite number > 0")
        if not _number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            self._refuse("lora_dropout", "a number from 0 to below 1")
        if self.bias not in BIASES:
            self._refuse("bias", "one of " + ", ".join(map(repr, BIASES)))
        for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")
        if self.init_lora_weights not in (True, False, "gaussian", *_FOREIGN_INITS):
            self._refuse("init_lora_weights", "True, False or 'gaussian'")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            self._names(name)
        self._layers()
        self._patterns()
        task = getattr(self.task_type, "value", self.task_type)
        if task is not None and task not in TASKS:
            self._refuse("task_type", "None or one of " + ", ".join(map(repr, TASKS)))
        object.__setattr__(self, "task_type", task)

    def _refuse(self, name: str, allowed: str) -> None:
        raise ConfigError(f"LoraConfig({name}={getattr(self, name)!r}): the value must be {allowed}.")

    def _names(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, str):
            if name == "modules_to_save":
                self._refuse(name, "a list of names")
            try:
                re.compile(value)
            except re.error as e:
                self._refuse(name, f"a list of names or a valid regular expression ({e})")
            if name == "target_modules" and value.lower() == ALL_LINEAR:
                object.__setattr__(self, name, ALL_LINEAR)
            return
        if not isinstance(value, Sequence | set | frozenset) or not all(isinstance(v, str) and v for v in value):
            self._refuse(name, "None, a list of names" + ("" if name == "modules_to_save" else ", or one text"))
        if name == "target_modules" and not value:
            self._refuse(name, "at least one name, a regular expression, or 'all-linear'")
        kept = sorted(value) if isinstance(value, set | frozenset) else list(dict.fromkeys(value))
        object.__setattr__(self, name, tuple(kept))

    def _layers(self) -> None:
        value = self.layers_to_transform
        if value is not None and isinstance(self.target_modules, str):
            self._refuse("layers_to_transform", "None where target_modules is one text; put the indices into it")
        if value is None and self.layers_pattern:
            self._refuse("layers_pattern", "None where layers_to_transform is")
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return
        if (
            isinstance(value, str | int)
            or not isinstance(value, Sequence)
            or not all(v == 0 or _count(v) for v in value)
        ):
            self._refuse("layers_to_transform", "None, an index >= 0, or a list of them")
        object.__setattr__(self, "layers_to_transform", tuple(value))  # type: ignore[arg-type]

    def _patterns(self) -> None:
        for name, good, allowed in (
            ("rank_pattern", _count, "integers >= 1"),
            ("alpha_pattern", lambda v: _number(v) and v > 0, "numbers > 0"),
        ):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(k, str) and good(v) for k, v in value.items()):
                self._refuse(name, f"a dict of names and {allowed}")
            for key in value:
                try:
                    re.compile(key)
                except re.error as e:
                    self._refuse(name, f"a dict whose names are valid regular expressions ({key!r}: {e})")
            object.__setattr__(self, name, dict(value))

    def rank(self, path: str) -> int:
        """The rank of the adapter at a module's path."""
        return int(_matching(self.rank_pattern, path, self.r))

    def scaling(self, path: str) -> float:
        """What B A is multiplied with at a module's path."""
        r, alpha = self.rank(path), _matching(self.alpha_pattern, path, self.lora_alpha)
        return float(alpha / math.sqrt(r) if self.use_rslora else alpha / r)

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT writes them to adapter_config.json, and no others."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """The config that PEFT, or `to_dict`, wrote. Fields of PEFT that are unset are left out.

        Raises:
            ArtifactError: another kind of adapter, or a field with a value that this release has no form of.
            ConfigError: a field has a value that is not allowed.

        Example:
            >>> LoraConfig.from_dict({"peft_type": "LORA", "r": 4, "layer_replication": None}).r
            4
        """
        if (kind := kind_of(values)) != "LORA":
            raise ArtifactError(f"the adapter is of the kind {kind!r}; LORA is what can be read here.")
        known = {f.name for f in fields(cls)}
        taken = {name: value for name, value in values.items() if name in known and value is not None}
        if foreign := unknown({n: v for n, v in values.items() if n not in known}):
            name, value = next(iter(foreign.items()))
            raise ArtifactError(
                f"the adapter was made with {name}={value!r}, which this release does not know; without it the adapter "
                "would compute something else. Merge it into the model with the program that made it."
            )
        init = taken.get("init_lora_weights", True)
        if isinstance(init, str) and init not in ("gaussian", *_FOREIGN_INITS):
            raise ArtifactError(
                f"the adapter was made with init_lora_weights={init!r}, which also changed the base weights; convert "
                "it to a plain LoRA with the program that made it."
            )
        return cls(**taken)


def as_config(config: Any, where: str) -> LoraConfig:
    """The config itself, or that of PEFT's own LoraConfig, which is known by its `to_dict()`.

    Raises:
        ConfigError: neither, or one with a value that this release has no form of.
    """
    if isinstance(config, LoraConfig):
        return config
    values = config.to_dict() if callable(getattr(config, "to_dict", None)) else None
    if not isinstance(values, Mapping) or "peft_type" not in values:
        raise ConfigError(f"{where}={type(config).__name__}): a LoraConfig is needed.")
    try:
        if values.get("init_lora_weights") in _FOREIGN_INITS:
            raise ConfigError("init_lora_weights: initial values that this release knows are True, False, 'gaussian'.")
        return replace(LoraConfig.from_dict(values), inference_mode=bool(values.get("inference_mode")))
    except (ArtifactError, ConfigError) as e:
        raise ConfigError(f"{where}={type(config).__name__}): {e}") from e


def parse_config(text: str, where: str) -> LoraConfig:
    """The config in the text of an adapter_config.json.

    Raises:
        ArtifactError: no JSON, or another kind of adapter.
    """
    try:
        values = json.loads(text)
    except ValueError as e:
        raise ArtifactError(f"{where} is damaged: no JSON ({e}).") from e
    if not isinstance(values, dict):
        raise ArtifactError(f"{where} is no adapter's config: an object is needed.")
    try:
        return LoraConfig.from_dict(values)
    except (ArtifactError, ConfigError) as e:
        raise ArtifactError(f"{where}: {e}") from e


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _matching(pattern: Mapping[str, float], path: str, default: float) -> float:
    """The value under the first name that fits the path or its end."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
