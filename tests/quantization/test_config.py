"""The quantization block: what it means, and what is rejected."""

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.errors import InvariantError, KeyCollisionError, ParseError, UnknownValueError
from requant.quantization.config import (
    RESERVED_KEYS,
    SKIP,
    PerLayerQuantization,
    Quantization,
    QuantMode,
    Skip,
    parse_quantization,
)

GLOBAL = {"group_size": 64, "bits": 4}

# What is not a 32-bit integer in JSON.
NO_INT32 = [None, True, False, 4.0, "4", [4], {}, 2**31, -(2**31) - 1, 10**30]


# ---- QuantMode and Quantization
def test_mode_values_are_the_tags_of_mlx():
    assert [mode.value for mode in QuantMode] == ["affine", "mxfp4", "mxfp8", "nvfp4"]
    assert str(QuantMode.MXFP8) == "mxfp8"


def test_only_affine_has_biases():
    assert [mode for mode in QuantMode if mode.has_biases] == [QuantMode.AFFINE]


def test_quantization_is_affine_by_default():
    assert Quantization(64, 4).mode is QuantMode.AFFINE
    assert Quantization.affine(64, 4) == Quantization(64, 4, QuantMode.AFFINE)


def test_quantization_is_frozen_and_hashable():
    quantization = Quantization(32, 4, QuantMode.MXFP4)
    with pytest.raises(AttributeError):
        quantization.bits = 8
    assert len({quantization, Quantization(32, 4, QuantMode.MXFP4)}) == 1
    assert not hasattr(quantization, "__dict__")


def test_quantization_takes_the_tag_of_a_mode():
    assert Quantization(32, 4, "mxfp4").mode is QuantMode.MXFP4


def test_quantization_rejects_an_unknown_mode():
    with pytest.raises(UnknownValueError) as caught:
        Quantization(32, 4, "mxfp6")
    assert caught.value.value == "mxfp6"
    assert caught.value.supported == ("affine", "mxfp4", "mxfp8", "nvfp4")


@pytest.mark.parametrize("mode", list(QuantMode))
def test_from_dict_reads_every_mode(mode):
    assert Quantization.from_dict({**GLOBAL, "mode": str(mode)}).mode is mode


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, Quantization(64, 4, QuantMode.AFFINE)),
        ({"quant_method": 7}, Quantization(64, 4)),
        ({"group_size": -(2**31), "bits": 2**31 - 1}, Quantization(-(2**31), 2**31 - 1)),
    ],
)
def test_from_dict(more, expected):
    assert Quantization.from_dict(GLOBAL | more) == expected


BAD = [({name: 4 for name in GLOBAL if name != key}, key) for key in GLOBAL]
BAD += [(GLOBAL | {key: value}, key) for key in GLOBAL for value in NO_INT32]
BAD += [
    (GLOBAL | {"mode": value}, "mode")
    for value in ("Affine", "AFFINE", "mxfp6", "", None, 4, True, ["affine"])
]
BAD += [(block, "object") for block in (None, 4, "affine", [64, 4], True)]


@pytest.mark.parametrize(("block", "word"), BAD, ids=repr)
def test_from_dict_rejects(block, word):
    with pytest.raises(ParseError, match=word):
        Quantization.from_dict(block)


def test_to_dict_is_the_form_mlx_writes():
    assert Quantization(64, 4).to_dict() == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert type(Quantization(64, 4).to_dict()["mode"]) is str


# ---- SKIP
def test_skip_is_false_and_named():
    assert not SKIP
    assert repr(SKIP) == str(SKIP) == "SKIP"


def test_skip_is_one_object_for_ever():
    assert copy.copy(SKIP) is SKIP
    assert copy.deepcopy([SKIP])[0] is SKIP
    assert pickle.loads(pickle.dumps(SKIP)) is SKIP
    assert isinstance(SKIP, Skip)


# ---- PerLayerQuantization
def test_from_global_has_no_layers():
    config = PerLayerQuantization.from_global(Quantization(64, 4))
    assert config == PerLayerQuantization(Quantization(64, 4), {})
    assert dict(config.per_layer) == {}


