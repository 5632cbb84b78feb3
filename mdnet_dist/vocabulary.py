"""Words to numbers and back. The same tokens are used for training, for decoding and for scoring.

Tokens follow the coco-caption practice that published report scores use: lower case, punctuation dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

PAD, START, END, UNKNOWN = 0, 1, 2, 3
SPECIAL_WORDS = ("<pad>", "<start>", "<end>", "<unk>")

# Letters and digits of any script; a hyphen, apostrophe, point, slash or percent sign stays inside a word only
# ("ground-glass", "patient's", "1.5", "3/5"). The underscore is punctuation.
_WORD = re.compile(r"[^\W_]+(?:[-'./][^\W_]+)*%?")


def tokenize(sentence: str) -> list[str]:
    """Split a sentence into lower-case words without punctuation.

    >>> tokenize("Slight variability in nuclear size, consistent with mild pleomorphism.")
    ['slight', 'variability', 'in', 'nuclear', 'size', 'consistent', 'with', 'mild', 'pleomorphism']
    """
    return _WORD.findall(sentence.lower())


class Vocabulary:
    """A fixed list of words; the four special words come first, so that `PAD` is 0."""

    def __init__(self, words: Iterable[str]) -> None:
        """Args: words: in the order of their numbers, without the special words and without repeats."""
        self.words: tuple[str, ...] = (*SPECIAL_WORDS, *words)
        self._number = {word: number for number, word in enumerate(self.words)}
        if len(self._number) != len(self.words):
            raise ValueError("a vocabulary must not repeat a word")

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_count: int = 1) -> Vocabulary:
        """The sorted words that occur at least `min_count` times."""
        return cls(sorted(word for word, count in counts.items() if count >= min_count))

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.words == self.words

    def __hash__(self) -> int:
        return hash(self.words)

    def encode(self, tokens: Sequence[str]) -> list[int]:
        """Numbers of the tokens, with `END` behind them and no `START` before; unknown words become `UNKNOWN`."""
        return [self._number.get(token, UNKNOWN) for token in tokens] + [END]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Words up to the first `END`, without special words other than `UNKNOWN`."""
        words = []
        for number in numbers:
            if number == END:
                break
            if number not in (PAD, START):
                words.append(self.words[number])
        return words
