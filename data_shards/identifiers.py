"""Names that a pseudonymised set may not hold: which these are, and where they are looked for.

Names come from the patients, and from the folders and file names of images and masks. White space, punctuation, '_',
case, Unicode's forms and leading zeros of numbers do not matter: "mrn  004711", MRN4711a and MRN_4711_2 hold MRN-4711.

A whole name of 4 letters or digits counts always: a patient; a file name or folder that one patient alone has, but for
one that is a single word or number, such as normal.png or 2015.png, which counts as a part does. A part of a name
counts where it identifies: a word of 4 letters or a number of 4 digits, without leading zeros, in the paths of one
patient alone, or in the names of one or, among many, of `FEW`. It does not where it is a word of the set: of topics or
classes that the user gives, or said of more than `FEW` patients. Of a patient with several words and no digit, as
ROE^JANE, the order does not matter, and three letters will do where a text begins them with a capital.

What is not found: misspelt and shorter names, and those that the source does not know.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from mdnet_dist.errors import InputError

if TYPE_CHECKING:
    from data_shards.importing import Entry

SHORTEST = 4  # letters or digits; fewer may be chance
SHORTEST_OF_PERSON = 3
FEW = 3  # patients

_WORD = re.compile(r"[^\W_]+")
_RUN = re.compile(r"\d+|[^\W\d_]+")
_HUMP = re.compile(r"(?<=[^\W\d_A-Z])(?=[A-Z])")  # JaneRoe


@dataclass(frozen=True)
class Names:
    """What is looked for, all of it as `words_of` and `runs_of` give it."""

    wholes: set[tuple[str, ...]] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)
    capitals: set[str] = field(default_factory=set)  # parts that count only where they begin with a capital

    @cached_property
    def _lengths(self) -> dict[str, set[int]]:
        """Of whole names, by their first word. Names are complete when this is first asked for."""
        lengths: defaultdict[str, set[int]] = defaultdict(set)
        for whole in self.wholes:
            lengths[whole[0]].add(len(whole))
        return dict(lengths)

    def has_whole(self, text: str) -> bool:
        """Whether a text holds a whole name."""
        return any(
            tuple(stream[start : start + length]) in self.wholes
            for stream in (words_of(text), runs_of(text))
            for start, word in enumerate(stream)
            for length in self._lengths.get(word, ())
        )

    def parts_in(self, text: str) -> set[str]:
        """The parts of names that a text holds."""
        found = self.parts & {*words_of(text), *runs_of(text)}
        if self.capitals:
            begun = {word for word in _WORD.findall(unicodedata.normalize("NFKC", text)) if word[0].isupper()}
            found |= self.capitals & {_folded(word) for word in begun}
        return found


def words_of(text: str) -> list[str]:
    """What stands between blanks, punctuation and '_', without case: "MRN_04711a" is mrn, 04711a."""
    return _WORD.findall(_folded(text))


def runs_of(text: str) -> list[str]:
    """Its letters and its numbers, these without leading zeros: "MRN_04711a" is mrn, 4711, a; "JaneRoe" jane, roe."""
    runs = _RUN.findall(_folded(_HUMP.sub(" ", unicodedata.normalize("NFKC", text))))
    return [run.lstrip("0") or "0" if run.isdecimal() else run for run in runs]


def names_of(entries: Sequence[Entry], ordinary: Iterable[str] = ()) -> Names:
    """All names of a source that identify a patient. Args: ordinary: texts whose words are no parts of names."""
    names = Names()
    path_wholes: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)  # whose paths have it
    path_parts: defaultdict[str, set[str]] = defaultdict(set)
    for patient, path in {(entry.patient, path) for entry in entries for path in (entry.image, entry.mask) if path}:
        pure = PurePosixPath(path)
        for name in (*pure.parent.parts, pure.stem):
            for part in _parts(name):
                path_parts[part].add(patient)
            if len(runs_of(name)) > 1:
                for whole in _wholes(name):
                    path_wholes[whole].add(patient)
    patients = {entry.patient for entry in entries}
    patient_parts: defaultdict[str, set[str]] = defaultdict(set)
    short: defaultdict[str, set[str]] = defaultdict(set)
    for patient in patients:
        names.wholes.update(_wholes(patient))
        for part in _parts(patient):
            patient_parts[part].add(patient)
        words = words_of(patient)
        if len(words) > 1 and not any(run.isdecimal() for run in runs_of(patient)):
            pairs = [pair for pair in permutations(words[:6], 2) if max(map(len, pair)) >= SHORTEST]
            names.wholes.update(pairs, [("".join(pair),) for pair in pairs], _wholes(" ".join(reversed(words))))
            for word in words:
                if len(word) == SHORTEST_OF_PERSON:
                    short[word].add(patient)

    def few(whose: set[str]) -> bool:
        return len(whose) == 1 or (len(whose) <= FEW and len(whose) * 4 <= len(patients))

    names.wholes.update(whole for whole, whose in path_wholes.items() if len(whose) == 1)
    names.parts.update(part for part, whose in path_parts.items() if len(whose | patient_parts.get(part, set())) == 1)
    names.parts.update(part for part, whose in patient_parts.items() if few(whose))
    names.capitals.update(part for part, whose in short.items() if few(whose))
    known = {word for text in ordinary for word in (*words_of(text), *runs_of(text))}
    names.parts.difference_update(known)
    names.capitals.difference_update(known)
    return names


def refuse_identifiers(
    entries: Sequence[Entry], name: str | None = None, topics: Sequence[str] = (), classes: Sequence[str] = ()
) -> None:
    """Refuse a set in whose reports, topics, labels, classes or name a name occurs, of whichever patient or file.

    What counts as one, and what is not found, this file's docstring says.

    Args:
        entries: of the source; messages name their `place`.
        name, topics, classes: as the user or the format gives them.

    Raises:
        InputError: with the place, and without the name.
    """
    names = names_of(entries, [*topics, *classes])
    for option, texts in (("--name", [name or ""]), ("--topics", topics), ("--classes", classes)):
        if any(names.has_whole(text) for text in texts) or (option == "--name" and names.parts_in(name or "")):
            raise InputError(f"{option}: holds a name of a patient, a folder or a file, or a part of one; change it")
    said: defaultdict[str, dict[str, str]] = defaultdict(dict)  # {part: {patient: first place}}
    for entry in entries:
        reports = [text for report in entry.reports for item in report.items() for text in item]
        for text in dict.fromkeys([entry.label or "", *reports]):
            if names.has_whole(text):
                raise InputError(
                    f"{entry.place}: a report, topic or label holds the name of a patient, a folder or a file; cut it"
                )
            for part in names.parts_in(text):
                said[part].setdefault(entry.patient, entry.place)
    for whose in said.values():
        if len(whose) <= FEW:
            raise InputError(
                f"{next(iter(whose.values()))}: a report, topic or label holds a part of a name of a patient, a folder "
                "or a file; cut it, or, where it is a word of the set, rename the file, or give it with --topics or "
                "--classes"
            )


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _wholes(name: str) -> set[tuple[str, ...]]:
    words, runs = words_of(name), runs_of(name)
    together = "".join(words)
    found = {tuple(words), (together,)} if len(together) >= SHORTEST else set()
    return found | ({tuple(runs)} if len("".join(runs)) >= SHORTEST else set())


def _parts(name: str) -> set[str]:
    words = {word for word in words_of(name) if not word.isdecimal()}  # of numbers, without their zeros
    return {part for part in words | set(runs_of(name)) if len(part) >= SHORTEST}
