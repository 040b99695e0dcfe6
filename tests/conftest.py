"""Fixtures that several rooms share."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def digits_artifact(tmp_path_factory):
    """An Artifact for the digits data, raw scans [n, 64], and the labels that the module gives them (untrained)."""
    import torch

    from deepseek_r1.data import digits
    from deepseek_r1.deploy import export
    from deepseek_r1.models import DigitsNet
    from deepseek_r1.runtime import preprocess

    torch.manual_seed(0)
    net = DigitsNet(width=4).eval()
    data = digits()
    path: Path = tmp_path_factory.mktemp("digits") / "artifact"
    export(net, path, example_inputs=data.tensors("test")[0][:8], labels=data.labels, preprocessing=data.preprocessing)
    from sklearn.datasets import load_digits

    raw = load_digits().data[:20]
    with torch.no_grad():
        classes = net(torch.from_numpy(preprocess(data.preprocessing, raw))).argmax(-1)
    return path, np.asarray(raw), [data.labels[i] for i in classes.tolist()]