def test_empty_config_quantizes_nothing():
    config = PerLayerQuantization()
    assert config.quantization is None
    assert config.quantization_for("up") is None


def test_quantization_for_prefers_the_layers_own():
    own = Quantization(32, 8)
    config = PerLayerQuantization(Quantization(64, 4), {"up": own, "down": SKIP})
    assert config.quantization_for("up") is own
    assert config.quantization_for("down") is None
    assert config.quantization_for("other") == Quantization(64, 4)


def test_quantization_for_matches_whole_paths_only():
    config = PerLayerQuantization(None, {"layers.1.up": Quantization(32, 8)})
    assert config.quantization_for("layers.11.up") is None
    assert config.quantization_for("layers.1") is None


def test_per_layer_is_a_private_read_only_copy():
    layers = {"up": SKIP}
    config = PerLayerQuantization(None, layers)
    layers["down"] = SKIP
    assert list(config.per_layer) == ["up"]
    with pytest.raises(TypeError):
        config.per_layer["down"] = SKIP


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        PerLayerQuantization().quantization = Quantization(64, 4)


@pytest.mark.parametrize("value", [False, None, {"group_size": 64, "bits": 4}])
def test_config_rejects_a_layer_value_of_another_type(value):
    with pytest.raises(InvariantError) as caught:
        PerLayerQuantization(None, {"up": value})
    assert caught.value.layer == "up"


def test_config_has_value_equality():
    first = PerLayerQuantization(Quantization(64, 4), {"a": SKIP, "b": Quantization(32, 8)})
    second = PerLayerQuantization(Quantization(64, 4), {"b": Quantization(32, 8), "a": SKIP})
    assert first == second
    assert hash(first) == hash(second)
    assert first != PerLayerQuantization(Quantization(64, 4), {"a": SKIP})
    assert first != PerLayerQuantization(None, first.per_layer)


def test_config_copies_and_pickles():
    config = PerLayerQuantization(Quantization(64, 4), {"up": SKIP, "down": Quantization(32, 8)})
    for counterpart in (
        copy.deepcopy(config),
        copy.copy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert counterpart == config
        assert counterpart.per_layer["up"] is SKIP


def test_block_interleaves_default_and_layers():
    block = {
        "group_size": 64,
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine", "extra": 1},
        "bits": 4,
        "lm_head": False,
        "experts": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "mode": "affine",
    }
    config = PerLayerQuantization.from_dict(block)
    assert config.quantization == Quantization(64, 4)
    assert config.per_layer == {
        "model.embed_tokens": Quantization(32, 8),
        "lm_head": SKIP,
        "experts": Quantization(32, 4, QuantMode.MXFP4),
    }


IGNORED = [{}, {"up": True}]  # the default alone, and a layer that is true
IGNORED += [
    {key: value}
    for key in ("quant_method", "linear_class", "quantization_mode")
    for value in ("x", 3, None, False, {"group_size": 1})
]


@pytest.mark.parametrize("more", IGNORED, ids=repr)
def test_block_ignores(more):
    assert PerLayerQuantization.from_dict(GLOBAL | more) == PerLayerQuantization(
        Quantization(64, 4)
    )


def test_reserved_keys_are_these_six():
    assert sorted(RESERVED_KEYS) == [
        "bits",
        "group_size",
        "linear_class",
        "mode",
        "quant_method",
        "quantization_mode",
    ]


@pytest.mark.parametrize("key", ["group_size", "bits"])
def test_block_rejects_a_missing_default(key):
    block = {**{name: 4 for name in GLOBAL if name != key}, "up": {"group_size": 64, "bits": 4}}
    with pytest.raises(ParseError, match=key):
        PerLayerQuantization.from_dict(block)


@pytest.mark.parametrize("key", ["group_size", "bits", "mode"])
@pytest.mark.parametrize("value", [None, False, 4.0, {}])
def test_block_rejects_a_bad_default(key, value):
    with pytest.raises(ParseError, match=key) as caught:
        PerLayerQuantization.from_dict({**GLOBAL, key: value})
    assert caught.value.layer is None


BAD_LAYERS = [None, 0, 1, 4.5, "false", [], [64, 4]]
BAD_LAYERS += [
    {},
    {"bits": 4},
    {"group_size": 64},
    GLOBAL | {"mode": "int4"},
    GLOBAL | {"bits": "4"},
]


@pytest.mark.parametrize("value", BAD_LAYERS, ids=repr)
def test_block_rejects_a_bad_layer_and_names_it(value):
    with pytest.raises(ParseError) as caught:
        PerLayerQuantization.from_dict({**GLOBAL, "up": value})
    assert caught.value.layer == "up"


@pytest.mark.parametrize("block", [None, 4, "x", [], True])
def test_block_rejects_what_is_not_an_object(block):
    with pytest.raises(ParseError, match="object"):
        PerLayerQuantization.from_dict(block)


def test_to_dict_writes_skip_as_false():
    config = PerLayerQuantization(Quantization(64, 4), {"up": SKIP, "down": Quantization(32, 8)})
    block = config.to_dict()
    assert block == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "up": False,
        "down": {"group_size": 32, "bits": 8, "mode": "affine"},
    }
    assert block["up"] is False
    assert json.loads(json.dumps(block)) == block


