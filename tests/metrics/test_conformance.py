"""What every metric promises, for each case of `_cases.py`: no split, order, merge, process, dtype or bad value changes
what it says, and what it says is what naive loops say."""

from __future__ import annotations

import copy
import fnmatch
import functools
import inspect
import io
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _cases import CASES
from _conformance import (
    HEADS,
    LAYERS,
    SHARDS,
    TOKENS,
    WHOLE,
    WIDE_TOKENS,
    assert_same,
    beside_layer,
    is_error,
    make_maps,
    make_stream,
    partner,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collapse_probe import metrics
from collapse_probe.errors import UsageError
from collapse_probe.metrics.base import StreamingMetric

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
map_cases = pytest.mark.parametrize("case", [case for case in CASES if case.on_maps], ids=lambda case: case.id)
few_examples = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TOLERANCE = {
    torch.float64: {"atol": 1e-9, "rtol": 1e-9},
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.bfloat16: {"atol": 2e-4, "rtol": 2e-4},
    torch.float16: {"atol": 2e-4, "rtol": 2e-4},
}


CASES_BY_ID = {case.id: case for case in CASES}


@functools.cache
def whole(case_id: str):
    """All images in one update."""
    case = CASES_BY_ID[case_id]
    return case.run(case.stream(24))


def test_every_metric_has_a_case():
    exported = (getattr(metrics, name) for name in metrics.__all__)
    classes = {item for item in exported if inspect.isclass(item) and issubclass(item, StreamingMetric)}
    assert not {item.__name__ for item in classes - {case.metric for case in CASES}}
    assert len(CASES_BY_ID) == len(CASES)


# -- references ------------------------------------------------------------------------------------------------------


def assert_as_expected(case, stream, got, dtype=torch.float64, what="", steps=True):
    """What the reference says of the same numbers in float64.

    Args:
        case: what is compared.
        stream: what was measured, before it was rounded to `dtype`.
        got: the readings.
        dtype: of the input.
        what: put into messages.
        steps: compare readings that jump where a value crosses an edge.
    """
    skipped = case.unreferenced if steps else (*case.unreferenced, *case.steps)
    expected = case.expected(stream.rounded(dtype), got.keys())
    got, expected = (
        {name: value for name, value in item.items() if not _matches(name, skipped)} for item in (got, expected)
    )
    assert_same(case, got, expected, what=f"{what} against the reference", **TOLERANCE[dtype])


def _matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@every_case
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_reference(case, dtype):
    stream = case.stream(10)
    assert_as_expected(case, stream, case.run(stream, dtype=dtype), dtype, steps=dtype == torch.float64)


@every_case
def test_other_shapes_equal_the_reference(case):
    """Without prefix tokens, with a single prefix key left over, with other numbers of queries and keys."""
    sizes = {"layers": 2, "prefix_tokens": 0, "grid": (2, 2)}
    if not case.on_maps:
        sizes |= {"grid": (3, 3), "tokens": 9}
    square = case.stream(9, **sizes, **({"queries": 4, "keys": 4, "heads": 3} if case.on_maps else {}))
    streams = [square]
    if case.on_maps:
        streams += [
            make_maps(9, queries=5, keys=4, prefix_tokens=2, grid=None, seed=1),
            make_maps(9, queries=4, keys=3, windows=3, prefix_tokens=1, grid=None, seed=2),
            make_maps(9, queries=4, keys=4, windows=2, prefix_tokens=0, grid=None, seed=3),
        ]
    else:
        streams.append(make_stream(9, tokens=6, prefix_tokens=2, grid=None, channels=3, seed=1))
    for stream in streams:
        if not case.why_not(stream):
            assert_as_expected(case, stream, case.run(stream), what=f" on {stream.sizes}")


# -- shapes, names and bounds ----------------------------------------------------------------------------------------


@every_case
def test_readings_have_the_axes_that_the_docstring_promises(case):
    stream = case.stream(9)
    out = case.run(stream)
    assert out, case.id
    assert case.make(stream).results() == {}, f"{case.id}: readings before the first image"
    for name, value in out.items():
        axes = case.axes_of(name)
        sizes = [stream.sizes.get(axis, int(axis) if axis.isdigit() else -1) for axis in axes]
        assert len(axes) == value.ndim, f"{case.id}: {name} has the shape {list(value.shape)}, documented are {axes}"
        for axis, size, length in zip(axes, sizes, value.shape, strict=True):
            assert size in (-1, length), f"{case.id}: {name} has the shape {list(value.shape)}, documented are {axes}"
            explained = axis.islower() or re.search(rf"\b{axis} [a-z]", case.metric.__doc__)
            assert size >= 0 or explained, f"{case.id}: the docstring does not say what the axis {axis} of {name} is"
        assert value.dtype in (torch.float64, torch.int64), f"{case.id}: {name} is {value.dtype}"
        if axes == ["L", "L"]:
            torch.testing.assert_close(value, value.mT, atol=1e-9, rtol=0, equal_nan=True, msg=f"{case.id}: {name}")
        if is_error(name):
            assert partner(name) in out, f"{case.id}: {name} is the error of nothing"
            assert out[partner(name)].shape == value.shape, f"{case.id}: {name} and its reading differ in shape"
        elif value.ndim > 2 or "_by_" in name:
            continue
        else:
            assert axes in (["L"], ["L", "L"]) or name in case.axes, f"{case.id}: {name} is neither [L] nor [L, L]"
    assert case.absent_reading in out, f"{case.id}: {case.absent_reading} is not reported"


def assert_within_bounds(case, stream, out, slack=1e-9, what=""):
    for name, value in out.items():
        low, high = case.limits(name, stream.sizes)
        value = value.double()
        bad = ((value < low - slack) | (value > high + slack)).any() or value.isinf().any()
        assert not bad, f"{case.id}{what}: {name} is {value.tolist()}, outside {low}..{high}"


@every_case
@few_examples
@given(data=st.data())
def test_readings_lie_within_their_bounds(case, data):
    images, layers = data.draw(st.integers(1, 9), "images"), data.draw(st.integers(1, 3), "layers")
    grid = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 3), (4, 2)]), "grid")
    prefix, seed = data.draw(st.integers(0, 2), "prefix"), data.draw(st.integers(0, 1000), "seed")
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), "dtype")
    tokens = prefix + math.prod(grid)
    common = {"layers": layers, "prefix_tokens": prefix, "grid": grid, "seed": seed}
    if case.on_maps:
        peakedness = data.draw(st.sampled_from([0.0, 1e-6, 1e-3, 0.3, 1.0, 10.0, 300.0]), "peakedness")
        heads = data.draw(st.integers(1, 3), "heads")
        stream = make_maps(images, heads=heads, queries=tokens, keys=tokens, peakedness=peakedness, **common)
    else:
        shared = data.draw(st.sampled_from([0.0, 0.3, 3.0, 1e3]), "shared")
        channels = data.draw(st.integers(1, 6), "channels")
        stream = make_stream(images, tokens=tokens, channels=channels, shared=shared, **common)
    if case.why_not(stream):
        return
    slack = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_within_bounds(case, stream, case.run(stream, dtype=dtype), slack)


