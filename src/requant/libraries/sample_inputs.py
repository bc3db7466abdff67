"""Sample inputs of a model, with the sizes in its config: token ids, an image, a sound.

The libraries' classes take images and sounds in a handful of forms; each that the config has the
sizes of is made, and the class rejects those that are not its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

TOKENS = 8
_GRID_SIDE = 12  # patches; a multiple of the merge and pooling sizes in use
_VISION, _AUDIO = ("vision_config",), ("audio_config", "encoder_config")
_TEXT = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True, slots=True)
class Sample:
    """One form of an image or a sound.

    Attributes:
        label: What it is: "image 56 x 56".
        array: The input.
        grid: Patches in time, height and width, for classes that take patches.
        tokens: How many placeholder tokens in the text may stand for it.
    """

    label: str
    array: mx.array
    grid: tuple[int, int, int] | None = None
    tokens: tuple[int, ...] = ()


class SampleInputs:
    """Makes the inputs of one model.

    Args:
        model: Its class may hold the config with defaults filled in (``model.config``).
        config: Its ``config.json``.
    """

    def __init__(self, model: Any, config: Mapping[str, Any]) -> None:
        self._places = [config, getattr(model, "config", {}), getattr(model, "args", {})]
        self._config = config

    def token_ids(self, placeholders: int = 0, names: tuple[str, ...] = ()) -> mx.array | None:
        """Token ids, int32 ``(1, TOKENS + placeholders)``.

        Args:
            placeholders: How many placeholder tokens are between the first and the second half.
            names: Settings that may hold the id of the placeholder.

        Returns:
            None if placeholders are wanted and the config names none.
        """
        import mlx.core as mx

        vocabulary = self._number(("vocab_size", "n_vocab"), _TEXT) or TOKENS + 1
        special = _special_ids(self._config)
        usable = [x for x in range(vocabulary) if x not in special] if vocabulary < 1000 else None
        ids = [i * vocabulary // (TOKENS + 1) for i in range(1, TOKENS + 1)]
        if usable:
            ids = [usable[i * len(usable) // (TOKENS + 1)] for i in range(1, TOKENS + 1)]
        if placeholders:
            placeholder = self._number(names, ())
            if placeholder is None:
                return None
            ids[TOKENS // 2 : TOKENS // 2] = [placeholder] * placeholders
        return mx.array([ids], mx.int32)

    def images(self) -> Iterator[Sample]:
        """An image in each form: pixels with the channels last, first, or patches in a grid."""
        channels = self._number(("num_channels", "in_channels", "in_chans"), _VISION) or 3
        patch = self._number(("patch_size", "spatial_patch_size"), _VISION)
        size = self._number(("image_size", "img_size", "input_size"), _VISION)
        own = self._number(("mm_tokens_per_image", "image_seq_length", "num_image_tokens"), ())
        if patch:
            time = self._number(("temporal_patch_size", "patch_temporal"), _VISION) or 1
            merge = self._number(("spatial_merge_size", "merge_size"), _VISION) or 1
            side = patch * _GRID_SIDE
            array = _pattern(_GRID_SIDE**2, channels * time * patch * patch)
            tokens = max(_GRID_SIDE // merge, 1) ** 2
            grid = (1, _GRID_SIDE, _GRID_SIDE)
            yield Sample(f"image {side} x {side}", array, grid, (tokens,))
            size = size or side
        if size:
            label = f"image {size} x {size}"
            patches = (size // patch) ** 2 if patch else 0
            shrunk = (patches // factor**2 for factor in range(1, 5))
            tokens_ = tuple(dict.fromkeys(x for x in (own, *shrunk) if x))
            yield Sample(label, _pattern(1, channels, size, size), tokens=tokens_)
            yield Sample(label, _pattern(1, size, size, channels), tokens=tokens_)
            yield Sample(label, _pattern(1, 1, channels, size, size), tokens=tokens_)

    def sounds(self) -> Iterator[Sample]:
        """A sound as mel features, frames last or first, and as a wave of a quarter second."""
        mels = self._number(("num_mel_bins", "n_mels", "feat_in"), _AUDIO)
        positions = self._number(("max_source_positions", "n_audio_ctx"), _AUDIO)
        frames = 2 * positions if positions else 200
        if mels:
            label = f"sound of {frames:,} frames"
            yield Sample(label, _pattern(1, mels, frames))
            yield Sample(label, _pattern(1, frames, mels))
            yield Sample(label, _pattern(frames, mels))
        yield Sample("sound of 4,000 samples", _pattern(1, 4000))

    def _number(self, names: tuple[str, ...], parts: tuple[str, ...]) -> int | None:
        """A setting: of the named parts of the config, else of the config itself."""
        for place in self._places:
            for inner in (*(_get(place, part) for part in parts), place):
                for name in names:
                    value = _get(inner, name)
                    if isinstance(value, list | tuple) and value:
                        value = value[0]
                    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                        return value
        return None


def _get(place: Any, name: str) -> Any:
    return place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)


def _special_ids(config: Mapping[str, Any]) -> set[int]:
    """The ids of tokens that a config names, such as those that stand for an image."""
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _special_ids(value)
        elif name.endswith(("token_id", "token_index", "_id")):
            found |= {x for x in (value if isinstance(value, list) else [value]) if type(x) is int}
    return found


def _pattern(*shape: int) -> mx.array:
    """A smooth pattern in [-1, 1], float32."""
    import mlx.core as mx

    return mx.sin(mx.arange(prod(shape), dtype=mx.float32) * 0.37).reshape(shape)
