"""Compare a custom recipe with 4 bits for all layers.

    python examples/mixed_precision.py examples/micro-llama out

On the command line the same is ``requant convert SOURCE OUT --recipe examples/mixed.toml``.
"""

import sys
from math import sqrt
from pathlib import Path

import requant

RECIPE = Path(__file__).with_name("mixed.toml")


def mean_error(report: requant.Report) -> float:
    """Root mean square of the layers' relative errors."""
    errors = [error.relative_rms**2 for error in report.errors.values()]
    return sqrt(sum(errors) / len(errors))


def main(source: str, output: str) -> None:
    """Convert both ways and print size and error."""
    for name, options in (("flat", {"bits": 4}), ("mixed", {"recipe": RECIPE})):
        report = requant.convert(source, f"{output}-{name}", force=True, **options)
        worst = max(report.errors, key=lambda layer: report.errors[layer].relative_rms)
        print(
            f"{name}: {report.bits_per_weight:.2f} bits per weight, relative error "
            f"{mean_error(report):.1%}, worst {worst}"
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
