"""Time, memory and accuracy of a contender, and the least that M could cost."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from contenders import PLAIN, Batches, Contender, chosen, timm_model
from torch import Tensor, nn

from collapse_probe.capture import capture
from collapse_probe.capture.attention_map import AttentionMap, QueryKey
from collapse_probe.metrics import CrossLayerSimilarity
from collapse_probe.metrics.layer_kernels import Floors, floors


@dataclass(frozen=True)
class Setting:
    """What is measured: a model, how many images of which size, on which device and in which dtype."""

    model: str
    images: int
    batch: int
    size: int
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    def batches(self, limit: int | None = None) -> Batches:
        """Noise: speed does not depend on what is seen."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(min(self.images, limit or self.images), 3, self.size, self.size, generator=generator)
        return list(images.to(self.device, getattr(torch, self.dtype)).split(self.batch))

    def build(self, contender: Contender) -> nn.Module:
        return contender.build(self.model).to(self.device, getattr(torch, self.dtype))


def seconds_per_image(setting: Setting, contenders: dict[str, Contender], repeats: int) -> dict[str, list[float]]:
    """Of every contender, in turn, so that a slow minute hits all of them."""
    models: dict[object, nn.Module] = {}
    times: dict[str, list[float]] = {label: [] for label in contenders}
    for _ in range(repeats):
        for label, contender in contenders.items():
            key = getattr(contender.build, "keywords", contender.build)
            model = models.setdefault(str(key), setting.build(contender))
            batches = setting.batches(contender.images)
            _wait(setting.device)
            start = time.perf_counter()
            counted = contender.run(model, batches)
            _wait(setting.device)
            seconds = counted or time.perf_counter() - start
            times[label].append(seconds / sum(map(len, batches)))
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Apart:
    """What a contender took in a process of its own: what others leave of memory makes it slower, or faster.

    Attributes:
        seconds: per image.
        plain: seconds per image of plain passes in turn with it, in the same process.
        peak: of memory in bytes, see :func:`peak_memory`.
    """

    seconds: list[float]
    plain: list[float]
    peak: int


def apart(setting: Setting, label: str, repeats: int) -> Apart:
    """Measure a contender in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_apart, (setting, label, repeats))


def _apart(setting: Setting, label: str, repeats: int) -> Apart:
    contenders = chosen(setting.model)
    peak = _peak(setting, label, contenders[label].images)  # this is the rehearsal
    times = seconds_per_image(setting, {name: contenders[name] for name in (PLAIN, label)}, repeats)
    return Apart(times[label], times[PLAIN], peak)


def peak_memory(setting: Setting, label: str, limit: int | None) -> int:
    """Peak memory in bytes for so many images at most, in a process of its own: of the resident set on the CPU (Linux:
    VmHWM), of the allocator on a GPU."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (setting, label, limit))


def _peak(setting: Setting, label: str, limit: int | None) -> int:
    torch.set_num_threads(setting.threads)
    contender = chosen(setting.model)[label]
    model, batches = setting.build(contender), setting.batches(limit)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    contender.run(model, batches)
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def largest_error(setting: Setting, heads: int = 2) -> float:
    """Largest difference of M by head, tiled, from a float64 reference on the same queries and keys, over the first
    image and its first heads. Weights are moved away from their initial values: near-uniform maps hide errors."""
    model = timm_model(setting.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 3 * parameter.std()
    model = model.to(setting.device, getattr(torch, setting.dtype))
    with torch.inference_mode(), capture(model) as captured:
        model(setting.batches(1)[0][:1])
    metric = CrossLayerSimilarity().to(setting.device)
    metric.update(captured.maps)
    found = metric.compute()["similarity_by_head"].cpu()
    worst = 0.0
    for head in range(heads):
        unit = torch.stack([_unit_columns(item, head) for item in captured.maps.values()])  # [L, K, Q]
        reference = torch.einsum("pkq,rkq->pr", unit, unit) / unit.shape[1]
        worst = max(worst, float((found[:, :, head] - reference).abs().max()))
    return worst


def _unit_columns(item: object, head: int) -> Tensor:
    """Columns of one head of the first image as unit vectors, `[K, Q]`, in float64 from queries and keys."""
    source, mix = item.source, item.mix  # type: ignore[attr-defined]
    logits = source.q[0].double() @ source.k[0].double().mT * source.scale if mix is not None else None
    if logits is None:
        maps = (source.q[0, head].double() @ source.k[0, head].double().mT * source.scale).softmax(-1)
    else:
        weights = mix.weight[head].double()
        maps = torch.einsum("h,hqk->qk", weights, logits.softmax(-1)) + mix.bias.double()[head]
    columns = maps.mT.cpu()
    return columns / columns.norm(dim=-1, keepdim=True)


def least(setting: Setting) -> Floors | None:
    """What M of one image cannot do without; None where maps are not all of the same queries and keys."""
    model = setting.build(chosen(setting.model)[PLAIN])
    with torch.inference_mode(), capture(model) as captured:
        model(setting.batches(1)[0])
    shapes = {_shape(item) for item in captured.maps.values()}
    if len(shapes) != 1 or (shape := shapes.pop()) is None:
        return None
    heads, queries, keys, dim, element_bytes = shape
    return floors(len(captured.maps), heads, queries, keys, dim, element_bytes)


def _shape(item: AttentionMap) -> tuple[int, int, int, int, int] | None:
    source = item.source
    if not isinstance(source, QueryKey) or item.mix is not None:
        return None
    heads, queries, dim = source.q.shape[-3:]
    return heads, queries, source.k.shape[-2], dim, source.q.element_size()


def speeds(setting: Setting) -> tuple[float, float]:
    """Bytes per second of reading, and operations per second of a large matrix product, as PyTorch does them here."""
    dtype = getattr(torch, setting.dtype)
    size = 8192 if setting.device == "cuda" else 2048
    matrix = torch.randn(size, size, device=setting.device, dtype=dtype)
    block = torch.ones(1 << 28, device=setting.device)  # 1 GiB, more than any cache holds
    return block.nbytes / _shortest(block.sum, setting.device), 2 * size**3 / _shortest(
        lambda: matrix @ matrix, setting.device
    )


def _shortest(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def in_words(seconds: list[float]) -> tuple[float, str]:
    """The median in milliseconds, and the spread."""
    milli = sorted(1000 * value for value in seconds)
    return statistics.median(milli), f"{milli[0]:.1f}..{milli[-1]:.1f}"
