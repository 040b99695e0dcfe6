"""Muon: momentum of hidden matrices, made orthogonal by Newton-Schulz iteration; AdamW for everything else.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/; Liu et al., "Muon is Scalable for LLM Training",
https://arxiv.org/abs/2502.16982 (weight decay and the scale that makes AdamW's rates fit).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core import ConfigError
from ._adamw import adamw_, decay_
from ._base import DeviceOptimizer, Layout
from ._groups import decay_groups
from ._tick import Tick, promoted, write_back_

#: Of the quintic a*x + b*x**3 + c*x**5, steepest at zero among those that keep values near one (Jordan et al.).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SCALES = ("adamw", "spectral")


class Muon(DeviceOptimizer):
    """Orthogonalised momentum for parameters of two and more dimensions, AdamW for the others.

    A matrix moves by `lr * scale * O`, where O is its momentum with all singular values brought near one. A kernel of
    more dimensions is taken as the matrix [first dimension, all others].

    Embeddings and the output layer should be left to AdamW: `Muon.from_model` (which the Trainer uses) does that. With
    the constructor, give groups with `use_muon` true or false; a group without it is split by number of dimensions.

    Args:
        params: parameters, or groups of them, as in torch.
        lr: learning rate of both kinds.
        weight_decay: decoupled, for both kinds.
        momentum: of the matrices.
        nesterov: look one step ahead, as in Nesterov's method.
        ns_steps: Newton-Schulz iterations.
        scale: "adamw", 0.2 * sqrt(max(rows, columns)): updates are as large as AdamW's usually are, and so are the
            rates that fit (Liu et al.); "spectral", sqrt(max(1, rows / columns)) as in the original, whose rates
            are about 0.02.
        betas, eps: of AdamW.
        capturable: the rate is a tensor on the device, so that a CUDA graph of the step follows its changes.

    Raises:
        ConfigError: an option is out of range, or a group with use_muon=True has a parameter of one dimension.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))
        >>> optimizer = Muon.from_model(model, lr=1e-3)
        >>> [(group["use_muon"], len(group["params"])) for group in optimizer.param_groups]
        [(True, 1), (False, 2), (False, 2)]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        scale: Literal["adamw", "spectral"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "ns_steps": ns_steps,
            "scale": scale, "betas": betas, "eps": eps, "capturable": capturable,
        }  # fmt: skip
        given: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        # Without any, torch says so.
        groups = given if not given or isinstance(given[0], dict) else [{"params": given}]
        super().__init__([part for group in groups for part in _split(group)], defaults)

    @classmethod
    def from_model(cls, model: nn.Module, *, lr: float, weight_decay: float = 0.1, **options: Any) -> Muon:
        """The optimizer of a whole model: Muon for hidden matrices, AdamW for embeddings, output layer and the rest."""
        outside = {id(p) for p in _outer(model)}
        hidden = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2 and id(p) not in outside]
        ours = {id(p) for p in hidden}
        groups = [{"params": hidden, "weight_decay": weight_decay, "use_muon": True}] if hidden else []
        for group in decay_groups(model, weight_decay):
            rest = [p for p in group["params"] if id(p) not in ours]
            if rest:
                groups.append({"params": rest, "weight_decay": group["weight_decay"], "use_muon": False})
        return cls(groups, lr=lr, weight_decay=weight_decay, **options)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["scale"] not in _SCALES:
            raise ConfigError(f"Muon(scale={group['scale']!r}): one of {', '.join(map(repr, _SCALES))} is needed.")
        if isinstance(group["ns_steps"], bool) or not isinstance(group["ns_steps"], int) or group["ns_steps"] < 1:
            raise ConfigError(f"Muon(ns_steps={group['ns_steps']!r}): an integer >= 1 is needed.")
        group.setdefault("use_muon", all(p.ndim >= 2 for p in group["params"]))
        flat = [tuple(p.shape) for p in group["params"] if p.ndim < 2]
        if group["use_muon"] and flat:
            raise ConfigError(
                f"Muon: a group with use_muon=True has a parameter of shape {flat[0]}, which is no matrix; put it into "
                "a group with use_muon=False."
            )

    def _layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        shape, dtype = tuple(p.shape), torch.promote_types(p.dtype, torch.float32)
        names = ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")
        return {name: (shape, dtype) for name in names}

    def _update(self, params: list[Tensor], group: dict[str, Any], tick: Tick) -> None:
        grads = tick.gradients([p.grad for p in params if p.grad is not None])
        states = [self.state[p] for p in params]
        if not group["use_muon"]:
            adamw_(params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], tick, group)
            return
        buffers = [s["momentum_buffer"] for s in states]
        values = promoted(params)
        dtype = buffers[0].dtype
        torch._foreach_mul_(buffers, tick.scalar(group["momentum"], 1.0, dtype))
        torch._foreach_add_(buffers, grads)
        ahead = torch._foreach_add(grads, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
        decay_(values, tick, group["weight_decay"])
        step_size = tick.scalar(-tick.lr, 0.0, dtype)
        # Matrices of one shape are worked on together, which many small ones need to fill a GPU.
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, p in enumerate(params):
            if p.numel():
                by_shape.setdefault((p.shape[0], p.numel() // p.shape[0]), []).append(i)
        for (rows, columns), members in by_shape.items():
            stack = torch.stack([ahead[i].reshape(rows, columns) for i in members])
            update = orthogonalize(stack, steps=group["ns_steps"]).to(dtype).mul_(step_size)
            update.mul_(_scale(group["scale"], rows, columns))
            targets = [values[i] for i in members]
            torch._foreach_add_(targets, [u.view(t.shape) for u, t in zip(update, targets, strict=True)])
        write_back_(params, values)


def orthogonalize(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Matrices [..., rows, columns] with their singular vectors and singular values near one.

    The values are not driven to one: after five steps those that began above 0.003 of the matrix's Frobenius norm are
    between 0.67 and 1.21 (smaller ones grow 480-fold), which trains as well as exact ones (Jordan et al., 2024). Runs
    in bf16 on a GPU, otherwise in the given precision; gives what it ran in.

    Example:
        >>> values = torch.linalg.svdvals(orthogonalize(torch.eye(4) * 7))
        >>> bool(((values > 0.67) & (values < 1.21)).all())
        True
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # Of the given numbers, not of their bf16 forms: then the largest singular value is at most one.
    norm = torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=eps)
    x = x / norm.to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _scale(kind: str, rows: int, columns: int) -> float:
    return 0.2 * math.sqrt(max(rows, columns)) if kind == "adamw" else math.sqrt(max(1.0, rows / columns))


def _split(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group itself if it says who trains it, else its matrices and the rest."""
    if "use_muon" in group:
        return [group]
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    parts = {True: [p for p in params if _dims(p) >= 2], False: [p for p in params if _dims(p) < 2]}
    return [{**group, "params": part, "use_muon": muon} for muon, part in parts.items() if part]


def _dims(p: Any) -> int:
    return (p[1] if isinstance(p, tuple) else p).ndim


def _outer(model: nn.Module) -> list[Tensor]:
    """Weights of embeddings and of the output layer: what the model says is its output, else its last Linear."""
    found = [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    ask = getattr(model, "get_output_embeddings", None)
    head: Any = ask() if callable(ask) else None
    if head is None:
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        head = linears[-1] if linears else None
    return [*found, *([head.weight] if isinstance(getattr(head, "weight", None), Tensor) else [])]
