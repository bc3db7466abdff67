"""``requant.mlx_lm``: sources loaded in memory give the logits of the converted folder."""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import requant.mlx_lm
from requant.api.convert import convert
from requant.errors import BackendError, CheckpointError, UsageError
from tests.support.checkpoints import model
from tests.support.mlx_reference import as_bytes
from tests.support.published_models import as_awq, published

pytestmark = pytest.mark.sweep(1)


def logits(loaded) -> mx.array:
    tokens = mx.array([[1, 5, 9, 200, 31, 7]])
    return loaded[0](tokens)


MIXED = {"bits": 8, "dtype": "float16", "overrides": ["q_proj=4"]}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("micro-llama", {"bits": 4}),
        ("micro-llama", {"mode": "mxfp4"}),
        ("micro-llama", MIXED),
        ("micro-moe", {"bits": 4}),
        ("micro-moe", MIXED),
        pytest.param("qwen3-16m", {"bits": 4}, marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_converted_folder(name: str, options: dict, tmp_path: Path) -> None:
    import mlx_lm

    convert(model(name), tmp_path / "there", layout="mlx-lm", **options)
    convert(model(name), tmp_path / "kept", layout="keep", **options)
    expected = logits(mlx_lm.load(str(tmp_path / "there")))
    assert as_bytes(logits(requant.mlx_lm.load(model(name), **options))) == as_bytes(expected)
    assert as_bytes(logits(requant.mlx_lm.load(tmp_path / "there"))) == as_bytes(expected)
    # Experts that were quantized one by one; the router is not among what keep quantizes.
    convert(tmp_path / "kept", tmp_path / "stacked", layout="mlx-lm")
    expected = logits(mlx_lm.load(str(tmp_path / "stacked")))
    assert as_bytes(logits(requant.mlx_lm.load(tmp_path / "kept"))) == as_bytes(expected)


@pytest.mark.parametrize("options", [{}, {"threads": 1}, {"threads": 2, "chunk_bytes": 5000}])
def test_weights_are_those_of_the_folder(options: dict, tmp_path: Path) -> None:
    """A packed source too, stacked on its way, with a layer that is computed."""
    published(tmp_path / "m", "deepseek_v3")
    as_awq(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "there", layout="mlx-lm")
    expected = mx.load(str(tmp_path / "there" / "model.safetensors"))
    weights, report = requant.mlx_lm.load_weights(tmp_path / "m", **options)
    assert weights.keys() == expected.keys()
    assert [name for name in weights if as_bytes(weights[name]) != as_bytes(expected[name])] == []
    assert {x.exactness for x in report.plan.layers} == {"exact", "rounded", "re-encoded"}


def test_memory_holds_the_model_once() -> None:
    """Apart from the model MLX holds nothing of it, neither on the way nor at the end."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    nbytes = requant.mlx_lm.load_with_report(model("qwen3-16m"), bits=4).report.plan.bytes_out
    assert mx.get_active_memory() - before < 1.02 * nbytes
    assert mx.get_peak_memory() - before < 1.02 * nbytes


def test_no_weights_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    written: list[int] = []
    save = mx.save_safetensors

    def spy(path: str, arrays: dict[str, mx.array], *rest: object) -> None:
        written.append(sum(array.nbytes for array in arrays.values()))
        save(path, arrays, *rest)

    monkeypatch.setattr(mx, "save_safetensors", spy)
    requant.mlx_lm.load(model("micro-llama"), bits=4)
    assert written == [4]
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_numbers(tmp_path: Path) -> None:
    shutil.copytree(model("micro-llama"), tmp_path / "m")
    weights = mx.load(str(tmp_path / "m" / "model.safetensors"))
    mx.eval(weights)  # the file is written over
    name = "model.layers.0.mlp.up_proj"
    weights[f"{name}.weight"] = mx.full((1,), np.nan, mx.bfloat16) * weights[f"{name}.weight"]
    mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        requant.mlx_lm.load(tmp_path / "m", bits=4)
    made, _ = requant.mlx_lm.load_weights(tmp_path / "m", bits=4, allow_nonfinite=True)
    assert f"{name}.scales" not in made
    assert "model.layers.1.mlp.up_proj.scales" in made


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model("micro-llama"), tmp_path / "m")
    for file in (tmp_path / "m").glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer: "):
        requant.mlx_lm.load(tmp_path / "m", bits=4)
    with pytest.raises(TypeError, match="layers"):
        requant.mlx_lm.load(tmp_path / "m", layers=4)
    with pytest.raises(UsageError):
        requant.mlx_lm.load(tmp_path / "m", bits=4, dequantize=True)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(CheckpointError, match=r"mlx-lm: is not installed .*requant\[mlx\]"):
        requant.mlx_lm.load(model("micro-llama"), bits=4)


# -- generate ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_text_is_mlx_lm_s(tmp_path: Path) -> None:
    import mlx_lm

    convert(model("qwen3-16m"), tmp_path / "there", layout="mlx-lm", bits=4)
    theirs = mlx_lm.generate(*mlx_lm.load(str(tmp_path / "there")), "The file", max_tokens=12)
    loaded = requant.mlx_lm.load_with_report(model("qwen3-16m"), bits=4)
    pieces: list[str] = []
    made = requant.mlx_lm.generate(
        loaded, "The file", max_tokens=12, raw=True, on_text=pieces.append
    )
    assert made.text == theirs == "".join(pieces)
    assert (made.tokens, made.finish_reason) == (12, "length")
    assert made.tokens_per_s > 0


def test_a_chat_template_is_used_unless_raw(tmp_path: Path) -> None:
    shutil.copytree(model("micro-llama"), tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    template = "{% for m in messages %}say {{ m['content'] }} now{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    loaded = requant.mlx_lm.load_with_report(tmp_path / "m", bits=4)

    def prompt_tokens(prompt: str, raw: bool) -> int:
        return requant.mlx_lm.generate(loaded, prompt, max_tokens=1, raw=raw).prompt_tokens

    assert prompt_tokens("a file", raw=False) == prompt_tokens("say a file now", raw=True)
    assert prompt_tokens("a file", raw=True) < prompt_tokens("a file", raw=False)
    with pytest.raises(UsageError, match="no token"):
        requant.mlx_lm.generate(loaded, "", raw=True)


def test_what_mlx_cannot_run_is_said() -> None:
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("on the CPU, MLX's gather-matmul takes float32 only")
    loaded = requant.mlx_lm.load_with_report(model("micro-moe"), dequantize=True)
    with pytest.raises(BackendError, match="MLX cannot run this model here"):
        requant.mlx_lm.generate(loaded, "The file")
