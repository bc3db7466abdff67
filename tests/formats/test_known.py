"""Formats are imported when a checkpoint may be of one, and none is missed for lack of signs."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import cast

import pytest

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import TensorInfo
from requant.formats.base import Format
from requant.formats.known import FORMATS, KnownFormat
from requant.formats.quantization_block import QuantizationBlock, with_block, without_blocks
from requant.formats.scale_names import CODE_ENDINGS
from requant.sources.open import read_checkpoint
from tests.support.format_folders import SOURCES

KNOWN = [known for known in FORMATS if isinstance(known, KnownFormat)]
EXAMPLE = Path(__file__).parents[2] / "examples" / "micro-llama"
READERS = {known.reader.partition(":")[0] for known in KNOWN}
FIXTURES = sorted(
    x.parent for x in (Path(__file__).parents[1] / "fixtures").glob("*/*/config.json")
)
PLACE = QuantizationBlock("", {}, ("quantization_config",))


def module_of(known: KnownFormat) -> Format:
    """The format without its signs."""
    module, _, name = known.reader.partition(":")
    made = getattr(import_module(f"requant.formats.{module}"), name)(*known.arguments)
    assert made.name == known.name
    return cast(Format, made)


READERS_OF = [(known, module_of(known)) for known in KNOWN]


def views(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """A checkpoint with the blocks that tools of other ages write, and with none."""
    yield checkpoint
    bare = with_block(checkpoint, PLACE, {})
    yield bare
    yield replace(bare, config=without_blocks(bare.config))
    method_keys: tuple[dict[str, object], ...] = (
        {},
        {"method": "gptq"},
        {"quant_method": "mlx"},
        {"quant_method": "AWQ"},
    )
    tool_keys: tuple[dict[str, object], ...] = (
        *({"w_bit": 4}, {"version": "gemm"}, {"desc_act": False}, {"bits": 4}, {"version": 1}),
        *({"config_groups": {}}, {"quant_algo": "FP8"}, {"quantization": {"quant_algo": "FP8"}}),
        *({"load_in_4bit": True}, {"load_in_8bit": True}, {"packing_format": "mlx"}),
    )
    for method, keys in product(method_keys, tool_keys):
        yield with_block(checkpoint, PLACE, method | keys)
    for words in (
        *("mlx", "awq_marlin", "gptq_marlin", "marlin", "paroquant", "auto-round", "auto_round"),
        *("intel/auto-round", "auto_round:fp8", "compressed-tensors", "compressed_tensors"),
        *("modelopt", "modelopt_fp4", "fp8", "mxfp8", "fbgemm_fp8", "mxfp4", "hqq"),
        *("bitsandbytes", "bitnet", "metal", "fp_quant", "quark", "torchao", "of_nobody"),
    ):
        yield with_block(checkpoint, PLACE, {"quant_method": words})
    block = {"num_bits": 4}
    yield with_block(checkpoint, QuantizationBlock("", {}, ("compression_config",)), block)
    yield replace(bare, config=bare.config | {"quantization": {"bits": 4, "group_size": 64}})
    inner = {"text_config": {"quantization": {"bits": 4, "group_size": 64}}}
    yield replace(bare, config=without_blocks(bare.config) | inner)


def check_claims(checkpoint: Checkpoint) -> Counter[str]:
    """Compare each format's claim with and without its signs; the names of those that claim."""
    claims = {known.name: reader.claims(checkpoint) for known, reader in READERS_OF}
    assert {known.name: known.claims(checkpoint) for known in KNOWN} == claims
    return Counter(name for name, claim in claims.items() if claim is not None)


# Every form of config for a few folders; the rest with their own config, and without one.
EVERY = ("awq", "ct-int4", "fp8")


@pytest.mark.parametrize("source", SOURCES)
def test_what_a_format_claims_has_a_sign_of_it(source: str, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(SOURCES[source]().write(tmp_path / "source"))
    found = list(views(checkpoint))
    for view in found if source in EVERY else found[:3]:
        check_claims(view)


@pytest.mark.parametrize(
    "folder", [pytest.param(x, marks=pytest.mark.slow, id=x.parent.name) for x in FIXTURES]
)
def test_and_the_folders_of_the_tools(folder: Path) -> None:
    for view in [*views(read_checkpoint(folder))][:3]:
        check_claims(view)


def named_pairs() -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Names and dtypes of codes and of what is next to them, in all spellings of both."""
    words = (
        *("scale", "scales", "scale_inv", "scales_inv", "absmax", "SCB", "qscale", "qscale_weight"),
        *("scale_2", "scales_2", "global_scale", "zero_point", "qzeros", "qbiases", "g_idx"),
        "quant_state.bitsandbytes__nf4",
    )
    joints = (".weight_", ".weight.", ".", "_", "_weight_", "._weight_")
    dtypes = (("U8", "F8_E4M3"), ("U8", "U8"), ("F8_E4M3", "F32"), ("I32", "F16"))
    for ending, joint, word, (codes, scale) in product(CODE_ENDINGS, joints, words, dtypes):
        yield (f"mlp.experts.up{ending}", codes), (f"mlp.experts.up{joint}{word}", scale)


def test_tensors_without_a_config_are_a_sign_in_every_spelling(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(SOURCES["fp8"]().write(tmp_path / "source"))
    checkpoint = replace(checkpoint, config=without_blocks(checkpoint.config))
    one = next(iter(checkpoint.tensors.values()))
    claimed = Counter[str]()
    for pair in named_pairs():
        shapes = (2, 64, 64), (2, 64, 4)
        tensors = {
            name: replace(one, name=name, info=TensorInfo(dtype, shape))
            for (name, dtype), shape in zip(pair, shapes, strict=True)
        }
        claimed += check_claims(replace(checkpoint, tensors=tensors))
    assert {"compressed-tensors", "modelopt", "fp8", "mxfp4", "hqq", "metal"} <= claimed.keys()


def modules_after(source: Path) -> set[str]:
    """The modules of formats that a plan under the source's names has imported."""
    code = (
        f"import sys, requant\nrequant.plan({str(source)!r}, layout='keep')\n"
        "print(*(x for x in sys.modules if x.startswith('requant.formats.')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.removeprefix("requant.formats.") for name in run.stdout.split()}


def test_a_dense_folder_imports_no_reader_of_codes() -> None:
    loaded = modules_after(EXAMPLE)
    assert "dense" in loaded
    others = {"other_layers", "one_reading", "unread_qweights", "gptq_awq_config", "mlx_block"}
    assert loaded.isdisjoint(READERS | others)


def test_a_folder_of_a_tool_imports_its_reader_alone(tmp_path: Path) -> None:
    loaded = modules_after(SOURCES["awq"]().write(tmp_path / "source"))
    assert loaded & READERS == {"gptq_awq"}
