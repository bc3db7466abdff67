"""Patterns answer as ``re`` does, and answer in time whatever they are."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant import patterns
from requant.limits import MAX_NAME_CHARS, MAX_PATTERN_CHARS, MAX_PATTERN_S
from requant.patterns import Pattern, PatternError

ATOMS = ("a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\.", "^", "$", r"\b", "(?!b)", "(?<=a)", "")


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeat = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?", "{2,}"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, repeat).map(lambda pair: f"({pair[0]}){pair[1]}"),
        inner.map(lambda body: f"(?={body})"),
        inner.map(lambda body: f"(?!{body})"),
    )


@settings(max_examples=400)
@given(
    st.recursive(st.sampled_from(ATOMS), grown, max_leaves=8),
    st.text("ab.1\n", max_size=8),
    st.sampled_from(["", "(?i)"]),
)
def test_both_ways_answer_as_re(text: str, name: str, flags: str) -> None:
    for pattern in (Pattern(flags + text), slow(flags + text)):
        for ask in ("search", "match", "fullmatch"):
            expected = getattr(re, ask)(flags + text, name) is not None
            assert getattr(pattern, ask)(name) == expected, (ask, pattern._is_quick)


def slow(text: str) -> Pattern:
    """The pattern, never answered by ``re``."""
    pattern = Pattern(text)
    pattern._is_quick = False
    return pattern


REAL = (
    ("lm_head", "lm_head", True),
    (r".*\.mlp\.gate$", "model.layers.3.mlp.gate", True),
    (r".*\.mlp\.gate$", "model.layers.3.mlp.gate_proj", False),
    (r"^model\.layers\.(0|1|2)\..*", "model.layers.12.mlp", False),
    (r"^(?!.*(q_proj|k_proj)).*$", "model.layers.1.self_attn.v_proj", True),
    (r".*experts\.(?:\d+|shared)\.(up|down)_proj", "model.layers.1.experts.7.up_proj", True),
    (r"(model\.)?layers(\.\d+)+\.mlp", "model.layers.1.2.3.mlp.up", True),
)


@pytest.mark.parametrize("text, name, found", REAL)
def test_ignore_lists_as_published(text: str, name: str, found: bool) -> None:
    assert Pattern(text).search(name) == slow(text).search(name) == found


BOMBS = (
    "(a|a)*b",
    "(a+)+$",
    "(a*)*(a*)*(a*)*b",
    "(.*)(.*)(.*)(.*)(.*)(.*)(.*)b",
    ".*.*.*.*.*.*.*.*b",
    "(?:(?:(?:a{1000}){1000}){1000}){1000}",
    "(?:a?){500}a{500}b",
    "((((((a*)*)*)*)*)*)*b",
    "(?=(?=(?=.*b).*b).*b)b",
    "(|a|aa|aaa|aaaa)+b",
    "(?!(a+)+$)(a+)+b",
)


@pytest.mark.parametrize("text", BOMBS)
def test_explosive_patterns_are_answered_at_once(text: str) -> None:
    began = time.process_time()
    assert not Pattern(text).search("a" * 400 + "c")
    assert time.process_time() - began < MAX_PATTERN_S


REFUSED = {
    "(": "is no regular expression",
    "a{99999999999}": "is no regular expression",
    "(" * 3000 + ")" * 3000: "longer than",
    "(" * 2000 + ")" * 2000: "nested too deeply",
    "a" * (MAX_PATTERN_CHARS + 1): "longer than",
    "(?i)" + "[\\0-\U0010ffff]" * 200: "ranges that ignore case",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    began = time.process_time()
    with pytest.raises(PatternError, match=REFUSED[text]):
        Pattern(text)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("text", [r"(a+)\1b", "(?>a+)b", "a++b", "(a)?(?(1)b|c)"])
def test_what_only_re_can_do_is_refused_by_name(text: str) -> None:
    with pytest.raises(PatternError, match="uses"):
        slow(text).search("aaab")


def test_time_is_counted_over_all_names() -> None:
    pattern = Pattern("(?=(?=(?=(?=.*)*)*)*)*x")
    began = time.process_time()
    with patterns.time_counted(), pytest.raises(PatternError, match="took more than"):
        for _ in range(1000):
            pattern.search("b" * 1000)
    assert time.process_time() - began < 2 * MAX_PATTERN_S


def test_a_name_too_long_is_not_searched() -> None:
    with pytest.raises(PatternError, match="characters"):
        Pattern("a").search("b" * (MAX_NAME_CHARS + 1))


def test_functions_as_those_of_re() -> None:
    assert patterns.search("b", "abc")
    assert not patterns.match("b", "abc")
    assert patterns.fullmatch("a.c", "abc")
    assert not patterns.fullmatch("a.", "abc")
