"""``python -m requant`` and the console command."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from requant.cli import run

    run()


if __name__ == "__main__":
    main()
