"""A training loop for vision transformers that can be interrupted at any time, and the recipe that it follows.

    model = train(model, dataset, RECIPES["digits"], seed=0, state=Path("state.pt"), after_epoch=look)

What `after_epoch` does with the model between two epochs is the caller's affair. `depth_study.py` analyses it there:

    def look(epoch, loss):
        analysis = collapse_probe.analyze(model.eval(), images)

The recipe is the usual one for small vision transformers (Touvron et al., arXiv 2012.12877, without distillation and
with light augmentation): AdamW, linear warm-up, cosine decay, clipped gradients, label smoothing, stochastic depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from image_sets import ImageSet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.transforms import v2

from collapse_probe.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs, batch_size, weight_decay: as usual.
        lr: the largest learning rate.
        warmup: share of the training during which the learning rate rises.
        clip_norm: gradients longer than this are shortened to it.
        label_smoothing: probability that is spread over all classes.
        drop_path: stochastic depth in the last block; it rises linearly from 0.
        rotation, shift, zoom: each image is turned by up to so many degrees, shifted by up to this share of its side
            and resized by up to this share.
        flip: mirror half of the images.
        mix: blend half of the batches, by CutMix (arXiv 1905.04899) or Mixup (arXiv 1710.09412).
    """

    epochs: int
    batch_size: int
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    drop_path: float = 0.0
    rotation: float = 10.0
    shift: float = 0.125
    zoom: float = 0.1
    flip: bool = False
    mix: bool = False

    def changed(self, **changes: Any) -> Recipe:
        """Another recipe, with what is not None replaced."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


RECIPES = {
    "digits": Recipe(epochs=80, batch_size=64),
    "cifar10": Recipe(epochs=120, batch_size=128, drop_path=0.1, flip=True, mix=True),
    "folder": Recipe(epochs=100, batch_size=128, drop_path=0.1, flip=True, mix=True),
}


def train(
    model: nn.Module,
    data: ImageSet,
    recipe: Recipe,
    *,
    seed: int,
    state: Path,
    after_epoch: Callable[[int, float], None],
) -> nn.Module:
    """Train a model where it is, continuing from `state` if an earlier call left it.

    Args:
        model: its parameters' device is used.
        data: the training images.
        recipe: how.
        seed: of order, augmentation and stochastic depth. They are drawn anew from it in every epoch, so that a
            continued training ends where an uninterrupted one does.
        state: file that is written after every epoch.
        after_epoch: called with the number of epochs done and the mean loss of the last one; first with 0 and NaN,
            before anything is learnt. An epoch counts as done when this has returned.

    Returns:
        The model, in evaluation mode.

    Raises:
        UsageError: `state` belongs to another training, or the loss is no number any more.
    """
    settings = {**asdict(recipe), "seed": seed, "images": len(data.train_images)}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay)
    done = -1
    if state.exists():
        try:
            saved = torch.load(state, weights_only=True, map_location="cpu")
        except Exception as error:  # torch and pickle raise anything on a damaged file
            raise UsageError(f"{state} cannot be read ({error}): remove it to start this training again.") from None
        if saved["settings"] != settings:
            raise UsageError(f"{state} belongs to a training with other settings; choose another --out.")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["epoch"]
    for epoch in range(done + 1, recipe.epochs + 1):
        torch.manual_seed(1000 * seed + epoch)
        loss = train_epoch(model, optimizer, data, recipe, epoch) if epoch else math.nan
        after_epoch(epoch, loss)
        held = {"settings": settings, "epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(held, state.with_suffix(".partial"))
        state.with_suffix(".partial").replace(state)
    return model.eval()


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: ImageSet, recipe: Recipe, epoch: int
) -> float:
    """Every training image once, in random order, in epoch 1, 2…; returns the mean loss."""
    model.train()
    device = next(model.parameters()).device
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    mix = v2.RandomApply([v2.RandomChoice([v2.CutMix(num_classes=data.classes), v2.MixUp(num_classes=data.classes)])])
    batches = torch.randperm(len(data.train_images)).split(recipe.batch_size)
    total = torch.zeros((), device=device)
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((epoch - 1 + (number + 1) / len(batches)) / recipe.epochs, recipe)
        images = augment(data.train_images[batch].to(device) / 255, recipe)
        labels: Tensor = data.train_labels[batch].to(device)
        if recipe.mix:
            images, labels = mix(images, labels)
        with autocast:
            loss = F.cross_entropy(model(normalise(images, data)), labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        total += loss.detach()
    mean = total.item() / len(batches)
    if not math.isfinite(mean):
        raise UsageError(f"The loss is {mean} in epoch {epoch}: the training has diverged. Lower the learning rate.")
    return mean


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Rises linearly until `warmup` of the training has passed, then falls to zero along a cosine."""
    if progress < recipe.warmup:
        return recipe.lr * progress / recipe.warmup
    return recipe.lr * (1 + math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup))) / 2


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Turn, shift, resize and perhaps mirror each image ``[B, C, S, S]`` a little; what enters at a border is black."""
    angle, zoom, right, down = torch.empty(4, len(images), device=images.device).uniform_(-1, 1)
    angle, zoom = angle * math.radians(recipe.rotation), 1 + zoom * recipe.zoom
    mirror = torch.ones_like(angle)
    if recipe.flip:
        mirror = 1 - 2 * torch.randint(2, angle.shape, device=images.device)
    shift = 2 * recipe.shift  # grid_sample counts from -1 to 1 across an image
    top = torch.stack([mirror * zoom * angle.cos(), -zoom * angle.sin(), right * shift], dim=1)
    bottom = torch.stack([mirror * zoom * angle.sin(), zoom * angle.cos(), down * shift], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def normalise(images: Tensor, data: ImageSet) -> Tensor:
    """Pixels from 0..1 to the mean and standard deviation of the training images."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (data.mean, data.std))
    return (images - mean) / std


@torch.inference_mode()
def accuracy(model: nn.Module, data: ImageSet) -> float:
    """Share of the test images whose largest logit is their label; leaves the model in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for images, labels in zip(data.test_images.split(256), data.test_labels.split(256), strict=True):
        logits = model(normalise(images.to(device) / 255, data))
        right += int((logits.argmax(1).cpu() == labels).sum())
    return right / len(data.test_labels)
