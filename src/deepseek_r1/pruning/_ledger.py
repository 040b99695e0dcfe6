"""The book in which the walk over a graph notes which indices must leave together. Knows no operator.

Every index of every dimension that carries channels is an *atom*, a whole number. Two atoms that are one channel seen
in two places are joined; what must not leave is pinned, with the reason. Joined atoms are a *unit*: all of it is
removed, or nothing. The idea of coupling layers by their dimensions is that of DepGraph (Fang et al., CVPR 2023,
arXiv 2301.12900); here it is kept for each single index, so that concatenation, splitting and heads need no rules of
their own further on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

#: The atoms of one dimension, one for each index; None: the dimension carries no channels.
Atoms = np.ndarray[Any, np.dtype[np.int64]] | None
#: One entry a dimension.
Dims = tuple[Atoms, ...]


@dataclass(frozen=True, kw_only=True)
class Count:
    """An integer of the module's code that counts channels: it has to follow when channels leave.

    Attributes:
        module: name of the module that has it.
        attribute: its name there.
        atoms: the dimension that it counts.
        place: where in a tuple or list it stands; None for a plain integer.
    """

    module: str
    attribute: str
    atoms: np.ndarray[Any, np.dtype[np.int64]]
    place: int | None = None

    @property
    def label(self) -> str:
        """`module.attribute`, with the place in a tuple."""
        name = f"{self.module}.{self.attribute}" if self.module else self.attribute
        return name if self.place is None else f"{name}[{self.place}]"


@dataclass
class Ledger:
    """Atoms, what joins them and what pins them.

    Attributes:
        tensors: the dimensions of each parameter and buffer that the graph reads, by name.
        readers: dimensions of tensors along which a product sums: what is removed is what they no longer see.
        tables: dimensions of tensors that are looked up by number.
        uses: how many times a weight is multiplied with in one sample: positions of a convolution, tokens.
        counts: integers of torch's own layers that count something else than a dimension of a weight.
    """

    size: int = 0
    joints: list[tuple[Any, Any]] = field(default_factory=list)
    pins: list[tuple[Any, str]] = field(default_factory=list)
    tensors: dict[str, Dims] = field(default_factory=dict)
    readers: set[tuple[str, int]] = field(default_factory=set)
    tables: set[tuple[str, int]] = field(default_factory=set)
    uses: dict[str, float] = field(default_factory=dict)
    counts: list[Count] = field(default_factory=list)

    def fresh(self, number: int) -> Any:
        """So many new atoms."""
        self.size += number
        return np.arange(self.size - number, self.size, dtype=np.int64)

    def pinned(self, number: int, reason: str) -> Any:
        """So many new atoms that must stay."""
        made = self.fresh(number)
        self.pin(made, reason)
        return made

    def pin(self, atoms: Atoms, reason: str) -> None:
        """These must stay."""
        if atoms is not None and atoms.size:
            self.pins.append((atoms.ravel(), reason))

    def pin_all(self, dims: Iterable[Atoms], reason: str) -> None:
        """Every channel of a value must stay."""
        for atoms in dims:
            self.pin(atoms, reason)

    def join(self, first: Atoms, second: Atoms, reason: str) -> Atoms:
        """These dimensions are one, index by index; the result is how to write it from now on.

        A dimension without channels holds on to one that has them, for `reason`.
        """
        if first is None or second is None:
            kept = second if first is None else first
            self.pin(kept, reason)
            return kept
        if first is not second and not np.array_equal(first, second):
            assert first.shape == second.shape, (first.shape, second.shape, reason)
            self.joints.append((first, second))
        return first

    def tie(self, atoms: Any) -> Any:
        """Rows of a matrix of atoms become one unit each: [n, k] -> [n]."""
        for column in range(1, atoms.shape[1]):
            self.joints.append((atoms[:, 0], atoms[:, column]))
        return np.ascontiguousarray(atoms[:, 0])

    def units(self) -> tuple[int, Any]:
        """How many units there are, and the unit of each atom."""
        if not self.joints:
            return self.size, np.arange(self.size)
        left = np.concatenate([a for a, _ in self.joints])
        right = np.concatenate([b for _, b in self.joints])
        links = coo_array((np.ones(left.size, dtype=np.int8), (left, right)), shape=(self.size, self.size))
        number, unit_of = connected_components(links, directed=False)
        return int(number), unit_of.astype(np.int64)

    def reasons(self, number: int, unit_of: Any) -> dict[int, str]:
        """The first reason for which each pinned unit must stay."""
        found: dict[int, str] = {}
        for atoms, reason in self.pins:
            for unit in np.unique(unit_of[atoms]).tolist():
                found.setdefault(unit, reason)
        return found
