"""One pass over the images: from batches to the sums of every layer group and residual stream.

One batch is alive at a time. A forward pass leaves queries, keys and token features behind; the metrics of each layer
group and stream add to their sums what they need of them; all is dropped before the next batch comes.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from collapse_probe.allocator import kept_memory
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
from collapse_probe.errors import CaptureError, ResourceError, UsageError, is_out_of_memory
from collapse_probe.loading import Batch, Labels
from collapse_probe.measured import MeasuredGroup, MeasuredStream
from collapse_probe.metrics.suite import choose
from collapse_probe.metrics.tiles import BLOCK
from collapse_probe.metrics.token_metric import TokenMetric
from collapse_probe.options import Options
from collapse_probe.partial import Partial
from collapse_probe.shards import UNIT
from collapse_probe.shortage import out_of_memory
from collapse_probe.signals import undisturbed
from collapse_probe.top1 import Top1


class Watch(Protocol):
    """Who looks on while images are measured."""

    def __call__(self, index: Tensor, maps: Mapping[str, AttentionMap], features: Mapping[str, TokenFeatures]) -> None:
        """Complete units of images: their places, and what every layer left of them; gone afterwards."""


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


class StartOver(Exception):
    """Memory ran out while sums were added to, so that they are of no use any more.

    Attributes:
        limit: how many images to pass through the model at a time from now on.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit


@dataclass
class _Waiting:
    """What images left that were not measured yet; of layers whose heads can be told apart, their norms `[B, H]`."""

    index: Tensor
    maps: dict[str, AttentionMap]
    features: dict[str, TokenFeatures]
    norms: dict[str, Tensor]

    @classmethod
    def joined(cls, parts: list[_Waiting]) -> _Waiting:
        """Consecutive images as one. The parts are let go layer by layer, so that no more than one is there twice."""
        first = parts[0]
        return cls(
            torch.cat([part.index for part in parts]),
            {name: concatenate([part.maps.pop(name) for part in parts]) for name in list(first.maps)},
            {name: concatenate_features([part.features.pop(name) for part in parts]) for name in list(first.features)},
            {
                name: torch.cat([part.norms[name] for part in parts])
                for name in first.norms
                if all(name in part.norms for part in parts)
            },
        )

    def select(self, start: int, stop: int, clone: bool = False) -> _Waiting:
        """Images start..stop-1, in memory of their own if wished: parts of a batch would keep all of it alive."""
        maps = {name: item.select(start, stop) for name, item in self.maps.items()}
        features = {name: item.select(start, stop) for name, item in self.features.items()}
        norms = {name: item[start:stop] for name, item in self.norms.items()}
        if clone:
            maps = {name: item.clone() for name, item in maps.items()}
            features = {name: item.clone() for name, item in features.items()}
            norms = {name: item.clone() for name, item in norms.items()}
        return _Waiting(self.index[start:stop], maps, features, norms)


