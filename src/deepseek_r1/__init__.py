"""deepseek-r1: take a PyTorch module all the way - train, compress, make static, ship, check.

    import deepseek_r1 as dr1

Importing this package imports neither torch nor anything else heavy: names are resolved when first used.
Every `torch.nn` layer and `torch.optim` optimizer is reachable too (`dr1.Linear`, `dr1.SGD`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .core.names import INNER_ROOMS, PUBLIC, ROOMS, TORCH_NN, TORCH_OPTIM, lazy_getattr

if TYPE_CHECKING:
    # First of all: for a type checker the first import of a name wins, as own names win over torch's.
    from .nn import Sequential as Sequential  # isort: skip
    from .train import AdamW as AdamW, Muon as Muon  # isort: skip
    from torch.nn import *  # type: ignore[assignment]  # noqa: F403
    from torch.optim import *  # type: ignore[assignment]  # noqa: F403

    from . import compression as compression
    from . import core as core
    from . import data as data
    from . import deploy as deploy
    from . import engines as engines
    from . import graph as graph
    from . import lora as lora
    from . import measure as measure
    from . import models as models
    from . import nn as nn
    from . import ops as ops
    from . import pruning as pruning
    from . import quantization as quantization
    from . import runtime as runtime
    from . import train as train
    from .core import Artifact as Artifact
    from .core import Budget as Budget
    from .core import DeepSeekError as DeepSeekError
    from .core import Report as Report
    from .data import DomainAdapter as DomainAdapter
    from .data import DomainMixture as DomainMixture
    from .data import DSDataLoader as DSDataLoader
    from .engines import Executable as Executable
    from .engines import optimize as optimize
    from .graph import Drawing as Drawing
    from .graph import Program as Program
    from .graph import capture as capture
    from .graph import jit as jit
    from .graph import static_programs as static_programs
    from .graph import trace as trace
    from .module import DSModule as DSModule
    from .module import load_model as load_model
    from .module import model as model
    from .pruning import R1Pruner as R1Pruner
    from .quantization import DSQuantizer as DSQuantizer
    from .quantization import R1Quantizer as R1Quantizer
    from .quantization import quantize as quantize
    from .runtime import load as load_artifact  # noqa: F401
    from .train import AdamW8bit as AdamW8bit
    from .train import AdaptiveOptimizer as AdaptiveOptimizer
    from .train import DSCheckpoint as DSCheckpoint
    from .train import DSOptimizer as DSOptimizer
    from .train import ElasticWeightConsolidation as ElasticWeightConsolidation
    from .train import Lion as Lion
    from .train import Trainer as Trainer
    from .train import TrainingConfig as TrainingConfig
    from .train import seed_everything as seed_everything

__version__ = "0.1.0"

__getattr__ = lazy_getattr(__name__, PUBLIC, ROOMS, INNER_ROOMS)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC, *ROOMS, *INNER_ROOMS, *TORCH_NN, *TORCH_OPTIM})
