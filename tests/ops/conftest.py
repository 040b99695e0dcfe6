"""Libraries of operators, built once for all tests."""

import shutil
from pathlib import Path

import pytest
import torch

from deepseek_r1 import ops

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples" / "custom_operators"


@pytest.fixture(scope="session")
def compiler():
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no g++ or clang++ on the PATH")
    return found


@pytest.fixture(scope="session")
def built(tmp_path_factory, compiler):
    """A function that builds a source of this folder or of the examples, and gives the library."""
    place = tmp_path_factory.mktemp("operators")

    def build(name, *flags):
        source = next(p for p in (EXAMPLES / f"{name}.cc", HERE / f"{name}.cc") if p.is_file())
        library = place / f"{name}.so"
        return library if library.exists() else ops.build_op(source, library, flags=flags)

    return build


@pytest.fixture(scope="session")
def swish(built):
    """The module class of the example, built as a user would."""
    return ops.register_custom_op("swish", built("swish"))


@pytest.fixture(scope="session")
def gated_norm(built):
    """The other example: two inputs, an attribute, and a row reduction."""
    return ops.register_custom_op("gated_norm", built("gated_norm"))


@pytest.fixture(scope="session")
def operators(built):
    """The package with every operator of operators.cc registered."""
    # No optimisation: what is tested is what is computed, not how fast, and it compiles in half of the time.
    library = built("operators", "-O0")
    for about in ops.describe(library):
        ops.register_custom_op(about.name, library)
    return ops


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
