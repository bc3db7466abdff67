"""Regular expressions of users and of foreign configs, searched in bounded time.

Ignore lists come with checkpoints, and a pattern such as ``(a|a)*b`` keeps Python's ``re`` busy
for years over one name. Patterns that cannot do that go to ``re``. All others are answered here,
by the sets of positions that a match can reach: an integer with one bit a position goes through
the parsed pattern once, so that time grows with the pattern and the name, not with the number of
ways to match. Both give the same answer, which is only yes or no.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from re import _compiler, _parser  # type: ignore[attr-defined]  # what re itself parses with
from typing import Any

from requant.errors import RequantError
from requant.limits import MAX_NAME_CHARS, MAX_PATTERN_CHARS, MAX_PATTERN_S, MAX_PATTERNS_S

_SHOWN_CHARS = 80
_QUICK_REPEATS = 2  # unbounded ones, each of a single character: at most length cubed steps
_QUICK_CHARS = 256
_MAX_RANGES_ANY_CASE = 64  # re compiles each in some 10 ms

_Node = tuple[Any, Any]  # what _parser gives: an operation and its operand
_Operation = type(_parser.LITERAL)
_CHARACTERS = frozenset({_parser.LITERAL, _parser.NOT_LITERAL, _parser.ANY, _parser.IN})
_REPEATS = frozenset({_parser.MAX_REPEAT, _parser.MIN_REPEAT})


class PatternError(RequantError, ValueError):
    """A pattern is no regular expression, or takes too long; ``pattern`` is its text."""

    def __init__(self, message: str, pattern: str) -> None:
        text = pattern if len(pattern) <= _SHOWN_CHARS else pattern[:_SHOWN_CHARS] + "..."
        super().__init__(f"{text!r} {message}")
        self.pattern = pattern


class _Spent:
    """Seconds that patterns took so far: each by its text, and all of them."""

    def __init__(self) -> None:
        self.each: dict[str, float] = defaultdict(float)
        self.total = 0.0

    @contextmanager
    def on(self, text: str) -> Iterator[float]:
        """Time what is done for a pattern; gives when the time is up that is left to it."""
        left = min(MAX_PATTERN_S - self.each[text], MAX_PATTERNS_S - self.total)
        began = time.perf_counter()
        try:
            yield began + left
        finally:
            took = time.perf_counter() - began
            self.each[text] += took
            self.total += took
            self.check(text)

    def check(self, text: str) -> None:
        """Refuse a pattern that took too long, or came after too many others."""
        if self.each[text] > MAX_PATTERN_S:
            raise PatternError(
                f"took more than {MAX_PATTERN_S:g} s over the names of this model; "
                "write it with fewer repetitions inside one another",
                text,
            )
        if self.total > MAX_PATTERNS_S:
            raise PatternError(
                f"is one pattern too many: those of this model took more than "
                f"{MAX_PATTERNS_S:g} s over its names; write fewer",
                text,
            )


_spent: ContextVar[_Spent | None] = ContextVar("spent", default=None)


@contextmanager
def time_counted() -> Iterator[None]:
    """Count the time of patterns over all that is done for one model; also a decorator.

    Outside of it each call has its own time.
    """
    token = _spent.set(_spent.get() or _Spent())
    try:
        yield
    finally:
        _spent.reset(token)


class Pattern:
    """A compiled pattern; ask it through ``search``, ``match`` or ``fullmatch``.

    Raises:
        PatternError: The text is no regular expression, or longer than is read; later, a
            search found a name too long, or took too long in all.

    Example:
        >>> Pattern("(a|a)*b").search("a" * 1000)
        False
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MAX_PATTERN_CHARS:
            raise PatternError(f"is longer than {MAX_PATTERN_CHARS:,} characters", text)
        spent = _spent.get() or _Spent()
        spent.check(text)
        try:
            with spent.on(text):
                self._parsed = _parser.parse(text)
                self._refuse_wide_ranges()
                self._quick = re.compile(text)
        except RecursionError:
            raise PatternError("is nested too deeply", text) from None
        except PatternError:
            raise
        except (re.error, OverflowError, ValueError) as error:
            raise PatternError(f"is no regular expression: {error}", text) from error
        self._is_quick = _is_quick(self._parsed)
        self._singles: dict[_Node, Callable[[str, int], object]] = {}

    def _refuse_wide_ranges(self) -> None:
        if self._parsed.state.flags & re.IGNORECASE:
            wide = sum(node[0] is _parser.RANGE for node in _walk(self._parsed))
            if wide > _MAX_RANGES_ANY_CASE:
                raise ValueError(f"{wide} ranges that ignore case, at most {_MAX_RANGES_ANY_CASE}")

    def search(self, name: str) -> bool:
        """Whether the pattern is found anywhere in ``name``."""
        if self._is_quick and len(name) <= _QUICK_CHARS:
            return self._ask(self._quick.search, name)
        return self._reach(name, (2 << len(name)) - 1) != 0

    def match(self, name: str) -> bool:
        """Whether the pattern is found at the start of ``name``."""
        if self._is_quick and len(name) <= _QUICK_CHARS:
            return self._ask(self._quick.match, name)
        return self._reach(name, 1) != 0

    def fullmatch(self, name: str) -> bool:
        """Whether the pattern is the whole of ``name``."""
        if self._is_quick and len(name) <= _QUICK_CHARS:
            return self._ask(self._quick.fullmatch, name)
        return self._reach(name, 1) >> len(name) != 0

    def _ask(self, quick: Callable[[str], object], name: str) -> bool:
        spent = _spent.get()
        if spent is None:
            return quick(name) is not None
        began = time.perf_counter()
        found = quick(name)
        took = time.perf_counter() - began
        spent.each[self.text] += took
        spent.total += took
        spent.check(self.text)
        return found is not None

    def _reach(self, name: str, starts: int) -> int:
        if len(name) > MAX_NAME_CHARS:
            raise PatternError(f"is not searched in a name of {len(name):,} characters", self.text)
        with (_spent.get() or _Spent()).on(self.text) as deadline:
            try:
                return _Walk(self, name, deadline).sequence(self._parsed, starts)
            except RecursionError:
                raise PatternError("is nested too deeply", self.text) from None


