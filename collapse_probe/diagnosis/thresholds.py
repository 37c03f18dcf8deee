"""The cut-offs of the verdict, each with where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from collapse_probe.ratio import SIMILAR


class Threshold(float):
    """A number with its origin.

    Attributes:
        source: the publication, or how it was calibrated.
        published: whether the number itself is published; otherwise it is ours.
    """

    source: str
    published: bool

    def __new__(cls, value: float, source: str, published: bool = False) -> Threshold:
        self = super().__new__(cls, value)
        self.source, self.published = source, published
        return self

    def __reduce__(self) -> tuple[type[Threshold], tuple[float, str, bool]]:
        return Threshold, (float(self), self.source, self.published)

    @property
    def origin(self) -> str:
        """The source, and whether the number is published or ours."""
        return f"{'published' if self.published else 'ours'}: {self.source}"


@dataclass(frozen=True)
class Thresholds:
    """Cut-offs of the verdict. Ours were calibrated on the panel in `docs/verdict.md`.

    Attributes:
        similar: mean M above which two neighbouring blocks are called similar.
        flat: M that two columns of equal relative variation have of themselves, above which they are called flat: any
            two of them are alike, whatever layers do.
        repeated: centred similarity above which neighbours repeat each other although their columns are so flat that
            any two would be similar.
        concerned_share: share of the layers from which a finding about layers is called a problem.
        uniform_entropy: entropy over log K from which attention is called uniform.
        uniform_deficit: log K minus entropy, in nats, below which it is called uniform however short the sequence.
        uniform_variation: relative variation r above which it is not called uniform whatever its entropy. Raised where
            masks hide keys, by what the mask alone adds to r.
        saturated_entropy: entropy over log K below which it has collapsed.
        redundant_heads: mean similarity of different heads above which they repeat each other, in the cosine and in the
            centred cosine.
        constant_head: share of a head's energy in the mean over queries from which it does not depend on the query.
        similar_tokens: mean cosine of different tokens above which they have become one.
        residual: |X - mean| over |X| below which they have.
        outlier_norm: norm over the median patch norm from which a token is an outlier.
        idle_branch: norm of what attention adds over that of the stream, below which it adds nothing.
        sink_share: share of heads with a sink from which a layer is said to have them.
        sink: mean attention that makes a token a sink.
    """

    similar: Threshold = Threshold(
        SIMILAR,
        "a trained DeiT-Ti stays at or below 0.89; DeepViT (arXiv 2103.11886) counts 5, 11 and 15 similar blocks in "
        "ViTs of 16, 24 and 32 blocks and states no cut-off",
    )
    flat: Threshold = Threshold(SIMILAR, "the M above which blocks are called similar")
    repeated: Threshold = Threshold(0.9, "copied maps read 1, trained models at most 0.6")
    concerned_share: Threshold = Threshold(1 / 3, "the 24 and 32 block ViTs of DeepViT have 11 and 15 similar blocks")
    uniform_entropy: Threshold = Threshold(
        0.95,
        "random initialisations of ViTs of widths 48 to 1408, nn.TransformerEncoder, Swin, PVT, PiT, Twins, Hiera and "
        "MaxViT read 0.95 to 1.00, trained models 0.44 to 0.90",
    )
    uniform_deficit: Threshold = Threshold(0.2, "random initialisations read at most 0.14 nats, a trained DeiT-Ti 1.0")
    uniform_variation: Threshold = Threshold(0.55, "random initialisations read at most 0.47")
    saturated_entropy: Threshold = Threshold(
        0.15,
        "logits 30 to 100 times too large read 0.01 to 0.05, trained models 0.28 and more; Zhai et al. (arXiv "
        "2303.06296) name the failure and state no cut-off",
    )
    redundant_heads: Threshold = Threshold(
        0.9, "copied heads read 1; DeepViT (arXiv 2103.11886, figure 3c) reports below 0.3 for a 32-block ViT"
    )
    constant_head: Threshold = Threshold(
        0.999, "heads without queries and keys read 1.000, those of trained models at most 0.94, of alike tokens 0.99"
    )
    similar_tokens: Threshold = Threshold(
        0.9, "averaged tokens read 0.999, trained models 0.48 and less, random initialisations up to 0.8"
    )
    residual: Threshold = Threshold(1 / 3, "averaged tokens read 0.03, trained models 0.72 and more")
    outlier_norm: Threshold = Threshold(
        5.0,
        "trained models without outliers read at most 2.6; Darcet et al. (arXiv 2309.16588) use absolute norms: 150 "
        "for DINOv2-L, 30 for CLIP-B",
    )
    idle_branch: Threshold = Threshold(1e-3, "trained models read 0.12 and more, attention that was switched off 0")
    sink_share: Threshold = Threshold(0.5, "trained models without sinks read at most 0.44")
    sink: Threshold = Threshold(0.3, "Gu et al., arXiv 2410.10781", published=True)

    def __iter__(self) -> Iterator[tuple[str, Threshold]]:
        return ((item.name, getattr(self, item.name)) for item in fields(self))
