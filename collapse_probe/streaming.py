"""One pass over the images: from batches to the numbers of every layer group.

One batch is alive at a time. A forward pass leaves queries and keys behind; the metrics of each layer group walk over
them tile by tile and add to their sums; the maps are dropped before the next batch comes.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from collapse_probe.capture import (
    NOT_COMPARED,
    OUT_OF_ORDER,
    AttentionMap,
    Captured,
    TokenLayout,
    Verification,
    capture,
    concatenate,
    group_name,
    layer_groups,
    out_of_order,
)
from collapse_probe.errors import CaptureError, ResourceError, UsageError
from collapse_probe.metrics import AttentionEntropy, CrossHeadSimilarity, CrossLayerSimilarity
from collapse_probe.metrics.base import TileMetric, feed
from collapse_probe.metrics.functional.ratio import block_similarity_ratio, similar_blocks
from collapse_probe.metrics.tiles import BLOCK
from collapse_probe.options import Options
from collapse_probe.result import Analysis, Group


class Progress(Protocol):
    """Who wants to know how far an analysis is."""

    def __call__(self, done: int, total: int | None) -> None:
        """So many images are done, of so many (None where it is unknown)."""

    def note(self, text: str) -> None:
        """Something worth knowing before a long run is over."""


#: No run stops for its precision before so many images: from fewer, the error itself is not known well.
LEAST_IMAGES = 16

#: Runs that will take longer than this, in seconds, or sums larger than this, in bytes, are announced.
LONG_RUN, LARGE_SUMS = 60, 1 << 30


class Run:
    """The state of one pass over the images."""

    def __init__(self, options: Options, device: torch.device, progress: Progress | None, total: int | None) -> None:
        self.options, self.device, self.progress, self.total = options, device, progress, total
        self.images = 0
        self.groups: list[_GroupRun] = []
        self.not_captured: dict[str, str] = {}
        self.verification: Verification | None = None
        self._turned = False  # whether a batch was turned around, to see that images are told apart
        self._pending: list[dict[str, AttentionMap]] = []
        self._order: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._started = time.perf_counter()

    def through(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Run the model on every batch and feed the metrics in blocks of images that no batch size changes."""
        autocast = (
            torch.autocast(self.device.type, getattr(torch, self.options.amp_dtype))
            if self.options.amp
            else nullcontext()
        )
        dtype = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
        try:
            for batch in batches:
                first = not self.images
                images = batch.to(self.device, dtype, non_blocking=True)
                with torch.inference_mode(), autocast:
                    with capture(model, first and self.options.verify) as captured:
                        model(images)
                    if not self._turned and len(images) > 1:
                        self._turned = True
                        self._leave_out(out_of_order(model, images, captured.maps), captured)
                self._take(captured)
                if self.progress is not None:
                    if first:
                        self._announce(self.progress)
                    self.progress(self.images, self.total)
                if self._precise_enough():
                    if self.progress is not None:
                        self.progress.note(f"Stopped after {self.images} images: precise enough.")
                    break
            self._feed(flush=True)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise ResourceError(
                f"Out of memory after {self.images} images at batch size {self.options.batch_size}. "
                "Use a smaller --batch-size."
            ) from error

    def result(self) -> Analysis:
        groups, tables = [], []
        for number, run in enumerate(self.groups):
            group, table = run.result(group_name(number), self.options.threshold, self.options.nearest)
            groups.append(group)
            tables.append(table)
        table = pd.concat(tables)
        table = table.loc[[name for name in self._order if name in table.index]]
        gaps = [{"layer": name, "reason": reason} for name, reason in self.not_captured.items()]
        return Analysis(table, groups, not_captured=gaps)

    def _announce(self, progress: Progress) -> None:
        """Say what a long run will cost, from what the first batch took."""
        seconds = (time.perf_counter() - self._started) / self.images * ((self.total or self.images) - self.images)
        sums = sum(metric.state_bytes() for run in self.groups for metric in run.metrics)
        if seconds > LONG_RUN or sums > LARGE_SUMS:
            progress.note(
                f"About {seconds / 60:.0f} min for {self.total} images at this pace; sums over images take "
                f"{sums / 2**20:.0f} MiB, however many images there are. For fewer: --num-samples or --until-se 0.01."
            )

    def pair_method(self) -> str:
        """How the image-independent part was taken."""
        exact = all(run.cross_layer.all_pairs for run in self.groups)
        return "all pairs of images" if exact else f"pairs of images within blocks of {BLOCK}"

    def _take(self, captured: Captured) -> None:
        maps = self._chosen(captured)
        if not self.groups:
            self._open(maps, captured)
        elif list(maps) != self._order or _sizes(maps) != self._shapes:
            raise CaptureError(
                "The model attended in different layers, or over other numbers of tokens, on different batches; an "
                "analysis needs images of one size that all pass through the same layers."
            )
        self.images += _image_count(maps)
        self._pending.append(maps)
        self._feed()

    def _leave_out(self, names: list[str], captured: Captured) -> None:
        """Layers in which images trade places."""
        if names and self.groups:
            raise CaptureError(f"{', '.join(names)}: {OUT_OF_ORDER}. Leave it out with --layers.")
        for name in names:
            del captured.maps[name]
            captured.not_captured[name] = OUT_OF_ORDER

    def _chosen(self, captured: Captured) -> dict[str, AttentionMap]:
        patterns = self.options.layers
        maps = {
            name: item if self.options.attention == "applied" else item.softmax
            for name, item in captured.maps.items()
            if item.kind not in NOT_COMPARED
            and name not in self.not_captured  # found wrong on the first batch
            and (not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns))
        }
        if not maps and captured.maps and patterns:
            raise UsageError(
                f"No layer matches {', '.join(patterns)}. Layers with attention: {', '.join(captured.maps)}."
            )
        if not maps:
            raise CaptureError(_nothing_captured(captured))
        return maps

    def _open(self, maps: dict[str, AttentionMap], captured: Captured) -> None:
        self._order = list(maps)
        self._shapes = _sizes(maps)
        self.not_captured = dict(captured.not_captured)
        self.verification = captured.verification
        for name, item in captured.maps.items():
            if item.kind in NOT_COMPARED:
                self.not_captured[name] = NOT_COMPARED[item.kind]
        self.groups = [_GroupRun(names, [maps[name] for name in names]) for names in layer_groups(maps)]

    def _feed(self, flush: bool = False) -> None:
        """Hand complete blocks of images to the metrics; the rest waits for the next batch, or for the end."""
        waiting = sum(_image_count(maps) for maps in self._pending)
        ready = waiting if flush else waiting - waiting % BLOCK
        if not ready:
            return
        joined = {name: concatenate([maps[name] for maps in self._pending]) for name in self._order}
        for run in self.groups:
            run.feed([joined[name].select(0, ready) for name in run.names], self.options.tile_bytes)
        self._pending = []
        if ready < waiting:
            self._pending = [{name: item.select(ready, waiting).clone() for name, item in joined.items()}]

    def _precise_enough(self) -> bool:
        limit = self.options.until_se
        return (
            limit is not None
            and self.images >= LEAST_IMAGES
            and all(run.largest_error() <= limit for run in self.groups)
        )


