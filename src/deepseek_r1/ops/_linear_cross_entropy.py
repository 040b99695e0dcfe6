"""The loss of a language model from its last hidden states: a linear layer and cross entropy in one, in chunks of rows.

The logits of all tokens are the largest tensor of a training step (16,384 tokens of a vocabulary of 128,256 in fp32:
8.4 GB, and as much again for their gradient). Here they exist for a few rows at a time: the forward pass makes a
chunk's logits, its losses and its share of the gradients, and forgets it. Knows nothing about layers and models.

Shape suffixes: T rows (tokens), D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import InputError

#: The fp32 logits of one chunk take at most this much, unless one row alone takes more. A GPU wants larger products,
#: and each chunk costs it one pass over the gradient of the weight.
CHUNK_BYTES, CUDA_CHUNK_BYTES = 64 * 2**20, 2**30


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    *,
    row_weights: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias), labels)`, without the logits of all rows at once.

    The mean is over labels that are not `ignore_index`. Where every label is ignored the loss is 0 and so are the
    gradients, while torch's own gives NaN: a batch without a target then changes nothing instead of ending the run.
    The softmax is computed in fp32 (fp64 for fp64 inputs); gradients of the weight are added up over the chunks in
    fp32 too. Under autocast the product is computed in autocast's type, as that of `F.linear` is. Gradients are made
    in the forward pass, so the loss can be differentiated any number of times, but its gradient cannot.

    Args:
        hidden: [..., D], floating.
        weight: [V, D], of the type of `hidden` unless autocast is on.
        labels: integers [...] in 0 to V - 1, or `ignore_index`. On a GPU, which would have to wait for an error,
            another value makes the loss and all gradients NaN, so that the Trainer stops and names the batch.
        bias: [V] or None.
        ignore_index: the label of rows that do not count.
        row_weights: [...], floating, what each row counts for: the loss is then the sum of weight times loss, divided
            by the sum of the weights of rows that count. They get no gradient. None: all rows count alike.
        chunk_rows: rows whose logits exist at once; None: as many as fit 64 MiB, on a GPU 1 GiB.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        InputError: shapes or types do not fit, or on a CPU a label is out of range.

    Example:
        >>> hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(100, 8), torch.randint(0, 100, (2, 5))
        >>> loss = linear_cross_entropy(hidden, weight, labels)
        >>> bool(torch.isclose(loss, F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())))
        True
    """
    dtype = _check(hidden, weight, labels, bias)
    if row_weights is not None and (row_weights.shape != labels.shape or not row_weights.is_floating_point()):
        given = f"{row_weights.dtype} {tuple(row_weights.shape)}"
        raise InputError(f"row_weights {given}: floating numbers of labels' shape {tuple(labels.shape)} are needed.")
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise InputError(f"linear_cross_entropy(chunk_rows={chunk_rows!r}): an integer >= 1, or None, is needed.")
    most = CUDA_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES
    rows = chunk_rows or max(1, most // (4 * weight.shape[0]))
    hidden_TD, labels_T = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    weights_T = None if row_weights is None else row_weights.detach().reshape(-1)
    loss: Tensor = _forward(hidden_TD, weight, labels_T, bias, weights_T, ignore_index, rows, dtype, *wanted)[0]
    return loss


def known_labels(labels: Tensor, classes: int, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Labels that a loss may index with, and whether others were given: those became `ignore_index`.

    An index out of range ends the process on a GPU, or reads what lies beside the logits.

    Args:
        labels: integers of any shape.
        classes: how many there are.

    Returns:
        Labels of the same shape, int64, and one boolean on their device; nothing waits for a GPU.

    Raises:
        InputError: on a CPU, a label that is neither in 0 to `classes` - 1 nor `ignore_index`.

    Example:
        >>> known_labels(torch.tensor([2, -100, 0]), 3)
        (tensor([   2, -100,    0]), tensor(False))
    """
    labels = labels.long()
    outside = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    wrong = outside.any()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and bool(wrong):
        raise InputError(
            f"the label {int(labels[outside][0])} is out of range: labels are 0 to {classes - 1} for {classes} classes "
            f"or tokens, or {ignore_index} (ignore_index) for what does not count."
        )
    return torch.where(outside, ignore_index, labels), wrong


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> torch.dtype:
    """The type in which the product is computed."""
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] < 1:
        raise InputError(f"{shapes}: hidden must be [..., D] and weight [V, D] of the same D, V at least 1.")
    if labels.shape != hidden.shape[:-1]:
        raise InputError(f"{shapes}: labels must have hidden's shape without its last dimension.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(
            f"bias {tuple(bias.shape)} with weight {tuple(weight.shape)}: a number for each row is needed."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels of {labels.dtype}: integers are needed.")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    given = [t.dtype for t in (hidden, weight, bias) if t is not None]
    if not hidden.is_floating_point() or len(set(given)) > 1:
        raise InputError(f"hidden, weight and bias of types {given}: one floating type for all is needed.")
    return hidden.dtype


@torch.library.custom_op("deepseek_r1::linear_cross_entropy", mutates_args=())
def _forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None,
    weights_T: Tensor | None,
    ignore_index: int,
    rows: int,
    dtype: torch.dtype,
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of hidden, weight and bias times the sum of the rows' weights, one divided by that sum).

    An operator of its own, so that a compiler sees one node instead of hundreds of chunks. Gradients that are not
    asked for are empty. The division comes last: 1 / 16,384 of a probability is zero in fp16.
    """
    wide = _wide(dtype)
    weight_VD, bias_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    labels_T, wrong = known_labels(labels_T, weight_VD.shape[0], ignore_index)
    counts_T = labels_T != ignore_index
    safe_T = torch.where(counts_T, labels_T, 0)
    shares_T = counts_T if weights_T is None else torch.where(counts_T, weights_T, 0).to(wide)
    total = torch.zeros((), dtype=wide, device=hidden_TD.device)
    wanted, fused = for_hidden or for_weight or for_bias, hidden_TD.is_cuda and wide == torch.float32
    if fused:
        from ._triton_slopes import slopes_  # Triton comes with torch's CUDA builds alone
    grads = _empty_gradients(hidden_TD, weight_VD, dtype, for_hidden, for_weight, for_bias)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        for start in range(0, hidden_TD.shape[0], rows):
            part = slice(start, start + rows)
            hidden_CD, safe_C1, shares_C1 = hidden_TD[part].to(dtype), safe_T[part, None], shares_T[part, None]
            logits_CV = F.linear(hidden_CD, weight_VD, bias_V)
            if fused:
                losses_C = slopes_(logits_CV, labels_T[part], ignore_index, write=wanted)
                total += losses_C.sum() if weights_T is None else losses_C.flatten() @ shares_C1.flatten()
                if wanted:
                    if weights_T is not None:
                        logits_CV.mul_(shares_C1)
                    _add_gradients(grads, logits_CV, hidden_CD, weight_VD, part)
                continue
            logits_CV = logits_CV.to(wide)
            lse_C1 = logits_CV.logsumexp(1, keepdim=True)
            total += ((lse_C1 - logits_CV.gather(1, safe_C1)) * shares_C1).sum()
            if wanted:
                # The derivative of the losses by the logits: probabilities, less one at the label.
                slopes_CV = logits_CV.sub_(lse_C1).exp_()
                slopes_CV.scatter_add_(1, safe_C1, slopes_CV.new_full(safe_C1.shape, -1.0)).mul_(shares_C1)
                _add_gradients(grads, slopes_CV, hidden_CD, weight_VD, part)
    whole = shares_T.sum().to(wide)
    # The loss and every gradient are multiplied with it.
    share = torch.where(wrong, torch.nan, 1 / torch.where(whole == 0, 1.0, whole))
    return total * share, *grads, share


def _empty_gradients(
    hidden_TD: Tensor, weight_VD: Tensor, dtype: torch.dtype, for_hidden: bool, for_weight: bool, for_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    none, wide = (0,), _wide(dtype)
    return (
        torch.empty(hidden_TD.shape if for_hidden else none, dtype=dtype, device=hidden_TD.device),
        torch.zeros(weight_VD.shape if for_weight else none, dtype=wide, device=hidden_TD.device),
        torch.zeros(weight_VD.shape[:1] if for_bias else none, dtype=wide, device=hidden_TD.device),
    )


def _add_gradients(
    grads: tuple[Tensor, Tensor, Tensor], slopes_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor, part: slice
) -> None:
    of_hidden, of_weight, of_bias = grads
    narrow_CV = slopes_CV.to(hidden_CD.dtype)
    if of_hidden.numel():
        torch.mm(narrow_CV, weight_VD, out=of_hidden[part])
    if of_weight.numel():
        if of_weight.dtype == narrow_CV.dtype:
            of_weight.addmm_(narrow_CV.t(), hidden_CD)
        else:
            of_weight.add_(narrow_CV.t() @ hidden_CD)
    if of_bias.numel():
        of_bias.add_(slopes_CV.sum(0, dtype=of_bias.dtype))


@_forward.register_fake
def _fake(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None,
    weights_T: Tensor | None,
    ignore_index: int,
    rows: int,
    dtype: torch.dtype,
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scalar = torch.empty((), dtype=_wide(dtype), device=hidden_TD.device)
    grads = _empty_gradients(hidden_TD, weight_VD, dtype, for_hidden, for_weight, for_bias)
    return scalar, *grads, torch.empty_like(scalar)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, bias, *_, for_hidden, for_weight, for_bias = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.wanted = (for_hidden, for_weight, for_bias)
    ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)


def _backward(ctx: Any, grad: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(g is not None for g in more):
        raise RuntimeError(
            "linear_cross_entropy can be differentiated once: its gradients are made in the forward pass. For second "
            "derivatives use F.cross_entropy(F.linear(hidden, weight), labels)."
        )
    *kept, share = ctx.saved_tensors
    none = (None,) * 7
    if grad is None:
        return None, None, None, None, *none
    scale = grad * share
    of_hidden, of_weight, of_bias = (
        _scaled(gradient, scale, dtype) if wanted else None
        for gradient, wanted, dtype in zip(kept, ctx.wanted, ctx.dtypes, strict=True)
    )
    return of_hidden, of_weight, None, of_bias, *none


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled():
        # With create_graph=True; autograd refuses `out`.
        return (gradient * scale).to(dtype)
    # Into the narrow type at once: a wide product of the weight's gradient would be as large as that.
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


_forward.register_autograd(_backward, setup_context=_keep)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