# -- batches, order, merging -----------------------------------------------------------------------------------------


def parts_of(stream, unit, data):
    """The stream cut anywhere between units."""
    starts = np.flatnonzero(np.diff(stream.index // unit)) + 1
    cuts = data.draw(st.lists(st.sampled_from(starts.tolist()), unique=True, max_size=6).map(sorted), "cuts")
    return [stream.select(part) for part in np.split(np.arange(stream.images), cuts)]


@every_case
@few_examples
@given(data=st.data(), with_index=st.booleans())
def test_no_split_changes_a_reading(case, data, with_index):
    parts = parts_of(case.stream(24), case.metric.unit, data)
    assert_same(case, case.run(*parts, index=with_index), whole(case.id))


@map_cases
def test_no_split_of_windows_changes_a_reading(case):
    """Nor an order of their units."""
    stream = make_maps(24, queries=4, keys=4, windows=3, grid=None)
    if case.why_not(stream):
        pytest.skip(case.why_not(stream))
    parts = [stream.select(np.arange(start, start + WHOLE)) for start in (16, 0, 8)]
    parts[1:2] = [parts[1].select(np.arange(4)), parts[1].select(np.arange(4, WHOLE))]
    assert_same(case, case.run(*parts), case.run(stream))


@every_case
@few_examples
@given(data=st.data())
def test_images_that_are_missing_change_only_themselves(case, data):
    """Blocks follow the index, whatever could not be read."""
    lost = data.draw(st.sets(st.integers(0, 23), min_size=1, max_size=6), "lost")
    stream = case.stream(24).select(np.array([i for i in range(24) if i not in lost]))
    parts = parts_of(stream, case.metric.unit, data)
    assert_same(case, case.run(*parts), case.run(stream))


@every_case
@few_examples
@given(order=st.permutations(range(3)))
def test_no_order_of_units_changes_a_reading(case, order):
    stream = case.stream(24)
    parts = [stream.select(np.arange(unit * WHOLE, (unit + 1) * WHOLE)) for unit in order]
    assert_same(case, case.run(*parts), whole(case.id))


@every_case
def test_means_hang_on_no_order_at_all(case):
    """What has no unit may be shuffled image by image."""
    if case.metric.unit != 1:
        pytest.skip("looks at several images together")
    stream = case.stream(24)
    order = np.random.default_rng(0).permutation(24)
    parts = [stream.select(order[i : i + 1]) for i in range(24)]
    assert_same(case, case.run(*parts), whole(case.id))


def halves(case):
    stream = case.stream(24)
    return stream.select(np.arange(WHOLE)), stream.select(np.arange(WHOLE, 24))


def fed(case, *parts, **kwargs):
    metric = case.make(case.stream(1), **kwargs)
    for part in parts:
        case.update(metric, part)
    return metric


@every_case
def test_metrics_merge(case):
    one, other = halves(case)
    first, second, unused = fed(case, one), fed(case, other), fed(case)
    first.merge_state(second)
    assert_same(case, first.compute(), whole(case.id), what=" merged")
    first.merge_state(unused)
    assert_same(case, first.compute(), whole(case.id), what=" merged with an unused one")
    unused.merge_state(first)
    assert_same(case, unused.compute(), whole(case.id), what=" unused, merged with a used one")
    assert_same(case, second.results(), case.run(other), what=" after others took its sums")


@every_case
def test_a_merge_is_seen_after_a_result(case):
    one, other = halves(case)
    first = fed(case, one)
    first.compute()
    first.merge_state(fed(case, other))
    assert_same(case, first.compute(), whole(case.id))
    first = fed(case, other)
    first.merge_state(fed(case, one))
    case.update(first, one)
    first.reset()
    case.update(first, one)
    assert_same(case, first.compute(), case.run(one), what=" reset")


@every_case
def test_an_update_goes_on_from_what_was_merged(case):
    """Without an index images are counted on from all that were merged."""
    one, other = halves(case)
    first = fed(case)
    first.merge_state(fed(case, one))
    case.update(first, other, index=False)
    assert_same(case, first.compute(), whole(case.id))


@every_case
def test_sums_go_through_files(case):
    one, other = halves(case)

    def saved(metric):
        buffer = io.BytesIO()
        np.savez(buffer, **metric.sums())
        buffer.seek(0)
        with np.load(buffer, allow_pickle=False) as file:
            return dict(file)

    for order in ([one, other], [other, one]):
        for before in (None, *order):
            metric = fed(case) if before is None else fed(case, before)
            for part in [part for part in order if part is not before]:
                metric.add_sums(saved(fed(case, part)))
            metric.add_sums(saved(fed(case)))
            assert_same(case, metric.compute(), whole(case.id))


@every_case
def test_sums_are_not_changed_by_later_updates(case):
    one, other = halves(case)
    metric = fed(case, one)
    sums = metric.sums()
    case.update(metric, other)
    again = fed(case)
    again.add_sums(sums)
    assert_same(case, again.compute(), case.run(one))


@every_case
def test_other_shapes_cannot_be_added(case):
    """Sums over another number of layers might broadcast."""
    single = case.stream(WHOLE, layers=1)
    if case.why_not(single):
        single = case.stream(WHOLE, layers=2)
    used, other = fed(case, case.stream(WHOLE)), case.make(single)
    case.update(other, single)
    before = used.sums()
    for add in (used.merge_state, lambda metric: used.add_sums(metric.sums())):
        with pytest.raises(UsageError, match="cannot add"):
            add(other)
    with pytest.raises(UsageError, match="cannot add"):
        case.update(used, single)
    for name, value in used.sums().items():
        np.testing.assert_array_equal(value, before[name], err_msg=f"{case.id}: {name} after a refusal")


@every_case
def test_forward_gives_the_batch_and_gathers_the_whole(case):
    one, other = halves(case)
    metric = fed(case)
    first = metric(one.batch(torch.float64))
    second = metric(other.batch(torch.float64))
    assert_same(case, first, case.run(one), what=" of the first batch")
    assert_same(case, second, case.run(other), what=" of the second batch")
    assert_same(case, metric.compute(), whole(case.id))


# -- copies ----------------------------------------------------------------------------------------------------------


def through_state_dict(case, metric):
    metric.persistent(True)
    loaded = fed(case)
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    return loaded


@every_case
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "state_dict", "clone"])
def test_copies_go_on_in_mid_stream(case, way):
    one, other = halves(case)
    metric = fed(case, one)
    copies = {
        "pickle": lambda: pickle.loads(pickle.dumps(metric)),
        "deepcopy": lambda: copy.deepcopy(metric),
        "state_dict": lambda: through_state_dict(case, metric),
        "clone": metric.clone,
    }
    again = copies[way]()
    assert_same(case, again.results(), case.run(one), what=" copied")
    case.update(again, other, index=False)
    assert_same(case, again.compute(), whole(case.id), what=" copied and continued")
    assert_same(case, metric.compute(), case.run(one), what=" of which a copy went on")


