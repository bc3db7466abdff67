"""Regular expressions of users, recipes and other tools' configs, searched within a time limit.

Ignore lists come with checkpoints, and a pattern such as ``(a|a)*b`` can keep Python's ``re``,
which has no time limit, busy for years. A pattern whose text shows that the work is small is
searched with ``re``, any other with the package ``regex``, whose search has a timeout.
``re`` compiles every pattern first, so both accept the same patterns with the same messages.
"""

from __future__ import annotations

import fnmatch
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from requant.core.limits import MAX_NAME_CHARS, MAX_PATTERN_CHARS, MAX_PATTERN_S, MAX_PATTERNS_S
from requant.errors import RequantError

_SHOWN_CHARS = 80
_RE_NAME_CHARS = 256  # the longest name in which the estimate of _is_polynomial holds
_RE_MAX_STEPS = 4 * _RE_NAME_CHARS**3  # about half a second
_MAX_UNROLLED = 1 << 18  # regex unrolls repetitions as it compiles, which no timeout ends
_MAX_RANGES_ANY_CASE = 64  # re compiles each in some 10 ms

_CLASS = r"\[\^?\]?(?:\\.|[^]\\])*\]"
_ATOM = re.compile(rf"\\.|{_CLASS}", re.DOTALL)
_COUNT = r"\{(?:\d+(?:,\d*)?|,\d*)\}"
_NEEDS_PARSER = re.compile(r"\(\?[a-zA-Z]*x|\(\?#|\(\?P|\(\?\(|\\[1-9]")
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i")


class PatternError(RequantError, ValueError):
    """A pattern is not valid, or takes too long; ``pattern`` is its text."""

    def __init__(self, message: str, pattern: str) -> None:
        text = pattern if len(pattern) <= _SHOWN_CHARS else pattern[:_SHOWN_CHARS] + "..."
        super().__init__(f"{text!r} {message}")
        self.pattern = pattern


class _TimeBudget:
    """Seconds that patterns took so far: each by its text, and all of them.

    Elapsed time is counted first, since its clock is cheap. On a busy machine it is many times the
    processor's: once it exceeds a limit, counting starts again in the processor time of the thread.
    """

    def __init__(self) -> None:
        self.each: dict[str, float] = defaultdict(float)
        self.total = 0.0
        self.now = time.perf_counter

    def left(self, text: str) -> float:
        """Seconds that a pattern may still take."""
        return min(MAX_PATTERN_S - self.each[text], MAX_PATTERNS_S - self.total)

    def spend(self, text: str, began: float) -> None:
        """Count the time that a pattern took since ``began``, which ``now`` gave.

        Raises:
            PatternError: It took too long, or all patterns together did.
        """
        seconds = self.now() - began
        each, total = self.each[text] + seconds, self.total + seconds
        if each < MAX_PATTERN_S and total < MAX_PATTERNS_S:  # each of many searches comes here
            self.each[text], self.total = each, total
        else:
            self.add(text, seconds)

    def add(self, text: str, seconds: float) -> None:
        """Count seconds that a pattern took; errors as of ``spend``."""
        self.each[text] += seconds
        self.total += seconds
        if self.left(text) <= 0 and self.now is time.perf_counter:
            self.each.clear()
            self.total, self.now = 0.0, time.thread_time
        if self.each[text] >= MAX_PATTERN_S:
            raise PatternError(
                f"took more than {MAX_PATTERN_S:g} s over the names of this model; "
                "write it with fewer repetitions inside one another",
                text,
            )
        if self.total >= MAX_PATTERNS_S:
            raise PatternError(
                f"is one pattern too many: those of this model took more than "
                f"{MAX_PATTERNS_S:g} s over its names; write fewer",
                text,
            )


_budget: ContextVar[_TimeBudget | None] = ContextVar("budget", default=None)


@contextmanager
def regex_time_budget() -> Iterator[None]:
    """Share one time budget between all patterns of a model; also a decorator.

    Outside of it each call has a budget of its own.
    """
    token = _budget.set(_budget.get() or _TimeBudget())
    try:
        yield
    finally:
        _budget.reset(token)


