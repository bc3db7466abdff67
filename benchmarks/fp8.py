"""Time to convert an FP8 folder to 4 bits, against a bfloat16 folder of the same shapes.

Each round converts the bfloat16 folder and the FP8 folder one after another, so that a change
in the machine's speed affects both. Printed are medians, and medians of the ratios within a round.

    python benchmarks/fp8.py                 1 B parameters, DeepSeek's FP8 blocks
    python benchmarks/fp8.py --layers 4      smaller
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from convert import HERE, report, requant, rounds


def main() -> None:
    """Make both folders, convert them in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to work; about 5 GB are needed")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        scratch = Path(folder)
        contenders: dict[str, Callable[[Path], list[str]]] = {}
        for name, options in (("bf16", []), ("fp8", ["--fp8"])):
            source = scratch / name
            script = [sys.executable, str(HERE / "make_checkpoint.py"), str(source)]
            subprocess.run([*script, "--layers", str(args.layers), *options], check=True)
            # The embedding is dense in an FP8 folder and stays so: neither run encodes it.
            convert_options = ["--bits", str(args.bits), "--override", "embed_tokens=skip"]
            contenders[name] = lambda out, source=source, options=convert_options: requant(
                source, out, *options
            )
        report(rounds(contenders, scratch, args.runs), "bf16", args.json)


if __name__ == "__main__":
    main()
