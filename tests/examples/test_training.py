"""The training loop: schedule, augmentation, and that an interrupted training ends where an uninterrupted one does."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from image_sets import ImageSet
from torch import nn
from training import RECIPES, Recipe, accuracy, augment, learning_rate, normalise, train, train_epoch

from collapse_probe.errors import UsageError

STILL = Recipe(epochs=3, batch_size=4, rotation=0, shift=0, zoom=0)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (30, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(30) % 3
    images[labels == 1] //= 4
    images[labels == 2, 0] = 255
    return ImageSet("squares", 3, images[:24], labels[:24], images[24:], labels[24:], (0.4, 0.4, 0.4), (0.3, 0.3, 0.3))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(192, 16), nn.GELU(), nn.Linear(16, 3))


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step / 100, Recipe(1, 1, lr=2.0)) for step in range(101)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == max(rates) == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))


def test_augmentation_moves_by_the_stated_amounts():
    image = torch.zeros(200, 1, 8, 8)
    image[:, :, 3:5, 3:5] = 1.0
    torch.manual_seed(0)
    moved = augment(image, dataclasses.replace(STILL, shift=0.125))
    torch.testing.assert_close(moved.sum((1, 2, 3)), torch.full((200,), 4.0))
    centres = (moved * torch.arange(8.0)).sum((1, 2, 3)) / 4 - 3.5
    assert 0.9 < centres.abs().max() <= 1.0 + 1e-5
    torch.testing.assert_close(augment(image, STILL), image)


def test_rotation_is_rigid(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.fill_(1.0))
    image = torch.rand(1, 3, 8, 8)
    turned = augment(image, dataclasses.replace(STILL, rotation=90.0))
    torch.testing.assert_close(turned, image.rot90(1, (2, 3)), atol=1e-5, rtol=1e-5)


def test_half_of_the_images_are_mirrored_where_that_is_wanted():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 8, 8).expand(400, -1, -1, -1)
    moved = augment(image, dataclasses.replace(STILL, flip=True))
    mirrored = (moved - image.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    same = (moved - image).abs().amax((1, 2, 3)) < 1e-5
    assert (mirrored | same).all()
    assert 0.4 < mirrored.double().mean() < 0.6


def test_normalised_images_have_mean_0_and_deviation_1(data):
    images = torch.full((2, 3, 8, 8), 0.4)
    images[1] = 0.7
    assert normalise(images, data)[0].abs().max() < 1e-6
    torch.testing.assert_close(normalise(images, data)[1], torch.ones(3, 8, 8))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_learn(data, name, tmp_path):
    recipe = RECIPES[name].changed(epochs=60, batch_size=8, lr=0.01)
    losses = []
    model = train(
        network(), data, recipe, seed=0, state=tmp_path / "state.pt", after_epoch=lambda _, x: losses.append(x)
    )
    assert len(losses) == 61
    assert math.isnan(losses[0])
    assert losses[-1] < 0.7 * losses[1]
    assert not model.training
    assert accuracy(model, data) > 0.6  # a guess is right in a third


def test_accuracy_is_counted_over_all_test_images(data):
    model = network().eval()
    naive = sum(
        int(model(normalise(image[None] / 255, data)).argmax()) == int(label)
        for image, label in zip(data.test_images, data.test_labels, strict=True)
    )
    assert accuracy(model.train(), data) == naive / 6
    assert not model.training


@pytest.mark.parametrize("mix", [False, True])
def test_an_interrupted_training_ends_with_the_same_weights(data, tmp_path, mix):
    recipe = Recipe(epochs=4, batch_size=8, drop_path=0.1, flip=True, mix=mix)
    whole = train(network(), data, recipe, seed=5, state=tmp_path / "whole.pt", after_epoch=lambda *_: None)

    def stop(epoch, _):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), data, recipe, seed=5, state=tmp_path / "parts.pt", after_epoch=stop)
    seen = []
    parts = train(
        network(9), data, recipe, seed=5, state=tmp_path / "parts.pt", after_epoch=lambda epoch, _: seen.append(epoch)
    )
    assert seen == [2, 3, 4]  # the epoch in whose end it was interrupted is repeated
    for first, second in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(first, second)
    train(network(), data, recipe, seed=5, state=tmp_path / "parts.pt", after_epoch=lambda *_: pytest.fail("done"))


def test_seeds_differ(data, tmp_path):
    first, second = (
        train(network(), data, STILL, seed=seed, state=tmp_path / f"{seed}.pt", after_epoch=lambda *_: None)
        for seed in (0, 1)
    )
    assert not torch.equal(first[2].weight, second[2].weight)


def test_a_state_of_another_training_is_not_continued(data, tmp_path):
    train(network(), data, STILL, seed=0, state=tmp_path / "state.pt", after_epoch=lambda *_: None)
    with pytest.raises(UsageError, match="other settings"):
        train(network(), data, STILL, seed=1, state=tmp_path / "state.pt", after_epoch=lambda *_: None)


def test_a_training_that_diverges_says_so(data):
    model = network()
    with torch.no_grad():
        model[2].weight.fill_(float("inf"))
    with pytest.raises(UsageError, match="diverged"):
        train_epoch(model, torch.optim.SGD(model.parameters(), 0.1), data, STILL, 1)
