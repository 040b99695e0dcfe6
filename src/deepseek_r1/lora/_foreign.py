"""Fields of PEFT's LoraConfig that nothing here reads, by name, so that code written for PEFT runs or is told why not.

Knows names and the values that change nothing, not what the others would do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any

from ..core import ConfigError

#: Fields that change nothing in what an adapter computes, or say who wrote it: of any value.
BESIDE = frozenset((
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "megatron_core", "loftq_config",
    "qalora_group_size", "ensure_weight_tying", "eva_config", "runtime_config",
))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ForeignFields:
    """Taken by `LoraConfig` where they change nothing, and forgotten."""

    inference_mode: InitVar[bool] = False
    peft_type: InitVar[Any] = "LORA"
    auto_mapping: InitVar[Any] = None
    base_model_name_or_path: InitVar[str | None] = None
    revision: InitVar[str | None] = None
    peft_version: InitVar[str | None] = None
    megatron_config: InitVar[Any] = None
    megatron_core: InitVar[Any] = None
    trainable_token_indices: InitVar[Any] = None
    loftq_config: InitVar[Any] = None
    eva_config: InitVar[Any] = None
    corda_config: InitVar[Any] = None
    lora_ga_config: InitVar[Any] = None
    velora_config: InitVar[Any] = None
    monteclora_config: InitVar[Any] = None
    arrow_config: InitVar[Any] = None
    kasa_config: InitVar[Any] = None
    runtime_config: InitVar[Any] = None
    alora_invocation_tokens: InitVar[Any] = None
    layer_replication: InitVar[Any] = None
    target_parameters: InitVar[Any] = None
    use_qalora: InitVar[bool] = False
    qalora_group_size: InitVar[Any] = None
    use_bdlora: InitVar[Any] = None
    lora_bias: InitVar[bool] = False
    ensure_weight_tying: InitVar[bool] = False

    def __post_init__(self, *values: Any) -> None:
        given = dict(zip(ForeignFields.__annotations__, values, strict=True))
        if given.pop("inference_mode"):
            raise ConfigError(
                "LoraConfig(inference_mode=True): the value must be False here, where adapters are made to be trained. "
                "PeftModel.from_pretrained gives one from a file that is not."
            )
        if (kind := kind_of(given)) != "LORA":
            raise ConfigError(f"LoraConfig(peft_type={kind!r}): the value must be 'LORA', the only kind there is.")
        for name, value in unknown(given).items():
            neutral = getattr(ForeignFields, name)
            raise ConfigError(
                f"LoraConfig({name}={value!r}): PEFT knows this, this release does not; the value must be {neutral!r}."
            )


def kind_of(values: Mapping[str, Any]) -> str:
    """The kind of adapter in the fields of a config of PEFT, where it is a text or a member of an Enum."""
    kind = values.get("peft_type", "LORA")
    return str(getattr(kind, "value", kind))


def unknown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of fields that nothing reads those that would change what an adapter computes.

    Example:
        >>> unknown({"revision": "main", "lora_bias": True, "loftq_config": {}, "a_field_of_tomorrow": None})
        {'lora_bias': True}
    """
    left = {n: v for n, v in values.items() if n not in BESIDE and n not in ("peft_type", "inference_mode")}
    empty = {n for n, v in left.items() if v is None or v is False or (isinstance(v, list | tuple | dict) and not v)}
    return {n: v for n, v in left.items() if n not in empty}
