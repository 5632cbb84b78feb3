"""METEOR, and getting the WordNet that it needs. No test here uses the network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nltk.data
import pytest
from nltk.corpus import wordnet as nltk_wordnet

from mdnet_dist.errors import InputError
from mdnet_dist.metrics import (
    ScoredImage,
    mean_meteor,
    meteor,
    meteor_unavailable_reason,
    score_reports,
    use_nltk_data,
    wordnet,
)
from mdnet_dist.metrics.wordnet import build_corpus, get_wordnet, readable_by_nltk
from tests.conftest import REPOSITORY

# part: [(words, lexicographer file, type, index of the adjective that a satellite is similar to, in the same part)]
Small = dict[str, list[tuple[list[str], int, str, int | None]]]
SMALL: Small = {
    "noun": [(["dog", "hound"], 5, "n", None), (["cell"], 8, "n", None), (["dog", "frump"], 18, "n", None)],
    "verb": [(["show", "demonstrate"], 39, "v", None)],
    "adj": [(["great"], 0, "a", None), (["marked(p)", "pronounced"], 0, "s", 0)],
    "adv": [(["very"], 2, "r", None)],
}
OWN_PLACES = tuple(nltk.data.path)
LICENCE = "  1 WordNet 3.0 Copyright 2006 by nobody: a few invented synsets in the right format  \n"


def write_small_wordnet(folder: Path) -> None:
    """The files of Debian's wordnet-base, with the synsets of `SMALL` (format: wndb(5WN))."""
    folder.mkdir(parents=True)
    for part, synsets in SMALL.items():
        offsets: list[int] = []
        for _ in range(2):  # the second time with the true offsets; the lengths stay
            known = offsets or [0] * len(synsets)
            offsets, text = [], LICENCE
            for (words, file_number, kind, head), offset in zip(synsets, known):
                listed = " ".join(f"{word} 0" for word in words)
                pointers = "000" if head is None else f"001 & {known[head]:08d} a 0000"
                frames = " 01 + 08 00" if part == "verb" else ""
                offsets.append(len(text))
                text += (
                    f"{offset:08d} {file_number:02d} {kind} {len(words):02x} {listed} {pointers}{frames} | a thing  \n"
                )
        (folder / f"data.{part}").write_text(text)
        senses: dict[str, list[str]] = {}
        for (words, *_), offset in zip(synsets, offsets):
            for word in words:
                senses.setdefault(word.removesuffix("(p)"), []).append(f"{offset:08d}")
        index = [
            f"{word} {part[0] if part[:2] != 'ad' else {'adj': 'a', 'adv': 'r'}[part]} {len(found)} 0 {len(found)} 0 "
            f"{' '.join(found)}  \n"
            for word, found in sorted(senses.items())
        ]
        (folder / f"index.{part}").write_text(LICENCE + "".join(index))
        (folder / f"{part}.exc").write_text("mice mouse\n")
    (folder / "cntlist.rev").write_text("dog%1:05:00:: 1 42\n")


@pytest.fixture(scope="session")
def debian_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("debian") / "wordnet"
    write_small_wordnet(folder)
    return folder


@pytest.fixture(scope="session")
def small_wordnet(tmp_path_factory, debian_files):
    """A folder of NLTK data with the small WordNet."""
    folder = tmp_path_factory.mktemp("small") / "nltk_data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wordnet, "DEBIAN_FOLDER", debian_files)
        patch.setattr(wordnet, "readable_by_nltk", only_in_the_folder)
        assert get_wordnet(folder) == f"WordNet: in {folder}, from the installed wordnet-base"
    return folder


def only_in_the_folder(folder: Path, or_elsewhere: bool = False) -> bool:
    """The test machine may have a WordNet of its own; and asking a new process takes two seconds."""
    return (folder / "corpora").exists() and readable_by_nltk(folder)


