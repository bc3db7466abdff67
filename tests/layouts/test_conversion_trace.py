"""What a library's convert meets while it is followed, and what is left of it afterwards."""

from __future__ import annotations

import gc
import importlib
import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from requant.core.dtypes import TensorInfo
from requant.errors import RequantError
from requant.layouts.conversion_trace import Shown
from requant.layouts.layout import LibraryLayout, library_layout
from requant.libraries import LIBRARIES, MLX_LM, LayoutError, Library, Request
from requant.quantization.config import Quantization
from tests.support.families import small_config
from tests.support.library_models import MODELS, write_model

llama: Any = pytest.importorskip("mlx_lm.models.llama")
CONFIG = small_config("llama")
REQUEST = Request(Quantization.affine(32, 4))


def infos() -> dict[str, TensorInfo]:
    """The tensors of mlx-lm's class."""
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    flat = tree_flatten(model.parameters())
    return {name: TensorInfo("BF16", tuple(array.shape)) for name, array in flat}


INFOS = infos()


def lay_out(name: str = "model", **config: Any) -> LibraryLayout:
    return library_layout(MLX_LM, Shown(CONFIG | config, INFOS, name=name), REQUEST)


def replaced_functions() -> list[object]:
    convert = importlib.import_module("mlx_lm.utils")
    names = ("load", "eval", "save_safetensors", "contiguous", "from_fp8")
    return [
        *(getattr(mx, name) for name in names),
        *(vars(nn.Module)[name] for name in ("__init__", "load_weights")),
        nn.quantize,
        convert.load_tokenizer,
    ]


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, empty."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["a [1]", "a*?", "-x", "ü" * 80, "a'\"\\;$(b)", "\udcff"])
def test_names_of_folders(name: str, temporary: Path) -> None:
    layout = lay_out(name)
    assert len(layout.tensors) == len(INFOS)
    (folder,) = temporary.glob("*/*")
    assert folder.stat().st_size and len(list(folder.iterdir())) == 2
    del layout
    gc.collect()
    assert list(temporary.iterdir()) == []


@pytest.mark.sweep(3)
@pytest.mark.parametrize("place", ["sanitize", "load_weights", "quant_predicate", "__init__"])
@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), KeyboardInterrupt()])
def test_nothing_stays_after_an_error(
    place: str, error: BaseException, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.Model, place, raising(error), raising=False)
    before = replaced_functions()
    logging.disable(logging.DEBUG)
    try:
        with pytest.raises((RequantError, KeyboardInterrupt)):
            library_layout(MLX_LM, Shown(CONFIG, {"a": TensorInfo("F32", (2,))}), REQUEST)
        with pytest.raises((RequantError, KeyboardInterrupt)) as caught:
            library_layout(MLX_LM, Shown(CONFIG, INFOS), REQUEST)
        assert logging.root.manager.disable == logging.DEBUG
    finally:
        logging.disable(logging.NOTSET)
    assert replaced_functions() == before
    assert str(temporary) not in str(caught.value)
    del caught
    error.__traceback__ = error.__context__ = None
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_other_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While a convert is followed, another thread reads, evaluates and writes files of MLX."""
    sanitize = llama.Model.sanitize
    values: list[float] = []

    def work() -> None:
        with mx.stream(mx.cpu):
            file = str(tmp_path / "x.safetensors")
            mx.save_safetensors(file, {"x": mx.full((4,), 2.0)})
            mx.eval(x := mx.load(file)["x"] * 2)
            nn.quantize(model := nn.Sequential(nn.Linear(64, 64)))
            values.append(float(x[0]) if isinstance(model.layers[0], nn.QuantizedLinear) else 0)

    def working(self: Any, weights: Any) -> Any:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return sanitize(self, weights)

    monkeypatch.setattr(llama.Model, "sanitize", working)
    lay_out()
    assert values == [4.0, 4.0]  # the convert runs twice


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some classes get a codec or a tokenizer of their own from the hub."""
    hub = pytest.importorskip("huggingface_hub")
    init = llama.Model.__init__

    def downloading(self: Any, args: Any) -> None:
        init(self, args)
        hub.HfApi(endpoint="http://127.0.0.1:9").model_info("org/no-such-repository")

    monkeypatch.setattr(llama.Model, "__init__", downloading)
    with pytest.raises(LayoutError, match="offline mode is enabled"):
        lay_out()
    assert not hub.constants.HF_HUB_OFFLINE


