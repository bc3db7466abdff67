"""AwqLoadConfig: what it reads, and what it rejects."""

import json

import pytest

from requant.errors import ParseError
from requant.weights.awq import AwqLoadConfig


def test_config_defaults():
    assert AwqLoadConfig() == AwqLoadConfig(bits=4, group_size=128, zero_point=True, version="")
    assert AwqLoadConfig.from_dict({}) == AwqLoadConfig()


def test_config_reads_its_keys_and_ignores_others():
    block = {"bits": 3, "group_size": 64, "zero_point": False, "version": "gemv", "quant": None}
    assert AwqLoadConfig.from_dict(block) == AwqLoadConfig(3, 64, False, "gemv")


def test_config_is_frozen_and_hashable():
    with pytest.raises(AttributeError):
        AwqLoadConfig().bits = 8
    assert hash(AwqLoadConfig()) == hash(AwqLoadConfig())


def test_config_round_trips():
    config = AwqLoadConfig(4, 2**32 - 1, False, "gemm")
    assert AwqLoadConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("value", [None, True, 4.0, "4", -1, 2**32, [4]], ids=repr)
def test_config_rejects_what_is_not_uint32(key, value):
    with pytest.raises(ParseError, match=key):
        AwqLoadConfig.from_dict({key: value})


@pytest.mark.parametrize("value", [None, 0, 1, "true"], ids=repr)
def test_config_rejects_a_zero_point_that_is_not_a_boolean(value):
    with pytest.raises(ParseError, match="zero_point"):
        AwqLoadConfig.from_dict({"zero_point": value})


@pytest.mark.parametrize("value", [None, 1, ["gemm"]], ids=repr)
def test_config_rejects_a_version_that_is_not_a_string(value):
    with pytest.raises(ParseError, match="version"):
        AwqLoadConfig.from_dict({"version": value})


@pytest.mark.parametrize("block", [None, [4, 128], "awq"])
def test_config_rejects_what_is_not_an_object(block):
    with pytest.raises(ParseError, match="object"):
        AwqLoadConfig.from_dict(block)
