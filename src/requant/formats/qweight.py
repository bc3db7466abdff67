"""Folders of AutoAWQ, llm-awq, AutoGPTQ, GPTQModel and AutoRound: layers with a ``qweight``.

The shapes of a layer's tensors tell its layout and width; the config says what no shape can
(how zeros are stored, the group of a padded layer), and where the two contradict each other
the layer is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from requant.checkpoint import Checkpoint, SourceTensor
from requant.dtypes import FLOATS, TensorInfo
from requant.errors import Problem
from requant.formats.awq_packings import AwqFast, AwqGemm, AwqGemv, Marlin, gemv_width
from requant.formats.base import (
    SourceLayer,
    SourceLayout,
    dense_layer,
    fallback_for,
    foreign_part,
    scale_dtype,
)
from requant.formats.declared import Declared, declared, model_dtype
from requant.formats.fold_order import find_folds
from requant.formats.gptq_packings import PLANES, Gptq, Zeros
from requant.formats.layer_rules import LayerRule, LayerRules
from requant.formats.packing import IntegerPacking, stream_codes
from requant.formats.rotation import ROLES as ROTATION
from requant.formats.rotation import RotatedGemm, read_rotation, rotation_entry

_AWQ_VERSIONS: Final = {
    "gemm": "gemm",
    "gemv": "gemv",
    "gemv_fast": "gemv_fast",
    "llm-awq": "gemv_fast",
    "marlin": "marlin",
}
_GPTQ_FORMATS: Final = {"": "gptq", "gptq": "gptq", "gptq_v2": "gptq", "gptq_p": "gptq"}
_AUTO_ROUND: Final = {  # packing_format -> layout, how zeros are stored
    "": ("gptq", Zeros.PLUS_ONE),
    "auto": ("gptq", Zeros.PLUS_ONE),
    "auto_round:auto_gptq": ("gptq", Zeros.PLUS_ONE),
    "auto_round:gptq": ("gptq", Zeros.PLUS_ONE),
    "auto_round": ("gptq", Zeros.AS_STORED),
    "auto_round:gptqmodel": ("gptq", Zeros.AS_STORED),
    "auto_round:auto_awq": ("gemm", Zeros.AS_STORED),
    "auto_round:awq": ("gemm", Zeros.AS_STORED),
}
_ELSEWHERE = ("llm_compressor", "mlx")  # AutoRound's exports that are other formats
_METHODS: Final = {
    "awq": ("awq", "awq_marlin"),
    "gptq": ("gptq", "gptq_marlin", "marlin"),
    "paroquant": ("paroquant",),
    "auto-round": ("auto-round", "auto_round", "intel/auto-round"),
}
_ROLES = (*ROTATION, "qweight", "qzeros", "scales", "scaled_zeros", "g_idx", "B", "s")
_WORDS = ("I32", "U32")
_GPTQ_WORDS = (*_WORDS, "I8", "I16", "I64")
_NOT_IN_WEIGHTS = {
    "rotation": "an online Hadamard rotation",
    "rotation_config": "an online Hadamard rotation",
    "spinquant_config": "an online Hadamard rotation",
    "adapter": "an adapter beside the weights",
}


_DISPUTED = (
    "{} layers hold zeros stored as all ones, which readers of GPTQ version 1 take for 0 or for "
    "2^bits: taken for 0, as exllama does. The writer may have lost them; compare the outputs."
)


class QweightFormat:
    """A folder whose config names one of the methods of ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """By ``quant_method``, or by keys that only one of the tools writes."""
        found = declared(checkpoint)
        if found is None or _method(found) not in _METHODS[self.name]:
            return None
        if self.name == "auto-round" and found.word("packing_format").endswith(_ELSEWHERE):
            return None
        return f"{found.where}: {found.method or 'the keys of ' + self.name}"

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        """Find every layer, hold its tensors against each other and against the config."""
        found = declared(checkpoint)
        assert found is not None
        return _Reader(self.name, checkpoint, found).read()


def _method(found: Declared) -> str:
    """``quant_method``; older files have none, but keys that tell the tool."""
    if found.method:
        return found.method
    keys = set(found.block)
    if keys & {"w_bit", "q_group_size"} or found.word("version") in _AWQ_VERSIONS:
        return "awq"
    return "gptq" if keys & {"desc_act", "damp_percent", "true_sequential"} else ""


