"""`collapse-probe look`: which pictures it writes, what it says of those it cannot, and how it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from collapse_probe.cli import look as command
from collapse_probe.cli.app import app

NAMES = ("attention", "attention_by_depth", "column", "rollout")


def probe(*words, code=0):
    done = CliRunner().invoke(app, ["look", *(str(word) for word in words)])
    assert done.exit_code == code, (done.stderr, done.exception)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of a small model, and a photograph."""
    root = tmp_path_factory.mktemp("look")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
    torch.save(model.state_dict(), root / "model.pt")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(root / "photo.jpg")
    return root


def test_the_bundled_model_is_looked_at_without_a_picture(tmp_path):
    done = probe("--out", tmp_path, "--layers", "0,23")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg", "pdf")
    )
    assert done.stdout.startswith(f"Written to {tmp_path}: attention.png, attention.svg, attention.pdf, ")
    assert done.stdout.count("\n") == 1


def test_options_reach_the_pictures(folder, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(command, "_write", lambda figures, *_: drawn.update(figures))
    done = probe(
        folder / "model.pt", "-m", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "--model-kwargs",
        "patch_size=8", "--model-kwargs", "embed_dim=48", "--model-kwargs", "depth=3", "--num-heads", 3,
        "-i", folder / "photo.jpg", "--layers", "0,-1", "--heads", "2,0", "--query", "1,2", "--token", "class",
        "--width", "one-column", "--no-titles", "--formats", "png", "--out", tmp_path,
    )  # fmt: skip
    assert f"Written to {tmp_path}: attention.png, attention_by_depth.png, rollout.png, column.png" in done.stdout
    figure = drawn["attention"]
    assert figure.get_figwidth() == 3.25
    assert not figure.get_suptitle()
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "mean", "head 2", "head 0"]
    assert [ax.get_ylabel() for ax in figure.axes[1:-1] if ax.get_ylabel()] == ["Layer 0", "Layer 2"]
    assert [ax.get_title() for ax in drawn["column"].axes[:3]] == ["image", "Layer 0", "Layer 2"]
    assert figure.axes[1].patches
    assert not drawn["column"].axes[1].patches  # the class token is no patch


def test_a_picture_that_a_model_does_not_have_is_told_and_an_older_one_goes(tmp_path):
    (tmp_path / "rollout.png").write_text("of another model")
    done = probe("digits_deepvit_24b", "--out", tmp_path, "--formats", "png", "--layers", "0,1")
    assert "No picture rollout: Rollout multiplies the maps of all layers, and those of blocks.0.attn" in done.stderr
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["attention", "attention_by_depth", "column"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "The pictures need a folder: give --out."),
        (["--out", "{out}", "--heads", "first"], 2, "--heads 'first' is neither 'all' nor a list"),
        (["--out", "{out}", "--token", "middle"], 2, "--token 'middle' is no token"),
        (["--out", "{out}", "--token", "mean"], 2, "'mean' is no token"),
        (["--out", "{out}", "--query", "1,2,3"], 2, "--query '1,2,3' is no token"),
        (["--out", "{out}", "--query", "9,9"], 2, "(9, 9) lies outside the 4 x 4 patches"),
        (["--out", "{out}", "--token", "4,0"], 2, "(4, 0) lies outside the 4 x 4 patches"),
        (["--out", "{out}", "--layers", "99"], 2, "There is no layer 99: 24 attend"),
        (["--out", "{out}", "--formats", "bmp"], 2, "cannot write ['bmp']"),
        (["--out", "{out}", "--formats", ","], 2, "--formats is empty"),
        (["--out", "{out}", "--width", "wide"], 2, "width='wide' is unknown"),
        (["--out", "{out}", "--scale", "all"], 2, "scale='all' is unknown"),
        (["--out", "{out}", "--image", "{out}/none.jpg"], 4, "none.jpg: no such file"),
        (["nonsense_model", "--out", "{out}", "--image", "{out}/none.jpg"], 3, "neither a file nor a name"),
        (["vit_tiny_patch16_224", "--no-pretrained", "--out", "{out}"], 2, "No image given"),
    ],
)
def test_refusals(words, code, message, tmp_path):
    done = probe(*(word.format(out=tmp_path) for word in words), code=code)
    assert message in done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())
