"""The pipeline: a model and images in, an :class:`Analysis` out. The one module that knows every room.

An analysis has two halves. Measuring needs the model and the images and leaves sums; merging turns the sums of all
shards, of which there may be one, into readings and a verdict, and needs neither.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import collapse_probe.models as bundled_models  # registers the bundled architectures with timm before any is loaded
from collapse_probe.errors import DamagedFileError, ResourceError, UsageError, is_out_of_memory
from collapse_probe.fingerprint import images_fingerprint, weights_fingerprint
from collapse_probe.loading import (
    Batch,
    ImageSource,
    check_skipped,
    data_config,
    labels_of,
    matches_model,
    open_images,
)
from collapse_probe.loading.soundness import constant_matrices, non_finite
from collapse_probe.merging import merge, merge_one_by_one
from collapse_probe.metrics.suite import choose
from collapse_probe.networks import device_of, open_model, prepared
from collapse_probe.options import Options, check_preprocessing
from collapse_probe.partial import Partial, check_shards, is_same_shard
from collapse_probe.processors import automatic_workers
from collapse_probe.progress import own_bar
from collapse_probe.ranks import ranks
from collapse_probe.ratio import SIMILAR
from collapse_probe.result import Analysis
from collapse_probe.resuming import Keeper
from collapse_probe.shards import WHOLE, Shard
from collapse_probe.shortage import lost_worker, out_of_memory
from collapse_probe.skipping import SKIPPED_ALLOWED
from collapse_probe.streaming import Progress, Run, StartOver, Watch
from collapse_probe.weights import untouched_norms, unused_heads

#: Without a number of samples, at most this many images of a folder are looked at: errors are below 0.01 long before.
DEFAULT_SAMPLES = 1000


def analyze(
    model: nn.Module | str | Path | None = None,
    images: str | Path | Tensor | Iterable[Any] | None = None,
    *,
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    use_ema: bool = False,
    key: str | None = None,
    num_heads: int | None = None,
    allow_bad_weights: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    num_samples: int | None = None,
    max_skipped: float = SKIPPED_ALLOWED,
    device: str = "auto",
    amp: bool = False,
    amp_dtype: str = "bfloat16",
    seed: int = 0,
    layers: Sequence[str] | str = (),
    attention: str = "applied",
    until_se: float | None = None,
    threshold: float = SIMILAR,
    nearest: int = 1,
    tile_bytes: int | None = None,
    verify: bool = False,
    metrics: str = "fast",
    distributed: bool = False,
    partial: str | Path | Keeper | None = None,
    resume: bool = False,
    progress: Progress | bool = False,
) -> Analysis:
    """Where does attention collapse in this model?

    Args:
        model: an `nn.Module`, a timm name (its pretrained weights), or a path to weights (a file or a folder). Without
            it, the bundled ``digits_vit_24b``.
        images: a folder (flat or nested), a tensor `[N, C, H, W]` already preprocessed, or a `DataLoader`. Without it,
            the bundled pictures of digits, with a warning: readings on the model's own kind of images will differ.
        arch: timm's name of the architecture that the weights belong to, where neither the file nor its keys and shapes
            say.
        checkpoint: weights for a model given by name.
        pretrained: whether a bare name means its pretrained weights; False asks for a random network.
        use_ema: take the exponential moving average of the weights where a checkpoint holds both.
        key: take the weights under this key of a checkpoint, for example ``"student"``.
        num_heads: heads of each block of a weights file; weights rarely show their number.
        allow_bad_weights: analyse weights with NaN, infinities or matrices of one number; a finding names them.
        model_kwargs: passed to `timm.create_model`.
        img_size, mean, std, crop_pct, interpolation: override the model's own preprocessing.
        batch_size: images in a forward pass. Results do not depend on it, except where `until_se` ends the run.
        workers: processes that decode the images of a folder; 0 decodes in this one. None chooses, up to 8: beside a
            GPU one for each core but one, on a CPU one for every four cores; fewer where shared memory is short, and
            none where processes do not start as forks (Windows, macOS, Python 3.14). Results do not depend on it.
        num_samples: how many images to look at; by default all, of a folder at most 1000, chosen by `seed`.
        max_skipped: share of all images that may be unreadable, 0 to 1, before the analysis stops.
        device: ``"auto"``, or what `torch.device` accepts. A module stays where it is under ``"auto"``.
        amp, amp_dtype: run the model under autocast in ``"bfloat16"`` or ``"float16"``; metrics stay in float32.
        seed: chooses the images of a folder and their order, and draws a random network's weights.
        layers: shell-style patterns; only layers whose name matches one are analysed.
        attention: ``"applied"`` (what multiplied the values) or ``"softmax"`` (the map underneath re-attention).
        until_se: stop after the first batch (and at least 16 images) at which the standard error of every neighbouring
            similarity is at most this.
        threshold: mean M above which neighbouring blocks are called similar, and M above which a column counts into
            the similarity ratio.
        nearest: with how many blocks before and after each block is compared for its similarity ratio.
        tile_bytes: aimed-at size of the attention columns in memory at once. Results do not depend on it.
        verify: check on the first batch that every map times its values is what the model computed and that no softmax
            was overlooked; the outcome stands in the provenance, and a map that does not agree is left out.
        metrics: ``"fast"``, ``"all"``, or names separated by commas (`collapse_probe.metrics.suite`).
        distributed: share the images among the processes that `torchrun` started; every one returns the whole analysis.
        partial: a folder in which the run keeps what it has measured, about every minute and when it is interrupted;
            removed at the end. After an interruption it also holds the analysis of the images so far, whose
            ``provenance["complete"]`` is False.
        resume: go on from what `partial` holds, if it holds anything. Weights, images, options and versions must be the
            same; a loader is iterated up to where the run was, and taken to deliver the same images in the same order.
        progress: True for a progress bar on stderr, or an object to report to (see :class:`Progress`).

    Returns:
        The :class:`Analysis`.

    Raises:
        UsageError: an argument is out of range or contradicts another, or what is to be resumed is another run.
        ModelError: the model source was rejected, or no attention map could be captured.
        ImagesError: no usable images, or more than `max_skipped` of them could not be read.
        ResourceError: out of memory with one image at a time.
        KeyboardInterrupt: as it came, once `partial` holds what was measured.
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "images", "distributed")}
    keeper = given["partial"] = _keeper(partial, resume)
    if not distributed:
        analysis = merge([measure(model, images, **given)])
    else:
        with ranks() as team:
            given["partial"] = None if keeper is None else keeper.of_rank(team.rank, team.size)
            own = team.together(lambda: measure(model, images, shard=team.shard, **given))
            headers = check_shards(team.exchanged(own.header()))
            analysis = merge_one_by_one(headers, team.with_sums(own, headers))
            if keeper is not None:
                team.wait()  # for all, before what they go on from is removed
    if keeper is not None and keeper is not partial:
        keeper.discard()
    return analysis


