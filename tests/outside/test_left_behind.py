"""Wrappers, compilers, precision and errors around models outside timm: outputs, hooks, modes and flags stay as they
were."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from _outside import close, images_of, observed, perturbed, tokens_of
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.utils.checkpoint import checkpoint

from collapse_probe.capture import capture

WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj, self.drop = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = self.drop((q @ k.mT / 8**0.5).softmax(-1))
        return self.proj((a @ v).transpose(1, 2).flatten(2))


class Fused(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """A small vision transformer that nobody knows: unfused, fused and PyTorch's own attention."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        own = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList([Block(Attention), Block(Fused), own])
        self.head = nn.Linear(WIDTH, 5)
        self.checkpointed = None

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, **self.checkpointed)
        return self.head(x.mean(1))


NAMES = ["blocks.0.attn", "blocks.1.attn", "blocks.2.self_attn"]


def build():
    torch.manual_seed(0)
    return perturbed(Model(), 0.2)


def state_of(model):
    """Everything that capture might leave behind: hooks, modes and flags."""
    tables = [name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name]
    return (
        [(name, [len(getattr(module, table)) for table in tables]) for name, module in model.named_modules()],
        {name: len(value) for name, value in vars(module_hooks).items() if name.startswith("_global_") and value},
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        [(name, tensor._version, tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.random.get_rng_state().tolist(),
        len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
        len(torch.overrides._get_current_function_mode_stack()),
        torch.compiler.is_compiling(),
        threading.active_count(),
    )


def maps_of(captured):
    return {name: item.materialize() for name, item in captured.maps.items()}


def expected_maps(model, images):
    captured = observed(model, images)
    assert list(captured.maps) == NAMES
    assert not captured.not_captured
    return maps_of(captured)


def assert_same_maps(captured, expected, prefix="", atol=1e-5):
    assert not captured.not_captured
    assert [name.replace(prefix, "") for name in captured.maps] == list(expected)
    for attention, reference in zip(captured.maps.values(), expected.values(), strict=True):
        close(attention.materialize(), reference, atol)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training, mode):
    model, images = build().train(training), images_of(2)
    model.blocks[1].eval()
    with mode():
        model(images)
        torch.manual_seed(5)
        before = state_of(model)
        with capture(model):
            assert not torch.is_inference_mode_enabled()
        assert state_of(model) == before
        torch.manual_seed(5)
        plain = model(images)
        drawn = torch.random.get_rng_state()
        torch.manual_seed(5)
        with capture(model):
            output = model(images)
        assert torch.equal(torch.random.get_rng_state(), drawn)  # dropout draws what it would have drawn
        assert torch.equal(plain, output)
        torch.manual_seed(5)
        assert state_of(model) == before


def test_gradients_are_the_same():
    model, images = build().train(), images_of(2)

    def gradients(images):
        torch.manual_seed(3)
        model.zero_grad()
        model(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients(images)
    with capture(model):
        seen = gradients(images)
    assert all(torch.equal(one, other) for one, other in zip(plain, seen, strict=True))


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, _):
        raise self.error("boom")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopIteration, torch.OutOfMemoryError])
@pytest.mark.parametrize("place", ["norm1", "attn", "mlp"])
def test_nothing_is_left_behind_by_an_error(place, error):
    model, images = build(), images_of(2)
    expected, before = expected_maps(model, images), state_of(model)
    good = getattr(model.blocks[1], place)
    with torch.no_grad():
        setattr(model.blocks[1], place, Failing(error))
        with pytest.raises((error, RuntimeError)), capture(model) as captured:
            model(images)
        setattr(model.blocks[1], place, good)
    assert list(captured.maps) in ([], NAMES[:1], NAMES[:2])
    torch.random.set_rng_state(torch.tensor(before[11], dtype=torch.uint8))
    assert [item for item in state_of(model) if item != before[0]] == [item for item in before if item != before[0]]
    assert_same_maps(observed(model, images), expected)


def test_an_error_inside_the_block_and_another_try():
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    with torch.no_grad(), capture(model) as captured:
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 4, 32, 32))
        model(images)
    assert_same_maps(captured, expected)


def test_an_error_in_the_middle_of_a_layer_and_another_try():
    """Its softmax was seen and its product was not: nothing of it may reach the next pass."""
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)

    class Explosive(nn.Dropout):
        armed = True

        def forward(self, x):
            if self.armed:
                raise RuntimeError("boom")
            return x

    model.blocks[0].attn.drop = Explosive()
    with torch.no_grad(), capture(model) as captured:
        with pytest.raises(RuntimeError, match="boom"):
            model(images)
        Explosive.armed = False
        model(images)
    assert_same_maps(captured, expected)


