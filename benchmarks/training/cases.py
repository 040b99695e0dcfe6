"""What the benchmarks of the step train: models, data, and who takes part. Knows no clocks and no files.

Every case has a small form of the same structure, so that each line of a benchmark can be run on a CPU in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import contestants
from .contestants import Run
from .modules import PlainViT, ResNet, Tagger

Sample = dict[str, Any] | tuple[Any, Any]


def _three() -> dict[str, Run]:
    return {"hugging face": contestants.hugging_face, "by hand": contestants.by_hand, "ours": contestants.ours}


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        theirs: the model of the peers; ours is this too unless `ours` is given.
        sample: one sample, by number.
        batch: samples in a batch.
        labels: whether the model computes its own loss from `labels`.
        workers: of the loader; None: a few batches that are in page-locked memory already.
        steps: how many are left out of the rate, and how many count.
        memory_gb: the limit that ours is given.
        tokens: of a sample, where the table tells tokens.
        flops: of a sample's step, where the table tells the share of the device's peak (MFU).
        contestants: who takes part, in this order; the table compares with the first.
    """

    theirs: Callable[[], nn.Module]
    sample: Callable[[int], Sample]
    batch: int
    ours: Callable[[], nn.Module] | None = None
    labels: bool = False
    workers: int | None = 4
    steps: tuple[int, int] = (40, 100)
    memory_gb: float | None = None
    tokens: int = 0
    flops: float = 0.0
    contestants: Mapping[str, Run] = field(default_factory=_three)

    def dataset(self, named: bool = False) -> Dataset[Any]:
        """The samples of one run; `named`: as dicts, whatever the case has."""
        return _Samples(self, named)

    def loader(self, device: torch.device) -> Any:
        """The batches of one run."""
        on_gpu = device.type == "cuda"
        if self.workers is None:
            return _Ready(self, on_gpu)
        return DataLoader(
            self.dataset(), self.batch, shuffle=True, num_workers=self.workers, pin_memory=on_gpu, drop_last=True
        )


class _Samples(Dataset[Any]):
    def __init__(self, case: Case, named: bool) -> None:
        self._case, self._named = case, named

    def __len__(self) -> int:
        return self._case.batch * (sum(self._case.steps) + 2)

    def __getitem__(self, index: int) -> Any:
        sample = self._case.sample(index)
        return {"x": sample[0], "labels": sample[1]} if self._named and isinstance(sample, tuple) else sample


class _Ready:
    """Batches of pictures, channels last, that no loader holds up."""

    def __init__(self, case: Case, pinned: bool, different: int = 4) -> None:
        self._length = sum(case.steps) + 2
        self._batches = []
        for k in range(different):
            pairs = [case.sample(k * case.batch + i) for i in range(case.batch)]
            x = torch.stack([pair[0] for pair in pairs]).contiguous(memory_format=torch.channels_last)
            y = torch.tensor([pair[1] for pair in pairs])
            self._batches.append((x.pin_memory(), y.pin_memory()) if pinned else (x, y))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Any:
        return (self._batches[k % len(self._batches)] for k in range(self._length))


@cache
def _drawn(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0))


@cache
def _pictures(size: int) -> Tensor:
    return torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(0))


def _text(length: int, words: int) -> Callable[[int], Sample]:
    ones = torch.ones(length, dtype=torch.long)
    return lambda i: {
        "input_ids": _drawn(words // 30, words, 1024, length)[i % 1024], "attention_mask": ones, "labels": i % 2,
    }  # fmt: skip


def _tokens(length: int, words: int) -> Callable[[int], Sample]:
    def sample(i: int) -> Sample:
        ids = _drawn(0, words, 16, length)[i % 16]
        return {"input_ids": ids, "labels": ids}

    return sample


def _picture(size: int, classes: int) -> Callable[[int], Sample]:
    return lambda i: (_pictures(size)[i % 64], i % classes)


def _sentence(words: int, length: int = 64) -> Callable[[int], Sample]:
    def sample(i: int) -> Sample:
        words_of = _drawn(0, words, 1024, length)[i % 1024]
        return words_of, words_of % 17

    return sample


def _small_transformer(small: bool) -> dict[str, int]:
    return {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} if small else {}


def bert(hf: bool, small: bool) -> nn.Module:
    """BERT with a classifier: the base size, or a small one."""
    shape = _small_transformer(small) | ({"intermediate_size": 64, "vocab_size": 1000} if small else {})
    if hf:
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(BertConfig(**shape))
    from deepseek_r1.models import BERTConfig, BERTForSequenceClassification

    return BERTForSequenceClassification(BERTConfig(**shape))


def _gpt2(hf: bool, small: bool) -> nn.Module:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "n_positions": 64} if small else {}
    if hf:
        from transformers import GPT2Config as Theirs
        from transformers import GPT2LMHeadModel

        return GPT2LMHeadModel(Theirs(**shape, use_cache=False))
    from deepseek_r1.models import GPT2, GPT2Config

    return GPT2(GPT2Config(**shape))


