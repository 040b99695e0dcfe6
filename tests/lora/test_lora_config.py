"""`LoraConfig`: checks, scales, patterns, and the form in which PEFT's file has it."""

import dataclasses
import json

import pytest

from deepseek_r1.core import ArtifactError, ConfigError
from deepseek_r1.lora import LoraConfig, get_peft_model

from .conftest import Net


def test_defaults_are_peft_s():
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 8, 0.0, "none")
    assert config.init_lora_weights is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("r", 0, "an integer >= 1"),
        ("r", -1, "an integer >= 1"),
        ("r", 4.0, "an integer >= 1"),
        ("r", True, "an integer >= 1"),
        ("lora_alpha", float("nan"), "a finite number > 0"),
        ("lora_alpha", float("inf"), "a finite number > 0"),
        ("lora_alpha", 0, "a finite number > 0"),
        ("lora_dropout", 1.0, "from 0 to below 1"),
        ("lora_dropout", -0.1, "from 0 to below 1"),
        ("bias", "some", "'none', 'all', 'lora_only'"),
        ("use_dora", "yes", "True or False"),
        ("use_rslora", 1, "True or False"),
        ("init_lora_weights", "pissa", "True, False or 'gaussian'"),
        ("target_modules", [], "at least one name"),
        ("target_modules", "q_proj(", "valid regular expression"),
        ("target_modules", [1], "a list of names"),
        ("exclude_modules", 3, "a list of names"),
        ("modules_to_save", "head", "a list of names"),
        ("layers_to_transform", -1, "an index >= 0"),
        ("layers_to_transform", [0, "1"], "an index >= 0"),
        ("layers_pattern", "layers", "None where layers_to_transform is"),
        ("rank_pattern", {"q": 0}, "integers >= 1"),
        ("rank_pattern", {"q(": 1}, "valid regular expressions"),
        ("alpha_pattern", {"q": float("nan")}, "numbers > 0"),
        ("task_type", "CHAT", "'CAUSAL_LM'"),
    ],
)
def test_bad_values(field, value, allowed):
    with pytest.raises(ConfigError, match=rf"LoraConfig\({field}=.*") as error:
        LoraConfig(**{field: value})
    assert allowed in str(error.value)


def test_unknown_fields_are_errors():
    with pytest.raises(TypeError, match="lora_alhpa"):
        LoraConfig(lora_alhpa=3)


def test_layers_need_names():
    with pytest.raises(ConfigError, match="put the indices into it"):
        LoraConfig(target_modules=r".*q_proj", layers_to_transform=[0])


def test_scales_and_patterns():
    ranks = {"v_proj": 4, r"layers\.1\..*": 8}
    config = LoraConfig(r=16, lora_alpha=32, rank_pattern=ranks, alpha_pattern={"v_proj": 2})
    assert (config.rank("layers.0.q_proj"), config.scaling("layers.0.q_proj")) == (16, 2.0)
    assert (config.rank("layers.0.v_proj"), config.scaling("layers.0.v_proj")) == (4, 0.5)
    assert config.rank("model.layers.1.q_proj") == 8
    assert config.rank("layers.0.my_v_proj") == 16, "a name is whole"
    assert LoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling("a") == 2.0


def test_the_file_s_form_comes_back():
    config = LoraConfig(
        r=4, target_modules={"b", "a"}, modules_to_save=["head"], layers_to_transform=[1, 0], use_dora=True,
        rank_pattern={"a": 2}, task_type="CAUSAL_LM", init_lora_weights="gaussian", exclude_modules=["c"],
    )  # fmt: skip
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain["target_modules"] == ["a", "b"]
    assert LoraConfig.from_dict(plain) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3"}, "of the kind 'IA3'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "also changed the base weights"),
    ],
)
def test_what_peft_can_and_we_cannot_is_said(values, words):
    with pytest.raises(ArtifactError, match=words):
        LoraConfig.from_dict(values)


def test_what_changes_nothing_is_passed_over():
    values = {"peft_type": "LORA", "peft_version": "9", "corda_config": None, "loftq_config": {}, "use_qalora": False,
              "a_field_of_tomorrow": None, "init_lora_weights": "eva", "inference_mode": True}  # fmt: skip
    assert LoraConfig.from_dict(values) == LoraConfig(init_lora_weights="eva")


def test_code_written_for_peft_runs():
    values = {"peft_type": "LORA", "inference_mode": False, "revision": None, "base_model_name_or_path": "org/name",
              "layer_replication": None, "lora_bias": False, "target_parameters": None, "loftq_config": {}}  # fmt: skip
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **values)
    assert config == LoraConfig(r=4, task_type="CAUSAL_LM")
    assert not set(values) & set(config.to_dict())
    assert dataclasses.replace(config, r=8).r == 8


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("inference_mode", True, "must be False.*PeftModel.from_pretrained"),
        ("peft_type", "IA3", "must be 'LORA'"),
        ("lora_bias", True, "must be False"),
        ("layer_replication", [[0, 2]], "must be None"),
        ("target_parameters", ["experts.weight"], "must be None"),
        ("trainable_token_indices", [3], "must be None"),
    ],
)
def test_peft_s_fields_that_would_change_something_are_errors(field, value, words):
    with pytest.raises(ConfigError, match=rf"LoraConfig\({field}=.*{words}"):
        LoraConfig(**{field: value})


class PeftConfig:
    """What PEFT's config objects have in common."""

    def __init__(self, **values):
        self.values = values

    def to_dict(self):
        plain = {
            "peft_type": "LORA",
            "task_type": None,
            "inference_mode": False,
            "lora_bias": False,
            "loftq_config": {},
        }
        return {**plain, **self.values}


def test_peft_s_own_config_is_taken(net, ids):
    model = get_peft_model(net, PeftConfig(r=3, target_modules={"v_proj", "q_proj"}, corda_config=None))
    assert model.peft_config["default"] == LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", PeftConfig(r=2, target_modules="all-linear"))
    assert model.peft_config["second"].r == 2
    for values, words in (
        ({"peft_type": "IA3"}, "of the kind 'IA3'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"inference_mode": True}, "inference_mode=True"),
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"r": 0}, "an integer >= 1"),
    ):
        with pytest.raises(ConfigError, match=rf"add_adapter\(config=PeftConfig\): .*{words}"):
            model.add_adapter("third", PeftConfig(**values))
    with pytest.raises(ConfigError, match=r"peft_config=dict\): a LoraConfig is needed"):
        get_peft_model(Net(), {"r": 8})
