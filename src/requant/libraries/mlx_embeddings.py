"""mlx-embeddings: ``mlx_embeddings/models/{model_type}.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.libraries.base import Library, module_exists


def _find_class(folder: Path, config: Mapping[str, Any]) -> bool:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type == "base":
        return False
    return module_exists(folder / "models", model_type.replace("-", "_"))


MLX_EMBEDDINGS = Library(
    name="mlx-embeddings",
    package="mlx_embeddings",
    extra="embeddings",
    find_class=_find_class,
    import_class=lambda utils, config, _: utils._get_classes(config),
    load=lambda utils, folder: utils.load_model(folder, path_to_repo=str(folder)),
    has_heads=False,
    stubs=(("mlx_embeddings.utils", "load_tokenizer"),),
)
