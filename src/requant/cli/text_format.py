"""Numbers and names in words, as tables and progress show them."""

from __future__ import annotations


def format_size(nbytes: float) -> str:
    """Three digits and a decimal unit: ``1.71 MB``."""
    if nbytes < 999.5:
        return f"{nbytes:.0f} B"
    units = iter(("kB", "MB", "GB", "TB"))
    unit = next(units)
    nbytes /= 1000
    while nbytes >= 999.5 and unit != "TB":
        unit, nbytes = next(units), nbytes / 1000
    return f"{nbytes:.{2 if nbytes < 9.995 else 1 if nbytes < 99.95 else 0}f} {unit}"


def format_seconds(seconds: float) -> str:
    """``0.42 s``, ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def escape_control_chars(text: str) -> str:
    """Escape what a name from an untrusted file must not send to a terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )
