"""The trainings of a depth study: what one is, what it leaves behind, and how several go on side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import image_sets
import pandas as pd
import timm
import torch
from image_sets import ImageSet
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from study_table import ACCURACY, READINGS
from timm.layers import build_sincos2d_pos_embed
from timm.models import save_for_hf
from torch import nn
from training import Recipe, accuracy, normalise, train

import collapse_probe as cp
import collapse_probe.models  # registers DeepViT with timm
from collapse_probe.errors import CollapseProbeError, UsageError
from collapse_probe.files import write_atomically

#: Kind -> the registered architecture; the two differ in nothing but Re-attention in every block.
ARCHITECTURES = {"vit": "deepvit_vit_24b", "deepvit": "deepvit_24b"}
#: The maps that a kind is analysed by: what multiplies the values, and under Re-attention also the softmax before it.
MAPS = {"vit": ("applied",), "deepvit": ("applied", "softmax")}


@dataclass(frozen=True)
class Size:
    """What all models of a study have in common, by the names of the architecture's arguments."""

    img_size: int
    patch_size: int
    in_chans: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float


SIZES = {
    "digits": Size(img_size=8, patch_size=2, in_chans=1, embed_dim=64, num_heads=4, mlp_ratio=2.0),
    "cifar10": Size(img_size=32, patch_size=4, in_chans=3, embed_dim=192, num_heads=6, mlp_ratio=4.0),
    "folder": Size(img_size=64, patch_size=8, in_chans=3, embed_dim=192, num_heads=6, mlp_ratio=4.0),
}


@dataclass(frozen=True)
class Run:
    """One training of a study.

    Attributes:
        kind, depth, seed: which.
        size, recipe: what it has in common with the others.
        data: folder of the prepared images.
        parent: folder of all runs.
        images: how many test images its analyses look at.
        limit: how many training images at most.
        device: where.
    """

    kind: str
    depth: int
    seed: int
    size: Size
    recipe: Recipe
    data: Path
    parent: Path
    images: int = 200
    limit: int | None = None
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.depth}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.parent / self.name

    @property
    def readings(self) -> Path:
        """The table that a finished run leaves behind."""
        return self.folder / "readings.csv"

    @property
    def finished(self) -> bool:
        return self.readings.exists()

    def table(self) -> pd.DataFrame:
        """The readings of a finished run. Raises UsageError where the table is not whole."""
        try:
            table = pd.read_csv(self.readings)
        except ValueError:
            table = pd.DataFrame()
        rows = self.depth * len(self.looks) * len(MAPS[self.kind])
        if len(table) != rows or table.iloc[-1].isna().any():
            raise UsageError(f"{self.readings} is damaged: remove {self.folder} to start this run again.")
        return table

    @property
    def looks(self) -> tuple[int, ...]:
        """When it is analysed: before training, after 1, 2, 5, 10, 20, 50… epochs, and at the end."""
        steps = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
        return (0, *(step for step in steps if step < self.recipe.epochs), self.recipe.epochs)

    @property
    def settings(self) -> dict[str, Any]:
        """What its results depend on beside kind, depth and seed."""
        about = image_sets.about(self.data)
        sizes = {"size": asdict(self.size), "recipe": asdict(self.recipe)}
        return {"data": about, **sizes, "images_analysed_at_most": self.images, "training_images_at_most": self.limit}

    def analysis(self, epoch: int, maps: str) -> Path:
        """The folder of one of its analyses."""
        return self.folder / "analyses" / f"epoch{epoch:04d}-{maps}"


def build(run: Run, data: ImageSet) -> nn.Module:
    """An untrained model whose positions start as 2D sines: a small data set teaches little about what is near what."""
    torch.manual_seed(run.seed)
    model = timm.create_model(
        ARCHITECTURES[run.kind],
        depth=run.depth,
        num_classes=data.classes,
        drop_path_rate=run.recipe.drop_path,
        pretrained_cfg_overlay={
            "input_size": (run.size.in_chans, run.size.img_size, run.size.img_size),
            "mean": data.mean, "std": data.std, "crop_pct": 1.0,
        },
        **asdict(run.size),
    )  # fmt: skip
    sines = build_sincos2d_pos_embed(model.patch_embed.grid_size, dim=run.size.embed_dim, temperature=10)
    with torch.no_grad():
        model.pos_embed[0, model.num_prefix_tokens :] = sines
    return model


