"""Every message of an error that a test raises reads well to who has never seen the code.

``watch`` looks at each as it is made; the test that raised one that does not read well fails.
"""

import re
from typing import Any

from requant.errors import CheckpointError, Problem, RequantError

# What no message may hold, outside names in quotes, and paths.
_FAULTS = {
    "a value as Python spells it": r"\b(?:None|True|False|nan|NoneType|dict|str)\b|\bb['\"]|\(\)",
    "an object as Python spells it": r"PosixPath\(|\bdtype\(|<(?:class|enum|function|Quant)"
    r"| object at 0x|[A-Za-z]\w*\(\w+=|frozenset",
    "a name of the code": r"\b_[A-Z]\w+|__init__|\{\w+\}",
    "one of many, or many of one": r"(?<![\d,.\-])1 (?:more )?(?:values|tensors|layers|files"
    r"|problems|tokens|experts|models|bytes|windows|inputs|rows|columns|parts|heads|axes|groups|items)\b",
    "a full stop or comma twice": r"(?<![./])\.\.(?![./])|[;,:]\s*[;,]",
    "an end that is none": r"[,;:\s]\Z",
    "a space too many": r"\A\s|\S  ",
}
_ANY = re.compile("|".join(f"(?:{fault})" for fault in _FAULTS.values()))
_EXTERNAL = re.compile(r"'[^']*'|\"[^\"]*\"|(?<!\w)[~.]*/\S+|\[\w+(?:::\w+)?\][^\n]*")

# Python objects that a caller gave, said back as the caller wrote them.
_GIVEN = ("per-layer value must be a Quantization or SKIP", "not an array that requant computes")
_MODULES = "in sys.modules"  # what Python says of a module that a test hides

_MOST = 200  # of one test: a test of a long list makes tens of thousands

found: list[str] = []
looked = 0


def faults_of(message: str) -> list[str]:
    """What does not read well in a message."""
    if not _ANY.search(message):
        return []
    own = _EXTERNAL.sub("_", message)
    if any(words in own for words in _GIVEN) or _MODULES in own:
        return []
    return [what for what, fault in _FAULTS.items() if re.search(fault, own)]


def _look(message: str) -> None:
    global looked
    looked += 1
    if looked <= _MOST and (faults := faults_of(message)):
        found.append(f"{message!r} holds {', '.join(faults)}")


def take() -> list[str]:
    """What was found since the last call."""
    global looked
    reported, looked = list(found), 0
    found.clear()
    return reported


def watch() -> None:
    """Look at every error and problem from now on."""
    make_error, make_problem = RequantError.__init__, Problem.__init__

    def error(self: RequantError, *args: Any, **kwargs: Any) -> None:
        make_error(self, *args, **kwargs)
        if not isinstance(self, CheckpointError):  # its problems were looked at
            _look(str(self))

    def problem(self: Problem, *args: Any, **kwargs: Any) -> None:
        make_problem(self, *args, **kwargs)
        _look(self.message)

    RequantError.__init__ = error  # type: ignore[method-assign]
    Problem.__init__ = problem  # type: ignore[method-assign]
