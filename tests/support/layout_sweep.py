"""Every model of a library: converted by requant and by the library, in a process of its own.

``python -m tests.support.layout_sweep LIBRARY`` reads names of packages, one a line, and answers
each with a line of JSON: some packages end the process that imports them, so the caller can start
another one and continue.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_S = 240  # for one model
AFFINE = "4 bits"
OTHERS = ("mxfp4", "nvfp4", "mixed_4_6")


@dataclass
class Row:
    """The result for one model.

    Attributes:
        family: The package's last name.
        not_built: Why no small checkpoint could be made of its class; "" if one was.
        modes: Mode -> what came of it, the fields of ``library_conversion.Compared``.
    """

    family: str
    not_built: str = ""
    modes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def converted(self) -> bool:
        """Whether the library converts it in the first mode."""
        return bool(self.modes) and not next(iter(self.modes.values()))["library_error"]

    @property
    def same(self) -> bool:
        """Whether both ways give the same in every mode, errors included."""
        return bool(self.modes) and all(map(_agrees, self.modes.values()))

    @property
    def loads(self) -> bool:
        """Whether the library loads requant's output, if it loads its own."""
        return all(not x["load_error"] or x["own_load_error"] for x in self.modes.values())


def _agrees(result: dict[str, Any]) -> bool:
    if result["library_error"]:
        return bool(result["requant_error"])
    return not (result["different"] or result["requant_error"])


def modes_of(family: str, recipes: Collection[str], every: bool = False) -> list[str]:
    """4 bits and one of the other modes, the same one each time; or all of them."""
    others = [mode for mode in OTHERS if mode in recipes or not mode.startswith("mixed")]
    rotating = others[zlib.crc32(family.encode()) % len(others)]
    return [AFFINE, *(others if every else (rotating,))]


def sweep(library: str, packages: Iterable[str], every: bool = False) -> Iterator[Row]:
    """Convert small checkpoints of models both ways.

    Args:
        library: Name of the library.
        packages: Full names of the models' packages.
        every: In every mode, instead of two.
    """
    worker: _Worker | None = None
    for package in packages:
        worker = worker or _Worker(library, every)
        row = worker.row_of(package)
        if row is None:
            worker = None
            row = Row(package.rpartition(".")[2], "its package ends the process, or takes too long")
        yield row
    if worker is not None:
        worker.end()


class _Worker:
    """A process that converts one model after another."""

    def __init__(self, library: str, every: bool) -> None:
        command = [sys.executable, "-m", "tests.support.layout_sweep", library]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            command + ["every"] * every,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._answers = selectors.DefaultSelector()
        self._answers.register(self._process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]

    def row_of(self, package: str) -> Row | None:
        """The result for a model; None if the process ended or was ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(package, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline() if self._answers.select(LIMIT_S) else ""
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.end()
            return None
        return Row(**json.loads(answer))

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def packages_of(library_name: str) -> list[str]:
    """Full names of the packages of a library's models, some of which may hold none."""
    from requant.libraries import LIBRARIES
    from tests.support.class_models import families
    from tests.support.families import model_types
    from tests.support.hub_forms import FORMS

    if library_name != "mlx-lm":
        return families(LIBRARIES[library_name])
    types = model_types()
    return [*types, *(x + PUBLISHED for x in FORMS if x in types)]


PUBLISHED = " (published)"


def _write_source(library_name: str, package: str, source: Path) -> None:
    """Write a small checkpoint of a model.

    Those of mlx-lm have configs and published forms that were written by hand.
    """
    import mlx.core as mx

    from requant.libraries import LIBRARIES
    from tests.support import class_models, mlx_lm_conversion
    from tests.support.families import small_config
    from tests.support.hub_forms import FORMS

    if library_name != "mlx-lm":
        class_models.class_checkpoint(LIBRARIES[library_name], package, source)
        return
    family = package.removesuffix(PUBLISHED)
    config = small_config(family)
    mlx_lm_conversion.class_checkpoint(source, config)
    if package != family:
        weights = mx.load(str(source / "model.safetensors"))
        mx.eval(weights)
        mlx_lm_conversion.write_mlx_checkpoint(source, config, FORMS[family](weights))


def examined(library_name: str, package: str, every: bool) -> Row:
    """The result for one model, in this process."""
    from requant.libraries import LIBRARIES
    from requant.quantization.config import Quantization
    from tests.support.class_models import FOLDERS, quiet
    from tests.support.library_conversion import convert_both_ways, first_line

    library = LIBRARIES[library_name]
    row = Row(package.rpartition(".")[2])
    affine = Quantization.affine(32 if library_name == "mlx-lm" else 64, 4)
    quantizations = {"mxfp4": Quantization(32, 4, "mxfp4"), "nvfp4": Quantization(16, 4, "nvfp4")}
    with tempfile.TemporaryDirectory() as name:
        folder = FOLDERS.get(row.family, row.family).removesuffix(PUBLISHED)
        source = Path(name) / "source" / folder
        try:
            with quiet():
                _write_source(library_name, package, source)
        except (Exception, SystemExit) as error:
            row.not_built = first_line(error).replace(name, "")
            return row
        for mode in modes_of(row.family, library.recipes, every):
            recipe = mode if mode in library.recipes else None
            quantization = quantizations.get(mode, affine)
            result = convert_both_ways(library, source, Path(name) / mode, quantization, recipe)
            for error in ("library_error", "requant_error", "load_error", "own_load_error"):
                setattr(result, error, getattr(result, error).replace(name, ""))
            row.modes[mode] = asdict(result)
    return row


def main() -> None:
    """Answer the names on standard input."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        row = examined(sys.argv[1], line.strip(), "every" in sys.argv[2:])
        print(json.dumps(asdict(row)), file=answers, flush=True)


if __name__ == "__main__":
    main()