@every_case
def test_loading_replaces_what_was_seen(case):
    """Sizes too."""
    other = case.stream(WHOLE, layers=2)
    metric = case.make(other)
    case.update(metric, other)
    metric.results()
    metric.persistent(True)
    used = fed(case, case.stream(24))
    used.persistent(True)
    metric.load_state_dict(used.state_dict())
    assert_same(case, metric.results(), whole(case.id))
    case.update(metric, case.stream(32).select(np.arange(24, 32)))


# -- modes and dtypes ------------------------------------------------------------------------------------------------


@every_case
def test_states_survive_inference_mode(case):
    one, other = halves(case)
    metric = fed(case)
    with torch.inference_mode():
        case.update(metric, one)
        metric.compute()
    case.update(metric, other.select(np.arange(8)))
    with torch.inference_mode():
        case.update(metric, other.select(np.arange(8, 16)))
        out = metric.compute()
    assert_same(case, out, whole(case.id))


@every_case
@pytest.mark.parametrize("what", ["make", "reset", "merge", "add_sums", "forward", "load"])
def test_nothing_that_inference_mode_did_stops_later_updates(case, what):
    one, other = halves(case)
    metric, used = fed(case), fed(case, one)
    with torch.inference_mode():
        if what == "make":
            metric = fed(case)
        elif what == "reset":
            metric.reset()
        elif what == "merge":
            metric.merge_state(used)
        elif what == "add_sums":
            metric.add_sums(used.sums())
        elif what == "forward":
            metric(one.batch(torch.float64))
        else:
            metric = through_state_dict(case, used)
    if what in ("make", "reset"):
        case.update(metric, one)
    case.update(metric, other)
    assert_same(case, metric.compute(), whole(case.id))


