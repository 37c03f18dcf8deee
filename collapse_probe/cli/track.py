"""`collapse-probe track`: the readings of a model over the steps of its training."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collapse_probe.cli import options
from collapse_probe.cli.arguments import keyword_arguments
from collapse_probe.cli.outcome import with_exit_codes
from collapse_probe.errors import UsageError
from collapse_probe.skipping import SKIPPED_ALLOWED

if TYPE_CHECKING:
    from collapse_probe.progress import ProgressBar
    from collapse_probe.series import Series


@with_exit_codes
def track(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints of one training: files, folders, or patterns in quotation marks.", show_default=False
        ),
    ],
    architecture: options.Architecture = None,
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
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = None,
    device: options.Device = "auto",
    amp: options.Amp = False,
    amp_dtype: options.AmpDtype = "bfloat16",
    layers: options.Layers = None,
    attention: options.Attention = "applied",
    until_se: options.UntilSe = None,
    verify: options.Verify = False,
    metrics: options.Metrics = "fast",
    threshold: options.Threshold = 0.9,
    nearest: options.Nearest = 1,
    reports: Annotated[
        bool,
        typer.Option(
            "--reports",
            help="Write a report.html for each checkpoint, too, which track.html leads to.",
            rich_help_panel=options.RESULT,
        ),
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for track.csv, track.json, figures, track.html and the analysis of each checkpoint, which a "
            "later run with more checkpoints takes from there.",
            rich_help_panel=options.RESULT,
        ),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Follow attention over the training of a model, checkpoint by checkpoint, on the same images.

    [bold]collapse-probe track 'checkpoints/*.pt' --images val/ --out track/[/bold]

    Repeated while the model is being trained, the same command analyses what is new.
    """
    from collapse_probe.progress import ProgressBar

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("track runs in one process: start it without torchrun.")
    if reports and out is None:
        raise UsageError("--reports writes into the --out folder: give --out.")
    options.check_apart(images, out)
    with ProgressBar(quiet=quiet) as progress, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: progress.note(f"Warning: {message}")
        arguments: dict[str, Any] = {
            "arch": architecture, "use_ema": use_ema, "key": key, "num_heads": num_heads,
            "allow_bad_weights": allow_bad_weights, "model_kwargs": keyword_arguments(model_kwargs or []),
            "img_size": img_size, "mean": options.numbers("--mean", mean), "std": options.numbers("--std", std),
            "crop_pct": crop_pct, "interpolation": interpolation, "batch_size": batch_size, "workers": workers,
            "num_samples": num_samples, "max_skipped": max_skipped, "seed": seed, "device": device, "amp": amp,
            "amp_dtype": amp_dtype, "layers": layers or [], "attention": attention, "until_se": until_se,
            "threshold": threshold, "nearest": nearest, "verify": verify, "metrics": metrics,
        }  # fmt: skip
        from collapse_probe.tracking import track as run

        series = run(checkpoints, images, out=out, progress=progress, **arguments)
        series.provenance["command"] = shlex.join(["collapse-probe", *sys.argv[1:]])
        if out is not None:
            if reports:
                _write_reports(series, Path(out), progress)
            _write(series, Path(out), progress)
    _show(series, out)


def _write(series: Series, folder: Path, progress: ProgressBar) -> None:
    """Tables, figures and the page, or nothing."""
    from collapse_probe.files import staged, write_atomically
    from collapse_probe.plots import heatmaps_over_steps, over_steps, render
    from collapse_probe.report.tracking import write_track

    progress.note(f"Writing {folder}")
    links = {point.label: f"{point.folder}/report.html" for point in series.points}
    links = {label: link for label, link in links.items() if (folder / link).is_file()}
    with staged(folder) as stage:
        series.save_tables(stage)
        figures = {"over_steps": over_steps(series)[0], "heatmaps_over_steps": heatmaps_over_steps(series)[0]}
        pictures = {name: render(figure) for name, figure in figures.items()}
        for name, figure in figures.items():
            write_atomically(stage / "figures" / f"{name}.png", pictures[name])
            write_atomically(stage / "figures" / f"{name}.svg", render(figure, "svg"))
        write_track(series, stage / "track.html", links, pictures)


def _write_reports(series: Series, folder: Path, progress: ProgressBar) -> None:
    """A report for each checkpoint that has none yet."""
    from collapse_probe.report import write_report

    missing = [point for point in series.points if not (folder / point.folder / "report.html").is_file()]
    for number, point in enumerate(missing, start=1):
        progress.note(f"Writing report {number} of {len(missing)}: {point.label}")
        write_report(point.analysis, folder / point.folder / "report.html")


def _show(series: Series, out: str | None) -> None:
    from collapse_probe.cli.output import PipeConsole, printing
    from collapse_probe.report.terminal import print_series

    closing = []
    if out is not None:
        closing = [f"Written to {out}: track.csv, track.json, figures/, track.html, checkpoints/"]
    with printing():
        print_series(series, PipeConsole(), closing)
