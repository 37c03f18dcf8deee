"""The pipeline: a model and images in, an :class:`Analysis` out. The one module that knows every room.

One batch is alive at a time. A forward pass leaves queries and keys behind; the metrics of each layer group walk over
them tile by tile and add to their sums; the maps are dropped before the next batch comes.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import platform
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import collapse_probe.models as bundled_models  # registers the bundled architectures with timm before any is loaded
from collapse_probe.capture import AttentionMap, Captured, TokenLayout, capture, concatenate, layer_groups
from collapse_probe.diagnosis import diagnose
from collapse_probe.errors import CaptureError, ImagesError, ResourceError, UsageError
from collapse_probe.loading import check_skipped, data_config, load_model, open_images
from collapse_probe.metrics import AttentionEntropy, CrossHeadSimilarity, CrossLayerSimilarity
from collapse_probe.metrics.base import TileMetric, feed
from collapse_probe.metrics.functional.ratio import SIMILAR, block_similarity_ratio, similar_blocks
from collapse_probe.metrics.tiles import BLOCK
from collapse_probe.progress import ProgressBar
from collapse_probe.result import Analysis, Group


class Progress(Protocol):
    """Who wants to know how far an analysis is."""

    def __call__(self, done: int, total: int | None) -> None:
        """So many images are done, of so many (None where it is unknown)."""

    def note(self, text: str) -> None:
        """Something worth knowing before a long run is over."""


#: Runs that will take longer than this, in seconds, or sums larger than this, in bytes, are announced.
LONG_RUN, LARGE_SUMS = 60, 1 << 30

#: Without a number of samples, at most this many images of a folder are looked at: errors are below 0.01 long before.
DEFAULT_SAMPLES = 1000


@dataclass(frozen=True)
class Options:
    """How to run an analysis; what each means is said in :func:`analyze`."""

    batch_size: int = 32
    workers: int = 0
    num_samples: int | None = None
    device: str = "auto"
    amp: bool = False
    amp_dtype: str = "bfloat16"
    seed: int = 0
    layers: tuple[str, ...] = ()
    attention: str = "applied"
    until_se: float | None = None
    threshold: float = SIMILAR
    nearest: int = 1
    tile_bytes: int | None = None

    def check(self) -> None:
        """Raises UsageError where a value is out of range."""
        for name in ("batch_size", "num_samples", "nearest"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1; got {value}.")
        if self.workers < 0:
            raise UsageError(f"workers must be 0 or more; got {self.workers}.")
        if self.attention not in ("applied", "softmax"):
            raise UsageError(f"attention must be 'applied' or 'softmax'; got {self.attention!r}.")
        if self.amp_dtype not in ("bfloat16", "float16"):
            raise UsageError(f"amp_dtype must be 'bfloat16' or 'float16'; got {self.amp_dtype!r}.")
        if self.until_se is not None and not 0 < self.until_se < 1:
            raise UsageError(f"until_se must lie between 0 and 1; got {self.until_se}.")
        if not -1 <= self.threshold <= 1:
            raise UsageError(f"threshold must lie within -1..1; got {self.threshold}.")


def analyze(
    model: nn.Module | str | Path | None = None,
    images: str | Path | Tensor | Iterable[Any] | None = None,
    *,
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    use_ema: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    batch_size: int = 32,
    workers: int = 0,
    num_samples: int | None = None,
    device: str = "auto",
    amp: bool = False,
    amp_dtype: str = "bfloat16",
    seed: int = 0,
    layers: Sequence[str] = (),
    attention: str = "applied",
    until_se: float | None = None,
    threshold: float = SIMILAR,
    nearest: int = 1,
    tile_bytes: int | None = None,
    progress: Progress | bool = False,
) -> Analysis:
    """Where does attention collapse in this model?

    Args:
        model: an `nn.Module`, a timm name (its pretrained weights), or a path to weights. Without it, the bundled
            model on the bundled images.
        images: a folder (flat or nested), a tensor `[N, C, H, W]` already preprocessed, or a `DataLoader`. Without it,
            the bundled pictures of digits, with a warning: readings on the model's own kind of images will differ.
        arch: timm's name of the architecture that the weights belong to, where the file does not say.
        checkpoint: weights for a model given by name.
        pretrained: whether a bare name means its pretrained weights; False asks for a random network.
        use_ema: take the exponential moving average of the weights where a checkpoint holds both.
        model_kwargs: passed to `timm.create_model`.
        img_size, mean, std, crop_pct, interpolation: override the model's own preprocessing.
        batch_size: images in a forward pass. Results do not depend on it.
        workers: processes that decode images; 0 decodes in this one.
        num_samples: how many images to look at; by default all, of a folder at most 1000, chosen by `seed`.
        device: ``"auto"``, or what `torch.device` accepts. A module stays where it is under ``"auto"``.
        amp, amp_dtype: run the model under autocast in ``"bfloat16"`` or ``"float16"``; metrics stay in float32.
        seed: chooses the images of a folder and their order.
        layers: shell-style patterns; only layers whose name matches one are analysed.
        attention: ``"applied"`` (what multiplied the values) or ``"softmax"`` (the map underneath re-attention).
        until_se: stop as soon as the standard error of every neighbouring similarity is at most this.
        threshold: mean M above which neighbouring blocks are called similar, and M above which a column counts into
            the similarity ratio.
        nearest: with how many blocks before and after each block is compared for its similarity ratio.
        tile_bytes: aimed-at size of the attention columns in memory at once. Results do not depend on it.
        progress: True for a progress bar on stderr, or an object to report to (see :class:`Progress`).

    Returns:
        The :class:`Analysis`.

    Raises:
        UsageError: an argument is out of range or contradicts another.
        ModelError: the model source was rejected, or no attention map could be captured.
        ImagesError: no usable images.
        ResourceError: out of memory.
    """
    options = Options(
        batch_size, workers, num_samples, device, amp, amp_dtype, seed, tuple(layers), attention, until_se, threshold,
        nearest, tile_bytes,
    )  # fmt: skip
    options.check()
    started = time.perf_counter()
    borrowed = images is None and model is not None
    if model is None:
        model = bundled_models.bundled_weights()
    if images is None:
        images = bundled_models.bundled_images()
    if borrowed:
        warnings.warn(
            "No images given: measuring on the bundled pictures of digits. Readings on the model's own kind of images "
            "will differ; give a folder of them with --images.",
            stacklevel=2,
        )
    network = model
    if not isinstance(network, nn.Module):
        network = load_model(
            network, arch, pretrained=pretrained, checkpoint=checkpoint, use_ema=use_ema, model_kwargs=model_kwargs,
            img_size=img_size,
        )  # fmt: skip
    elif arch or checkpoint or model_kwargs:
        raise UsageError("arch, checkpoint and model_kwargs describe a file or a name; the model given is a module.")
    target = _device(options.device, network if network is model else None)
    config: dict[str, Any] = {}
    if hasattr(network, "pretrained_cfg") or isinstance(images, (str, Path)):
        config = data_config(
            network, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation, img_size=img_size
        )
    source = open_images(
        images, config=config, batch_size=options.batch_size, workers=options.workers,
        num_samples=_samples(images, options.num_samples), seed=options.seed,
    )  # fmt: skip
    bar = ProgressBar() if progress is True else progress or None
    run = _Run(options, target, bar, source.count)
    with _prepared(network, target), bar if isinstance(bar, ProgressBar) and progress is True else nullcontext():
        run.through(network, source.batches())
    check_skipped(source)
    analysis = run.result()
    analysis.provenance = {
        "model": getattr(network, "provenance", None) or {"architecture": type(network).__name__, "source": "module"},
        "images": source.describe()
        | {"count": run.images, "bundled": borrowed or model == bundled_models.bundled_weights()},
        "options": {name: value for name, value in vars(options).items() if name != "tile_bytes"},
        "image_independent": run.pair_method(),
        "device": _device_name(target),
        "seconds": round(time.perf_counter() - started, 2),
        "versions": _versions(),
    }
    analysis.findings = diagnose(analysis, threshold)
    return analysis


class _Run:
    """The state of one pass over the images."""

    def __init__(self, options: Options, device: torch.device, progress: Progress | None, total: int | None) -> None:
        self.options, self.device, self.progress, self.total = options, device, progress, total
        self.images = 0
        self.groups: list[_GroupRun] = []
        self.not_captured: dict[str, str] = {}
        self._pending: list[dict[str, AttentionMap]] = []
        self._order: list[str] = []
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
                with torch.inference_mode(), autocast, capture(model) as captured:
                    model(batch.to(self.device, dtype, non_blocking=True))
                first = not self.images
                self._take(captured)
                if self.progress is not None:
                    if first:
                        self._announce(self.progress)
                    self.progress(self.images, self.total)
                if self._precise_enough():
                    break
            self._feed(flush=True)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ResourceError(
                f"Out of memory after {self.images} images at batch size {self.options.batch_size}. "
                "Use a smaller --batch-size."
            ) from error
        if self.images == 0:
            raise ImagesError("No image could be used: see the skipped files.")

    def result(self) -> Analysis:
        groups, tables = [], []
        for number, run in enumerate(self.groups):
            group, table = run.result(_group_name(number), self.options.threshold, self.options.nearest)
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
        elif list(maps) != self._order:
            raise CaptureError(
                "The model attended in different layers on different batches; layers can be compared only if every "
                "image passes through the same ones."
            )
        self.images += next(iter(maps.values())).shape[0]
        self._pending.append(maps)
        self._feed()

    def _chosen(self, captured: Captured) -> dict[str, AttentionMap]:
        patterns = self.options.layers
        maps = {
            name: item if self.options.attention == "applied" else item.softmax
            for name, item in captured.maps.items()
            if item.kind != "window" and (not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns))
        }
        if not maps:
            raise CaptureError(_nothing_captured(captured, patterns))
        return maps

    def _open(self, maps: dict[str, AttentionMap], captured: Captured) -> None:
        self._order = list(maps)
        self.not_captured = dict(captured.not_captured)
        for name, item in captured.maps.items():
            if item.kind == "window":
                self.not_captured[name] = "windowed attention: captured, and not compared across layers by this version"
        self.groups = [_GroupRun(names, [maps[name] for name in names]) for names in layer_groups(maps)]

    def _feed(self, flush: bool = False) -> None:
        """Hand complete blocks of images to the metrics; the rest waits for the next batch, or for the end."""
        waiting = sum(next(iter(maps.values())).shape[0] for maps in self._pending)
        ready = waiting if flush else waiting - waiting % BLOCK
        if not ready:
            return
        joined = {name: concatenate([maps[name] for maps in self._pending]) for name in self._order}
        for run in self.groups:
            run.feed([joined[name].select(0, ready) for name in run.names], self.options.tile_bytes)
        self._pending = (
            [{name: item.select(ready, waiting) for name, item in joined.items()}] if ready < waiting else []
        )

    def _precise_enough(self) -> bool:
        limit = self.options.until_se
        return limit is not None and all(run.largest_error() <= limit for run in self.groups)


class _GroupRun:
    """The metrics of one layer group."""

    def __init__(self, names: list[str], maps: list[AttentionMap]) -> None:
        self.names = names
        self.layout: TokenLayout = maps[0].layout
        self.kind = maps[0].kind
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
        heads = {key: value.cpu().numpy() for key, value in self.cross_head.results().items()}
        entropy = {key: value.cpu().numpy() for key, value in self.entropy.results().items()}
        _, head_count, queries, keys = self.shape
        group = Group(
            name, list(self.names), self.kind, head_count, queries, keys, self.layout.prefix_tokens, self.layout.grid,
            matrices=_matrices(readings),
            arrays={key: readings[key] for key in readings if "_by_" in key or key == "histogram"}
            | {"cross_head_similarity": heads["cross_head_matrix"], "entropy_by_head": entropy["entropy_by_head"]},
        )  # fmt: skip
        table = pd.DataFrame(index=self.names)
        for key, value in (
            ("kind", self.kind), ("group", name), ("block", np.arange(len(self.names))), ("heads", head_count),
            ("queries", queries), ("keys", keys), ("is_probability", self.is_probability),
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


class _prepared:
    """The model in evaluation mode on its device for the block, and as it was afterwards."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._modes = {module: module.training for module in model.modules()}

    def __enter__(self) -> None:
        self._model.to(self._device)
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes.items():
            module.training = training


