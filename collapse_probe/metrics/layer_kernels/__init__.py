"""Cross-layer products straight from queries and keys, for CUDA: no attention map is ever written.

What `decompose_columns` and a product of the result would give is computed tile by tile within a kernel. The kernels
are written in Triton, which is optional: :func:`usable` says whether they can be used, and importing this package does
not need it.

    layers = layers_of(maps)
    products = layer_products(layers, start, stop)  # M and its parts, for these keys
    between = image_products(layers, products, start, stop)  # the same between images
    add_unit_columns(layers, products, start, stop, unit_sum)  # sums of columns over images

Nothing here waits for the device.
"""

from collapse_probe.metrics.layer_kernels.floors import Floors, floors
from collapse_probe.metrics.layer_kernels.launch import (
    LayerProducts,
    Tile,
    add_unit_columns,
    image_products,
    layer_products,
    layers_of,
)
from collapse_probe.metrics.layer_kernels.layers import DTYPES, MAX_DIM, MAX_LAYERS, Layer, Layers, available
from collapse_probe.metrics.layer_kernels.trial import usable

__all__ = [
    "DTYPES",
    "MAX_DIM",
    "MAX_LAYERS",
    "Floors",
    "Layer",
    "LayerProducts",
    "Layers",
    "Tile",
    "add_unit_columns",
    "available",
    "floors",
    "image_products",
    "layer_products",
    "layers_of",
    "usable",
]
