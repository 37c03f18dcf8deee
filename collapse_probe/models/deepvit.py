"""DeepViT: vision transformers whose attention maps are mixed across heads after the softmax (Re-attention).

Zhou et al., "DeepViT: Towards Deeper Vision Transformer", arXiv 2103.11886. Sizes, layer order and parameter names
follow the authors' public repository (zhoudaquan/dvit_repo), so its state dicts load here and the other way round:

    Re-attention(Q, K, V) = Norm(Theta^T softmax(Q K^T / sqrt(d))) V

where Theta, `reatten_matrix`, is a 1x1 convolution over the heads and Norm, `var_norm`, a batch norm over the heads.
Where repository and equation differ, this module follows the repository: Theta has a bias, and `deepvit_S` multiplies
the mixed map by 1/sqrt(d) once more (`transform_scale`).

Models are registered under the repository's names and under short aliases, together with plain ViTs of the same sizes
(the baselines of the paper); all are timm models, built by `timm.create_model` once this module is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, nchw_to, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention, VisionTransformer, checkpoint_filter_fn, init_weights_vit_timm
from torch import Tensor, nn

from collapse_probe.errors import UsageError


class ReAttention(nn.Module):
    """Self-attention whose maps are mixed across heads between the softmax and the product with V.

    Takes and returns ``[B, N, C]``. The map that multiplies V has no unit row sums and may be negative.

    Args:
        dim: C, a multiple of ``num_heads``.
        num_heads: H.
        transform_scale: multiply the mixed map by 1/sqrt(C / H).
        attn_drop, proj_drop: dropout rates after the softmax and after the output projection.
    """

    def __init__(
        self, dim: int, num_heads: int, transform_scale: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.reatten_matrix = nn.Conv2d(num_heads, num_heads, kernel_size=1)
        self.var_norm = nn.BatchNorm2d(num_heads)
        self.reatten_scale = self.scale if transform_scale else 1.0
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        attention = self.attn_drop(attention)
        attention = self.var_norm(self.reatten_matrix(attention)) * self.reatten_scale
        x = (attention @ v).transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    """Pre-norm transformer block; both branches see ``a x`` and are divided by a, ``scale_adjustment``.

    ``x + branch(norm(a x)) / a``: a below 1 makes each branch's share of the residual stream larger (the repository's
    choice for its larger models; a = 1 is the usual block).
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        norm_layer: Callable[[int], nn.Module],
        mlp_ratio: float,
        scale_adjustment: float,
        proj_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.scale_adjustment = scale_adjustment

    def forward(self, x: Tensor) -> Tensor:
        a = self.scale_adjustment
        x = x + self.drop_path1(self.attn(self.norm1(x * a))) / a
        return x + self.drop_path2(self.mlp(self.norm2(x * a))) / a


class ConvStem(PatchEmbed):
    """Two convolutions to 64 channels, at half the resolution, before the patch projection.

    7x7 with stride 2, batch norm, ReLU, 3x3, batch norm, ReLU, then a projection of patch / 2: a token still covers
    ``patch_size`` pixels.
    """

    def __init__(self, in_chans: int = 3, embed_dim: int = 768, width: int = 64, **kwargs: Any) -> None:
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, **kwargs)
        if any(size % 2 for size in self.patch_size):
            raise UsageError(
                f"patch_size={self.patch_size}: the convolutional stem halves it; choose an even patch size."
            )
        half = (self.patch_size[0] // 2, self.patch_size[1] // 2)
        self.conv1 = nn.Conv2d(in_chans, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, embed_dim, kernel_size=half, stride=half)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """As in timm for another image size; a projection on top of a stem has no other patch size."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise UsageError(f"patch_size={patch_size}: build the model anew; the convolutional stem keeps its own.")
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[-2:])
        if self.strict_img_size and size != self.img_size:
            raise UsageError(f"Images of {size} pixels do not fit a model built for {self.img_size}; resize them.")
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, self.output_fmt)


class DeepVisionTransformer(VisionTransformer):
    """A timm `VisionTransformer` (class token, learnt positions) whose blocks may use Re-attention.

    Args:
        img_size, patch_size, in_chans, num_classes, global_pool, dynamic_img_size: as in timm.
        embed_dim, depth, num_heads, mlp_ratio: width, blocks, heads per block, hidden width of the MLP over width.
        re_attention: which blocks mix their maps: True for all, False for none, an int n for the last n (all of a
            shallower model), or the indices themselves.
        conv_stem: :class:`ConvStem` instead of one strided convolution.
        transform_scale: see :class:`ReAttention`.
        scale_adjustment: see :class:`Block`; above 0.
        drop_rate, pos_drop_rate, patch_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout rates as in
            timm; the last rises linearly from 0 in the first block.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "avgmax", "max", "token"] = "token",
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 12,
        mlp_ratio: float = 3.0,
        re_attention: bool | int | Sequence[int] = True,
        conv_stem: bool = False,
        transform_scale: bool = False,
        scale_adjustment: float = 1.0,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if embed_dim % num_heads:
            raise UsageError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}; change one of them.")
        if scale_adjustment <= 0:
            raise UsageError(f"scale_adjustment={scale_adjustment} must be above 0; 1 leaves the blocks unscaled.")
        mixing = _mixing_blocks(re_attention, depth)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=0,  # timm's blocks take one attention class for all; ours follow below
            num_heads=num_heads,
            dynamic_img_size=dynamic_img_size,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            patch_drop_rate=patch_drop_rate,
            embed_layer=ConvStem if conv_stem else PatchEmbed,
            norm_layer=norm_layer,
        )

        def attention(index: int) -> nn.Module:
            if index in mixing:
                return ReAttention(embed_dim, num_heads, transform_scale, attn_drop_rate, proj_drop_rate)
            return Attention(embed_dim, num_heads, qkv_bias=True, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate)

        def block(index: int) -> Block:
            drop_path = drop_path_rate * index / max(depth - 1, 1)
            return Block(
                embed_dim, attention(index), norm_layer, mlp_ratio, scale_adjustment, proj_drop_rate, drop_path
            )

        self.blocks = nn.Sequential(*(block(index) for index in range(depth)))
        self.blocks.apply(init_weights_vit_timm)
        reduction = max(self.patch_embed.patch_size)
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": embed_dim, "reduction": reduction} for index in range(depth)
        ]


