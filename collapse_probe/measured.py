"""Layers that are measured together, with their metrics: fed batch by batch, saved as sums, turned into readings.

A layer group is fed with attention maps, a residual stream with token features. Either can be built again from what a
shard saved, without a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from collapse_probe.capture import AttentionMap, TokenFeatures
from collapse_probe.derived import block_readings, derived_readings
from collapse_probe.metrics import CrossLayerSimilarity
from collapse_probe.metrics.base import StreamingMetric
from collapse_probe.metrics.suite import suite
from collapse_probe.metrics.tile_metric import MapScope, TileMetric, feed
from collapse_probe.metrics.tiles import GroupShape
from collapse_probe.metrics.token_metric import StreamShape, TokenMetric, as_tokens, feed_tokens
from collapse_probe.options import Options
from collapse_probe.partial import Partial
from collapse_probe.result import Group, Stream

#: Endings of readings that belong to some of the keys only.
_PARTS = {"prefix": "_prefix", "patch": "_patch"}


class Measured(ABC):
    """Layers that are measured together.

    Attributes:
        name: of the group or stream.
        layers: names of its layers, in execution order.
        metrics: by name, in the order of the suite.
        absent: metrics that are not defined here, and why.
    """

    def __init__(self, name: str, layers: Sequence[str]) -> None:
        self.name, self.layers = name, list(layers)
        self.metrics: dict[str, StreamingMetric] = {}
        self.absent: dict[str, str] = {}
        self._settings: dict[str, dict[str, Any]] = {}

    def _open(self, kind: type[Any], scope: Any, chosen: Iterable[type[StreamingMetric]], options: Options,
              named: frozenset[str], device: torch.device) -> None:  # fmt: skip
        """Make the chosen metrics of this kind that are defined in this scope."""
        for item in chosen:
            if not issubclass(item, kind):
                continue
            settings = {**item.settings(scope), **(item.when_named if item.name in named else {})}
            if item is CrossLayerSimilarity:
                settings |= {"threshold": options.threshold, "nearest": options.nearest}
            metric = item(**settings)
            reason = cast(Any, metric).undefined(scope)
            if reason:
                self.absent[item.name] = reason
            else:
                self._settings[item.name] = settings
                self.metrics[item.name] = metric.to(device)

    def header(self) -> dict[str, Any]:
        """What is needed to build this again, as plain data."""
        return {"name": self.name, "layers": self.layers, "settings": self._settings}

    def sums(self) -> dict[str, np.ndarray]:
        """The states of all metrics."""
        return {
            f"{self.name}/{name}/{state}": values
            for name, metric in self.metrics.items()
            for state, values in metric.sums().items()
        }

    def to(self, device: torch.device) -> None:
        """Sum on this device from now on."""
        for metric in self.metrics.values():
            metric.to(device)

    def add(self, partial: Partial) -> None:
        """Add what a shard has summed."""
        for name, metric in self.metrics.items():
            metric.add_sums(partial.sums_of(self.name, name))

    def _restore(self, settings: Mapping[str, dict[str, Any]]) -> None:
        known = suite()
        self._settings = {name: dict(values) for name, values in settings.items()}
        self.metrics = {name: known[name](**values) for name, values in settings.items()}

    def _readings(self) -> dict[str, np.ndarray]:
        return {
            name: value.cpu().numpy() for metric in self.metrics.values() for name, value in metric.results().items()
        }

    def _columns(self, readings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Readings of single layers, and those of neighbours, as columns of the layers table."""
        columns = {name: values for name, values in readings.items() if _is_column(name, values)}
        for name in (name for metric in self.metrics.values() for name in metric.neighbours):
            for end in ("", "_se", "_low", "_high"):
                if f"{name}{end}" in readings:
                    previous = np.diagonal(readings[f"{name}{end}"], offset=1)
                    columns[f"{name}_to_previous{end}"] = np.concatenate([[np.nan], previous])
        return columns

    @abstractmethod
    def feed(self, layers: Mapping[str, Any], index: Tensor, tile_bytes: int | None) -> None:
        """Add images: what each layer left, by its name."""


