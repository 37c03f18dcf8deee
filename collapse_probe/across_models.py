"""Layers of one model beside those of another, on the same images: CKA of features, similarity of attention columns.

One model sees a group of images before the other does. What is kept of it until then is small: the Gram matrices of
eight images at a time, which are all that CKA needs, and the maps (means over heads, which two models have in no common
order) of as many images as a budget holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.capture import AttentionMap, TokenFeatures, layer_groups
from collapse_probe.comparison import Cross
from collapse_probe.differences import FEWEST_GROUPS, jackknife_error
from collapse_probe.metrics.functional.cka import (
    FEWEST_SAMPLES,
    alignment,
    centred_gram,
    hsic_from_sums,
    without_diagonal,
)
from collapse_probe.metrics.functional.cross_layer import centred_cross_layer_similarity, cross_layer_similarity
from collapse_probe.metrics.tiles import runs
from collapse_probe.shards import UNIT

#: Bytes of maps that are kept of a model for one group of images.
BUDGET = 256 * 2**20


class Remembered:
    """What a model left of the images of one group; a :class:`~collapse_probe.streaming.Watch`.

    Attributes:
        grams: unit of images -> the layers' centred Gram matrices without their diagonals, float64 `[L, n, n]`; units
            with a feature that is not finite, or of fewer than 4 images, are not there.
        maps: place of an image -> its maps in the largest layer group, float32 `[L, Q, K]`, means over heads.
        feature_layers, map_layers: what the L are.
        shape: what must be equal where maps are to be compared: kind, queries, keys, layout; None without maps.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.grams: dict[int, Tensor] = {}
        self.maps: dict[int, Tensor] = {}
        self.feature_layers: list[str] = []
        self.map_layers: list[str] = []
        self.shape: tuple[object, ...] | None = None
        self._left = budget

    def __call__(self, index: Tensor, maps: Mapping[str, AttentionMap], features: Mapping[str, TokenFeatures]) -> None:
        self._see_features(index, features)
        group = max(layer_groups(maps), key=len)
        first = maps[group[0]]
        self.map_layers = group
        if first.kind != "token" or first.windows != 1:
            return
        self.shape = (first.kind, *first.shape[2:], first.layout)
        if self._left <= 0 and self.maps:
            return
        for place, number in enumerate(index.tolist()):
            own = torch.stack([maps[name].select(place, place + 1).materialize()[0].float().mean(0) for name in group])
            self._left -= own.numel() * own.element_size()
            if self._left < 0 and self.maps:
                break
            self.maps[number] = own

    def _see_features(self, index: Tensor, features: Mapping[str, TokenFeatures]) -> None:
        self.feature_layers = list(features)
        for start, stop in runs(index // UNIT):
            if not features or stop - start < FEWEST_SAMPLES:
                continue
            grams = [centred_gram(item.tensor[start:stop].flatten(1).cpu()) for item in features.values()]
            stacked = without_diagonal(torch.stack(grams))
            if stacked.isfinite().all():
                self.grams[int(index[start]) // UNIT] = stacked


@dataclass
class _Sums:
    """Sums over the images of one group: HSIC of layer pairs over units, similarities over images."""

    units: int = 0
    hsic: list[Tensor] = field(default_factory=list)
    images: int = 0
    columns: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # sums and counts [L, L']


class AcrossModels:
    """Streams two models' groups of images into a :class:`~collapse_probe.comparison.Cross`.

    Args:
        first, second: labels of the models.
        same_images: whether both models see the same pixels of every image, place by place; else their maps are over
            other tokens. A sentence that says why not, or an empty one.
    """

    def __init__(self, first: str, second: str, other_pixels: str = "") -> None:
        self.first, self.second, self._other_pixels = first, second, other_pixels
        self._groups: list[_Sums] = []
        self._absent: dict[str, str] = {}
        self._rows: dict[str, list[str]] = {}
        self._columns: dict[str, list[str]] = {}

    def add(self, one: Remembered, two: Remembered) -> None:
        """What both models left of one group of images."""
        sums = _Sums()
        self._add_features(sums, one, two)
        self._add_maps(sums, one, two)
        self._groups.append(sums)

    def _add_features(self, sums: _Sums, one: Remembered, two: Remembered) -> None:
        if not one.feature_layers or not two.feature_layers:
            self._absent["cka"] = "token features were not read of both models"
            return
        self._rows["cka"], self._columns["cka"] = one.feature_layers, two.feature_layers
        for unit in one.grams.keys() & two.grams.keys():
            a, b = one.grams[unit], two.grams[unit]
            if a.shape[1:] != b.shape[1:]:  # an image was unreadable for one of them
                continue
            terms = [_hsic(a, b), _hsic(a, a).diagonal(), _hsic(b, b).diagonal()]
            sums.hsic = [have + new for have, new in zip(sums.hsic, terms, strict=True)] if sums.hsic else terms
            sums.units += 1
            sums.images += a.shape[-1]

    def _add_maps(self, sums: _Sums, one: Remembered, two: Remembered) -> None:
        why = self._other_pixels
        if not why and (one.shape is None or two.shape is None):
            why = "attention within windows, or of a class token alone, has no map over all tokens"
        if not why and one.shape != two.shape:
            why = f"their maps are over other tokens ({_in_words(one)} and {_in_words(two)})"
        if why:
            self._absent |= {"similarity": why, "centred": why}
            return
        for reading, measure in _COLUMNS.items():
            self._rows[reading], self._columns[reading] = one.map_layers, two.map_layers
            for image in one.maps.keys() & two.maps.keys():
                value = _between(measure, one.maps[image], two.maps[image])
                known = value.isfinite()
                total, count = sums.columns.get(reading, (torch.zeros_like(value), torch.zeros_like(value)))
                sums.columns[reading] = (total + value.nan_to_num(0.0), count + known)

    def result(self) -> Cross:
        """Means over all groups, with standard errors by the jackknife over groups."""
        found = Cross(self.first, self.second, self._rows, self._columns, absent=dict(self._absent))
        self._put(found, "cka", [item for item in self._groups if item.units], _cka)
        found.images["cka"] = sum(item.images for item in self._groups)
        for reading in _COLUMNS:
            seen = [item for item in self._groups if reading in item.columns]

            def mean(parts: list[_Sums], reading: str = reading) -> NDArray[np.float64]:
                totals, counts = (sum(item.columns[reading][end] for item in parts) for end in (0, 1))
                return (totals / counts).cpu().numpy()  # type: ignore[union-attr]  # 0/0 is NaN

            self._put(found, reading, seen, mean)
            found.images[reading] = int(sum(float(item.columns[reading][1].max()) for item in seen))
        return found

    def _put(
        self, found: Cross, name: str, parts: list[_Sums], estimate: Callable[[list[_Sums]], NDArray[np.float64]]
    ) -> None:
        if not parts:
            found.absent.setdefault(name, "fewer than four images in every unit of eight")
            return
        found.matrices[name] = estimate(parts)
        if len(parts) >= FEWEST_GROUPS:
            drawn = np.stack([estimate(parts[:place] + parts[place + 1 :]) for place in range(len(parts))])
            errors = np.apply_along_axis(jackknife_error, 0, drawn)
            found.matrices[f"{name}_se"] = errors


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    """HSIC_1 (Nguyen et al., eq. 3) of every layer of one with every layer of the other, `[L, L']`."""
    rows_a, rows_b = a.sum(-1), b.sum(-1)
    trace = torch.einsum("pij,qij->pq", a, b)
    return hsic_from_sums(
        trace, rows_a.sum(-1)[:, None] * rows_b.sum(-1)[None, :], rows_a @ rows_b.T, float(a.shape[-1])
    )


def _cka(parts: list[_Sums]) -> NDArray[np.float64]:
    both, own_a, own_b = (sum(item.hsic[place] for item in parts) for place in range(3))
    return alignment(both, own_a[:, None], own_b[None, :]).numpy()  # type: ignore[index,arg-type]  # sums of tensors


#: Readings of attention columns -> what computes them for the stacked layers of both models.
_COLUMNS = {"similarity": cross_layer_similarity, "centred": centred_cross_layer_similarity}


def _between(measure: Callable[[Tensor], Tensor], one: Tensor, two: Tensor) -> Tensor:
    """Mean over key tokens between the layers of one model and those of another, float64 `[L, L']`."""
    maps = torch.cat([one, two])[:, None, None]
    return measure(maps)[0, : len(one), len(one) :, 0].double().nanmean(-1).cpu()


def _in_words(item: Remembered) -> str:
    assert item.shape is not None
    return f"{item.shape[1]} queries and {item.shape[2]} keys"
