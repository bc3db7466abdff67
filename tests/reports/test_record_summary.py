"""What a record says about its conversion, and what of it is rejected."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import requant
from requant.cli import run
from requant.output.record import record_hash
from requant.text import format_percent

MICRO = Path(__file__).parents[2] / "examples" / "micro-llama"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, requant.Report]:
    output = tmp_path_factory.mktemp("figures") / "out"
    options = {"bits": 4, "overrides": ["lm_head|embed_tokens=8:32", "v_proj=skip"]}
    return output, requant.convert(MICRO, output, layout="keep", **options)


def test_figures_are_the_report_s(converted: tuple[Path, requant.Report]) -> None:
    output, report = converted
    figures = requant.read_figures(output)
    assert figures.plan_hash == report.plan.hash
    assert figures.parameters == report.plan.parameters
    assert figures.bytes_in == report.plan.bytes_in
    assert figures.bytes_out == report.plan.bytes_out
    assert figures.groups == report.groups
    layers = {layer.layer: layer for layer in figures.layers}
    assert list(layers) == [layer.layer for layer in report.plan.layers]
    assert {x.layer for x in figures.measured} == report.errors.keys()
    for name, error in report.errors.items():
        assert layers[name].relative_rms == float(f"{error.relative_rms:.4g}")
        assert layers[name].max_steps == float(f"{error.max_steps:.4g}")
    assert layers["model.layers.0.self_attn.v_proj"].relative_rms is None
    # A figure with more digits than a record's is shown as the record's is.
    assert format_percent(0.0863514) == format_percent(float(f"{0.0863514:.4g}"))
    assert (format_percent(0.5), format_percent(None)) == ("50.0 %", "")


def test_kinds_and_bits(converted: tuple[Path, requant.Report]) -> None:
    figures = requant.read_figures(converted[0])
    kinds = {kind.kind: kind for kind in figures.kinds}
    assert kinds["v_proj"].layers == 4 and kinds["v_proj"].median_rms is None
    assert kinds["embed_tokens"].bytes_out * 8 == kinds["embed_tokens"].parameters * 9
    worst = max(x.relative_rms or 0 for x in figures.layers if x.kind == "q_proj")
    assert kinds["q_proj"].worst_rms == worst
    assert sum(kind.bytes_out for kind in figures.kinds) == figures.bytes_out


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--mode", "mxfp4", "--only", "mlp", "--override", "down_proj=6:32"],
        ["--recipe", "ends-8", "--override", "q_proj$=skip", "--layout", "keep"],
        ["--recipe", "mixed_3_6", "--bits", "4", "--group-size", "32"],
        ["--dequantize", "--dtype", "float16", "--shard-size", "1MB"],
        ["--bits", "3", "--search", "fast", "--layout", "keep"],
    ],
    ids=lambda options: " ".join(options) or "none",
)
def test_the_command_gives_the_output_again(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        run(["convert", str(MICRO), str(tmp_path / "one"), *options, "--quiet"])
    assert not end.value.code
    command = requant.read_figures(tmp_path / "one").command(str(MICRO), str(tmp_path / "two"))
    program, *arguments = shlex.split(command)
    with pytest.raises(SystemExit) as end:
        run([*arguments, "--quiet"])
    assert program == "requant" and not end.value.code
    one, two = ((tmp_path / name / "requant.json").read_text() for name in ("one", "two"))
    same = "tensors", "headers", "files", "plan", "layers"
    assert [json.loads(one)[key] for key in same] == [json.loads(two)[key] for key in same]


def test_threads_and_chunks_change_no_record(tmp_path: Path) -> None:
    requant.convert(MICRO, tmp_path / "a", bits=4, layout="keep", threads=1)
    requant.convert(MICRO, tmp_path / "b", bits=4, layout="keep", threads=3, chunk_bytes=20_000)
    records = [(tmp_path / name / "requant.json").read_bytes() for name in ("a", "b")]
    assert records[0] == records[1]


def make_nonfinite(output: Path, target: Path, layer: str, key: str, value: Any) -> Path:
    """A record of which one entry is another; its own hash fits."""
    record = json.loads((output / "requant.json").read_text())
    place = record["layers"][layer] if layer else record
    if value is KeyError:
        del place[key]
    else:
        place[key] = value
    target.mkdir()
    (target / "requant.json").write_text(json.dumps(record | {"sha256": record_hash(record)}))
    return target


@pytest.mark.parametrize(
    "key, value, declared",
    [
        ("shape", [1, -2], r"shape \[1, -2\] and bytes .* are not counts"),
        ("shape", "x", "shape: is 'x', expected a list"),
        ("bytes_in", True, "bytes_in: is true, expected a whole number"),
        ("target", None, "target: is missing"),
        ("bytes_out", KeyError, "bytes_out: is missing"),
        ("error", [1], r"error: is \[1\], expected two numbers or null"),
        ("error", [1, "x"], "expected two numbers or null"),
    ],
)
def test_another_tools_record_is_rejected(
    converted: tuple[Path, requant.Report], tmp_path: Path, key: str, value: Any, declared: str
) -> None:
    folder = make_nonfinite(converted[0], tmp_path / "x", "model.embed_tokens", key, value)
    with pytest.raises(
        requant.CheckpointError, match=f"requant.json: layers.model.emb.*{declared}"
    ):
        requant.read_figures(folder)


@pytest.mark.parametrize("key, value", [("options", {}), ("layers", []), ("source", None)])
def test_a_torn_record_is_rejected(
    converted: tuple[Path, requant.Report], tmp_path: Path, key: str, value: Any
) -> None:
    folder = make_nonfinite(converted[0], tmp_path / "x", "", key, value)
    with pytest.raises(requant.CheckpointError, match=r"requant\.json: "):
        requant.read_figures(folder)


def test_a_folder_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(requant.CheckpointError, match=r"json: is missing: requant did not write"):
        requant.read_figures(MICRO)
    with pytest.raises(requant.CheckpointError, match="no such folder"):
        requant.read_figures(tmp_path / "none")
