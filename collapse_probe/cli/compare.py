"""`collapse-probe compare`."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collapse_probe.cli.outcome import with_exit_codes

if TYPE_CHECKING:
    from collapse_probe.comparison import Comparison
    from collapse_probe.result import Analysis

MODELS, IMAGES, RUN, RESULT = "Models", "Images", "Running", "Result"


@with_exit_codes
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two to four models (weights or timm names), or folders of saved analyses.", metavar="A B …"
        ),
    ],
    architecture: Annotated[
        str | None,
        typer.Option("--model", "-m", help="timm's name of the architecture of weights.", rich_help_panel=MODELS),
    ] = None,
    pretrained: Annotated[
        bool,
        typer.Option(
            help="Whether a bare name means its pretrained weights, or a random network.", rich_help_panel=MODELS
        ),
    ] = True,
    use_ema: Annotated[
        bool, typer.Option("--use-ema", help="Take the averaged weights of checkpoints.", rich_help_panel=MODELS)
    ] = False,
    key: Annotated[
        str | None, typer.Option(help="Take the weights under this key of checkpoints.", rich_help_panel=MODELS)
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="Heads of each block.", rich_help_panel=MODELS)] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", "--data-dir", help="Folder of images, flat or nested.", rich_help_panel=IMAGES),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(help="How many images to look at; at most 1000 of a folder by default.", rich_help_panel=IMAGES),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses images and their order.", rich_help_panel=IMAGES)] = 0,
    img_size: Annotated[int | None, typer.Option(help="Side of the input in pixels.", rich_help_panel=IMAGES)] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", help="Images per forward pass.", rich_help_panel=RUN)
    ] = 32,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", help="Processes that decode images.", rich_help_panel=RUN)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=RUN)] = "auto",
    amp: Annotated[bool, typer.Option("--amp", help="Run the models in mixed precision.", rich_help_panel=RUN)] = False,
    amp_dtype: Annotated[str, typer.Option(help="bfloat16 or float16.", rich_help_panel=RUN)] = "bfloat16",
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Only layers whose name matches this pattern; may be repeated.", rich_help_panel=RUN),
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            help="applied (what multiplied the values) or softmax (underneath re-attention).", rich_help_panel=RUN
        ),
    ] = "applied",
    metrics: Annotated[
        str, typer.Option(help="fast, all, or names separated by commas.", rich_help_panel=RUN)
    ] = "fast",
    groups: Annotated[
        int,
        typer.Option(
            help="Groups of 8 images or more that errors of differences come from; fewer where images are few.",
            rich_help_panel=RESULT,
        ),
    ] = 16,
    threshold: Annotated[
        float,
        typer.Option(help="Similarity above which neighbouring blocks are called similar.", rich_help_panel=RESULT),
    ] = 0.9,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Folder for tables, report.html and each analysis.", rich_help_panel=RESULT),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=RESULT)] = False,
) -> None:
    """Find out what sets models apart, on the same images.

    The others are compared with the first: readings at equal relative depth with errors of their differences, and
    every layer of one beside every layer of the other. Saved analyses are compared without their models.

    [bold]collapse-probe compare vit.safetensors deepvit.safetensors --images val/ --out compared/[/bold]
    """
    from collapse_probe.files import check_writable
    from collapse_probe.progress import ProgressBar

    if out is not None:
        check_writable(out)
    with ProgressBar(quiet=quiet) as progress, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: progress.note(f"Warning: {message}")
        from collapse_probe.comparison import Comparison

        saved = _saved(models)
        if saved is not None:
            found = Comparison.of_saved(saved)
        else:
            from collapse_probe.comparing import compare as run

            found = run(
                models, images, arch=architecture, pretrained=pretrained, use_ema=use_ema, key=key,
                num_heads=num_heads, img_size=img_size, num_samples=num_samples, seed=seed, batch_size=batch_size,
                workers=workers, device=device, amp=amp, amp_dtype=amp_dtype, layers=layers or [],
                attention=attention, metrics=metrics, groups=groups, threshold=threshold, progress=progress,
            )  # fmt: skip
            command = shlex.join(["collapse-probe", *sys.argv[1:]])
            for analysis in found.analyses.values():
                analysis.provenance["command"] = command
        if out is not None:
            progress.note(f"Writing {out}")
            _write(found, Path(out))
    _show(found, out)


def _saved(models: list[str]) -> dict[str, Analysis] | None:
    """The analyses, where all of these are folders that hold one: then torch is not needed."""
    from collapse_probe.comparison import distinct
    from collapse_probe.result import Analysis

    if not all((Path(name) / "analysis.json").is_file() for name in models):
        return None
    return dict(zip(distinct([Path(name).name or name for name in models]), map(Analysis.load, models), strict=True))


def _write(found: Comparison, folder: Path) -> None:
    """The comparison, every analysis with its own report, and the page that shows all; or nothing."""
    from collapse_probe.comparison import folder_names
    from collapse_probe.files import staged
    from collapse_probe.report import write_comparison, write_report

    folders = folder_names(list(found.analyses))
    with staged(folder) as stage:
        found.fill(stage)
        for label, analysis in found.analyses.items():
            write_report(analysis, stage / folders[label] / "report.html")
        write_comparison(
            found, stage / "report.html", links={label: f"{name}/report.html" for label, name in folders.items()}
        )


def _show(found: Comparison, out: str | None) -> None:
    from collapse_probe.cli.output import PipeConsole, printing
    from collapse_probe.report import print_differences

    closing = [] if out is None else [f"Written to {out}: report.html, differences.csv, comparison.json, a folder each"]
    with printing():
        print_differences(found, PipeConsole(), closing)
