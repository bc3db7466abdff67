"""Output heads and embeddings: whether they are one tensor, decided by the tensors.

``tie_word_embeddings`` of a config says that the head is the embedding. Where that flag and the
tensors disagree, the tensors are right: a head with the embedding's values is left out, another
one is kept and the flag set false, and a model without a head is tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from requant.checkpoints.checkpoint import Checkpoint, Key
from requant.core.reasons import Note, NoteCode
from requant.errors import CheckpointError
from requant.formats import SourceLayer, SourceLayout
from requant.layouts.availability import missing_class_reason
from requant.layouts.head_names import Pair, find_pair, flag_places, flags, has_scores
from requant.layouts.relayout import MlxLmLayoutError, Relayout
from requant.layouts.same_values import same_values
from requant.text import format_value


@dataclass(frozen=True, slots=True)
class Variant:
    """A checkpoint whose flag and tensors agree.

    Attributes:
        checkpoint: With the flag corrected.
        layout: Without the head, where that is the embedding.
        notes: What was changed.
    """

    checkpoint: Checkpoint
    layout: SourceLayout
    notes: tuple[Note, ...] = ()


def _is_copy(checkpoint: Checkpoint, pair: Pair) -> bool:
    """Whether the head adds nothing to the embedding: the same values, and no bias."""
    head = pair.head
    assert head is not None
    has_bias = f"{head.path}.bias" in checkpoint.tensors
    return not has_bias and same_values(checkpoint, head, pair.embedding)


def agreed(checkpoint: Checkpoint, layout: SourceLayout) -> Variant:
    """Correct what the flag says, where the tensors say another thing."""
    pair = find_pair(layout.layers)
    declared = dict(flags(checkpoint.config))
    unchanged = Variant(checkpoint, layout)
    if pair is None or not declared:
        return unchanged
    if pair.head is None:
        is_wrong = not all(declared.values()) and has_scores(checkpoint.config)
        return _tied(checkpoint, layout, pair, declared) if is_wrong else unchanged
    if not any(declared.values()):
        return unchanged
    if _is_copy(checkpoint, pair):
        return _without_copy(checkpoint, layout, pair, declared)
    return _untied(checkpoint, layout, pair, declared)


def laid_out(
    checkpoint: Checkpoint,
    layout: SourceLayout,
    attempt: Callable[[Checkpoint, SourceLayout], Relayout],
) -> tuple[Checkpoint, Relayout, tuple[Note, ...]]:
    """A layout of mlx-lm's class in which a head that the model has is kept.

    Where the class drops such a head, or has no place for a tensor, the flag is set wherever
    the class may read it.

    Args:
        checkpoint: The source.
        layout: Its layers.
        attempt: Lays out a checkpoint and its layers.

    Returns:
        The checkpoint with the config that the layout is of, the layout, and notes.

    Raises:
        CheckpointError: As ``attempt`` does, or the class ties what differs.
    """
    first: CheckpointError | None = None
    pair = find_pair(layout.layers)
    for variant in _variants(checkpoint, layout, pair):
        try:
            moved = attempt(variant.checkpoint, variant.layout)
        except CheckpointError as error:
            first = first or error
            if pair is None or missing_class_reason(checkpoint.config):
                raise
            continue
        if pair is None or pair.head is None or not _loses(moved, pair.head):
            return variant.checkpoint, moved, variant.notes
        if _is_copy(checkpoint, pair):
            return variant.checkpoint, moved, variant.notes
    assert pair is not None
    head = pair.head
    if head is not None and not _is_copy(checkpoint, pair):
        layers = tuple(layer for layer in layout.layers if layer is not head)
        if first is None or _succeeds(attempt, checkpoint, replace(layout, layers=layers)):
            raise _always_tied(checkpoint, pair) from first
    assert first is not None
    raise first


def _succeeds(
    attempt: Callable[[Checkpoint, SourceLayout], Relayout],
    checkpoint: Checkpoint,
    layout: SourceLayout,
) -> bool:
    try:
        attempt(checkpoint, layout)
    except CheckpointError:
        return False
    return True


def _variants(checkpoint: Checkpoint, layout: SourceLayout, pair: Pair | None) -> Iterator[Variant]:
    """What the class is shown, one after another, until it takes one."""
    yield agreed(checkpoint, layout)
    if pair is None:
        return
    everywhere: dict[Key, bool | None] = dict.fromkeys(flag_places(checkpoint.config))
    everywhere |= dict(flags(checkpoint.config))
    as_it_is = Variant(checkpoint, layout)
    if pair.head is None:
        if has_scores(checkpoint.config):
            yield _tied(checkpoint, layout, pair, everywhere)
            yield as_it_is
            for path in _head_paths(pair.embedding):
                yield _with_copy(checkpoint, layout, pair, everywhere, path)
    elif _is_copy(checkpoint, pair):
        yield _without_copy(checkpoint, layout, pair, everywhere)
        yield as_it_is
        yield _untied(checkpoint, layout, pair, everywhere)
    else:
        yield _untied(checkpoint, layout, pair, everywhere)


def _loses(moved: Relayout, head: SourceLayer) -> bool:
    """Whether no tensor of the output holds the head's values."""
    return head.dense_name in moved.layout.dropped


