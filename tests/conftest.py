"""What all tests share."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings

from tests.support import message_lint
from tests.support.array_libraries import Library, MlxLibrary, NumPyLibrary
from tests.support.checkpoints import write_checkpoint
from tests.support.number_formats import bf16

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


def is_fast(config: pytest.Config) -> bool:
    """Whether these are the tests of a minute."""
    return bool(config.getoption("markexpr") == "not slow")


def mark_sweeps(items: list[pytest.Item]) -> None:
    """Of tests marked ``sweep(cases, tests=...)`` all but a few cases get the marker ``slow``.

    Fast stay ``cases`` parametrizations of each test, evenly spread; of the tests named in
    ``tests`` alone, where it is given.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for each in cases.values():
        sweep = each[0].get_closest_marker("sweep")
        if sweep is None:
            continue
        fast = min(sweep.args[0], len(each))
        if sweep.kwargs and each[0].name.partition("[")[0] not in sweep.kwargs["tests"]:
            fast = 0
        stay = {number * len(each) // fast for number in range(fast)}
        for number, item in enumerate(each):
            if number not in stay:
                item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--explore",
        type=int,
        metavar="N",
        help="property tests draw N times their examples, by chance: scripts/test --explore 20",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tail of sweeps slow, and say how many examples property tests draw.

    A quarter in the fast run; with ``--explore N`` N times as many, by chance.
    """
    mark_sweeps(items)
    times = config.getoption("--explore")
    if not times and not is_fast(config):
        return
    functions = {getattr(item, "obj", None) for item in items}  # one of several cases once
    for function in {getattr(function, "__func__", function) for function in functions}:
        ours = getattr(function, "_hypothesis_internal_use_settings", None)
        if ours is not None:
            count = ours.max_examples * times if times else -(-ours.max_examples // 4)
            other = settings(ours, derandomize=not times, max_examples=count)
            function._hypothesis_internal_use_settings = other


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts jobs in its background without SIGINT, and processes of tests inherit that.

    In the fast run MLX compiles no kernels, neither here nor in processes of tests: on a CPU each
    starts a C++ compiler.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    message_lint.watch()
    if is_fast(config):
        os.environ["MLX_DISABLE_COMPILE"] = "1"
        mx.disable_compile()


@pytest.hookimpl(trylast=True)  # after the fixtures are gone: failing here must not keep them
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A test fails that raised a message which does not read well."""
    reported = message_lint.take()
    if reported:
        lines = "\n".join(reported)
        pytest.fail(f"messages of errors (tests/support/message_lint.py):\n{lines}", pytrace=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Build a folder: ``checkpoint(tensors, config, shards=2, name="source")``."""

    def build(*arguments: Any, name: str = "source", **options: Any) -> Path:
        return write_checkpoint(tmp_path / name, *arguments, **options)

    return build


@pytest.fixture
def dense(checkpoint: Callable[..., Path]) -> Path:
    """A small dense model with one of every kind of tensor that stays dense."""
    return checkpoint(
        {
            "model.embed_tokens.weight": bf16(96, 128, seed=1),
            "model.layers.0.self_attn.q_proj.weight": bf16(128, 128, seed=2),
            "model.layers.0.self_attn.q_proj.bias": bf16(128, seed=3),
            "model.layers.0.mlp.gate.weight": bf16(8, 128, seed=4),
            "model.layers.0.mlp.up_proj.weight": bf16(64, 128, seed=5),
            "model.layers.0.input_layernorm.weight": bf16(128, seed=6),
            "model.layers.0.conv1d.weight": bf16(128, 1, 64, seed=7),
            "model.wpe.weight": bf16(16, 128, seed=8),
            "model.odd.weight": bf16(16, 96, seed=9),
            "model.ragged.weight": bf16(16, 40, seed=10),
            "model.experts.gate_up_proj": bf16(2, 64, 64, seed=11),
            "lm_head.weight": bf16(96, 128, seed=12),
        }
    )


@pytest.fixture(scope="session", params=[MlxLibrary(), NumPyLibrary()], ids=lambda lib: lib.name)
def lib(request: pytest.FixtureRequest) -> Library:
    """The array library of the test."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _mlx_on_the_cpu() -> Iterator[None]:
    """Our bits are those of MLX's CPU backend, whatever else the machine has."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