def wildcard(text: str) -> Pattern:
    """The pattern of a shell's wildcard (``*``, ``?``, ``[a-z]``), for ``fullmatch``.

    Raises:
        PatternError: As ``Pattern``.
    """
    if len(text) > MAX_PATTERN_CHARS:
        raise PatternError(f"is longer than {MAX_PATTERN_CHARS:,} characters", text)
    pieces = re.split(r"(\*+|\?|\[!?\]?[^\]]*\])", text)
    return Pattern("(?s)" + "".join(_regex_of(piece) for piece in pieces))


def _regex_of(piece: str) -> str:
    """One piece of a wildcard; fnmatch's own ``*`` would be an atomic group."""
    if piece.startswith("*"):
        return ".*"
    return fnmatch.translate(piece)[len("(?s:") : -len(r")\Z")]


class Wildcards:
    """A list of wildcards and plain names, as ignore lists hold them.

    Raises:
        PatternError: As ``Pattern``, here and later.

    Example:
        >>> list(Wildcards(["lm_head", "*.gate"]).fitting("model.0.gate"))
        ['*.gate']
    """

    def __init__(self, names: Iterable[str]) -> None:
        names = tuple(names)
        self._plain = {name for name in names if not any(mark in name for mark in "*?[")}
        self._wild = [(name, wildcard(name)) for name in names if name not in self._plain]

    def fitting(self, name: str) -> Iterator[str]:
        """Those that are ``name``, or fit the whole of it."""
        if name in self._plain:
            yield name
        yield from (text for text, pattern in self._wild if pattern.fullmatch(name))


@lru_cache(maxsize=1024)
def compiled(text: str) -> Pattern:
    """The pattern of a text, compiled once."""
    return Pattern(text)


