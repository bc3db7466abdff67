"""Convert any quantized folder to dense weights, for tools that read no others.

    python examples/back_to_dense.py micro-llama-awq dense bfloat16

The values are those that the codes represent, each rounded once to the dtype; the quantization
error remains. On the command line: ``requant convert SOURCE OUT --dequantize --dtype bfloat16``.
"""

import sys

import requant


def main(source: str, output: str, dtype: str) -> None:
    """Convert, and check that no layer is quantized."""
    report = requant.convert(source, output, dequantize=True, dtype=dtype, force=True)
    assert requant.inspect(output).quantization is None
    for group in report.groups:
        print(f"{group.layers:3} layers {group.treatment}: {group.source} -> {group.target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
