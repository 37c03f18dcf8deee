"""Run the verdict on a panel of models and write `docs/verdict.md`: is every failure recognised, and nothing else?

python tools/verdict_panel.py --cache panel/                       # trains the small models once; about an hour
python tools/verdict_panel.py --cache panel/ --deit deit_tiny.safetensors --photographs folder/

The panel holds random initialisations, trained models, and trained models broken on purpose in one way each.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import typer
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import planted  # noqa: E402

import collapse_probe as cp  # noqa: E402
import collapse_probe.models  # noqa: E402  registers the bundled architectures
from collapse_probe.diagnosis import Thresholds, diagnose  # noqa: E402
from collapse_probe.files import write_atomically  # noqa: E402
from collapse_probe.result import Analysis  # noqa: E402

#: Small ViTs for digits: depth, width, heads, side of the image, patch size, epochs.
SMALL = {
    "6 blocks, width 64, 65 tokens": (6, 64, 4, 8, 1, 30),
    "12 blocks, width 48, 17 tokens": (12, 48, 3, 8, 2, 40),
    "24 blocks, width 64, 17 tokens": (24, 64, 4, 8, 2, 40),
    "4 blocks, width 192, 17 tokens": (4, 192, 6, 8, 2, 30),
    "8 blocks, width 96, 65 tokens": (8, 96, 6, 16, 2, 25),
    "6 blocks, width 64, 50 tokens": (6, 64, 2, 14, 2, 25),
}
SEEDS = (0, 1)

#: Random initialisations of many kinds; their side in pixels where it is not 224.
FRESH = {
    "vit_tiny_patch16_224": 224, "vit_small_patch16_224": 224, "vit_base_patch16_224": 224,
    "deit3_small_patch16_224": 224, "vit_small_patch14_reg4_dinov2": 224, "eva02_tiny_patch14_224": 224,
    "cait_xxs24_224": 224, "deepvit_s": 224, "swin_tiny_patch4_window7_224": 224, "swinv2_tiny_window8_256": 256,
    "pvt_v2_b1": 224, "mvitv2_tiny": 224, "gcvit_xxtiny": 224, "maxvit_tiny_rw_224": 224,
}  # fmt: skip

#: What is planted -> the finding that it should give.
EXPECTED = {
    "nothing (trained)": "healthy",
    "attention copied from block to block": "attention-collapse",
    "heads copied": "head-redundancy",
    "logits 30 times too large": "entropy-collapse",
    "logits 100 times too large": "entropy-collapse",
    "tokens averaged": "token-collapse",
    "tokens with huge norms": "outlier-tokens",
    "heads without queries, keys, values": "dead-heads",
    "heads without values": "dead-heads",
    "heads cut off from what follows": "dead-heads",
    "a NaN": "non-finite",
    "nothing (random initialisation)": "uniform-attention",
    "random weights, attention sharpened": "untrained",
}

#: Either says that a network has not been trained.
_SYNONYMS = {"uniform-attention": {"uniform-attention", "untrained"}, "untrained": {"untrained"}}

INTRO = """# The verdict: thresholds, and a panel that they were tried on

Made by `python tools/verdict_panel.py`. Every finding states the threshold that decided and where it comes from.

## Thresholds

"""

PANEL = """
## Panel

Rows: what was planted; columns: in how many of the models a finding was raised as a problem or a warning (`healthy`
where there was none). Where a number stands in brackets, so many of them were notes. Bold: the finding that the row
should give.

"""

METHOD = """
Trained models: the bundled `digits_vit_24b`, {small}{deit}. Failures are planted into half of the blocks (models of
seed 0) or two thirds of them (seed 1), by the functions in `tests/planted.py`. Random initialisations: {fresh}, and
small ViTs for digits. *Random weights, attention sharpened*: queries and keys of random initialisations multiplied
until attention is as peaked as in trained models.

