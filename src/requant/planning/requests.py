"""Whether the decisions about layers do what the options request.

A pattern that matches no layer, a layer that requires an explicit choice, and a request that no
layer fulfils are errors.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from requant.core.reasons import Note, NoteCode
from requant.core.regex import search
from requant.errors import Problem
from requant.layouts.head_names import serves_as_head
from requant.planning.target_selection import LayerDecision, TargetSelector, find_override
from requant.quantization.config import SKIP, Quantization
from requant.quantization.options import ConvertOptions
from requant.text import join_first

_REASONS = 3  # of many reasons, how many a message gives
_KEEPS_CODES = "keeps its codes"
_NO_REASON = "a vector or a tensor of another kind, which is never quantized"


def check_patterns(selector: TargetSelector) -> Iterator[Problem]:
    """Patterns that match no layer, which probably are typos, with similar names."""
    paths = [layer.path for layer in selector.layout.layers if layer.is_weight]
    named = [("override", pattern) for pattern, _ in selector.options.overrides]
    named += [("only", pattern) for pattern in selector.options.only]
    for option, pattern in named:
        if any(search(pattern, path) for path in paths):
            continue
        near = ", ".join(_suggest_names(pattern, paths))
        hint = f"close matches: {near}" if near else "requant inspect lists the names"
        tied = serves_as_head(selector.layout.layers, partial(search, pattern))
        if tied:
            hint = f"the head is tied to {tied}, which serves as both: name that"
        if selector.relayout is not None:
            old = [x.path for x in selector.relayout.source.layers if search(pattern, x.path)]
            if old:
                hint += f". It names {old[0]} in the source: --layout keep keeps such names"
        yield Problem(f"--{option} {pattern!r}", f"matches no layer; {hint}")


def check_required_choices(
    selector: TargetSelector, decisions: Iterable[LayerDecision]
) -> Iterator[Problem]:
    """Layers that require an explicit choice which was not made; one problem a kind."""
    decisions = tuple(decisions)
    if selector.options.act_order == "refuse" and selector.default is None:
        for decision in decisions:
            if decision.layer.policy.act_order and decision.target == decision.layer.default_target:
                message = (
                    "has its inputs in act-order, which --act-order refuse rejects; "
                    "--act-order requantize or dense says what such layers become"
                )
                yield Problem(decision.layer.path, message)
    is_chosen = selector.options.dequantize or selector.default is not None
    counts = Counter[str]()
    first: dict[str, str] = {}
    for layer in (x.layer for x in decisions if x.target is None):
        if not layer.policy.requires_choice or is_chosen:
            continue
        if find_override(selector.options, layer.path) is not SKIP:
            counts[layer.policy.requires_choice] += 1
            first.setdefault(layer.policy.requires_choice, layer.path)
    for message, count in counts.items():
        where = first[message] + (f" and {count - 1} more" if count > 1 else "")
        yield Problem(where, message)


def unfulfilled(selector: TargetSelector, decisions: Iterable[LayerDecision]) -> str:
    """Why no layer becomes what was asked for; "" where one does, or nothing was asked."""
    asked = _asked(selector.options)
    why = _why_nothing(selector, decisions) if asked else ""
    if not why:
        return ""
    return (
        f"{join_first(asked)}: no layer takes this, and the output would not be smaller than the "
        f"source; {why}. --dequantize is for a dense output"
    )


def nothing_quantized(
    selector: TargetSelector, decisions: Iterable[LayerDecision]
) -> Iterator[Note]:
    """A note where MLX's default, which nobody asked for, reaches no layer."""
    if not _asked(selector.options) and (why := _why_nothing(selector, decisions)):
        yield Note(NoteCode.NOTHING_QUANTIZED, f"Nothing is quantized: {why}.")


def _why_nothing(selector: TargetSelector, decisions: Iterable[LayerDecision]) -> str:
    """Why every layer is left as it is, by the most common reasons; "" where one is not."""
    if selector.options.dequantize:
        return ""
    left = Counter[str]()
    first: dict[str, str] = {}
    for decision in decisions:
        layer, target, reason = decision.layer, decision.target, decision.reason
        if target is not None and _is_asked_for(selector, layer.path, target):
            return ""
        if layer.is_weight:
            text = reason.text if reason else _NO_REASON if target is None else _KEEPS_CODES
            left[text] += 1
            first.setdefault(text, layer.path)
    reasons = [
        f"{first[reason]}{f' and {number - 1:,} more' if number > 1 else ''}: {reason}"
        for reason, number in left.most_common(_REASONS)
    ]
    return "; ".join(reasons) or "there is no tensor named .weight"


def _asked(options: ConvertOptions) -> list[str]:
    """The options that ask for a quantization."""
    given = []
    if options.budget is not None:
        given.append(f"--budget {options.budget}")
    elif options.recipe is not None:
        given.append(f"--recipe {options.recipe.name}")
    elif options.quantization is not None:
        q = options.quantization
        given.append(f"{q.mode} {q.bits}-bit g{q.group_size}")
    given += [f"--only {pattern!r}" for pattern in options.only]
    given += [f"--override {x!r}" for x, spec in options.overrides if spec is not SKIP]
    return given


def _is_asked_for(selector: TargetSelector, path: str, target: Quantization) -> bool:
    """Whether a layer has the bits and mode that an option asks for; its group may be smaller."""
    options = selector.options
    override = find_override(options, path)
    if override is not None:
        return isinstance(override, Quantization)
    if options.only and not any(search(pattern, path) for pattern in options.only):
        return False
    choice = selector.recipe_targets.get(path)
    requested = choice.spec if choice is not None else selector.default
    if requested is SKIP:
        return False
    if not isinstance(requested, Quantization):  # codes of the source, which nothing asks to change
        return not options.overrides
    return (target.bits, target.mode) == (requested.bits, requested.mode)


def _suggest_names(pattern: str, paths: Sequence[str]) -> list[str]:
    """Layer names that the writer of ``pattern`` may have meant."""
    plain = re.sub(r"\\([.\[\]()])", r"\1", pattern).strip("^$").replace(".*", "")
    last = plain.rsplit(".", 1)[-1]
    names = dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths)
    close = difflib.get_close_matches(last, list(names), 3, 0.6)
    whole = difflib.get_close_matches(plain, list(paths), 3, 0.6)
    return close or whole
