"""One short probe decides whether there is a network; the hub's own setting is restored afterwards."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from collapse_probe.loading.hub import cache_only_without_network, reachable


@pytest.fixture
def server() -> Iterator[str]:
    """A local address that answers everything with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def test_any_answer_counts(server: str) -> None:
    assert reachable(server)


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert not reachable(f"http://127.0.0.1:{free.getsockname()[1]}")


def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        assert not reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("network", [True, False])
def test_offline_only_inside_and_only_without_a_network(monkeypatch: pytest.MonkeyPatch, network: bool) -> None:
    monkeypatch.setattr("collapse_probe.loading.hub.reachable", lambda _: network)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with contextlib.suppress(KeyError), cache_only_without_network():
        assert network is not constants.HF_HUB_OFFLINE
        raise KeyError  # a download that fails
    assert constants.HF_HUB_OFFLINE is False


def test_a_wish_to_stay_offline_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collapse_probe.loading.hub.reachable", lambda _: pytest.fail("probed although offline"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with cache_only_without_network():
        assert constants.HF_HUB_OFFLINE is True
    assert constants.HF_HUB_OFFLINE is True
