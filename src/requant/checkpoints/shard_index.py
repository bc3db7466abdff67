"""Compare the shard index with the weight files that are there.

If the files hold every tensor of the index, each once, they are read, and a note says that the
index is of another save. Everything else is a problem that says what to do.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from requant.checkpoints.folder_files import INDEX, find_gaps, natural_key
from requant.core.reasons import Note, NoteCode
from requant.errors import Problem
from requant.text import join_first, pluralize

_STALE = "is stale, it seems (left from another save of the model)"
_INCOMPLETE = "was the download complete?"


@dataclass(frozen=True, slots=True)
class Files:
    """An index and the files that are there."""

    shard_of: Mapping[str, str]  # tensor -> file, in the index
    # File that is there -> its tensors; files whose headers are damaged are missing.
    held: Mapping[str, Collection[str]]
    missing: Sequence[str]  # files of the index that are not there
    extra: Sequence[str]  # weight files that the index does not name
    # Files that are there and cannot be read.
    damaged: Collection[str] = field(default_factory=tuple)

    @property
    def named(self) -> list[str]:
        """Files of the index that are there."""
        found = {*self.shard_of.values()} - {*self.missing}
        return sorted(found, key=natural_key)

    def holds_everything(self, files: Sequence[str]) -> bool:
        """Whether some files hold all tensors that the index names, each once."""
        if any(name in self.damaged for name in files):
            return False
        held = Counter(tensor for name in files for tensor in self.held.get(name, ()))
        return self.shard_of.keys() <= held.keys() and max(held.values(), default=0) == 1


def judge(files: Files) -> tuple[list[Problem], list[Note]]:
    """Return the problems of an index and the files, and notes if there are none.

    If there are no problems, every file that is there is read.
    """
    if files.missing and files.extra and not files.named:
        return _no_file_named(files)
    if files.missing and files.extra and files.holds_everything(files.extra):
        others = join_first(files.named)
        message = (
            f"{_STALE}: {join_first(files.extra)} {_hold(files.extra)} the whole model. Delete "
            f"{INDEX} and move what else it names ({others}) out of the folder"
        )
        return [Problem(INDEX, message)], []
    if files.missing and not files.extra and files.holds_everything(files.named):
        gone = f"names {join_first(files.missing)}, which {_is(files.missing)} not there"
        text = f"{INDEX} {gone}; {join_first(files.named)} {_hold(files.named)} all of its tensors."
        return [], [Note(NoteCode.STALE_INDEX, text)]
    problems = [*_missing(files), *_extra(files)]
    compared, notes = _compare(files)
    return problems + compared, notes if not problems else []


def _no_file_named(files: Files) -> tuple[list[Problem], list[Note]]:
    what, few_extra = pluralize(len(files.missing), "file"), join_first(files.extra)
    none = (
        f"none of the {what} that it names is there"
        if len(files.missing) > 1
        else (f"{files.missing[0]}, which it names, is not there")
    )
    if files.holds_everything(files.extra) and not find_gaps(files.extra):
        text = (
            f"{INDEX} is stale: {none}. {few_extra} {_hold(files.extra)} all of its tensors and "
            f"{_is(files.extra)} read instead; delete {INDEX}, which other loaders may follow."
        )
        return [], [Note(NoteCode.STALE_INDEX, text)]
    lacking = files.shard_of.keys() - {t for name in files.extra for t in files.held.get(name, ())}
    some = join_first(sorted(lacking, key=natural_key))
    lacks = (
        f" and without {pluralize(len(lacking), 'tensor')} of its names ({some})" if lacking else ""
    )
    message = (
        f"{_STALE}, or the download was not complete: {none}, but {few_extra} "
        f"{_is(files.extra)}{lacks}. If {few_extra} {_hold(files.extra)} the whole model, delete "
        f"{INDEX}; if not, download the files that it names"
    )
    return [Problem(INDEX, message)], []


def _missing(files: Files) -> Iterator[Problem]:
    placed = Counter(files.shard_of.values())
    alike = {name.lower(): name for name in files.extra}
    for name in files.missing:
        message = f"does not exist; {INDEX} places {pluralize(placed[name], 'tensor')} in it; "
        other = alike.get(name.lower())
        yield Problem(name, message + (f"rename {other} to it" if other else _INCOMPLETE))


def _extra(files: Files) -> Iterator[Problem]:
    renamed = {name.lower() for name in files.missing}
    for name in files.extra:
        if name.lower() in renamed or name in files.damaged:
            continue
        tensors = files.held.get(name, ())
        known = [tensor for tensor in tensors if tensor in files.shard_of]
        what = (
            f"if its tensors belong to the model, delete {INDEX} (then every .safetensors file of "
            "the folder is read), otherwise"
        )
        if known:
            what = f"holds {pluralize(len(known), 'tensor')} that {INDEX} places in other files:"
        yield Problem(name, f"shard not in the index; {what} move the file out of the folder")


def _compare(files: Files) -> tuple[list[Problem], list[Note]]:
    """Compare the index with the tensors of the sound files."""
    problems, moved, unknown = [], [], []
    homes = defaultdict(list)
    for name in files.held:
        if name not in files.extra:
            for tensor in files.held[name]:
                homes[tensor].append(name)
    missing = 0
    for tensor, shard in files.shard_of.items():
        if shard not in files.held or shard in homes[tensor]:
            continue
        if len(homes[tensor]) == 1:
            moved.append(tensor)
        elif not homes[tensor]:
            missing += 1
            message = f"is not in {shard}, where the index places it"
            problems.append(Problem(f"{INDEX}: {tensor}", message))
    for tensor, places in homes.items():
        if tensor not in files.shard_of:
            unknown.append(tensor)
        if len(places) > 1:
            home = files.shard_of.get(tensor, places[0])
            placed = ", where the index places it" if tensor in files.shard_of else ""
            message = (
                f"is in {home} too{placed}; which of the two is the model's is not known: remove "
                "it from one of them"
            )
            problems += (Problem(f"{x}: {tensor}", message) for x in places if x != home)
    if missing:
        message = (
            f"does not fit the files, which lack {pluralize(missing, 'tensor')} of its names: if "
            f"the files are whole and the index is of another save, delete {INDEX}; if not, "
            "download the files again"
        )
        problems.append(Problem(INDEX, message))
    notes = []
    if moved or unknown:
        text = (
            f"{INDEX} does not fit the files ({join_first(sorted([*moved, *unknown]))}): their "
            "tensors are read where the files have them."
        )
        notes.append(Note(NoteCode.STALE_INDEX, text))
    return problems, notes


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _hold(names: Sequence[str]) -> str:
    return "holds" if len(names) == 1 else "hold"