def measure(
    model: nn.Module | str | Path | None = None,
    images: str | Path | Tensor | Iterable[Any] | None = None,
    *,
    shard: Shard | str = "1/1",
    finished: Partial | None = None,
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    use_ema: bool = False,
    key: str | None = None,
    num_heads: int | None = None,
    allow_bad_weights: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    partial: str | Path | Keeper | None = None,
    resume: bool = False,
    progress: Progress | bool = False,
    watch: Watch | None = None,
    **settings: Any,
) -> Partial:
    """The first half of :func:`analyze`: the sums over the images of one shard.

    Shards are measured by processes that know nothing of each other, on one machine or many, and merged with
    :func:`~collapse_probe.merging.merge`. Images are dealt out by their place in the order of all images, 8 by 8.

    Args:
        shard: which, for example ``"2/4"``.
        finished: what an earlier call left. Where it is this very shard of the same run (weights, images and options
            are compared), it is returned, and nothing is measured.
        model, images, arch, checkpoint, pretrained, use_ema, key, num_heads, allow_bad_weights, model_kwargs, \
img_size, mean, std, crop_pct, interpolation, partial, resume, progress, settings: as those of :func:`analyze`; the same
            for all shards.
        watch: looks on, see :class:`~collapse_probe.streaming.Watch`.

    Returns:
        The :class:`Partial`; save it with `save(folder)`.

    Raises:
        CollapseProbeError: as :func:`analyze`.
    """
    options = _options(shard if isinstance(shard, Shard) else Shard.parse(shard), **settings)
    check_preprocessing(img_size, mean, std, crop_pct, interpolation)
    started = time.perf_counter()
    bundled = images is None
    if images is None:
        images = bundled_models.bundled_images()
    advice = borrowed(model, bundled)
    if model is None:
        model = bundled_models.bundled_weights()
    given = isinstance(model, nn.Module)
    network = open_model(
        model, arch=arch, checkpoint=checkpoint, pretrained=pretrained, use_ema=use_ema, key=key, num_heads=num_heads,
        allow_bad_weights=allow_bad_weights, model_kwargs=model_kwargs, img_size=img_size, seed=options.seed,
    )  # fmt: skip
    if advice is not None:  # not before a file that is refused: it would only stand in the way of the refusal
        warnings.warn(advice, stacklevel=3)
    target = device_of(options.device, network if given else None)
    config: dict[str, Any] = {}
    if hasattr(network, "pretrained_cfg") or isinstance(images, (str, Path)):
        config = data_config(
            network, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation, img_size=img_size
        )
    source = open_images(
        images, config=config, batch_size=options.batch_size, workers=_workers(options, target, config),
        num_samples=samples_of(images, options.num_samples), seed=options.seed, shard=options.shard,
        pin_memory=target.type == "cuda",
    )  # fmt: skip
    fits = matches_model(network, config, img_size) if source.kind == "folder" else "done by the caller"
    described: dict[str, Any] = {
        "model": getattr(network, "provenance", None) or {"architecture": type(network).__name__, "source": "module"},
        "images": source.describe() | {"total": source.total, "bundled": bundled, "matches_model": fits},
        "device": _device_name(target),
        "precision": _precision(network, options),
        "versions": _versions(),
    }
    keeper = _keeper(partial, resume)
    if options.shard.count > 1 or keeper is not None:
        fingerprint = {"weights": weights_fingerprint(network), "images": images_fingerprint(source, images)}
        described["fingerprint"] = fingerprint
        planned = Partial(options.shard, 0, options.described(), provenance=described)
        if finished is not None and is_same_shard(finished, planned):
            return finished
    own = own_bar() if progress is True else None
    bar = own or (None if isinstance(progress, bool) else progress)
    job = _Pass(network, source, options, target, described, bar, keeper, started, watch)
    with own or nullcontext():
        measured = job.done()
    if keeper is not None and keeper is not partial:
        keeper.discard()
    return measured


