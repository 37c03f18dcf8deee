"""What the shell is told of bad weights: a sentence, an exit code, and nothing else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.modules import module as hooks
from typer.testing import CliRunner

from collapse_probe.cli.app import app
from tests import hostile_files as files

FLAGS = [f"--model-kwargs={name}={value}" for name, value in files.KWARGS.items() if name != "num_classes"]
NAMED = ["--model", "vit_tiny_patch16_224", *FLAGS]

#: The file, the words of the refusal, and of the advice.
ROWS: dict[files.Generator, tuple[str, str]] = {
    files.truncated: ("is a truncated zip archive", "Download or copy it again"),
    files.empty: ("is empty (0 bytes)", "Download or copy it again"),
    files.flipped_bit: ("Bad CRC-32", "The damage is in blocks.1.mlp.fc1.weight"),
    files.truncated_safetensors: ("is a truncated safetensors file", "Download or copy it again"),
    files.lfs_pointer: ("is a Git LFS pointer", "git lfs pull"),
    files.web_page: ("is a web page", "a login or an error page"),
    files.error_page: ("is a web page", "Download or copy it again"),
    files.pickled_module: ("asks for torch.nn.modules.container.Sequential", "save_file(state"),
    files.malicious: ("asks for posix.system", "save_file(state"),
    files.malicious_legacy: ("asks for posix.system", "save_file(state"),
    files.plain_pickle: ("is a Python pickle that torch.save did not write", "save_file(state"),
    files.harmless_foreign: ("asks for pathlib", "save_file(state"),
    files.torchscript: ("is a TorchScript archive", "torch.save(model.state_dict()"),
    files.exported_program: ("is an archive of torch.export", "torch.save(model.state_dict()"),
    files.old_tar: ("is of the tar format", "save_file(state"),
    files.zip_bomb: ("is a compressed zip archive", "Unpack it first"),
    files.expanded_tensor: ("is larger than the file", "head.weight [100000, 100000]"),
    files.numpy_bomb: ("would unpack to more than 100 times its size", "it was not unpacked"),
    files.safetensors_of_other_sizes: ("is a damaged safetensors file", "model.safetensors"),
    files.not_a_number: ("hold NaN or infinities: blocks.1.attn.proj.weight", "--allow-bad-weights"),
    files.zeros: ("one number throughout: blocks.1.attn.proj.weight", "--allow-bad-weights"),
    files.no_weights: (
        "holds no state dict where one is looked for: its top level holds 'epoch', 'optimizer'",
        "--key",
    ),
    files.text: ("is not a checkpoint", "Expected a file written by torch.save"),
}


def _refused(code: int, words: tuple[str, ...], *arguments: object, out: Path) -> None:
    done = CliRunner().invoke(app, [*map(str, arguments), "--out", str(out)] if out else list(map(str, arguments)))
    assert done.exit_code == code, done.output
    assert done.stderr.lstrip().startswith("Error: ")
    for text in words:
        assert text in done.stderr
    for text in ("Traceback", "weights_only", "add_safe_globals"):
        assert text not in done.output
    assert not done.stdout
    assert not out.exists() or not [path for path in out.rglob("*") if path.is_file()]
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", ROWS, ids=lambda make: make.__name__)
def test_bad_weights(tmp_path: Path, make: files.Generator) -> None:
    path = make(tmp_path)
    _refused(3, ROWS[make], "analyze", path, *NAMED, out=tmp_path / "run")
    assert not (tmp_path / files.CANARY).exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", ROWS, ids=lambda make: make.__name__)
def test_inspect_refuses_alike(tmp_path: Path, make: files.Generator) -> None:
    """But for bad numbers, which it names."""
    done = CliRunner().invoke(app, ["inspect", str(make(tmp_path))])
    assert not (tmp_path / files.CANARY).exists()
    assert "Traceback" not in done.output
    if make in (files.not_a_number, files.zeros):
        assert done.exit_code == 0
        assert "blocks.1.attn.proj.weight" in done.stdout
    else:
        assert done.exit_code == 3
        assert ROWS[make][0] in done.stderr


def test_the_malicious_files_are_armed(tmp_path: Path) -> None:
    """A canary that cannot sing proves nothing."""
    for make in (files.malicious, files.malicious_legacy):
        torch.load(make(tmp_path), weights_only=False)
        assert (tmp_path / files.CANARY).exists()
        (tmp_path / files.CANARY).unlink()


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    for make, words in (
        (files.missing_key, ("1 missing in the file: blocks.0.attn.qkv.bias [144]",)),
        (files.other_architecture, ("They fit --model deit3_small_patch16_224",)),
        (files.other_image_size, ("are for another image size", "Use --img-size 64")),
    ):
        _refused(3, words, "analyze", make(tmp_path), *NAMED, out=tmp_path / "run")


def test_wrong_heads(tmp_path: Path) -> None:
    path = files.whole(tmp_path)
    _refused(2, ("cannot be built", "num_heads"), "analyze", path, *NAMED, "--num-heads", 5, out=tmp_path / "run")
    _refused(2, ("num_heads=0 must be a whole number, 1 or more",), "analyze", path, *NAMED, "--num-heads", 0,
             out=tmp_path / "run")  # fmt: skip


@pytest.mark.sweep
def test_bad_weights_on_request(tmp_path: Path) -> None:
    for make, code in ((files.zeros, "constant-weights"), (files.not_a_number, "non-finite")):
        arguments = ["analyze", str(make(tmp_path)), *NAMED, "--allow-bad-weights", "--out", str(tmp_path / "run")]
        arguments += ["--images", str(_pictures(tmp_path))]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert f'"{code}"' in (tmp_path / "run" / "analysis.json").read_text()


def _pictures(folder: Path) -> Path:
    from PIL import Image

    (folder / "pictures").mkdir(exist_ok=True)
    torch.manual_seed(0)
    for number in range(6):
        pixels = torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    return folder / "pictures"


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_prints_what_was_recognised(tmp_path: Path) -> None:
    torch.save({"model": {f"module.{key}": tensor for key, tensor in files.state().items()}}, tmp_path / "model.pt")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "model.pt"), "--num-heads", "3"])
    assert done.exit_code == 0, done.output
    for words in ("under 'model', prefix 'module.' cut", "torch zip archive", "8 x 8 pixels", "32 x 32 pixels",
                  "vit_base_patch16_224", "embed_dim=48", "depth=2", "num_heads=3", "Analyse it: "):  # fmt: skip
        assert words in done.stdout


def test_inspect_lists_what_fits_alike(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("nest_tiny").state_dict(), tmp_path / "model.pt")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "model.pt")])
    assert done.exit_code == 0, done.output
    assert "They differ in what they compute: choose nest_tiny or nest_tiny_jx with --model" in done.stdout


def test_names_from_strangers_do_not_move_the_cursor(tmp_path: Path) -> None:
    torch.save({**files.state(), "\x1b[31mblocks\n.weight": torch.full((3, 3), torch.nan)}, tmp_path / "model.pt")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "model.pt")])
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "\ufffd[31mblocks\ufffd.weight" in done.stdout
