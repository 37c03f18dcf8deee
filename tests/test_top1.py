"""Counting right answers: what is counted, and what is no answer."""

from __future__ import annotations

import numpy as np
import torch

from collapse_probe.loading import Labels
from collapse_probe.top1 import Top1

#: Class of the image at each place; two are not known.
INDEX = np.array([2, 0, -1, 1, -1, 2])


def counter(classes=3):
    asked = []

    def find(outputs):
        asked.append(outputs)
        return Labels(INDEX, classes, "by hand") if outputs == classes else None

    return Top1(find), asked


def answers(*classes):
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()


def test_images_without_label_are_not_counted():
    top1, asked = counter()
    top1.see(answers(2, 1, 0), torch.tensor([0, 1, 2]))
    top1.see(answers(1, 2), torch.tensor([3, 4]))
    top1.settle(5)
    assert (top1.correct, top1.labelled) == (2, 3)
    assert asked == [3]
    assert top1.result(top1.described()["labels"]) == {
        "correct": 2, "labelled": 3, "accuracy": 2 / 3, "se": (2 / 9 / 3) ** 0.5, "classes": 3, "labels": "by hand",
    }  # fmt: skip


def test_the_index_and_not_the_arrival_tells_the_label():
    top1, _ = counter()
    top1.see(answers(2, 2, 1), torch.tensor([5, 0, 3]))
    assert (top1.correct, top1.labelled) == (0, 0)  # not before the other sums hold these images
    top1.settle(5)
    assert (top1.correct, top1.labelled) == (2, 2)
    top1.settle(6)
    assert (top1.correct, top1.labelled) == (3, 3)


def test_outputs_that_are_no_logits():
    top1, asked = counter()
    index = torch.tensor([0, 1])
    for output in (None, (answers(2, 0),), {"logits": answers(2, 0)}, torch.zeros(2, 4, 3), torch.zeros(2),
                   torch.zeros(5, 3)):  # fmt: skip
        top1.see(output, index)
    assert asked == []
    assert top1.sums() == top1.described() == {}
    top1.see(torch.zeros(2, 7), index)
    top1.see(answers(2, 0), index)  # whether there are labels is asked once
    assert asked == [7]
    assert top1.sums() == {}


def test_nothing_labelled_is_no_result():
    top1, _ = counter()
    top1.see(answers(2), torch.tensor([2]))
    assert {name: int(value) for name, value in top1.sums().items()} == {
        "labels/top1/correct": 0, "labels/top1/labelled": 0,
    }  # fmt: skip
    assert top1.result(top1.described()["labels"]) == {}
    assert Top1().result({}) == {}
