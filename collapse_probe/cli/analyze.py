"""`collapse-probe analyze`."""

from __future__ import annotations

import contextlib
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collapse_probe.cli import options
from collapse_probe.cli.arguments import keyword_arguments
from collapse_probe.cli.conditions import Baseline, ConditionsJson, FailOn, Gate, JUnit, gate
from collapse_probe.cli.outcome import with_exit_codes
from collapse_probe.errors import DamagedFileError, UsageError
from collapse_probe.shards import Shard
from collapse_probe.skipping import SKIPPED_ALLOWED

if TYPE_CHECKING:
    from collapse_probe.resuming import Keeper


@with_exit_codes
def analyze(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Weights (a file or a folder), or a timm name (its pretrained weights). Without it: the bundled ViT "
            "and DeepViT side by side.",
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
    shard: Annotated[
        str | None,
        typer.Option(
            help="Measure one part of the images only, for example 2/4 for the second of four, and leave its sums in "
            "--out for collapse-probe merge.",
            rich_help_panel=options.RUN,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Measure a shard again that --out holds already.", rich_help_panel=options.RUN),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the same run where it was interrupted, from what it left in partial/ in --out.",
            rich_help_panel=options.RUN,
        ),
    ] = False,
    threshold: options.Threshold = 0.9,
    nearest: options.Nearest = 1,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for analysis.json, tables, figures and report.html.",
            rich_help_panel=options.RESULT,
        ),
    ] = None,
    fail_on: FailOn = None,
    baseline: Baseline = None,
    conditions_json: ConditionsJson = None,
    junit: JUnit = None,
    quiet: options.Quiet = False,
) -> None:
    """Find out where attention collapses in a model.

    [bold]collapse-probe analyze model.pt --model vit_small_patch16_224 --images val/ --out run/[/bold]
    """
    from collapse_probe.cli.bundled import analyze_pair
    from collapse_probe.cli.results import conclude, leads, one_voice, write, written
    from collapse_probe.files import check_writable
    from collapse_probe.progress import ProgressBar

    command = shlex.join(["collapse-probe", *sys.argv[1:]])
    with ProgressBar(quiet=quiet or not leads()) as progress, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: progress.note(f"Warning: {message}")
        from collapse_probe.ranks import ranks

        with ranks() as team, one_voice(team):
            source, arch, weights = options.model_sources(model, architecture, checkpoint)
            part = _part(shard, out, force, team.size)
            options.check_apart(images, out)
            asked = _gate(gate(fail_on, baseline, conditions_json, junit), source, part, metrics)
            keeper = _keeper(
                out, resume, command if team.size == 1 else f"torchrun with {team.size} processes: {command}"
            )
            arguments: dict[str, Any] = {
                "arch": arch, "checkpoint": weights, "pretrained": pretrained, "use_ema": use_ema,
                "key": key, "num_heads": num_heads, "allow_bad_weights": allow_bad_weights,
                "model_kwargs": keyword_arguments(model_kwargs or []), "img_size": img_size,
                "mean": options.numbers("--mean", mean), "std": options.numbers("--std", std), "crop_pct": crop_pct,
                "interpolation": interpolation, "batch_size": batch_size, "workers": workers,
                "num_samples": num_samples, "max_skipped": max_skipped, "seed": seed,
                "device": device, "amp": amp, "amp_dtype": amp_dtype,
                "layers": layers or [], "attention": attention, "until_se": until_se, "threshold": threshold,
                "nearest": nearest, "verify": verify, "metrics": metrics, "progress": progress,
            }  # fmt: skip
            leading = team.rank == 0
            team.together(lambda: check_writable(out) if out is not None and leading else None)
            if source is None:
                _alone(part, team.size, resume)
                analyze_pair(arguments, images, out, progress, command)
                return
            from collapse_probe.analysis import analyze as run

            arguments["partial"] = keeper
            if part is not None and out is not None:
                _measure_shard(part, Path(out), force, command, source, images, arguments)
            else:
                analysis = run(source, images, distributed=team.size > 1, **arguments)
        if not leading:
            return
        if part is None:
            analysis.provenance["command"] = command
            if out is not None:
                write(analysis, Path(out), progress)
        if keeper is not None:
            keeper.discard()
    if part is None:
        conclude(analysis, written(out), asked)


def _alone(part: Shard | None, processes: int, resume: bool) -> None:
    """Sums over shards and processes, and those of a run that was interrupted, are those of one model."""
    if part is not None or processes > 1 or resume:
        raise UsageError(
            "Without a model, two are analysed side by side by one process, from the first image to the last. Name the "
            "one that is meant, for example: collapse-probe analyze digits_vit_24b"
        )


def _gate(asked: Gate | None, source: str | None, part: Shard | None, metrics: str) -> Gate | None:
    """The conditions, where they can be judged at the end of this run."""
    if asked is None:
        return None
    if source is None:
        raise UsageError(
            "--fail-on is about one model, and without a name two are analysed side by side. Name it, for example: "
            "collapse-probe analyze digits_vit_24b"
        )
    if part is not None:
        raise UsageError("--fail-on is about all images, and --shard measures a part: give it to collapse-probe merge.")
    asked.check_metrics(metrics)
    return asked


def _keeper(out: str | None, resume: bool, command: str) -> Keeper | None:
    """Where the run keeps what it has measured until its results are written."""
    from collapse_probe.resuming import Keeper

    if out is None and resume:
        raise UsageError("--resume goes on from what a run left in its --out folder: give --out.")
    if out is None:
        return None
    again = command if resume else f"{command} --resume"
    return Keeper(Path(out) / "partial", resume, lambda text: print(text, file=sys.stderr, flush=True), again)


def _part(shard: str | None, out: str | None, force: bool, processes: int) -> Shard | None:
    """The shard that was asked for, if any."""
    if shard is None and force:
        raise UsageError("--force is for a shard that was measured before: give --shard, or leave it out.")
    if shard is None:
        return None
    part = Shard.parse(shard)
    if out is None:
        raise UsageError("--shard leaves sums behind, so it needs a folder for them: give --out.")
    if processes > 1:
        raise UsageError("torchrun deals the images out itself; --shard is for processes that start on their own.")
    return part


def _measure_shard(
    part: Shard,
    folder: Path,
    force: bool,
    command: str,
    model: str | None,
    images: str | None,
    arguments: dict[str, Any],
) -> None:
    """Measure a shard and save it, or find that this was done before."""
    from collapse_probe.analysis import measure
    from collapse_probe.partial import Partial

    finished = None
    if not force:
        with contextlib.suppress(DamagedFileError):  # nothing there, or nothing of use
            finished = Partial.load(folder)
        if finished is not None and not finished.state and finished.shard != part:
            raise UsageError(
                f"{folder} holds shard {finished.shard}. Give shard {part} a folder of its own, or --force."
            )
    partial = measure(model, images, shard=part, finished=finished, **arguments)
    if partial is finished:
        arguments["progress"].note(
            f"{folder} holds shard {part} of this run already: nothing was measured. To measure it again: --force."
        )
        return
    partial.provenance["command"] = command
    partial.save(folder)
    arguments["progress"].note(f"Shard {part}: sums over {partial.images} images written to {folder}.")
