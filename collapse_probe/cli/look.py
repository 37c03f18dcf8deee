"""`collapse-probe look`: pictures of attention itself, of one image in one model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collapse_probe.cli import options
from collapse_probe.cli.arguments import keyword_arguments
from collapse_probe.cli.outcome import with_exit_codes
from collapse_probe.errors import UsageError
from collapse_probe.words import neutral

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from collapse_probe.look import Look, Token

PICTURES = "Pictures"

#: The pictures that may be written, without their endings.
NAMES = ("attention", "attention_by_depth", "rollout", "column")


@with_exit_codes
def look(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Weights (a file or a folder), or a timm name (its pretrained weights). Without it: the bundled ViT.",
            show_default=False,
        ),
    ] = None,
    architecture: options.Architecture = None,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = True,
    use_ema: options.UseEma = False,
    key: options.Key = None,
    num_heads: options.NumHeads = None,
    allow_bad_weights: options.AllowBadWeights = False,
    model_kwargs: options.ModelKwargs = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--image",
            "-i",
            help="The image file. Without it, for bundled models: a digit.",
            rich_help_panel=options.IMAGES,
        ),
    ] = None,
    img_size: options.ImgSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    device: options.Device = "auto",
    attention: options.Attention = "applied",
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Which layers: numbers in execution order such as 0,5,-1 (the last), or a pattern of names; may be "
            "repeated. By default evenly spaced ones.",
            show_default=False,
            rich_help_panel=PICTURES,
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Which heads stand beside the mean over heads: numbers such as 0,1,2, or all (as there is room for).",
            show_default=False,
            rich_help_panel=PICTURES,
        ),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            help="Who asks: class, mean (of all queries), a patch as row,column, or a token's number. By default the "
            "class token, or the mean where there is none.",
            show_default=False,
            rich_help_panel=PICTURES,
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Whose contribution is followed from layer to layer: class, a patch as row,column, or a token's "
            "number. By default the patch in the middle.",
            show_default=False,
            rich_help_panel=PICTURES,
        ),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="panel colours each map up to its own largest value, shared all on one scale.",
            rich_help_panel=PICTURES,
        ),
    ] = "panel",
    width: Annotated[
        str | None,
        typer.Option(
            help="one-column (3.25 in) or two-column (6.75 in), for a paper.",
            show_default=False,
            rich_help_panel=PICTURES,
        ),
    ] = None,
    titles: Annotated[bool, typer.Option(help="Whether figures bear titles.", rich_help_panel=PICTURES)] = True,
    formats: Annotated[str, typer.Option(help="Endings of the files.", rich_help_panel=PICTURES)] = "png,svg,pdf",
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder for the pictures.", rich_help_panel=PICTURES)
    ] = None,
) -> None:
    """See the attention of a model on one image: where it looks, layer by layer, and whether layers look alike.

    [bold]collapse-probe look model.pt --model vit_small_patch16_224 --image photo.jpg --out pictures/[/bold]
    """
    from collapse_probe.cli.output import printing
    from collapse_probe.files import check_writable

    if out is None:
        raise UsageError("The pictures need a folder: give --out.")
    wanted, single = _layers(layers or []), _heads(heads)
    asked, followed = _token("--query", query), _token("--token", token)
    endings = [ending for ending in formats.replace(",", " ").split() if ending]
    source, arch, weights = options.model_sources(model, architecture, checkpoint)
    arguments: dict[str, Any] = {
        "arch": arch, "checkpoint": weights, "pretrained": pretrained, "use_ema": use_ema, "key": key,
        "num_heads": num_heads, "allow_bad_weights": allow_bad_weights,
        "model_kwargs": keyword_arguments(model_kwargs or []), "img_size": img_size,
        "mean": options.numbers("--mean", mean), "std": options.numbers("--std", std), "crop_pct": crop_pct,
        "interpolation": interpolation, "attention": attention, "device": device,
    }  # fmt: skip
    check_writable(out)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: _note(f"Warning: {message}")
        _check_figures(endings, width, scale)
        from collapse_probe.looking import look_at

        seen = look_at(source, image, layers=wanted, heads=single, **arguments)
        for name, reason in seen.left_out.items():
            _note(f"Left out: {name}: {reason}.")
        draws = _draws(wanted, single, asked, followed, scale)
        optional = {"rollout"} if followed is not None else {"rollout", "column"}
        drawn = _drawn(seen, draws, optional, width, titles)
        _write(drawn, Path(out), endings)
    with printing():
        print(f"Written to {out}: {', '.join(f'{name}.{ending}' for name in drawn for ending in endings)}")


def _check_figures(endings: list[str], width: str | None, scale: str) -> None:
    """Before any long work."""
    from collapse_probe.plots.overlays import check_scale
    from collapse_probe.plots.save import check_formats
    from collapse_probe.plots.sizes import check_width

    if not endings:
        raise UsageError("--formats is empty: name file endings such as png,svg,pdf.")
    check_formats(endings)
    check_width(width)
    check_scale(scale)


def _draws(
    layers: list[int | str] | None, heads: tuple[int, ...] | None, query: Token | None, token: Token | None, scale: str
) -> dict[str, Callable[[Look], tuple[Figure, Any]]]:
    """Name of a picture -> what draws it."""
    from collapse_probe import plots

    rows = {"layers": layers, "query": query, "scale": scale}
    return {
        "attention": lambda seen: plots.attention_over_image(seen, heads=heads, **rows),  # type: ignore[arg-type]
        "attention_by_depth": lambda seen: plots.attention_by_depth(seen, **rows),  # type: ignore[arg-type]
        "rollout": lambda seen: plots.rollout_by_depth(seen, **rows),  # type: ignore[arg-type]
        "column": lambda seen: plots.column_by_depth(seen, token, layers=layers, scale=scale),
    }


def _drawn(
    seen: Look,
    draws: dict[str, Callable[[Look], tuple[Figure, Any]]],
    optional: set[str],
    width: str | None,
    titles: bool,
) -> dict[str, Figure]:
    """The pictures; of those that are optional and that this model does not have, why not."""
    from collapse_probe import plots

    drawn = {}
    for name, draw in draws.items():
        try:
            with plots.figure_style(width, titles):
                drawn[name], _ = draw(seen)
        except UsageError as error:
            if name not in optional:
                raise
            _note(f"No picture {name}: {error}")
    return drawn


def _write(drawn: dict[str, Figure], folder: Path, endings: list[str]) -> None:
    from collapse_probe.files import staged, write_atomically
    from collapse_probe.plots.style import render, settle

    with staged(folder, optional=[f"{name}.{ending}" for name in NAMES for ending in endings]) as stage:
        for name, figure in drawn.items():
            for ending in endings:
                write_atomically(stage / f"{name}.{ending}", render(figure, ending))
                settle(figure)


def _layers(words: list[str]) -> list[int | str] | None:
    """Numbers where words are numbers; what has no comma may be a pattern."""
    parts = [part.strip() for word in words for part in word.split(",")]
    return [int(part) if part.lstrip("-").isdecimal() else part for part in parts if part] or None


def _heads(text: str | None) -> tuple[int, ...] | None:
    """No single heads unless asked for; None for all."""
    if text is None:
        return ()
    if text == "all":
        return None
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--heads {text!r} is neither 'all' nor a list of numbers such as 0,1,2.")
    return tuple(int(part) for part in parts)


def _token(option: str, text: str | None) -> Token | None:
    if text is None or text in ("class", "mean"):
        return text
    parts = text.replace(",", " ").split()
    if len(parts) not in (1, 2) or not all(part.isdecimal() for part in parts):
        raise UsageError(f"{option} {text!r} is no token: give class, a patch as row,column, or a token's number.")
    found = [int(part) for part in parts]
    return found[0] if len(found) == 1 else (found[0], found[1])


def _note(text: str) -> None:
    print(neutral(text, lines=True), file=sys.stderr)
