"""`collapse-probe models`: which architectures attend, from a table; or the layers of one, by running it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collapse_probe.cli.arguments import keyword_arguments
from collapse_probe.cli.outcome import with_exit_codes
from collapse_probe.errors import CaptureError, UnknownModelError, UsageError

if TYPE_CHECKING:
    from collapse_probe.architecture import Architecture, Layer


@with_exit_codes
def models(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(
            help="Shell patterns such as 'swin*' (in quotes), or one exact name, whose layers are then shown.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Only attention of this kind, for example window; may be repeated."),
    ] = None,
    img_size: Annotated[int | None, typer.Option(help="With one name: side of the input in pixels.")] = None,
    model_kwargs: Annotated[
        list[str] | None,
        typer.Option(help="With one name: arguments of the architecture, as name=value; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the architectures that attend, or show the attention layers of one. No weights are needed.

    [bold]collapse-probe models 'swin*'[/bold]

    [bold]collapse-probe models swin_tiny_patch4_window7_224[/bold]
    """
    patterns, kinds, arguments = patterns or [], kind or [], model_kwargs or []
    if len(patterns) == 1 and not set(patterns[0]) & set("*?["):
        _one(patterns[0], kinds, img_size, keyword_arguments(arguments), as_json)
    elif img_size is not None or arguments:
        raise UsageError("--img-size and --model-kwargs change how an architecture is run: give one exact name.")
    else:
        _many(patterns, kinds, as_json)


def _many(patterns: Sequence[str], kinds: Sequence[str], as_json: bool) -> None:
    """A line per architecture, from the table; torch is loaded only to ask another version of timm for its names."""
    from importlib.metadata import version

    from collapse_probe.catalogue import look_up, near_misses, read_table, select, timm_version
    from collapse_probe.cli.model_tables import print_listing

    table = read_table()
    versions = {"table": timm_version(table.values()), "installed": version("timm")}
    names = sorted(table) if versions["table"] == versions["installed"] else _installed_names()
    known_kinds = dict.fromkeys(kind for row in table.values() for kind in row.kinds)
    for kind in kinds:
        if kind not in known_kinds:
            raise UsageError(f"--kind {kind!r}: the kinds of attention in the table are {', '.join(known_kinds)}.")
    for pattern in patterns:
        if not select(names, [pattern]):
            raise UsageError(f"No architecture matches {pattern!r}. {near_misses(pattern, names)}")
    everything, chosen = look_up(names, table), look_up(select(names, patterns), table)
    if kinds:
        chosen = replace(chosen, attending=[row for row in chosen.attending if set(kinds) & set(row.kinds)])
    if as_json:
        _print_json(
            {
                "timm": versions,
                "names": {group: len(getattr(everything, group)) for group in vars(everything)},
                "models": [{**asdict(row), "maps": row.maps} for row in chosen.attending],
                **{group: found for group, found in vars(chosen).items() if group != "attending"},
            }
        )
    else:
        print_listing(everything, chosen, versions, filtered=bool(patterns))


def _one(name: str, kinds: Sequence[str], img_size: int | None, arguments: Mapping[str, Any], as_json: bool) -> None:
    """The layers of one architecture, by running it."""
    from collapse_probe.cli.model_tables import print_architecture
    from collapse_probe.progress import ProgressBar

    with ProgressBar() as progress, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: progress.note(f"Warning: {message}")
        from collapse_probe.architecture import describe
        from collapse_probe.catalogue import near_misses

        try:
            found = describe(name, img_size, arguments)
        except UnknownModelError:
            misses = near_misses(name, _installed_names())
            raise UsageError(f"There is no architecture {name!r}. {misses}") from None
    if kinds and found.layers:
        found = replace(found, layers=_of_kinds(found, kinds))
    if as_json:
        _print_json(asdict(found))
    else:
        print_architecture(found)
    if not found.layers:
        raise CaptureError(f"No attention map could be captured from {name}.")


def _of_kinds(architecture: Architecture, kinds: Sequence[str]) -> tuple[Layer, ...]:
    chosen = tuple(layer for layer in architecture.layers if layer.kind in kinds)
    if not chosen:
        present = ", ".join(dict.fromkeys(layer.kind for layer in architecture.layers))
        raise UsageError(f"{architecture.name} has no attention of kind {' or '.join(kinds)}; it has {present}.")
    return chosen


def _installed_names() -> list[str]:
    from collapse_probe.architecture import architecture_names

    return architecture_names()


def _print_json(content: Mapping[str, Any]) -> None:
    from collapse_probe.cli.output import printing

    with printing():
        print(json.dumps(content, indent=2))