@every_case
@pytest.mark.parametrize(
    "demote",
    [
        lambda metric: metric.to(torch.bfloat16),
        lambda metric: metric.half(),
        lambda metric: metric.set_dtype(torch.float16),
        lambda metric: metric.float(),
        lambda metric: metric.to("cpu"),
    ],
    ids=["bfloat16", "half", "set_dtype", "float", "cpu"],
)
def test_sums_are_not_demoted(case, demote):
    one, other = halves(case)
    metric = fed(case, one)
    assert demote(metric) is metric
    case.update(metric, other)
    assert_same(case, metric.compute(), whole(case.id))
    demote(metric)
    metric.reset()
    case.update(metric, one)
    assert_same(case, metric.compute(), case.run(one), what=" reset")


@every_case
def test_autocast_changes_nothing(case):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.run(case.stream(24), dtype=torch.float32)
    assert_same(case, out, case.run(case.stream(24), dtype=torch.float32), atol=0)


@every_case
def test_gradients_are_not_followed(case):
    batch = case.stream(WHOLE).batch(torch.float32)
    for tensor in [batch] if case.on_maps else [layer.tensor for layer in batch]:
        tensor.requires_grad_()
    metric = fed(case)
    metric.update(batch)
    assert not any(value.requires_grad for value in metric.compute().values())


