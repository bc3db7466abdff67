"""What is decided for each layer, and where the bytes go."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from requant.api.convert import plan
from requant.errors import CheckpointError, OutOfRangeError, UnknownValueError, UsageError
from requant.quantization.config import Quantization
from tests.support.number_formats import bf16
from tests.support.plan_texts import note_texts, reason_text


def fates(made) -> dict[str, tuple[str, str, str]]:
    return {x.layer: (x.treatment.value, x.target, reason_text(x)) for x in made.layers}


def test_dense_source_without_options_takes_mlx_default_and_says_so(dense: Path) -> None:
    made = plan(dense)
    assert made.quantization.quantization == Quantization.affine(64, 4)
    assert any("4 bits, group 64" in note for note in note_texts(made.notes))


def test_what_is_quantized_in_a_dense_source(dense: Path) -> None:
    found = fates(plan(dense, bits=4))
    quantized = ("quantized", "affine 4-bit g64", "")
    assert found["model.embed_tokens"] == quantized
    assert found["model.layers.0.self_attn.q_proj"] == quantized
    assert found["lm_head"] == quantized
    assert found["model.layers.0.mlp.gate"] == ("dense", "BF16", "router")
    assert found["model.layers.0.conv1d"] == ("dense", "BF16", "convolution")
    assert found["model.wpe"] == ("dense", "BF16", "position table")
    assert found["model.layers.0.input_layernorm"] == ("dense", "BF16", "")
    assert found["model.layers.0.self_attn.q_proj.bias"] == ("dense", "BF16", "")
    assert found["model.experts.gate_up_proj"] == ("dense", "BF16", "not named .weight")


@pytest.mark.parametrize("name", ["gate_proj", "up_gate_proj", "gate_up_proj", "w1"])
def test_a_gate_projection_is_not_a_router(checkpoint: Callable[..., Path], name: str) -> None:
    made = plan(checkpoint({f"mlp.{name}.weight": bf16(8, 64)}), bits=4)
    assert made.layers[0].treatment == "quantized"


def test_a_last_axis_that_does_not_divide_takes_the_next_smaller_group(dense: Path) -> None:
    made = plan(dense, bits=4, group_size=128)
    assert made.quantization.per_layer == {"model.odd": Quantization.affine(32, 4)}
    found = fates(made)
    assert found["model.odd"][1:] == ("affine 4-bit g32", "last axis 96 takes group 32, not 128")
    assert found["model.ragged"][0] == "dense"
    assert "last axis 40 is not a multiple" in found["model.ragged"][2]


def test_overrides_the_last_match_wins_and_rules_over_the_name_rule(dense: Path) -> None:
    made = plan(
        dense, bits=4, overrides=[r"self_attn=skip", r"q_proj=8:32", r"mlp\.gate$=8", "embed=mxfp8"]
    )
    found = fates(made)
    assert found["model.layers.0.self_attn.q_proj"][1] == "affine 8-bit g32"
    assert found["model.layers.0.mlp.gate"][1] == "affine 8-bit g64"
    assert found["model.embed_tokens"][1] == "mxfp8 8-bit g32"
    block = made.config["quantization"]
    assert block["model.embed_tokens"] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    assert block == made.config["quantization_config"]
    assert (block["group_size"], block["bits"], block["mode"]) == (64, 4, "affine")


def test_a_skipped_layer_is_false_in_the_config(dense: Path) -> None:
    made = plan(dense, bits=4, overrides=["lm_head=skip"])
    assert fates(made)["lm_head"] == ("dense", "BF16", "skipped by an override")
    assert made.config["quantization"]["lm_head"] is False


def test_only_leaves_the_rest_as_it_is(dense: Path) -> None:
    made = plan(dense, bits=4, only=["up_proj"])
    quantized = [x.layer for x in made.layers if x.treatment == "quantized"]
    assert quantized == ["model.layers.0.mlp.up_proj"]
    assert fates(made)["lm_head"][2] == "not matched by --only"


def test_a_pattern_that_matches_nothing_suggests_near_names(dense: Path) -> None:
    with pytest.raises(UsageError) as raised:
        plan(dense, bits=4, overrides=["up_porj=8"], only=["lm_haed"])
    assert "up_porj" in str(raised.value)
    assert "up_proj" in str(raised.value)
    assert "lm_head" in str(raised.value)


def test_an_override_that_cannot_be_met_is_rejected_with_all_reasons(dense: Path) -> None:
    with pytest.raises(UsageError) as raised:
        plan(dense, bits=4, overrides=["ragged=4", "input_layernorm=4"])
    text = str(raised.value)
    assert "model.ragged.weight [16, 40]" in text
    assert "model.layers.0.input_layernorm.weight has shape [128]" in text


@pytest.mark.parametrize("override", ["lm_head", "=8", "lm_head=7", "lm_head=8:16", "(=8", "a=x"])
def test_an_override_that_does_not_parse(dense: Path, override: str) -> None:
    with pytest.raises(UsageError):
        plan(dense, overrides=[override])


def test_bits_that_the_mode_does_not_have() -> None:
    with pytest.raises(OutOfRangeError) as raised:
        plan("nowhere", bits=7)
    assert raised.value.name == "bits"
    with pytest.raises(OutOfRangeError):
        plan("nowhere", mode="mxfp4", group_size=64)
    with pytest.raises(UnknownValueError):
        plan("nowhere", mode="int4")
    with pytest.raises(UnknownValueError):
        plan("nowhere", dtype="fp16")


def test_bits_and_dequantize_contradict() -> None:
    with pytest.raises(UsageError):
        plan("nowhere", bits=4, dequantize=True)


def test_same_inputs_same_plan_and_it_prints_as_json(dense: Path) -> None:
    first, second = plan(dense, bits=4), plan(dense, bits=4)
    assert first.hash == second.hash != plan(dense, bits=8).hash
    data = json.loads(json.dumps(first.to_dict()))
    assert data["parameters"] == sum(
        int(np.prod(x["shape"], dtype=np.int64)) for x in data["layers"]
    )
    assert data["bits_per_weight"] == pytest.approx(8 * data["bytes_out"] / data["parameters"])


def test_the_plan_reads_no_tensor_data(dense: Path) -> None:
    """Count the reads: of data a head and its embedding are compared, and a bias looked at."""
    import builtins
    import os

    file = dense / "model.safetensors"
    header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    read = 0
    real_read, real_open = os.pread, builtins.open

    class Counting:
        def __init__(self, handle):
            self.handle = handle

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return self.handle.__exit__(*error)

        def read(self, *args):
            nonlocal read
            data = self.handle.read(*args)
            read += len(data)
            return data

    def counting_open(path, *args, **kwargs):
        handle = real_open(path, *args, **kwargs)
        return Counting(handle) if str(path).endswith(".safetensors") else handle

    def counting_pread(fd, n, offset):
        nonlocal read
        data = real_read(fd, n, offset)
        read += len(data)
        return data

    builtins.open, os.pread = counting_open, counting_pread
    try:
        plan(dense, bits=4)
    finally:
        builtins.open, os.pread = real_open, real_read
    compared = 2 * (96 * 128 * 2) + 128 * 2
    assert read <= header_bytes + compared


def test_shards_are_cut_before_they_exceed_the_limit_and_layers_stay_whole(dense: Path) -> None:
    made = plan(dense, bits=4, shard_size=12_000)
    assert len(made.shards) > 1
    total = len(made.shards)
    assert [s.name for s in made.shards] == [
        f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)
    ]
    home = {t.name.rpartition(".")[0]: s.name for s in made.shards for t in s.tensors}
    for shard in made.shards:
        for tensor in shard.tensors:
            assert home[tensor.name.rpartition(".")[0]] == shard.name or tensor.name.endswith(
                ".bias"
            )
        data = sum(t.info.nbytes for t in shard.tensors)
        assert data <= 12_000 or len({t.name.rpartition(".")[0] for t in shard.tensors}) == 1


def test_every_output_tensor_is_aligned_to_its_dtype(dense: Path) -> None:
    for shard in plan(dense, bits=3, dtype="float32").shards:
        for tensor in shard.tensors:
            width = {"U32": 4, "F32": 4, "BF16": 2, "F16": 2}[tensor.info.dtype]
            assert tensor.offset % width == 0


def test_dtype_is_written_into_the_config(dense: Path) -> None:
    assert plan(dense, bits=4, dtype="float16").config["dtype"] == "float16"


def test_an_unknown_quant_method_is_rejected_by_name(checkpoint: Callable[..., Path]) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "spinquant"}}
    source = checkpoint({"a.weight": bf16(8, 64)}, config)
    with pytest.raises(CheckpointError) as raised:
        plan(source)
    assert "spinquant" in str(raised.value)


def test_packed_codes_without_a_block_are_rejected(checkpoint: Callable[..., Path]) -> None:
    source = checkpoint({"a.weight": np.zeros((8, 8), np.uint32), "a.scales": bf16(8, 1)})
    with pytest.raises(CheckpointError) as raised:
        plan(source)
    assert "a.weight" in str(raised.value)
    assert "quantization" in str(raised.value)


def test_float64_and_integers_stay_dense_with_the_reason(checkpoint: Callable[..., Path]) -> None:
    table = {"gate.tid2eid.weight": np.zeros((8, 64), np.int32)}  # no codes: experts by token
    tensors = {"a.weight": np.zeros((8, 64)), "c.weight": np.zeros((8, 64), np.float32)}
    source = checkpoint(tensors | table)
    found = fates(plan(source, bits=4))
    assert found["a"] == ("dense", "F64", "dtype F64 cannot be quantized")
    assert found["gate.tid2eid"] == ("dense", "I32", "dtype I32 cannot be quantized")
    made = plan(source, bits=4, dtype="float32")
    assert fates(made)["a"][:2] == ("quantized", "affine 4-bit g64")
    assert any("MLX cannot load" in note for note in note_texts(plan(source, bits=4).notes))
