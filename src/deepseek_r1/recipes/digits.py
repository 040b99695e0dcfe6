"""The default journey: real handwritten digits, from an untrained module to a checked Artifact.

Copy this file, change what you like, and run it with `deepseek-r1 run my_recipe.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch

import deepseek_r1 as dr1


def shifted(loader: torch.utils.data.DataLoader) -> dr1.DSDataLoader:  # type: ignore[type-arg]
    """The same loader, each image moved by one pixel in a random direction, or left where it is."""

    def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (torch.stack(column) for column in zip(*samples))
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        corners = torch.tensor([[1, 1], [0, 1], [2, 1], [1, 0], [1, 2]])[torch.randint(0, 5, (len(x),))]
        moved = [image[:, top : top + 8, left : left + 8] for image, (top, left) in zip(padded, corners.tolist())]
        return torch.stack(moved), y

    return dr1.DSDataLoader(loader.dataset, batch_size=64, shuffle=True, seed=0, collate_fn=collate)


def main(*, out: Path, seed: int = 0) -> dr1.Report:
    """Train, quantise, optimise, export, check. Writes `model.onnx` and `artifact/` to `out`."""
    dr1.seed_everything(seed)
    digits = dr1.data.digits(seed=seed)
    model = dr1.models.DigitsNet()

    # A network this small is fastest on one thread.
    config = dr1.TrainingConfig(schedule="cosine", warmup=0.2, weight_decay=0.05, threads=1)
    trainer = dr1.Trainer(model, shifted(digits.train), digits.val, lr=3e-3, config=config)
    training = trainer.train(epochs=30)

    quantised = dr1.quantize(model, dataset=digits.train)
    batch = digits.tensors("test")[0][:32]
    # The artifact runs on one engine; the race is between it and eager PyTorch, in both precisions.
    engines = [dr1.deploy.ARTIFACT_ENGINE]
    fastest = dr1.optimize(quantised, example_inputs=batch, dataset=digits.val, engines=engines)

    dr1.deploy.export(fastest, out / "model.onnx", dataset=digits.test)
    exported = dr1.deploy.export(
        fastest, out / "artifact", dataset=digits.test, name="digits",
        labels=digits.labels, preprocessing=digits.preprocessing,
    )  # fmt: skip

    report = dr1.deploy.scorecard(quantised, out / "artifact", digits.test, labels=digits.labels)
    report.check("test accuracy", report["accuracy"].after >= 0.99, f"{report['accuracy'].after:.4f}, at least 0.99")
    report.sections += [training, quantised.report, fastest.report, exported]
    return report
