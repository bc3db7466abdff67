"""Small configurations, one a model type of mlx-lm: sizes that fit 2 layers into a megabyte or so.

``COMMON`` holds settings that mean the same in most families; a family takes those that its
argument class has, and then its own. Nested text models name the family of their text part.
"""

import importlib
import inspect
import json
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

# ``COMMON`` and ``OWN``: the settings that most families share, and those of one family.
_SETTINGS = json.loads(Path(__file__).with_suffix(".json").read_text())
COMMON: dict[str, Any] = _SETTINGS["COMMON"]
OWN: dict[str, dict[str, Any]] = _SETTINGS["OWN"]

# Modules of mlx_lm.models that hold parts of models.
_PARTS = {"activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline"}
_PARTS |= {"rope_utils", "ssm", "switch_layers"}


@cache
def model_types() -> tuple[str, ...]:
    """Every model type that the installed mlx-lm has a module for."""
    import mlx_lm.models

    found = (module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    return tuple(name for name in found if name not in _PARTS)


def small_config(model_type: str) -> dict[str, Any]:
    """A ``config.json`` for a small model of ``model_type``."""
    arguments = importlib.import_module(f"mlx_lm.models.{model_type}").ModelArgs
    fields = inspect.signature(arguments).parameters
    config = {name: value for name, value in COMMON.items() if name in fields}
    config |= OWN.get(model_type, {})
    if "text_config" in config:
        text = dict(config["text_config"])
        of = text.pop("of")
        config["text_config"] = (small_config(of) if of else dict(COMMON)) | text
    return config | {"model_type": model_type}
