"""``scripts/test -m "not slow"`` draws fewer examples of properties and compiles nothing of MLX."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = 42
drawn: list[int] = []


@pytest.mark.parametrize("step", [0, 1])
@settings(max_examples=EXAMPLES)
@given(st.integers())
def test_a_property(step: int, value: int) -> None:
    if step == 1:
        drawn.append(value)


def test_a_quarter_of_the_examples_is_drawn(request: pytest.FixtureRequest) -> None:
    if not drawn or request.config.getoption("--explore"):
        pytest.skip("test_a_property did not run before, or runs on more examples")
    fast = request.config.getoption("markexpr") == "not slow"
    assert len(drawn) == (11 if fast else EXAMPLES)
    assert (os.environ.get("MLX_DISABLE_COMPILE") == "1") == fast
