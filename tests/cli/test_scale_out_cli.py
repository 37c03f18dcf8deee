"""`analyze --shard`, `merge`, and `analyze` under `torchrun`: what they print where, what they leave, how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from collapse_probe.cli.app import app

MODEL = "digits_vit_24b"
WIDE = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than all the rest, and have tests of their own."""

    def write(analysis, folder, progress):  # noqa: ARG001
        analysis.save(folder)

    monkeypatch.setattr("collapse_probe.cli.results.write", write)


def probe(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.stderr, done.exception)
    assert "Traceback" not in done.stderr
    return done


def outcome(folder):
    """Everything in an analysis but where it comes from; numbers to what float32 and its batches leave."""

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return round(value, 4) if isinstance(value, float) else value

    data = json.loads((folder / "analysis.json").read_text())
    del data["provenance"]
    return rounded(data)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The bundled model on its images, in three parts."""
    root = tmp_path_factory.mktemp("shards")
    for number in (1, 2, 3):
        done = probe("analyze", MODEL, "--shard", f"{number}/3", "--out", root / f"s_{number}")
        assert done.stdout == ""
        count = {1: 24, 2: 24, 3: 16}[number]
        assert done.stderr == f"Shard {number}/3: sums over {count} images written to {root / f's_{number}'}.\n"
    return root


def copied(shards, target, *numbers):
    for number in numbers:
        shutil.copytree(shards / f"s_{number}", target / f"s_{number}")
    return [target / f"s_{number}" for number in numbers]


def listing(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# -- shards ------------------------------------------------------------------------------------------------------------


def test_a_shard_leaves_its_sums_and_nothing_else(shards):
    assert listing(shards / "s_2") == {"shard.json", "sums.npz"}
    header = json.loads((shards / "s_2" / "shard.json").read_text())
    assert header["shard"] == {"number": 2, "count": 3}
    assert header["provenance"]["command"].startswith("collapse-probe")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shard", "1/2"], "give --out"),
        (["--shard", "0/4", "--out", "s"], "'0/4' is no shard"),
        (["--shard", "5/4", "--out", "s"], "'5/4' is no shard"),
        (["--shard", "x", "--out", "s"], "'x' is no shard"),
        (["--shard", "", "--out", "s"], "'' is no shard"),
        (["--shard", "1/2", "--out", "s", "--until-se", "0.1"], "until_se needs to see all images"),
        (["--force", "--out", "s"], "--force is for a shard"),
        (["--metrics", "nonsense", "--shard", "1/2", "--out", "s"], "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_options_are_usage_errors(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    done = probe("analyze", MODEL, *words, code=2)
    assert sentence in done.stderr
    assert done.stderr.count("Error") == 1
    assert listing(tmp_path) == set()


def test_shards_are_of_one_model(tmp_path):
    done = probe("analyze", "--shard", "1/2", "--out", tmp_path / "s", code=2)
    assert "Without a model, two are analysed side by side" in done.stderr
    assert not list((tmp_path / "s").iterdir())


@pytest.mark.parametrize("world", ["2", "many"])
def test_an_environment_that_torchrun_did_not_make(monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "unset them" in probe("analyze", code=2).stderr


def test_a_finished_shard_is_recognised(shards, tmp_path):
    (folder,) = copied(shards, tmp_path, 2)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = probe("analyze", MODEL, "--shard", "2/3", "--out", folder, "-b", 5)
    assert done.stderr.startswith(f"{folder} holds shard 2/3 of this run already: nothing was measured.")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    done = probe("analyze", MODEL, "--shard", "2/3", "--out", folder, "--force")
    assert "sums over 24 images written" in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} != before


@pytest.mark.parametrize("what", ["other options", "damage"])
def test_an_unfinished_shard_or_one_of_another_run_is_replaced(shards, tmp_path, what):
    (folder,) = copied(shards, tmp_path, 2)
    more = []
    if what == "damage":
        (folder / "sums.npz").write_bytes(b"")
    else:
        more = ["--threshold", "0.5"]
    assert "sums over 24 images written" in probe("analyze", MODEL, "--shard", "2/3", "--out", folder, *more).stderr
    if what == "damage":
        probe("merge", shards / "s_1", folder, shards / "s_3")
    else:
        assert "different options (threshold: 0.9 and 0.5)" in probe(
            "merge", shards / "s_1", folder, shards / "s_3", code=2
        ).stderr  # fmt: skip


# -- merge -------------------------------------------------------------------------------------------------------------


def test_merged_is_analysed(shards, tmp_path):
    merged = probe("merge", shards / "s_3", shards / "s_1", shards / "s_2", "--out", tmp_path / "merged")
    whole = probe("analyze", MODEL, "--out", tmp_path / "whole")
    assert listing(tmp_path / "merged") == listing(tmp_path / "whole")
    assert outcome(tmp_path / "merged") == outcome(tmp_path / "whole")
    head = merged.stdout.partition("run: ")[0]
    assert "blocks.11.attn" in head
    assert head == whole.stdout.partition("run: ")[0]
    provenance = json.loads((tmp_path / "merged" / "analysis.json").read_text())["provenance"]
    assert provenance["shards"] == 3
    assert provenance["images"]["count"] == 64


def test_merge_into_a_shard_or_over_an_older_result(shards, tmp_path):
    folders = copied(shards, tmp_path, 1, 2, 3)
    for _ in range(2):
        probe("merge", *folders, "--out", folders[0], "-q")
    assert {"shard.json", "sums.npz", "analysis.json", "arrays.npz"} <= listing(folders[0])


@pytest.mark.sweep
def test_merge_needs_no_model_library(shards):
    """Nor does it run a model: there is none that it could run."""
    code = (
        "import sys; sys.modules['timm'] = None; sys.argv[0] = 'collapse-probe'\n"
        "from torch import nn; nn.Module.__call__ = None\n"
        "from collapse_probe.cli import main; main()"
    )
    words = ["merge", *(str(shards / f"s_{number}") for number in (1, 2, 3))]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=WIDE)
    assert done.returncode == 0, done.stderr
    assert "blocks.11.attn" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("names", "code", "sentence"),
    [
        ([], 2, "shards"),
        (["s_1", "s_3"], 2, "Shard 2/3 is missing"),
        (["s_1", "s_2", "s_3", "s_2"], 2, "Shard 2/3 is given more than once"),
        (["s_1", "nowhere"], 3, "nowhere holds no saved shard: shard.json is missing"),
        (["s_1", "empty"], 3, "empty holds no saved shard: shard.json is missing"),
        (["s_1/shard.json", "s_2", "s_3"], 3, "shard.json/shard.json cannot be read"),
        (["s_1", "cut", "s_3"], 3, "cut holds a damaged shard"),
        (["s_1", "flipped", "s_3"], 3, "flipped holds a damaged shard"),
        (["s_1", "nonsense", "s_3"], 3, "nonsense/shard.json"),
        (["s_1", "list", "s_3"], 3, "list/shard.json has schema version None"),
        (["s_1", "newer", "s_3"], 3, "newer/shard.json has schema version 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_merged_ends_with_a_sentence(shards, tmp_path, monkeypatch, names, code, sentence):
    copied(shards, tmp_path, 1, 2, 3)
    (tmp_path / "empty").mkdir()
    for name in ("cut", "flipped", "nonsense", "list", "newer"):
        shutil.copytree(shards / "s_2", tmp_path / name)
    sums = (shards / "s_2" / "sums.npz").read_bytes()
    (tmp_path / "cut" / "sums.npz").write_bytes(sums[: len(sums) // 2])
    (tmp_path / "flipped" / "sums.npz").write_bytes(sums[:5000] + bytes([sums[5000] ^ 1]) + sums[5001:])
    header = json.loads((shards / "s_2" / "shard.json").read_text())
    for name, content in (
        ("nonsense", header | {"images": "many", "groups": 7}),
        ("list", [1]),
        ("newer", header | {"schema_version": 2}),
    ):
        (tmp_path / name / "shard.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    done = probe("merge", *names, "--out", "run", code=code)
    assert sentence in done.stderr
    assert done.stdout == ""
    assert not list(Path("run").glob("*"))


def test_merge_where_nothing_can_be_written(shards, tmp_path):
    (tmp_path / "file").write_text("x")
    done = probe("merge", *(shards / f"s_{n}" for n in (1, 2, 3)), "--out", tmp_path / "file" / "run", code=5)
    assert "--out" in done.stderr


def test_help_names_what_to_do():
    assert "collapse-probe merge s_*/ --out run/" in probe("merge", "--help").stdout
    flags = probe("analyze", "--help").stdout
    assert "--shard" in flags
    assert "--force" in flags


# -- torchrun ----------------------------------------------------------------------------------------------------------

#: `collapse-probe`, but without figures and with a note of who writes; a second process that hangs, or an error first.
DRIVER = """
import os, sys, time
from pathlib import Path
import collapse_probe.analysis, collapse_probe.cli.results as results
from collapse_probe.cli import main
from collapse_probe.cli.app import app

