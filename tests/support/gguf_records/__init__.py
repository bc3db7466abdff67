"""What llama.cpp's own converter makes of small models: ``make`` says how."""

import base64
import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
RECORDS = sorted(path.name.removesuffix(".json.xz") for path in _FOLDER.glob("*.json.xz"))


@cache
def record(name: str) -> dict[str, Any]:
    """config.json, names and shapes of weights, and the converter's file in base64."""
    found: dict[str, Any] = json.loads(lzma.decompress((_FOLDER / f"{name}.json.xz").read_bytes()))
    return found


def write_record(name: str, folder: Path) -> Path:
    """The converter's file."""
    path = folder / "m.gguf"
    path.write_bytes(base64.b64decode(record(name)["gguf"]))
    return path
