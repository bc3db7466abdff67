"""mlx-lm: ``mlx_lm/models/{model_type}.py``, after a table of other names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.libraries.base import Library, module_exists, read_table
from requant.libraries.stand_ins import StandIns

# mlx_lm/utils.py: {model_type: module}, and (in newer ones) {(model_type, architecture): module}.
_NAMES, _NAMES_BY_ARCHITECTURE = "MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING"


def _find_class(folder: Path, config: Mapping[str, Any]) -> bool:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return False
    if module_exists(folder / "models", model_type):
        return True
    try:
        tables = read_table(folder / "utils.py", _NAMES, _NAMES_BY_ARCHITECTURE)
        names = {*tables[_NAMES]}
        names |= {pair[0] for pair in tables.get(_NAMES_BY_ARCHITECTURE, {})}
    except (ValueError, LookupError, TypeError):
        return True  # a version that keeps its names elsewhere: its convert decides
    return model_type in names


MLX_LM = Library(
    name="mlx-lm",
    package="mlx_lm",
    extra="mlx",
    find_class=_find_class,
    import_class=lambda utils, config, _: utils._get_classes(config),
    load=lambda utils, folder: utils.load_model(folder)[0],
    recipes=frozenset({"mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"}),
    stand_ins=StandIns("mlx_lm", ("transformers",)),
    stubs=(("mlx_lm.utils", "load_tokenizer"), ("mlx_lm.utils", "create_model_card")),
)