class _GroupRun:
    """The metrics of one layer group."""

    def __init__(self, names: list[str], maps: list[AttentionMap]) -> None:
        self.names = names
        self.layout: TokenLayout = maps[0].layout
        self.kind, self.windows, self.partition = maps[0].kind, maps[0].windows, maps[0].partition
        self.shape = maps[0].shape
        self.is_probability = [item.is_probability for item in maps]
        self.cross_layer, self.cross_head, self.entropy = (
            CrossLayerSimilarity(),
            CrossHeadSimilarity(),
            AttentionEntropy(),
        )
        device = maps[0].device
        self.metrics: list[TileMetric] = [self.entropy, self.cross_layer, self.cross_head]
        for metric in self.metrics:
            metric.to(device)

    def feed(self, maps: list[AttentionMap], tile_bytes: int | None) -> None:
        feed(self.metrics, maps, tile_bytes)

    def largest_error(self) -> float:
        """Largest standard error of a neighbouring similarity; infinite before it is known."""
        return self.cross_layer.largest_neighbour_error()

    def result(self, name: str, threshold: float, nearest: int) -> tuple[Group, pd.DataFrame]:
        readings = {key: value.cpu().numpy() for key, value in self.cross_layer.results().items()}
        if self.shape[2] == 1:  # the columns of a single query are numbers, and any two of them are alike
            readings = {name: value if "columns" in name else _absent(value) for name, value in readings.items()}
        heads = {key: value.cpu().numpy() for key, value in self.cross_head.results().items()}
        entropy = {key: value.cpu().numpy() for key, value in self.entropy.results().items()}
        _, head_count, queries, keys = self.shape
        group = Group(
            name, list(self.names), self.kind, head_count, queries, keys, self.layout.prefix_tokens, self.layout.grid,
            self.windows, self.partition, _matrices(readings),
            arrays={key: value for key, value in (readings | entropy).items() if "_by_" in key or key == "histogram"}
            | {"cross_head_similarity": heads["cross_head_matrix"]},
        )  # fmt: skip
        table = pd.DataFrame(index=self.names)
        for key, value in (
            ("kind", self.kind), ("group", name), ("block", np.arange(len(self.names))), ("heads", head_count),
            ("queries", queries), ("keys", keys), ("windows", self.windows), ("partition", self.partition),
            ("is_probability", self.is_probability),
        ):  # fmt: skip
            table[key] = value
        for key in ("entropy", "normalized_entropy"):
            table[key], table[f"{key}_se"] = entropy[key], entropy[f"{key}_se"]
        table["relative_variation"], table["relative_variation_se"] = readings["variation"], readings["variation_se"]
        for key in ("cross_head_similarity", "head_diversity"):
            table[key], table[f"{key}_se"] = heads[key], heads[f"{key}_se"]
        for key in ("similarity", "centred", "image_independent", "excess"):
            for end in ("", "_se"):
                previous = np.diagonal(readings[f"{key}{end}"], offset=1)
                table[f"{key}_to_previous{end}"] = np.concatenate([[np.nan], previous])
        table["similarity_ratio"] = block_similarity_ratio(readings["histogram"], nearest, threshold)
        similar = similar_blocks(readings["similarity"], threshold)
        table["similar_to_previous"] = pd.array([pd.NA, *similar[1:]], dtype="boolean")
        table["zero_columns"], table["nonfinite_columns"] = readings["zero_columns"], readings["nonfinite_columns"]
        return group, table


