"""ViT, ResNet and MobileNetV2 against transformers."""

from __future__ import annotations

import pytest
import torch

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.models import MobileNetV2, MobileNetV2Config, ResNet, ResNetConfig, ViT, ViTConfig, num_parameters

VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 2, 1]}
MOBILE = {"depth_multiplier": 0.35, "depth_divisible_by": 4, "min_depth": 4, "finegrained_output": False}
#: Name -> (ours, architecture's name in transformers, configuration, side of the image).
CASES = {
    "vit": (ViT, "ViT", VIT, 32),
    "vit, no biases": (ViT, "ViT", {**VIT, "qkv_bias": False, "patch_size": 16, "num_channels": 1}, 32),
    "resnet, basic": (ResNet, "ResNet", {**RESNET, "layer_type": "basic"}, 32),
    "resnet, bottleneck": (ResNet, "ResNet", RESNET, 33),
    "resnet, downsampling": (
        ResNet, "ResNet",
        {**RESNET, "downsample_in_bottleneck": True, "downsample_in_first_stage": True, "hidden_act": "gelu"}, 32,
    ),
    "mobilenet": (MobileNetV2, "MobileNetV2", MOBILE, 64),
    "mobilenet, odd size": (MobileNetV2, "MobileNetV2", {**MOBILE, "finegrained_output": True}, 37),
    "mobilenet, dilated": (
        MobileNetV2, "MobileNetV2", {**MOBILE, "output_stride": 8, "first_layer_is_expansion": False}, 32,
    ),
    "mobilenet, symmetric padding": (
        MobileNetV2, "MobileNetV2", {**MOBILE, "tf_padding": False, "hidden_act": "relu"}, 48,
    ),
}  # fmt: skip


@pytest.fixture
def pair(hf, both_ways):
    def make(case):
        ours, name, sizes, side = CASES[case]
        torch.manual_seed(0)
        config = getattr(hf, f"{name}Config")(**sizes, num_labels=5)
        theirs = getattr(hf, f"{name}ForImageClassification")(config)
        # Features of order one: scores of 1e-9 would be equal whatever the code did.
        torch.manual_seed(3)
        images = torch.randn(3, config.num_channels, side, side)
        return theirs, *both_ways(theirs, ours), images

    return make


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_losses_are_those_of_transformers(pair, case):
    theirs, ours, again, images = pair(case)
    labels = torch.tensor([0, 4, 2])
    with torch.no_grad():
        wanted = theirs(images, labels=labels)
        assert wanted.logits.std() > 1e-3
        got = ours(images, labels=labels)
        torch.testing.assert_close(ours(images), wanted.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(got["logits"], wanted.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(got["loss"], wanted.loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(again(images).logits, wanted.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["vit", "resnet, basic", "mobilenet"])
def test_gradients_and_running_statistics_in_training(pair, same_gradients, case):
    theirs, ours, _, images = pair(case)
    labels = torch.tensor([0, 4, 2])
    for model in (theirs.double().train(), ours.double().train()):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        out = model(images.double(), labels=labels)
        out["loss"].backward()
    same_gradients(ours, theirs, lambda _, grad: grad)
    for name, tensor in ours.named_buffers():
        torch.testing.assert_close(tensor, theirs.get_buffer(name))


@pytest.mark.parametrize("case", ["vit", "resnet, bottleneck", pytest.param("mobilenet", marks=pytest.mark.slow)])
def test_it_compiles_into_one_graph(case):
    kind, _, sizes, side = CASES[case]
    torch.manual_seed(0)
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    model = kind(kind.config_class(**config, num_labels=5)).train()
    if kind is MobileNetV2:
        model.dropout.p = 0.0
    images, labels = torch.randn(2, 3, side, side), torch.tensor([0, 4])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(images, labels=labels)["loss"]
    torch.testing.assert_close(loss, model(images, labels=labels)["loss"], rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sizes_of_known_models():
    """As published: millions of parameters, and billions of multiplications for one image."""
    with torch.device("meta"):
        resnets = {n: ResNet(ResNetConfig.of_depth(n)) for n in (18, 34, 50, 101, 152)}
        vit, mobile = ViT(ViTConfig(num_labels=1000)), MobileNetV2(MobileNetV2Config(num_labels=1000))
    assert {n: num_parameters(m) for n, m in resnets.items()} == {
        18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808,
    }  # fmt: skip
    assert num_parameters(vit) == 86_567_656
    assert num_parameters(mobile) == 3_504_872
    for model, billions in ((resnets[18], 1.8), (resnets[50], 4.1), (mobile, 0.30), (vit, 17.6)):
        assert model.flops_per_sample() / 6e9 == pytest.approx(billions, rel=0.03)
    assert resnets[50].flops_per_sample(112) < 0.3 * resnets[50].flops_per_sample()


def test_the_trainer_trains_one():
    from deepseek_r1.train import Trainer

    torch.manual_seed(0)
    images = torch.randn(48, 1, 16, 16)
    labels = torch.arange(48) % 2
    images[labels == 1, :, :8] += 1.5
    batches = list(zip(images.split(12), labels.split(12), strict=True))
    model = ResNet(
        ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1), layer_type="basic")
    )
    trainer = Trainer(model, batches, batches, lr=1e-2)
    trainer.train(epochs=4)
    assert trainer.evaluate()["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (ViTConfig, {"image_size": 30}, "a multiple of patch_size=16"),
        (ViTConfig, {"image_size": (32, 0)}, "height and width"),
        (ResNetConfig, {"depths": (1, 2)}, "a number for each of hidden_sizes"),
        (ResNetConfig, {"depths": [1, 2, 3, 4]}, "a tuple of integers"),
        (ResNetConfig, {"layer_type": "wide"}, "'basic' or 'bottleneck'"),
        (ResNetConfig, {"hidden_sizes": (6, 8, 8, 8)}, "multiples of 4"),
        (MobileNetV2Config, {"output_stride": 4}, "8, 16 or 32"),
        (MobileNetV2Config, {"depth_multiplier": 0}, "above 0"),
    ],
)
def test_configurations_that_cannot_be(config, change, message):
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_other_things_that_cannot_be():
    with pytest.raises(ConfigError, match="one of 18, 34, 50, 101, 152"):
        ResNetConfig.of_depth(49)
    with pytest.raises(InputError, match=r"\[batch, 3, 32, 32\] is needed"):
        ViT(ViTConfig(**VIT))(torch.zeros(2, 3, 24, 24))
