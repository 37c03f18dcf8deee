"""The command line in processes of its own: what it prints where, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from collapse_probe.cli.app import app
from tests.report.pages import without_scripts

WIDE = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
FLAGS = [f"--model-kwargs={name}={value}" for name, value in KWARGS.items() if name != "num_classes"]


def probe(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "collapse_probe", *map(str, words)], capture_output=True, text=True, env=WIDE, cwd=cwd
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights in several wrappings, and pictures in nested folders."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **KWARGS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    torch.save(model.state_dict(), root / "plain.pt")
    save_file(model.state_dict(), root / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        path = root / "pictures" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 255, (40, 48, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return root


def test_the_main_job(folder, tmp_path):
    done = probe(
        "analyze", folder / "plain.pt", "--model", "vit_tiny_patch16_224", *FLAGS, "--images", folder / "pictures",
        "--out", tmp_path / "run", "-b", 5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "blocks.2.attn" in done.stdout
    assert "Traceback" not in done.stderr
    written = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    figures = {f"figures/{name}" for name in ("layer_similarity.png", "layer_similarity.svg", "heads.png")}
    assert {"analysis.json", "layers.csv", "similarity.csv", "report.html"} | figures <= written
    data = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert data["provenance"]["images"]["count"] == 12
    assert data["provenance"]["model"]["architecture"] == "vit_tiny_patch16_224"
    assert data["provenance"]["command"].startswith("collapse-probe analyze")
    assert data["findings"]
    report = without_scripts((tmp_path / "run" / "report.html").read_text())
    assert "blocks.2.attn" in report
    assert not re.search(r"""(src|href)=["']?https?:""", report)


@pytest.mark.sweep
def test_safetensors_and_options_reach_the_result(folder, tmp_path):
    done = probe(
        "analyze", folder / "model.safetensors", "-m", "vit_tiny_patch16_224", *FLAGS,
        "--data-dir", folder / "pictures", "-o", tmp_path, "--num-samples", 8, "--layers", "blocks.[01].*",
        "--mean", ".5,.5,.5", "--crop-pct", 1, "--threshold", "0.7", "--amp", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "analysis.json").read_text())
    provenance = data["provenance"]
    assert provenance["images"]["count"] == 8
    assert provenance["images"]["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert provenance["images"]["preprocessing"]["crop_pct"] == 1
    assert provenance["options"]["threshold"] == 0.7
    assert provenance["options"]["amp"]
    assert len(data["layers"]["rows"]) == 2


def test_a_model_without_images_borrows_the_bundled_ones_and_says_so(folder):
    done = probe("analyze", folder / "plain.pt", "--model", "vit_tiny_patch16_224", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "No images given" in done.stderr
    assert "No images given" not in done.stdout


@pytest.mark.sweep
def test_random_weights_only_on_request(folder):
    words = ["analyze", "vit_tiny_patch16_224", *FLAGS, "--images", folder / "pictures"]
    refused = probe(*words)
    assert refused.returncode == 3
    assert "--no-pretrained" in refused.stderr
    done = probe(*words, "--no-pretrained")
    assert done.returncode == 0, done.stderr
    assert "untrained" in done.stdout


class Foreign:
    """A harmless object whose pickle refers to a function: reading it must not call that function."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


@pytest.fixture
def strange(tmp_path):
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "foreign.pkl").write_bytes(pickle.dumps(Foreign()))
    torch.save({"model": Foreign()}, tmp_path / "foreign.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["no_such_model"], 3, "no_such_model"),
        (["missing.pt", "--model", "vit_tiny_patch16_224"], 3, "missing.pt"),
        (["empty.pt", "--model", "vit_tiny_patch16_224"], 3, "empty"),
        (["page.pth", "--model", "vit_tiny_patch16_224"], 3, "HTML"),
        (["pointer.pt", "--model", "vit_tiny_patch16_224"], 3, "Git LFS"),
        (["foreign.pkl", "--model", "vit_tiny_patch16_224"], 3, "mkdir"),
        (["foreign.pt", "--model", "vit_tiny_patch16_224"], 3, "mkdir"),
        (["other.pt", "--model", "vit_tiny_patch16_224"], 3, "weight"),
        (["other.pt", "--model", "vit_tiny_patch61_224"], 3, "vit_tiny_patch16_224"),
        (["--images", "nothing"], 4, "nothing"),
        (["--images", "absent"], 4, "absent"),
        (["--out", "file/run"], 5, "--out"),
        (["vit_tiny_patch16_224", "--model", "vit_small_patch16_224"], 2, "ambiguous"),
        (["vit_tiny_patch16_224.augreg_in21k", "--model", "vit_small_patch16_224"], 2, "ambiguous"),
        (["vit_tiny_patch16_224", "--checkpoint", "other.pt"], 2, "twice"),
        (["-b", "0"], 2, "batch_size"),
        (["--device", "cuda:7"], 2, "cuda:7"),
        (["--until-se", "3"], 2, "until_se"),
        (["--nearest", "0"], 2, "nearest"),
        (["--model-kwargs", "depth"], 2, "name=value"),
        (["--model-kwargs", "depth=2", "img_size=32"], 2, "repeat the option"),
        (["--device", "xpu"], 2, "xpu"),
        (["--layers", "foo*"], 2, "foo*"),
        (["--mean", "a,b"], 2, "--mean"),
        (["--nonsense"], 2, "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_ends_with_a_sentence_and_its_code(strange, monkeypatch, words, code, sentence):
    if code != 2 and "--images" not in words and "--out" not in words:
        words = [*words, "--images", Path(__file__).parents[2] / "collapse_probe" / "data" / "digits"]
    before = set(strange.rglob("*"))
    monkeypatch.chdir(strange)
    done = CliRunner().invoke(app, ["analyze", *words])
    assert done.exit_code == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert "weights_only" not in done.stderr
    assert done.stdout == ""
    assert set(strange.rglob("*")) == before  # nothing half-written, and the canary was not made


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.sweep)]
)
def test_interruption(folder, tmp_path, number, code):
    picture = (folder / "pictures" / "class0" / "0.png").read_bytes()
    many = tmp_path / "many"  # more than any machine gets through before the signal comes
    many.mkdir()
    for name in range(500):
        (many / f"{name}.png").write_bytes(picture)
    process = subprocess.Popen(
        [sys.executable, "-m", "collapse_probe", "analyze", "vit_base_patch16_224", "--no-pretrained", "--images",
         str(many), "-b", "1", "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=WIDE,
        # Where tests run in the background, the interrupt is ignored, and children inherit that.
    )  # fmt: skip
    time.sleep(6)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert out == ""
    assert {path.name for path in (tmp_path / "run").glob("*")} <= {"partial"}


@pytest.mark.sweep
@pytest.mark.parametrize(("reader", "code"), [("| true", 0), ("> /dev/full", 5)])
def test_stdout_that_cannot_be_written(reader, code):
    command = f"{sys.executable} -m collapse_probe analyze -q {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=WIDE)
    assert done.returncode == code, done.stderr
    assert "bug" not in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version():
    assert "analyze" in probe("--help").stdout
    assert probe("--version").stdout.startswith("collapse-probe 0.")
    flags = probe("analyze", "--help").stdout
    for flag in ("--model", "--checkpoint", "--pretrained", "--images", "--data-dir", "--batch-size", "--workers",
                 "--img-size", "--device", "--amp", "--amp-dtype", "--num-samples", "--seed", "--use-ema",
                 "--model-kwargs", "--mean", "--std", "--crop-pct", "--interpolation", "--layers", "--until-se",
                 "--out"):  # fmt: skip
        assert flag in flags, flag