def forget_wordnet() -> None:
    if meteor._open_wordnet.cache_info().currsize:
        reader = meteor._open_wordnet().synsets.__wrapped__.__self__
        for file in reader._data_file_map.values():  # open for as long as a program runs
            file.close()
    meteor._open_wordnet.cache_clear()
    if type(nltk_wordnet).__name__ != "LazyCorpusLoader":
        nltk_wordnet._unload()


@pytest.fixture
def nltk_places(monkeypatch):
    """The list of NLTK's places, empty; whatever NLTK had loaded is forgotten before and after."""
    places: list[str] = []
    monkeypatch.setattr(nltk.data, "path", places)
    forget_wordnet()
    yield places
    forget_wordnet()


def words(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


# METEOR


def test_meteor_of_a_worked_example(nltk_places, small_wordnet):
    use_nltk_data(small_wordnet)
    assert meteor_unavailable_reason() is None
    # "barks" and "barked" share a stem, dog and hound are synonyms, "the" and "a" are nothing: 2 of 3 words match.
    # P = R = 2/3, F = 2/3. They stand side by side in both texts: 1 chunk of 2 words, penalty 0.5 * (1/2)^3 = 0.0625.
    assert mean_meteor(words("the dog barks"), [words("a hound barked")]) == pytest.approx(2 / 3 * 0.9375)
    # The better reference counts: all 3 match in 1 chunk, penalty 0.5 * (1/3)^3. The mean is over images.
    perfect = 1 - 0.5 / 27
    both = [words("a hound barked", "the dog barks"), words("nothing alike")]
    assert mean_meteor(words("the dog barks", "cells show atypia"), both) == pytest.approx((perfect + 0) / 2)
    assert mean_meteor([[]], [words("the dog")]) == 0


def test_meteor_does_not_depend_on_the_order(nltk_places, small_wordnet):
    use_nltk_data(small_wordnet)
    hypotheses = words(*(f"the dog shows {number} cells" for number in range(20)))
    references = [words(f"a hound demonstrated {number % 7} cell", "the cell") for number in range(20)]
    assert mean_meteor(hypotheses, references) == mean_meteor(hypotheses[::-1], references[::-1])


def test_meteor_is_left_out_where_wordnet_is_absent(nltk_places, tmp_path):
    image = ScoredImage(key="a", label=None, predicted_label=None, report={"t": "dog"}, references=[{"t": "dog"}])
    scores = score_reports([image], ["t"], {}, [], nltk_data=tmp_path / "nowhere")
    assert scores["rouge_l"] == 1 and "meteor" not in scores
    assert mean_meteor(words("a"), [words("a")]) is None
    reason = meteor_unavailable_reason()
    assert reason is not None and "\n" not in reason
    assert reason.startswith("METEOR is left out: NLTK finds no WordNet") and "mdnet_dist.metrics.wordnet" in reason


def test_meteor_appears_once_wordnet_does(nltk_places, debian_files, tmp_path):
    use_nltk_data(tmp_path)
    assert mean_meteor(words("a"), [words("a")]) is None
    build_corpus(debian_files, tmp_path / "corpora" / "wordnet")
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert mean_meteor(words("a"), [words("a")]) == 0.5  # 1 word, 1 chunk: penalty 0.5


def test_the_reason_names_a_folder_that_others_can_write_to(nltk_places, small_wordnet):
    small_wordnet.chmod(0o775)
    try:
        use_nltk_data(small_wordnet)
        assert f"'{small_wordnet}'" in str(meteor_unavailable_reason())
    finally:
        small_wordnet.chmod(0o755)


def test_the_reason_names_damage(nltk_places, debian_files, tmp_path):
    build_corpus(debian_files, tmp_path / "corpora" / "wordnet")
    (tmp_path / "corpora" / "wordnet" / "lexnames").unlink()
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    use_nltk_data(tmp_path)
    assert "cannot read its WordNet" in str(meteor_unavailable_reason())
    assert "lexnames" in str(meteor_unavailable_reason())


@pytest.mark.slow
def test_meteor_with_the_whole_wordnet_equals_nltk_without_our_caches(nltk_places):
    nltk_places.extend(OWN_PLACES)
    use_nltk_data(REPOSITORY / "runs" / "nltk_data")  # where `make train` puts it
    if meteor_unavailable_reason() is not None:
        pytest.skip(str(meteor_unavailable_reason()))
    from nltk.translate.meteor_score import meteor_score

    hypotheses = words("pronounced variability of the nuclei is displayed", "the cells are crowded to a mild degree")
    references = [
        words("marked variability in nuclear size is shown", "nuclei show marked pleomorphism"),
        words("mild crowding of cells", "there is a mild degree of crowding"),
    ]
    plain = [meteor_score(texts, hypothesis) for texts, hypothesis in zip(references, hypotheses)]
    assert mean_meteor(hypotheses, references) == pytest.approx(sum(plain) / 2)
    no_synonyms = SimpleNamespace(synsets=lambda word: [])  # "pronounced" and "marked" are
    assert plain[0] > meteor_score(references[0], hypotheses[0], wordnet=no_synonyms)


# Getting WordNet


def test_the_sense_index_leads_nltk_from_every_key_to_its_word(nltk_places, small_wordnet):
    use_nltk_data(small_wordnet)
    lines = (small_wordnet / "corpora" / "wordnet" / "index.sense").read_text().splitlines()
    assert lines == sorted(lines)
    lemmas = [lemma for synset in nltk_wordnet.all_synsets() for lemma in synset.lemmas()]
    assert sorted(lemma.key() for lemma in lemmas) == [line.split()[0] for line in lines]
    assert len(lemmas) == sum(len(synset[0]) for synsets in SMALL.values() for synset in synsets) == 11
    synset_of = {lemma.key(): f"{lemma.synset().offset():08d}-{lemma.synset().pos()}" for lemma in lemmas}
    assert nltk_wordnet.index_sense() == synset_of
    # Lemma, type 1 (noun), file 18 (noun.person), id 0; the second sense of "dog", never seen in tagged texts.
    assert [line.split()[2:] for line in lines if line.startswith("dog%1:18:00::")] == [["2", "0"]]
    assert [line.split()[2:] for line in lines if line.startswith("dog%1:05:00::")] == [["1", "42"]]
    # A satellite (type 5) names its head, and has lost its "(p)".
    assert any(line.startswith("marked%5:00:00:great:00 ") for line in lines)
    assert nltk_wordnet.synsets("hound")[0].lexname() == "noun.animal"


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """No WordNet anywhere, no downloader, no package manager; what is put aside is accepted if it has the files."""
    monkeypatch.setattr(wordnet, "DEBIAN_FOLDER", Path("/nonexistent/share/wordnet"))
    monkeypatch.setattr(wordnet, "_DOWNLOAD", "import sys; sys.exit('no network here')")
    monkeypatch.setattr(
        wordnet, "readable_by_nltk", lambda folder, or_elsewhere=False: any(folder.glob("corpora/wordnet/index.sense"))
    )
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    for name in ("apt-get", "dpkg-deb"):
        write_command(commands / name, "echo 'E: no network here either' >&2; exit 100")
    return commands


def write_command(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_where_every_way_fails_one_line_says_so_and_nothing_is_left(bare_machine, tmp_path):
    line = get_wordnet(tmp_path / "nltk_data")
    assert "\n" not in line and "METEOR is left out" in line
    assert "nltk.downloader: no network here;" in line and "package: E: no network here either" in line
    assert f"nltk.downloader -d {tmp_path / 'nltk_data'} wordnet" in line
    assert list((tmp_path / "nltk_data").iterdir()) == []


def test_a_way_that_hangs_is_given_up(bare_machine, monkeypatch, tmp_path):
    monkeypatch.setattr(wordnet, "_DOWNLOAD", "import time; time.sleep(60)")
    write_command(bare_machine / "apt-get", "sleep 60 & wait")  # a child of a child
    line = get_wordnet(tmp_path / "nltk_data", timeout_s=0.5)
    assert line.count("timed out") == 2


def test_the_package_is_fetched_with_private_lists_where_the_machine_has_none(bare_machine, debian_files, tmp_path):
    # An apt-get that finds the package only after an update of the lists it is told to use.
    write_command(
        bare_machine / "apt-get",
        'case "$*" in\n'
        "  *Dir::State::lists=*update) touch lists/updated ;;\n"
        "  *Dir::State::lists=*download*) test -f lists/updated && touch wordnet-base_1_all.deb ;;\n"
        '  *) echo "E: Unable to locate package" >&2; exit 100 ;;\n'
        "esac",
    )
    write_command(
        bare_machine / "dpkg-deb",
        f'mkdir -p "$3/nonexistent/share" && cp -r {debian_files} "$3/nonexistent/share/wordnet"',
    )
    folder = tmp_path / "nltk_data"
    announced: list[str] = []
    assert get_wordnet(folder, announce=announced.append) == f"WordNet: in {folder}, from the wordnet-base package"
    assert announced == ["WordNet: trying nltk.downloader ...", "WordNet: trying the wordnet-base package ..."]
    assert [path.name for path in folder.iterdir()] == ["corpora"]
    assert (folder / "corpora" / "wordnet" / "index.sense").read_text().startswith("cell%1:08:00:: ")


def test_a_downloader_that_brings_nothing_is_no_success(bare_machine, monkeypatch, tmp_path):
    monkeypatch.setattr(wordnet, "_DOWNLOAD", "")
    assert "nltk.downloader: nothing came;" in get_wordnet(tmp_path / "nltk_data")


def test_a_download_that_nltk_cannot_read_is_not_kept(bare_machine, monkeypatch, tmp_path):
    monkeypatch.setattr(
        wordnet, "_DOWNLOAD", "import pathlib; pathlib.Path('corpora/wordnet').mkdir(parents=True, mode=0o777)"
    )
    line = get_wordnet(tmp_path / "nltk_data")
    assert "nltk.downloader: NLTK does not read the files" in line
    assert list((tmp_path / "nltk_data").iterdir()) == []


def test_an_unreadable_wordnet_is_replaced(bare_machine, monkeypatch, debian_files, tmp_path):
    broken = tmp_path / "nltk_data" / "corpora" / "wordnet"
    broken.mkdir(parents=True, mode=0o755)
    for path in (broken.parent.parent, broken.parent):
        path.chmod(0o755)
    (broken / "data.noun").write_text("half of i")
    monkeypatch.setattr(wordnet, "DEBIAN_FOLDER", debian_files)
    assert "from the installed wordnet-base" in get_wordnet(tmp_path / "nltk_data")
    assert (broken / "data.noun").read_text() == (debian_files / "data.noun").read_text()
    assert sorted(path.name for path in broken.parent.parent.rglob("*.partial")) == []


def test_a_package_of_another_format_is_refused(bare_machine, monkeypatch, debian_files, tmp_path):
    (tmp_path / "odd").mkdir()
    for path in debian_files.iterdir():
        (tmp_path / "odd" / path.name).write_text("not a synset\n" if path.name == "data.verb" else path.read_text())
    monkeypatch.setattr(wordnet, "DEBIAN_FOLDER", tmp_path / "odd")
    assert "the installed wordnet-base: not WordNet's files (" in get_wordnet(tmp_path / "nltk_data")


def test_a_folder_that_others_can_write_to_is_named(bare_machine, tmp_path):
    folder = tmp_path / "nltk_data"
    folder.mkdir()
    folder.chmod(0o777)
    assert f"`chmod go-w {folder}`" in get_wordnet(folder)


def test_a_folder_that_cannot_be_made_is_the_users_error(bare_machine, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be written"):
        get_wordnet(tmp_path / "file")


def test_the_command_does_nothing_where_wordnet_is_readable_and_says_so(small_wordnet):
    before = sorted(small_wordnet.rglob("*"))
    command = [sys.executable, "-m", "mdnet_dist.metrics.wordnet", str(small_wordnet)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "WordNet: NLTK reads it already, nothing to do\n"
    assert sorted(small_wordnet.rglob("*")) == before
