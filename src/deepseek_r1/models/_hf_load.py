"""The source `hf:`: a directory or a repository of Hugging Face as the architecture that its `config.json` names.

Knows nothing about networks: what is not on this machine is an error.
"""

from __future__ import annotations

import os
from typing import Any

from ..core import InputError
from ._pretrained import PretrainedModel
from ._weight_files import CONFIG, find_directory, read_json
from .bert import BERTForSequenceClassification
from .gpt2 import GPT2
from .llama import Llama
from .mobilenet_v2 import MobileNetV2
from .resnet import ResNet
from .vit import ViT

#: Value of "model_type" in config.json -> class.
ARCHITECTURES: dict[str, type[PretrainedModel[Any]]] = {
    kind.config_class.model_type: kind
    for kind in (BERTForSequenceClassification, GPT2, Llama, MobileNetV2, ResNet, ViT)
}


def load_hf(source: str | os.PathLike[str], **options: Any) -> PretrainedModel[Any]:
    """The model of a directory, a repository `org/name` or a short name; see `PretrainedModel.from_pretrained`.

    Args:
        options: `dtype`, and fields of the configuration that replace the file's.

    Raises:
        InputError: nothing was found, and the message lists where it was looked for; or another architecture was.

    Example:
        >>> import tempfile
        >>> from deepseek_r1.models import GPT2Config
        >>> folder = GPT2(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tempfile.mkdtemp())
        >>> type(load_hf(folder)).__name__
        'GPT2'
    """
    names = {short: found for kind in ARCHITECTURES.values() for short, found in kind.repositories.items()}
    folder = find_directory(source, names)
    kind = read_json(folder / CONFIG).get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{folder} holds a model of type {kind!r}; those here are {', '.join(sorted(ARCHITECTURES))}. Load it with "
            "its own library: any torch.nn.Module is accepted wherever a model is."
        )
    return ARCHITECTURES[kind].from_pretrained(folder, **options)
