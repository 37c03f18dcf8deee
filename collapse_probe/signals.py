"""Work that Ctrl-C and SIGTERM may not cut in half."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def undisturbed() -> Iterator[None]:
    """SIGINT and SIGTERM that come during the block take effect at its end.

    Only the main thread of a process is ever interrupted, so in others nothing is done. What the process ignores
    remains ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        came.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    deferred = {number: how for number, how in before.items() if how not in (None, signal.SIG_IGN)}
    try:
        for number in deferred:
            signal.signal(number, remember)
        yield
    finally:
        for number, how in deferred.items():
            signal.signal(number, how)
        if came:  # also where the block failed
            signal.raise_signal(came[0])
