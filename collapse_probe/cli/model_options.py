"""Options that every command has that runs a model on images: which weights, which preprocessing, where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from collapse_probe.errors import UsageError

#: Panels of the help.
MODEL, IMAGES, RUN = "Model", "Images", "Running"

Architecture = Annotated[
    str | None,
    typer.Option("--model", "-m", help="timm's name of the architecture of the weights.", rich_help_panel=MODEL),
]
Checkpoint = Annotated[
    str | None, typer.Option(help="Weights for the architecture given by --model.", rich_help_panel=MODEL)
]
Pretrained = Annotated[
    bool,
    typer.Option(help="Whether a bare name means its pretrained weights, or a random network.", rich_help_panel=MODEL),
]
UseEma = Annotated[
    bool, typer.Option("--use-ema", help="Take the averaged weights of a checkpoint.", rich_help_panel=MODEL)
]
Key = Annotated[
    str | None,
    typer.Option(help="Take the weights under this key of a checkpoint, for example student.", rich_help_panel=MODEL),
]
NumHeads = Annotated[
    int | None, typer.Option(help="Heads of each block: weights rarely show their number.", rich_help_panel=MODEL)
]
AllowBadWeights = Annotated[
    bool,
    typer.Option(
        "--allow-bad-weights",
        help="Analyse weights that hold NaN, infinities, or matrices of one number.",
        rich_help_panel=MODEL,
    ),
]
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option(help="Arguments of the architecture, as name=value; may be repeated.", rich_help_panel=MODEL),
]
ImgSize = Annotated[int | None, typer.Option(help="Side of the input in pixels.", rich_help_panel=IMAGES)]
Mean = Annotated[str | None, typer.Option(help="Override the mean, for example .5,.5,.5.", rich_help_panel=IMAGES)]
Std = Annotated[str | None, typer.Option(help="Override the standard deviation.", rich_help_panel=IMAGES)]
CropPct = Annotated[float | None, typer.Option(help="Override the share kept by the crop.", rich_help_panel=IMAGES)]
Interpolation = Annotated[
    str | None, typer.Option(help="Override the interpolation, for example bicubic.", rich_help_panel=IMAGES)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=RUN)]
Attention = Annotated[
    str,
    typer.Option(
        help="applied (what multiplied the values) or softmax (underneath re-attention).", rich_help_panel=RUN
    ),
]


def model_sources(
    model: str | None, arch: str | None, checkpoint: str | None
) -> tuple[str | None, str | None, str | None]:
    """Who gives the weights and who the architecture: (model source, architecture of a file, weights of a name)."""
    if model is not None and "=" in model and not Path(model).exists():
        raise UsageError(f"{model!r} is no model. To give several arguments, repeat the option: --model-kwargs {model}")
    if model is not None and checkpoint is not None:
        raise UsageError("Weights are given twice, as the argument and by --checkpoint. Use one of them.")
    if model is None:
        if checkpoint is not None and arch is None:
            return checkpoint, None, None
        return (checkpoint, arch, None) if checkpoint is not None else (arch, None, None)
    return model, arch, None
