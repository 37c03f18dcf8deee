"""Whether an analysis can be compared with an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collapse_probe.errors import UsageError
from collapse_probe.result import Analysis

#: Columns of the layers table that say what a layer is: other sizes, other readings.
_SHAPE = ("kind", "heads", "queries", "keys", "windows", "partition")

#: Options that change what a reading means.
_MEANING = ("attention", "threshold", "nearest")


def check_comparable(analysis: Analysis, baseline: Analysis) -> list[str]:
    """Sentences on what makes a comparison doubtful.

    Raises:
        UsageError: layers, their sizes, or options that change what readings mean are not the same; or the baseline is
            of a run that was interrupted.
    """
    if not baseline.complete:
        raise UsageError("The baseline is of a run that was interrupted. Finish it with --resume.")
    _check_layers(analysis, baseline)
    own, others = (_section(item, "options") for item in (analysis, baseline))
    for name in _MEANING:
        if name in own and name in others and own[name] != others[name]:
            raise UsageError(
                f"The baseline was measured with {name} {others[name]!r}, this analysis with {own[name]!r}: their "
                "readings mean different things. Measure one of them again."
            )
    return _other_images(analysis, baseline)


def _check_layers(analysis: Analysis, baseline: Analysis) -> None:
    own, others = (list(map(str, item.layers.index)) for item in (analysis, baseline))
    if own != others:
        words = [
            f"{', '.join(only[:3])}{f' and {len(only) - 3} more' if len(only) > 3 else ''} only in {where}"
            for only, where in (
                ([name for name in own if name not in others], "this analysis"),
                ([name for name in others if name not in own], "the baseline"),
            )
            if only
        ]
        raise UsageError(
            f"The baseline is of other layers: {'; '.join(words) or 'the same ones in another order'}. A baseline must "
            "be of the same architecture and the same --layers."
        )
    for column in _SHAPE:
        if column not in analysis.layers or column not in baseline.layers:
            continue
        for name, one, other in zip(own, analysis.layers[column], baseline.layers[column], strict=True):
            if one != other:
                raise UsageError(
                    f"The baseline is of other maps: {name} has {column} {one!s} here and {other!s} there. A baseline "
                    "must be of the same architecture at the same image size."
                )


def _other_images(analysis: Analysis, baseline: Analysis) -> list[str]:
    """What is known to differ in the images; readings of other images are comparable, but not of the model alone."""
    own, others = (_section(item, "images") for item in (analysis, baseline))
    prints = [_section(item, "fingerprint").get("images") for item in (analysis, baseline)]
    differ = []
    if own.get("count") != others.get("count"):
        differ.append(f"{own.get('count', '?')} images here, {others.get('count', '?')} in the baseline")
    elif all(prints) and prints[0] != prints[1]:
        differ.append("other files, or in another order")
    if own.get("preprocessing") != others.get("preprocessing"):
        differ.append("another preprocessing")
    if not differ:
        return []
    return [
        f"The baseline was measured on other images ({'; '.join(differ)}): differences may come from them, not from "
        "the model."
    ]


def _section(analysis: Analysis, name: str) -> Mapping[str, Any]:
    section = analysis.provenance.get(name)
    return section if isinstance(section, Mapping) else {}