@every_case
def test_the_input_is_not_changed(case):
    batch = case.stream(WHOLE).batch(torch.float32)
    before = copy.deepcopy(batch)
    fed(case).update(batch)
    for one, other in zip(batch, before, strict=True):
        if case.on_maps:
            assert torch.equal(one, other), case.id
        else:
            for name in ("tensor", "attention_share", "mlp_share"):
                assert torch.equal(getattr(one, name), getattr(other, name)), f"{case.id}: {name}"


@every_case
def test_reset_forgets_everything(case):
    other = case.stream(WHOLE, layers=2)
    metric = case.make(other)
    case.update(metric, other)
    metric.compute()
    metric.reset()
    assert metric.results() == {}
    case.update(metric, case.stream(24), index=False)
    assert_same(case, metric.compute(), whole(case.id))


@every_case
def test_state_does_not_grow_with_images(case):
    metric = fed(case, case.stream(WHOLE))
    size = metric.state_bytes()
    case.update(metric, case.stream(64).select(np.arange(8, 64)))
    assert metric.state_bytes() == size > 0
    for name, value in metric.sums().items():
        assert value.dtype in (np.float64, np.int64), f"{case.id}: {name} is {value.dtype}"


@map_cases
@pytest.mark.parametrize("tile_bytes", [1, 3000, 20000])
def test_no_tile_size_changes_a_reading(case, tile_bytes):
    windows = [make_maps(8, windows=3, queries=4, keys=4, prefix_tokens=prefix, grid=None) for prefix in (0, 1)]
    for stream in (case.stream(24), *windows):
        if not case.why_not(stream):
            metric = case.make(stream, tile_bytes=tile_bytes)
            case.update(metric, stream)
            assert_same(case, metric.compute(), case.run(stream), what=f" with windows={stream.windows}")


@every_case
def test_another_device_says_the_same(case):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    stream = case.stream(24)
    metric = case.make(stream)
    case.update(metric, stream.select(np.arange(WHOLE)))
    metric.to("cuda")
    case.update(metric, stream.select(np.arange(WHOLE, 24)), device="cuda")
    out = {name: value.cpu() for name, value in metric.to("cpu").compute().items()}
    assert_same(case, out, whole(case.id), atol=1e-9)