{misses}
"""


@dataclass(frozen=True)
class Member:
    """A model of the panel, before anything is planted."""

    name: str
    build: Callable[[], nn.Module]
    images: Callable[[], Tensor]
    share: float = 0.5


def plants(member: Member) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What is planted into a trained model."""

    def from_block(plant: Callable[..., nn.Module]) -> Callable[[nn.Module], nn.Module]:
        return lambda model: plant(model, round(len(model.blocks) * (1 - member.share)))

    return {
        "nothing (trained)": lambda model: model,
        "attention copied from block to block": from_block(planted.copy_attention),
        "heads copied": planted.copy_heads,
        "logits 30 times too large": partial(planted.saturate, factor=30.0),
        "logits 100 times too large": partial(planted.saturate, factor=100.0),
        "tokens averaged": from_block(planted.average_tokens),
        "tokens with huge norms": from_block(planted.plant_outliers),
        "heads without queries, keys, values": from_block(planted.kill_heads),
        "heads without values": from_block(planted.silence_heads),
        "heads cut off from what follows": from_block(partial(planted.silence_heads, part="proj")),
        "a NaN": from_block(planted.plant_nan),
    }


def small_model(cache: Path, name: str, seed: int) -> nn.Module:
    """A trained small ViT, from the cache where it is there."""
    depth, width, heads, size, patch, epochs = SMALL[name]
    path = cache / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = planted.small_vit(depth, width, heads, size, patch)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    model = planted.train(model, epochs, seed, size)
    cache.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model


def trained(cache: Path, deit: Path | None, photographs: Path | None) -> Iterator[Member]:
    """Every trained model."""
    digits = partial(_digits, 8)
    yield Member("digits_vit_24b", lambda: timm.create_model("digits_vit_24b", pretrained=True), digits)
    for name, settings in SMALL.items():
        for seed in SEEDS:
            build = partial(small_model, cache, name, seed)
            yield Member(f"{name}, seed {seed}", build, partial(_digits, settings[3]), 0.5 if seed == 0 else 2 / 3)
    if deit is not None and photographs is not None:
        yield Member("DeiT-Ti", partial(_deit, deit), partial(_photographs, photographs, _deit(deit)))


def untrained() -> Iterator[tuple[str, Member]]:
    """Every random initialisation, and some whose attention was sharpened."""
    for name, size in FRESH.items():
        kwargs = {"img_size": size} if "dinov2" in name else {}
        build = partial(_seeded, 1, timm.create_model, name, **kwargs)
        yield "nothing (random initialisation)", Member(name, build, partial(_noise, size))
    for number, (name, (depth, width, heads, size, patch, _)) in enumerate(SMALL.items()):
        build = partial(_seeded, number, planted.small_vit, depth, width, heads, size, patch)
        member = Member(f"{name}, untrained", build, partial(_digits, size))
        yield "nothing (random initialisation)", member
        sharpened = Member(member.name, lambda build=build: _sharpened(build()), member.images)
        yield "random weights, attention sharpened", sharpened


def _digits(size: int) -> Tensor:
    return planted.digit_images(size)[2][:64]


def _noise(size: int) -> Tensor:
    """Smooth random pictures: plain noise has no neighbourhoods."""
    coarse = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, (size, size), mode="bicubic")


def _deit(path: Path) -> nn.Module:
    return cp.load_model(path, arch="deit_tiny_patch16_224")


def _photographs(folder: Path, model: nn.Module) -> Tensor:
    from collapse_probe.loading import data_config, open_images

    source = open_images(folder, config=data_config(model), batch_size=32, num_samples=32)
    return torch.cat([batch.images for batch in source.batches()])


def _seeded(seed: int, build: Callable[..., nn.Module], *args: object, **kwargs: object) -> nn.Module:
    torch.manual_seed(seed)
    return build(*args, **kwargs).eval()


def _sharpened(model: nn.Module) -> nn.Module:
    """Queries and keys multiplied until a random network attends as sharply as a trained one."""
    with torch.no_grad():
        for block in model.blocks:
            for part in block.attn.qkv.weight.chunk(3)[:2]:
                part.mul_(4.0)
    return model


