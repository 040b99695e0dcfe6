"""The arguments of a DSDataLoader: what excludes what, and what "auto" means. Makes no loader."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.utils.data import IterableDataset

from ..core import ConfigError, InputError
from ._batching import Batching
from ._generators import kept_process_state
from ._samples import entries, fields_of
from ._tuning import Setting, Tuner

#: Samples that are looked at to see whether their lengths differ.
_LOOKED_AT = 8


def resolved(options: Batching, given: dict[str, Any]) -> tuple[Batching, str]:
    """The options without "auto", and why."""
    if options.batching != "auto":
        return options, "as given"
    dataset = given["dataset"]
    if isinstance(dataset, IterableDataset):
        return Batching(), "auto: a stream's samples are not known before they are read"
    if any(given.get(name) is not None for name in ("collate_fn", "batch_sampler")) or _unbatched(given):
        return Batching(), "auto: batches are put together by collate_fn or batch_sampler, or not at all"
    with kept_process_state():
        samples = [dataset[i] for i in range(min(_LOOKED_AT, len(dataset)))]
    try:
        sizes = [[entries(v) for v in fields_of(sample).values()] for sample in samples]
    except InputError:
        return Batching(), "auto: the samples hold no lists of tokens"
    if all(mine == sizes[0] for mine in sizes):
        return Batching(), f"auto: the first {len(samples)} samples have one length"
    return replace(options, batching="buckets"), f"auto: the first {len(samples)} samples differ in length"


def _unbatched(given: dict[str, Any]) -> bool:
    return given.get("batch_size", 1) is None


def check(given: dict[str, Any], options: Batching, seed: int | None) -> None:
    """Raise ConfigError for arguments that exclude each other."""
    if seed is not None:
        if given.get("generator") is not None:
            raise ConfigError("DSDataLoader(seed=..., generator=...): give one of the two.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"DSDataLoader(seed={seed!r}): an integer is needed.")
    if options.batching == "fixed":
        return
    if given.get("batch_sampler") is not None or _unbatched(given):
        raise ConfigError(
            f"DSDataLoader(batching={options.batching!r}) decides itself which samples share a batch: give batch_size "
            "(or max_tokens), and no batch_sampler."
        )
    if options.batching == "packed" and given.get("collate_fn") is not None:
        raise ConfigError(
            "DSDataLoader(batching='packed') puts the rows together itself; leave collate_fn out, or change the "
            "samples in the dataset."
        )
    stream = isinstance(given["dataset"], IterableDataset) and options.batching == "buckets"
    if stream and (options.shapes is None or given.get("collate_fn") is not None):
        raise ConfigError(
            "DSDataLoader(batching='buckets') on a stream needs shapes=(...), as the lengths are not known before they "
            "are read, and takes no collate_fn."
        )


def tuned(given: dict[str, Any]) -> tuple[dict[str, Any], Tuner, dict[str, Any]]:
    """torch's arguments without "auto", what chooses the workers, and attributes to be set after torch's checks."""
    plain = dict(given)
    for name in ("num_workers", "prefetch_factor"):
        if isinstance(plain.get(name), str) and plain[name] != "auto":
            raise ConfigError(f"DSDataLoader({name}={plain[name]!r}): a number or 'auto' is needed.")
    auto_workers, auto_prefetch = plain.get("num_workers") == "auto", plain.get("prefetch_factor") == "auto"
    if auto_workers and plain.get("multiprocessing_context") is not None:
        raise ConfigError(
            "DSDataLoader(num_workers='auto', multiprocessing_context=...): 'auto' starts workers in the system's own "
            "way; give a number of workers with a context."
        )
    later: dict[str, Any] = {}
    if auto_workers:
        # torch refuses these where there are no workers yet.
        plain["num_workers"] = 0
        later = {"persistent_workers": bool(plain.pop("persistent_workers", False))}
    if auto_workers or auto_prefetch:
        plain.pop("prefetch_factor", None)
    workers = plain.get("num_workers") or 0
    stream = isinstance(plain["dataset"], IterableDataset)
    given_ahead = given.get("prefetch_factor")
    ahead = given_ahead if isinstance(given_ahead, int) else 2
    tuner = Tuner(
        Setting(workers, ahead if workers else 0),
        workers=auto_workers and not stream,
        prefetch=auto_prefetch and bool(workers or (auto_workers and not stream)),
        first_prefetch=ahead,
    )
    if auto_workers and stream:
        tuner.decisions.append(
            "0 workers: each would read a stream of its own, so that their number would change the data"
        )
    return plain, tuner, later