# -- corrections, each with its note -----------------------------------------------------------


def _without_copy(
    checkpoint: Checkpoint, layout: SourceLayout, pair: Pair, declared: Mapping[Key, bool | None]
) -> Variant:
    head, embedding = pair.head, pair.embedding
    assert head is not None
    reason = f"holds the values of {embedding.dense_name}, to which the head is tied"
    dropped = tuple((part.name, reason) for part in head.parts.values())
    layers = tuple(layer for layer in layout.layers if layer is not head)
    note = f"{head.dense_name} {reason}: it is left out{_set(declared, True)}."
    return Variant(
        checkpoint.corrected(_changes(declared, True)),
        replace(layout, layers=layers, dropped=(*layout.dropped, *dropped)),
        (Note(NoteCode.TIED_HEAD, note),),
    )


def _head_paths(embedding: SourceLayer) -> tuple[str, ...]:
    """What a head of this embedding may be called: next to the part it is in, or by itself."""
    *below, _, name = ["", *embedding.path.split(".")]
    head = "embed_out" if name == "embed_in" else "lm_head"
    return tuple(dict.fromkeys((".".join([*below[1:], head]), head)))


def _with_copy(
    checkpoint: Checkpoint,
    layout: SourceLayout,
    pair: Pair,
    declared: Mapping[Key, bool | None],
    path: str,
) -> Variant:
    """For a class that has no form with a tied head: the embedding once more."""
    embedding = pair.embedding
    parts = {
        role: replace(part, name=part.name.replace(embedding.path, path, 1))
        for role, part in embedding.parts.items()
    }
    note = (
        f"There is no head next to {embedding.dense_name}, and mlx-lm's class has one in every "
        f"model: {path}.weight is a copy of the embedding{_set(declared, False)}."
    )
    layers = (*layout.layers, replace(embedding, path=path, parts=parts))
    changed = checkpoint.corrected(_changes(declared, False))
    notes = (Note(NoteCode.TIED_HEAD, note),)
    return Variant(changed, replace(layout, layers=layers), notes)


def _untied(
    checkpoint: Checkpoint, layout: SourceLayout, pair: Pair, declared: Mapping[Key, bool | None]
) -> Variant:
    assert pair.head is not None
    head, embedding = pair.head, pair.embedding
    found = f"{head.dense_name} ({head.stored_as}) is not {embedding.dense_name}"
    if head.stored_as != embedding.stored_as:
        found += f" ({embedding.stored_as})"
    if _is_copy(checkpoint, pair):
        found = (
            f"mlx-lm's class has a head in every model, here the values of {embedding.dense_name}"
        )
    note = f"{found}: the head is kept{_set(declared, False)}."
    notes = (Note(NoteCode.TIED_HEAD, note),)
    return Variant(checkpoint.corrected(_changes(declared, False)), layout, notes)


def _tied(
    checkpoint: Checkpoint, layout: SourceLayout, pair: Pair, declared: Mapping[Key, bool | None]
) -> Variant:
    note = (
        f"There is no head next to {pair.embedding.dense_name}: the head is tied to it"
        f"{_set(declared, True)}."
    )
    notes = (Note(NoteCode.TIED_HEAD, note),)
    return Variant(checkpoint.corrected(_changes(declared, True)), layout, notes)


def _changes(declared: Mapping[Key, bool | None], value: bool) -> dict[Key, bool]:
    return {key: value for key, old in declared.items() if old is not value}


def _set(declared: Mapping[Key, bool | None], value: bool) -> str:
    """What becomes of the flags that say another thing."""
    changed = _changes(declared, value)
    if not changed:
        return ""
    key = next(iter(changed))
    was = "absent" if declared[key] is None else format_value(declared[key])
    now = f"{'.'.join(key)} is {format_value(value)}"
    return f", and {now} in the output's config ({was} in the source's)"


def _always_tied(checkpoint: Checkpoint, pair: Pair) -> CheckpointError:
    assert pair.head is not None
    message = (
        f"differs from {pair.embedding.dense_name}, and mlx-lm's class for model_type "
        f"{format_value(checkpoint.config.get('model_type'))} has no head but its embedding; "
        "--layout keep keeps both"
    )
    return MlxLmLayoutError(checkpoint, message, tensor=pair.head.dense_name)
