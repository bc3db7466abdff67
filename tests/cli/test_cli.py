"""What the command line prints, and the codes it ends with."""

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import mlx.core as mx
import numpy as np
import pytest
from pytest import MonkeyPatch

from requant import OutputError, __version__
from requant.api import convert as api
from requant.execution import runner
from tests.support.checkpoints import write_model
from tests.support.commands import COMMANDS, Result
from tests.support.full_disks import fill_disk
from tests.support.number_formats import BF16

Requant = Callable[..., Result]
MICRO_LLAMA = Path(__file__).parents[2] / "examples" / "micro-llama"


KEEP = ("--layout", "keep")  # a process that asks no library starts in a third of the time


def python(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def names_in(folder: Path) -> list[str]:
    """The content of a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


# -- help and start --------------------------------------------------------------------
def test_version(requant: Requant) -> None:
    result = requant("--version")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"requant {__version__}\n"


def test_help_lists_the_commands(requant: Requant) -> None:
    result = requant("-h")
    assert result.code == 0
    assert all(f"  {command}  " in result.out for command in COMMANDS)


def test_plan_takes_every_option_of_convert(requant: Requant) -> None:
    """Everything but the options about writing, and those say nothing to a plan."""
    options = [
        {line.split()[0] for line in requant(c, "-h").out.splitlines() if line.startswith("  --")}
        for c in ("convert", "plan")
    ]
    assert options[0] - options[1] == {
        "--allow-nonfinite",
        "--allow-overflow",
        "--branch",
        "--consume-source",
        "--no-resume",
        "--part",
        "--engine",
        "--address",
        "--parts",
        "--private",
        "--pull-request",
        "--upload",
        "--verify-load",
        "--yes",
        "--quiet",
    }
    assert options[1] <= options[0]


@pytest.mark.parametrize(("option", "partner"), [("--private", "--upload"), ("--yes", "--consume")])
def test_an_option_that_says_nothing_alone(requant: Requant, option: str, partner: str) -> None:
    result = requant("convert", "nowhere", "out", option)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {option} ") and partner in result.err


def test_generate_takes_every_option_that_is_not_about_files(requant: Requant) -> None:
    options = [
        {line.split()[0] for line in requant(c, "-h").out.splitlines() if line.startswith("  --")}
        for c in ("plan", "generate")
    ]
    files = {"--layout", "--keep-extra", "--shard-size", "--save-recipe", "--mmproj"}
    assert options[0] - options[1] == files | {"--quality", "--calibrate"}


def test_start_imports_nothing_heavy() -> None:
    statement = "import requant.cli as c\ntry: c.run(['--version'])\nexcept SystemExit: 0"
    heavy = ("mlx", "mlx_lm", "torch", "transformers", "rich.progress", "rich.console")
    result = python(
        "-c", f"{statement}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])"
    )
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_the_version_is_answered_without_the_parser() -> None:
    for word in ("--version", "-V"):
        code = f"import requant.cli as c\ntry: c.run([{word!r}])\nexcept SystemExit: 0"
        loaded = "import sys\nprint(sorted({'typer', 'numpy'} & {*sys.modules}))"
        result = python("-c", f"{code}\n{loaded}")
        assert result.stdout.splitlines() == [f"requant {__version__}", "[]"], result.stderr


# -- generate --------------------------------------------------------------------------
def test_generate_prints_text_and_speed(requant: Requant) -> None:
    options = (MICRO_LLAMA, "--prompt", "The file", "--bits", 4, "--max-tokens", 6)
    result = requant("generate", *options)
    assert result.code == 0
    assert result.err.startswith("6 tokens, ") and "4.52 bits per weight" in result.err
    document = json.loads(requant("generate", *options, "--json").out)
    assert result.out == document["text"] + "\n"
    assert (document["tokens"], document["finish_reason"]) == (6, "length")
    assert requant("generate", *options, "--quiet").err == ""


def test_generate_says_what_is_missing(requant: Requant, model: Path, monkeypatch: MonkeyPatch):
    result = requant("generate", model, "--prompt", "x")
    assert (result.code, result.out) == (1, "")
    assert "mlx-lm, loading llama" in result.err
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    result = requant("generate", MICRO_LLAMA, "--prompt", "x")
    assert (result.code, result.out) == (1, "")
    assert "mlx-lm: is not installed (pip install 'requant[mlx]')" in result.err


# -- convert ---------------------------------------------------------------------------
def test_convert_reports_what_it_did(requant: Requant, model: Path, tmp_path: Path) -> None:
    result = requant("convert", model, tmp_path / "out", "--bits", "4")
    assert (result.code, result.err) == (0, "")  # a short run shows no progress
    assert len(result.out.splitlines()) <= 25
    lines = [line.split() for line in result.out.splitlines()]
    columns = ["treatment", "from", "to", "exactness", "layers", "parameters", "size"]
    table = lines.index(columns)
    rows = lines[table + 1 : table + 4]
    assert ["dense", "BF16", "BF16", "exact", "5", "1,216", "2.43", "kB"] in rows
    for group_size, layers, parameters in ((64, "3", "9,216"), (32, "2", "12,288")):
        row = f"quantized BF16 affine 4-bit g{group_size} re-encoded {layers} {parameters}"
        assert row.split() in [r[:8] for r in rows]
    assert "2 layers  2.05 kB  router  model.layers.*.mlp.gate" in result.out
    assert "last axis 96 takes group 32, not 64  model.layers.*.mlp.down_proj" in result.out
    assert "bits per weight, 45.4 kB -> " in result.out
    assert "re-encoded with a relative error (rms) of " in result.out
    assert "note: Tensors keep the source's names (--layout keep): mlx-lm, loading llama: " in (
        result.out
    )
    assert "next:" not in result.out  # mlx-lm would not load this
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json", "tokenizer.json"}


@pytest.mark.parametrize(("layout", "loads"), [("auto", True), ("mlx-lm", True), ("keep", False)])
def test_the_next_command_is_one_that_works(
    requant: Requant, tmp_path: Path, layout: str, loads: bool
) -> None:
    result = requant("convert", MICRO_LLAMA, tmp_path / "out", "--layout", layout)
    assert (result.code, result.err) == (0, "")
    assert (f"next: mlx_lm.generate --model {tmp_path / 'out'} " in result.out) is loads


def test_convert_without_options_notes_the_default(requant: Requant, model: Path, tmp_path: Path):
    result = requant("convert", model, tmp_path / "out")
    assert result.code == 0
    assert "note: No bits or mode were asked for" in result.out


def test_convert_back_to_dense(requant: Requant, model: Path, tmp_path: Path) -> None:
    requant("convert", model, tmp_path / "packed", "--mode", "mxfp8", "--only", "q_proj")
    result = requant("convert", tmp_path / "packed", tmp_path / "out", "-d", "--dtype", "bfloat16")
    assert result.code == 0
    assert "dequantized" in result.out and "mxfp8 8-bit g32" in result.out


def test_convert_json_is_one_document(requant: Requant, model: Path, tmp_path: Path) -> None:
    result = requant("convert", model, tmp_path / "out", "--bits", "4", "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert report["output"] == str(tmp_path / "out")
    assert sum(group["layers"] for group in report["groups"]) == len(report["layers"]) == 10
    assert report["bytes_in"] == 2 * report["parameters"] == 2 * 22720


def test_quiet_prints_nothing(requant: Requant, model: Path, tmp_path: Path) -> None:
    assert requant("convert", model, tmp_path / "out", "--quiet") == Result(0, "", "")


def test_warnings_are_printed_even_if_quiet(requant: Requant, tmp_path: Path) -> None:
    weight = np.full((8, 64), 1e5, np.float32)
    source = write_model(tmp_path / "model", {"up.weight": weight, "up.bias": weight[0]})
    arguments = ["convert", source, tmp_path / "out", "--dtype", "float16"]
    arguments += ["--override", "up=skip", "--quiet"]
    rejected = requant(*arguments)
    assert rejected.code == 1
    assert "--allow-overflow" in rejected.err
    assert not (tmp_path / "out").exists()
    result = requant(*arguments, "--allow-overflow")
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith("warning: 576 values became infinite")


def test_nonfinite_weights_stop_a_run_unless_allowed(requant: Requant, tmp_path: Path) -> None:
    weight = np.ones((8, 64), np.float32)
    weight[3, 5] = np.nan
    source = write_model(tmp_path / "model", {"a.weight": weight, "b.weight": weight[:2]})
    rejected = requant("convert", source, tmp_path / "out")
    assert rejected.code == 1
    assert "a.weight: 1 value is NaN or infinite, first in row 3" in rejected.err
    assert names_in(tmp_path) == ["model"]
    result = requant("convert", source, tmp_path / "out", "--allow-nonfinite")
    assert result.code == 0
    assert "stays dense:" in result.out


def test_options_reach_the_plan(requant: Requant, model: Path) -> None:
    arguments = ["--bits", "8", "--group-size", "32", "--only", "q_proj", "--only", "lm_head"]
    arguments += ["--override", "lm_head=mxfp4", "--dtype", "float16", "--shard-size", "9KB"]
    plan = json.loads(requant("plan", model, *arguments, "--json", "-j", "3").out)
    targets = {layer["layer"]: layer["target"] for layer in plan["layers"]}
    assert targets["lm_head"] == "mxfp4 4-bit g32"
    assert targets["model.layers.1.self_attn.q_proj"] == "affine 8-bit g32"
    assert targets["model.norm"] == targets["model.layers.0.mlp.down_proj"] == "F16"
    assert len(plan["shards"]) > 2
    assert plan["memory"]["threads"] == 3


def test_what_mlx_lm_drops_is_shown(requant: Requant, tmp_path: Path) -> None:
    shutil.copytree(MICRO_LLAMA, tmp_path / "model")
    weights = mx.load(str(tmp_path / "model" / "model.safetensors"))
    mx.eval(weights)  # the file is written over
    weights |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": mx.ones(8) for n in range(4)}
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), weights)
    shown = requant("plan", tmp_path / "model").out
    assert "dropped: 4 tensors (mlx-lm's class has no use for them; --keep-extra keeps" in shown
    assert "): model.layers.*.self_attn.rotary_emb.inv_freq\n" in shown
    kept = requant("plan", tmp_path / "model", "--keep-extra").out
    assert (
        "dropped:" not in kept
        and "note: mlx-lm has no use for 4 tensors that --keep-extra keeps" in kept
    )


def test_a_recipe_reaches_the_plan(requant: Requant, model: Path, tmp_path: Path) -> None:
    shown = requant("recipes", "ends-8")
    assert (shown.code, shown.err) == (0, "")
    (tmp_path / "mine.toml").write_text(shown.out)
    arguments = [model, "--bits", "3", "--override", "lm_head=6", "--recipe"]
    plans = [
        json.loads(requant("plan", *arguments, recipe, "--json").out)
        for recipe in ("ends-8", tmp_path / "mine.toml")
    ]
    assert plans[0] == plans[1]
    targets = {layer["layer"]: layer["target"] for layer in plans[0]["layers"]}
    assert targets["lm_head"] == "affine 6-bit g64"
    assert targets["model.layers.1.self_attn.q_proj"] == "affine 8-bit g64"


def test_recipes_are_listed(requant: Requant) -> None:
    lines = requant("recipes").out.splitlines()
    assert lines[0].startswith("mixed_2_6  mlx-lm's own: 6 bits")
    listed = json.loads(requant("recipes", "--json").out)["recipes"]
    assert [recipe["name"] for recipe in listed] == [line.split()[0] for line in lines]
    one = json.loads(requant("recipes", "mxfp4-8", "--json").out)["recipes"][0]
    assert one in listed and one["default"]["mode"] == "mxfp4"
    assert requant("recipes", "mixed_3_6").out.startswith("# mixed_3_6 is mlx-lm's")
    assert requant("recipes", "ends8").code == 2


# -- plan, dry run, inspect ------------------------------------------------------------
def test_plan_says_the_memory_and_writes_nothing(requant: Requant, model: Path, tmp_path: Path):
    result = requant("plan", model, "--mode", "nvfp4", "--max-memory", "100MB", "-j", "1")
    assert (result.code, result.err) == (0, "")
    assert "nvfp4 4-bit g16" in result.out
    assert " MB at most, 1 thread\n" in result.out
    assert names_in(tmp_path) == ["model"]


def test_plan_json_is_the_whole_plan(requant: Requant, model: Path) -> None:
    plan = json.loads(requant("plan", model, "--bits", "4", "--json").out)
    assert plan.pop("memory").keys() == {"peak_bytes", "threads", "chunk_bytes"}
    disk = plan.pop("disk")
    assert 0 < disk["extra_bytes_with_consume_source"] <= disk["extra_bytes"]
    assert plan.pop("schema") == 1
    assert plan == json.loads(json.dumps(api.plan(model, bits=4).to_dict()))


def test_dry_run_is_the_plan_and_checks_the_output(requant: Requant, model: Path, tmp_path: Path):
    dry = requant("convert", model, tmp_path / "out", "--bits", "4", "--dry-run", "--json")
    assert dry == requant("plan", model, "--bits", "4", "--json")
    assert "nothing was written" in requant("convert", model, tmp_path / "out", "-n").out
    assert names_in(tmp_path) == ["model"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    rejected = requant("convert", model, tmp_path / "out", "--dry-run")
    assert (rejected.code, rejected.out) == (1, "")
    assert rejected.err == f"error: {tmp_path / 'out'} exists; --force replaces it\n"
    assert requant("convert", model, tmp_path / "out", "--dry-run", "-f").code == 0


def test_dry_run_says_what_a_full_disk_lacks(
    requant: Requant, model: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    command = ("convert", model, tmp_path / "out", "--bits", "4", "--dry-run")
    plan = json.loads(requant("plan", model, "--bits", "4", "--json").out)
    side_bytes = sum((model / name).stat().st_size for name in plan["side_files"])
    needed = plan["disk"]["extra_bytes"] + side_bytes

    dry = requant(*command)
    assert dry.code == 0
    assert "nothing was written" in dry.out
    assert dry.err == (
        f"warning: the disk is too full: {needed:,} bytes are needed, 1,000 are free, "
        f"{needed - 1000:,} are missing\n"
    )
    found = json.loads(requant(*command, "--json").out)
    assert found["disk"] == {**plan["disk"], "missing_bytes": needed - 1000}
    assert requant(*command[:-1]).code == 1
    assert names_in(tmp_path) == ["model"]


def test_inspect_lists_encodings_and_names(requant: Requant, model: Path) -> None:
    result = requant("inspect", model)
    assert (result.code, result.err) == (0, "")
    assert "model_type llama" in result.out
    names = [line.split() for line in result.out.splitlines()]
    assert ["model.layers.*.mlp.down_proj", "BF16", "64", "x", "96", "2", "24.6", "kB"] in names
    assert result.out.endswith("other files: tokenizer.json\nno problems found\n")


def test_inspect_with_problems_exits_1(requant: Requant, tmp_path: Path) -> None:
    codes = np.zeros((8, 8), np.uint32)
    config = {"quantization": {"group_size": 64, "bits": 4}}
    tensors = {"up.weight": codes, "up.scales": np.ones((8, 1), BF16)}
    source = write_model(tmp_path / "model", tensors, config)
    shown = requant("inspect", source)
    assert shown.code == 1
    assert "1 problem:\n  up.biases: is missing" in shown.out
    document = requant("inspect", source, "--json")
    assert document.code == 1
    assert [p["where"] for p in json.loads(document.out)["problems"]] == ["up.biases"]
    converted = requant("convert", source, tmp_path / "out")
    assert converted.code == 1
    assert "up.biases: is missing" in converted.err


def test_a_source_cannot_drive_the_terminal(requant: Requant, tmp_path: Path) -> None:
    tensors = {"up.weight": np.ones((8, 64), BF16)}
    source = write_model(tmp_path / "model", tensors, {"model_type": "\x1b[2J\u202e"})
    result = requant("inspect", source)
    assert "\x1b" not in result.out and "\u202e" not in result.out
    assert r"model_type \x1b[2J\u202e" in result.out


# -- errors ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "7"], "error: bits = 7: affine takes"),
        (["--bits", "4", "--mode", "mxfp8"], "error: bits = 4: mxfp8 takes"),
        (["--mode", "fp4"], "known: 'affine', 'mxfp4', 'mxfp8', 'nvfp4'"),
        (["--dtype", "half"], "known: 'float16', 'bfloat16', 'float32'"),
        (["--bits", "4", "--dequantize"], "error: choose one: dequantize"),
        (["--override", "lm_head"], "error: --override 'lm_head' is not REGEX=SPEC"),
        (["--override", "lm_head=9"], "not a quantization of MLX"),
        (["--only", "("], "error: --only '(' is not a valid regular expression"),
        (["--only", "q_prj"], "--only 'q_prj': matches no layer; close matches: q_proj"),
        (
            ["--override", "lm_haed=8"],
            "--override 'lm_haed': matches no layer; close matches: lm_head",
        ),
        (["--recipe", "mixed"], "error: there is no recipe 'mixed'; close matches: mixed_"),
        (["--recipe", "no.toml"], "error: recipe no.toml: No such file"),
        (["--recipe", "ends-8", "--dequantize"], "error: choose one: dequantize"),
        (["--max-memory", "1MB"], "for the longest row of the model; give --max-memory"),
        (["--max-memory", "2 parsecs"], "'2 parsecs' is not a valid size; write 500MB"),
        (["--shard-size", "0"], "'0' is less than one byte"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--bit", "4"], "No such option"),
    ],
)
def test_wrong_usage_exits_2(
    requant: Requant, model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = requant("convert", model, tmp_path / "out", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in " ".join(result.err.split())
    assert "Traceback" not in result.err
    assert names_in(tmp_path) == ["model"]


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_missing_source_exits_1(requant: Requant, tmp_path: Path, command: str) -> None:
    result = requant(command, tmp_path / "nowhere")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ") and "no such folder" in result.err


def test_a_disk_that_fails_leaves_nothing(
    requant: Requant, model: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    fill_disk(monkeypatch)
    result = requant("convert", model, tmp_path / "out")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert result.err.endswith("No space left on device\n")
    assert names_in(tmp_path) == ["model"]


def test_interrupt_exits_130(
    requant: Requant, model: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # all is written, nothing is published
        patch.setattr(runner, "_find_fatal_values", interrupt)
        result = requant("convert", model, tmp_path / "out")
    kept = tmp_path / ".out.requant-partial"
    words = f"interrupted; 100% is done and kept in {kept}; the same command resumes"
    assert result == Result(130, "", f"{words}, --no-resume starts over\n")
    assert names_in(tmp_path) == [kept.name, "model"]
    assert requant("convert", model, tmp_path / "out", "--no-resume").code == 0
    assert names_in(tmp_path) == ["model", "out"]


@pytest.mark.slow
def test_a_defect_keeps_its_traceback(model: Path) -> None:
    breaks = "import requant.api.convert as c\nc.plan = lambda *_, **__: 1 // 0\n"
    runs = f"from requant.cli import run\nrun(['plan', {str(model)!r}])"
    result = python("-c", breaks + runs)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "ZeroDivisionError" in result.stderr


@pytest.mark.slow
def test_errors_through_the_process(model: Path, tmp_path: Path) -> None:
    assert python("-m", "requant", "plan", tmp_path / "nowhere").returncode == 1
    assert python("-m", "requant", "plan", model, "--bits", "7").returncode == 2
    result = python("-m", "requant", "convert", model, tmp_path / "out", *KEEP, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["format"] == "dense"


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_not_a_crash(model: Path, unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "requant", "plan", str(model), *KEEP]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.slow
def test_a_stream_without_unicode_is_not_a_crash(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", {"größe.weight": np.ones((8, 64), BF16)})
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = python("-m", "requant", "inspect", source, env=ascii_only)
    assert (result.returncode, result.stderr) == (0, "")
    assert r"gr\xf6\xdfe" in result.stdout


def test_an_error_names_the_layer_at_fault(requant: Requant, model: Path, monkeypatch: MonkeyPatch):
    def fail(*_: object, **__: object) -> NoReturn:
        raise OutputError("cannot be written", layer="up_proj")

    monkeypatch.setattr(api, "plan", fail)
    assert requant("plan", model) == Result(1, "", "error: up_proj: cannot be written\n")


# -- a terminal ------------------------------------------------------------------------
def on_terminal(*arguments: object, **environment: str) -> tuple[int, str]:
    """Run requant with all its streams on a terminal of 80 columns."""
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.environ.update({"TERM": "xterm", "COLUMNS": "80", **environment})
            command = [sys.executable, "-m", "requant", *map(str, arguments)]
            os.execv(sys.executable, command)
        finally:
            os._exit(99)
    text = b""
    try:
        while piece := os.read(terminal, 65536):
            text += piece
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text.decode()


@pytest.mark.slow
def test_progress_is_drawn_on_a_terminal(model: Path, tmp_path: Path) -> None:
    code, text = on_terminal("convert", model, tmp_path / "out", "--bits", "4", *KEEP)
    assert code == 0
    assert "100%" in text and "B/s" in text
    assert "\x1b[?25h" in text  # the cursor is shown again
    assert "bits per weight" in text


@pytest.mark.slow
def test_no_color_is_honoured(model: Path, tmp_path: Path) -> None:
    _, text = on_terminal("convert", model, tmp_path / "out", *KEEP, NO_COLOR="1")
    assert "\x1b[3" not in text and "\x1b[9" not in text


@pytest.mark.slow
def test_a_dumb_terminal_gets_plain_text(model: Path, tmp_path: Path) -> None:
    code, text = on_terminal("convert", model, tmp_path / "out", *KEEP, TERM="dumb")
    assert code == 0
    assert "\x1b" not in text and "quantized" in text


@pytest.mark.slow
def test_counting_is_drawn_on_a_terminal(tmp_path: Path) -> None:
    code, text = on_terminal("compare", MICRO_LLAMA, MICRO_LLAMA)
    assert code == 0
    assert "100%" in text or "of 38" in text
    assert "\x1b[?25h" in text and "equal" in text
    code, text = on_terminal("compare", MICRO_LLAMA, MICRO_LLAMA, TERM="dumb")
    assert code == 0 and "\x1b" not in text and "\r\x1b" not in text


@pytest.mark.slow
def test_a_narrow_terminal_cuts_nothing(requant: Requant, tmp_path: Path) -> None:
    code, text = on_terminal("recipes")
    assert code == 0 and "\u2026" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "           for routers" in lines  # folded
    requant("convert", MICRO_LLAMA, tmp_path / "out", "--quiet")
    code, text = on_terminal("inspect", tmp_path / "out", NO_COLOR="1")
    assert code == 0 and "\u2026" not in text
    assert "affine 4-bit g64  512 x 128       1  36.9 kB" in text
    code, text = on_terminal("compare", MICRO_LLAMA, tmp_path / "out", NO_COLOR="1")
    assert code == 0 and "\u2026" not in text.rpartition("\x1b[?25h")[2]  # after the bar
    assert "model.layers.*.post_attention_layernorm.weight  BF16  BF16  " in text


def test_verify_exits_1_where_a_bit_differs(requant: Requant, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert requant("convert", model, out, "--bits", "4").code == 0
    assert requant("verify", out).code == 0
    result = requant("verify", model, out)
    assert result.code == 0
    assert f"equal to a conversion of {model}" in result.out
    shard = out / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = requant("verify", out)
    assert result.code == 1
    assert "1 problem" in result.out and "SHA-256" in result.out
    assert json.loads(requant("verify", model, out, "--json").out)["ok"] is False
    assert requant("verify", tmp_path / "nowhere").code == 1
    transposed = requant("verify", out, model)
    assert transposed.code == 1
    assert f"is missing, but {out} has one: the source comes first" in transposed.err
