"""``verify`` finds a single flipped bit anywhere in an output, and names the place."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import requant
from requant.api import verify as verification
from requant.api.convert import convert
from requant.errors import CheckpointError, UsageError
from requant.output.record import encode_json
from requant.planning.parts import steps_of_part
from requant.quantization.options import ConvertOptions
from requant.quantization.part import Part
from requant.sources.open import read_checkpoint
from tests.support.fixture_folders import fixture

pytestmark = pytest.mark.sweep(6)


@pytest.fixture
def output(dense: Path, tmp_path: Path) -> Path:
    (dense / "tokenizer.json").write_text('{"a": 1}')
    convert(dense, tmp_path / "out", bits=4, overrides=["lm_head=8"], shard_size=30_000)
    return tmp_path / "out"


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def places(*folders: Path) -> set[str]:
    return {problem.where for problem in requant.verify(*folders).problems}


def test_an_output_as_it_was_written(dense: Path, output: Path) -> None:
    alone, against = requant.verify(output), requant.verify(dense, output, threads=2)

    assert alone.ok and against.ok
    assert alone.tensors == against.tensors > 12
    assert against.source == str(dense)
    assert against.to_dict()["ok"] is True


@pytest.mark.parametrize("seed", range(12))
def test_one_flipped_bit_of_a_tensor_is_found_and_named(
    dense: Path, output: Path, seed: int
) -> None:
    rng = random.Random(seed)
    plan = requant.plan(dense, bits=4, overrides=["lm_head=8"], shard_size=30_000)
    shard = rng.choice(plan.shards)
    tensor = rng.choice(shard.tensors)
    flip(
        output / shard.name,
        tensor.offset + rng.randrange(tensor.info.nbytes),
        rng.randrange(8),
    )
    assert places(output) == {tensor.name}
    assert places(dense, output) == {tensor.name}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "requant.json"])
def test_one_flipped_bit_of_a_file_is_found(dense: Path, output: Path, name: str) -> None:
    text = (output / name).read_text()
    at = text.index("a") if name != "requant.json" else text.index('"treatment": "') + 16
    flip(output / name, at)
    assert name in places(output)
    assert name in places(dense, output)


def test_every_byte_of_a_small_output(dense: Path, tmp_path: Path) -> None:
    """No bit of any file can change unseen: each byte of each file, one bit at random."""
    convert(dense, tmp_path / "out", bits=2, only=["lm_head"], dtype="bfloat16")
    whole = {path: path.read_bytes() for path in sorted((tmp_path / "out").iterdir())}
    rng = random.Random(0)
    for path, data in whole.items():
        for _ in range(25):
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with suppress(CheckpointError):  # the record itself cannot be read any more
                assert not requant.verify(tmp_path / "out").ok, path
        path.write_bytes(data)
    assert requant.verify(tmp_path / "out").ok


def test_missing_and_added_tensors(dense: Path, output: Path) -> None:
    convert(dense, output.parent / "other", bits=4, only=["up_proj"])
    shutil.copy(output / "requant.json", output.parent / "other" / "requant.json")
    where = places(output.parent / "other")
    assert "lm_head.scales" in where
    assert "model.layers.0.mlp.up_proj.scales" not in where


def test_a_shard_that_is_gone_or_short(dense: Path, output: Path) -> None:
    shard = sorted(output.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    assert any(place.startswith(shard.name) for place in places(output))
    assert any(place.startswith(shard.name) for place in places(dense, output))
    shard.unlink()
    assert shard.name in places(dense, output)


def test_another_source_is_reported(dense: Path, output: Path, tmp_path: Path) -> None:
    """The data of one weight differs: no header tells, the comparison does."""
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    stored = read_checkpoint(other).tensors["lm_head.weight"]
    flip(other / stored.file, stored.offset + 1, 6)
    verification = requant.verify(other, output)
    assert {p.where.rpartition(".")[0] for p in verification.problems} == {"lm_head"}
    assert "differs from the conversion of this source, first at byte" in str(
        verification.problems[0]
    )

    (other / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in places(other, output)


def test_another_plan_is_reported(
    dense: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((output / "requant.json").read_text())
    record["plan"] = "0" * 64
    record["sha256"] = verification.record_hash(record)
    (output / "requant.json").write_text(json.dumps(record))
    monkeypatch.setattr(verification, "version", lambda: "99")
    (problem,) = requant.verify(dense, output).problems
    assert "another plan" in problem.message and "this is 99" in problem.message


def test_an_output_that_is_not_there(dense: Path, tmp_path: Path) -> None:
    for folders in ((tmp_path / "nowhere",), (dense, tmp_path / "nowhere")):
        with pytest.raises(CheckpointError, match="there is no such folder"):
            requant.verify(*folders)


def test_no_record(output: Path) -> None:
    (output / "requant.json").unlink()
    with pytest.raises(CheckpointError, match=r"requant\.json: is missing"):
        requant.verify(output)


@pytest.mark.parametrize("text", ["{}", "[]", '{"record": 1}', '{"record": 4}', "x"])
def test_what_is_not_a_record(output: Path, text: str) -> None:
    (output / "requant.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"requant\.json"):
        requant.verify(output)


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": None},
        {"files": {"../../etc/passwd": "0"}},
        {"files": {"/etc/passwd": "0"}},
        {"options": {}},
        {"options": None},
        {"headers": 7},
        {"source": {"files": [7]}, "plan": 1},
    ],
)
def test_a_hostile_record_is_not_a_crash(dense: Path, output: Path, change: dict) -> None:
    record = json.loads((output / "requant.json").read_text()) | change
    record["sha256"] = verification.record_hash(record)
    (output / "requant.json").write_text(json.dumps(record))
    assert requant.verify(dense, output).problems


@pytest.mark.parametrize(
    "option",
    [
        {"dtype": 1 << 32},
        {"dtype": "F99"},
        {"layout": "x"},
        {"search": None},
        {"act_order": []},
        {"dequantize": "yes"},
        {"shard_size": 0},
        {"shard_size": True},
        {"shard_size": 1e9},
        {"nonfinite_layers": [["a"]]},
        {"nonfinite_layers": [7]},
        {"config_from": 7},
        {"quantization": {"group_size": 64, "bits": 33, "mode": "affine"}},
        {"overrides": [["a", {"group_size": 7, "bits": 4, "mode": "affine"}]]},
        {"overrides": [["(", "skip"]]},
        {"recipe": {}},
        {"recipe": {"name": "mixed_9_9", "is_mixed": True}},
        {"recipe": {"rules": [{"spec": "8", "match": "(", "roles": [], "first": 0, "last": 0}]}},
        {"recipe": {"rules": [{"spec": "8", "match": "", "roles": ["x"], "first": 0, "last": 0}]}},
        {"recipe": {"rules": [{"spec": 8.5, "match": "a", "roles": [], "first": 0, "last": 0}]}},
        {"unknown": 1},
    ],
)
def test_options_that_nobody_can_have(dense: Path, output: Path, option: dict) -> None:
    record = json.loads((output / "requant.json").read_text())
    if option.get("recipe"):
        whole = {"name": "r", "description": "", "default": None, "rules": []}
        whole |= {"is_mixed": False, "is_builtin": False}
        option = {"recipe": whole | option["recipe"]}
    record["options"] |= option
    record["sha256"] = verification.record_hash(record)
    (output / "requant.json").write_text(json.dumps(record))
    found = requant.verify(dense, output).problems
    assert any(problem.where == "requant.json: options" for problem in found), found


@pytest.mark.parametrize("name", ["link.json", "a\0b", "x" * 300, "", "pipe"])
def test_files_of_a_record_that_are_none(dense: Path, output: Path, name: str) -> None:
    """Nothing outside of the folder is read, no pipe is waited for."""
    (output.parent / "secret").write_text("{}")
    (output / "link.json").symlink_to("../secret")
    os.mkfifo(output / "pipe")
    record = json.loads((output / "requant.json").read_text())
    record["files"][name] = hashlib.sha256(b"{}").hexdigest()
    record["sha256"] = verification.record_hash(record)
    (output / "requant.json").write_text(json.dumps(record))
    assert len(requant.verify(output).problems) == 1
    assert requant.verify(dense, output).problems


@pytest.mark.slow
def test_the_record_of_a_large_model_is_read(output: Path) -> None:
    """Seventy thousand layers, as of 384 experts in 61 blocks, in three tensors each."""
    record = json.loads((output / "requant.json").read_text())
    layer = next(iter(record["layers"].values()))
    digest = next(iter(record["tensors"].values()))
    for number in range(70_000):
        path = f"model.layers.{number % 61}.mlp.experts.{number}.down_proj"
        record["layers"][path] = layer
        for part in ("weight", "scales", "biases"):
            record["tensors"][f"{path}.{part}"] = digest
    record["sha256"] = verification.record_hash(record)
    (output / "requant.json").write_bytes(encode_json(record))
    found = requant.verify(output).problems
    assert found
    assert all("is missing, but requant.json lists it" in problem.message for problem in found)


def test_a_converted_output_has_a_record_of_its_own(output: Path, tmp_path: Path) -> None:
    report = convert(output, tmp_path / "again", dequantize=True)
    assert ("requant.json", "describes the conversion that made the source") in (
        report.plan.left_out
    )
    assert requant.verify(output, tmp_path / "again").ok


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 3, "group_size": 32, "overrides": ["a=skip", "b=8:32", "c=nvfp4"]},
        {"dequantize": True, "dtype": "float16"},
        {"recipe": "mixed_3_6", "only": ["x", "y"], "layout": "keep", "keep_extra": True},
    ],
)
def test_options_are_read_back_equal(options: dict) -> None:
    made = ConvertOptions.from_arguments(**options)
    assert ConvertOptions.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    "name",
    ["awq-gemm-g128", "gptq-b4-g64-actorder-v1", "ct-pack-int4-asym-g32", "mxfp4-gpt-oss"],
)
def test_formats_of_other_tools(name: str, tmp_path: Path) -> None:
    source = fixture(name) / "checkpoint"
    convert(source, tmp_path / "out")
    assert requant.verify(tmp_path / "out").problems == ()
    assert requant.verify(source, tmp_path / "out").problems == ()


def test_a_gguf_source_with_a_config_from_elsewhere(tmp_path: Path) -> None:
    """The record names no path of this machine; who verifies names the folder again."""
    source = fixture("gguf-q8_0") / "checkpoint" / "model.gguf"
    convert(source, tmp_path / "out")
    assert requant.verify(source, tmp_path / "out").ok
    (tmp_path / "original").mkdir()
    shutil.copy(tmp_path / "out" / "config.json", tmp_path / "original")
    convert(source, tmp_path / "two", config_from=tmp_path / "original")
    assert str(tmp_path) not in (tmp_path / "two" / "requant.json").read_text()
    verification = requant.verify(source, tmp_path / "two", config_from=tmp_path / "original")
    assert verification.problems == ()
    with pytest.raises(UsageError, match="safetensors"):
        convert(source, tmp_path / "three", consume_source=True, yes=True)


# -- parts ---------------------------------------------------------------------------------------


def test_a_part_compares_its_own_tensors(dense: Path, output: Path) -> None:
    """Each tensor is of one part; another part does not see its bytes."""
    plan = requant.plan(dense, bits=4, overrides=["lm_head=8"], shard_size=30_000)
    whole = requant.verify(dense, output)
    parts = [requant.verify(dense, output, part=f"{n}/3") for n in (1, 2, 3)]
    assert [str(x.part) for x in parts] == ["1/3", "2/3", "3/3"]
    assert all(x.ok for x in parts)
    assert sum(x.tensors for x in parts) == whole.tensors
    assert sum(x.nbytes for x in parts) == whole.nbytes
    assert parts[0].to_dict()["part"] == "1/3"

    number = steps_of_part(plan, Part(2, 3))[0]
    name = next(iter(plan.steps[number].outputs.values())).name
    shard, tensor = next((s, t) for s in plan.shards for t in s.tensors if t.name == name)
    flip(output / shard.name, tensor.offset)
    found = [requant.verify(dense, output, part=f"{n}/3").problems for n in (1, 2, 3)]
    assert [[x.where for x in problems] for problems in found] == [[], [name], []]


def test_a_part_repeats_its_own_steps(
    dense: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that agree with a forged record are found by the part of the source."""
    ran: list[int] = []
    run_plan = verification.run_plan

    def counting(plan: Any, *given: Any) -> Any:
        ran.append(sum(step.bytes_in for step in plan.steps))
        return run_plan(plan, *given)

    monkeypatch.setattr(verification, "run_plan", counting)
    for part in (None, "1/3", "2/3", "3/3"):
        requant.verify(dense, output, part=part)
    assert ran[0] == sum(ran[1:])
    assert 0 < min(ran) < ran[0]


def test_a_part_needs_the_source(output: Path) -> None:
    with pytest.raises(UsageError, match=r"requant verify SOURCE .*out --part 1/3"):
        requant.verify(output, part="1/3")
    with pytest.raises(UsageError, match="parts are numbered from 1"):
        requant.verify(output, output, part="4/3")
