"""What all tests share."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """A shell starts jobs in its background without SIGINT, and processes of tests inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