def _device(name: str, module: nn.Module | None) -> torch.device:
    if name == "auto":
        if module is not None:
            parameter = next(module.parameters(), None)
            return torch.device("cpu") if parameter is None else parameter.device
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is not known; use auto, cpu, cuda, cuda:N or mps.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for, and this PyTorch sees no CUDA device. Use --device cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device {name!r} was asked for, and this PyTorch sees no MPS device. Use --device cpu.")
    return device


def _samples(images: Any, num_samples: int | None) -> int | None:
    if num_samples is None and isinstance(images, (str, Path)):
        return DEFAULT_SAMPLES
    return num_samples


def _nothing_captured(captured: Captured, patterns: Sequence[str]) -> str:
    if captured.maps and patterns:
        return f"No layer matches {', '.join(patterns)}. Layers with attention: {', '.join(captured.maps)}."
    if captured.maps:
        return "The model attends within windows only, which this version captures and does not compare across layers."
    gaps = "; ".join(f"{name}: {reason}" for name, reason in captured.not_captured.items())
    return "No attention was seen in this model. " + (gaps or "Is it a vision transformer?")


def _group_name(number: int) -> str:
    """A, B, … Z, AA, AB…"""
    name = ""
    while number >= 0:
        name = chr(ord("A") + number % 26) + name
        number = number // 26 - 1
    return name


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    names = ("collapse-probe", "torch", "timm", "torchmetrics", "numpy")
    return {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()}
