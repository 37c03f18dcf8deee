"""One pass over the images: from batches to the sums of every layer group and residual stream.

One batch is alive at a time. A forward pass leaves queries, keys and token features behind; the metrics of each layer
group and stream add to their sums what they need of them; all is dropped before the next batch comes.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from collapse_probe.capture import (
    NOT_COMPARED,
    OUT_OF_ORDER,
    AttentionMap,
    Captured,
    TokenFeatures,
    Verification,
    capture,
    concatenate,
    concatenate_features,
    group_name,
    layer_groups,
    out_of_order,
)
from collapse_probe.errors import CaptureError, ResourceError, UsageError
from collapse_probe.loading import Batch, Labels
from collapse_probe.measured import MeasuredGroup, MeasuredStream
from collapse_probe.metrics.suite import choose
from collapse_probe.metrics.tiles import BLOCK
from collapse_probe.metrics.token_metric import TokenMetric
from collapse_probe.options import Options
from collapse_probe.partial import Partial
from collapse_probe.top1 import Top1


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


@dataclass
class _Waiting:
    """What images left that were not measured yet."""

    index: Tensor
    maps: dict[str, AttentionMap]
    features: dict[str, TokenFeatures]

    @classmethod
    def joined(cls, parts: list[_Waiting]) -> _Waiting:
        """Consecutive images as one."""
        first = parts[0]
        return cls(
            torch.cat([part.index for part in parts]),
            {name: concatenate([part.maps[name] for part in parts]) for name in first.maps},
            {name: concatenate_features([part.features[name] for part in parts]) for name in first.features},
        )

    def select(self, start: int, stop: int, clone: bool = False) -> _Waiting:
        """Images start..stop-1, in memory of their own if wished: parts of a batch would keep all of it alive."""
        maps = {name: item.select(start, stop) for name, item in self.maps.items()}
        features = {name: item.select(start, stop) for name, item in self.features.items()}
        if clone:
            maps = {name: item.clone() for name, item in maps.items()}
            features = {name: item.clone() for name, item in features.items()}
        return _Waiting(self.index[start:stop], maps, features)


class Run:
    """The state of one pass over the images."""

    def __init__(
        self,
        options: Options,
        device: torch.device,
        progress: Progress | None,
        total: int | None,
        labels: Callable[[int], Labels | None] | None = None,
    ) -> None:
        self.top1 = Top1(labels)
        self.options, self.device, self.progress, self.total = options, device, progress, total
        self.images = 0
        self.groups: list[MeasuredGroup] = []
        self.streams: list[MeasuredStream] = []
        self.not_captured: dict[str, str] = {}
        self.verification: Verification | None = None
        self._chosen_metrics, self._named = choose(options.metrics)
        self._wants_features = any(issubclass(item, TokenMetric) for item in self._chosen_metrics)
        self._unit = max((item.unit for item in self._chosen_metrics), default=BLOCK)
        self._turned = False  # whether a batch was turned around, to see that images are told apart
        self._waiting: list[_Waiting] = []
        self._order: list[str] = []
        self.mixed: list[str] = []  # layers that apply something else than their softmax map
        self._shapes: list[tuple[int, ...]] = []
        self._no_features: dict[str, str] = {}
        self._started = time.perf_counter()

    def through(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Run the model on every batch and feed the metrics in units of images that no batch size changes."""
        autocast = (
            torch.autocast(self.device.type, getattr(torch, self.options.amp_dtype))
            if self.options.amp
            else nullcontext()
        )
        dtype = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
        try:
            for batch in batches:
                first = not self.images
                images = batch.images.to(self.device, dtype, non_blocking=True)
                with torch.inference_mode(), autocast:
                    with capture(model, first and self.options.verify, self._wants_features) as captured:
                        output = model(images)
                    self.top1.see(output, batch.index)
                    if not self._turned and len(images) > 1:
                        self._turned = True
                        self._leave_out(out_of_order(model, images, captured.maps), captured)
                self._take(captured, batch.index, _size(images))
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

    def partial(self) -> Partial:
        """What was summed, as plain data."""
        measured = [*self.groups, *self.streams]
        absent = [
            {"metric": metric, "where": item.name, "reason": reason}
            for item in measured
            for metric, reason in item.absent.items()
        ]
        tokens = ", ".join(item.name for item in self._chosen_metrics if issubclass(item, TokenMetric))
        absent += [{"metric": tokens, "where": name, "reason": reason} for name, reason in self._no_features.items()]
        return Partial(
            shard=self.options.shard,
            images=self.images,
            options=self.options.described(),
            order=self._order,
            groups=[group.header() for group in self.groups],
            streams=[stream.header() for stream in self.streams],
            sums={name: values for item in measured for name, values in item.sums().items()} | self.top1.sums(),
            not_captured=[{"layer": name, "reason": reason} for name, reason in self.not_captured.items()],
            absent=absent,
        )

    def heads(self) -> dict[str, int]:
        """How many heads each layer has."""
        return {name: group.group.heads for group in self.groups for name in group.layers}

    def _announce(self, progress: Progress) -> None:
        """Say what a long run will cost, from what the first batch took."""
        seconds = (time.perf_counter() - self._started) / self.images * ((self.total or self.images) - self.images)
        measured = [*self.groups, *self.streams]
        sums = sum(metric.state_bytes() for item in measured for metric in item.metrics.values())
        if seconds > LONG_RUN or sums > LARGE_SUMS:
            progress.note(
                f"About {seconds / 60:.0f} min for {self.total} images at this pace; sums over images take "
                f"{sums / 2**20:.0f} MiB, however many images there are. For fewer: --num-samples or --until-se 0.01."
            )

    def _take(self, captured: Captured, index: Tensor, image_size: tuple[int, int] | None) -> None:
        maps = self._chosen(captured)
        features = self._chosen_features(captured, maps)
        if not self.groups:
            self._open(maps, features, captured, image_size)
        elif list(maps) != self._order or _sizes(maps, features) != self._shapes:
            raise CaptureError(
                "The model attended in different layers, or over other numbers of tokens, on different batches; an "
                "analysis needs images of one size that all pass through the same layers."
            )
        self.images += _image_count(maps)
        for group in self.groups:
            group.see_heads(captured.head_norms)
        self._waiting.append(_Waiting(index, maps, features))
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

    def _chosen_features(self, captured: Captured, maps: Mapping[str, AttentionMap]) -> dict[str, TokenFeatures]:
        """The features of each block by the last of its layers that is looked at."""
        found = {}
        for item in captured.features.values():
            inside = [name for name in item.layers if name in maps]
            if inside and item.images == _image_count(maps):
                found[inside[-1]] = item
        return {name: found[name] for name in maps if name in found}

    def _open(
        self,
        maps: dict[str, AttentionMap],
        features: dict[str, TokenFeatures],
        captured: Captured,
        image_size: tuple[int, int] | None,
    ) -> None:
        self._order = list(maps)
        self._shapes = _sizes(maps, features)
        self.mixed = [name for name in maps if not captured.maps[name].is_probability]
        self.not_captured = dict(captured.not_captured)
        self.verification = captured.verification
        for name, item in captured.maps.items():
            if item.kind in NOT_COMPARED:
                self.not_captured[name] = NOT_COMPARED[item.kind]
        settings = (self._chosen_metrics, self._named, self.options)
        self.groups = [
            MeasuredGroup.of(group_name(number), {name: maps[name] for name in names}, image_size, *settings)
            for number, names in enumerate(layer_groups(maps))
        ]
        if self._wants_features:
            self.streams = [
                MeasuredStream.of(f"S{number}", {name: features[name] for name in names}, *settings)
                for number, names in enumerate(_streams(features), start=1)
            ]
            self._no_features = {
                name: captured.no_features.get(name, "its block's features are reported with another layer of it")
                for name in maps
                if name not in features
            }

    def _feed(self, flush: bool = False) -> None:
        """Hand complete units of images to the metrics; the rest waits for the next batch, or for the end."""
        if not self._waiting:
            return
        last = int(self._waiting[-1].index[-1])
        total = sum(len(part.index) for part in self._waiting)
        ready = total
        if not flush and (last + 1) % self._unit:  # more images of the last unit may come
            ready -= sum(int((part.index // self._unit == last // self._unit).sum()) for part in self._waiting)
        if not ready:
            return
        joined = _Waiting.joined(self._waiting)
        for run in self.groups:
            run.feed({name: joined.maps[name].select(0, ready) for name in run.layers}, joined.index[:ready],
                     self.options.tile_bytes)  # fmt: skip
        for stream in self.streams:
            stream.feed({name: joined.features[name].select(0, ready) for name in stream.layers}, joined.index[:ready],
                        self.options.tile_bytes)  # fmt: skip
        self._waiting = [joined.select(ready, total, clone=True)] if ready < total else []

    def _precise_enough(self) -> bool:
        limit = self.options.until_se
        return (
            limit is not None
            and self.images >= LEAST_IMAGES
            and all(
                group.cross_layer.largest_neighbour_error() <= limit
                for group in self.groups
                if group.cross_layer is not None
            )
        )


def _sizes(maps: Mapping[str, AttentionMap], features: Mapping[str, TokenFeatures]) -> list[tuple[int, ...]]:
    """What of the maps and features must be the same in every batch."""
    return [
        *((*item.shape[1:], item.windows) for item in maps.values()),
        *(tuple(item.tensor.shape[1:]) for item in features.values()),
    ]


def _streams(features: Mapping[str, TokenFeatures]) -> list[list[str]]:
    """Layers whose blocks leave the same tokens and channels, stream by stream, in execution order."""
    streams: dict[tuple[object, ...], list[str]] = {}
    for name, item in features.items():
        streams.setdefault((*item.tensor.shape[1:], item.layout), []).append(name)
    return list(streams.values())


def _size(images: Tensor) -> tuple[int, int] | None:
    return (images.shape[2], images.shape[3]) if images.ndim == 4 else None


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


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has an exception of its own for GPUs; on the CPU only the text tells."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in str(error)
