"""Type aliases of the public functions' arguments."""

import os

Source = str | os.PathLike[str]
