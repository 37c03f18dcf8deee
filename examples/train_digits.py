"""Train the bundled `digits_vit_12b` on scikit-learn's hand-written digits; writes what `collapse_probe/data` holds.

    pip install "collapse-probe[dev]"                # scikit-learn brings the images
    python examples/train_digits.py --out trained/   # weights and 64 test images; minutes on a laptop's CPU

The state is saved after every epoch; the same command continues where it stopped, and ends with the same weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.layers import build_sincos2d_pos_embed
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import collapse_probe.models  # noqa: F401  registers digits_vit_12b with timm
from collapse_probe.files import check_writable, write_atomically

ARCHITECTURE = "digits_vit_12b"
MODEL_KWARGS = {"img_size": 8, "patch_size": 1, "in_chans": 1, "num_classes": 10}
DATASET = "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, test part), 1797 images, 8x8"
SPLIT = "train_test_split(range(1797), test_size=0.25, random_state=0, stratify=labels): 1347 train, 450 test"
BATCH_SIZE, WEIGHT_DECAY, LABEL_SMOOTHING, CLIP_NORM, DROP_PATH = 32, 0.05, 0.1, 1.0, 0.05
ROTATION, SHIFT, ZOOM = 10.0, 1.0, 0.1  # degrees, pixels, relative size: largest change to a training image
TEST_IMAGES = 64


def load_pixels() -> tuple[np.ndarray, np.ndarray]:
    """Images as uint8 ``[1797, 8, 8]``, 0..16 scaled to 0..255 as the PNG files hold them, and labels ``[1797]``."""
    digits = load_digits()
    return np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test images, each in rising order; see `SPLIT`."""
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    return np.sort(train), np.sort(test)


def augment(images: Tensor) -> Tensor:
    """Turn, shift and resize each image ``[B, 1, 8, 8]`` (values 0..1) a little; what comes in at a border is black."""
    angle, zoom, right, down = torch.empty(4, len(images)).uniform_(-1, 1)
    angle, zoom = angle * math.radians(ROTATION), 1 + zoom * ZOOM
    shift = 2 * SHIFT / images.shape[-1]  # grid_sample counts from -1 to 1 across an image
    top = torch.stack([zoom * angle.cos(), -zoom * angle.sin(), right * shift], dim=1)
    bottom = torch.stack([zoom * angle.sin(), zoom * angle.cos(), down * shift], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def learning_rate(progress: float, peak: float, warmup: float = 0.1) -> float:
    """Rises linearly until a tenth of the training has passed, then falls to zero along a cosine."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


class Normalise(nn.Module):
    """Takes a model's mean and standard deviation from its data configuration."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.mean, self.std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    epoch: int,
    epochs: int,
    lr: float,
) -> float:
    """One pass over the training images in random order; returns the mean loss."""
    model.train()
    normalise, losses = Normalise(model.pretrained_cfg), []
    batches = torch.randperm(len(images)).split(BATCH_SIZE)
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((epoch + (number + 1) / len(batches)) / epochs, lr)
        logits = model(normalise(augment(images[batch])))
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their label."""
    model.eval()
    normalise = Normalise(model.pretrained_cfg)
    predicted = torch.cat([model(normalise(batch)).argmax(1) for batch in images.split(256)])
    return (predicted == labels).double().mean().item()


def export_weights(path: Path, model: nn.Module, recipe: dict[str, Any]) -> None:
    """The weights with everything needed to rebuild and to judge the model as metadata."""
    metadata = {
        "architecture": ARCHITECTURE,
        "model_kwargs": json.dumps(MODEL_KWARGS),
        "recipe": json.dumps(recipe),
        "mean": json.dumps(model.pretrained_cfg["mean"]),
        "std": json.dumps(model.pretrained_cfg["std"]),
        "license": "Apache-2.0 (weights); the images they were trained on: CC BY 4.0",
    }
    write_atomically(path, safetensors.torch.save(model.state_dict(), metadata=metadata))


def export_images(folder: Path, pixels: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> None:
    """Grey PNG files named by index and label."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        Image.fromarray(pixels[index]).save(folder / f"{index:04d}_label{labels[index]}.png")


