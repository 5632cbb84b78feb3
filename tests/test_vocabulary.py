"""Words to numbers and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdnet_dist.vocabulary import END, PAD, SPECIAL_WORDS, START, UNKNOWN, Vocabulary, tokenize

TEXT = st.text(max_size=60) | st.text("abÄß9 .-'/%_,;\n\u2028\u0130", max_size=40)
WORDS = st.lists(st.text("abcde", min_size=1, max_size=3), unique=True, max_size=20)


@pytest.mark.parametrize(
    ("sentence", "tokens"),
    [
        ("Slight variability, mild pleomorphism.", "slight variability mild pleomorphism"),
        ("Ground-glass opacity in the patient's left lobe", "ground-glass opacity in the patient's left lobe"),
        ("1.5 cm (3/5), 80% of T2-weighted.", "1.5 cm 3/5 80% of t2-weighted"),
        ("-dash- 'quoted' ...", "dash quoted"),
        ("XXXX_YYYY", "xxxx yyyy"),
        ("Kern\u00e4ssig \u6838\u5206\u88c2", "kern\u00e4ssig \u6838\u5206\u88c2"),
        ("\u041c\u0438\u0442\u043e\u0437", "\u043c\u0438\u0442\u043e\u0437"),
        ("end.Start of.the", "end.start of.the"),
        ("<unk> <end> <pad>", "unk end pad"),
        ("", ""),
        ("...!?", ""),
    ],
)
def test_sentences_become_words_without_punctuation(sentence: str, tokens: str) -> None:
    assert tokenize(sentence) == tokens.split()


@given(TEXT)
def test_tokens_are_words_that_are_tokens_again(sentence: str) -> None:
    """So a sentence put together from tokens is scored as the tokens it was made of."""
    tokens = tokenize(sentence)
    assert all(token and not token.isspace() and " " not in token for token in tokens)
    assert tokenize(" ".join(tokens)) == tokens
    assert not set(tokens) & set(SPECIAL_WORDS), "a report could write a special word"


@given(TEXT)
def test_case_and_space_do_not_matter(sentence: str) -> None:
    assert tokenize(f"  {sentence.lower()}\n") == tokenize(sentence)


def test_special_words_come_first() -> None:
    vocabulary = Vocabulary(["b", "a"])
    assert (PAD, START, END, UNKNOWN) == (0, 1, 2, 3)
    assert vocabulary.words == (*SPECIAL_WORDS, "b", "a")
    assert len(vocabulary) == 6
    assert [vocabulary.words[number] for number in (PAD, START, END, UNKNOWN)] == ["<pad>", "<start>", "<end>", "<unk>"]


@given(WORDS, st.data())
def test_known_words_survive(words: list[str], data: st.DataObject) -> None:
    vocabulary = Vocabulary(words)
    tokens = data.draw(st.lists(st.sampled_from(words), max_size=10)) if words else []
    numbers = vocabulary.encode(tokens)
    assert numbers[-1] == END and numbers.count(END) == 1
    assert len(numbers) == len(tokens) + 1
    assert vocabulary.decode(numbers) == tokens
    assert vocabulary.decode([START, *numbers, PAD, PAD]) == tokens


@given(WORDS, st.lists(st.text("abcdefgh", min_size=1, max_size=3), max_size=10))
def test_words_nobody_knows_become_unknown(words: list[str], tokens: list[str]) -> None:
    vocabulary = Vocabulary(words)
    told = vocabulary.decode(vocabulary.encode(tokens))
    assert told == [token if token in words else "<unk>" for token in tokens]


@given(WORDS, st.lists(st.integers(0, 23), max_size=20))
def test_decoding_ends_at_the_first_end(words: list[str], numbers: list[int]) -> None:
    vocabulary = Vocabulary(words)
    numbers = [number % len(vocabulary) for number in numbers]
    said = numbers[: numbers.index(END)] if END in numbers else numbers
    assert vocabulary.decode(numbers) == [vocabulary.words[n] for n in said if n not in (PAD, START)]
    assert vocabulary.decode(iter(numbers)) == vocabulary.decode(numbers)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 5)), st.integers(1, 6))
def test_rare_words_are_left_out(counts: dict[str, int], least: int) -> None:
    vocabulary = Vocabulary.from_counts(counts, least)
    assert list(vocabulary.words[4:]) == sorted(word for word in counts if counts[word] >= least)
    assert vocabulary == Vocabulary.from_counts(dict(reversed(counts.items())), least)


def test_equal_vocabularies_are_equal() -> None:
    assert Vocabulary(["a", "b"]) == Vocabulary(iter(["a", "b"]))
    assert hash(Vocabulary(["a"])) == hash(Vocabulary(["a"]))
    assert Vocabulary(["a", "b"]) != Vocabulary(["b", "a"])
    assert Vocabulary([]) != ("<pad>", "<start>", "<end>", "<unk>")


@pytest.mark.parametrize("words", [["a", "a"], ["<pad>"], ["a", "<unk>"]])
def test_repeats_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="must not repeat a word"):
        Vocabulary(words)
