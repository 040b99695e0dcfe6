"""Continual pre-training data: a domain's samples mixed with general ones, and the domain's terms in token ids.

Knows datasets and token ids. Knows nothing about tokenizers, models or learning rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core import ConfigError, InputError

MODES = ("sampling", "loss")


class DomainAdapter(Dataset[Any]):
    """Base class of a domain's dataset: a subclass gives `__len__` and `__getitem__`.

    It keeps nothing, so a subclass need not call `super().__init__()`. A subclass (or an object of it) may set
    `domain_terms`, the domain's words as sequences of token ids, which `term_weights` then uses.

    Raises:
        NotImplementedError: a subclass without `__len__` or `__getitem__` is asked for samples.

    Example:
        >>> class Clinic(DomainAdapter):
        ...     domain_terms = [[7, 8]]
        ...     def __len__(self):
        ...         return 2
        ...     def __getitem__(self, i):
        ...         return {"input_ids": [5, 7, 8, i]}
        >>> clinic = Clinic()
        >>> clinic.term_weights(torch.tensor(clinic[0]["input_ids"]), weight=3.0)
        tensor([1., 3., 3., 1.])
    """

    domain_terms: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} needs __len__: the number of the domain's samples.")

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} needs __getitem__(index): one of the domain's samples.")

    def term_weights(self, input_ids: Tensor, *, weight: float = 2.0, sequence_ids: Tensor | None = None) -> Tensor:
        """Loss weights of tokens: `weight` in the domain's terms, 1 elsewhere; see `term_mask`."""
        mask = term_mask(input_ids, self.domain_terms, sequence_ids=sequence_ids)
        return torch.where(mask, float(weight), 1.0)


def term_mask(
    input_ids: Tensor, domain_terms: Iterable[Sequence[int]], *, sequence_ids: Tensor | None = None
) -> Tensor:
    """Which tokens belong to an occurrence of one of the terms; occurrences may overlap.

    All places are looked at together, for each length that terms have: a hash of every window is looked up among
    those of the terms, and what is found is compared token by token.

    Args:
        input_ids: [L] or [B, L], integers.
        domain_terms: sequences of token ids, each with at least one.
        sequence_ids: as `input_ids`, of packed rows: no occurrence reaches from one sample into the next.

    Returns:
        Boolean, as `input_ids`, on its device.

    Raises:
        InputError: another shape or type, or an empty term.

    Example:
        >>> term_mask(torch.tensor([4, 1, 2, 1, 2, 3]), [[1, 2, 3], [4]])
        tensor([ True, False, False,  True,  True,  True])
    """
    if input_ids.ndim not in (1, 2) or input_ids.is_floating_point():
        given = f"{input_ids.dtype} {tuple(input_ids.shape)}"
        raise InputError(f"term_mask: integers [L] or [B, L] are needed, not {given}.")
    if sequence_ids is not None and sequence_ids.shape != input_ids.shape:
        raise InputError(
            f"sequence_ids have shape {tuple(sequence_ids.shape)} and input_ids {tuple(input_ids.shape)}; both need "
            "one entry a token."
        )
    tokens = np.atleast_2d(input_ids.detach().cpu().numpy()).astype(np.int64)
    owners = None if sequence_ids is None else np.atleast_2d(sequence_ids.detach().cpu().numpy())
    mask = np.zeros(tokens.shape, bool)
    for size, terms in _by_length(tuple(_term(term) for term in domain_terms)).items():
        if size <= tokens.shape[1]:
            _mark(mask, tokens, owners, terms)
    return torch.from_numpy(mask).reshape(input_ids.shape).to(input_ids.device)


def _term(term: Sequence[int]) -> tuple[int, ...]:
    found = tuple(int(token) for token in (term.tolist() if hasattr(term, "tolist") else term))
    if not found:
        raise InputError("domain_terms has an empty term; each needs at least one token id.")
    return found


@lru_cache(maxsize=16)
def _by_length(terms: tuple[tuple[int, ...], ...]) -> dict[int, np.ndarray]:
    sizes = sorted({len(term) for term in terms})
    return {size: np.unique([t for t in terms if len(t) == size], axis=0).astype(np.int64) for size in sizes}


def _mark(mask: np.ndarray, tokens: np.ndarray, owners: np.ndarray | None, terms: np.ndarray) -> None:
    """Mark in `mask` the occurrences of terms of one length."""
    size = terms.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size, axis=1)
    factors = np.random.default_rng(0).integers(1, 2**63, size, dtype=np.int64) | 1
    with np.errstate(over="ignore"):
        hashes = (terms * factors).sum(1)
        sums = (windows * factors).sum(-1)
    order = np.argsort(hashes, kind="stable")
    at = np.minimum(np.searchsorted(hashes[order], sums), len(hashes) - 1)
    found = hashes[order][at] == sums
    if owners is not None:
        found &= owners[:, : found.shape[1]] == owners[:, size - 1 :]
    rows, starts = np.nonzero(found)
    # Terms with one hash stand side by side; two different ones are next to impossible, and compared all the same.
    real = np.zeros(len(rows), bool)
    for shift in range(int(np.unique(hashes, return_counts=True)[1].max())):
        candidate = terms[order[np.minimum(at[rows, starts] + shift, len(hashes) - 1)]]
        real |= (windows[rows, starts] == candidate).all(1)
    for i in range(size):
        mask[rows[real], starts[real] + i] = True