# -- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False])
def test_torch_compile(warm):
    torch.compiler.reset()
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        if warm:
            compiled(images)
        with pytest.warns(UserWarning, match="eagerly"), capture(compiled) as captured:
            output = compiled(images)
        assert torch.equal(output, model(images))
    assert_same_maps(captured, expected, "_orig_mod.")
    torch.compiler.reset()


@pytest.mark.parametrize("warm", [True, False])
def test_a_model_that_compiled_itself(warm):
    torch.compiler.reset()
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    model.compile(backend="eager")
    with torch.no_grad():
        if warm:
            model(images)
        with pytest.warns(UserWarning, match="eagerly"), capture(model) as captured:
            model(images)
    assert_same_maps(captured, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("warm", [True, False])
def test_one_block_that_is_compiled(warm):
    torch.compiler.reset()
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.blocks[1].compile(backend="eager")
    with torch.no_grad():
        if warm:
            model(images)
        with pytest.warns(UserWarning, match="eagerly"), capture(model) as captured:
            model(images)
    assert_same_maps(captured, expected, "_orig_mod.")
    torch.compiler.reset()


@pytest.mark.parametrize("warm", [True, False])
def test_a_function_that_is_compiled(warm):
    """A compiled function is no module: what attends within it must be seen or listed all the same."""
    torch.compiler.reset()

    def function(q, k, v):
        return (q @ k.mT / 8**0.5).softmax(-1) @ v

    class WithFunction(Attention):
        attend = staticmethod(torch.compile(function, backend="eager"))

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            return self.attend(q, k, v)

    torch.manual_seed(0)
    model, tokens = perturbed(nn.Sequential(WithFunction()), 0.3), tokens_of(2, 6, WIDTH)
    with torch.no_grad():
        if warm:
            model(tokens)
        with capture(model) as captured:
            model(tokens)
        q, k, _ = model[0].qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    assert [*captured.maps, *captured.not_captured] == ["0"]
    for attention in captured.maps.values():
        close(attention.materialize(), (q @ k.mT / 8**0.5).softmax(-1))
    torch.compiler.reset()


def test_compiling_after_capture_still_works():
    torch.compiler.reset()
    model, images = build(), images_of(2)
    observed(model, images)
    with torch.no_grad():
        close(torch.compile(model, backend="eager")(images), model(images))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_model_gives_maps():
    model, images = build(), images_of(2)
    model.blocks[2] = Block(Fused).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images)
        with capture(traced) as captured:
            output = traced(images)
        assert torch.equal(output, traced(images))
    assert len(captured.maps) + len(captured.not_captured) >= 3


def test_an_exported_model_gives_maps():
    model, images = build(), images_of(2)
    model.blocks[2] = perturbed(Block(Fused), 0.2)
    with torch.no_grad(), capture(model) as direct:
        model(images)
    exported = torch.export.export(model, (images,)).module()
    captured = observed(exported, images)
    assert not captured.not_captured
    assert len(captured.maps) == 3
    for attention, reference in zip(captured.maps.values(), direct.maps.values(), strict=True):
        close(attention.materialize(), reference.materialize())
        assert (attention.kind, attention.images) == ("token", 2)


# -- wrappers --------------------------------------------------------------------------------------------------------


def test_data_parallel_on_the_cpu():
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    captured = observed(nn.DataParallel(model), images)
    assert_same_maps(captured, expected, "module.")
    assert {item.images for item in captured.maps.values()} == {2}


def test_an_averaged_model():
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    assert_same_maps(observed(torch.optim.swa_utils.AveragedModel(model).eval(), images), expected, "module.")


def test_a_deep_copy_and_a_reloaded_copy():
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    assert_same_maps(observed(copy.deepcopy(model), images), expected)
    with torch.device("meta"):
        empty = Model()
    empty.load_state_dict(model.state_dict(), assign=True)
    assert_same_maps(observed(empty.eval(), images), expected)


def test_functional_call():
    model, images = build(), images_of(2)
    doubled = {name: parameter * 1.5 for name, parameter in model.named_parameters()}
    other = build()
    other.load_state_dict(doubled)
    expected = expected_maps(other, images)
    with torch.no_grad(), capture(model) as captured:
        torch.func.functional_call(model, doubled, (images,))
    assert_same_maps(captured, expected)


def test_parametrised_weights():
    model, images = build(), images_of(2)
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)
    nn.utils.parametrizations.spectral_norm(model.blocks[1].attn.qkv)
    assert list(observed(model, images).maps) == NAMES


