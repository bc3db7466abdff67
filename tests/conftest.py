"""What all tests share."""

from __future__ import annotations

import signal

import pytest

from . import messages


def pytest_configure() -> None:
    """A shell starts jobs in its background without SIGINT, and processes of tests inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    messages.watch()


@pytest.hookimpl(trylast=True)  # after the fixtures are gone: failing here must not keep them
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A test fails that raised a message which does not read well; a fuzzer may say anything."""
    told = messages.take()
    if told and "tests/fuzz/" not in item.nodeid:
        lines = "\n".join(told)
        pytest.fail(f"messages of errors (tests/messages.py):\n{lines}", pytrace=False)
