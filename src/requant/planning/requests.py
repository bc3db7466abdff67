"""Check that the decisions about layers do what the options request.

A pattern that matches no layer, a layer that requires an explicit choice, and a request that no
layer fulfils are errors.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
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
_NO_REASON = "a vector or a tensor of another kind, which is never quantized"


def check_patterns(selector: TargetSelector) -> Iterator[Problem]:
    """Patterns that match no layer, which are probably typos, with similar names."""
    paths = [layer.path for layer in selector.layout.layers if layer.is_weight]
    named = [("override", pattern) for pattern, _ in selector.options.overrides]
    named += [("protect", pattern) for pattern, _ in selector.options.protect]
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
    selector: TargetSelector, decisions: Sequence[LayerDecision]
) -> Iterator[Problem]:
    """Layers that require an explicit choice which was not made; one problem for each kind."""
    if selector.options.act_order == "refuse" and selector.default is None:
        for decision in decisions:
            if decision.layer.policy.act_order and decision.target == decision.layer.default_target:
                message = (
                    "has its inputs in act-order, which --act-order refuse rejects; "
                    "--act-order requantize or dense says what such layers become"
                )
                yield Problem(decision.layer.path, message)
    if selector.options.dequantize or selector.default is not None:
        return
    paths = defaultdict[str, list[str]](list)
    for layer in (x.layer for x in decisions if x.target is None):
        choice = layer.policy.requires_choice
        if choice and find_override(selector.options, layer.path) is not SKIP:
            paths[choice].append(layer.path)
    for message, (first, *others) in paths.items():
        yield Problem(first + (f" and {len(others)} more" if others else ""), message)


def unfulfilled(selector: TargetSelector, decisions: Iterable[LayerDecision]) -> str:
    """Why no layer becomes what was requested; "" where one does, or nothing was requested."""
    asked = _requested_options(selector.options)
    why = _why_nothing(selector, decisions) if asked else ""
    return why and (
        f"{join_first(asked)}: no layer takes this, and the output would not be smaller than the "
        f"source; {why}. --dequantize is for a dense output"
    )


def nothing_quantized(
    selector: TargetSelector, decisions: Iterable[LayerDecision]
) -> Iterator[Note]:
    """A note where nothing was requested and MLX's default applies to no layer."""
    if not _requested_options(selector.options) and (why := _why_nothing(selector, decisions)):
        yield Note(NoteCode.NOTHING_QUANTIZED, f"Nothing is quantized: {why}.")


def _why_nothing(selector: TargetSelector, decisions: Iterable[LayerDecision]) -> str:
    """The most common reasons why every layer is left as it is; "" where one is not."""
    if selector.options.dequantize:
        return ""
    paths = defaultdict[str, list[str]](list)
    for decision in decisions:
        layer, target, reason = decision.layer, decision.target, decision.reason
        by_library = selector.library_layout is not None and not layer.is_quantized
        if target and (by_library or _is_requested(selector, layer.path, target)):
            return ""  # a class may choose other bits for every layer
        if layer.is_weight:
            text = reason.text if reason else _NO_REASON if target is None else "keeps its codes"
            paths[text].append(layer.path)
    common = sorted(paths, key=lambda text: -len(paths[text]))[:_REASONS]
    reasons = [f"{join_first(paths[text], 1)}: {text}" for text in common]
    return "; ".join(reasons) or "there is no tensor named .weight"


def _requested_options(options: ConvertOptions) -> list[str]:
    """The options that request a quantization."""
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


def _is_requested(selector: TargetSelector, path: str, target: Quantization) -> bool:
    """Whether a layer has the bits and mode that an option requests; its group may be smaller."""
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
    if not isinstance(requested, Quantization):  # the layer keeps the codes of the source
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
