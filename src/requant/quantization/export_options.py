"""The options of an export, and how a record holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from requant.errors import ParseError, UnknownValueError


class ExportFormat(StrEnum):
    """A format that ``export`` writes."""

    COMPRESSED_TENSORS = "compressed-tensors"
    GPTQ = "gptq"
    AWQ = "awq"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"
    GGUF = "gguf"


class Otherwise(StrEnum):
    """What becomes of a layer that the format cannot hold with its codes."""

    REFUSE = "refuse"  # nothing is written, and every such layer is listed
    WIDEN = "widen"  # its codes, or new ones, take more bits; where there are none, as refuse
    DENSE = "dense"  # it is decoded


EXPORT: Final = "export"
"""The key of a record's ``options`` that holds those of an export; a conversion has none."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What determines the bytes of an exported folder."""

    to: ExportFormat
    otherwise: Otherwise = Otherwise.REFUSE

    @classmethod
    def from_words(cls, to: str, otherwise: str) -> ExportOptions:
        """Read the options from words.

        Raises:
            UnknownValueError: A word is not one of the valid ones.
        """
        if to not in list(ExportFormat):
            raise UnknownValueError(
                "--to names no format that is written", to, [*map(str, ExportFormat)]
            )
        if otherwise not in list(Otherwise):
            raise UnknownValueError("--otherwise is not valid", otherwise, [*map(str, Otherwise)])
        return cls(ExportFormat(to), Otherwise(otherwise))

    def command_words(self) -> list[str]:
        """The options as they are typed after ``requant export SOURCE OUTPUT``."""
        words = ["--to", str(self.to)]
        if self.otherwise is not Otherwise.REFUSE:
            words += ["--otherwise", str(self.otherwise)]
        return words

    def to_dict(self) -> dict[str, str]:
        """The options as JSON data."""
        return {"to": str(self.to), "otherwise": str(self.otherwise)}


def split_export(
    options: Mapping[str, Any],
) -> tuple[ExportOptions | None, dict[str, Any]]:
    """Split the options of a record into those of its export, if any, and those of a conversion.

    Raises:
        ParseError: Those of the export are invalid.
    """
    rest = {key: value for key, value in options.items() if key != EXPORT}
    if EXPORT not in options:
        return None, rest
    found = options[EXPORT]
    if not isinstance(found, Mapping):
        raise ParseError("options.export is not an object")
    try:
        return ExportOptions.from_words(str(found["to"]), str(found["otherwise"])), rest
    except (KeyError, UnknownValueError) as error:
        raise ParseError(f"options.export: {error} is missing or not valid") from error
