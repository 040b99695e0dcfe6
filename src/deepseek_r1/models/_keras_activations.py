"""Keras' activation layers, and those that act in training only: dropout and augmentation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ._keras_modules import DropTogether, Slope
from ._keras_values import Call, First, NoTranslationError, fill_, layer, weight

#: Layers that only change the input during training, and differently from call to call.
_AUGMENTATIONS = (
    "GaussianDropout", "GaussianNoise", "MixUp", "CutMix", "RandAugment",
    "RandomBrightness", "RandomColorDegeneration", "RandomColorJitter", "RandomContrast", "RandomElasticTransform",
    "RandomErasing", "RandomFlip", "RandomGaussianBlur", "RandomGrayscale", "RandomHue", "RandomInvert",
    "RandomPerspective", "RandomPosterization", "RandomRotation", "RandomSaturation", "RandomSharpness",
    "RandomShear", "RandomTranslation", "RandomZoom",
)  # fmt: skip


@layer("Activation")
def activation(call: Call) -> Any:
    """The function itself."""
    value = call.x
    return call.activated(
        First(value.first) if value.own is None and value.first else call.own(value), call.op.activation
    )


@layer("ReLU")
def relu(call: Call) -> Any:
    """torch.relu, F.relu6, or the general form."""
    op = call.op
    if op.threshold == 0 and op.negative_slope == 0:
        if op.max_value is None:
            return call.pointwise(call.x, torch.relu)
        if op.max_value == 6:
            return call.pointwise(call.x, F.relu6)
        return call.pointwise(call.x, torch.clamp, 0.0, float(op.max_value))
    if op.threshold == 0 and op.max_value is None:
        return call.pointwise(call.x, F.leaky_relu, float(op.negative_slope))
    raise NoTranslationError("a threshold, or a slope together with a largest value")


@layer("LeakyReLU")
def leaky_relu(call: Call) -> Any:
    """F.leaky_relu."""
    return call.pointwise(call.x, F.leaky_relu, float(call.op.negative_slope))


@layer("ELU")
def elu(call: Call) -> Any:
    """F.elu."""
    return call.pointwise(call.x, F.elu, float(call.op.alpha))


@layer("PReLU")
def prelu(call: Call) -> Any:
    """nn.PReLU where the slope belongs to the channel, else with a slope of its own for each place."""
    op, value = call.op, call.x
    alpha = weight(op.alpha)
    if alpha.numel() == alpha.shape[-1]:
        y = call.module(lambda: fill_(nn.PReLU(len(alpha.reshape(-1))), weight=alpha), call.first(value))
        return First(y) if value.rank > 2 else y
    return call.module(lambda: Slope(alpha), value)


@layer("Softmax")
def softmax(call: Call) -> Any:
    """torch.softmax along one axis."""
    if not isinstance(call.op.axis, int) or call.mask("mask", 1, call.x) is not None:
        raise NoTranslationError("several axes, or a mask")
    return call.run(torch.softmax, call.x, call.op.axis)


@layer("Dropout", "AlphaDropout")
def dropout(call: Call) -> Any:
    """nn.Dropout, nn.AlphaDropout; with a noise shape that drops whole samples or places, DropTogether."""
    op, value = call.op, call.x
    shape = getattr(op, "noise_shape", None)
    make: Any = (lambda: nn.Dropout(op.rate)) if type(op).__name__ == "Dropout" else (lambda: nn.AlphaDropout(op.rate))
    if shape is not None and any(n is not None for n in shape):
        if type(op).__name__ == "AlphaDropout":
            raise NoTranslationError("noise_shape")
        make = lambda: DropTogether(op.rate, list(shape))  # noqa: E731
        if any(n != 1 for n in shape[1:]):
            return call.module(make, value)
    # What drops single elements or whole samples is the same in either layout.
    return First(call.module(make, value.first)) if value.own is None else call.module(make, value.own)


@layer("SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D")
def spatial_dropout(call: Call) -> Any:
    """nn.Dropout1d, 2d, 3d: whole channels."""
    op, value = call.op, call.x
    kind: Any = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}[value.rank]
    if getattr(op, "data_format", "channels_last") == "channels_first":
        return call.module(lambda: kind(op.rate), value)
    return First(call.module(lambda: kind(op.rate), call.first(value)))


@layer(*_AUGMENTATIONS)
def augmentation(call: Call) -> Any:
    """The identity, and a note."""
    call.builder.notes.append(
        f"{call.name} ({type(call.op).__name__}) acts in training only and was left out; do it where the data is loaded"
    )
    return call.x
