"""Does a model need the attention that it computes? Its maps are replaced, and the test digits are counted again.

    python examples/swap_attention.py                          # the bundled ViT and DeepViT
    python examples/swap_attention.py local-dir:study/runs/vit-12-seed0/model …

In every block the softmax maps are replaced by those that the block computes for another image (which leaves what does
not depend on the image), by uniform ones, or by nothing at all. In a DeepViT this happens before Re-attention mixes
the heads, so that it shows whether the small differences between nearly uniform maps are what the model works with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import image_sets
import timm
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training import accuracy

import collapse_probe as cp
from collapse_probe.errors import CollapseProbeError, UsageError
from collapse_probe.models import BUNDLED

#: What is done to softmax maps [B, H, Q, K] of the images of a batch; the same shift in every block.
SWAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "its own maps": lambda maps: maps,
    "another image's": lambda maps: maps.roll(1, dims=0),
    "uniform": lambda maps: torch.full_like(maps, 1 / maps.shape[-1]),
    "none": torch.zeros_like,
}


class Swapped(nn.Module):
    """An attention module of a ViT or DeepViT that applies other maps than it computes."""

    def __init__(self, attention: nn.Module, swap: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention, self.swap = attention, swap

    def forward(self, x: Tensor) -> Tensor:
        own = self.attention
        batch, tokens, dim = x.shape
        q, k, v = own.qkv(x).view(batch, tokens, 3, own.num_heads, -1).permute(2, 0, 3, 1, 4)
        maps = self.swap((q @ k.mT * own.scale).softmax(-1))
        if hasattr(own, "reatten_matrix"):
            maps = own.var_norm(own.reatten_matrix(maps)) * own.reatten_scale
        return own.proj((maps @ v).transpose(1, 2).reshape(batch, tokens, dim))


def accuracies(source: str, data: image_sets.ImageSet) -> list[float]:
    """Test accuracy of a model under each of :data:`SWAPS`.

    Raises:
        CollapseProbeError: it cannot be loaded, or takes other images.
    """
    reached = []
    for swap in SWAPS.values():
        model = cp.load_model(source)
        if timm.data.resolve_model_data_config(model)["input_size"] != (1, 8, 8):
            raise UsageError(f"{source} does not take digits of 8x8 grey pixels.")
        for block in model.blocks:
            block.attn = Swapped(block.attn, swap)
        reached.append(accuracy(model, data))
    return reached


def main(
    sources: Annotated[
        list[str] | None, typer.Argument(help="Models for 8x8 digits: names or files; the bundled pair without any.")
    ] = None,
) -> None:
    """Count the test digits again with other softmax maps than the model computes."""
    with tempfile.TemporaryDirectory() as folder:
        image_sets.prepare("digits", Path(folder), 8, Path(folder) / "data", lambda *_: None)
        data = image_sets.load(Path(folder) / "data")
        shown = Table("test accuracy with", *SWAPS, box=box.SIMPLE_HEAD)
        for source in sources or BUNDLED:
            shown.add_row(source, *(f"{reached:.3f}" for reached in accuracies(source, data)))
        Console().print(shown)


def command() -> None:
    """Errors as sentences."""
    try:
        typer.run(main)
    except CollapseProbeError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    command()