def _mixing_blocks(re_attention: bool | int | Sequence[int], depth: int) -> frozenset[int]:
    """Indices of the blocks with Re-attention."""
    if isinstance(re_attention, bool):
        return frozenset(range(depth) if re_attention else ())
    if isinstance(re_attention, int):
        if re_attention < 0:
            raise UsageError(
                f"re_attention={re_attention}: give the number of last blocks, 0 or more, or their indices."
            )
        return frozenset(range(max(depth - re_attention, 0), depth))
    outside = [index for index in re_attention if not 0 <= index < depth]
    if outside:
        raise UsageError(f"re_attention names blocks {outside}, and the model has blocks 0 to {depth - 1}.")
    return frozenset(re_attention)


# -- the registry ------------------------------------------------------------------------------------------------------


def _sizes() -> dict[str, dict[str, Any]]:
    """Architecture arguments by registered name; an alias follows the repository's own name."""
    small = {"embed_dim": 396, "depth": 16, "re_attention": 5, "transform_scale": True}
    large = {"embed_dim": 420, "depth": 32, "re_attention": 12}
    stem = {"conv_stem": True, "scale_adjustment": 0.5}
    sizes: dict[str, dict[str, Any]] = {}
    for depth in (16, 24, 32):
        sizes[f"deepvit_patch16_224_re_attn_{depth}b"] = sizes[f"deepvit_{depth}b"] = {"depth": depth}
        sizes[f"deepvit_vit_{depth}b"] = {"depth": depth, "re_attention": False}
    sizes["deepvit_S"] = sizes["deepvit_s"] = {**small, **stem}
    sizes["deepvit_L"] = sizes["deepvit_l"] = {**large, **stem}
    sizes["deepvit_L_384"] = sizes["deepvit_l_384"] = {**large, **stem}
    return sizes


def _data_config(name: str, size: dict[str, Any]) -> dict[str, Any]:
    """What timm's transforms and its weight loading need to know; the authors' weights have no direct address."""
    at_384 = name.endswith("384")
    return {
        "num_classes": 1000,
        "input_size": (3, 384, 384) if at_384 else (3, 224, 224),
        "fixed_input_size": True,
        "crop_pct": 1.0 if at_384 else 0.9,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.conv1" if size.get("conv_stem") else "patch_embed.proj",
        "classifier": "head",
    }


def _register(name: str, size: dict[str, Any]) -> None:
    """timm reads name and module off the function, and lists the name in this module's `__all__`."""

    def build(pretrained: bool = False, **kwargs: Any) -> DeepVisionTransformer:
        return build_model_with_cfg(
            DeepVisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **{**size, **kwargs},
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"DeepVisionTransformer with {size}; keyword arguments override."
    globals()[name] = register_model(build)


_SIZES = _sizes()
default_cfgs = generate_default_cfgs({name: _data_config(name, size) for name, size in _SIZES.items()})
for _name, _size in _SIZES.items():
    _register(_name, _size)
