"""From sums to an :class:`Analysis`: the half of an analysis that needs neither the model nor the images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from collapse_probe.diagnosis import diagnose
from collapse_probe.errors import CollapseProbeError, DamagedFileError, ImagesError
from collapse_probe.measured import MeasuredGroup, MeasuredStream
from collapse_probe.metrics.tiles import BLOCK
from collapse_probe.options import Options
from collapse_probe.partial import Partial, check_shards
from collapse_probe.result import Analysis
from collapse_probe.skipping import SKIPPED_ALLOWED, check_count, check_share
from collapse_probe.top1 import Top1


def merge(partials: Sequence[Partial | str | Path], max_skipped: float | None = None) -> Analysis:
    """The second half of `analyze`: readings and verdict from the sums of all shards.

    Of shards in folders, the sums of one at a time are in memory.

    Args:
        partials: all shards of one analysis, in any order, as `measure` gave them, or the folders that they were saved
            in.
        max_skipped: share of all images that may be unreadable, 0 to 1; by default the largest that a shard was
            measured with.

    Raises:
        UsageError: a shard is missing or given twice, they do not belong together, or `max_skipped` is no share.
        DamagedFileError: a folder does not hold a shard as it was saved.
        ImagesError: no shard holds an image, or too many of all images could not be read.
        ResourceError: the sums of a shard do not fit into memory.
    """
    found = [(item.header() if isinstance(item, Partial) else Partial.load_header(item), item) for item in partials]
    headers = check_shards([header for header, _ in found])
    found.sort(key=lambda pair: pair[0].shard.number)
    whole = (item if isinstance(item, Partial) else Partial.load(item) for header, item in found if header.images)
    with nullcontext() if all(isinstance(item, Partial) for item in partials) else _taken_at_its_word():
        return merge_one_by_one(headers, whole, max_skipped)


def merge_one_by_one(
    headers: Sequence[Partial], whole: Iterable[Partial], max_skipped: float | None = None
) -> Analysis:
    """The same where shards come one at a time.

    Args:
        headers: what all shards say of themselves, checked and in their order.
        whole: those that hold images, in the same order, with their sums.
        max_skipped: see :func:`merge`.

    Raises:
        UsageError, DamagedFileError, ImagesError: see :func:`merge`.
    """
    if not any(header.images for header in headers):
        raise ImagesError("None of these shards holds an image.")
    if max_skipped is None:
        max_skipped = max(header.options.get("max_skipped", SKIPPED_ALLOWED) for header in headers)
    check_share(max_skipped)
    _check_skipped(headers, max_skipped)
    return joined(headers, whole, max_skipped)


def joined(headers: Sequence[Partial], whole: Iterable[Partial], max_skipped: float) -> Analysis:
    """The same of part of the images, of which more may be unreadable than of all."""
    analysis = readings(whole)
    analysis.provenance |= _provenance(headers)
    analysis.provenance["options"] = {**analysis.provenance["options"], "max_skipped": max_skipped}
    analysis.findings = diagnose(analysis, analysis.provenance["options"]["threshold"])
    return analysis


def readings(shards: Iterable[Partial]) -> Analysis:
    """Everything that was measured; no verdict. The shards all hold images, and one is kept at a time."""
    remaining = iter(shards)
    shard: Partial | None = next(remaining)
    assert shard is not None
    first = shard.header()
    options = Options(**{**first.options, "layers": tuple(first.options["layers"])})
    options.check()
    top1 = Top1()
    groups = [MeasuredGroup.restored(header) for header in first.groups]
    streams = [MeasuredStream.restored(header) for header in first.streams]
    while shard is not None:
        for item in (*groups, *streams):
            item.add(shard)
        top1.add(shard)
        del shard  # before the next one comes
        shard = next(remaining, None)
    results, rows = zip(*(group.result(options) for group in groups), strict=True)
    own_streams, features = zip(*(stream.result() for stream in streams), strict=True) if streams else ((), ())
    table = pd.concat(rows)
    if features:
        table = table.join(pd.concat(features))
    exact = all(group.cross_layer is None or group.cross_layer.all_pairs for group in groups)
    return Analysis(
        table.loc[[name for name in first.order if name in table.index]].copy(),  # in one piece
        list(results),
        provenance={
            "options": first.options,
            **_top1(top1, first),
            "image_independent": "all pairs of images" if exact else f"pairs of images within blocks of {BLOCK}",
        },
        not_captured=first.not_captured,
        streams=list(own_streams),
        absent=first.absent,
    )


def _top1(counts: Top1, shard: Partial) -> dict[str, Any]:
    """What was right of the images of all shards, where any of them says how labels are known."""
    found = counts.result(shard.provenance.get("images", {}).get("labels", {}))
    return {"top1": found} if found else {}


@contextmanager
def _taken_at_its_word() -> Iterator[None]:
    """Shards that are as they were written are believed; those that someone made up may break anywhere."""
    try:
        yield
    except CollapseProbeError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f"These shards hold something else than what this version of collapse_probe writes "
            f"({type(error).__name__}: {error!s:.100}). Measure them again."
        ) from error


def _provenance(shards: Sequence[Partial]) -> dict[str, Any]:
    """That of the first shard with images, with what all shards have together."""
    first = next(shard for shard in shards if shard.images)
    images = {
        **first.provenance["images"],
        "count": sum(shard.images for shard in shards),
        "skipped": _skipped(shards),
    }
    images.pop("shard", None)
    provenance = {**first.provenance, "images": images}
    provenance["seconds"] = max(shard.provenance["seconds"] for shard in shards)
    if len(shards) > 1:
        provenance["shards"] = len(shards)
    return provenance


def _skipped(shards: Sequence[Partial]) -> list[dict[str, str]]:
    """Files of all shards that could not be read, in the order of all images."""
    entries = [entry for shard in shards for entry in shard.provenance["images"]["skipped"]]
    if len(shards) == 1 or not entries:
        return entries
    from collapse_probe.loading.folder import seeded_order

    by_path = {entry["path"]: entry for entry in entries}
    return [by_path[path] for path in seeded_order(list(by_path), shards[0].provenance["images"]["seed"])]


def _check_skipped(shards: Sequence[Partial], allowed: float) -> None:
    """Each shard was lenient with its own unreadable images; together they are judged as those of one pass."""
    skipped = _skipped(shards)
    check_count(skipped, sum(shard.images for shard in shards) + len(skipped), allowed)