class Run:
    """The state of one pass over the images.

    Attributes:
        images: how many images have passed through the model.
        fed: how many of them are in the sums; the others wait for the rest of their unit.
        position: the place of the first image that is not in the sums.
        limit: how many images pass through the model at a time at most; None for whole batches.
        done: whether nothing more is to be measured.
    """

    def __init__(
        self,
        options: Options,
        device: torch.device,
        progress: Progress | None,
        total: int | None,
        labels: Callable[[int], Labels | None] | None = None,
        limit: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.options, self.device, self.progress, self.total, self.limit = options, device, progress, total, limit
        self.watch = watch
        self.images = self.fed = self.position = 0
        self.done = False
        self.top1 = Top1(labels)
        self.groups: list[MeasuredGroup] = []
        self.streams: list[MeasuredStream] = []
        self.not_captured: dict[str, str] = {}
        self.verification: Verification | None = None
        self._chosen_metrics, self._named = choose(options.metrics)
        self._wants_features = any(issubclass(item, TokenMetric) for item in self._chosen_metrics)
        self._unit = max((item.unit for item in self._chosen_metrics), default=BLOCK)
        if watch is not None:
            self._unit = max(self._unit, UNIT)
        self._turned = False  # whether a batch was turned around, to see that images are told apart
        self._waiting: list[_Waiting] = []
        self._order: list[str] = []
        self.mixed: list[str] = []  # layers that apply something else than their softmax map
        self._shapes: list[tuple[int, ...]] = []
        self._no_features: dict[str, str] = {}
        self._carried: dict[str, np.ndarray] = {}  # sums before a restart that no group or stream knows
        self._restored, self._size = 0, 1  # images before a restart; images in the last forward pass
        self._started = time.perf_counter()

    def through(
        self, model: nn.Module, batches: Iterable[Batch], after_batch: Callable[[], None] | None = None
    ) -> None:
        """Run the model on every batch and feed the metrics in units of images that no batch size changes.

        Args:
            model: on its device, in evaluation mode.
            batches: as an :class:`~collapse_probe.loading.ImageSource` delivers them, from `position` on.
            after_batch: called whenever a batch is done and more may come.

        Raises:
            CaptureError: no map was captured, or other ones than before.
            ResourceError: memory does not hold one image.
            StartOver: memory ran out while sums were added to.
        """
        with kept_memory():
            self._through(model, batches, after_batch)

    def _through(self, model: nn.Module, batches: Iterable[Batch], after_batch: Callable[[], None] | None) -> None:
        announced = False
        # A run may have been cut after its last batch, before it was asked whether that was enough.
        for batch in batches if not (self.done or self._precise_enough()) else ():
            self._measure(model, batch)
            if self.progress is not None and self.images:
                if not announced:
                    self._announce(self.progress)
                announced = True
                self.progress(self.images, self.total)
            if self._precise_enough():
                if self.progress is not None:
                    self.progress.note(f"Stopped after {self.images} images: precise enough.")
                break
            if after_batch is not None:
                after_batch()
        self._feed(flush=True)
        self.done = True

    def state(self) -> Partial:
        """What was summed so far, and where this run stands: what :meth:`restore` goes on from."""
        partial = self.partial()
        partial.state = {
            "position": self.position,
            "done": self.done,
            "turned": self._turned,
            "shapes": [list(shape) for shape in self._shapes],
            "mixed": self.mixed,
            "absent": {item.name: item.absent for item in (*self.groups, *self.streams)},
            "no_features": self._no_features,
            "verification": None if self.verification is None else self.verification.to_dict(),
        }
        return partial

    def restore(self, saved: Partial) -> None:
        """Go on where another run stood, whose weights, images and options are known to be the same.

        Raises:
            KeyError, TypeError, ValueError: this is not what :meth:`state` gave.
        """
        state = saved.state
        self.images = self.fed = self._restored = saved.images
        self.position, self.done, self._turned = state["position"], state["done"], state["turned"]
        self.groups = [MeasuredGroup.restored(header) for header in saved.groups]
        self.streams = [MeasuredStream.restored(header) for header in saved.streams]
        for item in (*self.groups, *self.streams):
            item.to(self.device)
            item.add(saved)
            item.absent = dict(state["absent"][item.name])
        known = {f"{item.name}/" for item in (*self.groups, *self.streams)}
        self._carried = {
            name: values for name, values in saved.sums.items() if name.partition("/")[0] + "/" not in known
        }
        self.not_captured = {entry["layer"]: entry["reason"] for entry in saved.not_captured}
        self.mixed, self._order, self._no_features = state["mixed"], list(saved.order), dict(state["no_features"])
        self._shapes = [tuple(shape) for shape in state["shapes"]]
        self.verification = _verification(state["verification"])
        self.top1.restore(saved)

    def _measure(self, model: nn.Module, batch: Batch) -> None:
        """Pass a batch through the model, in parts where memory does not hold what the whole leaves behind."""
        start = 0
        while start < len(batch.index):
            stop = start + (self.limit or len(batch.index))
            part = Batch(batch.images[start:stop], batch.index[start:stop])
            captured = self._forward(model, part)
            if captured is not None:
                self._size = len(part.index)
                self._take(captured, part.index, _size(part.images))
                start = stop

    def _forward(self, model: nn.Module, batch: Batch) -> Captured | None:
        """What these images left, or None where memory ran out: then fewer are to be tried."""
        turned = self._turned
        dtype = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
        try:
            images = _moved(batch.images, self.device, dtype)
            # Without gradients, but not in inference mode: there, composite operators reach the capture whole, and are
            # taken apart in Python.
            with torch.no_grad(), self._autocast():
                with capture(model, not self.images and self.options.verify, self._wants_features) as captured:
                    output = model(images)
                if not self._turned and len(images) > 1:
                    self._turned = True
                    self._leave_out(out_of_order(model, images, captured.maps), captured)
            self.top1.see(output, batch.index)
            return captured
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._turned = turned
            if len(batch.index) == 1:
                raise self._shortage(error, model) from error
        # The exception is gone by now, and what its traceback kept alive with it.
        self.limit = self._halved(len(batch.index))
        return None

    def _halved(self, images: int) -> int:
        """Half as many images at a time, and say so."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.progress is not None:
            self.progress.note(f"Out of memory with {images} images at a time: going on with {images // 2}.")
        return images // 2

    def _shortage(self, error: Exception, model: nn.Module | None = None) -> ResourceError:
        return out_of_memory(error, self.device, self.fed, model)

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.options.amp:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.options.amp_dtype))

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
            images=self.fed,
            options=self.options.described(),
            order=self._order,
            groups=[group.header() for group in self.groups],
            streams=[stream.header() for stream in self.streams],
            sums=self._carried
            | {name: values for item in measured for name, values in item.sums().items()}
            | self.top1.sums(),
            not_captured=[{"layer": name, "reason": reason} for name, reason in self.not_captured.items()],
            absent=absent,
        )

    def heads(self) -> dict[str, int]:
        """How many heads each layer has."""
        return {name: group.group.heads for group in self.groups for name in group.layers}

    def _announce(self, progress: Progress) -> None:
        """Say what a long run will cost, from what the first batch took."""
        pace = (time.perf_counter() - self._started) / max(1, self.images - self._restored)
        seconds = pace * ((self.total or self.images) - self.images)
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
        self._waiting.append(_Waiting(index, maps, features, dict(captured.head_norms)))
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
        try:
            with undisturbed():  # sums that hold part of an image could not be saved
                self._add(_Waiting.joined(self._waiting), ready)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if self._size == 1:
                raise self._shortage(error) from error
            raise StartOver(self._halved(self._size)) from None

    def _add(self, joined: _Waiting, ready: int) -> None:
        """Feed the metrics with the first images; the others go on waiting."""
        index = joined.index[:ready]
        for run in self.groups:
            run.feed({name: joined.maps[name].select(0, ready) for name in run.layers}, index, self.options.tile_bytes)
            run.see_heads({name: norms[:ready] for name, norms in joined.norms.items()})
        for stream in self.streams:
            stream.feed({name: joined.features[name].select(0, ready) for name in stream.layers}, index,
                        self.options.tile_bytes)  # fmt: skip
        if self.watch is not None:
            chosen = joined.select(0, ready)
            self.watch(index, chosen.maps, chosen.features)
        total = len(joined.index)
        self._waiting = [joined.select(ready, total, clone=True)] if ready < total else []
        self.fed += ready
        self.position = int(index[-1]) + 1
        self.top1.settle(self.position)

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


def _moved(images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The images where the model is and in its precision; of page-locked memory a GPU copies them as they are, while it
    computes, and converts them itself."""
    if device.type == "cuda":
        images = images.to(device, non_blocking=True)
    return images.to(device, dtype)


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


def _verification(described: Mapping[str, Any] | None) -> Verification | None:
    """From plain data, in which NaN is None."""
    if described is None:
        return None
    errors = {name: math.nan if error is None else error for name, error in described["errors"].items()}
    counts = {name: described[name] for name in ("kernels", "captured", "named")}
    return Verification(**counts, errors=errors, failures=list(described["failures"]))
