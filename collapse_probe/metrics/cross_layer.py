"""Similarity of attention maps across layers, streamed: M and its parts with standard errors.

DeepViT (Zhou et al., arXiv 2103.11886), equation 2. The centred and image-independent parts are this project's own: see
the module's functions in `collapse_probe.metrics.functional.cross_layer` for their definitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collapse_probe.metrics.functional.columns import MIN_VARIATION
from collapse_probe.metrics.image_pairs import PairSums, block_sums, pair_sums
from collapse_probe.metrics.layer_kernels import (
    LayerProducts,
    add_unit_columns,
    image_products,
    layer_products,
    layers_of,
    usable,
)
from collapse_probe.metrics.moments import MOMENTS, interval, mean_and_error, moments
from collapse_probe.metrics.replicates import REPLICATES, replicate_weights
from collapse_probe.metrics.tile_metric import TileMetric
from collapse_probe.metrics.tiles import BLOCK, GroupShape, KeyRange, MapLike, Tile, key_ranges, runs
from collapse_probe.ratio import HISTOGRAM_BINS, SIMILAR, histogram_edge

#: Largest state, in bytes, with which the image-independent part is summed exactly over all pairs of images.
PAIR_BUDGET = 256 << 20

PARTS = ("prefix", "patch")

#: Up to so many layers all images of a block are multiplied with each other at once, measured.
FEW_LAYERS = 16

#: Blocks whose images are compared with each other for standard errors: the first so many, then every so many.
PAIRED_BLOCKS, PAIRED_EVERY = 16, 4

#: Products of summed unit columns, and how many pairs of images they hold.
_Crossed = tuple[Tensor, Tensor]


@dataclass
class _Gathered:
    """Sums over the tiles seen so far of B images: one block, or several; the first axis is the part of the keys."""

    values: Tensor  # [2 readings, parts, B, L, L]
    counts: Tensor  # the same
    variation: Tensor  # [parts, B, L]
    variation_counts: Tensor
    # [blocks, parts, 4, 4, L, L]: products of layer p's columns on image b with layer q's on b' of the same block; or
    # their sums over all b and b' as [blocks, parts, 1, 1, L, L], where pairs within blocks are all that is summed.
    crossed: Tensor
    crossed_counts: Tensor
    exceeding: Tensor  # [B, nearest, L]: columns whose M with the layer so many before is above the threshold


class CrossLayerSimilarity(TileMetric):
    r"""Cosine similarity of attention columns between all pairs of layers, over any number of images.

    .. math:: M^{p,q}_{h,t} = \frac{\langle A^p_{h,:,t}, A^q_{h,:,t}\rangle}{|A^p_{h,:,t}|\,|A^q_{h,:,t}|}

    `compute()` returns a dictionary of float64 tensors, with L layers, H heads, K key tokens of an image (of all its
    windows, window by window, where attention stays within windows); means pool images, heads and tokens, and leave
    absent columns out:

    - ``similarity`` `[L, L]`: mean M, in -1..1 (0..1 for probabilities);
    - ``centred`` `[L, L]`: mean cosine of the columns after subtracting their means (what uniform attention does not
      explain), and ``centred_absent``, the share of columns for which it is undefined;
    - ``image_independent`` `[L, L]`: mean M between layer p on one image and layer q on another;
    - ``excess`` `[L, L]`: M minus that part;
    - ``relative_variation`` `[L]`: mean relative variation r of a column, 0 for uniform attention;
    - each of these with its standard error over images as ``<name>_se``, and, where the keys hold both prefix tokens
      and patches, for either alone as ``<name>_prefix`` and ``<name>_patch`` (``<name>_prefix_se``…);
    - the image-independent part and the excess have 95 % intervals as ``<name>_low`` and ``<name>_high``;
    - ``relative_variation_by_head`` `[L, H]`;
    - ``similarity_by_head``, ``centred_by_head`` `[L, L, H]`, ``similarity_by_token``, ``centred_by_token``
      `[L, L, K]`, and ``image_independent_by_head`` / ``_by_token`` where all pairs were summed;
    - ``histogram`` `[L, L, bins]`: counts of M, 400 equal bins over -1..1;
    - ``zero_columns``, ``nonfinite_columns`` `[L]`: columns left out because they are zero or not finite.

    The columns of a single query are numbers, any two of which are alike: there every reading is absent.

    Where a mask hides a key from some queries, these are zeros of its column: they count as variation, and the centred
    similarity holds the mask's pattern, which the layers of a group share. M does not: zeros add nothing to a cosine.

    Images are taken in blocks of four, those with the same ``index // 4``; pairs of images within complete blocks give
    the standard errors of the image-independent part and the excess, which are absent (NaN) below eight images. Of the
    first 16 blocks all are compared in this way, of later ones every fourth: these are errors of errors. Sums
    of near pairs of layers are also kept for the replicates of a bootstrap, see :meth:`replicates`.

    Args:
        threshold: M above which columns are counted for the similarity ratio's replicates.
        nearest: with how many blocks before and after each block is compared there.
        min_variation: smallest relative variation at which the centred similarity is defined.
        pair_budget: bytes; up to this size of the state the image-independent part is summed exactly over all pairs of
            images, beyond it over the pairs within blocks.
        kwargs: see :class:`TileMetric`.

    Example:
        >>> import torch
        >>> metric = CrossLayerSimilarity()
        >>> metric.update(torch.rand(2, 8, 3, 5, 5).softmax(-1))
        >>> metric.compute()["similarity"].shape
        torch.Size([2, 2])
    """

    name = "cross_layer_similarity"
    unit = BLOCK
    heads_apart = True
    neighbours = ("similarity", "centred", "image_independent", "excess")

    reading_moments: Tensor
    variation_moments: Tensor
    variation_by_head: Tensor
    by_head: Tensor
    by_token: Tensor
    by_head_counts: Tensor
    by_token_counts: Tensor
    unit_sum: Tensor
    unit_level_sum: Tensor
    unit_counts: Tensor
    pair_sums: Tensor
    near: Tensor
    histogram: Tensor
    zero_columns: Tensor
    nonfinite_columns: Tensor

    def __init__(
        self,
        *,
        threshold: float = SIMILAR,
        nearest: int = 1,
        min_variation: float = MIN_VARIATION,
        pair_budget: int = PAIR_BUDGET,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.threshold, self.nearest = threshold, nearest
        self.min_variation, self.pair_budget = min_variation, pair_budget
        self.add_sum("reading_moments", "variation_moments", "variation_by_head", "by_head", "by_token")
        self.add_sum("by_head_counts", "by_token_counts")
        self.add_sum("unit_sum", "unit_level_sum", "unit_counts", "pair_sums", "near")
        self.add_sum("histogram", "zero_columns", "nonfinite_columns", dtype=torch.int64)
        self._gathered: _Gathered | None = None
        self._index = torch.empty(0, dtype=torch.int64)
        self._paired: list[tuple[int, int]] = []  # which of the images form complete blocks that are compared

    @property
    def all_pairs(self) -> bool:
        """Whether the image-independent part is summed over all pairs of images (else over pairs within blocks)."""
        group = self.group
        if group is None:
            return True
        return 8 * group.layers * group.heads * group.columns * group.queries <= self.pair_budget

    def state_shapes(self, group: GroupShape) -> dict[str, tuple[int, ...]]:
        layers, heads, columns = group.layers, group.heads, group.columns
        pair = (layers, layers)
        reported = _reported(group)
        shapes: dict[str, tuple[int, ...]] = {
            "reading_moments": (2, MOMENTS, reported, *pair),
            "variation_moments": (MOMENTS, reported, layers),
            "variation_by_head": (2, layers, heads),
            "by_head": (2, heads, *pair),
            "by_head_counts": (2, heads, *pair),
            "by_token": (2, columns, *pair),
            "by_token_counts": (2, columns, *pair),
            "pair_sums": (len(PairSums._fields), reported, *pair),
            "near": (3, REPLICATES, self._reach(group), layers),
            "histogram": (layers * layers * HISTOGRAM_BINS + 1,),
            "zero_columns": (layers,),
            "nonfinite_columns": (layers,),
        }
        if self.all_pairs:
            shapes["unit_sum"] = (layers, heads, columns, group.queries)
            shapes["unit_level_sum"] = shapes["unit_counts"] = (layers, heads, columns)
        return shapes

    def begin_block(self, maps: Sequence[MapLike], index: Tensor) -> None:  # noqa: ARG002
        self._index = index
        self._paired = [
            run for run in runs(index // BLOCK) if run[1] - run[0] == BLOCK and self._pairs(int(index[run[0]]))
        ]

    def _pairs(self, image: int) -> bool:
        """Whether the images of the block that this one belongs to are compared with each other."""
        block = image // BLOCK
        return block < PAIRED_BLOCKS or block % PAIRED_EVERY == 0 or not self.all_pairs

    # -- straight from queries and keys --------------------------------------------------------------------------------

    def reads_maps(self, maps: Sequence[MapLike]) -> bool:
        return usable(maps) and self.images.device == maps[0].device

    def see_maps(self, maps: Sequence[MapLike], tile_bytes: int | None) -> None:
        layers = layers_of(maps)
        blocks = [layers.select(*run) for run in self._paired]
        gathered = self._gathered = self._empty(layers.shape[0])
        for keys in key_ranges(maps, tile_bytes):
            found = layer_products(layers, keys.start, keys.stop)
            by_layer = (found.level, found.variation, found.exists, found.finite)
            level, variation, exists, finite = (item.permute(3, 0, 1, 2).unsqueeze(2) for item in by_layer)
            if self.all_pairs:
                add_unit_columns(layers, found, keys.start, keys.stop, self.unit_sum[:, :, keys.start : keys.stop])
                self._add_over_images(self.unit_level_sum, keys, level)
                self._add_over_images(self.unit_counts, keys, exists)
            for (start, stop), block, crossed, counts in zip(
                self._paired, blocks, gathered.crossed, gathered.crossed_counts, strict=True
            ):
                part = LayerProducts(*(item[start:stop] for item in found))
                between = image_products(block, part, keys.start, keys.stop)
                crossed[keys.part] += between if self.all_pairs else between.sum((0, 1))
                self._add_between(counts[keys.part], exists[:, start:stop].to(level.dtype))
            self._add_columns(keys, found.products.flatten(0, 2), level, variation, exists, finite)

    # -- one tile ----------------------------------------------------------------------------------------------------

    def see(self, tile: Tile) -> None:
        columns = tile.columns
        layers, queries = columns.deviation.shape[0], columns.deviation.shape[-1]
        flat = columns.deviation.reshape(layers, -1, queries).transpose(0, 1)
        products = torch.bmm(flat, flat.mT)
        gathered = self._add_columns(tile, products, columns.level, columns.variation, columns.exists, columns.finite)
        if self.all_pairs:
            for state, values in (
                (self.unit_sum, columns.deviation),
                (self.unit_level_sum, columns.level),
                (self.unit_counts, columns.exists),
            ):
                self._add_over_images(state, tile, values)
        for (start, stop), crossed, counts in zip(self._paired, gathered.crossed, gathered.crossed_counts, strict=True):
            self._add_between(crossed[tile.part], columns.deviation[:, start:stop])
            self._add_between(crossed[tile.part], columns.level[:, start:stop])
            self._add_between(counts[tile.part], columns.exists[:, start:stop].to(columns.level.dtype))

    def _add_columns(
        self, keys: KeyRange, centred: Tensor, level: Tensor, variation: Tensor, exists: Tensor, finite: Tensor
    ) -> _Gathered:
        """Add columns with B images, W windows, H heads and k keys: products of their deviations between all layers
        `[B * W * H * k, L, L]`, which are overwritten, and what else `Columns` holds, `[L, B, W, H, k]` each."""
        layers, images = level.shape[:2]
        flat_level = level.reshape(layers, -1).T
        similarity = torch.addcmul(centred, flat_level[:, :, None], flat_level[:, None, :]).clamp_(-1, 1)
        defined = exists & (variation >= self.min_variation)
        inverse = variation.reciprocal().masked_fill_(~defined, 0.0).reshape(layers, -1).T
        centred.mul_(inverse[:, :, None]).mul_(inverse[:, None, :]).clamp_(-1, 1)

        gathered = self._gathered = self._gathered or self._empty(images)
        by_column = (*level.shape[1:], layers, layers)
        for reading, (values, there) in enumerate(((similarity, exists), (centred, defined))):
            self._add_reading(gathered, reading, keys, values.view(by_column), there)
        self._add_variation(gathered, keys, variation, exists)
        self._add_exceeding(gathered, similarity.view(by_column), exists)
        self._add_histogram(similarity, exists)
        self.zero_columns += self.here((finite & ~exists).sum((1, 2, 3, 4)))
        self.nonfinite_columns += self.here((~finite).sum((1, 2, 3, 4)))
        return gathered

    def _add_reading(self, gathered: _Gathered, reading: int, tile: KeyRange, values: Tensor, exists: Tensor) -> None:
        values = self.here(values)
        # Along one axis of a tile in its own dtype; everything that grows with tiles and images is in float64.
        gathered.values[reading, tile.part] += values.sum(3).double().sum((1, 2))
        over_images = values.sum(0)
        self.by_head[reading, tile.heads] += over_images.sum(2).double().sum(0)
        self._of_tile(self.by_token[reading], 0, tile).add_(over_images.sum(1))
        by_image, by_head, by_token = _pair_counts(self.here(exists))
        gathered.counts[reading, tile.part] += by_image
        self.by_head_counts[reading, tile.heads] += by_head
        self._of_tile(self.by_token_counts[reading], 0, tile).add_(by_token)

    def _add_variation(self, gathered: _Gathered, tile: KeyRange, variation: Tensor, exists: Tensor) -> None:
        counted = variation.masked_fill(~exists, 0.0)
        sums = torch.stack([self.wide(counted), self.wide(exists)]).sum((3, 5))  # [2, L, B, H]
        gathered.variation[tile.part] += sums[0].sum(2).T
        gathered.variation_counts[tile.part] += sums[1].sum(2).T
        self.variation_by_head[:, :, tile.heads] += sums.sum(2)

    def _add_exceeding(self, gathered: _Gathered, similarity: Tensor, exists: Tensor) -> None:
        edge = histogram_edge(self.threshold)
        for distance in range(1, gathered.exceeding.shape[1] + 1):
            near = similarity.diagonal(distance, -2, -1)
            both = (exists[:-distance] & exists[distance:]).movedim(0, -1)
            above = (_bins(near) >= edge) & both
            gathered.exceeding[:, distance - 1, distance:] += self.here(above.sum((1, 2, 3)))

    def _add_histogram(self, similarity: Tensor, exists: Tensor) -> None:
        layers = similarity.shape[-1]
        bins = _bins(similarity)
        pairs = torch.arange(layers * layers, dtype=bins.dtype, device=bins.device).view(layers, layers)
        bins += pairs * HISTOGRAM_BINS
        on_gpu = exists.device.type == "cuda"
        if on_gpu or not exists.all():  # absent columns are counted in a bin of their own, behind all others
            both = exists.reshape(layers, -1).T
            bins.masked_fill_(~(both[:, :, None] & both[:, None, :]), layers * layers * HISTOGRAM_BINS)
        if on_gpu and self.histogram.device == bins.device:  # bincount would wait for the device
            places = bins.flatten().long()
            self.histogram.scatter_add_(0, places, torch.ones_like(places))
        else:
            self.histogram += self.here(bins.flatten().bincount(minlength=self.histogram.numel()))

    def _add_over_images(self, state: Tensor, tile: KeyRange, values: Tensor) -> None:
        over_images = self.here(values.sum(1)).transpose(1, 2)  # [L, H, W, k, ...]
        self._of_tile(state[:, tile.heads], 2, tile).add_(over_images)

    def _add_between(self, target: Tensor, part: Tensor) -> None:
        """Multiply the columns of a block's images with each other, `[L, B, ...]`; target as in :class:`_Gathered`."""
        layers, images = part.shape[:2]
        # The sum over all pairs is a single product, of sums over images.
        self._add_products(
            target, part.reshape(layers, images, -1) if self.all_pairs else part.sum(1).view(layers, 1, -1)
        )

    def _add_products(self, target: Tensor, rows: Tensor) -> None:
        """Products of layers between different images: `rows` `[L, B, n]`, target `[B, B, L, L]`."""
        layers, images = rows.shape[:2]
        if layers <= FEW_LAYERS:  # one product, half of which is not needed, is faster than many narrow ones
            flat = rows.flatten(0, 1)
            target += (
                self.wide(flat @ flat.T)
                .unflatten(0, (layers, images))
                .unflatten(2, (layers, images))
                .permute(1, 3, 0, 2)
            )
            return
        if images == 1:
            target += self.wide(rows[:, 0] @ rows[:, 0].T)
        for one in range(images - 1):
            for other in range(one + 1, images):
                product = self.wide(rows[:, one] @ rows[:, other].T)
                target[one, other] += product
                target[other, one] += product.T

    # -- one block of images -----------------------------------------------------------------------------------------

    def fold(self, images: int) -> None:  # noqa: ARG002
        gathered = self._gathered
        assert gathered is not None
        assert self.group is not None
        self._gathered = None
        columns = self.group.heads * self.group.columns  # divides sums, so that moments stay of the order of 1
        for reading in range(2):
            values, counts = _with_total(gathered.values[reading], 0), _with_total(gathered.counts[reading], 0)
            self.reading_moments[reading] += moments(values.transpose(0, 1) / columns, counts.transpose(0, 1) / columns)
        variation, counts = _with_total(gathered.variation, 0), _with_total(gathered.variation_counts, 0)
        self.variation_moments += moments(variation.transpose(0, 1) / columns, counts.transpose(0, 1) / columns)
        for place, (start, stop) in enumerate(self._paired):
            crossed = _with_total(gathered.crossed[place], 0)
            crossed_counts = _with_total(gathered.crossed_counts[place], 0)
            same = _with_total(gathered.values[0, :, start:stop], 0)
            same_counts = _with_total(gathered.counts[0, :, start:stop], 0)
            if self.all_pairs:
                sums = pair_sums(crossed, crossed_counts, same / same_counts)
            else:
                kernel = (crossed[:, 0, 0] - same.sum(1)) / (crossed_counts[:, 0, 0] - same_counts.sum(1))
                sums = block_sums(kernel, (same / same_counts).mean(1))
            self.pair_sums += torch.stack(sums)
        self._add_replicates(gathered)

    def _add_replicates(self, gathered: _Gathered) -> None:
        """Add each image's sums for near pairs of layers to every replicate, as often as it was drawn."""
        by_image = torch.zeros_like(gathered.exceeding).expand(3, -1, -1, -1).clone()
        by_image[2] = gathered.exceeding
        for row, sums in enumerate((gathered.values[0].sum(0), gathered.counts[0].sum(0))):
            for distance in range(1, by_image.shape[2] + 1):
                by_image[row, :, distance - 1, distance:] = sums.diagonal(distance, -2, -1)
        weights = self.here(replicate_weights(self._index))
        self.near += torch.einsum("br,sbkl->srkl", weights, by_image)

    # -- results -----------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Tensor]:
        if self.group is None:
            return {}
        out = self._all_results()
        if self.group.queries == 1:
            out = {name: value if "columns" in name else _nowhere(value) for name, value in out.items()}
        return out

    def replicates(self) -> dict[str, Tensor]:
        """Readings of each block with those near it, in every bootstrap replicate: `[R, L]`, NaN where absent.

        ``similarity`` is the mean M to the block before, ``ratio`` the share of columns whose M with the nearest blocks
        on either side is above the threshold.
        """
        if self.group is None or self.group.queries == 1 or self.group.layers < 2:
            return {}
        sums, counts, exceeding = self.near
        ratio = _either_side(exceeding) / _either_side(counts)
        return {"similarity": sums[:, 0] / counts[:, 0], "ratio": ratio}

    def _all_results(self) -> dict[str, Tensor]:
        assert self.group is not None
        crossed = self._crossed() if self.all_pairs else None
        out = self._readings(crossed) | self._by_head_and_token(crossed)
        layers = self.group.layers
        out["histogram"] = self.histogram[:-1].view(layers, layers, HISTOGRAM_BINS).clone()
        out["zero_columns"], out["nonfinite_columns"] = self.zero_columns.clone(), self.nonfinite_columns.clone()
        return out

    def largest_neighbour_error(self) -> float:
        """Largest standard error of M between neighbouring layers; infinite while it is not known, 0 for one layer."""
        if self.group is None:
            return torch.inf
        _, error = mean_and_error(self.reading_moments[0, :, 0])
        return float(error.diagonal(offset=1).nan_to_num(torch.inf).max()) if self.group.layers > 1 else 0.0

    def _readings(self, crossed: _Crossed | None) -> dict[str, Tensor]:
        assert self.group is not None
        images = float(self.images)
        similarity, similarity_se = mean_and_error(self.reading_moments[0])
        centred, centred_se = mean_and_error(self.reading_moments[1])
        variation, variation_se = mean_and_error(self.variation_moments)
        pairs = PairSums(*self.pair_sums)
        if crossed is not None:
            independent = self._all_pairs_mean(crossed)
            errors = pairs.errors_of_all_pairs(images, similarity_se)
        else:
            independent, errors = pairs.mean(), pairs.errors_of_blocks()
        # The error over all pairs is itself known badly from few images; that over blocks is never smaller. Where not
        # all blocks are paired the latter would be far too large.
        whole = crossed is None or images <= PAIRED_BLOCKS * BLOCK
        freedom = pairs.blocks - 1
        ends = {
            name: interval(value, error, freedom)
            for name, value, error in (
                ("image_independent", independent, pairs.errors_of_blocks()[0] if whole else errors[0]),
                ("excess", similarity - independent, errors[1]),
            )
        }
        readings = {
            "similarity": similarity,
            "similarity_se": similarity_se,
            "centred": centred,
            "centred_se": centred_se,
            "centred_absent": 1 - self.reading_moments[1, 1] / self.reading_moments[0, 1],
            "image_independent": independent,
            "image_independent_se": errors[0],
            "excess": similarity - independent,
            "excess_se": errors[1],
            **{
                f"{name}_{end}": value
                for name, (low, high) in ends.items()
                for end, value in (("low", low), ("high", high))
            },
            "relative_variation": variation,
            "relative_variation_se": variation_se,
        }
        suffixes = ("",) if self.group.parts == 1 else ("", *(f"_{part}" for part in PARTS))
        return {_of_part(name, part): value[i] for name, value in readings.items() for i, part in enumerate(suffixes)}

    def _by_head_and_token(self, crossed: _Crossed | None) -> dict[str, Tensor]:
        out = {"relative_variation_by_head": self.variation_by_head[0] / self.variation_by_head[1]}
        for axis, sums, counts in (
            ("head", self.by_head, self.by_head_counts),
            ("token", self.by_token, self.by_token_counts),
        ):
            means = (sums / counts).permute(0, 2, 3, 1)
            out[f"similarity_by_{axis}"], out[f"centred_by_{axis}"] = means[0], means[1]
        if crossed is not None:
            products, pairs = crossed
            for axis, other, sums, counts in (
                ("head", -1, self.by_head, self.by_head_counts),
                ("token", -2, self.by_token, self.by_token_counts),
            ):
                numerator = products.sum(other) - sums[0].permute(1, 2, 0)
                denominator = pairs.sum(other) - counts[0].permute(1, 2, 0)
                out[f"image_independent_by_{axis}"] = _ratio(numerator, denominator)
        return out

    def _all_pairs_mean(self, crossed: _Crossed) -> Tensor:
        """The image-independent part over all ordered pairs of different images, for all keys and for each part."""
        assert self.group is not None
        products, pairs = crossed
        numerator = products.sum(2) - self.by_token[0].permute(1, 2, 0)
        denominator = pairs.sum(2) - self.by_token_counts[0].permute(1, 2, 0)
        edges = (self.group.prefix_tokens,) if self.group.parts == 2 else ()
        by_window = (self.group.windows, self.group.keys)
        split = [
            torch.stack([part.sum((-1, -2)) for part in total.unflatten(-1, by_window).tensor_split(edges, -1)])
            for total in (numerator, denominator)
        ]
        return _ratio(_with_total(split[0], 0), _with_total(split[1], 0))

    def _crossed(self) -> _Crossed:
        """Products of summed unit columns, and how many pairs of images they hold: `[L, L, H, K]` each."""
        crossed = torch.einsum("phkq,rhkq->prhk", self.unit_sum, self.unit_sum)
        crossed += torch.einsum("phk,rhk->prhk", self.unit_level_sum, self.unit_level_sum)
        return crossed, torch.einsum("phk,rhk->prhk", self.unit_counts, self.unit_counts)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _empty(self, images: int) -> _Gathered:
        group = self.group
        assert group is not None
        pair = (group.layers, group.layers)
        paired = (len(self._paired), group.parts, *((BLOCK,) * 2 if self.all_pairs else (1, 1)), *pair)
        zeros = self.images.new_zeros
        return _Gathered(
            values=zeros(2, group.parts, images, *pair),
            counts=zeros(2, group.parts, images, *pair),
            variation=zeros(group.parts, images, group.layers),
            variation_counts=zeros(group.parts, images, group.layers),
            crossed=zeros(paired),
            crossed_counts=zeros(paired),
            exceeding=zeros(images, self._reach(group), group.layers),
        )

    def _reach(self, group: GroupShape) -> int:
        """Up to how far apart layers are near each other."""
        return min(self.nearest, group.layers - 1)

    def _of_tile(self, state: Tensor, axis: int, tile: KeyRange) -> Tensor:
        """The part of a state that a tile adds to, its axis of W * K columns as two: windows, and the tile's keys."""
        assert self.group is not None
        by_window = state.unflatten(axis, (self.group.windows, self.group.keys))
        return by_window.narrow(axis + 1, tile.start, tile.stop - tile.start)