def test_to_dict_without_default_is_the_layers_alone():
    assert PerLayerQuantization(None, {"up": SKIP}).to_dict() == {"up": False}


@pytest.mark.parametrize("key", sorted(RESERVED_KEYS))
def test_to_dict_rejects_a_layer_with_a_reserved_name(key):
    with pytest.raises(KeyCollisionError) as caught:
        PerLayerQuantization(Quantization(64, 4), {key: SKIP}).to_dict()
    assert caught.value.key == key


QUANTIZATIONS = st.builds(
    Quantization,
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-(2**31), 2**31 - 1),
    st.sampled_from(list(QuantMode)),
)
LAYERS = st.text().filter(lambda name: name not in RESERVED_KEYS)


@given(QUANTIZATIONS, st.dictionaries(LAYERS, st.one_of(st.just(SKIP), QUANTIZATIONS)))
def test_block_round_trips_through_json(default, layers):
    config = PerLayerQuantization(default, layers)
    text = json.dumps({"quantization": config.to_dict(), "hidden_size": 8})
    assert parse_quantization(text) == config


# ---- parse_quantization
def test_parse_finds_the_block():
    text = '{"model_type": "llama", "quantization": {"group_size": 64, "bits": 4, "up": false}}'
    assert parse_quantization(text) == PerLayerQuantization(Quantization(64, 4), {"up": SKIP})


@pytest.mark.parametrize("text", ["{}", '{"quantization_config": {"bits": 4}}', "[]", "3", "null"])
def test_parse_gives_none_without_a_block(text):
    assert parse_quantization(text) is None


NOT_JSON = ["", "{", "{'a': 1}", '{"a": 1,}', '{"a": NaN}', '{"a": -Infinity}', "{} {}"]
NOT_JSON += ["[" * 200_000, '{"a": ' + "1" * 5000 + "}"]
BLOCKS = ("null", "false", "4", '"affine"', "[]", "{}")
NOT_BLOCKS = [f'{{"quantization": {block}}}' for block in BLOCKS]


@pytest.mark.parametrize("text", NOT_JSON + NOT_BLOCKS, ids=lambda text: text[:30])
def test_parse_rejects(text):
    with pytest.raises(ParseError):
        parse_quantization(text)


@pytest.mark.parametrize("number", ["4.0", "4e0", "99999999999", "-2147483649"])
def test_parse_rejects_numbers_that_are_not_int32(number):
    with pytest.raises(ParseError, match="bits"):
        parse_quantization(f'{{"quantization": {{"group_size": 64, "bits": {number}}}}}')


def test_parse_takes_the_last_of_two_equal_keys():
    text = '{"quantization": {"group_size": 64, "bits": 2, "bits": 4}}'
    assert parse_quantization(text) == PerLayerQuantization(Quantization(64, 4))
