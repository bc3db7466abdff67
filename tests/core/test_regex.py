"""Patterns answer as ``re`` does, and answer in time whatever they are."""

import re
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.core import regex
from requant.core.limits import MAX_NAME_CHARS, MAX_PATTERN_CHARS, MAX_PATTERN_S
from requant.core.regex import Pattern, PatternError, _is_polynomial, regex_time_budget

ATOMS = (
    *(
        "a",
        "b",
        ".",
        "[ab]",
        "[^a]",
        "[]a]",
        r"[\]b]",
        "[^]]",
        "[a{1}]",
        r"\d",
        r"\w",
        r"\.",
        r"\[",
    ),
    *("^", "$", r"\b", "(?!b)", "(?<=a)", "", "{", "{}", "{e<=1}", "{a}", r"\{1}"),
)


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
    st.text("ab.1\n[]{}e", max_size=8),
    st.sampled_from(["", "(?i)"]),
)
def test_both_ways_answer_as_re(text: str, name: str, flags: str) -> None:
    for pattern in (Pattern(flags + text), slow(flags + text)):
        for ask in ("search", "match", "fullmatch"):
            expected = getattr(re, ask)(flags + text, name) is not None
            assert getattr(pattern, ask)(name) == expected, (ask, pattern._re_chars)


def slow(text: str) -> Pattern:
    """The pattern, never answered by ``re``."""
    pattern = Pattern(text)
    pattern._re_chars = -1
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
    "(a|aa)+(a|aa)+b",
    "(x+x+)+y|(a|a)*?c?d",
    "(?>(a|a)*)b|(a|a)*d",
    r"(a*)*\1b",
    "(?:a?){40}a{40}b",
    # Those that the text shows as polynomial, at the limit: re answers up to 256 characters.
    "a*a*(?:a|a|a)b",
    "a*a*" + "a" * 64 + "b",
    "a*a*(?=" + "a" * 200 + "b)",
    "a*" + "a?" * 8 + "b",
    "(" + "a|" * 500 + "a)(" + "a|" * 40 + "a)b",
)


@pytest.mark.sweep(6)
@pytest.mark.parametrize("text", BOMBS)
@pytest.mark.parametrize("length", [30, 250, 1000])
def test_explosive_patterns_end_in_time(text: str, length: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(regex, "MAX_PATTERN_S", 0.3)
    began = time.process_time()
    try:
        assert not Pattern(text).search("a" * length + "c")
    except PatternError as error:
        assert repr(text[:80])[:-1] in str(error) and error.pattern == text
    assert time.process_time() - began < 2


@pytest.mark.slow
def test_an_explosive_pattern_is_rejected_by_name() -> None:
    began = time.process_time()
    with pytest.raises(PatternError, match=r"'\(a\|aa\)\+\(a\|aa\)\+b' took more than 2 s"):
        Pattern("(a|aa)+(a|aa)+b").search("a" * 400)
    assert time.process_time() - began < 2 * MAX_PATTERN_S


REJECTED = {
    "(": "is not a valid regular expression: missing \\)",
    "a{99999999999}": "is not a valid regular expression: the repetition number is too large",
    "a{1000000000}": "repeats too much",
    "(?:a{1000,}){1000}": "repeats too much",
    "(?:(?:(?:a{1000}){1000}){1000}){1000}": "repeats too much",
    "(?:" + "a.*b?c[de]|" * 360 + "x){0,65536}": "repeats too much",
    "(" * 3000 + ")" * 3000: "longer than",
    "(" * 2000 + ")" * 2000: "nested too deeply",
    "a" * (MAX_PATTERN_CHARS + 1): "longer than",
    "(?i)" + "[\\0-\U0010ffff]" * 200: "ignores case",
}


@pytest.mark.parametrize("text", REJECTED)
def test_what_is_not_a_pattern_is_rejected(text: str) -> None:
    began = time.process_time()
    with pytest.raises(PatternError, match=REJECTED[text]):
        Pattern(text)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "text, found",
    [(r"(a+)\1b", True), ("(?>a+)ab", False), ("a++b", True), ("(c)?(?(1)b|a)", True)],
)
def test_what_needs_backtracking_is_answered_as_by_re(text: str, found: bool) -> None:
    assert slow(text).search("aaab") == Pattern(text).search("aaab") == found


PLAIN = (
    *("lm_head", r".*\.mlp\.gate$", r"^model\.layers\.(0|1|2)\..*", r"layers\.\d+\.mlp"),
    *(
        r"^(?!.*(q_proj|k_proj)).*$",
        r".*experts\.(?:\d+|shared)\.(up|down)_proj",
        "a*?b",
        "[)*+]x*",
    ),
)
NOT_PLAIN = (
    *("(a|b)*", "(ab)+", "a*a*a*", r"(a)\1", "(a)(?(1)b|c)", "(?x)a", "(?#[)(a+)+(?#])"),
    *("(?P<x>a)(?P=x)", "(a|a){9}", "(a|a)" * 9 + ".*.*", "a?" * 30, "(?:a{2}){3,}", r"(\))*"),
)


@pytest.mark.parametrize("text", PLAIN + NOT_PLAIN)
def test_re_answers_only_what_is_plainly_bounded(text: str) -> None:
    assert _is_polynomial(text) == (text in PLAIN)


@pytest.mark.parametrize(
    "text", ["[[:alpha:]]", "[a-c--.]", "[a||b]", "[a&&b]", "[[a]b]", r"[[\]]"]
)
@pytest.mark.filterwarnings("ignore:Possible (nested set|set):FutureWarning")
def test_classes_are_those_of_re(text: str) -> None:
    for name in ("a", ":]", "b", "-", "|", "&", "ab]", "[", "[b]", "]", "z"):
        assert slow(text).search(name) == (re.search(text, name) is not None), name


@pytest.mark.slow
def test_time_is_counted_over_all_names() -> None:
    pattern = Pattern("(a+)+$")
    began = time.process_time()
    with regex.regex_time_budget(), pytest.raises(PatternError, match="took more than"):
        for _ in range(1000):
            pattern.search("a" * 300 + "b")
    assert time.process_time() - began < 3 * MAX_PATTERN_S


def test_a_name_too_long_is_not_searched() -> None:
    with pytest.raises(PatternError, match="characters"):
        Pattern("a").search("b" * (MAX_NAME_CHARS + 1))


def test_search_as_that_of_re() -> None:
    assert regex.search("b", "abc")
    assert not regex.search("^b", "abc")


@pytest.mark.slow
def test_plain_patterns_do_not_import_regex() -> None:
    code = "import sys, requant.core.regex as p; p.search({!r}, 'x'); print('regex' in sys.modules)"
    for pattern, imported in ((".*_proj", "False"), ("(a|b)+", "True")):
        command = [sys.executable, "-c", code.format(pattern)]
        assert subprocess.check_output(command, text=True).strip() == imported


def test_other_work_on_the_machine_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits for the processor makes no pattern slow."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(regex.time, "perf_counter", lambda: float(next(ticks)))
    with regex_time_budget():
        pattern = Pattern(r".*experts.*")
        assert all(pattern.match(f"layers.{n}.mlp.experts") for n in range(100))
