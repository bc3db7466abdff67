"""Convert experts from the form in which they are published to one that a model class loads.

The same experts are published in several forms: one tensor for each expert and projection, or
stacks; gate and up apart, or in one tensor (fused); rows as outputs, or transposed. A class of
A class loads one or two of them. The conversions here are functions of weight maps on MLX arrays,
so that they can be traced and computed as a part of the class's own ``sanitize``::

    model.layers.0.mlp.experts.7.gate_proj.weight   (out, in)              one by one
    model.layers.0.mlp.experts.gate_up_proj         (experts, 2 out, in)   fused
    model.layers.0.mlp.experts.gate_up_proj         (experts, in, 2 out)   fused and transposed
    model.layers.0.mlp.experts.w13_weight           (experts, 2 out, in)   fused, vLLM's names

The shapes of gate and down together tell whether a stack is transposed: never do both readings
fit. Whether gate and up follow each other or alternate row by row depends on the model's family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

Weights = dict[str, mx.array]
Adapter = Callable[[Weights], Weights]

_ROLES = {
    **dict.fromkeys(("gate_proj", "w1"), "gate"),
    **dict.fromkeys(("up_proj", "w3"), "up"),
    **dict.fromkeys(("down_proj", "w2"), "down"),
    **dict.fromkeys(("gate_up_proj", "w13"), "gate_up"),
}
_NAMES = "|".join(_ROLES)
_ONE = re.compile(rf"(.+\.experts)\.(\d+)\.({_NAMES})\.(weight|bias)")
_STACK = re.compile(
    rf"(.+\.experts)\.({_NAMES})(?:_weight)?(\.weight|)|(.+\.experts)\.({_NAMES})[._]bias"
)

# Families whose rows of gate and up alternate: row 0 is the gate's, row 1 up's (transformers,
# modeling_gpt_oss.py: gate_up[..., ::2] and gate_up[..., 1::2]).
_IN_TURNS = ("gpt_oss", "openai_privacy_filter")

_PARENTS = ("mlp", "block_sparse_moe", "feed_forward")  # as transformers calls it, and others


@dataclass(frozen=True)
class Form:
    """A form of experts that some class takes.

    Attributes:
        words: Description for a note.
        names: Names of gate, up, down, and of gate and up in one tensor.
        fused: Whether gate and up are one tensor.
        one_by_one: Whether each expert has tensors of its own.
        transposed: Whether a stack is ``(experts, in, out)``.
        suffix: The end of a weight's name.
        bias: The end of a bias's name.
        in_turns: Whether it is only for families whose rows of gate and up alternate.
        place: The module that holds them, with {layer} and {parent}.
        parent: Name of the module above them; "" for the source's.
    """

    words: str
    names: tuple[str, str, str, str] = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
    fused: bool = False
    one_by_one: bool = False
    transposed: bool = False
    suffix: str = ".weight"
    bias: str = ".bias"
    in_turns: bool = False
    place: str = "{layer}{parent}.experts"
    parent: str = ""


FORMS = (
    Form("fused stacks", fused=True, suffix="", bias="_bias"),
    Form("single experts", one_by_one=True),
    Form("single experts", ("w1", "w3", "w2", ""), one_by_one=True),
    Form("fused stacks", fused=True, bias="_bias", in_turns=True),
    Form("fused and transposed stacks", fused=True, transposed=True, suffix="", bias="_bias"),
    Form(
        "fused stacks",
        ("", "", "output_linear", "input_linear"),
        fused=True,
        place="{layer}{parent}",
    ),
    Form("stacks", place="{layer}{parent}"),
)

_Key = tuple[str, str]  # role ("gate", "up", "down" or "gate_up") and "weight" or "bias"
_Experts = Mapping[_Key, mx.array]  # (experts, out, in), and biases (experts, out)


@dataclass(frozen=True)
class Reader:
    """Finds the experts of a checkpoint.

    Attributes:
        in_turns: Whether rows of gate and up alternate in fused tensors.
        hidden: Width of the model; 0 where it is not known.
    """

    in_turns: bool
    hidden: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> Reader:
        """A reader for the family that ``config`` names."""
        text = config.get("text_config")
        parts = [part for part in (config, text) if isinstance(part, Mapping)]
        in_turns = any(part.get("model_type") in _IN_TURNS for part in parts)
        widths = (part.get("hidden_size") for part in reversed(parts))
        return Reader(in_turns, next((n for n in widths if isinstance(n, int)), 0))

    def forms(self, class_names: Iterable[str], names: Collection[str]) -> Iterator[Form]:
        """The forms to try, the most probable first, each of which changes the checkpoint.

        A form that leaves every name as it is, or does what an earlier one does, is left out.

        Args:
            class_names: The parameters of the class.
            names: The tensors of the checkpoint.
        """
        forms = [form for form in FORMS if self.in_turns or not form.in_turns]
        single = _single_names(names)
        for form in forms:
            if not (form.one_by_one and single and single <= {*form.names[:3]}):
                yield form
        modules = {part for name in class_names for part in name.split(".")}
        above = {_split(prefix)[1] for prefix in _prefixes(names)}
        for parent in _PARENTS:
            if parent in modules and above != {parent}:
                yield from (replace(form, parent=parent) for form in forms)

    def adapter(self, form: Form) -> Adapter:
        """Return a function that converts experts to a form, and no other tensor."""

        def adapt(weights: Weights) -> Weights:
            layers, others = self.gathered(weights)
            if form.parent:
                others = _with_parent(others, layers, form.parent)
            for prefix, experts in layers.items():
                others |= _emitted(prefix, experts, form, self.in_turns)
            return others

        return adapt

    def gathered(self, weights: Weights) -> tuple[dict[str, _Experts], Weights]:
        """The experts of each layer, by the prefix of their names, and all other tensors."""
        names: dict[str, dict[_Key, list[tuple[int, str]]]] = {}
        for name in weights:
            if one := _ONE.fullmatch(name):
                key, number, prefix = (_ROLES[one[3]], one[4]), int(one[2]), one[1]
            elif stack := _STACK.fullmatch(name):
                key = _ROLES[stack[2] or stack[5]], "weight" if stack[2] else "bias"
                number, prefix = -1, stack[1] or stack[4]
            else:
                continue
            names.setdefault(prefix, {}).setdefault(key, []).append((number, name))
        layers: dict[str, _Experts] = {}
        others = dict(weights)
        for prefix, tensors in names.items():
            experts = self._read(weights, tensors)
            if experts is not None:
                layers[prefix] = experts
                for _, name in (pair for pairs in tensors.values() for pair in pairs):
                    del others[name]
        return layers, others

    def _read(
        self, weights: Weights, tensors: Mapping[_Key, list[tuple[int, str]]]
    ) -> _Experts | None:
        """Every projection as a stack whose rows are outputs; None if the set is incomplete."""
        read: dict[_Key, mx.array] = {}
        for key, pairs in tensors.items():
            numbers, names = zip(*sorted(pairs), strict=True)
            arrays = [weights[name] for name in names]
            if len({tuple(array.shape) for array in arrays}) > 1:
                return None
            if numbers not in ((-1,), tuple(range(len(numbers)))):
                return None
            read[key] = arrays[0] if numbers == (-1,) else mx.stack(arrays)
        roles = {role for role, kind in read if kind == "weight"}
        if roles not in ({"gate_up", "down"}, {"gate", "up", "down"}, {"up", "down"}):
            return None
        if any(len(x.shape) != {"weight": 3, "bias": 2}[kind] for (_, kind), x in read.items()):
            return None
        if len({x.shape[0] for x in read.values()}) != 1:
            return None
        all_names = (name for pairs in tensors.values() for _, name in pairs)
        are_weights = all(name.endswith(("weight", "bias")) for name in all_names)
        transposed = self._is_transposed(read, are_weights)
        if transposed is None:
            return None
        return {
            key: mx.swapaxes(x, 1, 2) if transposed and key[1] == "weight" else x
            for key, x in read.items()
        }

    def _is_transposed(self, read: _Experts, are_weights: bool) -> bool | None:
        """Whether stacks are ``(experts, in, out)``; None where their shapes do not fit."""
        down = tuple(read["down", "weight"].shape)
        if ("gate_up", "weight") in read:
            _, first, second = read["gate_up", "weight"].shape
            if (second, first) == (down[1], 2 * down[2]):
                return False
            return True if (first, second) == (down[2], 2 * down[1]) else None
        _, first, second = read["up", "weight"].shape
        if (first, second) != (down[2], down[1]):
            return None
        if are_weights:  # rows of a .weight are outputs
            return False
        return None if first == second else first == self.hidden


def has_experts(names: Collection[str]) -> bool:
    """Whether any tensor belongs to experts in a known form."""
    return any(_ONE.fullmatch(name) or _STACK.fullmatch(name) for name in names)


def words_for(names: Collection[str]) -> str:
    """The form of a checkpoint's experts, for a note."""
    return "single experts" if any(map(_ONE.fullmatch, names)) else "stacks"