def _nowhere(values: Tensor) -> Tensor:
    """Absent throughout: NaN, and counts of nothing."""
    return torch.full_like(values, torch.nan) if values.is_floating_point() else torch.zeros_like(values)


def _bins(similarity: Tensor) -> Tensor:
    return ((similarity + 1) * (HISTOGRAM_BINS / 2)).to(torch.int32).clamp_(0, HISTOGRAM_BINS - 1)


def _either_side(near: Tensor) -> Tensor:
    """Sums over the pairs that a block has with those near it, before and after: `[R, nearest, L]` -> `[R, L]`."""
    total = near.sum(1)
    for distance in range(1, near.shape[1] + 1):
        total[:, :-distance] += near[:, distance - 1, distance:]
    return total


def _of_part(name: str, part: str) -> str:
    """The name of a reading for some of the keys; what it is of the reading (an error, an end) comes last."""
    stem, ending, last = name.rpartition("_")
    return f"{stem}{part}{ending}{last}" if last in ("se", "low", "high", "absent") else f"{name}{part}"


def _reported(group: GroupShape) -> int:
    """All keys, and either part alone where there are two."""
    return 1 if group.parts == 1 else 3


def _with_total(parts: Tensor, axis: int) -> Tensor:
    """The sum over parts in front of the parts; a single part is its own total."""
    if parts.shape[axis] == 1:
        return parts
    return torch.cat([parts.sum(axis, keepdim=True), parts], dim=axis)


def _pair_counts(exists: Tensor) -> tuple[Tensor | int, Tensor | int, Tensor | int]:
    """In how many columns two layers both exist, by image, head and token, from `[L, B, W, H, k]`."""
    _, images, windows, heads, width = exists.shape
    if exists.device.type == "cpu" and exists.all():  # nearly always; elsewhere the question would make a GPU wait
        return windows * heads * width, images * windows * width, images * heads
    weight = exists.double()
    by_image, by_head, by_token = (torch.einsum(f"pbwhk,rbwhk->{axes}pr", weight, weight) for axes in ("b", "h", "wk"))
    return by_image, by_head, by_token


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, torch.nan)