def check_options(**given: Any) -> None:
    """Raises UsageError for options of :func:`analyze` that no model could be analysed with."""
    settings = {name: given[name] for name in given if name in Options.__dataclass_fields__}
    options = _options(WHOLE, **settings)
    preprocessing = ("img_size", "mean", "std", "crop_pct", "interpolation")
    check_preprocessing(**{name: given[name] for name in preprocessing if name in given})
    choose(options.metrics)
    device_of(options.device, None)


def _options(shard: Shard, **settings: Any) -> Options:
    layers = settings.pop("layers", ())
    if not isinstance(layers, Iterable):
        raise UsageError(f"layers must be patterns of names; got {layers!r}.")
    options = Options(**settings, layers=(layers,) if isinstance(layers, str) else tuple(layers), shard=shard)
    options.check()
    return options


def _keeper(partial: str | Path | Keeper | None, resume: bool) -> Keeper | None:
    if partial is None and resume:
        raise UsageError("resume=True needs partial, the folder in which the interrupted run kept its state.")
    return partial if partial is None or isinstance(partial, Keeper) else Keeper(partial, resume)


@dataclass
class _Pass:
    """One pass of a model over images, from wherever an earlier one was interrupted.

    Attributes:
        network, source, options, target, progress: what runs on which images, how, where, and who is told.
        described: the provenance, as far as it is known before.
        keeper: where the state is saved, if anywhere.
        started: when this began, by `time.perf_counter`.
        watch: looks on, if anyone does.
    """

    network: nn.Module
    source: ImageSource
    options: Options
    target: torch.device
    described: dict[str, Any]
    progress: Progress | None
    keeper: Keeper | None
    started: float
    watch: Watch | None = None

    def done(self) -> Partial:
        """What was summed when all images were seen."""
        saved = self._begin()
        limit = None
        while True:
            find = functools.partial(labels_of, self.source, self.network)
            run = Run(self.options, self.target, self.progress, self.source.count, find, limit, self.watch)
            if saved is not None:
                _restore(run, saved)
            try:
                self._through(run, saved)
                break
            except StartOver as shortage:
                limit = shortage.limit
            if not self.source.repeatable:
                raise ResourceError(
                    "Out of memory, and these images cannot be had again: give a DataLoader or a list instead of an "
                    f"iterator, or batches of at most {limit} images."
                )
            saved = None if self.keeper is None else self.keeper.latest()
        if self.keeper is not None:  # whoever goes on from here still has to write the results
            self.keeper.save(lambda: self._state(run), self._note)
        return self._described(run, run.partial())

    def _begin(self) -> Partial | None:
        """What an earlier run has left, if this one is to go on from it."""
        if self.keeper is None:
            return None
        planned = Partial(self.options.shard, 0, self.options.described(), provenance=self.described)
        saved = self.keeper.begin(planned, self._note)
        if saved is not None:
            self.started -= saved.provenance["seconds"]
            self.source.skipped = list(saved.provenance["images"]["skipped"])
        return saved

    def _through(self, run: Run, saved: Partial | None) -> None:
        def after_batch() -> None:
            if self.keeper is not None and self.keeper.due:
                self.keeper.save(lambda: self._state(run), self._note)

        try:
            with (
                _memory(self.target, run),
                prepared(self.network, self.target),
                closing(_readable(self.source, saved, self.options.max_skipped)) as batches,
            ):
                run.through(self.network, batches, after_batch)
        except (KeyboardInterrupt, SystemExit):
            if self.keeper is not None and run.fed:
                self.keeper.interrupted(lambda: self._state(run), self.source.count, self._note)
            raise

    def _note(self, text: str) -> None:
        if self.progress is not None:
            self.progress.note(text)

    def _state(self, run: Run) -> Partial:
        return self._described(run, run.state())

    def _described(self, run: Run, partial: Partial) -> Partial:
        """With where it comes from; of skipped files with those up to the last image in its sums, if it may go on."""
        skipped = list(self.source.skipped) if run.done else self.source.skipped_before(run.position)
        partial.provenance = {
            **self.described,
            "images": self.described["images"] | {"count": partial.images, "skipped": skipped, **run.top1.described()},
            "seconds": round(time.perf_counter() - self.started, 2),
            "normalisation": untouched_norms(self.network),
            "non_finite_weights": non_finite(self.network.state_dict()),
            "constant_weights": constant_matrices(self.network.state_dict()),
            "mixed_after_softmax": run.mixed,
            "unused_heads": unused_heads(self.network, run.heads()),
        }
        if run.verification is not None:
            partial.provenance["verification"] = run.verification.to_dict()
        if run.limit is not None:
            partial.provenance["batch_size_used"] = run.limit
        return partial