class Pattern:
    """A compiled pattern with the methods of ``re.Pattern`` that answer yes or no.

    Raises:
        PatternError: The text is not a regular expression, or exceeds a limit; later, a name is
            too long, or the searches took too long in all.

    Example:
        >>> Pattern("(up|down)_proj").search("model.layers.0.mlp.up_proj")
        True
    """

    def __init__(self, text: str, expression: str | None = None) -> None:
        """Compile ``text``; for a wildcard, ``expression`` is its translation."""
        self.text = text
        if len(text) > MAX_PATTERN_CHARS:
            raise PatternError(f"is longer than {MAX_PATTERN_CHARS:,} characters", text)
        self._regex: Any = None  # compiled at the first search that needs it
        budget = _budget.get() or _TimeBudget()
        budget.add(text, 0)
        began = budget.now()
        try:
            if expression is None:
                _check_ranges(text)
            self._re = re.compile(text if expression is None else expression)
        except RecursionError:
            raise PatternError("is nested too deeply", text) from None
        except (re.error, OverflowError, ValueError) as error:
            raise PatternError(f"is not a valid regular expression: {error}", text) from error
        if expression is None:
            _check_counts(text)
        # fnmatch writes "*" as an atomic group, which never tries a second length.
        self._re_chars = self._re_chars_searched = MAX_NAME_CHARS
        if expression is None:
            self._re_chars = _RE_NAME_CHARS * _is_polynomial(text, is_search=False)
            self._re_chars_searched = _RE_NAME_CHARS * _is_polynomial(text)
        budget.spend(text, began)

    def search(self, name: str) -> bool:
        """Whether the pattern is found anywhere in ``name``."""
        return self._ask("search", self._re.search, name, self._re_chars_searched)

    def match(self, name: str) -> bool:
        """Whether the pattern is found at the start of ``name``."""
        return self._ask("match", self._re.match, name, self._re_chars)

    def fullmatch(self, name: str) -> bool:
        """Whether the pattern is the whole of ``name``."""
        return self._ask("fullmatch", self._re.fullmatch, name, self._re_chars)

    def _ask(self, method: str, by_re: Callable[[str], object], name: str, re_chars: int) -> bool:
        """Ask ``re`` about names of up to ``re_chars`` characters, and ``regex`` about longer."""
        budget = _budget.get() or _TimeBudget()
        began = budget.now()
        if len(name) <= re_chars:
            found = by_re(name)
        elif len(name) > MAX_NAME_CHARS:
            raise PatternError(f"is not searched in a name of {len(name):,} characters", self.text)
        else:
            found = self._by_regex(method, name, budget)
        budget.spend(self.text, began)
        return found is not None

    def _by_regex(self, method: str, name: str, budget: _TimeBudget) -> object:
        import regex  # takes 0.1 s, and most patterns do not need it

        try:
            if self._regex is None:
                self._regex = regex.compile(_escaped(self.text), regex.V0)
            budget.add(self.text, 0)
            return getattr(self._regex, method)(name, timeout=budget.left(self.text))
        except TimeoutError:
            # regex counts the time of all threads of the process, so our clock may show less.
            budget.now = time.thread_time
            budget.add(self.text, MAX_PATTERN_S)
            raise
        except (regex.error, RecursionError, MemoryError) as error:
            raise PatternError(f"is too complex to be searched: {error}", self.text) from None


def _check_ranges(text: str) -> None:
    ranges = text.count("-") if _IGNORES_CASE.search(text) else 0
    if ranges > _MAX_RANGES_ANY_CASE:
        limit = f"more than {_MAX_RANGES_ANY_CASE} ranges or hyphens"
        raise PatternError(f"ignores case and has {limit}", text)


