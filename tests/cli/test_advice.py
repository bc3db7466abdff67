"""What an error or a note advises is done to the letter, and then works.

Each case: a situation, the words of the message, and the command that follows it.
"""

import importlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.commands import COMMANDS, Result
from tests.support.number_formats import bf16
from tests.support.safetensors_files import write_file

pytestmark = pytest.mark.sweep(1)

Requant = Callable[..., Result]
MICRO = Path(__file__).parents[2] / "examples" / "micro-llama"
BF16 = ml_dtypes.bfloat16
pytest.importorskip("mlx_lm")


def folder_of(
    folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> Path:
    folder.mkdir()
    write_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "none"}))
    return folder


@pytest.fixture
def micro(tmp_path: Path) -> Path:
    shutil.copytree(MICRO, tmp_path / "micro")
    return tmp_path / "micro"


# -- options ---------------------------------------------------------------------------------

# What is typed after ``convert SOURCE OUTPUT`` -> words of the message, what is typed then.
OPTIONS: dict[str, tuple[str, str, str]] = {
    "yes": ("--yes", "confirms --consume-source: add that", "--yes --consume-source"),
    "consume": ("--consume-source", "--yes says that this is meant", "--consume-source --yes"),
    "save-recipe": (
        "--save-recipe new.toml",
        "add --budget, as in 4.5",
        "--save-recipe new.toml --budget 4.5",
    ),
    "a recipe's name": (
        "--save-recipe new.txt --budget 4.5",
        "--recipe reads names that end in .toml",
        "--save-recipe new.toml --budget 4.5",
    ),
    "a budget and bits": ("--budget 4.5 --bits 4", "leave --bits out", "--budget 4.5"),
    "protection without a budget": (
        "--protect q_proj=6",
        "--override q_proj=6 sets bits without a budget",
        "--override q_proj=6",
    ),
    "a protection's bits": (
        "--budget 5 --protect q_proj=9",
        "from 2 to 8, as in 'q_proj=6'",
        "--budget 5 --protect q_proj=6",
    ),
    "gptq with a mode": (
        "--gptq --mode mxfp4 --imatrix x.safetensors",
        "leave --mode mxfp4 out",
        "",
    ),
    "bits": ("--bits 7", "affine takes 1, 2, 3, 4, 5, 6 or 8", "--bits 8"),
    "group": ("--group-size 48", "affine takes 32, 64 or 128", "--group-size 32"),
    "mode": ("--mode mxfp5", "mxfp4", "--mode mxfp4"),
    "an override's form": ("--override q_proj", "is not REGEX=SPEC", "--override q_proj=8"),
    "an override's spec": (
        "--override q_proj=x",
        "write bits (8), bits:group (8:32), a mode",
        "--override q_proj=8:32",
    ),
    "dtype": ("--dtype f16", "'float16'", "--dtype float16"),
    "search": ("--search most", "'best'", "--search best"),
    "layout": ("--layout mlx", "'mlx-lm'", "--layout mlx-lm"),
    "a recipe": ("--recipe mixed_36", "mixed_3_6", "--recipe mixed_3_6"),
    "config-from": ("--config-from .", "is for GGUF sources", ""),
    "revision": ("--revision main", "is for repositories on the hub", ""),
    "two options": ("--dequantize --bits 4", "choose one: dequantize, or bits", "--dequantize"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(
    requant: Requant, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    typed, words, then = OPTIONS[case]
    first = requant("convert", "micro", "out", *shlex.split(typed))
    assert first.code in (1, 2), first.out
    assert words in first.err
    done = requant("convert", "micro", "out", *shlex.split(then))
    assert done.code == 0, done.err


def test_a_name_that_no_layer_has(requant: Requant, tmp_path: Path) -> None:
    for option in ("override", "only"):
        typed = "q_prj=8" if option == "override" else "q_prj"
        first = requant("convert", MICRO, tmp_path / option, f"--{option}", typed)
        near = re.search(r"matches no layer; close matches: ([\w.]+)", first.err)
        assert near is not None, first.err
        typed = f"{near[1]}=8" if option == "override" else near[1]
        assert requant("convert", MICRO, tmp_path / option, f"--{option}", typed).code == 0


@pytest.mark.slow
def test_a_budget_that_cannot_be_met(requant: Requant, tmp_path: Path) -> None:
    first = requant("convert", MICRO, tmp_path / "out", "--budget", "0.5")
    typed = re.search(r"Type --budget (\S+)", first.err)
    assert typed is not None, first.err
    assert requant("convert", MICRO, tmp_path / "out", "--budget", typed[1]).code == 0


@pytest.mark.parametrize("layout", ["keep", "mlx-lm"])
def test_max_memory_says_what_the_least_is_for(requant: Requant, tmp_path: Path, layout: str):
    words = ("convert", MICRO, tmp_path / "out", "--layout", layout)
    first = requant(*words, "--max-memory", "10MB")
    assert first.code == 2
    assert "83,886,080 for Python, NumPy and the plan" in first.err
    assert "for the longest row of the model" in first.err
    assert ("for mlx-lm and the tensors that it computes" in first.err) is (layout == "mlx-lm")
    typed = re.search(r"give --max-memory (\d+)", first.err)
    assert typed is not None
    below = requant(*words, "--max-memory", int(typed[1]) - 1)
    assert below.code == 2 and typed[0] in below.err
    assert requant(*words, "--max-memory", typed[1]).code == 0


def test_an_upload_is_asked_for(requant: Requant, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    first = requant("convert", MICRO, tmp_path / "out", "--private")
    assert "add --upload ORG/NAME" in first.err
    then = requant("convert", MICRO, tmp_path / "out", "--private", "--upload", "a/b")
    assert "set HF_TOKEN" in then.err  # a further true message


# -- OUTPUT ----------------------------------------------------------------------------------
def a_folder(place: Path) -> None:
    place.mkdir()
    (place / "notes.txt").write_text("mine")


def a_checkpoint(place: Path) -> None:
    a_folder(place)
    (place / "config.json").write_text("{}")


# What exists at OUTPUT -> the words of the first message, whether --force is one of them.
OUTPUTS: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "a checkpoint": (a_checkpoint, "exists; --force replaces it", True),
    "another folder": (a_folder, "--force replaces checkpoints only. Remove it yourself", False),
    "a file": (lambda place: place.write_text("x"), "not a folder, which --force does not", False),
    "a link": (lambda place: place.symlink_to("micro"), "the source", False),
    "a link to nowhere": (lambda place: place.symlink_to("x"), "exists and is not a folder", False),
}


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("case", OUTPUTS)
def test_what_exists_at_output_is_said_at_once(
    requant: Requant, micro: Path, tmp_path: Path, case: str, dry: bool
) -> None:
    make, words, forced = OUTPUTS[case]
    out = tmp_path / "out"
    make(out)
    option = ["--dry-run"] if dry else []
    first = requant("convert", micro, out, *option)
    assert first.code == 1
    assert words in first.err
    again = requant("convert", micro, out, "--force", *option)
    assert (again.code == 0) is forced
    if not forced:
        assert again.err == first.err
        other = requant("convert", micro, tmp_path / "other", *option)  # name another folder
        assert other.code == 0, other.err


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (".", "is the folder that this command runs in"),
        ("micro", "must not be changed; name another folder"),
        ("micro/out", "must not be changed; name another folder"),
        ("micro/config.json/out", "must not be changed; name another folder"),
        ("file/out", "is not a folder; name another folder"),
        ("/", "name another folder"),
        ("/proc", "is where a disk is mounted"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_cannot_be(
    requant: Requant,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    words: str,
    force: bool,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(MICRO, home / "micro")
    (home / "file").write_text("x")
    source = tmp_path / "elsewhere"
    if place in (".", "/", "/proc"):
        (home / "micro").rename(source)
    else:
        source = home / "micro"
    monkeypatch.chdir(home)
    first = requant("convert", source, place, *(["--force"] if force else []))
    assert first.code == 1
    assert words in first.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_where_nothing_may_be_written(requant: Requant, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    first = requant("convert", MICRO, tmp_path / "closed" / "out")
    assert "is not permitted; name another folder" in first.err


# -- the source --------------------------------------------------------------------------------
def fp8(tmp_path: Path) -> Path:
    codes = (np.arange(64 * 64) % 120).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    tensors = {
        "up.weight": codes.reshape(64, 64),
        "up.weight_scale_inv": np.full((1, 1), 0.01, np.float32),
    }
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return folder_of(
        tmp_path / "source", tensors, {"model_type": "none", "quantization_config": block}
    )


def large(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "source", {"up.weight": np.full((64, 64), 1e6, BF16)})


def nonfinite(tmp_path: Path) -> Path:
    values = bf16(64, 64)
    values[3, 4] = np.nan
    return folder_of(tmp_path / "source", {"up.weight": values, "down.weight": bf16(64, 64)})


def wide(tmp_path: Path) -> Path:
    tensors = {"up.weight": bf16(64, 64), "more": np.ones((4, 4), np.float64)}
    return folder_of(tmp_path / "source", tensors)


def gptq(tmp_path: Path, order: np.ndarray | None = None) -> Path:
    words = np.arange(16 * 64, dtype=np.int32).reshape(16, 64) * 7919
    layer = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{layer}.qweight": words,
        f"{layer}.qzeros": words[:4, :8],
        f"{layer}.scales": np.ones((4, 64), np.float16),
        f"{layer}.g_idx": np.asarray(np.arange(128) // 32 if order is None else order, np.int32),
        "model.norm.weight": np.ones(64, np.float32),
    }
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    config = {"model_type": "none", "quantization_config": block}
    return folder_of(tmp_path / "source", tensors, config)


def act_order(tmp_path: Path) -> Path:
    return gptq(tmp_path, np.random.default_rng(0).permutation(128) // 32)


def strange(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "source", {"up.weight": bf16(64, 64)}, {"model_type": "strange"})


# A source, what is typed -> words of the message, what is typed then.
SOURCES: dict[str, tuple[Callable[[Path], Path], str, str, tuple[str, ...]]] = {
    "fp8": (
        fp8,
        "",
        "add --bits 8 (8.5 bits a weight), --mode mxfp8 (8.25), --bits 4 (4.5) or --dequantize",
        ("--bits 8", "--mode mxfp8", "--bits 4", "--dequantize"),
    ),
    "overflow": (
        large,
        "--dtype float16 --dequantize",
        "--dtype bfloat16 holds them, --allow-overflow takes infinities",
        ("--dtype bfloat16 --dequantize", "--dtype float16 --dequantize --allow-overflow"),
    ),
    "NaN": (nonfinite, "--bits 4", "--allow-nonfinite leaves", ("--bits 4 --allow-nonfinite",)),
    "act-order": (
        act_order,
        "--act-order refuse",
        "--act-order requantize or dense says what such layers become",
        ("--act-order requantize", "--act-order dense"),
    ),
    "a class that there is not": (
        strange,
        "--bits 4 --layout mlx-lm",
        "--layout keep needs no class",
        ("--bits 4 --layout keep",),
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources(requant: Requant, tmp_path: Path, case: str) -> None:
    make, typed, words, then = SOURCES[case]
    source = make(tmp_path)
    first = requant("convert", source, tmp_path / "out", *typed.split())
    assert first.code == 1 or first.code == 2
    assert words in first.err
    for number, line in enumerate(then):
        done = requant("convert", source, tmp_path / str(number), *line.split())
        assert done.code == 0, done.err


# A source, what is typed -> a note, what is typed for it to go.
NOTES: dict[str, tuple[Callable[[Path], Path], str, str, str]] = {
    "no option": (large, "", "--dequantize keeps the model dense", "--dequantize"),
    "a dtype that MLX does not load": (
        wide,
        "--bits 4",
        "MLX cannot load tensors of dtype F64; --dtype bfloat16 casts F64.",
        "--bits 4 --dtype bfloat16",
    ),
    "scales of another dtype": (
        gptq,
        "",
        "--dtype float16 makes all of them float16",
        "--dtype float16",
    ),
}


@pytest.mark.parametrize("case", NOTES)
def test_a_note_goes_where_it_is_followed(requant: Requant, tmp_path: Path, case: str) -> None:
    make, typed, words, then = NOTES[case]
    source = make(tmp_path)
    first = requant("convert", source, tmp_path / "out", *typed.split())
    assert first.code == 0, first.err
    assert words in first.out
    done = requant("convert", source, tmp_path / "then", *then.split())
    assert done.code == 0, done.err
    assert words not in done.out


def test_files_that_are_given_for_folders(requant: Requant, micro: Path, tmp_path: Path) -> None:
    first = requant("convert", micro / "model.safetensors", tmp_path / "out")
    place = re.search(r"give the folder that holds it and its config.json: (\S+)", first.err)
    assert place is not None
    assert requant("convert", place[1], tmp_path / "out").code == 0


def test_a_config_that_is_missing(requant: Requant, micro: Path, tmp_path: Path) -> None:
    (micro / "config.json").unlink()
    first = requant("convert", micro, tmp_path / "out")
    assert "copy the one of the original model here" in first.err
    shutil.copy(MICRO / "config.json", micro)
    assert requant("convert", micro, tmp_path / "out").code == 0


def test_pickles(requant: Requant, micro: Path, tmp_path: Path) -> None:
    (micro / "model.safetensors").rename(micro / "pytorch_model.bin")
    first = requant("convert", micro, tmp_path / "out")
    assert "save it as safetensors with save_pretrained" in first.err
    shutil.copy(MICRO / "model.safetensors", micro)
    assert requant("convert", micro, tmp_path / "out").code == 0


def test_one_more_weight_file(requant: Requant, micro: Path, tmp_path: Path) -> None:
    """Both ways that the message offers."""
    write_file(micro / "more.safetensors", {"model.more.weight": bf16(4, 4)})
    first = requant("convert", micro, tmp_path / "out", "--layout", "keep")
    assert "move it out of the folder, or write model.safetensors.index.json" in first.err
    from safetensors import safe_open

    weight_map = {}
    for file in ("model.safetensors", "more.safetensors"):
        with safe_open(micro / file, "np") as opened:
            weight_map |= dict.fromkeys(opened.keys(), file)
    index = micro / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert requant("convert", micro, tmp_path / "out", "--layout", "keep").code == 0
    index.unlink()
    (micro / "more.safetensors").unlink()
    assert requant("convert", micro, tmp_path / "then", "--layout", "keep").code == 0


# -- next: -------------------------------------------------------------------------------------
def next_of(result: Result) -> str:
    assert result.code == 0, result.err
    return next((x[6:] for x in result.out.splitlines() if x.startswith("next: ")), "")


@pytest.mark.parametrize(
    "typed", ["--bits 4", "--mode mxfp8", "--dequantize", "--recipe mixed_3_6"]
)
@pytest.mark.parametrize("name", ["out", "my model's"])
def test_next_runs_the_output(
    requant: Requant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(next_of(requant("convert", MICRO, name, *typed.split())))
    assert program == "mlx_lm.generate"
    generate = importlib.import_module("mlx_lm.generate")
    parsed = generate.setup_arg_parser().parse_args(words)
    assert (parsed.model, parsed.prompt) == (name, "Hello")
    from mlx_lm import load

    model, tokenizer = load(parsed.model)
    assert isinstance(generate.generate(model, tokenizer, prompt="Hello", max_tokens=1), str)


SILENT: dict[str, tuple[dict[str, object], tuple[str, ...], tuple[str, ...]]] = {
    "names that mlx-lm does not load": ({}, (), ("--layout", "keep")),
    "no tokenizer": ({}, ("tokenizer.json", "tokenizer_config.json"), ()),
    "an encoder": ({"architectures": ["LlamaModel"]}, (), ()),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, (), ()),
}


@pytest.mark.parametrize("case", SILENT)
def test_next_says_nothing_of_what_does_not_generate(
    requant: Requant, micro: Path, tmp_path: Path, case: str
) -> None:
    settings, gone, typed = SILENT[case]
    config = json.loads((micro / "config.json").read_text()) | settings
    (micro / "config.json").write_text(json.dumps(config))
    for name in gone:
        (micro / name).unlink()
    assert next_of(requant("convert", micro, tmp_path / "out", *typed)) == ""


def test_next_says_nothing_of_an_embedding_model(requant: Requant, micro: Path, tmp_path: Path):
    (micro / "modules.json").write_text("[]")
    assert next_of(requant("convert", micro, tmp_path / "out")) == ""


def test_a_base_model_without_a_chat_template_has_a_next(
    requant: Requant, micro: Path, tmp_path: Path
) -> None:
    settings = json.loads((micro / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (micro / "tokenizer_config.json").write_text(json.dumps(settings))
    assert next_of(requant("convert", micro, tmp_path / "out")).startswith("mlx_lm.generate ")


# -- the examples of --help ----------------------------------------------------------------------
EXAMPLES = [
    line.strip()
    for command in ("convert", "plan", "generate", "inspect", "verify", "report", "compare")
    for line in (COMMANDS[command].help or "").splitlines()
    if line.strip().startswith("requant ")
]
LLAMA = ("Llama-3.2-1B", "Llama-3-8B-AWQ", "mlx-4bit", "Llama-3.2-1B-4bit", "Llama-3.2-1B-3bit")


def moe(folder: Path, kind: str) -> None:
    from tests.support.families import small_config
    from tests.support.mlx_lm_conversion import class_checkpoint

    names = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    class_checkpoint(folder, small_config(kind) | {"architectures": [names[kind]]})


@pytest.mark.slow
@pytest.mark.parametrize("line", EXAMPLES)
def test_the_examples_of_help_run_on_models_like_those_that_they_name(
    requant: Requant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    if any(word.endswith((".gguf", "stats.safetensors")) for word in words) or "--html" in words:
        pytest.skip("needs a file of another tool; tests/cli/test_gguf.py has such")
    if "--image" in words:
        pytest.skip("needs a processor; tests/cli/test_libraries.py has such")
    if "lm_head=6" in words:
        pytest.skip("the head of a tied model has tests of its own")
    for name in LLAMA:
        if name in words:
            shutil.copytree(MICRO, name)
    for name, kind in {"Mixtral-8x7B": "mixtral", "Qwen3-30B-A3B": "qwen3_moe"}.items():
        if name in words:
            moe(tmp_path / name, kind)
    if words[0] in ("verify", "report", "compare"):
        shutil.rmtree("Llama-3.2-1B-4bit", ignore_errors=True)
        shutil.copytree(MICRO, "Llama-3.2-1B", dirs_exist_ok=True)
        assert requant("convert", "Llama-3.2-1B", "Llama-3.2-1B-4bit", "--bits", "4").code == 0
    if words[0] == "join":
        shutil.copytree(MICRO, "Llama-3.2-1B")
        assert (
            requant("convert", "Llama-3.2-1B", words[1], "--bits", "4", "--part", "1/2").code == 0
        )
    for word in words:
        if word.endswith(".txt"):
            Path(word).write_text("The file is open. " * 200)
    done = requant(*words)
    assert done.code == 0, done.err
