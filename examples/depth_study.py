"""Does attention collapse with depth, and does Re-attention mend it? DeepViT's experiment, small and from scratch.

    python examples/depth_study.py --out study/                                # all of it, on digits
    python examples/depth_study.py --out small/ --depths 6,24 --seeds 1        # some of it
    python examples/depth_study.py --out cifar/ --dataset cifar10              # wants a GPU
    python examples/depth_study.py --out mine/ --data-dir pictures/            # train/<class>/ and val/<class>/

Plain ViTs and DeepViTs (Zhou et al., arXiv 2103.11886) of equal width are trained at several depths with one recipe and
several seeds, and analysed before, during and after training. `--out` receives one table, figures of the paper's kind,
and for each run its analyses and its weights. The same command continues where it was interrupted.

What came out of it: examples/README.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import image_sets
import pandas as pd
import study_figures
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from study_runs import ARCHITECTURES, MAPS, SIZES, Run, Size, cores, perform_all
from study_table import agreement, of_runs, summary, summary_table
from training import RECIPES

import collapse_probe as cp
from collapse_probe.errors import CollapseProbeError, UsageError
from collapse_probe.files import check_writable, write_atomically


def main(
    out: Annotated[
        Path, typer.Option(help="Folder for analyses, weights, and a table and figures of what this command names.")
    ],
    dataset: Annotated[str, typer.Option(help="digits or cifar10.")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="Train on a folder of images instead: train/<class>/ and val/<class>/.")
    ] = None,
    data_root: Annotated[
        Path, typer.Option(help="Where CIFAR-10 is, or is fetched to: torchvision's folder or an npz.")
    ] = Path("data"),
    depths: Annotated[str, typer.Option(help="Numbers of blocks.")] = "6,12,24,32",
    kinds: Annotated[str, typer.Option(help="Kinds of model.")] = "vit,deepvit",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each kind and depth.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Images in a training step.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Largest learning rate.")] = None,
    drop_path: Annotated[float | None, typer.Option(min=0, max=0.9, help="Stochastic depth.")] = None,
    width: Annotated[int | None, typer.Option(min=4, help="Channels of a token.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads per block.")] = None,
    patch_size: Annotated[int | None, typer.Option(min=1, help="Side of a patch in pixels.")] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="Side of the images of --data-dir in pixels.")] = None,
    images: Annotated[int, typer.Option(min=4, help="Test images that analyses look at.")] = 200,
    limit: Annotated[int | None, typer.Option(min=2, help="Train on the first so many images (a trial).")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at a time; 1 on a GPU, else one per core.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    compare: Annotated[
        Path | None, typer.Option(help="Table of an earlier study: does this one land within its spread?")
    ] = None,
) -> None:
    """Train ViTs and DeepViTs at several depths and see where attention collapses."""
    name = _data_set(dataset, data_dir, img_size)
    chosen_kinds = _chosen("--kinds", kinds, ARCHITECTURES)
    blocks = list(dict.fromkeys(_blocks(word) for word in depths.split(",")))
    size = _size(SIZES[name], embed_dim=width, num_heads=heads, patch_size=patch_size, img_size=img_size)
    recipe = RECIPES[name].changed(epochs=epochs, batch_size=batch_size, lr=lr, drop_path=drop_path)
    target = _device(device)
    earlier = None if compare is None else _earlier(compare, blocks, chosen_kinds)
    check_writable(out)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Reading images", total=None)
        source = data_dir or data_root
        image_sets.prepare(
            name, source, size.img_size, out / "data", lambda done, of: bar.update(task, completed=done, total=of)
        )
    runs = [
        Run(kind, depth, seed, size, recipe, out / "data", out / "runs", images, limit, target)
        for depth in blocks
        for kind in chosen_kinds
        for seed in range(first_seed, first_seed + seeds)
    ]
    problems = perform_all(runs, jobs or (1 if target != "cpu" else cores()))
    finished = [run for run in runs if run.finished]
    if finished:
        publish(finished, out)
    for problem in problems:
        typer.echo(f"Error: {problem}", err=True)
    agrees = earlier is None or not finished or _agrees(out, earlier)
    if problems or not agrees:
        raise typer.Exit(1)


def publish(runs: Sequence[Run], out: Path) -> None:
    """Table, figures and a summary of finished runs."""
    table = pd.concat([run.table() for run in runs], ignore_index=True)
    write_atomically(out / "depth_study.csv", table.to_csv(index=False, float_format="%.5g"))
    about = {**runs[0].settings, **_machine(runs[0].device)}
    write_atomically(out / "depth_study.json", json.dumps(about, indent=1) + "\n")
    heatmaps = {
        (run.kind, maps, run.depth, run.seed): cp.Analysis.load(run.analysis(run.recipe.epochs, maps)).similarity
        for run in runs
        for maps in MAPS[run.kind]
    }
    figures = study_figures.draw_all(table, heatmaps, out / "figures")
    Console(width=None if Console().is_terminal else 160).print(summary_table(summary(table)))
    typer.echo(f"Written to {out}: depth_study.csv, {len(figures)} figures, runs/ (analyses and weights)")


def _earlier(path: Path, depths: Sequence[int], kinds: Sequence[str]) -> pd.DataFrame:
    """The table of an earlier study, with what is to be compared. Raises UsageError where it cannot be."""
    if not path.is_file():
        raise UsageError(f"--compare {path}: there is no such file.")
    try:
        table = pd.read_csv(path)
        shared = table[table["depth"].isin(depths) & table["kind"].isin(kinds)]
        of_runs(shared)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--compare {path} is no table of a depth study: {error}.") from None
    if shared.groupby(["kind", "depth"])["seed"].nunique().max() < 2 or shared.empty:
        raise UsageError(f"--compare {path} holds no two seeds of any of these models, so there is no spread.")
    return table


def _agrees(out: Path, earlier: pd.DataFrame) -> bool:
    """Print how numbers stand to an earlier study's spread; whether all lie within."""
    compared = agreement(pd.read_csv(out / "depth_study.csv"), earlier)
    typer.echo(
        "\nCompared with the earlier study; low and high: prediction intervals for one more seed, 99 % for all\n"
    )
    typer.echo(compared.to_string(index=False, float_format="{:.3f}".format))
    typer.echo(f"\n{compared['within'].sum()} of {len(compared)} numbers lie within.")
    return bool(compared["within"].all())


