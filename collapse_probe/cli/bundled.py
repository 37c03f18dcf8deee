"""`collapse-probe analyze` without a model: the bundled ViT and DeepViT side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse_probe.errors import UsageError
from collapse_probe.progress import ProgressBar

if TYPE_CHECKING:
    from collapse_probe.result import Analysis

#: What is analysed: label -> name of the model, which of its maps, and the folder in --out.
SIDES = {
    "ViT": ("digits_vit_24b", "applied", "vit"),
    "DeepViT": ("digits_deepvit_24b", "applied", "deepvit"),
    "DeepViT, softmax underneath": ("digits_deepvit_24b", "softmax", "deepvit_softmax"),
}


def introduction(as_shipped: bool = True) -> list[str]:
    """What a newcomer needs to know before the pictures: paragraphs.

    Args:
        as_shipped: whether everything is measured as it is by default; the second paragraph is about that only.
    """
    plain, mixed = (_accuracy(name) for name in ("digits_vit_24b", "digits_deepvit_24b"))
    what = (
        "Two small vision transformers of 24 blocks that ship with collapse_probe, trained alike on hand-written "
        "digits. They differ in one thing: DeepViT (arXiv 2103.11886) mixes the attention maps of its heads after the "
        f"softmax (Re-attention), to keep blocks from attending alike. The ViT recognises {plain} of unseen digits, "
        f"the DeepViT {mixed}."
    )
    to_see = (
        "What to see: the blocks of the ViT share much of their attention (M is about 0.7, below the 0.9 from which "
        "the verdict calls blocks similar), and share it between different images, too: a habit, not a reading of the "
        "image. The mixed maps of the DeepViT have next to nothing in common. But its softmax maps, before they are "
        "mixed, attend to every token almost alike in every block: Re-attention enlarges what little they differ in."
    )
    return [what, to_see] if as_shipped else [what]


def _accuracy(name: str) -> str:
    from safetensors import safe_open

    from collapse_probe.models import bundled_weights

    with safe_open(bundled_weights(name), "np") as file:
        return f"{json.loads(file.metadata()['recipe'])['test_accuracy']:.1%}".replace("%", " %")


def analyze_pair(
    arguments: dict[str, Any], images: str | None, out: str | None, progress: ProgressBar, command: str
) -> None:
    """Analyse the bundled models, write everything into a folder if one is given, and print them side by side.

    Args:
        arguments: of :func:`collapse_probe.analyze`, without model and images.
        images: folder of images; the bundled ones without it.
        out: receives a folder for each analysis and `report.html`, which shows all.
        progress: shows which one is at work.
        command: what the user typed, for the provenance.

    Raises:
        UsageError: an option that is about one model.
    """
    from collapse_probe.analysis import analyze
    from collapse_probe.files import check_writable
    from collapse_probe.ratio import SIMILAR

    _check_options(arguments)
    if out is not None:
        for _, _, folder in SIDES.values():
            check_writable(Path(out) / folder)
    analyses: dict[str, Analysis] = {}
    for label, (name, maps, _) in SIDES.items():
        progress.note(f"Analysing {label} ({name})")
        analysis = analyze(name, images, **{**arguments, "attention": maps})
        analysis.provenance["command"] = command
        analyses[label] = analysis
    if out is not None:
        as_shipped = images is None and not arguments["layers"] and arguments["threshold"] == SIMILAR
        _write(analyses, Path(out), introduction(as_shipped), progress)
    _show(analyses, out)


def _write(analyses: dict[str, Analysis], out: Path, paragraphs: list[str], progress: ProgressBar) -> None:
    """A folder for each analysis and the page that shows all, or nothing."""
    from collapse_probe.cli.results import fill
    from collapse_probe.files import staged
    from collapse_probe.plots.save import figure_files
    from collapse_probe.report.comparison import write_comparison

    progress.note(f"Writing {out}")
    links = {label: f"{folder}/report.html" for label, (_, _, folder) in SIDES.items()}
    figures = [f"{folder}/figures/{name}" for _, _, folder in SIDES.values() for name in figure_files()]
    with staged(out, optional=figures) as stage:
        for label, analysis in analyses.items():
            fill(analysis, stage / SIDES[label][2])
        write_comparison(analyses, stage / "report.html", paragraphs, links)


def _check_options(arguments: dict[str, Any]) -> None:
    """Both models are analysed as they ship, by both kinds of maps."""
    chosen = {
        "--attention": arguments["attention"] != "applied",
        "--no-pretrained": not arguments["pretrained"],
        "--use-ema": arguments["use_ema"],
        "--model-kwargs": bool(arguments["model_kwargs"]),
        "--img-size": arguments["img_size"] is not None,
    }
    for option, given in chosen.items():
        if given:
            raise UsageError(
                f"{option} is about one model, and without a name two are analysed side by side. Name it, for example: "
                "collapse-probe analyze digits_vit_24b"
            )


def _show(analyses: dict[str, Analysis], out: str | None) -> None:
    from collapse_probe.cli.output import PipeConsole, printing
    from collapse_probe.report.terminal import print_comparison

    closing = ["Each alone: collapse-probe analyze digits_vit_24b, collapse-probe analyze digits_deepvit_24b"]
    if out is not None:
        folders = ", ".join(f"{folder}/" for _, _, folder in SIDES.values())
        closing.append(f"Written to {out}: report.html (side by side), {folders}")
    with printing():
        print_comparison(analyses, PipeConsole(), closing)