def perform(run: Run, watch: Callable[[int, float], None]) -> None:
    """Train, look at the attention in between, and leave analyses, weights and a table of readings behind.

    Args:
        run: what to do.
        watch: called after every epoch with its number and the test accuracy.

    Raises:
        UsageError: its folder belongs to a run with other settings.
    """
    check_settings(run)
    data = image_sets.load(run.data)
    watched = normalise(data.test_images[: run.images] / 255, data)
    data = data.limited(run.limit)
    model = build(run, data).to(run.device)

    def look(epoch: int, loss: float) -> None:
        reached = accuracy(model, data)
        if epoch in run.looks:
            tables = []
            for maps in MAPS[run.kind]:
                analysis = cp.analyze(model, watched, attention=maps, batch_size=128)
                analysis.save(run.analysis(epoch, maps))
                tables.append(_readings(analysis, run, epoch, maps))
            table = pd.concat(tables).assign(**{ACCURACY: reached, "train_loss": loss})
            write_atomically(_table_at(run, epoch), table.to_csv(index=False))
        watch(epoch, reached)

    train(model, data, run.recipe, seed=run.seed, state=run.folder / "state.pt", after_epoch=look)
    architecture = {"depth": run.depth, **asdict(run.size)}
    save_for_hf(model, run.folder / "model", model_args=architecture, safe_serialization=True)
    table = pd.concat([pd.read_csv(_table_at(run, epoch)) for epoch in run.looks])
    write_atomically(run.readings, table.to_csv(index=False))


def check_settings(run: Run) -> None:
    """Leave the settings beside the results. Raises UsageError where there are results with other ones."""
    path, settings = run.folder / "run.json", json.loads(json.dumps(run.settings))
    if not path.exists():
        write_atomically(path, json.dumps(settings, indent=1))
        return
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == settings
    except ValueError:
        raise UsageError(f"{path} is damaged: remove {run.folder} to start this run again.") from None
    if not same:
        raise UsageError(f"{run.folder} belongs to a study with other settings (see run.json): choose another --out.")


def _table_at(run: Run, epoch: int) -> Path:
    return run.folder / "analyses" / f"epoch{epoch:04d}.csv"


def _readings(analysis: cp.Analysis, run: Run, epoch: int, maps: str) -> pd.DataFrame:
    """A row for each block of the analysis, named by run, epoch and kind of map."""
    layers = analysis.layers.reset_index(drop=True)
    table = layers.reindex(columns=["block", *READINGS]).astype({"block": int})
    keys = {"kind": run.kind, "maps": maps, "depth": run.depth, "seed": run.seed, "epoch": epoch}
    for place, (name, value) in enumerate(keys.items()):
        table.insert(place, name, value)
    return table


# -- many runs side by side --------------------------------------------------------------------------------------------

_reports: Any = None


def _connect(reports: Any, threads: int) -> None:
    """In a working process: where to report to, and how many cores are its own."""
    global _reports
    _reports = reports
    torch.set_num_threads(threads)


def _work(run: Run) -> str:
    """Perform a run and report after every epoch; returns what went wrong."""
    try:
        perform(run, lambda epoch, reached: _reports.put((run.name, epoch, reached)))
    except CollapseProbeError as error:
        return f"{run.name}: {error}"
    except Exception as error:  # the other runs go on
        return f"{run.name}: {type(error).__name__}: {error}"
    return ""


@contextmanager
def _shown(reports: Any, total: int) -> Iterator[None]:
    """A progress bar over all epochs of all runs while the block runs; the run that reported last stands beside it."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
        TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip

    def follow() -> None:
        task, done = bar.add_task("Training", total=total), {}
        while (report := reports.get()) is not None:
            name, epoch, reached = report
            done[name] = epoch + 1  # a run that is continued does not report what was done before
            description = f"{name}, epoch {epoch}: accuracy {reached:.3f}"
            bar.update(task, description=description, completed=sum(done.values()))

    with bar:
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            reports.put(None)
            thread.join()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def perform_all(runs: Sequence[Run], jobs: int) -> list[str]:
    """Perform what is not finished, several at a time; returns what went wrong, a sentence for each run.

    Raises:
        UsageError: a run that is there already has other settings.
    """
    for run in runs:
        if run.folder.exists():
            check_settings(run)
    waiting = sorted((run for run in runs if not run.finished), key=lambda run: -run.depth)  # the longest first
    if not waiting:
        return []
    total = sum(run.recipe.epochs + 1 for run in waiting)
    jobs = min(jobs, len(waiting))
    threads = max(cores() // jobs, 1)
    if jobs == 1:
        reports: Any = queue.Queue()
        _connect(reports, threads)
        with _shown(reports, total):
            return [problem for problem in map(_work, waiting) if problem]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        reports = manager.Queue()
        with _shown(reports, total), context.Pool(jobs, _connect, (reports, threads)) as pool:
            return [problem for problem in pool.imap_unordered(_work, waiting) if problem]