class MeasuredGroup(Measured):
    """A layer group, measured by its attention maps."""

    def __init__(self, group: Group, scope: MapScope) -> None:
        super().__init__(group.name, group.layers)
        self.group, self.scope = group, scope
        # In how many images each head's output was zero, and in how many it was seen: [2, L, H].
        self._silent = np.zeros((2, len(group.layers), group.heads))

    @classmethod
    def of(
        cls,
        name: str,
        maps: Mapping[str, AttentionMap],
        image_size: tuple[int, int] | None,
        chosen: Iterable[type[StreamingMetric]],
        named: frozenset[str],
        options: Options,
    ) -> MeasuredGroup:
        """The group of these layers, with the chosen metrics."""
        first = next(iter(maps.values()))
        _, heads, queries, keys = first.shape
        layout = first.layout
        group = Group(
            name, list(maps), first.kind, heads, queries, keys, layout.prefix_tokens, layout.grid, first.windows,
            first.partition,
        )  # fmt: skip
        patch = None
        if image_size is not None and layout.grid is not None:
            patch = (image_size[0] / layout.grid[0], image_size[1] / layout.grid[1])
        measured = cls(group, _scope(group, patch, [item.is_probability for item in maps.values()]))
        measured._open(TileMetric, measured.scope, chosen, options, named, first.device)
        return measured

    @classmethod
    def restored(cls, header: Mapping[str, Any]) -> MeasuredGroup:
        """The same, from what :meth:`header` gave."""
        meta = {**header["meta"], "grid": _pair(header["meta"]["grid"])}
        group = Group(**meta)
        measured = cls(group, _scope(group, _pair(header["patch_size"]), header["is_probability"]))
        measured._restore(header["settings"])
        return measured

    def header(self) -> dict[str, Any]:
        return super().header() | {
            "meta": self.group.meta(),
            "patch_size": self.scope.patch_size,
            "is_probability": list(self.scope.is_probability),
        }

    @property
    def cross_layer(self) -> CrossLayerSimilarity | None:
        """The metric that says how alike layers are, where it was chosen."""
        return cast("CrossLayerSimilarity | None", self.metrics.get(CrossLayerSimilarity.name))

    def see_heads(self, norms: Mapping[str, Tensor]) -> None:
        """Count images in which a head added nothing, from the norms of the heads' outputs `[B, H]`."""
        known = {
            place: norms[name]
            for place, name in enumerate(self.layers)
            if name in norms and norms[name].shape[1] == self.group.heads
        }
        if known:  # fetched together: every fetch waits for the device
            silent = torch.stack([(own == 0).sum(0) for own in known.values()]).cpu().numpy()
            self._silent[0, list(known)] += silent
            self._silent[1, list(known)] += len(next(iter(known.values())))

    def sums(self) -> dict[str, np.ndarray]:
        return {**super().sums(), f"{self.name}/heads/silent": self._silent}

    def add(self, partial: Partial) -> None:
        super().add(partial)
        self._silent = self._silent + partial.sums_of(self.name, "heads")["silent"]

    def feed(self, layers: Mapping[str, Any], index: Tensor, tile_bytes: int | None) -> None:
        if self.metrics:
            metrics = cast("list[TileMetric]", list(self.metrics.values()))
            feed(metrics, [layers[name] for name in self.layers], tile_bytes, index)

    def result(self, options: Options) -> tuple[Group, pd.DataFrame]:
        """The group with everything measured across its layers, and a row for each of them."""
        readings = self._readings()
        group = self.group
        group.matrices = _matrices(readings)
        group.arrays = _arrays(readings)
        if self._silent[1].any():
            silent, seen = self._silent
            group.arrays["silent_by_head"] = np.divide(silent, seen, out=np.full_like(silent, np.nan), where=seen > 0)
        table = pd.DataFrame(index=self.layers)
        for key, value in (
            ("kind", group.kind), ("group", group.name), ("block", np.arange(len(self.layers))),
            ("heads", group.heads), ("queries", group.queries), ("keys", group.keys), ("windows", group.windows),
            ("partition", group.partition), ("is_probability", list(self.scope.is_probability)),
        ):  # fmt: skip
            table[key] = value
        table = table.assign(**self._columns(readings))
        if self.cross_layer is not None:
            replicates = {name: value.cpu().numpy() for name, value in self.cross_layer.replicates().items()}
            images = float(self.cross_layer.images)
            table = table.assign(**block_readings(readings, replicates, images, options.threshold, options.nearest))
            group.derived = derived_readings(readings["similarity"], replicates, images, options.threshold)
        return group, table


