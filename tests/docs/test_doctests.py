"""The examples in the docstrings of the core run."""

import doctest
import importlib

import pytest

EXAMPLES = ["requant.quantization.config", "requant.weights.quantize", "requant.weights.awq"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0
