"""Check whether mlx-lm can have a class for a model without importing it; and the layout errors.

mlx-lm looks for ``mlx_lm/models/{model_type}.py``, after a table of other names. Importing it
takes about a second, most of it transformers; looking for the file takes a millisecond.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from requant.errors import RequantError
from requant.text import format_value

# mlx_lm/utils.py: {model_type: module}, and (in newer ones) {(model_type, architecture): module}.
_NAMES, _NAMES_BY_ARCHITECTURE = "MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING"

# The consequence of a missing class, after the reason.
NO_CLASS_HINT = (
    "Without mlx-lm's class, the names, the stacking of experts and the choice of layers that "
    "it expects are not known. --layout keep needs no class: it keeps the source's tensor "
    "names and chooses layers by names and shapes"
)


class UnknownModelError(RequantError, LookupError):
    """mlx-lm is not installed, or has no class for this model.

    Attributes:
        why: The reason, without the advice that the message adds.
    """

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"{why}. {NO_CLASS_HINT}")


class LayoutError(RequantError, ValueError):
    """mlx-lm has a class for the model, but its conversion would fail, or cannot be followed.

    Attributes:
        class_names: The parameters of the class, where it could be built.
    """

    class_names: tuple[str, ...] = ()


def missing_class_reason(config: Mapping[str, Any]) -> str:
    """Return why mlx-lm has no class for ``config``; "" where it may have one.

    Args:
        config: The source's ``config.json``.
    """
    folder = _mlx_lm_folder()
    if folder is None:
        return "mlx-lm is not installed (pip install 'requant[mlx]')"
    if "model_file" in config:  # older mlx-lm would run it
        return "config.json names code of its own (model_file), which is not run"
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return "config.json has no model_type"
    if _has_module(folder, model_type) or _is_renamed(folder, model_type):
        return ""
    return f"mlx-lm has no class for model_type {format_value(model_type)}"


def _mlx_lm_folder() -> Path | None:
    """The folder of the package; a name without dots is found without importing anything."""
    spec = find_spec("mlx_lm") if find_spec("mlx") else None
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders else None


def _has_module(folder: Path, name: str) -> bool:
    if not re.fullmatch(r"\w[\w-]*", name):
        return False
    return (folder / "models" / f"{name}.py").is_file() or (folder / "models" / name).is_dir()


def _is_renamed(folder: Path, model_type: str) -> bool:
    """Whether mlx-lm's tables lead from ``model_type`` to a module; true if they cannot be read."""
    tables: dict[str, Any] = {}
    try:
        for node in ast.parse((folder / "utils.py").read_bytes()).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in (_NAMES, _NAMES_BY_ARCHITECTURE):
                    tables[name] = ast.literal_eval(node.value)
        names = {*tables[_NAMES]}
        names |= {pair[0] for pair in tables.get(_NAMES_BY_ARCHITECTURE, {})}
    except (OSError, SyntaxError, ValueError, TypeError, LookupError):
        return True
    return model_type in names
