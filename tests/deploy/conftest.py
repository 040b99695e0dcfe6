"""One ONNX export for each graph: the exporter takes most of a second, and these tests are about what comes after."""

import onnx
import pytest

from deepseek_r1.deploy import _onnx

_made = {}
_plain = _onnx.to_onnx


def _once(program, precision=None):
    key = (id(program.exported), precision)
    if key not in _made:
        # The program is kept, so that its id is not given to another.
        _made[key] = (program, _plain(program, precision=precision).SerializeToString())
    return onnx.ModelProto.FromString(_made[key][1])


@pytest.fixture(autouse=True)
def _one_export_for_each_graph(monkeypatch):
    monkeypatch.setattr(_onnx, "to_onnx", _once)
