"""`analyze` that is interrupted, by a key, a signal or a kill, and goes on with `--resume`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_scale_out import assert_same, pictures
from typer.testing import CliRunner

import collapse_probe as cp
from collapse_probe.cli.app import app

MODEL = "digits_vit_24b"
WIDE = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}

#: `collapse-probe`, but without figures, with a state saved after every batch, and a file that says so.
DRIVER = """
import sys, time
from pathlib import Path
import collapse_probe.cli.results as results
import collapse_probe.resuming as resuming
from collapse_probe.cli import main

here, pause = Path(sys.argv.pop(1)), float(sys.argv.pop(1))
resuming.SAVE_EVERY, resuming.SHARE = 0.0, 1e9
save = resuming.Keeper.save

def noted(self, *arguments):
    done = save(self, *arguments)
    (here / "saved").touch()
    time.sleep(pause)
    return done

def write(analysis, folder, progress):
    analysis.save(folder)

resuming.Keeper.save = noted
results.write = write
sys.argv[0] = "collapse-probe"
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, of which one cannot be read, and what an undisturbed run makes of them."""
    root = tmp_path_factory.mktemp("resume")
    (root / "driver.py").write_text(DRIVER)
    pictures(root / "pictures", 150, broken={77})
    probe("analyze", MODEL, "--images", root / "pictures", "-b", 6, "--out", root / "whole", "-q")
    return root


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("collapse_probe.cli.results.write", lambda analysis, folder, _progress: analysis.save(folder))


def probe(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.stderr, done.exception)
    return done


def started(place, out, *more, pause=0.0, launcher=()):
    """The driver in a process group of its own, as a terminal would start it."""
    (place / "saved").unlink(missing_ok=True)
    words = ["analyze", MODEL, "--images", place / "pictures", "-b", 6, "--out", out, *more]
    command = [sys.executable, *launcher, place / "driver.py", place, pause, *words]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=WIDE,
        start_new_session=True,
    )  # fmt: skip


def wait_for(place, process):
    """Until a state was saved."""
    while not (place / "saved").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def alive(group):
    """Processes of a group that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(path.parent.name)
    return found


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("number", "code", "ended", "more"),
    [
        pytest.param(signal.SIGINT, 130, "Interrupted.", ["-j", 2], marks=pytest.mark.sweep),
        pytest.param(signal.SIGTERM, 143, "Terminated.", ["--shard", "1/1", "-q"], marks=pytest.mark.sweep),
        pytest.param(signal.SIGTERM, 143, "Terminated.", ["-j", 2], marks=pytest.mark.sweep),
    ],
    ids=["ctrl-c", "sigterm", "sigterm to workers, too"],
)
def test_interrupted_and_resumed(place, tmp_path, number, code, ended, more):
    out = tmp_path / "run"
    process = started(place, out, *more, pause=0.2)
    wait_for(place, process)
    (os.killpg if "-j" in more else os.kill)(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert stdout == ""
    assert not alive(process.pid)
    # "Terminated." comes before, "Interrupted." after; a progress bar may leave an empty line.
    lines = sorted(filter(None, stderr.splitlines()))
    assert len(lines) == 2, lines
    assert lines.pop(-1 if number == signal.SIGTERM else 0) == ended
    part = cp.Analysis.load(out / "partial")
    count = part.provenance["images"]["count"]
    assert 0 < count < 149
    assert lines[0].startswith(
        f"Saved the sums over {count} of 150 images to {out / 'partial'}. To go on: collapse-probe"
    )
    assert lines[0].endswith(" --resume")
    assert not part.complete
    assert {name.partition("/")[0] for name in files(out)} == {"partial"}
    resumed = probe("analyze", MODEL, "--images", place / "pictures", "-b", 6, "--out", out, "--resume", *more[:2])
    assert f"Going on after {count} images." in resumed.stderr or "-q" in more
    assert not (out / "partial").exists()
    if "--shard" in more:
        probe("merge", out, "--out", out, "-q")
    assert_same(cp.Analysis.load(place / "whole"), cp.Analysis.load(out), atol=2e-5)


@pytest.mark.sweep
def test_an_earlier_result_is_not_touched(place, tmp_path):
    out = tmp_path / "run"
    cp.Analysis.load(place / "whole").save(out)
    before = {name: (out / name).read_bytes() for name in files(out)}
    process = started(place, out, "--threshold", "0.5", pause=0.2)
    wait_for(place, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert {name: (out / name).read_bytes() for name in before} == before
    # Its state is another run's than the one that is asked for now.
    done = probe("analyze", MODEL, "--images", place / "pictures", "--out", out, "--resume", code=2)
    assert "different options (threshold: 0.5 and 0.9)" in done.stderr
    assert {name: (out / name).read_bytes() for name in before} == before
    over = probe("analyze", MODEL, "--images", place / "pictures", "--out", out)
    assert "held what an interrupted run has measured: starting over." in over.stderr
    assert not (out / "partial").exists()


def killed_until_done(place, out, kills, choose):
    """Start, kill at a random moment, go on, until so many kills are done; then to the end."""
    done = 0
    while done < kills:
        process = started(place, out, "--resume")
        wait_for(place, process)
        time.sleep(choose())
        if process.poll() is not None:  # it was faster
            process.communicate()
            return done
        process.kill()
        process.communicate()
        done += 1
    process = started(place, out, "--resume")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert kills == 0 or "Going on after" in stderr
    return done


def assert_undisturbed(place, out):
    whole, run = cp.Analysis.load(place / "whole"), cp.Analysis.load(out)
    assert_same(whole, run, atol=2e-5)
    assert run.provenance["images"]["skipped"] == whole.provenance["images"]["skipped"]
    assert not (out / "partial").exists()


@pytest.mark.sweep
def test_killed_and_resumed(place, tmp_path):
    killed_until_done(place, tmp_path / "run", 1, lambda: 0.1)
    assert_undisturbed(place, tmp_path / "run")


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(6))
def test_killed_many_times_and_resumed(place, tmp_path, seed):
    generator = random.Random(seed)
    killed_until_done(place, tmp_path / "run", 6, lambda: generator.uniform(0, 0.25))
    assert_undisturbed(place, tmp_path / "run")


def test_terminated_while_starting(place, tmp_path):
    process = started(place, tmp_path / "run")
    time.sleep(1.0)  # libraries are being imported
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode in (143, -signal.SIGTERM), stderr
    assert "Traceback" not in stderr


@pytest.mark.sweep
def test_under_torchrun(place, tmp_path):
    """Each process goes on with its own images; only as many as before may."""
    out, launcher = tmp_path / "run", ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = started(place, out, pause=0.3, launcher=launcher)
    folders = [out / "partial" / f"rank-{rank}-of-2" for rank in (1, 2)]
    while not all((folder / "shard.json").exists() for folder in folders):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=90)
    assert stderr.count("To go on:") == 1, stderr
    done = probe("analyze", MODEL, "--images", place / "pictures", "-b", 6, "--out", out, "--resume", code=2)
    assert "was left by 2 processes, and this is a run of 1 process" in done.stderr
    process = started(place, out, "--resume", launcher=launcher)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stderr.count("Going on after") == 1, stderr
    assert_undisturbed(place, out)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["analyze", MODEL, "--resume"], "--resume goes on from what a run left in its --out folder: give --out."),
        (["analyze", "--resume", "--out", "run"], "Without a model, two are analysed side by side"),
    ],
)
def test_wrong_use(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in probe(*words, code=2).stderr
    assert files(tmp_path) == set()


def test_results_that_could_not_be_written_need_no_second_measurement(place, tmp_path, monkeypatch):
    from collapse_probe.errors import OutputError

    def full(*_):
        raise OutputError("Cannot write: No space left on device.")

    words = ["analyze", MODEL, "--images", place / "pictures", "-b", 6, "--out", tmp_path / "run"]
    with monkeypatch.context() as patched:
        patched.setattr("collapse_probe.cli.results.write", full)
        probe(*words, code=5)
    state = json.loads((tmp_path / "run" / "partial" / "shard.json").read_text())
    assert state["state"]["done"]
    monkeypatch.setattr("collapse_probe.streaming.capture", None)  # no image is looked at again
    assert "Going on after 149 images." in probe(*words, "--resume").stderr
    one, two = (cp.Analysis.load(folder).similarity for folder in (place / "whole", tmp_path / "run"))
    np.testing.assert_allclose(one, two, atol=1e-12)
    assert_undisturbed(place, tmp_path / "run")