def search(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is found anywhere in ``name``; as ``re.search``, in bounded time.

    Raises:
        PatternError: As ``Pattern``.
    """
    return compiled(pattern).search(name)


def match(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is found at the start of ``name``; as ``re.match``.

    Raises:
        PatternError: As ``Pattern``.
    """
    return compiled(pattern).match(name)


def fullmatch(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the whole of ``name``; as ``re.fullmatch``.

    Raises:
        PatternError: As ``Pattern``.
    """
    return compiled(pattern).fullmatch(name)


def _walk(nodes: Iterable[Any]) -> Iterable[_Node]:
    """Every node of a parsed pattern, at any depth."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if isinstance(node, tuple) and len(node) == 2 and isinstance(node[0], _Operation):
            yield node
        if isinstance(node, tuple | list | _parser.SubPattern):
            pending.extend(node)


def _is_quick(parsed: Any) -> bool:
    """Whether ``re`` can only take steps in the order of the name's length cubed."""
    unbounded = 0
    for operation, operand in _walk(parsed):
        if operation in (_parser.GROUPREF, _parser.GROUPREF_EXISTS):
            return False
        if operation in _REPEATS or operation is _parser.POSSESSIVE_REPEAT:
            low, high, body = operand
            if (low, high) == (0, 1) and not any(op in _REPEATS for op, _ in _walk(body)):
                continue
            if len(body) != 1 or body[0][0] not in _CHARACTERS:
                return False
            unbounded += low != high
    optional = sum(op in _REPEATS and arg[:2] == (0, 1) for op, arg in _walk(parsed))
    branches = sum(op is _parser.BRANCH for op, _ in _walk(parsed))
    return unbounded <= _QUICK_REPEATS and optional + branches <= 2


class _TimeIsUp(Exception):
    """What a walk ends with when the deadline is over; ``_Spent.check`` says so in words."""


class _Walk:
    """One name and the positions in it that a match can reach, as bits of an integer."""

    def __init__(self, pattern: Pattern, name: str, deadline: float) -> None:
        self.pattern, self.name, self.deadline = pattern, name, deadline
        self.flags = pattern._parsed.state.flags
        self.masks: dict[_Node, int] = {}

    def sequence(self, nodes: Iterable[_Node], starts: int) -> int:
        """Where a match of ``nodes``, one after the other, ends when it starts at ``starts``."""
        for operation, operand in nodes:
            if not starts:
                return 0
            if time.perf_counter() > self.deadline:
                raise _TimeIsUp
            starts = self.node(operation, operand, starts)
        return starts

    def node(self, operation: Any, operand: Any, starts: int) -> int:
        """Where a match of one node ends when it starts at ``starts``."""
        if operation in _CHARACTERS:
            return (starts & self.where((operation, operand))) << 1
        if operation in _REPEATS:
            return self.repeat(operand, starts)
        if operation is _parser.BRANCH:
            reached = 0
            for branch in operand[1]:
                reached |= self.sequence(branch, starts)
            return reached
        if operation is _parser.SUBPATTERN and not operand[1] and not operand[2]:
            return self.sequence(operand[3], starts)
        if operation is _parser.AT:
            return starts & self.where((operation, operand))
        if operation is _parser.FAILURE:  # (?!)
            return 0
        if operation in (_parser.ASSERT, _parser.ASSERT_NOT):
            return self.look(operand, starts, operation is _parser.ASSERT)
        raise PatternError(
            f"uses {str(operation).lower()}, which is read in simple patterns only",
            self.pattern.text,
        )

    def repeat(self, operand: tuple[int, int, Any], starts: int) -> int:
        """Where between ``low`` and ``high`` rounds of ``body`` end."""
        low, high, body = operand
        # After as many rounds as there are positions nothing new is reached.
        for _ in range(min(low, len(self.name) + 2)):
            starts = self.sequence(body, starts)
        reached = fresh = starts
        for _ in range(min(high - low, len(self.name) + 1)):
            fresh = self.sequence(body, fresh) & ~reached
            if not fresh:
                break
            reached |= fresh
        return reached

    def look(self, operand: tuple[int, Any], starts: int, wanted: bool) -> int:
        """Those of ``starts`` from which looking ahead or behind finds what is wanted."""
        direction, body = operand
        width = body.getwidth()[0] if direction < 0 else 0
        kept = 0
        for position in range(len(self.name) + 1):
            here = 1 << position
            if not starts & here:
                continue
            found = position >= width and self.sequence(body, here >> width)
            if bool(found and (direction > 0 or found & here)) == wanted:
                kept |= here
        return kept

    def where(self, node: _Node) -> int:
        """The positions at which a node for one character, or for a place, matches."""
        key = (node[0], id(node[1])) if isinstance(node[1], list) else node
        if key not in self.masks:
            single = self.pattern._singles
            if key not in single:
                single[key] = _single(self.pattern, node)
            self.masks[key] = sum(1 << at for at in self.positions(node, single[key]))
        return self.masks[key]

    def positions(self, node: _Node, matches: Callable[[str, int], object]) -> Iterable[int]:
        if node[0] is _parser.AT:
            return [at for at in range(len(self.name) + 1) if matches(self.name, at)]
        taken = {letter: matches(letter, 0) for letter in set(self.name)}
        return [at for at, letter in enumerate(self.name) if taken[letter]]


def _single(pattern: Pattern, node: _Node) -> Callable[[str, int], object]:
    """What ``re`` itself says about one node, with the pattern's flags."""
    state = _parser.State()
    state.flags = pattern._parsed.state.flags
    state.str = pattern.text
    parsed = _parser.SubPattern(state, [node])
    return _compiler.compile(parsed, int(state.flags)).match  # type: ignore[no-any-return]