def _check_counts(text: str) -> None:
    """Reject ``(?:a{1000}){1000}``: the counts and the length bound what is unrolled."""
    counts = math.prod(int(n) or 1 for n in re.findall(r"(?<=[{,])(\d+)(?=,?\})", text))
    if counts * len(text) > _MAX_UNROLLED:
        raise PatternError(
            f"repeats too much: the product of its counts and its length ({len(text)}) is over "
            f"{_MAX_UNROLLED:,}",
            text,
        )


def _is_polynomial(text: str, is_search: bool = True) -> bool:
    r"""Whether the text alone shows that ``re`` takes at most ``_RE_MAX_STEPS`` over a name.

    Escapes and character classes count as one letter. A repetition of one letter may end at each
    position of the name, an optional part is tried in 2 ways and a group in as many as it has
    alternatives; the ways of all parts multiply, as when each fails after the one before it.
    A repetition of a group is never taken as small. A search starts at each position of the name,
    a match at the first alone.

    Example: ``.*experts\.(?:\d+|shared)\.(up|down)_proj`` has 256 starts, two repetitions
    (256 * 256) and two groups of two alternatives (4), so just ``_RE_MAX_STEPS``.
    """
    if _NEEDS_PARSER.search(text):
        return False
    letters = _ATOM.sub("a", text)
    letters = re.sub(r"\(\?(?:<?[=!]|[a-zA-Z]*[:)])", "(", letters)
    repeats = re.findall(rf"(.)(?:[*+]|{_COUNT})", letters, re.DOTALL)
    bars, groups = letters.count("|"), letters.count("(") + 1
    parts = min(bars, groups) or 1  # bars spread evenly over them make the most ways
    ways = 2 ** min(letters.count("?"), 64) * (1 + bars / parts) ** min(parts, 64)
    steps = _RE_NAME_CHARS ** min(is_search + len(repeats), 8) * ways
    return ")" not in repeats and steps <= _RE_MAX_STEPS


def _escaped(text: str) -> str:
    """The text with those characters escaped that ``regex`` gives a meaning and ``re`` does not.

    These are ``{`` outside a count, as in ``(a){e<=1}``, and ``[`` inside a class, as in
    ``[[:alpha:]]``.
    """
    if _NEEDS_PARSER.search(text):  # there may be comments, in which an escape is text
        return text
    piece = re.compile(rf"(?P<set>{_CLASS})|\\.|{_COUNT}|\{{", re.DOTALL)

    def escape(found: re.Match[str]) -> str:
        if found["set"]:
            return "[" + re.sub(r"\\.|\[", _escape_one, found["set"][1:], flags=re.DOTALL)
        return _escape_one(found)

    return piece.sub(escape, text)


def _escape_one(found: re.Match[str]) -> str:
    return "\\" + found[0] if len(found[0]) == 1 else found[0]


def wildcard(text: str) -> Pattern:
    """The pattern of a shell's wildcard (``*``, ``?``, ``[a-z]``), for ``fullmatch``.

    Raises:
        PatternError: As ``Pattern``.
    """
    return Pattern(text, fnmatch.translate(text))


class Wildcards:
    """A list of wildcards and plain names, as ignore lists hold them.

    Raises:
        PatternError: As ``Pattern``, here and later.

    Example:
        >>> list(Wildcards(["lm_head", "*.gate"]).matching("model.0.gate"))
        ['*.gate']
    """

    def __init__(self, names: Iterable[str]) -> None:
        names = tuple(names)
        self._plain = {name for name in names if not any(mark in name for mark in "*?[")}
        self._wild = [(name, wildcard(name)) for name in names if name not in self._plain]

    def matching(self, name: str) -> Iterator[str]:
        """Yield the entries that equal ``name`` or match the whole of it."""
        if name in self._plain:
            yield name
        yield from (text for text, pattern in self._wild if pattern.fullmatch(name))


@lru_cache(maxsize=1024)
def compile(text: str) -> Pattern:
    """The pattern of a text, compiled once."""
    return Pattern(text)


def search(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is found anywhere in ``name``; as ``re.search``, in bounded time.

    Raises:
        PatternError: As ``Pattern``.
    """
    return compile(pattern).search(name)