def _prefixes(names: Iterable[str]) -> Iterator[str]:
    """The modules that hold experts, once for each tensor."""
    for name in names:
        if one := _ONE.fullmatch(name):
            yield one[1]
        elif stack := _STACK.fullmatch(name):
            yield stack[1] or stack[4]


def _single_names(names: Collection[str]) -> set[str]:
    """What single experts call their projections; nothing where there are stacks too."""
    if any(map(_STACK.fullmatch, names)):
        return set()
    return {one[3] for one in map(_ONE.fullmatch, names) if one}


# -- writing ---------------------------------------------------------------------------------


def _emitted(prefix: str, experts: _Experts, form: Form, in_turns: bool) -> Weights:
    """One layer's experts in a form."""
    base = _base(prefix, form)
    names = dict(zip(("gate", "up", "down", "gate_up"), form.names, strict=True))
    arrays = _fused(experts, in_turns) if form.fused else _separate(experts, in_turns)
    weights: Weights = {}
    for (role, kind), array in arrays.items():
        name = names[role] + (form.suffix if kind == "weight" else form.bias)
        if form.transposed and kind == "weight":
            array = mx.swapaxes(array, 1, 2)
        if form.one_by_one:
            weights |= {f"{base}.{n}.{name}": array[n] for n in range(array.shape[0])}
        else:
            weights[f"{base}.{name}"] = array
    return weights


