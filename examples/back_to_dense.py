"""From any quantized folder back to plain weights, for tools that read nothing else.

    python examples/back_to_dense.py micro-llama-awq dense bfloat16

The values are those that the codes represent, each rounded once to the dtype: what quantizing lost
stays lost. On the command line: ``requant convert SOURCE OUT --dequantize --dtype bfloat16``.
"""

import sys

import requant


def main(source: str, output: str, dtype: str) -> None:
    """Convert, and make sure that nothing quantized is left."""
    report = requant.convert(source, output, dequantize=True, dtype=dtype, force=True)
    assert requant.inspect(output).quantization is None
    for group in report.groups:
        print(f"{group.layers:3} layers {group.treatment}: {group.source} -> {group.target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
