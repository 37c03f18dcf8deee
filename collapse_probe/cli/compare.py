"""`collapse-probe compare`."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collapse_probe.cli import options
from collapse_probe.cli.arguments import keyword_arguments
from collapse_probe.cli.outcome import with_exit_codes
from collapse_probe.skipping import SKIPPED_ALLOWED

if TYPE_CHECKING:
    from collapse_probe.comparison import Comparison
    from collapse_probe.result import Analysis


@with_exit_codes
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two to four models (weights or timm names), or folders of saved analyses.", metavar="A B …"
        ),
    ],
    architecture: options.Architecture = None,
    pretrained: options.Pretrained = True,
    use_ema: options.UseEma = False,
    key: options.Key = None,
    num_heads: options.NumHeads = None,
    allow_bad_weights: options.AllowBadWeights = False,
    model_kwargs: options.ModelKwargs = None,
    images: options.Images = None,
    num_samples: options.NumSamples = None,
    max_skipped: options.MaxSkipped = SKIPPED_ALLOWED,
    seed: options.Seed = 0,
    img_size: options.ImgSize = None,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = None,
    device: options.Device = "auto",
    amp: options.Amp = False,
    amp_dtype: options.AmpDtype = "bfloat16",
    layers: options.Layers = None,
    attention: options.Attention = "applied",
    metrics: options.Metrics = "fast",
    groups: Annotated[
        int,
        typer.Option(
            help="Groups of 8 images or more that errors of differences come from; fewer where images are few.",
            rich_help_panel=options.RESULT,
        ),
    ] = 16,
    threshold: options.Threshold = 0.9,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", help="Folder for tables, report.html and each analysis.", rich_help_panel=options.RESULT
        ),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Find out what sets models apart, on the same images.

    The others are compared with the first: readings at equal relative depth with errors of their differences, and
    every layer of one beside every layer of the other. Saved analyses are compared without their models.

    [bold]collapse-probe compare vit.safetensors deepvit.safetensors --images val/ --out compared/[/bold]
    """
    from collapse_probe.files import check_writable
    from collapse_probe.progress import ProgressBar

    options.check_apart(images, out)
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
                num_heads=num_heads, allow_bad_weights=allow_bad_weights,
                model_kwargs=keyword_arguments(model_kwargs or []), img_size=img_size, num_samples=num_samples,
                max_skipped=max_skipped, seed=seed, batch_size=batch_size, workers=workers, device=device, amp=amp,
                amp_dtype=amp_dtype, layers=layers or [], attention=attention, metrics=metrics, groups=groups,
                threshold=threshold, progress=progress,
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
