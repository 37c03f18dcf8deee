"""Where the files that ship with the package lie: two small trained models and 64 test images for them.

`collapse_probe/data/README.md` states their source, licence and recipe.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

#: The bundled models: their names, plain ViT first.
BUNDLED = ("digits_vit_24b", "digits_deepvit_24b")


def bundled_weights(name: str = BUNDLED[0]) -> Path:
    """The safetensors file of one of :data:`BUNDLED`; its metadata name architecture, recipe and licence."""
    return _data() / f"{name}.safetensors"


def bundled_images() -> Path:
    """The folder with 64 test images, 8x8 grey PNGs named ``<index in the data set>_label<digit>.png``."""
    return _data() / "digits"


def bundled_image() -> Path:
    """One of them, an eight."""
    return bundled_images() / "0028_label8.png"


def _data() -> Path:
    # torch and timm open files by path, so a package inside a zip archive is not supported anyway.
    return Path(str(files("collapse_probe").joinpath("data")))