rank, here = os.environ["RANK"], Path(__file__).parent

def write(analysis, folder, progress):
    analysis.save(folder)
    with (here / "written").open("a") as file:
        file.write(rank)

def hang(*args, **kwargs):
    (here / "hanging").touch()
    time.sleep(600)

results.write = write
how = sys.argv.pop(1)
if how == "hang" and rank == "1":
    collapse_probe.analysis.measure = hang
if how == "twice":
    try:
        app(["analyze", "digits_vit_24b", "--images", str(here / "nowhere"), "--out", str(here / "run")])
    except SystemExit as error:
        (here / f"code{rank}").write_text(str(error.code))
main()
"""


def torchrun(folder, how, *words):
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(folder / "driver.py"), how]
    return subprocess.Popen(
        [*command, "analyze", MODEL, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=WIDE, start_new_session=True,
    )  # fmt: skip


def test_under_torchrun_one_process_speaks_and_writes(shards, tmp_path):
    process = torchrun(tmp_path, "twice", "--out", tmp_path / "run")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == ["4", "4"]
    assert err.count("nowhere does not exist") == 1
    assert "Internal error" not in err
    assert (tmp_path / "written").read_text() == "0"
    assert out.count("blocks.11.attn ") == 1
    said = [line for line in err.splitlines() if not line.startswith("[W")]  # PyTorch's own
    assert len(said) == 1, said  # that error; without a terminal there is no bar
    probe("merge", *(shards / f"s_{n}" for n in (1, 2, 3)), "--out", tmp_path / "merged", "-q")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "merged")


@pytest.mark.sweep
def test_interrupted_under_torchrun_while_one_waits_for_the_other(tmp_path):
    process = torchrun(tmp_path, "hang")
    while not (tmp_path / "hanging").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    time.sleep(2)  # the first process has nothing more to do than wait
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert err.count("Interrupted.") == 1
    assert "Internal error" not in err
    assert "/collapse_probe/" not in err  # no traceback of ours
    assert out == ""


def test_shards_and_results_keep_apart(tmp_path):
    """A shard never takes another one's place, and results never join the images."""
    words = ["analyze", MODEL, "--num-samples", "16", "-q"]
    first = CliRunner().invoke(app, [*words, "--shard", "1/2", "--out", str(tmp_path / "one")])
    assert first.exit_code == 0, first.output
    done = CliRunner().invoke(app, [*words, "--shard", "2/2", "--out", str(tmp_path / "one")])
    assert done.exit_code == 2
    assert "holds shard 1/2. Give shard 2/2 a folder of its own, or --force" in done.stderr
    for out in (tmp_path, tmp_path / "run"):
        done = CliRunner().invoke(app, [*words, "--images", str(tmp_path), "--out", str(out)])
        assert done.exit_code == 2
        assert "lies in the folder of images" in done.stderr
