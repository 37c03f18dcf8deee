"""Build an architecture with timm, and say in a sentence why that failed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import timm
from torch import nn

from collapse_probe.errors import (
    CollapseProbeError,
    UnsafeFileError,
    UsageError,
    WeightsMismatchError,
    WeightsUnavailableError,
)
from collapse_probe.loading.hub import cache_only_without_network
from collapse_probe.loading.names import HUB

INSTEAD = "Pass weights you have with --checkpoint FILE, or ask for random ones with --no-pretrained."


def build(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    """`timm.create_model`.

    Raises:
        UsageError: the architecture does not take the arguments.
        WeightsUnavailableError, WeightsMismatchError, UnsafeFileError: of pretrained weights.
    """
    network = pretrained or name.startswith(HUB)
    try:
        with cache_only_without_network() if network else nullcontext():
            return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (CollapseProbeError, MemoryError):
        raise
    except Exception as error:  # timm, its models and the hub's client raise anything
        raise _sentence(name, network, kwargs, error) from None


def _sentence(name: str, network: bool, kwargs: Mapping[str, Any], error: Exception) -> CollapseProbeError:
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if "weights_only" in str(error):  # the loader's own text advises to switch the protection off
        return UnsafeFileError(f"The weights of {name} need unpickling of arbitrary objects; they were not read.")
    if "loading state_dict" in str(error):
        return WeightsMismatchError(f"The pretrained weights of {name} do not fit it with {dict(kwargs)}. {error}")
    if not network or isinstance(error, TypeError):
        return UsageError(f"{name} cannot be built with model_kwargs={dict(kwargs)}: {reason}")
    return WeightsUnavailableError(f"{name} could not be fetched, and is not in the local cache ({reason}). {INSTEAD}")
