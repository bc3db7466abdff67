"""Check that an MLX library loads a folder and computes finite values with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from requant.errors import CheckpointError, Problem
from requant.libraries import LIBRARIES
from requant.libraries.forward_pass import forward
from requant.libraries.loading import find_library, library_version, load
from requant.text import format_value


@dataclass(frozen=True, slots=True)
class LoadCheck:
    """What a library did with a folder.

    Attributes:
        library: Its name; "" if none of those installed has a class for the model.
        version: Its version.
        ran: The inputs of the forward pass, such as "text, 8 tokens".
        not_run: Inputs that the model takes and that were not run, with the reason.
        logits: Number of values that were checked.
        problems: Parameters without a tensor, tensors that are not used, an error of the
            library, or outputs that are not finite.
    """

    library: str
    version: str
    ran: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    logits: int = 0
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the folder loads, runs, and gives finite values only."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON data."""
        return asdict(self) | {"ok": self.ok}


def check_load(folder: Path, layout: str = "") -> LoadCheck:
    """Load a folder strictly with its library, and run one short forward pass on the CPU.

    Args:
        folder: A folder that MLX loads.
        layout: The layout of its record: a library's name; any other text leaves the choice to
            the config.
    """
    library = layout if layout in LIBRARIES else ""
    try:
        library = library or find_library(folder)
        model, config = load(folder, library, on_cpu=True)
    except CheckpointError as error:
        installed = library_version(library) if library else ""
        return LoadCheck(library, installed, problems=error.problems)
    result = forward(model, config)
    problems = [Problem(library, f"the forward pass gives {text}") for text in result.nonfinite]
    if result.fails:
        why = "; ".join(result.not_run)
        model_type = format_value(config.get("model_type"))
        problems.append(Problem(library, f"its class for model_type {model_type} fails: {why}"))
    return LoadCheck(
        library,
        library_version(library),
        ran=tuple(result.ran),
        not_run=tuple(result.not_run),
        logits=result.logits,
        problems=tuple(problems),
    )
