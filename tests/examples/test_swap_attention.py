"""Replacing a model's maps: its own ones change nothing, and each replacement is what it says."""

from __future__ import annotations

import pytest
import swap_attention
import timm
import torch

from collapse_probe.models import BUNDLED


@pytest.mark.parametrize("name", BUNDLED)
def test_a_model_with_its_own_maps_is_unchanged(name):
    model = timm.create_model(name, pretrained=True).double().eval()
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    expected = model(images)
    for block in model.blocks:
        block.attn = swap_attention.Swapped(block.attn, swap_attention.SWAPS["its own maps"])
    torch.testing.assert_close(model(images), expected)


def test_replacements_are_what_they_are_called():
    maps = torch.rand(3, 2, 5, 5).softmax(-1)
    assert torch.equal(swap_attention.SWAPS["another image's"](maps)[1], maps[0])
    assert torch.equal(swap_attention.SWAPS["uniform"](maps), torch.full((3, 2, 5, 5), 0.2))
    assert swap_attention.SWAPS["none"](maps).abs().max() == 0


def test_both_models_need_the_attention_that_they_compute(capsys):
    swap_attention.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("digits")]
    assert [row[0] for row in rows] == list(BUNDLED)
    for _, own, other, uniform, none in rows:
        assert float(own) > 0.95
        assert max(float(other), float(uniform), float(none)) < 0.6


def test_a_model_for_other_images_is_refused(tmp_path, monkeypatch, capsys):
    model = timm.create_model("deepvit_16b", depth=2)
    timm.models.save_for_hf(model, tmp_path, model_args={"depth": 2}, safe_serialization=True)
    for source, words in ((f"local-dir:{tmp_path}", "does not take digits"), ("no_such_model", "no_such_model")):
        monkeypatch.setattr("sys.argv", ["swap_attention.py", source])
        with pytest.raises(SystemExit) as ending:
            swap_attention.command()
        assert ending.value.code in (2, 3)
        error = capsys.readouterr().err
        assert error.startswith("Error: ")
        assert words in error
