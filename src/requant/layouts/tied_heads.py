"""Decide by the tensors whether the output head and the embedding are tied.

``tie_word_embeddings`` of a config says that the head is the embedding. Where that flag and the
tensors disagree, the tensors count: a head with the embedding's values is left out, any other head
is kept and the flag set to false, and a model without a head is tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from requant.checkpoints.checkpoint import Checkpoint, Key
from requant.core.reasons import Note, NoteCode
from requant.errors import CheckpointError
from requant.formats import SourceLayer, SourceLayout
from requant.layouts.head_names import Pair, find_pair, flag_places, flags, has_scores, is_head
from requant.layouts.relayout import LibraryLayoutError, Relayout
from requant.layouts.same_values import same_values
from requant.libraries import Library
from requant.text import format_value

Declared = Mapping[Key, bool | None]
"""Key of the config -> the flag there; None where a class may read it and the config has none."""


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

    def changed(self, declared: Declared, value: bool, reason: str) -> Variant:
        """The variant with every flag set to ``value``, and a note with the reason for it."""
        changes = {key: value for key, old in declared.items() if old is not value}
        flag = ""
        if changes:
            key = next(iter(changes))
            was = "absent" if declared[key] is None else format_value(declared[key])
            now = f"{'.'.join(key)} is {format_value(value)}"
            flag = f", and {now} in the output's config ({was} in the source's)"
        note = Note(NoteCode.TIED_HEAD, f"{reason}{flag}.")
        return Variant(self.checkpoint.corrected(changes), self.layout, (note,))


def _is_copy(checkpoint: Checkpoint, pair: Pair) -> bool:
    """Whether there is a head with the values of the embedding and without a bias."""
    head = pair.head
    if head is None or f"{head.path}.bias" in checkpoint.tensors:
        return False
    return same_values(checkpoint, head, pair.embedding)


def agreed(checkpoint: Checkpoint, layout: SourceLayout) -> Variant:
    """Correct the flag where the tensors disagree with it."""
    pair = find_pair(layout.layers)
    declared = dict(flags(checkpoint.config))
    unchanged = Variant(checkpoint, layout)
    if pair is None or not declared:
        return unchanged
    if pair.head is None:
        is_wrong = not all(declared.values()) and has_scores(checkpoint.config)
        return _tied(unchanged, pair, declared) if is_wrong else unchanged
    if not any(declared.values()):
        return unchanged
    if _is_copy(checkpoint, pair):
        return _without_copy(unchanged, pair, pair.head, declared)
    return _untied(unchanged, pair, pair.head, declared)


def laid_out(
    checkpoint: Checkpoint,
    layout: SourceLayout,
    library: Library,
    attempt: Callable[[Checkpoint, SourceLayout], Relayout],
) -> tuple[Checkpoint, Relayout, tuple[Note, ...]]:
    """Return a library's layout in which a stored head is kept.

    Where the class drops such a head, or has no place for a tensor, the flag is set wherever
    the class may read it.

    Args:
        checkpoint: The source.
        layout: Its layers.
        library: The library.
        attempt: Makes its layout of a checkpoint and its layers.

    Returns:
        The checkpoint with the config of the layout, the layout, and notes.

    Raises:
        CheckpointError: As ``attempt`` does, or the class ties what differs.
    """
    first: CheckpointError | None = None
    pair = find_pair(layout.layers)
    for variant in _variants(checkpoint, layout, pair):
        try:
            relayout = attempt(variant.checkpoint, variant.layout)
        except CheckpointError as error:
            if first is None or (_is_about_heads(first) and not _is_about_heads(error)):
                first = error  # what no variant corrects says more than a head out of place
            if pair is None or library.missing_class_reason(checkpoint.config):
                raise
            continue
        # The head is kept if an output has its values, or the embedding is a copy of it.
        head = None if pair is None else pair.head
        is_kept = head is None or head.dense_name not in relayout.layout.dropped
        if pair is None or is_kept or _is_copy(checkpoint, pair):
            return variant.checkpoint, relayout, variant.notes
    assert pair is not None
    if pair.head is not None and not _is_copy(checkpoint, pair):
        layers = tuple(layer for layer in layout.layers if layer is not pair.head)
        if first is None or _succeeds(attempt, checkpoint, replace(layout, layers=layers)):
            raise _always_tied(checkpoint, library, pair.head, pair.embedding) from first
    assert first is not None
    raise first


def _is_about_heads(error: CheckpointError) -> bool:
    """Whether a class has no place for a head, or no head for its place, and nothing else."""
    names = error.unmatched if isinstance(error, LibraryLayoutError) else ()
    return bool(names) and all(is_head(name.rpartition(".")[0]) for name in names)


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
    """The variants that the class is given, one after another, until it loads one."""
    if pair is not None and pair.head is None:
        yield Variant(checkpoint, layout)  # its head may have another name
    yield agreed(checkpoint, layout)
    if pair is None:
        return
    everywhere: dict[Key, bool | None] = dict.fromkeys(flag_places(checkpoint.config))
    everywhere |= dict(flags(checkpoint.config))
    unchanged = Variant(checkpoint, layout)
    if pair.head is None:
        if has_scores(checkpoint.config):
            yield _tied(unchanged, pair, everywhere)
            for path in _head_paths(pair.embedding):
                yield _with_copy(unchanged, pair.embedding, path, everywhere)
        return
    if _is_copy(checkpoint, pair):
        yield _without_copy(unchanged, pair, pair.head, everywhere)
        yield unchanged
    yield _untied(unchanged, pair, pair.head, everywhere)


# -- corrections, each with its note -----------------------------------------------------------


def _without_copy(source: Variant, pair: Pair, head: SourceLayer, declared: Declared) -> Variant:
    """Without the head, whose values the embedding has too."""
    reason = f"holds the values of {pair.embedding.dense_name}, to which the head is tied"
    dropped = tuple((part.name, reason) for part in head.parts.values())
    layers = tuple(layer for layer in source.layout.layers if layer is not head)
    layout = replace(source.layout, layers=layers, dropped=(*source.layout.dropped, *dropped))
    why = f"{head.dense_name} {reason}: it is left out"
    return replace(source, layout=layout).changed(declared, True, why)


def _head_paths(embedding: SourceLayer) -> tuple[str, ...]:
    """Possible paths of this embedding's head: next to the module that it is in, or outermost.

    Example: ``model.decoder.embed_tokens`` gives ``model.lm_head`` and ``lm_head``.
    """
    *below, _, name = ["", *embedding.path.split(".")]
    head = "embed_out" if name == "embed_in" else "lm_head"
    return tuple(dict.fromkeys((".".join([*below[1:], head]), head)))


def _with_copy(source: Variant, embedding: SourceLayer, path: str, declared: Declared) -> Variant:
    """With a copy of the embedding as the head, for a class that has no tied head."""
    parts = {
        role: replace(part, name=part.name.replace(embedding.path, path, 1))
        for role, part in embedding.parts.items()
    }
    layers = (*source.layout.layers, replace(embedding, path=path, parts=parts))
    why = (
        f"There is no head next to {embedding.dense_name}, and the model's class has one in every "
        f"model: {path}.weight is a copy of the embedding"
    )
    layout = replace(source.layout, layers=layers)
    return replace(source, layout=layout).changed(declared, False, why)


def _untied(source: Variant, pair: Pair, head: SourceLayer, declared: Declared) -> Variant:
    embedding = pair.embedding
    found = f"{head.dense_name} ({head.stored_as}) is not {embedding.dense_name}"
    if head.stored_as != embedding.stored_as:
        found += f" ({embedding.stored_as})"
    if _is_copy(source.checkpoint, pair):
        found = (
            f"the model's class has a head in every case, here the values of {embedding.dense_name}"
        )
    return source.changed(declared, False, f"{found}: the head is kept")


def _tied(source: Variant, pair: Pair, declared: Declared) -> Variant:
    why = f"There is no head next to {pair.embedding.dense_name}: the head is tied to it"
    return source.changed(declared, True, why)


def _always_tied(
    checkpoint: Checkpoint, library: Library, head: SourceLayer, embedding: SourceLayer
) -> CheckpointError:
    message = (
        f"differs from {embedding.dense_name}, and {library.name}'s class for model_type "
        f"{format_value(checkpoint.config.get('model_type'))} has no head but its embedding; "
        "--layout keep keeps both"
    )
    return LibraryLayoutError(checkpoint, library, message, tensor=head.dense_name)
