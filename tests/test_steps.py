"""Where a checkpoint stands in its training: names as training scripts write them, numbers that files state, ties."""

from __future__ import annotations

from pathlib import Path

import pytest

from collapse_probe.steps import Clues, natural, numbers_in_names, place

#: Names of one series -> what is known of each.
NAMES = {
    "Lightning": (
        ["epoch=0-step=900.ckpt", "epoch=9-step=9000.ckpt", "epoch=10-step=9900-v1.ckpt", "last.ckpt"],
        [{"step": 900, "epoch": 0}, {"step": 9000, "epoch": 9}, {"step": 9900, "epoch": 10}, {}],
    ),
    "Lightning with a metric": (
        ["epoch=03-val_loss=0.25.ckpt", "epoch=12-val_loss=0.19.ckpt"],
        [{"epoch": 3}, {"epoch": 12}],
    ),
    "timm": (
        ["checkpoint-0.pth.tar", "checkpoint-12.pth.tar", "last.pth.tar", "model_best.pth.tar"],
        [{"number": 0}, {"number": 12}, {}, {}],
    ),
    "padded": (["checkpoint-000500.pth.tar", "checkpoint-001000.pth.tar"], [{"number": 500}, {"number": 1000}]),
    "Hugging Face folders": (["checkpoint-500", "checkpoint-10500"], [{"number": 500}, {"number": 10500}]),
    "DINO": (["checkpoint0000.pth", "checkpoint0020.pth", "checkpoint.pth"], [{"number": 0}, {"number": 20}, {}]),
    "OpenMMLab": (["iter_40000.pth", "iter_80000.pth", "best_mIoU_iter_72000.pth"],
                  [{"step": 40000}, {"step": 80000}, {"step": 72000}]),
    "thousands": (["vit_10k.pt", "vit_160k.pt"], [{"number": 10000}, {"number": 160000}]),
    "sizes that all names share": (
        ["vit_small_patch16_224_0010.pth", "vit_small_patch16_224_0200.pth", "vit_small_patch16_224_best.pth"],
        [{"number": 10}, {"number": 200}, {}],
    ),
    "sizes behind": (["10_deit_224.pth", "20_deit_224.pth"], [{"number": 10}, {"number": 20}]),
    "how long training is to be": (["mae_300ep_0050.pth", "mae_300ep_0100.pth"], [{"number": 50}, {"number": 100}]),
    "unit behind": (["ckpt_500steps.pt", "ckpt_1500steps.pt"], [{"step": 500}, {"step": 1500}]),
    "epochs behind": (["vit_10ep.pth", "vit_20e.pth"], [{"epoch": 10}, {"epoch": 20}]),
    "short": (["e1.pt", "e10.pt", "ep-12.pt"], [{"epoch": 1}, {"epoch": 10}, {"epoch": 12}]),
    "both": (
        ["epoch_10_step_500.pt", "step_900_epoch_18.pt"],
        [{"epoch": 10, "step": 500}, {"epoch": 18, "step": 900}],
    ),
    "glued": (["ckpt500.pt", "ckpt1000.pt"], [{"number": 500}, {"number": 1000}]),
    "metrics are no steps": (["ckpt_7_0.8312.pth", "ckpt_8_0.8511.pth"], [{"number": 7}, {"number": 8}]),
    "learning rates and versions": (
        ["lr1e-4_step7.pt", "lr1e-4_step8.pt", "lr1e-4-v2.pt"],
        [{"step": 7}, {"step": 8}, {}],
    ),
    "hashes": (["deit-a1311bcf.pth", "deit-b2b08ac1d.pth"], [{}, {}]),
    "two formats": (["step_5.safetensors", "step_6.npz", "step_7.bin"], [{"step": 5}, {"step": 6}, {"step": 7}]),
    "one file": (["checkpoint-500.pth"], [{"number": 500}]),
    "one in the same epoch": (["epoch=9-step=10.ckpt", "epoch=9-step=20.ckpt"], [{"step": 10}, {"step": 20}]),
    "too many digits": ([f"a{'1' * 30}.pt", f"b{'2' * 30}.pt"], [{}, {}]),
    "other alphabets": (["шаг_7.pt", "шаг_八.pt"], [{"number": 7}, {}]),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_numbers_in_names(case):
    names, expected = NAMES[case]
    assert numbers_in_names([Path("run") / name for name in names]) == expected


def test_where_all_files_have_one_name_their_folders_tell():
    paths = [Path(f"run/step_{number}/model.safetensors") for number in (5, 10, 20)]
    assert numbers_in_names(paths) == [{"step": 5}, {"step": 10}, {"step": 20}]
    assert numbers_in_names([Path("run_3/a/model.pt"), Path("run_3/b/model.pt")]) == [{}, {}]
    assert numbers_in_names([Path("run_3/model.pt")]) == [{}]  # nothing says what the 3 counts


def test_natural_order():
    names = ["ckpt-10.pt", "ckpt-9.pt", "a.pt", "ckpt-010.pt", "epoch=3-v1.ckpt", "epoch=3.ckpt", "1", "", "A-2.pt"]
    assert sorted(names, key=natural) == [
        "", "1", "a.pt", "A-2.pt", "ckpt-9.pt", "ckpt-010.pt", "ckpt-10.pt", "epoch=3.ckpt", "epoch=3-v1.ckpt",
    ]  # fmt: skip


def clues(label, named=None, stated=None, digest="", modified=0.0):
    stated = {unit: (number, "global_step" if unit == "step" else unit) for unit, number in (stated or {}).items()}
    return Clues(label, digest or f"content of {label}", stated, named or {}, modified)


def numbers(series):
    unit, placed = place(series)
    return unit, [item.number for item in placed]


def test_what_is_stated_goes_before_names():
    unit, placed = place([clues("a_7", {"number": 7}, {"step": 70}), clues("a_8", {"step": 8}, {"step": 80})])
    assert unit == "step"
    assert [(item.number, item.words) for item in placed] == [
        (70, "stated as global_step"), (80, "stated as global_step"),
    ]  # fmt: skip


def test_steps_go_before_epochs_and_epochs_before_bare_numbers():
    both = [clues(f"c{n}", {"number": n + 5}, {"step": 10 * n, "epoch": n}) for n in range(3)]
    assert numbers(both) == ("step", [0, 10, 20])
    assert numbers([clues(f"c{n}", {"number": n + 5}, {"epoch": n}) for n in range(3)]) == ("epoch", [0, 1, 2])
    assert numbers([clues(f"c{n}", {"number": n + 5}) for n in range(3)]) == ("number", [5, 6, 7])


def test_a_unit_that_tells_them_apart_is_better():
    series = [clues(f"c{n}", {"number": 100 * n}, {"epoch": n // 2}) for n in range(4)]
    assert numbers(series) == ("number", [0, 100, 200, 300])


def test_what_is_known_goes_before_what_is_guessed():
    series = [clues("a", stated={"step": 5, "epoch": 1}), clues("b_10", {"number": 10}, {"epoch": 2})]
    assert numbers(series) == ("epoch", [1, 2])


def test_the_name_adds_what_the_content_does_not_state():
    series = [clues("a", {"step": 5}, {"epoch": 1}), clues("b", {"step": 10}, {"epoch": 1})]
    unit, placed = place(series)
    assert (unit, [item.number for item in placed]) == ("step", [5, 10])
    assert placed[0].words == "step in its name"


def test_a_bare_number_among_steps_is_taken_for_one_and_says_so():
    unit, placed = place([clues("a", stated={"step": 5}), clues("b_10", {"number": 10}), clues("c", {"step": 20})])
    assert (unit, [item.number for item in placed]) == ("step", [5, 10, 20])
    assert placed[1].words == "number in its name, taken to be its step"


def test_without_a_number_among_numbered_ones():
    series = [clues("a", {"step": 5}), clues("b", {"step": 6}), clues("best", stated={"epoch": 3})]
    unit, placed = place(series)
    assert unit == "step"
    assert placed[2].number is None
    assert placed[2].words == (
        "Neither its content nor its name says its step, only epoch 3; that of most others is known. Put it into its "
        "name."
    )
    same = place([*series[:2], clues("last", digest="content of b")])[1][2]
    assert (same.number, same.words) == (None, "It is the same as b.")


def test_ties_have_one_winner_each():
    series = [
        clues("step=5-v1", {"step": 5}), clues("step=5", {"step": 5}), clues("step=5-copy", {"step": 5}),
        clues("z", {"step": 6}),
    ]  # fmt: skip
    series[2] = clues("step=5-copy", {"step": 5}, digest="content of step=5")
    _, placed = place(series)
    assert [item.number for item in placed] == [None, 5, None, 6]
    assert placed[0].words.startswith("It is at step 5 (step in its name), and so is step=5, which is shown.")
    assert placed[2].words == "It is the same as step=5."


def test_equal_content_at_different_steps_are_two_points():
    """Weights that did not change are a reading, too."""
    series = [clues("a_1", {"number": 1}, digest="x"), clues("a_2", {"number": 2}, digest="x")]
    assert numbers(series) == ("number", [1, 2])


def test_order_of_writing_where_hardly_anything_is_known():
    series = [
        clues("second", modified=20.0), clues("first", modified=10.0),
        clues("copy", digest="content of first", modified=30.0), clues("x_9", {"number": 9}, modified=40.0),
    ]  # fmt: skip
    unit, placed = place(series)
    assert (unit, [item.number for item in placed]) == ("order", [2, 1, None, 3])
    assert placed[2].words == "It is the same as first."
    assert numbers([clues("b", modified=1.0), clues("a", modified=1.0)]) == ("order", [2, 1])  # then by name
    assert numbers([clues("only")]) == ("order", [1])