def test_a_class_that_reads_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    init = llama.Model.__init__

    def reading(self: Any, args: Any) -> None:
        init(self, args)
        mx.load("voices.npz")

    monkeypatch.setattr(llama.Model, "__init__", reading)
    with pytest.raises(LayoutError, match=r"^mlx-lm's class reads another file \(voices\.npz\)$"):
        lay_out()


def test_nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    init = llama.Model.__init__

    def evaluating(self: Any, args: Any) -> None:
        init(self, args)
        mx.eval(mx.zeros((1 << 23, 1 << 23), mx.uint8))  # 64 TiB

    monkeypatch.setattr(llama.Model, "__init__", evaluating)
    assert lay_out().targets


def test_side_files_are_read(tmp_path: Path) -> None:
    name = "generation_config.json"
    (tmp_path / name).write_text('{"eos_token_id": [7, 8]}')
    layout = library_layout(MLX_LM, Shown(CONFIG, INFOS, {name: tmp_path / name}), REQUEST)
    assert layout.config["eos_token_id"] == [7, 8]


def test_a_part_that_is_quantized_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names would be those of the part, and the other tensors would be lost."""

    def predicate(self: Any) -> Any:
        nn.quantize(self.model.layers[0], 32, 8)
        return lambda *_: True

    monkeypatch.setattr(llama.Model, "quant_predicate", property(predicate), raising=False)
    with pytest.raises(LayoutError, match="mlx-lm quantizes a part of the model by itself"):
        lay_out()


def test_settings_that_are_null_are_named() -> None:
    with pytest.raises(
        LayoutError, match=r"null in config\.json: hidden_size, rope_scaling, text_config\.x$"
    ):
        lay_out(hidden_size=None, text_config={"x": None})


# -- each library ------------------------------------------------------------------------------
def shown_of(library: str, folder: Path) -> Shown:
    weights = write_model(library, folder)
    tensors = {n: TensorInfo("BF16", tuple(x.shape)) for n, x in weights.items()}
    return Shown(MODELS[library][2], tensors)


@pytest.mark.parametrize("library", MODELS)
def test_each_library_names_what_is_missing(library: str, tmp_path: Path) -> None:
    """mlx-audio's own convert would write random values for it."""
    adapter: Library = LIBRARIES[library]
    shown = shown_of(library, tmp_path)
    assert library_layout(adapter, shown, REQUEST).targets
    missing = next(n for n, x in shown.tensors.items() if len(x.shape) == 1 and "weight" in n)
    rest = {name: x for name, x in shown.tensors.items() if name != missing}
    with pytest.raises(LayoutError, match="1 parameter without a tensor of the source") as caught:
        library_layout(adapter, Shown(shown.config, rest), REQUEST)
    assert str(caught.value).endswith(missing.removeprefix("model."))
    assert caught.value.unmatched == (missing,)
    with pytest.raises(LayoutError, match=r" parameters without .* and [\d,]+ more$") as caught:
        library_layout(adapter, Shown(shown.config, dict([*shown.tensors.items()][:2])), REQUEST)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("library", MODELS)
def test_each_library_names_what_it_has_no_place_for(library: str, tmp_path: Path) -> None:
    shown = shown_of(library, tmp_path)
    more = {**shown.tensors, "odd.weight": TensorInfo("BF16", (2, 2))}
    with pytest.raises(LayoutError, match=r"no place for 1 tensor: .*odd\.weight$"):
        library_layout(LIBRARIES[library], Shown(shown.config, more), REQUEST)
