"""What keys and shapes tell of a vision transformer: depth, width, patches, tokens, heads where they leave a trace.

For state dicts in timm's names. What cannot be seen in them (activation, epsilon of the norms, most often the number of
heads) is not here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

Shapes = Mapping[str, tuple[int, ...]]

_RE_ATTENTION = re.compile(r"blocks\.(\d+)\.attn\.reatten_matrix\.weight")
_CLASSIFIERS = ("head.weight", "head.fc.weight", "classifier.weight", "fc.weight")


@dataclass(frozen=True)
class Anatomy:
    """A description of a model by its weights. None, False or empty where there is no sign of it.

    Attributes:
        depth: blocks, of all stages together; ``stages``: blocks of each, where there are several.
        width: channels of the tokens (of the first stage).
        patch: height and width of a patch in pixels, or of the stem's stride where that is all that shows.
        image: height and width in pixels that the position embedding is for.
        channels: of the images.
        mlp_ratio: hidden width of the MLP over the width.
        class_token, distillation_token, registers: prefix tokens; ``registers`` is their number.
        positions: ``"learnt"``, ``"bias tables"``, ``"relative"``, or ``"none in the weights"`` (rotary, for example).
        classes: rows of the classifier.
        layer_scale, pre_norm, qk_norm, qkv_bias: whether there is such a part.
        pooling: the norm or the pooling before the classifier.
        re_attention: blocks that mix their heads after the softmax.
        conv_stem: whether convolutions come before the patch projection.
        heads: the number of heads, where bias tables, norms of queries or re-attention show it; ``heads_from``: which.
    """

    depth: int
    width: int
    stages: list[int] = field(default_factory=list)
    patch: tuple[int, int] | None = None
    image: tuple[int, int] | None = None
    channels: int | None = None
    mlp_ratio: float | None = None
    class_token: bool = False
    distillation_token: bool = False
    registers: int = 0
    positions: str = "none in the weights"
    classes: int | None = None
    layer_scale: bool = False
    pre_norm: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    pooling: str = ""
    re_attention: list[int] = field(default_factory=list)
    conv_stem: bool = False
    heads: int | None = None
    heads_from: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def describe(shapes: Shapes) -> Anatomy | None:
    """The anatomy of a state dict in timm's names; None where it holds no blocks."""
    stages = _stages(shapes)
    if not stages:
        return None
    width = _width(shapes)
    projection = shapes.get("patch_embed.proj.weight", ())
    four = len(projection) == 4
    conv_stem = "patch_embed.conv1.weight" in shapes
    patch = None
    if four:  # a stem of stride 2 comes before the projection
        patch = (projection[2] * (1 + conv_stem), projection[3] * (1 + conv_stem))
    registers = shapes.get("reg_token", (0, 0))[1]
    tokens = _prefix_tokens(shapes)
    classifier = next((shapes[key] for key in _CLASSIFIERS if len(shapes.get(key, ())) == 2), None)
    hidden = next((shape[0] for key, shape in shapes.items() if key.endswith("mlp.fc1.weight")), None)
    heads, heads_from = heads_shown(shapes)
    first = shapes.get("patch_embed.conv1.weight", projection)
    return Anatomy(
        depth=sum(stages),
        width=width,
        stages=stages if len(stages) > 1 else [],
        patch=patch,
        image=_image(shapes, patch, tokens),
        channels=first[1] if len(first) == 4 else None,
        mlp_ratio=None if hidden is None or not width else _ratio(hidden, width),
        class_token="cls_token" in shapes,
        distillation_token="dist_token" in shapes,
        registers=registers,
        positions=_positions(shapes),
        classes=None if classifier is None else classifier[0],
        layer_scale=any(re.search(r"\.(ls1\.gamma|gamma_1)$", key) for key in shapes),
        pre_norm="norm_pre.weight" in shapes,
        qk_norm=any(key.endswith("q_norm.weight") for key in shapes),
        qkv_bias=any(key.endswith(("qkv.bias", "q_bias", "q_proj.bias")) for key in shapes),
        pooling="attention pooling" if "attn_pool.kv.weight" in shapes
        else "norm after pooling" if "fc_norm.weight" in shapes
        else "norm before pooling" if "norm.weight" in shapes else "",
        re_attention=sorted(int(found[1]) for key in shapes if (found := _RE_ATTENTION.match(key))),
        conv_stem=conv_stem,
        heads=heads,
        heads_from=heads_from,
    )  # fmt: skip


