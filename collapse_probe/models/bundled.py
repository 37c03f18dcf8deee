"""Where the files that ship with the package lie: one small trained model and 64 test images for it.

`collapse_probe/data/README.md` states their source, licence and recipe.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def bundled_weights() -> Path:
    """The safetensors file with the trained ``digits_vit_12b``; its metadata names architecture, recipe and licence."""
    return _data() / "digits_vit_12b.safetensors"


def bundled_images() -> Path:
    """The folder with 64 test images, 8x8 grey PNGs named ``<index in the data set>_label<digit>.png``."""
    return _data() / "digits"


def _data() -> Path:
    # torch and timm open files by path, so a package inside a zip archive is not supported anyway.
    return Path(str(files("collapse_probe").joinpath("data")))
