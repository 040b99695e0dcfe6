"""How large a model is, and how many operations a training step takes. Knows no architecture."""

from __future__ import annotations

from torch import nn


def num_parameters(model: nn.Module, *, embeddings: bool = True) -> int:
    """How many numbers a model has to learn; shared ones count once.

    Args:
        embeddings: whether the tables of `nn.Embedding` count, tied output matrices with them.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        >>> num_parameters(model), num_parameters(model, embeddings=False)
        (50, 10)
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if embeddings or id(p) not in tables)


def transformer_flops(matrices: int, layers: int, width: int, length: int) -> float:
    """Operations of one training step (forward and backward) for each token: 6 N + 12 layers * width * length.

    N are the weights of the matrix products a token passes; each takes a multiplication and an addition forward and
    twice that backward. The second term is the attention's two products over `length` keys, counted in full for
    causal models too, after Chowdhery et al., "PaLM", 2022, appendix B.

    Example:
        >>> transformer_flops(1000, 1, 4, 8)
        6384.0
    """
    return 6.0 * matrices + 12.0 * layers * width * length


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers of a module, biases left out."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
