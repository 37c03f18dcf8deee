"""Standard errors of the image-independent part of M, from pairs of images within small blocks.

The image-independent part is a U-statistic: the mean of a kernel h(b, b') over all pairs of different images. Its
variance is `4 (n-2) / (n (n-1)) z1 + 2 / (n (n-1)) z2` with `z1 = Cov(h(1,2), h(1,3))` and `z2 = Var h(1,2)`
(Hoeffding 1948). Treating the part as a constant misses it by a large factor, and bootstrap replicates of the sums over
all columns would each cost as much memory as the part itself. A few images that are compared with each other directly
give both covariances as plain sums over blocks, which merge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from collapse_probe.metrics.moments import without_rounding


class PairSums(NamedTuple):
    """Sums over complete blocks of m images; every field has the shape of the readings, `[parts, L, L]`.

    Attributes:
        blocks: number of blocks that count.
        kernel: the block's mean h over its pairs.
        kernel_squared: the square of that mean.
        shared: mean product of the kernels of two pairs that share one image.
        squared: mean square of the kernel.
        own: the block's mean of M over its images.
        own_squared: the square of that mean.
        own_kernel: product of the two means.
        own_shared: mean product of an image's M with the kernels of its pairs.
    """

    blocks: Tensor
    kernel: Tensor
    kernel_squared: Tensor
    shared: Tensor
    squared: Tensor
    own: Tensor
    own_squared: Tensor
    own_kernel: Tensor
    own_shared: Tensor

    def mean(self) -> Tensor:
        """The image-independent part over the pairs within blocks."""
        return self.kernel / self.blocks

    def errors_of_blocks(self) -> tuple[Tensor, Tensor]:
        """Standard errors of :meth:`mean` and of M minus it: blocks are independent of each other."""
        return self._block_error(self.kernel, self.kernel_squared), self._block_error(
            self.own - self.kernel, self.own_squared - 2 * self.own_kernel + self.kernel_squared
        )

    def errors_of_all_pairs(self, images: float, similarity_se: Tensor) -> tuple[Tensor, Tensor]:
        """Standard errors of the part summed over all pairs of images, and of M minus it.

        Args:
            images: how many images were paired.
            similarity_se: standard error of the mean of M.
        """
        blocks = self._enough()
        between = blocks * (blocks - 1)
        squared_mean = (self.kernel**2 - self.kernel_squared) / between  # unbiased: products of different blocks only
        z1 = without_rounding(self.shared / blocks - squared_mean, 1.0)
        z2 = without_rounding(self.squared / blocks - squared_mean, 1.0)
        variance = (4 * (images - 2) * z1 + 2 * z2) / (images * (images - 1))
        with_own = self.own_shared / blocks - (self.own * self.kernel - self.own_kernel) / between
        excess = similarity_se**2 + variance - 4 / images * with_own
        # The difference of estimates can fall below zero by chance; the blocks' own scatter never does.
        floor = self.errors_of_blocks()[1] ** 2
        return variance.sqrt(), torch.where(without_rounding(excess, 1.0) > 0, excess, floor).sqrt()

    def _block_error(self, total: Tensor, squares: Tensor) -> Tensor:
        blocks = self._enough()
        spread = without_rounding(squares - total**2 / blocks, blocks)
        return (spread / (blocks * (blocks - 1))).sqrt()

    def _enough(self) -> Tensor:
        return self.blocks.masked_fill(self.blocks < 2, torch.nan)


def pair_sums(crossed: Tensor, counts: Tensor, own: Tensor) -> PairSums:
    """One block's contribution.

    Args:
        crossed: `[parts, m, m, L, L]`, sums over columns of the cosine between layer p on image b and layer q on b'.
        counts: the same shape, how many columns each sum holds.
        own: `[parts, m, L, L]`, each image's mean M.
    """
    size = crossed.shape[1]
    ordered = crossed / counts
    kernel = (ordered + ordered.transpose(1, 2)) / 2  # either image may be the one that layer p saw
    different = ~torch.eye(size, dtype=torch.bool, device=crossed.device)
    kernel = torch.where(different[None, :, :, None, None], kernel, 0.0)
    by_image = kernel.sum(2)
    squares = (kernel**2).sum((1, 2))
    mean = by_image.sum(1) / (size * (size - 1))
    block = _of_means(mean, own.mean(1))._replace(
        shared=((by_image**2).sum(1) - squares) / (size * (size - 1) * (size - 2)),
        squared=squares / (size * (size - 1)),
        own_shared=(own * by_image).sum(1) / (size * (size - 1)),
    )
    return _where_known(block)


def block_sums(kernel: Tensor, own: Tensor) -> PairSums:
    """One block's contribution where only sums over all its pairs are known, enough for :meth:`PairSums.mean` and
    :meth:`PairSums.errors_of_blocks`.

    Args:
        kernel: `[parts, L, L]`, the mean over the block's pairs and columns, layer p on either image.
        own: the same shape, the block's mean of M over its images.
    """
    return _where_known(_of_means((kernel + kernel.mT) / 2, own))


def _of_means(kernel: Tensor, own: Tensor) -> PairSums:
    nothing = torch.zeros_like(kernel)
    return PairSums(
        blocks=torch.ones_like(kernel),
        kernel=kernel,
        kernel_squared=kernel**2,
        shared=nothing,
        squared=nothing,
        own=own,
        own_squared=own**2,
        own_kernel=own * kernel,
        own_shared=nothing,
    )


def _where_known(block: PairSums) -> PairSums:
    # A block in which some image lacks every column of a layer says nothing about that layer.
    valid = block.kernel.isfinite() & block.own.isfinite()
    return PairSums(*(torch.where(valid, value, 0.0) for value in block))
