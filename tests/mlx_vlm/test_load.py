"""``requant.mlx_vlm``: sources loaded in memory give what mlx-vlm gives for the folder."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from requant.errors import CheckpointError
from tests.support.library_models import write_model, write_processor
from tests.support.mlx_reference import as_bytes


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_model("mlx-vlm", tmp_path / "source")
    write_processor(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.sweep(1)
@pytest.mark.parametrize("options", [{"bits": 4}, {"mode": "mxfp4"}, {"dequantize": True}])
def test_the_model_is_that_of_the_folder(options: dict, source: Path, tmp_path: Path) -> None:
    import mlx_vlm.utils

    import requant.mlx_vlm

    requant.convert(source, tmp_path / "out", layout="mlx-vlm", **options)
    expected = mlx_vlm.utils.load_model(tmp_path / "out")
    model, processor = requant.mlx_vlm.load(source, **options)
    a, b = (dict(tree_flatten(x.parameters())) for x in (model, expected))
    assert a.keys() == b.keys()
    assert all(as_bytes(a[name]) == as_bytes(x) for name, x in b.items())
    tokens = mx.array([[1, 5, 9, 200, 31, 7]])
    assert as_bytes(model(tokens).logits) == as_bytes(expected(tokens).logits)
    assert processor.tokenizer.encode("ab") == [64, 65]


def test_a_damaged_processor(source: Path) -> None:
    import requant.mlx_vlm

    (source / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="processor of model_type 'qwen2_vl': "):
        requant.mlx_vlm.load(source, bits=4)


def test_code_of_the_source_is_not_run(source: Path) -> None:
    import requant.mlx_vlm

    marker = source / "ran"
    (source / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        requant.mlx_vlm.load(source, bits=4)
    except CheckpointError as error:
        assert "processor" in str(error)
    assert not marker.exists()


def test_a_source_that_mlx_vlm_does_not_take(source: Path) -> None:
    import requant.mlx_vlm

    weights = dict(mx.load(str(source / "model.safetensors")))
    del weights["vision_tower.blocks.0.norm1.weight"]
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"without a tensor.*norm1\.weight") as caught:
        requant.mlx_vlm.load(source, bits=4)
    assert caught.value.source == str(source)
