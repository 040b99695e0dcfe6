"""The command line: one file a verb. A verb parses, calls public functions, and its Report is printed.

Nothing heavy is imported before a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import _frame
from .build_op import build_op as _build_op
from .cache import cache as _cache
from .compress import compress as _compress
from .doctor import doctor as _doctor
from .export import export as _export
from .optimize import optimize as _optimize
from .prune import prune as _prune
from .quantize import quantize as _quantize
from .run import run as _run
from .trace import trace as _trace
from .train import train as _train
from .version import version as _version

__all__ = ["app", "main"]

app = _frame.new_app(no_args_is_help=True)


@app.callback()
def _every_verb(
    traceback: Annotated[bool, typer.Option("--traceback", help="Print Python's traceback with an error.")] = False,
) -> None:
    """Take a PyTorch module all the way: train, compress, make static, ship and check.

    A MODEL is file.py:factory, an .onnx, .pt2, .dr1, .keras or .h5 file, the folder of an artifact or a SavedModel, or
    the name of a model of Hugging Face on this machine, such as gpt2 or org/name.
    Data is a folder of images by class, an .npz, .csv or .jsonl file, file.py:loader, or the word digits.

    Exit codes: 0 done, 1 a check failed, 2 wrong use.
    """
    _frame.show_traceback(traceback)


for _command in (
    _run, _train, _optimize, _prune, _quantize, _compress, _export, _trace, _build_op, _cache, _doctor, _version,
):  # fmt: skip
    app.command()(_command)


def main() -> None:
    """Entry point of `deepseek-r1`."""
    app(prog_name="deepseek-r1")
