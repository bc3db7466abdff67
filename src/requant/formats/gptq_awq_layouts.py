"""The layouts of a layer with a ``qweight``: detected from shapes, held against the config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import FLOATS, TensorInfo
from requant.errors import Problem
from requant.formats.base import Tensors
from requant.formats.gptq_awq_config import Convention
from requant.formats.gptq_awq_rules import LayerRule
from requant.formats.integer_layers import groups_of
from requant.formats.quantization_block import QuantizationBlock
from requant.formats.tensor_sorter import LayerError, unexpected
from requant.packings.awq import AwqFast, AwqGemm, AwqGemv, Marlin, gemv_width
from requant.packings.base import IntegerPacking, stream_codes
from requant.packings.gptq import PLANES, Gptq, Zeros
from requant.text import join_or, pluralize

WORDS = ("I32", "U32")
_Infos = Mapping[str, TensorInfo]  # role -> dtype and shape
_GPTQ_WORDS = (*WORDS, "I8", "I16", "I64")


class Layouts:
    """Makes the packing of each layer, and collects what is wrong."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        block: QuantizationBlock,
        convention: Convention,
        problems: list[Problem],
    ) -> None:
        self.name, self.checkpoint, self.found = name, checkpoint, block
        self.convention, self.problems = convention, problems
        self.disputed = 0  # layers with a zero that readers of GPTQ version 1 take for 0 or 2^bits
        self._stored: Tensors = {}  # the parts of the current layer

    def _report(self, where: str, message: str) -> None:
        self.problems.append(Problem(where, message))

    def _name(self, path: str, role: str) -> str:
        """The name in the file of a part of the current layer; a stack's parts have other names."""
        return self._stored[role].name if role in self._stored else f"{path}.{role}"

    def packing(self, path: str, parts: Tensors, rule: LayerRule) -> IntegerPacking | None:
        """The packing of one layer, or None with its problems reported.

        Raises:
            LayerError: Its tensors contradict each other or the config.
        """
        self._stored = parts
        words = parts.get("qweight", parts.get("B"))
        scales = parts.get("scales", parts.get("s"))
        assert words is not None
        if scales is None:
            raise LayerError(path, "has packed codes, but no scales")
        if len(words.info.shape) != 2 or len(scales.info.shape) != 2:
            raise unexpected(words if len(words.info.shape) != 2 else scales, "two axes")
        if scales.info.dtype not in FLOATS:
            raise unexpected(scales, "floats")
        layout = _layout(parts)
        expected = self.convention.layout
        if not layout:
            shapes = ", ".join(f"{role} {part.info}" for role, part in parts.items())
            raise LayerError(path, f"is laid out as no tool writes it: {shapes}")
        if expected and layout != expected and not self._same_tool(layout, expected):
            raise LayerError(
                path,
                f"is laid out as {layout} (qweight {words.info}, scales {scales.info}), but "
                f"{self.convention.where or self.found.where} says {expected}",
            )
        allowed: tuple[str, ...] = {"gptq": _GPTQ_WORDS, "gemv_fast": ("I16",)}.get(layout, WORDS)
        if words.info.dtype not in allowed:
            raise unexpected(words, f"{' or '.join(allowed[:2])} words")
        make = {"gemm": self._gemm, "gemv": self._gemv, "gemv_fast": self._fast}
        make |= {"marlin": self._marlin, "gptq": self._gptq}
        return make[layout](path, {role: part.info for role, part in parts.items()}, rule)

    def _same_tool(self, layout: str, expected: str) -> bool:
        """llm-awq's first files are gemv and its later ones gemv_fast under one name."""
        llm_awq = self.found.word("backend") == "llm-awq"
        return llm_awq and {layout, expected} == {"gemv", "gemv_fast"}

    def _gemm(self, path: str, infos: _Infos, rule: LayerRule) -> IntegerPacking | None:
        n_in, width = infos["qweight"].shape
        groups, rows = infos["scales"].shape
        bits = self._bits(path, 32 * width, rows, rule, range(4, 9))
        group = self._group(path, n_in, groups, rule)
        if bits is None or group is None:
            return None
        has_zeros = "qzeros" in infos
        if has_zeros:
            self._expect(path, "qzeros", infos, (groups, width), WORDS)
        elif not rule.symmetric:
            self._report(path, "has no qzeros, and the config does not call it symmetric")
        dtype = infos["scales"].dtype
        return AwqGemm(
            rows, n_in, bits, group, bool(rule.symmetric), scale_dtype=dtype, has_zeros=has_zeros
        )

    def _gemv(self, path: str, infos: _Infos, rule: LayerRule) -> IntegerPacking | None:
        rows, words = infos["qweight"].shape
        n_in = words * 8
        group = self._declared_group(path, n_in, rule)
        if group is None:
            return None
        self._check_bits(path, 4, rule)
        width = gemv_width(-(-n_in // group), group)
        if width is None:
            message = f"group_size {group} is none that AutoAWQ's gemv packs"
            raise LayerError(rule.where, message)
        self._expect(path, "qzeros", infos, (rows, width), WORDS)
        self._expect(path, "scales", infos, (rows, 8 * width), FLOATS)
        return AwqGemv(rows, n_in, 4, group, symmetric=False, scale_dtype=infos["scales"].dtype)

    def _fast(self, path: str, infos: _Infos, rule: LayerRule) -> IntegerPacking | None:
        quads, n_in = infos["qweight"].shape
        rows = 4 * quads
        role = "qzeros" if "qzeros" in infos else "scaled_zeros"
        group = self._declared_group(path, n_in, rule)
        self._check_bits(path, 4, rule)
        if n_in % 64:
            name = self._name(path, "qweight")
            self._report(name, f"has {n_in} inputs, expected a multiple of 64")
        if role not in infos:
            self._report(path, "has no qzeros or scaled_zeros next to its scales")
        if group is None or role not in infos:
            return None
        width = gemv_width(-(-n_in // group), group)
        height = infos["scales"].shape[0] if width is None else 8 * width
        self._expect(path, "scales", infos, (height, rows), FLOATS)
        self._expect(path, role, infos, (height, rows), FLOATS)
        dtype = infos["scales"].dtype
        return AwqFast(rows, n_in, 4, group, symmetric=False, scale_dtype=dtype, bias_role=role)

    def _marlin(self, path: str, infos: _Infos, rule: LayerRule) -> IntegerPacking | None:
        roles = ("qweight", "scales") if "qweight" in infos else ("B", "s")
        tiles = infos[roles[0]].shape[0]
        groups, rows = infos[roles[1]].shape
        n_in = 16 * tiles
        group = self._group(path, n_in, groups, rule)
        self._check_bits(path, 4, rule)
        if rows % 64:
            name = self._name(path, roles[1])
            self._report(name, f"has {rows} outputs, expected a multiple of 64")
        if group is None:
            return None
        dtype, (weight, scale) = infos[roles[1]].dtype, roles
        return Marlin(
            rows, n_in, 4, group, True, scale_dtype=dtype, weight_role=weight, scale_role=scale
        )

    def _gptq(self, path: str, infos: _Infos, rule: LayerRule) -> IntegerPacking | None:
        groups, rows = infos["scales"].shape
        bits = self._gptq_bits(path, infos, rows, rule)
        if bits is None:
            return None
        n_in = self._gptq_inputs(path, infos, bits)
        group = self._group(path, n_in, groups, rule)
        if group is None:
            return None
        self._check_gptq_zeros(path, infos, bits, rule)
        act_order = self._act_order(path, infos, (n_in, group, groups), rule)
        if self.convention.zeros is None and "qzeros" in infos:
            message = f"has zeros, and {self.convention.where} does not say how they are stored"
            raise LayerError(path, message)
        planar, zeros = self._gptq_dialect(bits)
        packing = Gptq(
            rows,
            n_in,
            bits,
            group,
            symmetric=rule.symmetric is not False,
            scale_dtype=infos["scales"].dtype,
            planar=planar,
            stored_zeros=zeros,
            has_zeros="qzeros" in infos,
            act_order=act_order,
            word_bits=_word_bits(infos["qweight"]),
        )
        self.disputed += self._is_disputed(path, infos, packing)
        return packing

    def _gptq_bits(self, path: str, infos: _Infos, rows: int, rule: LayerRule) -> int | None:
        """The width that the zeros tell, held against the config; without them the config's."""
        zeros = infos.get("qzeros")
        if zeros is not None and len(zeros.shape) == 2:
            return self._bits(path, zeros.shape[1] * _word_bits(zeros), rows, rule, PLANES)
        missing = f"has no qzeros that give its width, and {rule.where}"
        if rule.bits is None:
            raise LayerError(path, f"{missing} no bits")
        if rule.bits not in PLANES:
            known = f"{min(PLANES)} to {max(PLANES)}"
            raise LayerError(path, f"{missing} says {rule.bits} bits; GPTQ writes {known}")
        return rule.bits

    def _gptq_inputs(self, path: str, infos: _Infos, bits: int) -> int:
        """As many as ``g_idx`` has, else as the words hold; words for as many must be there."""
        words = infos["qweight"]
        unit, there = _word_bits(words), words.shape[0] * _word_bits(words)
        n_in = infos["g_idx"].size if "g_idx" in infos else there // bits
        if there == -(-n_in * bits // unit) * unit:
            return n_in
        declared = f" (g_idx has {n_in})" if "g_idx" in infos else ""
        message = f"{words} does not hold {n_in} inputs of {bits} bits{declared}"
        raise LayerError(self._name(path, "qweight"), message)

    def _check_gptq_zeros(self, path: str, infos: _Infos, bits: int, rule: LayerRule) -> None:
        if "qzeros" in infos:
            due = _gptq_zeros(infos, bits)
            self._expect(path, "qzeros", infos, due.shape, (due.dtype,))
        elif rule.symmetric is False:
            self._report(path, "has no qzeros, and the config calls it asymmetric")

    def _gptq_dialect(self, bits: int) -> tuple[bool, Zeros]:
        """Whether codes of this width are in planes, and how their zeros are stored."""
        # GPTQModel writes 5, 6 and 7 bits in planes whatever the label says; AutoRound never.
        planar = self.convention.planar or (self.name == "gptq" and bits in (5, 6, 7))
        zeros = self.convention.zeros or Zeros.AS_STORED
        if planar and self.name == "gptq":
            zeros = Zeros.AS_STORED
        if zeros is Zeros.WORD_PLUS_ONE and bits not in (2, 4, 8):
            zeros = Zeros.PLUS_ONE
        return planar, zeros

    def _is_disputed(self, path: str, infos: _Infos, packing: Gptq) -> bool:
        """Whether a zero is stored as all ones, which readers of version 1 take for 0 or 2^bits."""
        if packing.symmetric or packing.stored_zeros is not Zeros.PLUS_ONE:
            return False
        if infos.get("qzeros") != _gptq_zeros(infos, packing.bits):
            return False
        stored = self.checkpoint.read_small_tensor(self._name(path, "qzeros"))
        stored = stored.reshape(-1, stored.shape[-1])
        fields = stream_codes(stored, packing.bits, packing.rows)
        return bool((fields == (1 << packing.bits) - 1).any())

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
        held = join_or([f"{bits}-bit" for bits in fitting])
        if rule.bits is not None:
            self._report(path, f"holds {held} codes, but {rule.where} says {rule.bits}")
            return None
        if len(fitting) > 1:
            message = f"may hold {held} codes by its shapes; write its bits into {rule.where}"
            self._report(path, message)
            return None
        return fitting[0]

    def _check_bits(self, path: str, bits: int, rule: LayerRule) -> None:
        if rule.bits is not None and rule.bits != bits:
            self._report(path, f"holds {bits}-bit codes, but {rule.where} says {rule.bits}")

    def _group(self, path: str, n_in: int, groups: int, rule: LayerRule) -> int | None:
        """Inputs with one scale, from the number of scales, held against the config."""
        stated = rule.group_size
        if stated is None:
            fitting = groups_of(n_in, groups)
            if len(fitting) == 1:
                return fitting[0]
            either = f", which fit groups of {join_or(fitting)}" if fitting else ""
            self._report(
                path,
                f"has scales for {pluralize(groups, 'group')} of {pluralize(n_in, 'input')} in all"
                f"{either}; write its group_size into {rule.where}",
            )
            return None
        group = n_in if stated == -1 else stated
        if group < 1:
            self._report(rule.where, f"group_size is {stated}, expected a positive number or -1")
            return None
        if -(-n_in // group) != groups:
            self._report(
                path,
                f"has scales for {pluralize(groups, 'group')} of {pluralize(n_in, 'input')} in "
                f"all, but {rule.where} says group_size {stated}",
            )
            return None
        return min(group, n_in)

    def _declared_group(self, path: str, n_in: int, rule: LayerRule) -> int | None:
        """The group of a layer whose scales are padded: only the config knows it."""
        if rule.group_size is None:
            message = f"gives no group_size, and {path} is padded, so it cannot tell"
            self._report(rule.where, message)
            return None
        groups = -(-n_in // rule.group_size) if rule.group_size > 0 else 1
        return self._group(path, n_in, groups, rule)

    def _expect(
        self, path: str, role: str, infos: _Infos, shape: tuple[int, ...], dtypes: tuple[str, ...]
    ) -> None:
        name, info = self._name(path, role), infos.get(role)
        if info is None:
            self._report(name, "is missing")
        elif info.shape != shape or info.dtype not in dtypes:
            self._report(name, f"{info}, expected {TensorInfo(dtypes[0], shape)}")

    def _act_order(
        self, path: str, infos: _Infos, sizes: tuple[int, int, int], rule: LayerRule
    ) -> bool:
        """Whether ``g_idx`` puts inputs into groups out of order.

        Where nothing says that they are out of order, one that was never filled (empty, or all
        zero) says nothing: loaders ignore it too.
        """
        n_in, group, groups = sizes
        if "g_idx" not in infos:
            if not rule.shuffled or groups == 1:
                return False
            message = (
                f"has no g_idx that says which group an input is of, but {rule.where}: desc_act is "
                "true; take the weight files from their publisher again, or say false there if the "
                "inputs are in order"
            )
            raise LayerError(path, message, unknown=True)
        name = self._name(path, "g_idx")
        if infos["g_idx"].dtype not in ("I32", "I64") or len(infos["g_idx"].shape) != 1:
            raise LayerError(name, f"{infos['g_idx']}, expected I32 [{n_in}]")
        stored = self.checkpoint.read_small_tensor(name).astype(np.int64)
        found = stored.reshape(-1, n_in)  # a row for each expert
        found = np.where(found < 0, found + groups, found)  # GPTQModel counts from the end too
        if n_in and not 0 <= found.min() <= found.max() < groups:
            bad = int(found[(found < 0) | (found >= groups)][0])
            there = pluralize(groups, "group")
            raise LayerError(name, f"holds group {bad}, but there are scales for {there}")
        if not found.any() and groups > 1:
            if not rule.shuffled:
                return False
            raise LayerError(name, f"puts every input into group 0 of {groups}", unknown=True)
        if groups == 1 or (found == np.arange(n_in) // group).all():
            return False
        expected = np.minimum(group, n_in - group * np.arange(groups))
        for held in (np.bincount(of, minlength=groups) for of in found):
            if not np.array_equal(held, expected):
                wrong = int(np.flatnonzero(held != expected)[0])
                puts = f"puts {held[wrong]} inputs into group {wrong}"
                raise LayerError(name, f"{puts}, expected {expected[wrong]}")
        return True


def _gptq_zeros(infos: _Infos, bits: int) -> TensorInfo:
    """The expected ``qzeros``: a stream of fields along the outputs, in words like the codes."""
    (groups, rows), words = infos["scales"].shape, infos["qweight"]
    return TensorInfo(words.dtype, (groups, -(-rows * bits // _word_bits(words))))


def _word_bits(info: TensorInfo) -> int:
    return 8 * TensorInfo(info.dtype, ()).nbytes


def _layout(parts: Tensors) -> str:
    """The layout that the shapes determine; "" for none."""
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
