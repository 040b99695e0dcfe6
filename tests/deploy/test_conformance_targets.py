"""The conformance suite of deployment targets, on the built-in ones and on bad ones."""

import pytest

from deepseek_r1.core import CheckFailedError, PluginError
from deepseek_r1.deploy import TARGETS, conformance
from deepseek_r1.deploy._onnx import OnnxTarget, check_model, write_model
from deepseek_r1.deploy.conformance import check_target


@pytest.fixture
def registered():
    names = []

    def register(cls):
        TARGETS.register(cls.name, cls)
        names.append(cls.name)
        return cls.name

    yield register
    for name in names:
        TARGETS.unregister(name)


@pytest.mark.parametrize("name", ["onnx", "artifact"])
def test_built_in_targets_conform(name):
    report = check_target(name)
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    assert len(report.checks) == 9


def test_a_third_partys_target_conforms(registered, monkeypatch):
    monkeypatch.setattr(conformance, "_MODELS", {"words": conformance._MODELS["words"]})
    assert check_target(registered(type("Third", (OnnxTarget,), {"name": "third"}))).ok


class Careless(OnnxTarget):
    """Writes in place, then checks."""

    name = "careless"

    def write(self, job, report):
        write_model(job.program, job.path)
        check_model(job, job.path, report)


class Blind(OnnxTarget):
    """Checks nothing."""

    name = "blind"

    def write(self, job, report):
        write_model(job.program, job.path)


class Untidy(OnnxTarget):
    """Leaves another file behind at each write."""

    name = "untidy"

    def write(self, job, report):
        super().write(job, report)
        (job.path.parent / f"left{len(list(job.path.parent.iterdir()))}").touch()


class Broken(OnnxTarget):
    name = "broken"

    def write(self, job, report):
        raise CheckFailedError("always")


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Careless, {"leaves nothing if wrong"}),
        (Blind, {"writes", "keeps the previous files if wrong", "leaves nothing if wrong"}),
        (Untidy, {"writes again", "keeps the previous files if wrong", "leaves nothing if wrong"}),
        (Broken, {"writes", "writes again"}),
    ],
)
def test_each_kind_of_misbehaviour_is_named(registered, monkeypatch, cls, expected):
    monkeypatch.setattr(conformance, "_MODELS", {"cnn": conformance._MODELS["cnn"]})
    failed = {c.name for c in check_target(registered(cls)).failed}
    assert {f"cnn: {what}" for what in expected} <= failed


def test_unknown_targets():
    with pytest.raises(PluginError, match=r"unknown deployment target 'onx'. Did you mean 'onnx'\?"):
        check_target("onx")
