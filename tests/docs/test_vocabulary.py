"""Code, help, errors, docs and tests use one term for each thing: the field's.

``docs/glossary.md`` defines the terms. Names, prose and native code are read alike; a name is
split at underscores and capitals.
"""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What is not written -> what is: spelling, and words that have a better known one.
WORDS = {
    r"\w*(?:quant|initial|normal|optim|serial|recogn|organ|summar)is(?:e[drs]?|ing|ations?)": "-iz",
    r"bits a weight|bits/weight|bpw": "bits per weight",
    r"director(?:y|ies)": "folder",
    r"state[- ]dicts?": "weights",
    r"w_bits?|q_bits": "bits",
    r"(?:the )?(?:HF|Hugging ?Face) hub": "the hub",
    r"safe tensors|weights files?|shard files?": "safetensors, weight file, shard",
    r"e\.g\.|i\.e\.": "such as, that is",
}
# Private words that the field has a word for; these are looked for in tests and native code too.
PRIVATE = {
    r"wish(?:es|ed)?": "option, requested",
    r"refus(?:e|es|ed|ing|als?)": "reject, unsupported",
    r"roads?|doors?": "pipeline, public function",
    r"blueprints?": "plan",
    r"spoil(?:s|ed|ing)?": "non-finite",
    r"twins?": "header stub, counterpart",
    r"peek(?:s|ed|ing)?": "read",
    r"anew": "again, requantized",
    r"foreign|strangers?": "untrusted, another tool's",
    r"hand(?:ed|s)? on": "propagated",
    r"slip of the pen": "typo",
    r"told": "reported, detected, by default",
    r"go(?:es)? on": "resume, continue",
    r"speak(?:s|ing)?": "generate, mention",
    r"beside": "next to, apart from",
    r"of ours|one's own": "built-in, your own",
    r"whose fate": "that require an explicit choice",
    r"carried over": "copied",
    r"materials": "intermediates",
    r"(?:the house|ground floor|floors) (?:in|of|and)": "architecture, layer",
    r"(?<!there )(?:is|are|was|were) no"
    r"(?= (?!longer|more|such|other|less|better|smaller)\w)": "is not a",
}
# Word -> files where it is another's word or has its common meaning -> why.
ALLOWED: dict[str, dict[str, str]] = {
    "w_bit": {
        "declared.py|quantization_block.py|known.py|qweight_|gptq_awq|awq.md": "key of AWQ's config"
    },
    "q_bits": {"libraries/base.py": "an argument of the libraries' convert"},
    "refuse": {"": "the value of --act-order that stops at such layers"},
    "materials": {"mkdocs.yml": "a theme"},
    "peek": {"hub_server.py": "a flag of sockets"},
}
# Where such a word is data: the text below it is recorded or made by another tool.
DATA = re.compile(
    r"^tests/(?:fixtures|fuzz/seeds)/|^tests/fuzz/record\.json|^tests/docs/test_vocabulary\.py"
    r"|^examples/micro-llama|calibration\.txt$|_native\.pyi$"
)
# An option value, a path, an address or a text in quotes of one word is no prose.
REFUSE_VALUE = re.compile(
    r"[\"'`]refuse[\"'`]|--act-order(?:[ =]|\", \")refuse\b|(?:dense,?|or|and) refuse\b"
)
SUFFIXES = (".py", ".md", ".toml", ".json", ".h", ".cpp", ".c", ".yml", ".sh", "")
FOLDERS = ("src", "docs", "examples", "tests", "scripts", "benchmarks")


def is_read(path: Path) -> bool:
    name = path.relative_to(ROOT).as_posix()
    return (
        path.is_file()
        and path.suffix in SUFFIXES
        and not DATA.search(name)
        and "__pycache__" not in name
        and ".egg-info" not in name
        and "dist-info" not in name
    )


FILES = [
    path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if is_read(path)
] + [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PUBLIC = [path for path in FILES if path.relative_to(ROOT).parts[0] not in ("tests", "src")] + [
    path for path in FILES if path.relative_to(ROOT).parts[:2] == ("src", "requant")
]


def is_allowed(word: str, name: str) -> bool:
    files = ALLOWED.get(word, {})
    return any(re.search(pattern, name) for pattern in files)


@cache
def whole_word(*patterns: str) -> re.Pattern[str]:
    """Any of these, not as a part of a longer word."""
    return re.compile(rf"(?<![a-zA-Z])(?:{'|'.join(patterns)})(?![a-zA-Z])", re.I)


def strays(text: str, words: dict[str, str], name: str = "") -> list[str]:
    if not whole_word(*words).search(text):  # four times as fast as one after another
        return []
    found = []
    for pattern, word in words.items():
        for match in whole_word(pattern).finditer(text):
            if match[0].lower() not in ALLOWED or not is_allowed(match[0].lower(), name):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name}:{line}: {match[0]!r}, here {word!r}")
    return found


def private_strays(text: str, name: str = "") -> list[str]:
    """In names and prose: ``is_refused``, ``Refused`` and "is refused" are one."""
    text = REFUSE_VALUE.sub("", text)
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).replace("_", " ")
    return strays(re.sub(r"[ \t]+", " ", text), PRIVATE, name)


# CHANGELOG.md lists former names in an indented table.
FORMER_NAMES = re.compile(r"^  \|.*", re.M)


def read(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        return ""
    return FORMER_NAMES.sub("", text) if path.name == "CHANGELOG.md" else text


def by_folder(files: list[Path]) -> dict[str, list[Path]]:
    """Files by the first three parts of their folder: ``src/requant/formats``."""
    folders: dict[str, list[Path]] = {}
    for path in files:
        folder = "/".join(path.relative_to(ROOT).parts[:-1][:3])
        folders.setdefault(folder or ".", []).append(path)
    return folders


@pytest.mark.parametrize("folder", by_folder(PUBLIC))
def test_no_word_is_a_stray(folder: str) -> None:
    files = by_folder(PUBLIC)[folder]
    assert [x for path in files for x in strays(read(path), WORDS, name_of(path))] == []


@pytest.mark.parametrize("folder", by_folder(FILES))
def test_no_word_is_private(folder: str) -> None:
    """Neither in a file nor in its name."""
    for path in by_folder(FILES)[folder]:
        assert private_strays(read(path), name_of(path)) == []
        assert private_strays(name_of(path).replace("/", "\n")) == []


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "text",
    ["we quantise it", "Dequantisation", "4.5 bits a weight", "a directory", "HF Hub", "e.g. 4"],
)
def test_a_stray_is_found(text: str) -> None:
    assert len(strays(text, WORDS)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "options that cannot be wished",
        "def _is_refused(layer):",
        "class Refused(Exception):",
        "MAX_PEEK_BYTES = 4",
        "the road of a tensor",
        "a twin of the file",
        "it is encoded anew",
        "it is no multiple of 8",
        "the file beside it",
    ],
)
def test_a_private_word_is_found(text: str) -> None:
    assert len(private_strays(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "quantize the weights of a folder from the hub: 4.5 bits per weight",
        "--act-order refuse stops; there is no config.json; it is no longer read",
        'act_order="refuse"',
        "broad, indoors, handed to, blog on",
    ],
)
def test_words_of_the_field_are_none(text: str) -> None:
    assert strays(text, WORDS) == [] and private_strays(text) == []
