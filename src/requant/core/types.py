"""Type aliases of the public functions' arguments."""

from __future__ import annotations

import os

Source = str | os.PathLike[str]
