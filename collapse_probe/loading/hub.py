"""Pretrained weights from the hub: no hanging without a network, and repositories that timm does not know.

huggingface_hub retries an unreachable server for most of a minute per file. One short probe decides beforehand; where
it fails, the hub is told to use its cache only, so that cached weights still load and others fail at once.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

PROBE_SECONDS = 5.0


def reachable(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether something answers at that address within the time (whatever it answers); honours proxy settings."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # a server with certificates that only the hub's client knows
    except OSError:
        return False


@contextmanager
def cache_only_without_network() -> Iterator[None]:
    """Inside, the hub neither connects nor retries if a probe finds no network."""
    before = constants.HF_HUB_OFFLINE
    if not before:
        constants.HF_HUB_OFFLINE = not reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def snapshot(model_id: str) -> Path | None:
    """The folder with a repository's configuration and weights, downloaded if need be; None where that fails.

    Weights in pickles are fetched only where there are no others.

    Args:
        model_id: ``owner/name`` or ``owner/name@revision``.
    """
    repository, _, revision = model_id.partition("@")
    with cache_only_without_network():
        for weights in (["*model*.safetensors", "model.safetensors.index.json"], ["pytorch_model*"]):
            try:
                folder = Path(
                    snapshot_download(
                        repository, revision=revision or None, allow_patterns=["config.json", *weights],
                        local_files_only=constants.HF_HUB_OFFLINE,
                    )
                )  # fmt: skip
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
                return None
            if any(found for pattern in weights for found in folder.glob(pattern)):
                return folder
    return None
