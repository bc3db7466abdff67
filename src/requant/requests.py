"""Whether a plan does what was asked for: a request that no layer fulfils is an error.

Reads what was decided and changes nothing of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from requant.choices import Chooser, Decided, override_of
from requant.errors import few
from requant.patterns import search
from requant.schema import SKIP, Quantization
from requant.wishes import ConvertOptions

_REASONS = 3  # of many reasons, how many a message gives
_NO_REASON = "a vector or a tensor of another kind, which is never quantized"


def unfulfilled(chooser: Chooser, decided: Iterable[Decided]) -> str:
    """Why no layer becomes what was asked for; "" where one does, or nothing was asked."""
    asked = _asked(chooser.wishes)
    why = _why_nothing(chooser, decided) if asked else ""
    if not why:
        return ""
    return (
        f"{few(asked)}: no layer takes this, and the output would be no smaller than the source; "
        f"{why}. --dequantize is for a dense output"
    )


def nothing_quantized(chooser: Chooser, decided: Iterable[Decided]) -> Iterator[str]:
    """A note where MLX's default, which nobody asked for, reaches no layer."""
    if not _asked(chooser.wishes) and (why := _why_nothing(chooser, decided)):
        yield f"Nothing is quantized: {why}."


def _why_nothing(chooser: Chooser, decided: Iterable[Decided]) -> str:
    """Why every layer is left as it is, by the most common reasons; "" where one is not."""
    if chooser.wishes.dequantize:
        return ""
    left = Counter[str]()
    first: dict[str, str] = {}
    for layer, target, reason in decided:
        if target is not None and _is_asked_for(chooser, layer.path, target):
            return ""
        if layer.is_weight:
            reason = reason or (_NO_REASON if target is None else "keeps its codes")
            left[reason] += 1
            first.setdefault(reason, layer.path)
    reasons = [
        f"{first[reason]}{f' and {number - 1:,} more' if number > 1 else ''}: {reason}"
        for reason, number in left.most_common(_REASONS)
    ]
    return "; ".join(reasons) or "there is no tensor named .weight"


def _asked(wishes: ConvertOptions) -> list[str]:
    """The options that ask for a quantization."""
    given = []
    if wishes.budget is not None:
        given.append(f"--budget {wishes.budget}")
    elif wishes.recipe is not None:
        given.append(f"--recipe {wishes.recipe.name}")
    elif wishes.quantization is not None:
        q = wishes.quantization
        given.append(f"{q.mode} {q.bits}-bit g{q.group_size}")
    given += [f"--only {pattern!r}" for pattern in wishes.only]
    given += [f"--override {x!r}" for x, spec in wishes.overrides if spec is not SKIP]
    return given


def _is_asked_for(chooser: Chooser, path: str, target: Quantization) -> bool:
    """Whether a layer has the bits and mode that an option asks for; its group may be smaller."""
    wishes = chooser.wishes
    override = override_of(wishes, path)
    if override is not None:
        return isinstance(override, Quantization)
    if wishes.only and not any(search(pattern, path) for pattern in wishes.only):
        return False
    choice = chooser.by_recipe.get(path)
    wish = choice.spec if choice is not None else chooser.default
    if wish is SKIP:
        return False
    if not isinstance(wish, Quantization):  # codes of the source, which nothing asks to change
        return not wishes.overrides
    return (target.bits, target.mode) == (wish.bits, wish.mode)
