"""Notes and reasons of a plan as their texts, for tests of what people read."""

from collections.abc import Iterable

from requant.core.reasons import Note
from requant.planning.plan import LayerPlan


def note_texts(notes: Iterable[Note]) -> tuple[str, ...]:
    """The text of each note."""
    return tuple(note.text for note in notes)


def reason_text(layer: LayerPlan) -> str:
    """The text of a layer's reason; "" where it has none."""
    return layer.reason.text if layer.reason else ""
