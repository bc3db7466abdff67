"""What all tests share."""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

from . import messages

# A property test draws the same examples in every run, so that none fails by chance for a change
# that has nothing to do with it; ``--explore`` draws others. Time says nothing: the first call of
# a library compiles or loads something. No fixture here is changed by the test that asks for it.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--explore",
        type=int,
        metavar="N",
        help="property tests draw N times their examples, by chance: scripts/test --explore 20",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Other examples, and more of them, where ``--explore`` asks for it."""
    times = config.getoption("--explore")
    for item in items if times else []:
        function = getattr(item, "obj", None)
        ours = getattr(function, "_hypothesis_internal_use_settings", None)
        if ours is not None:
            more = settings(ours, derandomize=False, max_examples=times * ours.max_examples)
            getattr(function, "__func__", function)._hypothesis_internal_use_settings = more


def pytest_configure() -> None:
    """A shell starts jobs in its background without SIGINT, and processes of tests inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    messages.watch()


@pytest.hookimpl(trylast=True)  # after the fixtures are gone: failing here must not keep them
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A test fails that raised a message which does not read well."""
    told = messages.take()
    if told:
        lines = "\n".join(told)
        pytest.fail(f"messages of errors (tests/messages.py):\n{lines}", pytrace=False)
