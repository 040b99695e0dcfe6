"""A C++ swish from source to a trained and optimised network.

Needs a C++ compiler. Run: python examples/custom_operators/swish.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import deepseek_r1 as dr1

HERE = Path(__file__).parent


def network() -> torch.nn.Module:
    """A small classifier with the custom activation."""
    model = torch.nn.Sequential()
    model.add_module("first", dr1.Linear(64, 128))
    model.add_module("swish", dr1.ops.Swish())
    model.add_module("last", dr1.Linear(128, 10))
    return model


def run(place: Path) -> dr1.Report:
    """Build, register, train on the digits, race; the report has the accuracy and the race."""
    dr1.ops.register_custom_op("swish", dr1.ops.build_op(HERE / "swish.cc", place / "swish.so"))
    dr1.seed_everything(0)
    data = dr1.data.digits()
    model = network()
    pixels, labels = data.tensors("train")
    loader = dr1.DSDataLoader(torch.utils.data.TensorDataset(pixels.flatten(1), labels), batch_size=64, shuffle=True)
    dr1.Trainer(model, loader, lr=2e-3).train(epochs=8)
    pixels, labels = data.tensors("test")
    fastest = dr1.optimize(model, example_inputs=pixels.flatten(1)[:32])

    report = dr1.Report("a custom operator, trained and optimised")
    accuracy = (fastest(pixels.flatten(1)).argmax(1) == labels).float().mean().item()
    report.add("accuracy", accuracy, how="digits, test part")
    for engine, reason in fastest.report.skipped:
        report.skip(engine, reason)
    report.sections.append(fastest.report)
    report.check("accuracy", accuracy > 0.9, f"{accuracy:.3f}, at least 0.9")
    return report


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder)).print()
