# The C++ is compiled again where it changed.
build:
    pip install --no-build-isolation -e .

test *args:
    scripts/test {{args}}

# What CI runs; changes nothing.
check:
    scripts/check

fix:
    ruff format .
    ruff check --fix .
    python -m nanobind.stubgen -m requant.kernels._native -o src/requant/kernels/_native.pyi

# Ratios against a reference in the same run: just bench convert, just bench kernels.
bench name="convert":
    python benchmarks/{{name}}.py