def llama(hf: bool, small: bool) -> nn.Module:
    """The shape of Llama 3.2 with 1.24 billion parameters in bf16, or a small one."""
    shape = {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096, "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if small:
        shape |= _small_transformer(True) | {"vocab_size": 512, "intermediate_size": 64, "num_key_value_heads": 2}
    if hf:
        from transformers import LlamaConfig as Theirs
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM(Theirs(**shape, use_cache=False)).bfloat16()
    from deepseek_r1.models import Llama, LlamaConfig

    return Llama(LlamaConfig(**shape)).bfloat16()


#: 6 for each of 1.236 billion parameters and token, and attention over 4,096 tokens (16 layers of width 2,048).
LLAMA_FLOPS = 4096 * (6 * 1.2358e9 + 12 * 16 * 2048 * 4096)

RANK = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def peft_llama(small: bool) -> nn.Module:
    """transformers' Llama with PEFT's adapters on all linear layers."""
    from peft import LoraConfig, get_peft_model

    found: nn.Module = get_peft_model(llama(True, small), LoraConfig(**RANK))  # type: ignore[arg-type]
    return found


def our_lora_llama(small: bool, base_dtype: str | None = None) -> nn.Module:
    """Our Llama with adapters on all linear layers, over weights as they are or in fewer bits."""
    from deepseek_r1 import lora

    return lora.get_peft_model(llama(False, small), lora.LoraConfig(**RANK), base_dtype=base_dtype)  # type: ignore[arg-type]


def _resnet(own: bool, small: bool) -> nn.Module:
    depths = (2, 3) if small else (3, 8, 36, 3)
    if not own:
        model: nn.Module = ResNet(depths, 8 if small else 64)
    else:
        from deepseek_r1.models import ResNet as Ours
        from deepseek_r1.models import ResNetConfig

        sizes = {"embedding_size": 8, "hidden_sizes": (32, 64), "depths": depths, "num_labels": 1000}
        model = Ours(ResNetConfig(**sizes) if small else ResNetConfig.of_depth(152))  # type: ignore[arg-type]
    return model.to(memory_format=torch.channels_last)


def _lora(small: bool, length: int, steps: tuple[int, int]) -> Case:
    """Adapters on the Llama shape. Ours may take 0.43 and 0.39 of the 64.6 GB that PEFT in a loop was seen with."""
    limits = (4.0, 4.0) if small else (28.0, 25.0)
    ours = contestants.ours
    return Case(
        partial(peft_llama, small), _tokens(length, 500 if small else 128_000), 4, partial(our_lora_llama, small),
        labels=True, steps=steps, memory_gb=limits[0], tokens=length, workers=0 if small else 4,
        contestants={
            "hugging face": contestants.hugging_face, "ours": ours,
            "ours, nf4": partial(ours, model=partial(our_lora_llama, small, "nf4"), memory_gb=limits[1]),
            "by hand": contestants.by_hand, "ours, no limit": partial(ours, memory_gb=None),
        },
    )  # fmt: skip


def cases(small: bool = False) -> dict[str, Case]:
    """All cases by name, the more important ones first; `small`: of the same structure, for a CPU."""
    few, fewer = ((2, 2), (2, 2)) if small else ((40, 100), (15, 20))
    words, picture, length = (1000, 32, 32) if small else (30_000, 224, 4096)
    workers = 0 if small else 4
    compiled = {"torch.compile": partial(contestants.by_hand, compiled=True), "ours": contestants.ours}

    def classified(size: int, batch: int, **options: Any) -> Case:
        options = {"ours": partial(bert, False, small), **options}
        return Case(
            partial(bert, True, small), _text(16 if small else size, words), 4 if small else batch, labels=True,
            workers=workers, steps=few, **options,
        )  # fmt: skip

    return {
        "gpt2-16x1024": Case(
            partial(_gpt2, True, small), _tokens(32 if small else 1024, 1000 if small else 50_257),
            4 if small else 16, partial(_gpt2, False, small), labels=True, steps=fewer, workers=workers,
        ),
        "bert-32x128": classified(128, 32),
        "llama-4x4096": Case(
            partial(llama, True, small), _tokens(length, 500 if small else 128_000), 4, partial(llama, False, small),
            labels=True, steps=fewer, memory_gb=4.0 if small else 26.0, workers=workers, tokens=length,
            flops=LLAMA_FLOPS,
        ),
        "bert-128x512": classified(512, 128, memory_gb=4.0 if small else 16.0),
        LORA: _lora(small, length, fewer),
        "resnet-152": Case(
            partial(_resnet, False, small), _picture(picture, 1000), 4 if small else 256, partial(_resnet, True, small),
            workers=None, steps=fewer if small else (20, 40), contestants={**compiled, "by hand": contestants.by_hand},
        ),
        "plain-vit": Case(
            partial(PlainViT, 32, 8, 32, 2, 4) if small else PlainViT, _picture(picture, 1000), 4 if small else 64,
            workers=0 if small else 8, steps=few,
        ),
        "lstm-tagger": Case(
            partial(Tagger, 1000, 16, 16) if small else Tagger, _sentence(1000 if small else 20_000),
            4 if small else 64, workers=workers, steps=few,
        ),
        "hf-bert-32x128": classified(128, 32, ours=None),
    }  # fmt: skip


#: The case of the `lora` verb.
LORA = "lora-llama-4x4096"