def _data_set(dataset: str, data_dir: Path | None, img_size: int | None) -> str:
    if data_dir is not None:
        if not data_dir.is_dir():
            raise UsageError(f"--data-dir {data_dir}: there is no such folder.")
        return "folder"
    if dataset not in ("digits", "cifar10"):
        raise UsageError(f"--dataset {dataset}: there are digits and cifar10; for other images give --data-dir.")
    if img_size is not None:
        raise UsageError(f"--img-size is for --data-dir; the images of {dataset} stay as they are.")
    return dataset


def _chosen(option: str, words: str, known: Sequence[str] | dict[str, str]) -> list[str]:
    chosen = list(dict.fromkeys(words.split(",")))
    for word in chosen:
        if word not in known:
            raise UsageError(f"{option} {words}: {word!r} is none of {', '.join(known)}.")
    return chosen


def _blocks(word: str) -> int:
    if not word.strip().isdigit() or int(word) < 2:
        raise UsageError(f"--depths: {word!r} is no number of blocks, 2 or more. Write for example --depths 6,24.")
    return int(word)


def _size(size: Size, **changes: int | None) -> Size:
    size = replace(size, **{name: value for name, value in changes.items() if value is not None})
    if size.img_size % size.patch_size:
        raise UsageError(f"Images of {size.img_size} pixels cannot be cut into patches of {size.patch_size}.")
    if size.embed_dim % size.num_heads or size.embed_dim % 4:
        raise UsageError(f"A width of {size.embed_dim} is not a multiple of 4 and of the {size.num_heads} heads.")
    return size


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {wanted} cannot be used: {str(error).splitlines()[0]}") from None
    return wanted


def _machine(device: str) -> dict[str, str]:
    hardware = f"{device}, {cores()} CPU cores, {platform.machine()}"
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(torch.device(device))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "collapse-probe")}
    return {"device": hardware, **versions}


def command() -> None:
    """Errors as sentences, exit codes as those of `collapse-probe`."""
    # Ended by a batch system, working processes end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        typer.run(main)
    except CollapseProbeError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    command()
