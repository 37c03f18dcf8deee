"""Models compared on the same images: the pipeline behind :func:`collapse_probe.compare`.

The images are dealt out to groups. Every model sees a group before the next one comes, and leaves sums of it; readings
of all groups together, and of all but one, give differences with errors that know how models agree image by image.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import collapse_probe.models  # registers the bundled architectures with timm before any is loaded
from collapse_probe import differences
from collapse_probe.across_models import AcrossModels, Remembered
from collapse_probe.analysis import DEFAULT_SAMPLES, borrowed, check_options, measure
from collapse_probe.comparison import MOST, Comparison, check, distinct
from collapse_probe.errors import CollapseProbeError, UsageError
from collapse_probe.loading import load_model
from collapse_probe.loading.folder import list_images
from collapse_probe.merging import merge, readings
from collapse_probe.networks import device_of, drawn_from
from collapse_probe.partial import Partial
from collapse_probe.progress import own_bar
from collapse_probe.result import Analysis
from collapse_probe.shards import UNIT, Shard
from collapse_probe.streaming import Progress

#: Groups of images that errors come from, where there are enough images.
GROUPS = 16

#: Arguments of :func:`load_model` that are about files of weights, about bare names, and about both.
_OF_FILES = ("arch", "use_ema", "key", "num_heads")
_OF_NAMES = ("pretrained",)
_LOADING = (*_OF_FILES, *_OF_NAMES, "allow_bad_weights", "model_kwargs", "img_size")

Source = nn.Module | str | Path | Analysis


def compare(
    models: Mapping[str, Source] | Sequence[Source],
    images: str | Path | Tensor | None = None,
    *,
    groups: int = GROUPS,
    progress: Progress | bool = False,
    **settings: Any,
) -> Comparison:
    """What sets models apart: their readings at comparable depths, and their layers beside each other.

    Args:
        models: two to four, by label or in a row: modules, timm names or paths as for
            :func:`collapse_probe.analyze`; the first is what the others are compared with. Or saved analyses only
            (:class:`~collapse_probe.result.Analysis`, or the folders that hold them): then nothing is run, and images
            are not paired.
        images: a folder or a tensor that suits all models, in each one's own preprocessing; by default the
            bundled ones.
        groups: into how many groups of eight images or more the images are dealt out for the errors, 4 to 1000; fewer
            where there are fewer images.
        progress: as of :func:`collapse_probe.analyze`.
        settings: further arguments of :func:`collapse_probe.analyze`, the same for all models; those about weights
            (`arch`, `use_ema`, `key`, `num_heads`) for those that are files, `pretrained` for those that are names.

    Returns:
        The :class:`~collapse_probe.comparison.Comparison`.

    Raises:
        UsageError: not two to four models, analyses and models together, images that cannot be dealt out, or an
            argument out of range.
        CollapseProbeError: as :func:`collapse_probe.analyze`; the message names the model.
    """
    named = labelled(models)
    saved = {label: _saved(source) for label, source in named.items()}
    if all(saved.values()):
        return Comparison.of_saved({label: item for label, item in saved.items() if item is not None})
    if any(saved.values()):
        some = next(label for label, item in saved.items() if item is not None)
        raise UsageError(
            f"{some!r} is a saved analysis and others are models: compare models with models, on the same images, or "
            "saved analyses with saved analyses."
        )
    if isinstance(groups, bool) or not isinstance(groups, int) or not differences.FEWEST_GROUPS <= groups <= 1000:
        raise UsageError(f"groups must be a whole number from {differences.FEWEST_GROUPS} to 1000; got {groups!r}.")
    if not (images is None or isinstance(images, (str, Path, Tensor))):
        raise UsageError(
            f"images must be a folder or a tensor, which can be dealt out to groups; got a {type(images).__name__}."
        )
    own = own_bar() if progress is True else None
    with own or nullcontext():
        return _measured(named, images, groups, own or (None if isinstance(progress, bool) else progress), settings)


def labelled(models: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """The models by label: those given, or made of names, paths and classes, numbered where they are the same."""
    if isinstance(models, Mapping):
        named = dict(models)
    elif isinstance(models, Iterable) and not isinstance(models, (str, Path, nn.Module)):
        sources = list(models)
        named = dict(zip(distinct([short_name(source) for source in sources]), sources, strict=True))
    else:
        raise UsageError(f"models must be several models; got a {type(models).__name__}.")
    if not 2 <= len(named) <= MOST:
        raise UsageError(f"Between 2 and {MOST} models can be compared, not {len(named)}.")
    return named


def short_name(source: Source) -> str:
    """What a model is called where nobody named it."""
    if isinstance(source, Analysis):
        return str(source.provenance.get("model", {}).get("architecture", "model"))
    if isinstance(source, nn.Module):
        return type(source).__name__
    path = Path(source)
    return (path.stem if path.is_file() else path.name) or str(source)


def _saved(source: Source) -> Analysis | None:
    if isinstance(source, Analysis):
        return source
    if isinstance(source, (str, Path)) and (Path(source) / "analysis.json").is_file():
        return Analysis.load(source)
    return None


@dataclass
class _Model:
    """One of the models: what it is, and the sums that it left, group by group."""

    label: str
    network: nn.Module
    device: str
    parts: list[Partial] = field(default_factory=list)


def _measured(
    named: Mapping[str, Source],
    images: str | Path | Tensor | None,
    groups: int,
    bar: Progress | None,
    settings: dict[str, Any],
) -> Comparison:
    """Group by group, model by model; what two models left of a group is compared while both remember it."""
    loading = {name: settings.pop(name) for name in _LOADING if settings.get(name) is not None}
    if "img_size" in loading:
        settings["img_size"] = loading["img_size"]
    check_options(**settings)  # before anything is loaded
    device = settings.pop("device", "auto")
    with drawn_from(settings.get("seed", 0)):
        models = [_loaded(label, source, loading, device) for label, source in named.items()]
    if images is None:
        images = collapse_probe.models.bundled_images()
        for advice in dict.fromkeys(filter(None, (borrowed(source, True) for source in named.values()))):
            warnings.warn(advice, stacklevel=4)
    count = max(1, min(groups, -(-_number_of_images(images, settings.get("num_samples")) // UNIT)))
    across: list[AcrossModels] = []
    for number in range(count):
        seen = []
        for place, model in enumerate(models):
            seen.append(Remembered())
            share = None if bar is None else _Share(bar, number * len(models) + place, count * len(models))
            model.parts.append(
                measure(
                    model.network,
                    images,
                    shard=Shard(number + 1, count),
                    watch=seen[-1],
                    device=model.device,
                    progress=share or False,
                    **settings,
                )
            )
        if not across:
            across = [
                AcrossModels(models[0].label, other.label, _other_pixels(models[0], other)) for other in models[1:]
            ]
        for pair, watch in zip(across, seen[1:], strict=True):
            pair.add(seen[0], watch)
    return _compared(models, across)


def _loaded(label: str, source: Source, loading: Mapping[str, Any], device: str) -> _Model:
    """The model itself; what goes wrong with one of several is said with its label."""
    if isinstance(source, nn.Module):
        return _Model(label, source, device)
    assert isinstance(source, (str, Path))
    others = _OF_NAMES if Path(source).exists() else _OF_FILES
    own = {name: value for name, value in loading.items() if name not in others}
    try:
        return _Model(label, load_model(source, **own), str(device_of(device, None)))
    except CollapseProbeError as error:
        error.args = (f"{label}: {error}",)
        raise


def _number_of_images(images: str | Path | Tensor, num_samples: int | None) -> int:
    """How many are there to be dealt out, whether they can be read or not."""
    if isinstance(images, Tensor):
        return min(len(images), num_samples or len(images))
    return min(len(list_images(Path(images))[0]), num_samples or DEFAULT_SAMPLES)


def _other_pixels(first: _Model, second: _Model) -> str:
    """Why two models do not see the same pixels of an image; empty where they do, up to their normalisation."""
    own, other = (model.parts[0].provenance["images"]["preprocessing"] for model in (first, second))
    if not isinstance(own, Mapping) or not isinstance(other, Mapping):
        return ""  # a tensor is the same for all
    differs = [
        name for name in ("input_size", "crop_pct", "crop_mode", "interpolation") if own.get(name) != other.get(name)
    ]
    if not differs:
        return ""
    words = ", ".join(f"{name} {own.get(name)} and {other.get(name)}" for name in differs)
    return f"they see other pixels of an image ({words})"


def _compared(models: list[_Model], across: list[AcrossModels]) -> Comparison:
    held = [number for number, part in enumerate(models[0].parts) if part.images]
    analyses = {model.label: _merged(model) for model in models}
    check(analyses)
    notes = []
    if len({analysis.provenance["images"]["count"] for analysis in analyses.values()}) > 1:
        notes.append("Not all images could be read for every model.")
    if len(held) < differences.FEWEST_GROUPS:
        notes.append(
            f"No errors of differences: images are paired in groups of {UNIT}, and errors need "
            f"{differences.FEWEST_GROUPS} groups or more."
        )
    without = {
        model.label: [
            readings(part for at, part in enumerate(model.parts) if at != left and part.images) for left in held
        ]
        for model in models
        if len(held) >= differences.FEWEST_GROUPS
    }
    first, *others = models
    tables = {
        other.label: differences.paired(
            analyses[first.label],
            analyses[other.label],
            list(zip(without.get(first.label, []), without.get(other.label, []), strict=True)),
        )
        for other in others
    }
    return Comparison(analyses, tables, [pair.result() for pair in across], True, len(held), notes)


def _merged(model: _Model) -> Analysis:
    """Its analysis; that the images came in groups is nothing that its provenance needs to know."""
    analysis = merge(model.parts)
    analysis.provenance["seconds"] = round(sum(part.provenance["seconds"] for part in model.parts), 2)
    analysis.provenance.pop("shards", None)
    return analysis


class _Share:
    """Progress of one of several equal parts of the work."""

    def __init__(self, progress: Progress, number: int, count: int) -> None:
        self._progress, self._number, self._count = progress, number, count

    def __call__(self, done: int, total: int | None) -> None:
        if total:
            self._progress(self._number * total + done, self._count * total)

    def note(self, text: str) -> None:
        self._progress.note(text)
