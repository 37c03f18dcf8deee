"""What can be asked about attention in a model, by collapse_probe and by what people use instead."""

from __future__ import annotations

import contextlib
import io
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import timm
import torch
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader

import collapse_probe.models  # noqa: F401 - registers DeepViT
from collapse_probe.allocator import kept_memory
from collapse_probe.capture import capture
from collapse_probe.loading import Batch
from collapse_probe.merging import readings
from collapse_probe.metrics.cross_layer import PAIRED_BLOCKS
from collapse_probe.metrics.tiles import BLOCK
from collapse_probe.options import Options
from collapse_probe.streaming import Run

Batches = list[Tensor]


def plain(model: nn.Module, batches: Batches) -> None:
    """The forward pass alone, fused attention on."""
    with torch.inference_mode():
        for batch in batches:
            model(batch)


def capture_only(model: nn.Module, batches: Batches) -> float:
    """Queries and keys are kept, as an analysis keeps them, and nothing is computed from them; as in :func:`suite`,
    a batch goes before those that count."""
    with torch.no_grad(), kept_memory():
        begun = 0.0
        for number, batch in enumerate([batches[0], *batches]):
            if number == 1:
                begun = time.perf_counter()
            with capture(model):
                model(batch)
        if batches[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def whole_suite(metrics: str, model: nn.Module, batches: Batches) -> None:
    """An analysis with these metrics, from tensors to readings."""
    run = Run(Options(metrics=metrics), batches[0].device, None, None)
    starts = itertools.accumulate((len(batch) for batch in batches), initial=0)
    run.through(model, (_numbered(batch, start) for batch, start in zip(batches, starts, strict=False)))
    readings([run.partial()])


def suite(
    metrics: str,
    model: nn.Module,
    batches: Batches,
    watched: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> float:
    """The batches as later ones of an analysis with these metrics; returns the seconds that they took.

    Not counted is what happens once, however many images follow: the first images, on which the model is checked, which
    are all compared with each other and for which memory is fetched from the system, and readings from sums. The
    last batch runs within `watched()`.
    """
    run = Run(Options(metrics=metrics), batches[0].device, None, None)
    begun = 0.0

    def numbered() -> Iterator[Batch]:
        nonlocal begun
        yield _numbered(batches[0], 0)
        if batches[0].is_cuda:
            torch.cuda.synchronize()
        begun, start = time.perf_counter(), BLOCK * PAIRED_BLOCKS
        *early, last = batches
        for batch in early:
            yield _numbered(batch, start)
            start += len(batch)
        with watched():
            yield _numbered(last, start)

    run.through(model, numbered())
    if batches[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _numbered(images: Tensor, start: int) -> Batch:
    return Batch(images, torch.arange(start, start + len(images)))


def extracted(model: nn.Module, batches: Batches) -> None:
    """timm's `AttentionExtract` on an unfused model, then `F.cosine_similarity` of all pairs of layers (mean M)."""
    extract = AttentionExtract(model, method="hook")
    total = torch.zeros((), device=batches[0].device)
    with torch.inference_mode():
        for batch in batches:
            maps = list(extract(batch).values())
            for one, other in itertools.product(maps, maps):
                total += cosine_similarity(one, other, dim=-2).mean()
    _unhook(model)


def _unhook(model: nn.Module) -> None:
    """Neither timm's nor torch-cka's hooks go when they have done their work; the model is used by others after."""
    for module in model.modules():
        module._forward_hooks.clear()


def hugging_face(model: nn.Module, batches: Batches) -> None:
    """Hugging Face's `output_attentions=True`, then loops over layers, heads and tokens in NumPy."""
    with torch.inference_mode():
        for batch in batches:
            maps = np.stack([item.numpy() for item in model(batch, output_attentions=True).attentions])
            layers, images, heads, _, tokens = maps.shape
            for b, p, q, h, t in itertools.product(
                range(images), range(layers), range(layers), range(heads), range(tokens)
            ):
                one, other = maps[p, b, h, :, t], maps[q, b, h, :, t]
                np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other))


def torch_cka(model: nn.Module, batches: Batches) -> None:
    """The package torch-cka (CKA over minibatches) over all pairs of blocks."""
    from torch_cka import CKA

    names = [name for name, _ in model.named_modules() if name.startswith("blocks.") and name.count(".") == 1]
    loader = DataLoader([(image, 0) for image in torch.cat(batches)], batch_size=len(batches[0]))
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # it draws a progress bar
        warnings.simplefilter("ignore")
        device = str(batches[0].device)
        CKA(model, model, model1_layers=names, model2_layers=names, device=device).compare(loader)
    _unhook(model)


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Attributes:
        run: takes a model and batches; returns the seconds that count, or None where all do.
        build: makes the model it needs of an architecture's name.
        only: names of models on which it ends in reasonable time; all where empty.
        without: names of models on which it does not.
        images: how many images it gets at most, where a share of them must do.
        needs: packages without which it is left out.
    """

    run: Callable[[Any, Batches], float | None]
    build: Callable[[str], nn.Module]
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    images: int | None = None
    needs: tuple[str, ...] = ()


def timm_model(name: str, fused: bool = True) -> nn.Module:
    """A model with random weights: speed does not depend on them. `name@512` is built for images of 512 pixels."""
    name, _, size = name.partition("@")
    torch.manual_seed(0)
    timm.layers.set_fused_attn(fused)
    try:
        return timm.create_model(name, **({"img_size": int(size)} if size else {})).eval()
    finally:
        timm.layers.set_fused_attn(True)


def hugging_face_tiny(_: str) -> nn.Module:
    """ViT-Ti as Hugging Face builds it."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTModel(ViTConfig(**sizes, attn_implementation="eager")).eval()


TINY = "vit_tiny_patch16_224"
LONG = ("vit_base_patch16_224@1024",)
DEEP = ("deepvit_32b", "deepvit_vit_32b")
LARGE = (*LONG, "vit_large_patch14_reg4_dinov2")

PLAIN = "plain fused forward"
CONTENDERS: dict[str, Contender] = {
    PLAIN: Contender(plain, timm_model),
    "capture only": Contender(capture_only, timm_model),
    "M and its parts": Contender(partial(suite, "cross_layer_similarity"), timm_model),
    "suite fast": Contender(partial(suite, "fast"), timm_model),
    "suite all": Contender(partial(suite, "all"), timm_model, without=(*LARGE, *DEEP)),
    "CKA": Contender(partial(suite, "cka"), timm_model, only=(TINY,)),
    "timm AttentionExtract, pairwise cosine": Contender(
        extracted, partial(timm_model, fused=False), without=LONG, images=1
    ),
    "Hugging Face attentions, NumPy loops": Contender(
        hugging_face, hugging_face_tiny, only=(TINY,), images=1, needs=("transformers",)
    ),
    "torch-cka": Contender(torch_cka, timm_model, only=(TINY,), needs=("torch_cka",)),
}


def chosen(model: str) -> dict[str, Contender]:
    """The contenders that run on a model."""
    return {
        label: item
        for label, item in CONTENDERS.items()
        if model not in item.without and (not item.only or model in item.only) and all(map(find_spec, item.needs))
    }