class DomainMixture(Dataset[Any]):
    """Domain and general samples in given proportions, as a map-style dataset.

    With `mode="sampling"`, in the first n samples, for every n, each source has its share to within one sample (a
    low-discrepancy sequence), so read it in order (`shuffle=False`): each source's own samples are shuffled here, by
    `seed`. What is smaller is used again, in another order. With `mode="loss"` every sample of both comes once a pass,
    domain first, with a weight in field `loss_weight`: the weights' mean is 1, their sums are in the proportions.

    A pass (`set_epoch`, which DSDataLoader calls) goes on where the last one ended. It is a stage of continual
    pre-training: a learning rate that falls by stages takes `mixture.epoch` for its stage.

    Args:
        domain, general: map-style datasets with samples of one form; for `mode="loss"`, dicts.
        lambda_domain, lambda_general: proportions, not negative, and not both 0; only their ratio matters.
        seed: of the order in which a source's samples come.
        length: samples of a pass for `mode="sampling"`; None: as many as hold every domain sample once (or every
            general one where `lambda_domain` is 0).

    Attributes:
        epoch: number of the pass, from 0.

    Raises:
        ConfigError: proportions, mode or length that are not allowed.
        InputError: an empty source that has a share.

    Example:
        >>> mixture = DomainMixture(list("abcdefg"), list("123"), seed=0)
        >>> len(mixture), [mixture.is_domain(i) for i in range(5)]
        (10, [False, True, True, False, True])
        >>> sorted(mixture[i] for i in range(10))
        ['1', '2', '3', 'a', 'b', 'c', 'd', 'e', 'f', 'g']
    """

    def __init__(
        self,
        domain: Any,
        general: Any,
        lambda_domain: float = 0.7,
        lambda_general: float = 0.3,
        *,
        seed: int = 0,
        mode: str = "sampling",
        length: int | None = None,
    ) -> None:
        for name, value in (("lambda_domain", lambda_domain), ("lambda_general", lambda_general)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ConfigError(f"DomainMixture({name}={value!r}): a number >= 0 is needed.")
        if lambda_domain + lambda_general == 0:
            raise ConfigError("DomainMixture(lambda_domain=0, lambda_general=0): one of the two must not be 0.")
        if mode not in MODES:
            raise ConfigError(f'DomainMixture(mode={mode!r}): "sampling" or "loss" is needed.')
        if length is not None and (
            mode == "loss" or isinstance(length, bool) or not isinstance(length, int) or length < 1
        ):
            raise ConfigError(f'DomainMixture(length={length!r}): an integer >= 1, for mode="sampling" only.')
        self.sources = (domain, general)
        self.lambdas = (float(lambda_domain), float(lambda_general))
        # As the user wrote them: 0.7 is seven tenths, not the nearest fraction of powers of two.
        parts = [Fraction(str(value)) for value in self.lambdas]
        self.share = (parts[0] / sum(parts)).limit_denominator(1_000_000)
        for source, name, part in zip(self.sources, ("domain", "general"), self.lambdas, strict=True):
            if part and not len(source):
                raise InputError(f"the {name} dataset is empty and has a share of {part}; give data, or a share of 0.")
        self.seed, self.mode, self.epoch = seed, mode, 0
        self._length = length or self._one_pass()
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def _one_pass(self) -> int:
        if self.mode == "loss":
            return sum(len(s) for s, part in zip(self.sources, self.lambdas, strict=True) if part)
        if not self.share:
            return len(self.sources[1])
        return -(-len(self.sources[0]) * self.share.denominator // self.share.numerator)

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Make this pass number `epoch`."""
        self.epoch = int(epoch)

    def state_dict(self) -> dict[str, int]:
        """The number of the pass; everything else follows from the arguments."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to the pass of a state."""
        self.set_epoch(state["epoch"])

    def is_domain(self, index: int) -> bool:
        """Whether sample `index` of this pass is the domain's."""
        return self.place(index)[0] == 0

    def place(self, index: int) -> tuple[int, int]:
        """Where sample `index` of this pass comes from: (0 for domain or 1 for general, index there).

        Raises:
            IndexError: `index` is not within the length.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a mixture of {len(self)}")
        if self.mode == "loss":
            first = len(self.sources[0]) if self.lambdas[0] else 0
            return (0, index) if index < first else (1, index - first)
        at = self.epoch * len(self) + index
        before, after = (n * self.share.numerator // self.share.denominator for n in (at, at + 1))
        source = 0 if after > before else 1
        drawn = before if source == 0 else at - before
        cycle, turn = divmod(drawn, len(self.sources[source]))
        return source, int(self._order(source, cycle)[turn])

    def _order(self, source: int, cycle: int) -> np.ndarray:
        if (source, cycle) not in self._orders:
            # Neighbouring cycles only: a pass goes through them in order.
            kept = {k: v for k, v in self._orders.items() if k[0] != source or abs(k[1] - cycle) <= 1}
            drawn = np.random.default_rng([self.seed, source, cycle]).permutation(len(self.sources[source]))
            self._orders = {**kept, (source, cycle): drawn}
        return self._orders[source, cycle]

    def weight(self, index: int) -> float:
        """What the loss of sample `index` counts for."""
        if self.mode == "sampling":
            return 1.0
        source, _ = self.place(index)
        return self.lambdas[source] / sum(self.lambdas) * len(self) / len(self.sources[source])

    def __getitem__(self, index: int) -> Any:
        source, there = self.place(int(index))
        sample = self.sources[source][there]
        if self.mode == "sampling":
            return sample
        if not isinstance(sample, Mapping):
            raise InputError(
                f'DomainMixture(mode="loss") puts a field loss_weight into its samples, so they must be dicts, not '
                f'{type(sample).__name__}; change the datasets, or use mode="sampling".'
            )
        return {**sample, "loss_weight": self.weight(int(index))}
