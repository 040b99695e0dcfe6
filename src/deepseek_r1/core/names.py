"""The public names of the package as strings, so that looking one up imports only what it needs.

Knows nothing about the things behind the names; `tests/core/test_names.py` holds the tables against torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

# Strings, because one name a line would be two hundred lines.
_NN_NAMES = """
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveLogSoftmaxWithLoss AdaptiveMaxPool1d
    AdaptiveMaxPool2d AdaptiveMaxPool3d AlphaDropout AvgPool1d AvgPool2d AvgPool3d BCELoss BCEWithLogitsLoss
    BatchNorm1d BatchNorm2d BatchNorm3d Bilinear Buffer CELU CTCLoss ChannelShuffle CircularPad1d CircularPad2d
    CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Container Conv1d Conv2d Conv3d ConvTranspose1d
    ConvTranspose2d ConvTranspose3d CosineEmbeddingLoss CosineSimilarity CrossEntropyLoss CrossMapLRN2d DataParallel
    Dropout Dropout1d Dropout2d Dropout3d ELU Embedding EmbeddingBag FeatureAlphaDropout Flatten Fold
    FractionalMaxPool2d FractionalMaxPool3d GELU GLU GRU GRUCell GaussianNLLLoss GroupNorm Hardshrink Hardsigmoid
    Hardswish Hardtanh HingeEmbeddingLoss HuberLoss Identity InstanceNorm1d InstanceNorm2d InstanceNorm3d KLDivLoss
    L1Loss LPPool1d LPPool2d LPPool3d LSTM LSTMCell LayerNorm LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d
    LazyConv1d LazyConv2d LazyConv3d LazyConvTranspose1d LazyConvTranspose2d LazyConvTranspose3d LazyInstanceNorm1d
    LazyInstanceNorm2d LazyInstanceNorm3d LazyLinear LeakyReLU Linear LinearCrossEntropyLoss
    LinearCrossEntropyOptions LocalResponseNorm LogSigmoid LogSoftmax MSELoss MarginRankingLoss MaxPool1d MaxPool2d
    MaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d Mish Module ModuleDict ModuleList MultiLabelMarginLoss
    MultiLabelSoftMarginLoss MultiMarginLoss MultiheadAttention NLLLoss NLLLoss2d PReLU PairwiseDistance Parameter
    ParameterDict ParameterList PixelShuffle PixelUnshuffle PoissonNLLLoss RMSNorm RNN RNNBase RNNCell RNNCellBase
    RReLU ReLU ReLU6 ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d
    ReplicationPad3d SELU Sequential SiLU Sigmoid SmoothL1Loss SoftMarginLoss Softmax Softmax2d Softmin Softplus
    Softshrink Softsign SyncBatchNorm Tanh Tanhshrink Threshold Transformer TransformerDecoder
    TransformerDecoderLayer TransformerEncoder TransformerEncoderLayer TripletMarginLoss
    TripletMarginWithDistanceLoss Unflatten Unfold UninitializedBuffer UninitializedParameter Upsample
    UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d
"""
TORCH_NN = frozenset(_NN_NAMES.split())

#: Optimizers of torch.optim that are reachable as `deepseek_r1.<Name>`.
_OPTIM_NAMES = """
    ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS Muon NAdam Optimizer RAdam RMSprop Rprop SGD
    SparseAdam
"""
TORCH_OPTIM = frozenset(_OPTIM_NAMES.split())

#: Rooms of the package that are reachable as attributes before anybody imported them.
ROOMS = (
    "compression", "core", "data", "deploy", "engines", "graph", "lora", "measure", "models", "nn", "ops",
    "pruning", "quantization", "recipes", "runtime", "train",
)  # fmt: skip

#: Rooms inside rooms that have a short name too: name -> module.
INNER_ROOMS = {"jit": "deepseek_r1.graph.jit"}

#: Own public names: name -> "module:attribute". The same table serves `deepseek_r1` and `deepseek`.
PUBLIC: dict[str, str] = {
    "AdamW": "deepseek_r1.train:AdamW",
    "AdamW8bit": "deepseek_r1.train:AdamW8bit",
    "AdaptiveOptimizer": "deepseek_r1.train:AdaptiveOptimizer",
    "Artifact": "deepseek_r1.core:Artifact",
    "Budget": "deepseek_r1.core:Budget",
    "DSCheckpoint": "deepseek_r1.train:DSCheckpoint",
    "DSDataLoader": "deepseek_r1.data:DSDataLoader",
    "DSModule": "deepseek_r1.module:DSModule",
    "DSOptimizer": "deepseek_r1.train:DSOptimizer",
    "DSQuantizer": "deepseek_r1.quantization:DSQuantizer",
    "DeepSeekError": "deepseek_r1.core:DeepSeekError",
    "DomainAdapter": "deepseek_r1.data:DomainAdapter",
    "DomainMixture": "deepseek_r1.data:DomainMixture",
    "Drawing": "deepseek_r1.graph:Drawing",
    "Executable": "deepseek_r1.engines:Executable",
    "ElasticWeightConsolidation": "deepseek_r1.train:ElasticWeightConsolidation",
    "Lion": "deepseek_r1.train:Lion",
    "Muon": "deepseek_r1.train:Muon",
    "Program": "deepseek_r1.graph:Program",
    "R1Quantizer": "deepseek_r1.quantization:R1Quantizer",
    "R1Pruner": "deepseek_r1.pruning:R1Pruner",
    "Report": "deepseek_r1.core:Report",
    "Sequential": "deepseek_r1.nn:Sequential",
    "Trainer": "deepseek_r1.train:Trainer",
    "TrainingConfig": "deepseek_r1.train:TrainingConfig",
    "capture": "deepseek_r1.graph:capture",
    "load_artifact": "deepseek_r1.runtime:load",
    "load_model": "deepseek_r1.module:load_model",
    "model": "deepseek_r1.module:model",
    "optimize": "deepseek_r1.engines:optimize",
    "quantize": "deepseek_r1.quantization:quantize",
    "seed_everything": "deepseek_r1.train:seed_everything",
    "static_programs": "deepseek_r1.graph:static_programs",
    "trace": "deepseek_r1.graph:trace",
}


def lazy_getattr(
    package: str, table: Mapping[str, str], rooms: tuple[str, ...] = (), inner: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """A module-level `__getattr__` that imports a name when it is first asked for.

    Own names win over torch's. Unknown and dunder names raise AttributeError without importing torch.

    Example:
        >>> look = lazy_getattr("example", {"pi": "math:pi"})
        >>> round(look("pi"), 2)
        3.14
    """

    def look_up(name: str) -> Any:
        if name in table:
            module, _, attribute = table[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name in rooms:
            return importlib.import_module(f"{package}.{name}")
        if inner is not None and name in inner:
            return importlib.import_module(inner[name])
        for names, module in ((TORCH_NN, "torch.nn"), (TORCH_OPTIM, "torch.optim")):
            if name in names:
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return look_up


def mirror(package: str, target: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a module that shows another one's names; `target` is imported at the first use.

    Dunder look-ups raise AttributeError without importing it.

    Example:
        >>> look, names = mirror("example.numbers", "math")
        >>> round(look("pi"), 2), "tau" in names()
        (3.14, True)
    """

    def look_up(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(target), name)
        except AttributeError as e:
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from e

    return look_up, lambda: dir(importlib.import_module(target))