def untrained_model(seed: int) -> nn.Module:
    """`digits_vit_12b` with its initial weights."""
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, drop_path_rate=DROP_PATH, weight_init="jax", **MODEL_KWARGS)
    # Positions start as 2D sines, which tell near pixels from far ones: 1347 images are few to learn that from.
    sines = build_sincos2d_pos_embed(model.patch_embed.grid_size, dim=model.embed_dim, temperature=10)
    with torch.no_grad():
        model.pos_embed[0, 1:] = sines
    return model


def describe(settings: dict[str, Any], train_images: int, test_accuracy: float) -> dict[str, Any]:
    """The recipe as the weights' metadata state it."""
    return {
        "dataset": DATASET,
        "split": SPLIT,
        "train_images": train_images,
        "epochs": settings["epochs"],
        "batch_size": BATCH_SIZE,
        "optimiser": f"AdamW, weight decay {WEIGHT_DECAY}, gradients clipped to norm {CLIP_NORM}",
        "learning_rate": f"{settings['lr']}, linear warm-up over a tenth of the steps, cosine to zero",
        "initial_weights": "timm weight_init='jax', positions as 2D sines of temperature 10",
        "augmentation": f"rotation ±{ROTATION:g}°, shift ±{SHIFT:g} pixel, zoom ±{ZOOM:.0%}",
        "regularisation": f"label smoothing {LABEL_SMOOTHING}, stochastic depth {DROP_PATH}",
        "seed": settings["seed"],
        "test_accuracy": round(test_accuracy, 4),
    }


def load_state(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run with the same settings saved, or None where there is none."""
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    if state["settings"] != settings:
        raise typer.BadParameter(f"{path} belongs to a run with {state['settings']}; choose another --out.")
    return state


def save_state(path: Path, **state: Any) -> None:
    """Written beside the target first: an interruption leaves the state of the epoch before."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the weights, the images and the resumable state.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 60,
    lr: Annotated[float, typer.Option(min=0, help="Largest learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of initial weights, order and augmentation.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Train on the first so many images only (a trial).")] = None,
) -> None:
    """Train digits_vit_12b; weights and test images go into OUT, progress to stderr, the result to stdout."""
    check_writable(out)
    settings = {"epochs": epochs, "lr": lr, "seed": seed, "limit": limit}
    pixels, targets = load_pixels()
    train, test = split(targets)
    used = train[:limit]
    images, labels = torch.from_numpy(pixels).unsqueeze(1) / 255, torch.from_numpy(targets)

    model, first = untrained_model(seed), 0
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=WEIGHT_DECAY)
    if state := load_state(out / "state.pt", settings):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        torch.manual_seed(seed + 1 + epoch)  # by epoch, so that a continued run draws what an uninterrupted one draws
        loss = train_epoch(model, optimizer, images[used], labels[used], epoch, epochs, lr)
        reached = accuracy(model, images[test], labels[test])
        typer.echo(f"epoch {epoch + 1}/{epochs}: loss {loss:.3f}, test accuracy {reached:.4f}", err=True)
        weights, moments = model.state_dict(), optimizer.state_dict()
        save_state(out / "state.pt", settings=settings, epoch=epoch + 1, model=weights, optimizer=moments)

    reached = accuracy(model, images[test], labels[test])
    export_weights(out / f"{ARCHITECTURE}.safetensors", model, describe(settings, len(used), reached))
    export_images(out / "digits", pixels, targets, test[:TEST_IMAGES])
    typer.echo(f"{out / ARCHITECTURE}.safetensors: test accuracy {reached:.4f} ({len(test)} images)")


if __name__ == "__main__":
    typer.run(main)
