"""Models written to mislead: batches arranged otherwise, memory written twice, softmaxes that are no attention."""

from __future__ import annotations

import pytest
import torch
from _outside import assert_images_are_images, close, images_of, observed, perturbed, tokens_of
from torch import nn
from torch.nn import functional as F

import collapse_probe as cp
from collapse_probe.capture import OUT_OF_ORDER, capture

WIDTH, HEADS, TOKENS = 16, 2, 16


class Attention(nn.Module):
    """Unfused attention that remembers what multiplied its values, `[N, H, Q, K]`."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.applied = nn.Linear(WIDTH, 3 * WIDTH), None

    def split(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.split(x)
        self.applied = (q @ k.mT / 8**0.5).softmax(-1)
        return (self.applied @ v).transpose(1, 2).flatten(2)


class Vision(nn.Module):
    """Patches, then attention; subclasses arrange the batch in their own way."""

    def __init__(self, attention=Attention):
        super().__init__()
        self.patches, self.attn = nn.Conv2d(3, WIDTH, 8, 8), attention()

    def embed(self, images):
        return self.patches(images).flatten(2).mT

    def forward(self, images):
        return self.attn(self.embed(images))


def build(model, scale=0.3):
    torch.manual_seed(0)
    return perturbed(model(), scale)


# -- batches ---------------------------------------------------------------------------------------------------------


class Dictionary(Vision):
    def forward(self, batch):
        return super().forward(batch["image"])


class ListOfImages(Vision):
    def forward(self, images):
        return super().forward(torch.stack(images))


class PositionsFirst(Vision):
    """Its first tensor is no batch."""

    def forward(self, positions, images):
        return self.attn(self.embed(images) + positions)


class PositionsFirstByName(PositionsFirst):
    def forward(self, *, positions, images):
        return self.attn(self.embed(images) + positions)


def test_images_in_a_dictionary():
    captured = observed(build(Dictionary), {"image": images_of(3), "label": torch.tensor([1, 2, 0])})
    (attention,) = captured.maps.values()
    assert (attention.kind, attention.images, attention.windows) == ("token", 3, 1)


def test_images_in_a_list():
    captured = observed(build(ListOfImages), list(images_of(3)))
    (attention,) = captured.maps.values()
    assert (attention.kind, attention.images, attention.windows) == ("token", 3, 1)


@pytest.mark.parametrize("images", [1, 3, 8, 32])
@pytest.mark.parametrize("name", [True, False])
def test_a_first_argument_that_is_no_batch(name, images):
    positions = tokens_of(TOKENS, WIDTH)
    if name:
        captured = observed(build(PositionsFirstByName), positions=positions, images=images_of(images))
    else:
        captured = observed(build(PositionsFirst), positions, images_of(images))
    (attention,) = captured.maps.values()
    assert (attention.kind, attention.images, attention.windows) == ("token", images, 1)


class Augmented(Vision):
    """Test-time augmentation: all images, then all of them mirrored."""

    def forward(self, images):
        return super().forward(torch.cat([images, images.flip(-1)])).unflatten(0, (2, -1)).mean(0)


class WindowsOutside(Vision):
    """Four windows of four tokens, all images of the first window before any of the second."""

    def forward(self, images):
        x = self.embed(images).unflatten(1, (4, 4)).transpose(0, 1)
        return self.attn(x.flatten(0, 1)).unflatten(0, (4, -1)).transpose(0, 1).flatten(1, 2)


class WindowsInside(Vision):
    def forward(self, images):
        x = self.embed(images).unflatten(1, (4, 4))
        return self.attn(x.flatten(0, 1)).unflatten(0, (len(images), 4)).flatten(1, 2)


class Frames(Vision):
    """Videos `[B, T, 3, S, S]`, attention within each frame."""

    def forward(self, videos):
        return super().forward(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])


def test_windows_lie_within_their_image():
    network, images = build(WindowsInside), images_of(3)
    assert_images_are_images(network, images, observed(network, images))
    assert not cp.analyze(network, images).not_captured


@pytest.mark.parametrize("model", [Augmented, WindowsOutside])
def test_no_image_is_given_the_windows_of_another(model):
    """Where the batch was arranged in another way, an analysis turns it around, sees that, and says so."""
    network = build(model)

    class WithAnother(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.even = network, build(Vision)

        def forward(self, images):
            return self.odd(images).mean() + self.even(images)

    result = cp.analyze(WithAnother().eval(), images_of(3))
    assert list(result.layers.index) == ["even.attn"]
    assert [(gap["layer"], gap["reason"]) for gap in result.not_captured] == [("odd.attn", OUT_OF_ORDER)]


def test_frames_of_a_video():
    network, videos = build(Frames), tokens_of(3, 2, 3, 32, 32)
    captured = observed(network, videos)
    assert [(item.images, item.windows) for item in captured.maps.values()] == [(3, 2)]
    assert_images_are_images(network, videos, captured)


def test_one_image_at_a_time():
    class OneByOne(Vision):
        def forward(self, images):
            self.seen = []
            outputs = []
            for image in images:
                outputs.append(super().forward(image[None]))
                self.seen.append(self.attn.applied)
            return torch.cat(outputs)

    network = build(OneByOne)
    captured = observed(network, images_of(3))
    assert list(captured.maps) == ["attn", "attn#1", "attn#2"]
    for attention, applied in zip(captured.maps.values(), network.seen, strict=True):
        close(attention.materialize(), applied)
        assert (attention.kind, attention.shape) == ("token", (1, HEADS, TOKENS, TOKENS))


@pytest.mark.parametrize("images", [HEADS, TOKENS, HEADS * TOKENS])
def test_as_many_images_as_heads_or_tokens(images):
    network = build(Vision)
    captured = observed(network, images_of(images))
    (attention,) = captured.maps.values()
    assert (attention.kind, attention.images, attention.windows) == ("token", images, 1)
    close(attention.materialize(), network.attn.applied)


def test_heads_folded_into_the_batch_by_a_layer_that_does_not_say_how_many():
    class Folded(Attention):
        def forward(self, x):
            q, k, v = (item.flatten(0, 1) for item in self.split(x))
            self.applied = torch.bmm(q, k.mT).softmax(-1)
            return torch.bmm(self.applied, v)

    for images in (1, 3):
        network = build(lambda: Vision(Folded))
        del network.attn.num_heads
        captured = observed(network, images_of(images))
        (attention,) = captured.maps.values()
        assert attention.images == images
        close(attention.materialize().flatten(0, 1), network.attn.applied)


# -- writes ----------------------------------------------------------------------------------------------------------


def scores_times_two_by_out(scores):
    torch.mul(scores, 2, out=scores)


def scores_times_two_by_data(scores):
    scores.data.mul_(2)


def scores_times_two_by_list(scores):
    torch._foreach_mul_([scores], 2.0)


def scores_times_two_by_view(scores):
    scores.view(-1)[::2].mul_(2)


def scores_by_index(scores):
    scores[:, :, torch.tensor([1, 3])] = 1.5


def scores_by_scatter(scores):
    scores.scatter_(-1, torch.zeros(*scores.shape[:-1], 1, dtype=torch.long), 3.0)


def scores_by_copy(scores):
    scores.copy_(scores.flip(-1).clone())


def scores_by_clamp(scores):
    scores.clamp_(max=0.5)


def scores_by_swapping_data(scores):
    scores.data = scores.flip(-1).clone()


def scores_by_set(scores):
    scores.set_(scores.flip(-1).clone())


WRITES = [item for name, item in list(globals().items()) if name.startswith("scores_")]


@pytest.mark.parametrize("where", ["scores", "softmax", "queries"])
@pytest.mark.parametrize("write", WRITES)
def test_writes_between_the_operators(write, where):
    class Writing(Attention):
        def forward(self, x):
            q, k, v = (item.clone(memory_format=torch.contiguous_format) for item in self.split(x))
            scores = q @ k.mT
            if where == "scores":
                write(scores)
            if where == "queries":
                write(q)  # which changes nothing any more
            a = scores.softmax(-1)
            if where == "softmax":
                write(a)
            self.applied = a.clone()
            return a @ v

    network = build(lambda: Vision(Writing)).requires_grad_(False)
    captured = observed(network, images_of(2))
    assert len(captured.maps) + len(captured.not_captured) == 1
    for attention in captured.maps.values():
        close(attention.materialize(), network.attn.applied, 1e-4)
        if where == "softmax":
            assert not attention.is_probability or torch.allclose(
                network.attn.applied.sum(-1), torch.ones(()), atol=1e-4
            )


def test_products_into_given_memory():
    class Given(Attention):
        def forward(self, x):
            q, k, v = (item.flatten(0, 1) for item in self.split(x))
            scores, out = torch.empty(len(q), TOKENS, TOKENS), torch.empty_like(v)
            torch.bmm(q, k.mT, out=scores)
            a = scores.softmax(-1)
            torch.bmm(a, v, out=out)
            self.applied = a.clone()
            return out

    network = build(lambda: Vision(Given)).requires_grad_(False)
    captured = observed(network, images_of(2))
    assert len(captured.maps) + len(captured.not_captured) == 1
    for attention in captured.maps.values():
        close(attention.materialize().flatten(0, 1), network.attn.applied)
        assert attention.kind == "token"


def test_one_buffer_for_all_layers():
    """Memory of one layer's scores holds the next layer's: nothing of the first may be taken for the second."""
    buffer = torch.empty(2, HEADS, TOKENS, TOKENS)

    class Reusing(Attention):
        def forward(self, x):
            q, k, v = self.split(x)
            buffer.copy_(q @ k.mT)
            buffer.copy_(buffer.softmax(-1))
            self.applied = buffer.clone()
            return (buffer @ v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    network = perturbed(nn.Sequential(Reusing(), Reusing(), Attention()), 0.3).requires_grad_(False)
    captured = observed(network, tokens_of(2, TOKENS, WIDTH))
    assert len(captured.maps) + len(captured.not_captured) == 3
    for name, attention in captured.maps.items():
        close(attention.materialize(), network[int(name)].applied)


def test_writes_without_any_operator_are_found_by_verification():
    """NumPy shares memory with a tensor and writes to it unseen."""

    class Sharing(Attention):
        def forward(self, x):
            q, k, v = self.split(x)
            scores = q @ k.mT
            scores.numpy()[..., 0] *= 3
            return scores.softmax(-1) @ v

    network = build(lambda: Vision(Sharing)).requires_grad_(False)
    with torch.no_grad(), capture(network, verify=True) as captured:
        network(images_of(2))
    assert not captured.maps
    assert "attn" in captured.not_captured


# -- maps that travel ------------------------------------------------------------------------------------------------


class Residual(Attention):
    """Its map is mixed with that of the layer before."""

    def forward(self, x, before=None):
        q, k, v = self.split(x)
        a = (q @ k.mT / 8**0.5).softmax(-1)
        self.applied = a if before is None else 0.6 * a + 0.4 * before
        return (self.applied @ v).transpose(1, 2).flatten(2), self.applied


class Reusing(Attention):
    """It takes the map of the layer before, if there is one."""

    def forward(self, x, before=None):
        q, k, v = self.split(x)
        self.applied = (q @ k.mT / 8**0.5).softmax(-1) if before is None else before
        return (self.applied @ v).transpose(1, 2).flatten(2), self.applied


class Handing(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.layers = nn.ModuleList([attention() for _ in range(3)])

    def forward(self, x):
        a = None
        for layer in self.layers:
            out, a = layer(x, a)
            x = x + out
        return x


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attention", [Residual, Reusing])
def test_maps_handed_on_from_layer_to_layer(attention, mode):
    """Residual attention, and layers that share one map: each layer has a map of its own name, the one it applied."""
    network = build(lambda: Handing(attention))
    captured = observed(network, tokens_of(2, TOKENS, WIDTH), mode=mode)
    assert list(captured.maps) == ["layers.0", "layers.1", "layers.2"]
    for name, attention_map in captured.maps.items():
        close(attention_map.materialize(), network.get_submodule(name).applied)


def test_a_sum_of_all_maps_for_a_last_layer():
    class Rollout(Handing):
        def forward(self, x):
            total = 0
            for layer in self.layers:
                out, a = layer(x)
                x, total = x + out, total + a
            return x + (total @ x[:, None]).mean(1)

    network = build(lambda: Rollout(Reusing))
    captured = observed(network, tokens_of(2, TOKENS, WIDTH))
    for index, layer in enumerate(network.layers):
        close(captured.maps[f"layers.{index}"].materialize(), layer.applied)


# -- hidden from sight -----------------------------------------------------------------------------------------------


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        a = (q @ k.mT).softmax(-1)
        ctx.save_for_backward(a, v)
        return a @ v

    @staticmethod
    def backward(ctx, gradient):
        a, _ = ctx.saved_tensors
        return None, None, a.mT @ gradient


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_function_with_a_backward_of_its_own(mode):
    class WithFunction(Attention):
        def forward(self, x):
            return OwnFunction.apply(*self.split(x))

    network = build(lambda: Vision(WithFunction))
    captured = observed(network, images_of(2), mode=mode)
    q, k, _ = network.attn.split(network.embed(images_of(2)))
    (attention,) = captured.maps.values()
    close(attention.materialize(), (q @ k.mT).softmax(-1))


@pytest.mark.parametrize("name", ["attention", "mix"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_operator_of_its_own_is_listed(mode, name):
    """Operators registered from Python or C++ show neither softmax nor product, whatever they are called."""

    @torch.library.custom_op(f"outside_tests::{name}", mutates_args=())
    def own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).softmax(-1) @ v

    class Custom(Attention):
        def forward(self, x):
            return own(*self.split(x))

    class OwnAttention(Custom):
        pass

    captured = observed(build(lambda: Vision(OwnAttention)), images_of(2), mode=mode)
    assert list(captured.maps) + list(captured.not_captured) == ["attn"]


def test_flash_attention_written_out_is_listed():
    """The softmax of blocks of keys, put together by hand, is no operator called softmax."""

    class FlashAttention(Attention):
        def forward(self, x):
            q, k, v = self.split(x)
            out, norm = torch.zeros_like(q), torch.zeros(*q.shape[:-1], 1)
            for part in range(0, TOKENS, 4):
                weights = (q @ k[:, :, part : part + 4].mT / 9).exp()
                norm = norm + weights.sum(-1, keepdim=True)
                out = out + weights @ v[:, :, part : part + 4]
            return out / norm

    captured = observed(build(lambda: Vision(FlashAttention)), images_of(2))
    assert not captured.maps
    assert list(captured.not_captured) == ["attn"]


# -- no attention ----------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture of experts, weighted by a softmax."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x):
        gate = self.router(x).softmax(-1)
        return torch.einsum("bne,bned->bnd", gate, self.experts(x).unflatten(-1, (4, WIDTH)))


def test_experts_are_no_tokens():
    class WithExperts(Vision):
        def __init__(self):
            super().__init__()
            self.mix = Experts()

        def forward(self, images):
            return self.mix(super().forward(images))

    network = build(WithExperts)
    captured = observed(network, images_of(2))
    close(captured.maps["attn"].materialize(), network.attn.applied)
    assert {item.kind for name, item in captured.maps.items() if name.startswith("mix")} <= {"gate"}


def test_soft_experts_are_no_self_attention():
    """Soft MoE dispatches tokens to slots and combines slots into tokens: two softmaxes of one product."""

    class SoftExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.slots, self.expert = nn.Parameter(torch.randn(6, WIDTH)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            logits = x @ self.slots.T
            return logits.softmax(-1) @ self.expert(logits.softmax(-2).mT @ x)

    captured = observed(perturbed(SoftExperts(), 0.2), tokens_of(2, TOKENS, WIDTH))
    assert len(captured.maps) + len(captured.not_captured) == 2
    assert not [item for item in captured.maps.values() if item.kind in ("token", "class", "window")]


def test_probabilities_of_a_classifier_are_no_attention():
    class Classifier(Vision):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, images):
            return self.head(super().forward(images).mean(1)).softmax(-1)

    captured = observed(build(Classifier), images_of(2))
    assert list(captured.maps) == ["attn"]
    assert not captured.not_captured


def test_probabilities_of_pixels_are_no_attention():
    network = perturbed(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Softmax(dim=1)), 0.2)
    captured = observed(network, images_of(2))
    assert not captured.maps


def test_class_probabilities_that_weight_embeddings_are_no_attention_between_tokens():
    """Self-conditioning: a softmax over classes multiplies a table of embeddings."""

    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.table = nn.Linear(WIDTH, 5), nn.Parameter(torch.randn(5, WIDTH))

        def forward(self, x):
            return self.head(x).softmax(-1) @ self.table

    captured = observed(perturbed(Conditioned(), 0.2), tokens_of(2, TOKENS, WIDTH))
    assert {item.kind for item in captured.maps.values()} <= {"gate"}


# -- odd sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2])
def test_very_few_tokens(images, tokens, fused):
    class Small(Attention):
        def forward(self, x):
            if not fused:
                return super().forward(x)
            q, k, v = self.split(x)
            self.applied = (q @ k.mT / 8**0.5).exp()
            self.applied = self.applied / self.applied.sum(-1, keepdim=True)
            return F.scaled_dot_product_attention(q, k, v)

    network = build(Small)
    captured = observed(network, tokens_of(images, tokens, WIDTH))
    assert len(captured.maps) + len(captured.not_captured) == 1
    for attention in captured.maps.values():
        assert attention.shape == (images, HEADS, tokens, tokens)
        assert attention.kind == "token"
        close(attention.materialize(), network.applied)


def test_values_narrower_and_wider_than_keys():
    class Uneven(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6), nn.Linear(WIDTH, width)

        def forward(self, x):
            q, k, v = (part(x)[:, None] for part in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v) + (q @ k.mT).softmax(-1) @ v.flip(-1)

    for width in (1, 3, 40):
        network = perturbed(Uneven(width), 0.4)
        tokens = tokens_of(2, TOKENS, WIDTH)
        captured = observed(network, tokens)
        assert not captured.not_captured
        q, k = network.q(tokens), network.k(tokens)
        expected = [(q @ k.mT / 6**0.5).softmax(-1), (q @ k.mT).softmax(-1)]
        for attention, reference in zip(captured.maps.values(), expected, strict=True):
            close(attention.materialize()[:, 0], reference)


def test_logits_that_are_large():
    """Rows that are nearly one-hot, in float32 and far from zero."""

    class Sharp(Attention):
        def forward(self, x):
            q, k, v = self.split(x)
            self.applied = (q @ k.mT * 30 + 1e4).softmax(-1)
            return self.applied @ v

    network = build(lambda: Vision(Sharp))
    captured = observed(network, images_of(2))
    (attention,) = captured.maps.values()
    # Logits of 10^4 are known to 10^-3 in float32, and so is each of the two ways to compute them.
    close(attention.materialize(), network.attn.applied, 5e-3)
    assert attention.materialize().isfinite().all()


@pytest.mark.parametrize("fused", [True, False])
def test_images_that_are_not_numbers_are_not_hidden(fused):
    class Either(Attention):
        def forward(self, x):
            q, k, v = self.split(x)
            return F.scaled_dot_product_attention(q, k, v) if fused else (q @ k.mT).softmax(-1) @ v

    network, images = build(lambda: Vision(Either)), images_of(2)
    images[1, 0, 0, 0] = torch.nan
    with torch.no_grad(), capture(network) as captured:
        network(images)
    (attention,) = captured.maps.values()
    maps = attention.materialize()
    assert maps[0].isfinite().all()
    assert maps[1].isnan().any()