def _restore(run: Run, saved: Partial) -> None:
    """Raises DamagedFileError where a state is not what this version writes, though no byte of it has changed."""
    try:
        run.restore(saved)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f"The state of the interrupted run is not one that this version of collapse_probe writes "
            f"({type(error).__name__}: {error!s:.100}). Start over without --resume."
        ) from error


@contextmanager
def _memory(device: torch.device, run: Run) -> Iterator[None]:
    """A shortage that smaller batches would not mend: the model, its metrics or a batch of images do not fit, or there
    was no memory for a process that decodes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (lost := lost_worker(error)) is not None:
            raise lost from error
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, device, run.fed) from error


def borrowed(model: object, bundled: bool) -> str | None:
    """What to say where a model or images were not given and bundled ones stand in."""
    if model is None and not bundled:
        return "No model given: analysing the bundled ViT for 8x8 pictures of digits."
    if model is None or not bundled or model in bundled_models.BUNDLED:
        return None
    return (
        "No images given: measuring on the bundled pictures of digits. Readings on the model's own kind of images will "
        "differ; give a folder of them with --images."
    )


def _readable(source: ImageSource, saved: Partial | None, max_skipped: float) -> Generator[Batch, None, None]:
    """The batches from where an earlier pass was, until too many images turn out to be unreadable: then at once, not
    when all work is done."""
    earlier = () if saved is None else (saved.state["position"], saved.images, saved.provenance["images"]["skipped"])
    with closing(source.batches(*earlier)) as batches:
        for batch in batches:
            check_skipped(source, max_skipped)
            yield batch
    check_skipped(source, max_skipped)  # the last files may have filled no batch


def _workers(options: Options, device: torch.device, config: Mapping[str, Any]) -> int:
    """As many as were asked for, or what suits the machine."""
    if options.workers is not None:
        return options.workers
    size = config.get("input_size", ())  # without it there is nothing to decode
    return automatic_workers(device, 4 * options.batch_size * math.prod(size))


def samples_of(images: Any, num_samples: int | None) -> int | None:
    """How many images of a source are looked at, where the caller names a number or none."""
    if num_samples is None and isinstance(images, (str, Path)):
        return DEFAULT_SAMPLES
    return num_samples


def _precision(model: nn.Module, options: Options) -> str:
    """What the model computes in; weights of half precision in a file were made float32 when they were loaded."""
    dtype = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
    return str(dtype).removeprefix("torch.") + (f", autocast to {options.amp_dtype}" if options.amp else "")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    names = ("collapse-probe", "torch", "timm", "torchmetrics", "numpy")
    return {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()}
