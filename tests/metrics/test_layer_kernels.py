"""Cross-layer products straight from queries and keys: numbers under Triton's interpreter and on a GPU where there is
one, compilation for GPUs that need not be there, and what is refused."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from collapse_probe.capture.attention_map import AttentionMap, HeadMix, QueryKey, Stored, TokenLayout
from collapse_probe.errors import UsageError
from collapse_probe.metrics import CrossLayerSimilarity
from collapse_probe.metrics.layer_kernels import (
    Floors,
    Layer,
    LayerProducts,
    Layers,
    add_unit_columns,
    available,
    floors,
    image_products,
    launch,
    layer_products,
    layers_of,
    trial,
    usable,
)

CASES = Path(__file__).with_name("_kernel_cases.py")

#: Bytes of shared memory that a program may use.
SHARED = {80: 100 << 10, 90: 227 << 10}

_POINTERS = {"table": "*i64", "exists": "*u8", "finite": "*u8", "sums": "*fp64", "magnify": "fp32", "smallest": "fp32"}
_ELEMENTS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_TENSORS = ("normalizers", "products", "level", "variation", "mean", "inverse", "partial")


@pytest.mark.parametrize(
    ("device", "cases"),
    [("interpreter", "not sweep"), pytest.param("interpreter", "sweep", marks=pytest.mark.sweep), ("cuda", "")],
)
def test_numbers(device, cases):
    """The cases of `_kernel_cases.py`, in a process that chooses the interpreter (or not) before it imports triton."""
    pytest.importorskip("triton", reason="triton is not installed")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    environment = os.environ | {"TRITON_INTERPRET": str(int(device == "interpreter")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", cases, str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def layers_for(count, dim, dtype):
    """What decides a program's sizes, without a device to run it."""
    q = torch.empty(1, 1, 1, dim, dtype=dtype)
    return Layers((Layer(q, q, torch.empty(1, 1, 1), 1.0),) * count, torch.empty(0), 16 // dtype.itemsize)


@pytest.mark.parametrize(
    ("count", "dim", "dtype", "architecture"),
    [
        (12, 64, torch.bfloat16, 80),
        pytest.param(12, 64, torch.bfloat16, 90, marks=pytest.mark.sweep),
        (24, 80, torch.float32, 80),
        (40, 64, torch.float16, 90),
    ],
)
def test_programs_compile(count, dim, dtype, architecture, tmp_path, monkeypatch):
    """For GPUs that are not here: they fit in their shared memory, and the assembler takes them."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if triton.knobs.runtime.interpret:
        pytest.skip("triton was imported for its interpreter")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from collapse_probe.metrics.layer_kernels import programs

    layers = layers_for(count, dim, dtype)
    for name, tile in (
        ("products_program", launch.products_tile(layers)),
        ("images_program", launch.images_tile(layers)),
        ("sums_program", launch.sums_tile(layers)),
        ("normalizers_program", launch.normalizers_tile(layers)),
    ):
        compiled = compile_program(triton, getattr(programs, name), layers, tile, architecture)
        assert compiled.asm["cubin"]
        assert 0 < compiled.metadata.shared <= SHARED[architecture]


def compile_program(triton, program, layers, tile, architecture):
    from triton.backends.compiler import GPUTarget

    known = launch._constants(layers, tile) | {
        "LAYERS": launch._padded(layers),
        "STEPS": 4,
        "GROUP": 8,
        "GRAM": "tf32x3",
    }
    constants = {name: known[name] for name in program.arg_names if name in known}
    types = _POINTERS | dict.fromkeys(_TENSORS, "*fp32") | {"tokens": _ELEMENTS[layers.items[0].q.dtype]}
    types |= dict.fromkeys(("by_layer", "by_head", "by_key"), "i64") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in program.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    source = triton.compiler.ASTSource(program, signature, constants, aligned)
    options = {name: known[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


# -- without triton --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["floors", "layers", "launch", "trial", "__init__"])
def test_the_package_does_not_import_triton(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "collapse_probe.metrics.layer_kernels.programs", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = runpy.run_path(str(Path(launch.__file__).with_name(f"{module}.py")), run_name="alone")
    assert "available" not in names or names["available"]([a_map()]) is False


def a_layer(images=2, heads=2, queries=5, keys=4, dim=8, dtype=torch.float32, scale=0.5):
    q, k = torch.randn(images, heads, queries, dim), torch.randn(images, heads, keys, dim)
    return Layer(q.to(dtype), k.to(dtype), torch.zeros(images, heads, queries), scale)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "1 to 64 layers; got 0"),
        ([a_layer(dim=1, queries=1)] * 65, "got 65"),
        ([a_layer(dtype=torch.float64)], "torch.float64"),
        ([a_layer(), a_layer(queries=6)], "one shape"),
        ([a_layer(), a_layer(dtype=torch.float16)], "one shape and dtype"),
        ([a_layer()._replace(k=torch.randn(2, 2, 4, 9))], r"\[B, H, Q, D\]"),
        ([a_layer()._replace(k=torch.randn(2, 3, 4, 8))], r"\[B, H, Q, D\]"),
        ([a_layer()._replace(log_normalizer=torch.zeros(2, 2, 4))], "normalisers"),
        ([a_layer(dim=257)], "256 channels"),
        ([a_layer(images=0)], "at least one token"),
        ([a_layer()], "on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_kernels_cannot_take(layers, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match=message):
        Layers.of(layers)


def a_map(**changes):
    source = QueryKey(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), 0.5)
    return AttentionMap("blocks.0.attn", "token", TokenLayout(), replace(source, **changes))


MIX = HeadMix(torch.eye(2), torch.zeros(2))


@pytest.mark.parametrize(
    "other",
    [
        a_map(bias=torch.zeros(1, 1, 5, 5)),
        a_map(causal=True),
        a_map(premix=MIX),
        replace(a_map(), mix=MIX),
        replace(a_map(), origin=a_map().source),
        replace(a_map(), windows=2),
        replace(a_map(), source=Stored(torch.rand(2, 2, 5, 5))),
    ],
    ids=["bias", "causal", "premix", "mix", "origin", "windows", "stored"],
)
def test_maps_that_are_more_than_queries_and_keys(other, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available([a_map(), a_map()])
    assert not available([a_map(), other])
    with pytest.raises(UsageError, match="layer 1 is not"):
        layers_of([a_map(), other])


def test_maps_that_lie_elsewhere_or_differ(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = a_map(q=torch.randn(2, 2, 5, 16), k=torch.randn(2, 2, 5, 16))
    double = a_map(q=torch.randn(2, 2, 5, 8).double(), k=torch.randn(2, 2, 5, 8).double())
    for maps in ([], [a_map(), wide], [double], [a_map(k=torch.randn(2, 2, 5, 8).half())], [a_map()] * 65):
        assert not available(maps)
    assert available([wide])
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not available([wide])


def test_a_machine_on_which_kernels_do_not_compile(monkeypatch):
    """A warning, once, and attention is compared by PyTorch's operators."""

    def failing(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(trial, "available", lambda _: True)
    monkeypatch.setattr(trial, "normalise", failing)
    trial._runs.cache_clear()
    maps = [a_map(), a_map()]
    with pytest.warns(UserWarning, match=r"do not run here \(RuntimeError: Failed to find C compiler\.\)"):
        assert not usable(maps)
    metric = CrossLayerSimilarity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.update(maps)
    trial._runs.cache_clear()
    assert metric.compute()["similarity"].isfinite().all()


def test_ranges_and_results_of_other_layers_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layers = Layers.of([a_layer(), a_layer()])
    for start, stop in ((-1, 2), (2, 2), (3, 2), (0, 5)):
        with pytest.raises(IndexError, match="4 keys"):
            layer_products(layers, start, stop)
    few = torch.zeros(2, 2, 3, 2)
    products = LayerProducts(torch.zeros(2, 2, 3, 2, 2), *[few] * 4, few.bool(), few.bool())
    with pytest.raises(UsageError, match="same keys"):
        image_products(layers, products, 0, 4)
    with pytest.raises(UsageError, match="same keys"):
        add_unit_columns(layers, products, 0, 4, torch.zeros(2, 2, 4, 5, dtype=torch.float64))
    for state in (torch.zeros(2, 2, 3, 5), torch.zeros(2, 2, 4, 5, dtype=torch.float64)):
        with pytest.raises(UsageError, match=r"unit_sum must be \[2, 2, 3, 5\]"):
            add_unit_columns(layers, products, 0, 3, state)
    with pytest.raises(UsageError, match="side by side"):
        add_unit_columns(layers, products, 0, 3, torch.zeros(2, 2, 5, 3, dtype=torch.float64).mT)


def test_floors_by_counting():
    layers, heads, queries, keys, dim = 3, 2, 5, 4, 7
    read = operations = 0
    for _ in range(layers * heads):
        read += 2 * (queries * dim + keys * dim) + 4 * queries
        operations += queries * keys * 2 * dim
    for _ in range(heads * keys):
        operations += sum(2 * queries for one in range(layers) for other in range(layers) if other <= one)
    assert floors(layers, heads, queries, keys, dim, 2) == Floors(read, operations)
