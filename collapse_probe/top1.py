"""How often a model is right where labels are known: the quickest check that weights and preprocessing fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collapse_probe.loading.labels import Labels
    from collapse_probe.partial import Partial

#: Where the counts stand among a shard's sums.
OWNER, NAME = "labels", "top1"


class Top1:
    """Correct and labelled images of one pass, as whole numbers that merge by sum.

    Args:
        find: the labels for a model with so many outputs, by the place of each image; asked once, of the first batch
            of logits. None where images have no labels.
    """

    def __init__(self, find: Callable[[int], Labels | None] | None = None) -> None:
        self.labels: Labels | None = None
        self.correct = self.labelled = 0
        self._find = find
        self._known: dict[str, Any] = {}
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # places, whether labelled, whether right

    def see(self, output: Any, index: Tensor) -> None:
        """Take a batch: logits ``[B, classes]`` of the images at these places ``[B]``; other outputs are none.

        They are counted by :meth:`settle`, with the other sums over the same images.
        """
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(index):
            return
        if self._find is not None:
            self.labels, self._find = self._find(output.shape[1]), None
        if self.labels is None or output.shape[1] != self.labels.classes:
            return
        self._known = {"source": self.labels.source, "classes": self.labels.classes}
        wanted = torch.from_numpy(self.labels.index)[index]
        known = wanted >= 0
        self._waiting.append((index, known, known & (output.argmax(1).cpu() == wanted)))

    def settle(self, position: int) -> None:
        """Count the images before this place."""
        waiting, self._waiting = self._waiting, []
        for index, known, right in waiting:
            before = index < position
            self.labelled += int(known[before].sum())
            self.correct += int(right[before].sum())
            if not before.all():
                self._waiting.append((index[~before], known[~before], right[~before]))

    def restore(self, saved: Partial) -> None:
        """Go on from what an interrupted run counted."""
        self._known = dict(saved.provenance["images"].get("labels") or {})
        self.add(saved)

    def add(self, shard: Partial) -> None:
        """The counts of a shard to these."""
        sums = shard.sums_of(OWNER, NAME)
        self.correct += int(sums.get("correct", 0))
        self.labelled += int(sums.get("labelled", 0))

    def sums(self) -> dict[str, np.ndarray]:
        """The counts by name; nothing where no labels are known."""
        if not self._known:
            return {}
        counts = {"correct": self.correct, "labelled": self.labelled}
        return {f"{OWNER}/{NAME}/{name}": np.array(count, dtype=np.int64) for name, count in counts.items()}

    def described(self) -> dict[str, Any]:
        """How labels are known, for the provenance of the images; nothing where they are not."""
        return {"labels": self._known} if self._known else {}

    def result(self, labels: Mapping[str, Any]) -> dict[str, Any]:
        """What all shards give together; nothing without labelled images.

        Args:
            labels: as :meth:`described` gave them.

        Returns:
            ``correct`` of ``labelled`` images; ``accuracy`` 0 to 1 with its binomial standard error ``se``; how many
            ``classes`` there are; how ``labels`` are known.
        """
        if not self.labelled:
            return {}
        accuracy = self.correct / self.labelled
        return {
            "correct": self.correct,
            "labelled": self.labelled,
            "accuracy": accuracy,
            "se": math.sqrt(accuracy * (1 - accuracy) / self.labelled),
            "classes": labels["classes"],
            "labels": labels["source"],
        }
