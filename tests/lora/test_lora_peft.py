"""The same adapters in PEFT and here: files of one read by the other give the same outputs."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError
from deepseek_r1.lora import LoraConfig, PeftModel, get_peft_model

from .conftest import Net

pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its own dependencies warn of
    peft = pytest.importorskip("peft", reason="PEFT, the other implementation, is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"v_proj": 3, "value": 3, "c_proj": 3}, "alpha_pattern": {"q_proj": 20, "query": 20}},
    "all biases": {"bias": "all"},
    "biases": {"bias": "lora_only"},
    "all linear": {"target_modules": "all-linear"},
    "all linear dora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
}


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50))


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def _bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=50))


MODELS = {
    "net": (Net, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["head"]}),
    "net, others": (Net, {"target_modules": ["emb", "conv", "q_proj"]}),
    "llama": (_llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["lm_head"]}),
    "gpt2": (_gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "bert": (_bert, {"task_type": "SEQ_CLS"}),
}


def outputs(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))
    found = model.eval()(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def fill(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype) + ("magnitude" in name)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_files_of_either_are_read_by_the_other(name, kind, tmp_path):
    torch.manual_seed(0)
    build, fields = MODELS[name]
    if name == "net" and kind.startswith("all linear"):
        pytest.skip("PEFT knows 'all-linear' for transformers' models only")
    if name == "net, others" and kind.startswith("all"):
        pytest.skip("the targets of this model are its point")
    fields = {"r": 4, "lora_alpha": 12, **fields, **KINDS[kind]}
    base = build().double()

    theirs = fill(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)).double())
    theirs.save_pretrained(tmp_path / "theirs")
    read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(outputs(read), outputs(theirs), rtol=0, atol=1e-6)

    ours = fill(get_peft_model(copy.deepcopy(base), LoraConfig(**fields)).double())
    assert (outputs(ours) - outputs(base)).abs().max() > 1e-3
    ours.save_pretrained(tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").double()
    torch.testing.assert_close(outputs(read), outputs(ours), rtol=0, atol=1e-6)
    assert _fields(tmp_path / "ours") == _fields(tmp_path / "theirs")


def _fields(folder):
    """The fields of ours that PEFT writes, as one form: it writes some lists in an order of its own."""
    mine = set(LoraConfig().to_dict()) - {"target_modules", "modules_to_save"}
    return {k: v for k, v in json.loads((folder / "adapter_config.json").read_text()).items() if k in mine}


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_steps_of_training_are_the_same(kind):
    torch.manual_seed(0)
    base = _llama()
    fields = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **KINDS[kind]}
    theirs = fill(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)))
    ours = fill(get_peft_model(base, LoraConfig(**fields)))
    ids = torch.randint(0, 50, (4, 6))
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def test_as_many_numbers_are_trained(capsys):
    for kind in KINDS.values():
        fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], **kind}
        theirs = peft.get_peft_model(_llama(), peft.LoraConfig(**fields))
        ours = get_peft_model(_llama(), LoraConfig(**fields))
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_peft_s_config_object_is_taken():
    values = {"inference_mode": False, "r": 8, "lora_alpha": 32, "lora_dropout": 0.1}
    theirs = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, target_modules=["q_proj"], **values)
    model = get_peft_model(Net(), theirs)
    expected = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **values)
    assert model.peft_config["default"] == expected
    with pytest.raises(ConfigError, match="lora_bias=True"):
        get_peft_model(Net(), peft.LoraConfig(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(ConfigError, match="of the kind 'IA3'"):
        get_peft_model(Net(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