@dataclass(frozen=True, slots=True)
class _Convention:
    """What the whole config says of the layout."""

    layout: str  # "gptq", "gemm", "gemv", "gemv_fast", "marlin"; "" for what the tensors say
    zeros: Zeros = Zeros.AS_STORED
    planar: bool = False
    where: str = ""


class _Reader:
    """Reads one checkpoint and collects what is wrong with it."""

    def __init__(self, name: str, checkpoint: Checkpoint, found: Declared) -> None:
        self.name, self.checkpoint, self.found = name, checkpoint, found
        self.tensors = checkpoint.tensors
        self.problems: list[Problem] = []
        self.disputed = 0  # layers with a zero that readers of version 1 take for 0 or 2^bits
        self.rules = LayerRules(found, self.problems)
        self.model_dtype = model_dtype(checkpoint)
        self.convention = self._convention()

    def read(self) -> SourceLayout:
        layers: list[SourceLayer] = []
        parts_of = self._parts()
        taken = {part.name: path for path, parts in parts_of.items() for part in parts.values()}
        done: set[str] = set()
        for name, tensor in self.tensors.items():
            path = taken.get(name)
            if path is None:
                self._check_loose(tensor, parts_of)
                layers.append(dense_layer(tensor))
            elif path not in done:
                done.add(path)
                layer = self._layer(path, parts_of[path])
                if layer is not None:
                    layers.append(layer)
        if not parts_of:
            self._report(self.found.where, f"says {self.name}, but no layer has a .qweight")
        folds = [] if self.problems else find_folds(self.checkpoint, layers)
        turned = next((x.packing for x in layers if isinstance(x.packing, RotatedGemm)), None)
        return SourceLayout(
            tuple(layers),
            None,
            tuple(self.problems),
            folds=tuple(folds),
            notes=(_DISPUTED.format(self.disputed),) if self.disputed else (),
            rotation=None if turned is None else rotation_entry(turned.group, turned.krot),
        )

    def _report(self, where: str, message: str) -> None:
        self.problems.append(Problem(where, message))

    # -- the config ----------------------------------------------------------------------

    def _convention(self) -> _Convention:
        found = self.found
        for key, what in _NOT_IN_WEIGHTS.items():
            if found.get(key):
                message = f"asks for {what}: the weights alone are not the model"
                self._report(f"{found.where}.{key}", message)
        if self.name == "auto-round":
            return self._auto_round()
        if self.name == "paroquant":
            return _Convention("gemm", where=f"{found.where}.quant_method")
        if self.name == "awq":
            backend = found.word("backend")
            key = "version" if found.word("version") else "format"
            version = "llm-awq" if backend == "llm-awq" else found.word(key, "gemm")
            if version in _AWQ_VERSIONS:
                return _Convention(_AWQ_VERSIONS[version], where=f"{found.where}.{key}")
            return self._unknown(key, version, list(_AWQ_VERSIONS))
        written = found.word("checkpoint_format")
        if written == "marlin" or found.get("is_marlin_format") or found.method == "marlin":
            return _Convention("marlin", where=f"{found.where}.checkpoint_format")
        if written not in _GPTQ_FORMATS:
            return self._unknown("checkpoint_format", written, [*_GPTQ_FORMATS, "marlin"])
        zeros = Zeros.AS_STORED
        if written in ("", "gptq"):
            zeros = Zeros.WORD_PLUS_ONE if self._by_gptqmodel() else Zeros.PLUS_ONE
        where = f"{found.where}.checkpoint_format"
        return _Convention("gptq", zeros, written == "gptq_p", where)

    def _auto_round(self) -> _Convention:
        written = self.found.word("packing_format")
        if written not in _AUTO_ROUND:
            return self._unknown("packing_format", written, list(_AUTO_ROUND))
        layout, zeros = _AUTO_ROUND[written]
        return _Convention(layout, zeros, where=f"{self.found.where}.packing_format")

    def _unknown(self, key: str, value: str, known: list[str]) -> _Convention:
        names = ", ".join(name for name in known if name)
        self._report(f"{self.found.where}.{key}", f"is {value!r}; known are {names}")
        return _Convention("")

    def _by_gptqmodel(self) -> bool:
        meta = self.found.get("meta")
        writer = meta.get("quantizer") if isinstance(meta, Mapping) else None
        names = writer if isinstance(writer, list) else [writer]
        return any(str(name).startswith("gptqmodel") for name in names)

    # -- the tensors ---------------------------------------------------------------------

    def _parts(self) -> dict[str, dict[str, SourceTensor]]:
        """Layer path -> role -> tensor, for each layer with packed words."""
        paths = dict.fromkeys(
            name.rpartition(".")[0]
            for name, tensor in self.tensors.items()
            if name.endswith(".qweight") or (name.endswith(".B") and tensor.info.dtype in _WORDS)
        )
        found: dict[str, dict[str, SourceTensor]] = {}
        for path in paths:
            names = {role: f"{path}.{role}" for role in _ROLES}
            found[path] = {r: self.tensors[n] for r, n in names.items() if n in self.tensors}
        return found

    def _check_loose(self, tensor: SourceTensor, layers: Mapping[str, object]) -> None:
        """A tensor that belongs to no packed layer must make sense without one."""
        name, info = tensor.name, tensor.info
        path, _, role = name.rpartition(".")
        if path in layers and role == "weight":
            self._report(name, f"{info} stands beside {path}.qweight; remove the one that is stale")
        elif role.endswith(("weight_theta", "weight_pairs", "weight_channel_scales")):
            self._report(name, "is a rotation that experts share; only one a layer is known")
        elif role in ("qzeros", "scaled_zeros", "g_idx", "theta", "pairs", "channel_scales"):
            self._report(name, f"{info} has no {path}.qweight beside it")
        elif role == "scales" and len(info.shape) == 1:
            self._report(
                name,
                f"{info} divides an activation at run time (AutoAWQ's ScaledActivation); no layer "
                "of MLX does that, so the weights alone are not the model",
            )
        elif role == "scales":
            self._report(name, f"{info} has no {path}.qweight beside it")
        elif role in ("lora_A", "lora_B") or "lora_A." in name or "lora_B." in name:
            self._report(name, "is an adapter beside the weights; merge it into the model first")
        elif foreign := foreign_part(name):
            self._report(name, f"is a part of another format ({foreign}); one folder holds one")

    def _layer(self, path: str, parts: Mapping[str, SourceTensor]) -> SourceLayer | None:
        """One packed layer, or None with its problems reported."""
        before = len(self.problems)
        for part in parts.values():
            if not part.info.size:
                self._report(part.name, f"{part.info} holds nothing")
                return None
        rule = self.rules.of(path)
        packing = self._packing(path, parts, rule)
        if packing is None or len(self.problems) > before:
            return None
        carried = {role: parts[role] for role in ROTATION if role in parts}
        if carried:
            turned = self._rotated(path, packing, carried)
            if turned is None:
                return None
            packing = turned
        dtype = scale_dtype(packing.scale_dtype, self.model_dtype)
        act_order = isinstance(packing, Gptq) and packing.act_order
        return SourceLayer(
            path,
            {role: parts[role] for role in packing.cuts(0, min(packing.rows, 64))},
            packing.encoding,
            (packing.rows, packing.columns),
            dtype,
            packing,
            self._stored(packing),
            None if packing.encoding and not carried else fallback_for(packing.columns),
            _reason(packing),
            act_order=act_order,
            carried=carried,
        )

    def _rotated(
        self, path: str, packing: IntegerPacking, carried: Mapping[str, SourceTensor]
    ) -> RotatedGemm | None:
        """The same codes with a rotation of their inputs."""
        if self.name != "paroquant" or not isinstance(packing, AwqGemm):
            self._report(path, f"has a rotation of its inputs, which {self.name} layers have not")
            return None
        krot = read_rotation(
            self.checkpoint, path, carried, packing.columns, packing.group, self.problems
        )
        if krot is None:
            return None
        return RotatedGemm(**vars(packing), krot=krot)

    def _stored(self, packing: IntegerPacking) -> str:
        kind = {
            AwqGemm: "gemm",
            RotatedGemm: "rotated",
            AwqGemv: "gemv",
            AwqFast: "gemv_fast",
            Marlin: "marlin",
        }
        variant = kind.get(type(packing), "")
        if isinstance(packing, Gptq):
            variant = "planar" if packing.planar else ""
        group = f"g{packing.group}" if packing.groups > 1 else "a scale a row"
        words = [self.name, variant, f"{packing.bits}-bit", group]
        if isinstance(packing, Gptq) and packing.act_order:
            words.append("act-order")
        return " ".join(word for word in words if word)

    def _packing(
        self, path: str, parts: Mapping[str, SourceTensor], rule: LayerRule
    ) -> IntegerPacking | None:
        words = parts.get("qweight", parts.get("B"))
        scales = parts.get("scales", parts.get("s"))
        assert words is not None
        if scales is None:
            self._report(path, "has packed codes, but no scales")
            return None
        if len(words.info.shape) != 2 or len(scales.info.shape) != 2:
            wrong = words if len(words.info.shape) != 2 else scales
            self._report(wrong.name, f"{wrong.info}, expected two axes")
            return None
        if scales.info.dtype not in FLOATS:
            self._report(scales.name, f"{scales.info}, expected floats")
            return None
        layout = _layout(parts)
        expected = self.convention.layout
        if not layout:
            shapes = ", ".join(f"{role} {part.info}" for role, part in parts.items())
            self._report(path, f"is laid out as no tool writes it: {shapes}")
            return None
        if expected and layout != expected and not self._same_tool(layout, expected):
            self._report(
                path,
                f"is laid out as {layout} (qweight {words.info}, scales {scales.info}), but "
                f"{self.convention.where or self.found.where} says {expected}",
            )
            return None
        allowed: tuple[str, ...] = {"gptq": _GPTQ_WORDS, "gemv_fast": ("I16",)}.get(layout, _WORDS)
        if words.info.dtype not in allowed:
            self._report(words.name, f"{words.info}, expected {' or '.join(allowed[:2])} words")
            return None
        make = {
            "gemm": self._gemm,
            "gemv": self._gemv,
            "gemv_fast": self._fast,
            "marlin": self._marlin,
            "gptq": self._gptq,
        }[layout]
        return make(path, {r: p.info for r, p in parts.items()}, rule)

    def _same_tool(self, layout: str, expected: str) -> bool:
        """llm-awq's first files are gemv and its later ones gemv_fast under one name."""
        llm_awq = self.found.word("backend") == "llm-awq"
        return llm_awq and {layout, expected} == {"gemv", "gemv_fast"}

    # -- one layout each -----------------------------------------------------------------

    def _gemm(
        self, path: str, infos: Mapping[str, TensorInfo], rule: LayerRule
    ) -> IntegerPacking | None:
        n_in, width = infos["qweight"].shape
        groups, rows = infos["scales"].shape
        bits = self._bits(path, 32 * width, rows, rule, range(4, 9))
        group = self._group(path, n_in, groups, rule)
        if bits is None or group is None:
            return None
        has_zeros = "qzeros" in infos
        if has_zeros:
            self._expect(path, "qzeros", infos, (groups, width), _WORDS)
        elif not rule.symmetric:
            self._report(path, "has no qzeros, and the config does not call it symmetric")
        return AwqGemm(
            rows, n_in, bits, group, bool(rule.symmetric), infos["scales"].dtype, has_zeros
        )

    def _gemv(
        self, path: str, infos: Mapping[str, TensorInfo], rule: LayerRule
    ) -> IntegerPacking | None:
        rows, words = infos["qweight"].shape
        n_in = words * 8
        group = self._declared_group(path, n_in, rule)
        if group is None:
            return None
        self._check_bits(path, 4, rule)
        width = gemv_width(-(-n_in // group), group)
        if width is None:
            self._report(rule.where, f"group_size {group} is none that AutoAWQ's gemv packs")
            return None
        self._expect(path, "qzeros", infos, (rows, width), _WORDS)
        self._expect(path, "scales", infos, (rows, 8 * width), FLOATS)
        return AwqGemv(rows, n_in, 4, group, False, infos["scales"].dtype)

    def _fast(
        self, path: str, infos: Mapping[str, TensorInfo], rule: LayerRule
    ) -> IntegerPacking | None:
        quads, n_in = infos["qweight"].shape
        rows = 4 * quads
        role = "qzeros" if "qzeros" in infos else "scaled_zeros"
        group = self._declared_group(path, n_in, rule)
        self._check_bits(path, 4, rule)
        if n_in % 64:
            self._report(f"{path}.qweight", f"has {n_in} inputs, expected a multiple of 64")
        if role not in infos:
            self._report(path, "has no qzeros or scaled_zeros beside its scales")
        if group is None or role not in infos:
            return None
        width = gemv_width(-(-n_in // group), group)
        height = infos["scales"].shape[0] if width is None else 8 * width
        self._expect(path, "scales", infos, (height, rows), FLOATS)
        self._expect(path, role, infos, (height, rows), FLOATS)
        return AwqFast(rows, n_in, 4, group, False, infos["scales"].dtype, role)

    def _marlin(
        self, path: str, infos: Mapping[str, TensorInfo], rule: LayerRule
    ) -> IntegerPacking | None:
        roles = ("qweight", "scales") if "qweight" in infos else ("B", "s")
        tiles = infos[roles[0]].shape[0]
        groups, rows = infos[roles[1]].shape
        n_in = 16 * tiles
        group = self._group(path, n_in, groups, rule)
        self._check_bits(path, 4, rule)
        if rows % 64:
            self._report(f"{path}.{roles[1]}", f"has {rows} outputs, expected a multiple of 64")
        if group is None:
            return None
        return Marlin(rows, n_in, 4, group, True, infos[roles[1]].dtype, *roles)

    def _gptq(
        self, path: str, infos: Mapping[str, TensorInfo], rule: LayerRule
    ) -> IntegerPacking | None:
        height = infos["qweight"].shape[0] * _word_bits(infos["qweight"])
        groups, rows = infos["scales"].shape
        has_zeros = "qzeros" in infos
        if has_zeros and len(infos["qzeros"].shape) == 2:
            width = infos["qzeros"].shape[1] * _word_bits(infos["qzeros"])
            bits = self._bits(path, width, rows, rule, range(2, 9))
        else:
            bits = rule.bits
        if bits is None:
            self._report(path, f"has no qzeros that tell its width, and {rule.where} no bits")
            return None
        n_in = infos["g_idx"].size if "g_idx" in infos else height // bits
        if height != -(-n_in * bits // _word_bits(infos["qweight"])) * _word_bits(infos["qweight"]):
            self._report(
                f"{path}.qweight",
                f"{infos['qweight']} does not hold {n_in} inputs of {bits} bits"
                + (f" (g_idx has {n_in})" if "g_idx" in infos else ""),
            )
            return None
        group = self._group(path, n_in, groups, rule)
        if group is None:
            return None
        if has_zeros:
            unit, dtype = _word_bits(infos["qweight"]), infos["qweight"].dtype
            self._expect(path, "qzeros", infos, (groups, -(-rows * bits // unit)), (dtype,))
        elif rule.symmetric is False:
            self._report(path, "has no qzeros, and the config calls it asymmetric")
        act_order = self._act_order(path, infos, n_in, group, groups)
        if act_order is None:
            return None
        # GPTQModel writes 5, 6 and 7 bits in planes whatever the label says; AutoRound never.
        planar = self.convention.planar or (self.name == "gptq" and bits in (5, 6, 7))
        zeros = self.convention.zeros
        if planar and self.name == "gptq":
            zeros = Zeros.AS_STORED
        if zeros is Zeros.WORD_PLUS_ONE and bits not in (2, 4, 8):
            zeros = Zeros.PLUS_ONE
        symmetric = rule.symmetric is not False
        packing = Gptq(
            rows,
            n_in,
            bits,
            group,
            symmetric,
            infos["scales"].dtype,
            planar,
            zeros,
            has_zeros,
            act_order,
            word_bits=_word_bits(infos["qweight"]),
        )
        if bits not in PLANES:
            self._report(path, f"has {bits}-bit codes; GPTQ writes 2 to 8")
        elif has_zeros and zeros is Zeros.PLUS_ONE and not symmetric:
            fields = stream_codes(self.checkpoint.peek(f"{path}.qzeros"), bits, rows)
            self.disputed += bool((fields == (1 << bits) - 1).any())
        return packing

    # -- checks that layouts share -------------------------------------------------------

    def _bits(
        self, path: str, row_bits: int, rows: int, rule: LayerRule, known: Iterable[int]
    ) -> int | None:
        """The width that fills ``row_bits`` with ``rows`` codes, held against the config."""
        fitting = [bits for bits in known if -(-rows * bits // 32) * 32 == row_bits]
        if rule.bits in fitting:
            return rule.bits
        if not fitting:
            self._report(path, f"holds {row_bits} bits for {rows} outputs: no width of a code fits")
            return None
        if rule.bits is not None:
            self._report(path, f"holds {fitting[0]}-bit codes, but {rule.where} says {rule.bits}")
            return None
        return fitting[0]

    def _check_bits(self, path: str, bits: int, rule: LayerRule) -> None:
        if rule.bits is not None and rule.bits != bits:
            self._report(path, f"holds {bits}-bit codes, but {rule.where} says {rule.bits}")

    def _group(self, path: str, n_in: int, groups: int, rule: LayerRule) -> int | None:
        """Inputs with one scale, from the number of scales, held against the config."""
        stated = rule.group_size
        if stated is None:
            stated = n_in if groups == 1 else n_in // max(groups, 1)
        group = n_in if stated == -1 else stated
        if group < 1:
            self._report(rule.where, f"group_size is {stated}, expected a positive number or -1")
            return None
        if -(-n_in // group) != groups:
            self._report(
                path,
                f"has {groups} groups of scales for {n_in} inputs, but {rule.where} says "
                f"group_size {stated}",
            )
            return None
        return min(group, n_in)

    def _declared_group(self, path: str, n_in: int, rule: LayerRule) -> int | None:
        """The group of a layer whose scales are padded: only the config knows it."""
        if rule.group_size is None:
            self._report(
                rule.where, f"gives no group_size, and {path} is padded, so it cannot tell"
            )
            return None
        return self._group(
            path, n_in, -(-n_in // max(rule.group_size, 1)) if rule.group_size > 0 else 1, rule
        )

    def _expect(
        self,
        path: str,
        role: str,
        infos: Mapping[str, TensorInfo],
        shape: tuple[int, ...],
        dtypes: tuple[str, ...],
    ) -> None:
        """Report a missing part, or one of another shape or dtype."""
        name, info = f"{path}.{role}", infos.get(role)
        if info is None:
            self._report(name, "is missing")
        elif info.shape != shape or info.dtype not in dtypes:
            self._report(name, f"{info}, expected {TensorInfo(dtypes[0], shape)}")

    def _act_order(
        self, path: str, infos: Mapping[str, TensorInfo], n_in: int, group: int, groups: int
    ) -> bool | None:
        """Whether ``g_idx`` puts inputs into groups out of order; None if it cannot be."""
        if "g_idx" not in infos:
            return False
        name = f"{path}.g_idx"
        if infos["g_idx"].dtype not in ("I32", "I64") or len(infos["g_idx"].shape) != 1:
            self._report(name, f"{infos['g_idx']}, expected I32 [{n_in}]")
            return None
        found = self.checkpoint.peek(name).astype(np.int64)
        found = np.where(found < 0, found + groups, found)  # GPTQModel counts from the end too
        if n_in and not 0 <= found.min() <= found.max() < groups:
            bad = int(found[(found < 0) | (found >= groups)][0])
            self._report(name, f"holds group {bad}, but there are {groups} groups of scales")
            return None
        if groups == 1 or np.array_equal(found, np.arange(n_in) // group):
            return False
        sizes = np.bincount(found, minlength=groups)
        expected = np.minimum(group, n_in - group * np.arange(groups))
        if not np.array_equal(sizes, expected):
            wrong = int(np.flatnonzero(sizes != expected)[0])
            self._report(
                name,
                f"puts {int(sizes[wrong])} inputs into group {wrong}, expected "
                f"{int(expected[wrong])}",
            )
            return None
        return True


def _word_bits(info: TensorInfo) -> int:
    return 8 * TensorInfo(info.dtype, ()).nbytes


def _layout(parts: Mapping[str, SourceTensor]) -> str:
    """The layout that the shapes tell; "" for none."""
    if "B" in parts:
        return "marlin" if "s" in parts else ""
    words, scales = parts["qweight"].info, parts["scales"].info
    zeros = parts["qzeros"].info if "qzeros" in parts else None
    if words.dtype == "I16" and (zeros is None or zeros.dtype in FLOATS):
        return "gemv_fast"
    if zeros is None:
        if (words.shape[1], 16 * words.shape[0] % scales.shape[0]) == (2 * scales.shape[1], 0):
            return "marlin"
    elif len(zeros.shape) == 2:
        same_rows = words.shape[0] == zeros.shape[0] == scales.shape[0]
        if same_rows and scales.shape[1] == 8 * zeros.shape[1]:
            return "gemv"
    if words.shape[1] == scales.shape[1]:
        return "gptq"
    gemm = words.shape[1] < scales.shape[1] and words.shape[0] > scales.shape[0]
    return "gemm" if gemm else ""


def _reason(packing: IntegerPacking) -> str:
    """Why a layer gets no encoding, or another group or width than it has."""
    encoding = packing.encoding
    if encoding is None:
        if packing.columns % 32:
            return f"{packing.columns} inputs are no multiple of MLX's smallest group, 32"
        if isinstance(packing, Gptq) and packing.act_order:
            return "act-order: its groups are not consecutive inputs"
        return f"no group of MLX's lies within groups of {packing.group}"
    words = []
    if encoding.bits != packing.bits:
        words.append(f"{packing.bits}-bit codes in {encoding.bits}-bit words")
    if encoding.group_size != packing.group:
        words.append(f"scales repeated for groups of {encoding.group_size}")
    return "; ".join(words)