def _matrices(readings: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The layer-by-layer readings, sorted into parts."""
    names = [
        f"{name}{end}" for name in ("similarity", "centred", "image_independent", "excess") for end in ("", "_se")
    ] + ["centred_absent"]
    suffixes = {"all": "", "prefix": "_prefix", "patch": "_patch"}
    return {
        part: {name: readings[f"{name}{suffix}"] for name in names}
        for part, suffix in suffixes.items()
        if f"similarity{suffix}" in readings
    }


def _sizes(maps: Mapping[str, AttentionMap]) -> list[tuple[int, ...]]:
    """What of the maps must be the same in every batch."""
    return [(*item.shape[1:], item.windows) for item in maps.values()]


def _image_count(maps: Mapping[str, AttentionMap]) -> int:
    """How many images a batch held, on which all layers must agree."""
    counts = {name: item.images for name, item in maps.items()}
    if len(set(counts.values())) > 1:
        fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise CaptureError(
            f"Layers disagree on how many images a batch held: {fewest} attended for {counts[fewest]} and {most} for "
            f"{counts[most]}. Leave one of them out with --layers."
        )
    return next(iter(counts.values()))


def _nothing_captured(captured: Captured) -> str:
    if captured.maps:
        reasons = {NOT_COMPARED[item.kind] for item in captured.maps.values()}
        return "None of this model's layers can be compared with another: " + "; ".join(sorted(reasons)) + "."
    gaps = "; ".join(f"{name}: {reason}" for name, reason in captured.not_captured.items())
    return "No attention was seen in this model. " + (gaps or "Is it a vision transformer?")


def _absent(values: np.ndarray) -> np.ndarray:
    return np.full(values.shape, np.nan)


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has an exception of its own for GPUs; on the CPU only the text tells."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in str(error)