# -- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured_by_ranks(tmp_path_factory):
    """Readings of every case by the ranks of groups of two and three processes."""
    if not torch.distributed.is_available() or not hasattr(os, "fork"):
        pytest.skip("needs torch.distributed and fork")
    folder = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    code = (
        f"import sys; sys.path[:0] = [{str(here)!r}]\n"
        "from pathlib import Path; from _cases import CASES; from _conformance import run_processes\n"
        f"run_processes(CASES, Path({str(folder)!r}))"
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    ranks = [folder / f"rank{rank}" for rank in range(3)]
    assert all(rank.exists() for rank in ranks), done.stderr[-3000:]
    return [pickle.loads(rank.read_bytes()) for rank in ranks], done.stderr[-3000:]


@pytest.mark.sweep
@every_case
@pytest.mark.parametrize("size", SHARDS)
def test_processes_agree(case, size, measured_by_ranks):
    """One rank sees no image in its first half, or none at all."""
    ranks, errors = measured_by_ranks
    stream = case.stream(24)
    shards = [np.array(shard, dtype=np.int64) for shard in SHARDS[size]]
    first = np.sort(np.concatenate([shard[: len(shard) // 2 // WHOLE * WHOLE] for shard in shards]))
    for rank, results in enumerate(ranks[:size]):
        assert (case.id, size) in results, f"{case.id}: rank {rank} of {size} gave up\n{errors}"
        out = results[case.id, size]
        assert_same(case, out["first"], case.run(stream.select(first)), what=f", rank {rank} of {size}, first half")
        assert_same(case, out["whole"], whole(case.id), what=f", rank {rank} of {size}")


# -- what is not finite ----------------------------------------------------------------------------------------------


#: Images, and which of them is bad: of token features the one without which three are left of the last eight.
BAD = {True: (12, 2), False: (20, 17)}


def planted(case, value):
    """A stream without a bad value, and the same with one, in layer 1 of one image."""
    images, bad = BAD[case.on_maps]
    stream = case.stream(images)
    data = stream.data.copy()
    data[(1, bad, 1, 3, 4) if case.on_maps else (1, bad, 4, 2)] = value
    return stream, stream.with_data(data)


@every_case
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(math.nan, torch.float64), (math.nan, torch.float32), (math.inf, torch.float64), (-math.inf, torch.float32)],
    ids=str,
)
def test_a_bad_value_stays_where_it_is(case, value, dtype):
    plain, stream = planted(case, value)
    got, clean = case.run(stream, dtype=dtype), case.run(plain, dtype=dtype)
    assert got.keys() == clean.keys()
    for name, reading in got.items():
        axes = case.axes_of(name)
        ours, theirs = (
            {name: beside_layer(item.numpy(), axes, 1)} if "L" in axes else {} for item in (reading, clean[name])
        )
        assert_same(case, ours, theirs, what=" in the other layers", atol=1e-12 if dtype == torch.float64 else 1e-6)
        lost = reading.isnan() & ~clean[name].isnan()
        assert not lost.any(), f"{case.id}: {name} is lost to one bad value: {reading.tolist()}"
    counts = got[case.absent_reading] - clean[case.absent_reading]
    assert counts[1] > 0, f"{case.id}: {case.absent_reading} does not count what is left out"
    assert_as_expected(case, stream, got, dtype, what=f" with {value}", steps=dtype == torch.float64)


@every_case
def test_an_image_of_bad_values_is_left_out(case):
    stream = case.stream(12)
    data = stream.data.copy()
    data[:, 5] = math.nan
    stream = stream.with_data(data)
    out = case.run(stream)
    assert_as_expected(case, stream, out, what=" without image 5")
    clean = case.run(case.stream(12))
    for name, reading in out.items():
        if name != case.absent_reading:
            lost = reading.isnan() & ~clean[name].isnan()
            assert not lost.any(), f"{case.id}: {name} is lost to one bad image"


@every_case
def test_a_layer_of_bad_values_is_absent(case):
    stream, clean = case.stream(12), case.run(case.stream(12))
    data = stream.data.copy()
    data[1] = math.nan
    out = case.run(stream.with_data(data))
    for name in out:
        axes = case.axes_of(name)
        if "L" in axes:
            ours, theirs = ({name: beside_layer(item[name].numpy(), axes, 1)} for item in (out, clean))
            assert_same(case, ours, theirs, what=" in the other layers")
    assert_as_expected(case, stream.with_data(data), out, what=" without layer 1")


# -- exact cases -----------------------------------------------------------------------------------------------------


def _one_hot(keys):
    return np.eye(TOKENS)[np.asarray(keys)]


def map_extremes():
    plain = make_maps(9)
    rng = np.random.default_rng(5)
    permutations = np.stack([_one_hot(rng.permutation(TOKENS)) for _ in range(LAYERS * 9 * HEADS)])
    zero_columns, zero_rows = plain.data.copy(), plain.data.copy()
    zero_columns[1, :, 0, :, 3] = 0
    zero_columns[2, 4, :, :, 5] = 0
    zero_rows[0, :, 1, 2] = 0
    zero_rows[2, 3, :, 4] = 0
    orthogonal = np.zeros_like(plain.data)
    orthogonal[0] = _one_hot(np.arange(TOKENS))
    orthogonal[1] = _one_hot(np.roll(np.arange(TOKENS), 1))
    orthogonal[2] = _one_hot(np.roll(np.arange(TOKENS), 2))
    tiny = plain.data.copy()
    tiny[..., 4] *= 1e-30
    return {
        "uniform": plain.with_data(np.full_like(plain.data, 1 / TOKENS)),
        "equal_rows": plain.with_data(np.broadcast_to(plain.data[..., :1, :], plain.data.shape).copy()),
        "one_hot": plain.with_data(np.broadcast_to(_one_hot([2] * TOKENS), plain.data.shape).copy()),
        "permutation": plain.with_data(permutations.reshape(plain.data.shape)),
        "identity": plain.with_data(np.broadcast_to(np.eye(TOKENS), plain.data.shape).copy()),
        "orthogonal": plain.with_data(orthogonal),
        "negative": plain.with_data(plain.data - 0.1),
        "identical_layers": plain.with_data(np.broadcast_to(plain.data[:1], plain.data.shape).copy()),
        "identical_heads": plain.with_data(np.broadcast_to(plain.data[:, :, :1], plain.data.shape).copy()),
        "identical_images": plain.with_data(np.broadcast_to(plain.data[:, :1], plain.data.shape).copy()),
        "zero_columns": plain.with_data(zero_columns),
        "zero_rows": plain.with_data(zero_rows),
        "all_zero": plain.with_data(np.zeros_like(plain.data)),
        "tiny_columns": plain.with_data(tiny),
        "single_image": make_maps(1),
        "two_images": make_maps(2),
        "single_layer": make_maps(9, layers=1),
        "single_head": make_maps(9, heads=1),
        "single_query": make_maps(9, queries=1, grid=None),
        "single_key": make_maps(9, queries=1, keys=1, prefix_tokens=0, grid=(1, 1)),
        "windows": make_maps(9, queries=4, keys=4, windows=3, prefix_tokens=0, grid=None),
        "no_grid": make_maps(9, grid=None),
    }


def token_extremes():
    plain = make_stream(9)
    zero = plain.data.copy()
    zero[1, :, 3] = 0
    zero[2, 4] = 0
    outlier = plain.data.copy()
    outlier[:, :, 5] *= 1e4
    orthogonal = np.zeros((LAYERS, 9, WIDE_TOKENS, WIDE_TOKENS))
    orthogonal[...] = np.eye(WIDE_TOKENS) * np.arange(1, WIDE_TOKENS + 1)
    return {
        "identical_tokens": plain.with_data(np.broadcast_to(plain.data[:, :, :1], plain.data.shape).copy()),
        "identical_layers": plain.with_data(np.broadcast_to(plain.data[:1], plain.data.shape).copy()),
        "identical_images": plain.with_data(np.broadcast_to(plain.data[:, :1], plain.data.shape).copy()),
        "scaled_layers": plain.with_data(plain.data[:1] * np.array([1.0, 3.0, 0.2])[:, None, None, None]),
        "zero_tokens": plain.with_data(zero),
        "all_zero": plain.with_data(np.zeros_like(plain.data)),
        "outlier": plain.with_data(outlier),
        "orthogonal_tokens": make_stream(9, channels=WIDE_TOKENS).with_data(orthogonal),
        "huge": plain.with_data(plain.data * 1e12),
        "tiny": plain.with_data(plain.data * 1e-12),
        "single_image": make_stream(1),
        "three_images": make_stream(3),
        "single_layer": make_stream(9, layers=1),
        "single_channel": make_stream(9, channels=1),
        "single_patch": make_stream(9, tokens=2, grid=(1, 1)),
        "single_token": make_stream(9, tokens=1, prefix_tokens=0, grid=(1, 1)),
        "no_prefix": make_stream(9, tokens=12, prefix_tokens=0),
        "no_grid": make_stream(9, grid=None),
    }


EXTREMES = {True: map_extremes(), False: token_extremes()}
extreme_cases = pytest.mark.parametrize(
    ("case", "extreme"),
    [
        pytest.param(case, extreme, id=f"{case.id}-{extreme}")
        for case in CASES
        for extreme, stream in EXTREMES[case.on_maps].items()
        if not case.why_not(stream) and not (extreme == "negative" and case.metric.map == "softmax")
    ],
)


@extreme_cases
def test_exact_cases(case, extreme):
    stream = EXTREMES[case.on_maps][extreme]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = case.run(stream)
    assert_within_bounds(case, stream, out, what=f" on {extreme}")
    for pattern, value in case.exact.get(extreme, {}).items():
        names = [
            name
            for name in out
            if name == pattern or (_matches(name, [pattern]) and not is_error(name) and not name.endswith("_absent"))
        ]
        assert names, f"{case.id} has no reading {pattern}"
        for name in names:
            np.testing.assert_allclose(
                out[name], value, atol=1e-9, equal_nan=True, err_msg=f"{case.id} on {extreme}: {name}"
            )
    if extreme not in case.rounding:
        assert_as_expected(case, stream, out, what=f" on {extreme}", steps=False)


@every_case
def test_named_extremes_exist(case):
    assert not case.exact.keys() - EXTREMES[case.on_maps].keys(), case.id


@every_case
def test_a_single_image_has_no_error(case):
    out = case.run(case.stream(1))
    for name in out:
        if is_error(name):
            assert out[name].isnan().all(), f"{case.id}: {name} of a single image is {out[name].tolist()}"