class MeasuredStream(Measured):
    """Layers whose blocks leave the same tokens and channels, measured by their features."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.name, stream.layers)
        self.stream = stream

    @classmethod
    def of(
        cls,
        name: str,
        features: Mapping[str, TokenFeatures],
        chosen: Iterable[type[StreamingMetric]],
        named: frozenset[str],
        options: Options,
    ) -> MeasuredStream:
        """The stream of these layers, with the chosen metrics."""
        first = next(iter(features.values()))
        _, tokens, channels = first.tensor.shape
        layout = first.layout
        blocks = [item.name for item in features.values()]
        stream = Stream(name, list(features), blocks, tokens, channels, layout.prefix_tokens, layout.grid)
        measured = cls(stream)
        shape = StreamShape(len(features), tokens, channels, layout.prefix_tokens, *(layout.grid or (0, 0)))
        measured._open(TokenMetric, shape, chosen, options, named, first.tensor.device)
        return measured

    @classmethod
    def restored(cls, header: Mapping[str, Any]) -> MeasuredStream:
        """The same, from what :meth:`header` gave."""
        measured = cls(Stream(**{**header["meta"], "grid": _pair(header["meta"]["grid"])}))
        measured._restore(header["settings"])
        return measured

    def header(self) -> dict[str, Any]:
        return super().header() | {"meta": self.stream.meta()}

    def feed(self, layers: Mapping[str, Any], index: Tensor, tile_bytes: int | None) -> None:  # noqa: ARG002
        if self.metrics:
            metrics = cast("list[TokenMetric]", list(self.metrics.values()))
            feed_tokens(metrics, as_tokens([layers[name] for name in self.layers]), index)

    def result(self) -> tuple[Stream, pd.DataFrame]:
        """The stream with everything measured across its layers, and a row for each of them."""
        readings = self._readings()
        stream = self.stream
        stream.matrices, stream.arrays = _matrices(readings), _arrays(readings)
        table = pd.DataFrame({"stream": stream.name, "module": stream.blocks}, index=self.layers)
        return stream, table.assign(**self._columns(readings))


def _scope(group: Group, patch: tuple[float, float] | None, is_probability: Iterable[bool]) -> MapScope:
    shape = GroupShape(len(group.layers), group.heads, group.queries, group.keys, group.prefix_tokens, group.windows)
    return MapScope(group.kind, shape, group.grid, patch, tuple(is_probability))


def _pair(values: Sequence[Any] | None) -> Any:
    return None if values is None else tuple(values)


def _is_array(name: str, values: np.ndarray) -> bool:
    return "_by_" in name or values.ndim > 2


def _is_column(name: str, values: np.ndarray) -> bool:
    return values.ndim == 1 and not _is_array(name, values)


def _arrays(readings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in readings.items() if _is_array(name, values) or values.ndim == 0}


def _matrices(readings: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The layer-by-layer readings, sorted into parts of the keys."""
    matrices: dict[str, dict[str, np.ndarray]] = {}
    for name, values in readings.items():
        if values.ndim != 2 or _is_array(name, values):
            continue
        part = next((part for part, ending in _PARTS.items() if ending in name), "all")
        matrices.setdefault(part, {})[name.replace(_PARTS.get(part, ""), "")] = values
    return matrices
