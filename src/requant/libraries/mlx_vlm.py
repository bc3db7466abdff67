"""mlx-vlm: ``mlx_vlm/models/{model_type}/``, after a table of other names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.libraries.base import Library, module_exists, read_table

_NAMES = "MODEL_REMAPPING"  # mlx_vlm/utils.py: {model_type: package}


def _find_class(folder: Path, config: Mapping[str, Any]) -> bool:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return False
    model_type = model_type.lower()
    try:
        model_type = read_table(folder / "utils.py", _NAMES)[_NAMES].get(model_type, model_type)
    except (ValueError, LookupError):
        return True  # a version that keeps its names elsewhere: its convert decides
    return module_exists(folder / "models", model_type)


MLX_VLM = Library(
    name="mlx-vlm",
    package="mlx_vlm",
    extra="vlm",
    find_class=_find_class,
    import_class=lambda utils, config, _: utils.get_model_and_args(config),
    load=lambda utils, folder: utils.load_model(folder),
    recipes=frozenset(f"mixed_{x}" for x in ("2_6", "3_4", "3_5", "3_6", "3_8", "4_6", "4_8")),
    stubs=(("mlx_vlm.utils", "load_processor"),),
    arguments=lambda *_: {"trust_remote_code": False},
)