def measured(member: Member, plant: Callable[[nn.Module], nn.Module], folder: Path) -> Analysis:
    """The analysis of a broken model, from the cache where it is there."""
    if not (folder / "analysis.json").exists():
        cp.analyze(plant(member.build().eval()), member.images(), batch_size=16).save(folder)
    return Analysis.load(folder)


def raised(analysis: Analysis) -> dict[str, bool]:
    """Codes of the findings, and whether each is more than a note."""
    return {finding.code: finding.severity != "note" for finding in diagnose(analysis)}


def table(rows: dict[str, list[dict[str, bool]]]) -> tuple[str, list[str]]:
    """The panel as Markdown, and what went wrong."""
    codes = list(dict.fromkeys([*EXPECTED.values(), "flat-attention", "attention-sinks"]))
    lines = [f"| planted | models | {' | '.join(codes)} |", "|---" * (len(codes) + 2) + "|"]
    for what, results in rows.items():
        cells = []
        for code in codes:
            firm, notes = (sum(result.get(code) is firm for result in results) for firm in (True, False))
            cell = str(firm) if firm else ""
            cell += f" ({notes})" if notes else ""
            cells.append(f"**{cell}**" if code == EXPECTED[what] else cell)
        lines.append(f"| {what} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(lines), codes


def wrong(what: str, result: dict[str, bool]) -> str:
    """What is wrong with a verdict on a model with something planted; empty where nothing is."""
    expected = _SYNONYMS.get(EXPECTED[what], {EXPECTED[what]})
    firm = {code for code, is_firm in result.items() if is_firm}
    if not expected & set(result):
        return f"missed {EXPECTED[what]}"
    return f"also {', '.join(sorted(firm - expected))}" if firm - expected else ""


def thresholds() -> str:
    """The cut-offs as a Markdown table."""
    lines = ["| threshold | value | published | source, or how it was calibrated |", "|---|---|---|---|"]
    for name, limit in Thresholds():
        lines.append(f"| `{name}` | {limit:.3g} | {'yes' if limit.published else 'ours'} | {limit.source} |")
    return "\n".join(lines) + "\n"


def main(
    cache: Annotated[Path, typer.Option(help="Folder for trained models and analyses; a second run continues there.")],
    deit: Annotated[Path | None, typer.Option(help="Weights of deit_tiny_patch16_224.")] = None,
    photographs: Annotated[Path | None, typer.Option(help="Folder of photographs for it.")] = None,
    write: Annotated[bool, typer.Option(help="Write docs/verdict.md, or only print the table.")] = True,
) -> None:
    """Print the panel; write docs/verdict.md."""
    warnings.simplefilter("ignore")
    jobs = [
        (what, member, plant)
        for member in trained(cache / "models", deit, photographs)
        for what, plant in plants(member).items()
    ]
    jobs += [(what, member, lambda model: model) for what, member in untrained()]
    rows: dict[str, list[dict[str, bool]]] = {what: [] for what in EXPECTED}
    misses = []
    for what, member, plant in track(jobs, description="panel"):
        folder = cache / "runs" / f"{member.name} - {what}".replace(" ", "_").replace("/", "_")
        result = raised(measured(member, plant, folder))
        rows[what].append(result)
        fault = wrong(what, result)
        if fault:
            misses.append(f"- {what}, {member.name}: {fault}")
    text, _ = table(rows)
    print(text, *misses, sep="\n")
    if write:
        summary = "No failure was missed and none was raised that was not planted."
        method = METHOD.format(
            small=f"{len(SMALL) * len(SEEDS)} small ViTs ({'; '.join(SMALL)}; {len(SEEDS)} seeds each)",
            deit=" and DeiT-Ti with ImageNet photographs" if deit else "",
            fresh=", ".join(f"`{name}`" for name in FRESH),
            misses="Wrong verdicts:\n\n" + "\n".join(misses) if misses else summary,
        )
        write_atomically(ROOT / "docs" / "verdict.md", INTRO + thresholds() + PANEL + text + "\n" + method)
    sys.exit(bool(misses))


if __name__ == "__main__":
    np.seterr(all="ignore")
    typer.run(main)
