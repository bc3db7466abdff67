"""``requant.json``: its content, its own hash, and records that cannot be read."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from requant.errors import CheckpointError
from requant.output.record import build_record, encode_json, read_record, record_hash, version
from requant.planning.planner import Planned


def built(planned: Planned, **options: object) -> dict:
    hashes = {t.name: f"hash of {t.name}" for s in planned.plan.shards for t in s.tensors}
    errors = {"l0": (0.123456, 0.5)}
    return build_record(
        planned.plan, planned.plan.hash, options, hashes, {"config.json": "c"}, errors=errors
    )


def test_the_content_of_a_record(planned: Planned) -> None:
    record = built(planned, bits=4, statistics="/home/user/stats.safetensors")
    assert (record["record"], record["requant"]) == (3, version())
    assert record["plan"] == planned.plan.hash
    assert record["options"]["bits"] == 4
    assert record["options"]["statistics"] == "stats.safetensors", "no path of this machine"
    assert record["source"]["files"] and record["source"]["repository"] is None
    layer = record["layers"]["l0"]
    assert (layer["shape"], layer["bytes_in"]) == ([64, 128], 64 * 128 * 2)
    assert layer["error"] == [0.1235, 0.5], "four digits"
    assert record["layers"]["l1"]["error"] is None
    assert record["tensors"]["l0.scales"] == "hash of l0.scales"
    assert record["files"] == {"config.json": "c"}
    (shard,) = planned.plan.shards
    assert record["headers"] == {shard.name: sha256(shard.header()).hexdigest()}


def test_the_hash_covers_everything_else(planned: Planned) -> None:
    record = built(planned)
    assert record["sha256"] == record_hash(record)
    assert record_hash(json.loads(encode_json(record))) == record["sha256"]
    record["files"]["config.json"] = "d"
    assert record["sha256"] != record_hash(record)


def test_a_record_is_read_back(planned: Planned, tmp_path: Path) -> None:
    record = built(planned)
    (tmp_path / "requant.json").write_bytes(encode_json(record))
    assert read_record(tmp_path) == json.loads(json.dumps(record))


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        read_record(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="requant did not write this folder"):
        read_record(tmp_path)
    with pytest.raises(CheckpointError, match=r"requant\.json: give another folder"):
        read_record(tmp_path, "give another folder")
    (tmp_path / "requant.json").write_text("{")
    with pytest.raises(CheckpointError):
        read_record(tmp_path)


@pytest.mark.parametrize("found", [1, 2, 9, None, "3"], ids=str)
def test_a_record_of_another_version(tmp_path: Path, found: object) -> None:
    """The error says what was found, what is expected, and what to type."""
    folder = tmp_path / "an output"
    folder.mkdir()
    (folder / "requant.json").write_text(json.dumps({"record": found, "requant": "7.0"}))
    with pytest.raises(CheckpointError) as raised:
        read_record(folder)
    (problem,) = raised.value.problems
    assert problem.where == "requant.json"
    value = {None: "null", "3": "'3'"}.get(found, found)  # type: ignore[call-overload]
    assert problem.message == (
        f"record is {value}, this version reads 3: take the requant that wrote it, '7.0', "
        f"or convert again: requant convert SOURCE '{folder}' --force"
    )
