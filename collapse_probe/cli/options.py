"""Options that several commands take, declared once, and what all of them have in common."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from collapse_probe.errors import UsageError

#: Panels of the help.
MODEL, IMAGES, RUN, RESULT = "Model", "Images", "Running", "Result"

# -- the model ---------------------------------------------------------------------------------------------------------

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

# -- the images --------------------------------------------------------------------------------------------------------

Images = Annotated[
    str | None,
    typer.Option("--images", "--data-dir", help="Folder of images, flat or nested.", rich_help_panel=IMAGES),
]
NumSamples = Annotated[
    int | None,
    typer.Option(help="How many images to look at; at most 1000 of a folder by default.", rich_help_panel=IMAGES),
]
MaxSkipped = Annotated[float, typer.Option(help="Share of the images that may be unreadable.", rich_help_panel=IMAGES)]
Seed = Annotated[int, typer.Option(help="Chooses images and their order.", rich_help_panel=IMAGES)]
ImgSize = Annotated[int | None, typer.Option(help="Side of the input in pixels.", rich_help_panel=IMAGES)]
Mean = Annotated[str | None, typer.Option(help="Override the mean, for example .5,.5,.5.", rich_help_panel=IMAGES)]
Std = Annotated[str | None, typer.Option(help="Override the standard deviation.", rich_help_panel=IMAGES)]
CropPct = Annotated[float | None, typer.Option(help="Override the share kept by the crop.", rich_help_panel=IMAGES)]
Interpolation = Annotated[
    str | None, typer.Option(help="Override the interpolation, for example bicubic.", rich_help_panel=IMAGES)
]

# -- running -----------------------------------------------------------------------------------------------------------

BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Images per forward pass.", rich_help_panel=RUN)]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-j",
        help="Processes that decode images; 0 decodes between batches. By default up to 8: with a GPU one for each "
        "core but one, on a CPU one for every four cores; fewer where shared memory is short.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=RUN)]
Amp = Annotated[bool, typer.Option("--amp", help="Run the model in mixed precision.", rich_help_panel=RUN)]
AmpDtype = Annotated[str, typer.Option(help="bfloat16 or float16.", rich_help_panel=RUN)]
Layers = Annotated[
    list[str] | None,
    typer.Option(help="Only layers whose name matches this pattern; may be repeated.", rich_help_panel=RUN),
]
Attention = Annotated[
    str,
    typer.Option(
        help="applied (what multiplied the values) or softmax (underneath re-attention).", rich_help_panel=RUN
    ),
]
UntilSe = Annotated[
    float | None,
    typer.Option(
        help="Stop once the standard error of every neighbouring similarity is this small.", rich_help_panel=RUN
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Check the first batch: maps times values against the model's own.", rich_help_panel=RUN
    ),
]
Metrics = Annotated[
    str,
    typer.Option(
        help="fast (what every analysis can afford), all, or names separated by commas, such as fast,cka,map_rank.",
        rich_help_panel=RUN,
    ),
]

# -- the result --------------------------------------------------------------------------------------------------------

Threshold = Annotated[
    float,
    typer.Option(help="Similarity above which neighbouring blocks are called similar.", rich_help_panel=RESULT),
]
Nearest = Annotated[
    int,
    typer.Option(help="Neighbours on either side that the similarity ratio compares with.", rich_help_panel=RESULT),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=RESULT)]


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """The value of an option that is a list of numbers. Raises UsageError for anything else."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers such as .5,.5,.5.") from None


def check_apart(images: str | None, out: str | None) -> None:
    """Raises UsageError where figures would be written among the images, and analysed the next time."""
    if images is None or out is None:
        return
    with contextlib.suppress(OSError):
        root, target = Path(images).resolve(), Path(out).resolve()
        if target == root or root in target.parents:
            raise UsageError(f"--out {out} lies in the folder of images, whose pictures it would join. Choose another.")


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