def _separate(experts: _Experts, in_turns: bool) -> _Experts:
    """The experts with gate and up in tensors of their own."""
    separate: dict[_Key, mx.array] = {}
    for (role, kind), array in experts.items():
        if role != "gate_up":
            separate[role, kind] = array
        elif in_turns:
            separate["gate", kind], separate["up", kind] = array[:, ::2], array[:, 1::2]
        else:
            half = array.shape[1] // 2
            separate["gate", kind], separate["up", kind] = array[:, :half], array[:, half:]
    return separate


def _fused(experts: _Experts, in_turns: bool) -> _Experts:
    """The experts with gate and up in one tensor, where there is a gate."""
    fused = dict(experts)
    for kind in ("weight", "bias"):
        if ("gate", kind) not in fused or ("up", kind) not in fused:
            continue
        gate, up = fused.pop(("gate", kind)), fused.pop(("up", kind))
        if in_turns:
            pairs = mx.stack([gate, up], axis=2)
            fused["gate_up", kind] = pairs.reshape(gate.shape[0], -1, *gate.shape[2:])
        else:
            fused["gate_up", kind] = mx.concatenate([gate, up], axis=1)
    return fused


_LAYER = re.compile(r"(.*\.\d+\.|)(.+)")


def _split(prefix: str) -> tuple[str, str]:
    """The layer ("model.layers.0.") and the module in it that experts are in ("mlp")."""
    above = _LAYER.fullmatch(prefix.removesuffix(".experts"))
    return ("", "") if above is None else (above[1], above[2])


def _base(prefix: str, form: Form) -> str:
    """The module that holds the experts of a layer."""
    layer, parent = _split(prefix)
    if not parent:  # experts right in the layer
        return prefix
    return form.place.format(layer=layer, parent=form.parent or parent)


def _with_parent(others: Weights, layers: Collection[str], parent: str) -> Weights:
    """The tensors next to experts (the router) under another name of the module above."""
    above = {prefix.removesuffix(".experts") for prefix in layers}
    renamed: Weights = {}
    for name, array in others.items():
        module = next((x for x in _modules_of(name) if x in above), None)
        if module is not None:
            name = f"{module.rpartition('.')[0]}.{parent}{name.removeprefix(module)}"
        renamed[name] = array
    return renamed


def _modules_of(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name