def heads_shown(shapes: Shapes) -> tuple[int | None, str]:
    """The number of heads (of the first block that shows it) and what shows it; (None, "") where nothing does."""
    for key, shape in shapes.items():
        if key.endswith("reatten_matrix.weight"):
            return shape[0], "the re-attention matrix"
        if key.endswith("relative_position_bias_table") and len(shape) == 2:
            return shape[1], "the table of position biases"
        if key.endswith("attn.q_norm.weight"):
            width = shapes.get(key.replace("q_norm.weight", "proj.weight"), (0, 0))[1]
            if shape[0] and width > shape[0] and not width % shape[0]:
                return width // shape[0], "the norm of the queries"
        if key.endswith("attn.logit_scale") and len(shape) == 3:
            return shape[0], "the scale of the logits"
    return None, ""


def heads_of(model: nn.Module) -> set[int]:
    """The numbers of heads that a model's layers say they have."""
    found = (getattr(module, "num_heads", None) for module in model.modules())
    return {count for count in found if isinstance(count, int)}


def in_words(anatomy: Anatomy) -> list[tuple[str, str]]:
    """Lines for a reader: what it is and its value."""
    found = [("blocks", f"{anatomy.depth}" + (f" ({' + '.join(map(str, anatomy.stages))})" if anatomy.stages else ""))]
    found.append(("width", str(anatomy.width)))
    if anatomy.heads is not None:
        found.append(("heads", f"{anatomy.heads} (shown by {anatomy.heads_from})"))
    if anatomy.patch:
        found.append(("patch", f"{anatomy.patch[0]} x {anatomy.patch[1]} pixels"))
    if anatomy.image:
        found.append(("image", f"{anatomy.image[0]} x {anatomy.image[1]} pixels"))
    if anatomy.channels:
        found.append(("channels", str(anatomy.channels)))
    if anatomy.mlp_ratio:
        found.append(("MLP ratio", f"{anatomy.mlp_ratio:g}"))
    registers = f"{anatomy.registers} registers" if anatomy.registers > 1 else "1 register" if anatomy.registers else ""
    prefix = ["class token"] * anatomy.class_token + ["distillation token"] * anatomy.distillation_token
    found.append(("prefix tokens", ", ".join([*prefix, registers] if registers else prefix) or "none"))
    found.append(("positions", anatomy.positions))
    found.append(("classes", str(anatomy.classes) if anatomy.classes else "no classifier"))
    parts = [
        (anatomy.layer_scale, "layer scale"), (anatomy.pre_norm, "norm before the blocks"),
        (anatomy.qk_norm, "norms of queries and keys"), (not anatomy.qkv_bias, "no bias of queries, keys and values"),
        (anatomy.conv_stem, "convolutional stem"), (bool(anatomy.pooling), anatomy.pooling),
        (bool(anatomy.re_attention), f"re-attention in {len(anatomy.re_attention)} blocks"),
    ]  # fmt: skip
    found.append(("parts", ", ".join(words for there, words in parts if there) or "none of note"))
    return found


def _stages(shapes: Shapes) -> list[int]:
    """Blocks of each stage."""
    counts: dict[str, set[int]] = {}
    for key in shapes:
        # The innermost numbered list that holds attention or an MLP: `stages.0.blocks.3.attn…`.
        found = re.match(
            r"(.*?(?:blocks|layers|layer|stages)(?:\.\d+\.blocks)?)\.(\d+)\.(?:\w+\.)?(attn|mlp|attention)", key
        )
        if found:
            counts.setdefault(found[1], set()).add(int(found[2]))
    return [len(numbers) for numbers in counts.values()]


def _width(shapes: Shapes) -> int:
    for key in ("cls_token", "pos_embed"):
        if len(shapes.get(key, ())) == 3:
            return shapes[key][2]
    norms = [shape[0] for key, shape in shapes.items() if key.endswith("norm1.weight")]
    return Counter(norms).most_common(1)[0][0] if norms and len(set(norms)) == 1 else (norms[0] if norms else 0)


def _prefix_tokens(shapes: Shapes) -> int:
    return ("cls_token" in shapes) + ("dist_token" in shapes) + shapes.get("reg_token", (0, 0))[1]


def _image(shapes: Shapes, patch: tuple[int, int] | None, tokens: int) -> tuple[int, int] | None:
    """The square image whose patches, with all, some or none of the prefix tokens, have a position each."""
    positions = shapes.get("pos_embed", ())
    if patch is None or len(positions) != 3:
        return None
    # Registers have no positions of their own in any release.
    counts = range(tokens + 1) if "reg_token" in shapes else range(tokens, -1, -1)
    for count in counts:
        side = math.isqrt(max(positions[1] - count, 0))
        if side and side * side == positions[1] - count:
            return side * patch[0], side * patch[1]
    return None


def _ratio(hidden: int, width: int) -> float:
    """A number by which models that round down come to this hidden width again."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _positions(shapes: Shapes) -> str:
    if any(key == "pos_embed" for key in shapes):
        return "learnt"
    if any(key.endswith(("relative_position_bias_table", "attention_biases")) for key in shapes):
        return "bias tables"
    if any(re.search(r"rel_pos", key) for key in shapes):
        return "relative"
    return "none in the weights"