def test_an_encoder_layer_inside_a_frozen_model():
    """Without gradients to take, PyTorch's own layer runs its native kernel also with autograd on."""
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    model.requires_grad_(False)
    assert_same_maps(observed(model, images, mode=torch.enable_grad), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    model.checkpointed = {"use_reentrant": reentrant}
    with capture(model) as captured:
        model(images).sum().backward()
    assert_same_maps(captured, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_autocast(mode, dtype):
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    with torch.autocast("cpu", dtype):
        captured = observed(model, images, mode=mode)
    assert list(captured.maps) == NAMES
    for name, attention in captured.maps.items():
        assert attention.materialize().dtype == torch.float32
        close(attention.materialize(), expected[name], 0.05)
        assert (attention.materialize().double() - expected[name]).abs().max() > 1e-6  # it did run at that precision


def test_autocast_within_the_model():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build()

        def forward(self, images):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(images)

    model = Casting()
    expected = expected_maps(model.inner, images_of(2))
    captured = observed(model, images_of(2))
    for name, reference in expected.items():
        close(captured.maps[f"inner.{name}"].materialize(), reference, 0.05)


# -- passes ----------------------------------------------------------------------------------------------------------


def test_maps_are_those_of_the_last_pass():
    model = build()
    expected = expected_maps(model, images_of(3, seed=7))
    with torch.no_grad(), capture(model) as captured:
        model(images_of(2))
        model(images_of(5, seed=4))
        model(images_of(3, seed=7))
    assert_same_maps(captured, expected)


def test_a_pass_over_a_part_of_the_model():
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    with torch.no_grad(), capture(model) as captured:
        x = model.patches(images).flatten(2).mT
        for block in model.blocks:
            x = block(x)
    assert captured.maps.keys() <= expected.keys()
    for name, attention in captured.maps.items():
        close(attention.materialize(), expected[name])


def test_capturing_a_part_of_the_model_while_the_whole_runs():
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    with torch.no_grad(), capture(model.blocks[1]) as captured:
        model(images)
    assert list(captured.maps) == ["attn"]
    close(captured.maps["attn"].materialize(), expected["blocks.1.attn"])
    assert captured.maps["attn"].images == 2


def test_captures_side_by_side_and_within_each_other():
    one, two, images = build(), build(), images_of(2)
    expected = expected_maps(one, images)
    with torch.no_grad(), capture(one) as first:
        with capture(two) as second:
            one(images)
            two(images)
        one(images)
    assert_same_maps(first, expected)
    assert_same_maps(second, expected)


def test_a_model_that_runs_in_another_thread_than_capture_was_opened_in():
    model, images = build(), images_of(2)
    with capture(model) as captured:
        thread = threading.Thread(target=lambda: model(images))
        thread.start()
        thread.join()
        with torch.no_grad():
            model(images)
    assert list(captured.maps) == NAMES  # those of this thread


def test_a_model_that_only_ran_in_another_thread_is_listed():
    model, images = build(), images_of(2)
    with capture(model) as captured:
        thread = threading.Thread(target=lambda: model(images))
        thread.start()
        thread.join()
    assert captured.not_captured


def test_maps_outlive_model_and_block():
    model, images = build(), images_of(2)
    expected = expected_maps(model, images)
    with torch.no_grad(), capture(model) as captured:
        model(images)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert_same_maps(captured, expected)


def test_later_training_does_not_reach_into_maps():
    model, images = build(), images_of(2)
    with torch.no_grad(), capture(model) as captured:
        model(images)
    before = maps_of(captured)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
        model(images)
        images.zero_()
    for name, reference in before.items():
        assert torch.equal(captured.maps[name].materialize(), reference)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_maps_need_no_gradient_and_hold_no_graph(mode):
    model, images = build(), images_of(2)
    captured = observed(model, images, mode=mode)
    for attention in captured.maps.values():
        assert not attention.materialize().requires_grad
        assert not attention.columns(0, 2).requires_grad


def test_an_empty_batch_breaks_nothing():
    model = build()
    with torch.no_grad():
        expected = model(images_of(0))
        with capture(model) as captured:
            assert torch.equal(model(images_of(0)), expected)
    for attention in captured.maps.values():
        assert attention.shape[0] == 0


def test_the_meta_device_breaks_nothing():
    with torch.device("meta"):
        model = Model().eval()
    with torch.no_grad(), capture(model) as captured:
        output = model(torch.empty(2, 3, 32, 32, device="meta"))
    assert output.shape == (2, 5)
    assert len(captured.maps) + len(captured.not_captured) == 3


def test_fake_tensors_break_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = Model().eval()
        with torch.no_grad(), capture(model) as captured:
            output = model(torch.empty(2, 3, 32, 32))
    assert output.shape == (2, 5)
    assert len(captured.maps) + len(captured.not_captured) == 3
