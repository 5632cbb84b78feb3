"""Get WordNet for METEOR: `python -m mdnet_dist.metrics.wordnet [FOLDER]`. Standard library only.

Ways that are tried, in this order, each for a limited time:

1. nothing, if NLTK reads a WordNet already (in the folder, or in one of NLTK's own places);
2. the files of the Debian and Ubuntu package `wordnet-base`, if the package is installed;
3. NLTK's own downloader;
4. the package from the machine's configured Debian or Ubuntu archive, unpacked into a temporary folder: neither root
   nor an installation is needed.

The package lacks two files that NLTK reads, `lexnames` and `index.sense`; both follow from the others and are written
here (formats: WordNet's manual pages lexnames(5WN), senseidx(5WN) and wndb(5WN)).

Where every way fails, the program says so in one line and ends with 0: METEOR is then left out of the scores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mdnet_dist.errors import InputError
from mdnet_dist.program import run_program

DEFAULT_FOLDER = Path("runs/nltk_data")
DEBIAN_FOLDER = Path("/usr/share/wordnet")
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")  # in the order of their numbers, from 1

# Synsets are sorted into 45 files of the lexicographers, numbered in this order (lexnames(5WN)).
LEXICOGRAPHER_FILES = """
    adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition
    noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object
    noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape
    noun.state noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition
    verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession
    verb.social verb.stative verb.weather adj.ppl
"""

# Asked of a fresh process, so that the answer is about the files and not about what this process has loaded before.
_READ_TEST = """
import sys, nltk.data
nltk.data.path[:] = [sys.argv[1]] + (nltk.data.path if sys.argv[2] == "or elsewhere" else [])
from nltk.corpus import wordnet
sys.exit(not wordnet.synsets("dog"))
"""
_DOWNLOAD = "import nltk, sys; sys.exit(not nltk.download('wordnet', download_dir=sys.argv[1], quiet=True))"


class _Failed(Exception):
    """One way did not work; the message says why in a few words."""


def get_wordnet(folder: Path, timeout_s: float = 20.0, announce: Callable[[str], None] = lambda line: None) -> str:
    """Make WordNet readable for NLTK, in `folder` unless it is already.

    Args:
        folder: becomes a place for `NLTK_DATA` or `mdnet_dist.metrics.use_nltk_data`.
        timeout_s: limit of each attempt that uses the network.
        announce: is told what is being tried.

    Returns:
        One line: where WordNet is, or why there is none and how to get it.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = folder.resolve()  # the commands below run elsewhere
    if readable_by_nltk(folder, or_elsewhere=True):
        return "WordNet: NLTK reads it already, nothing to do"
    if refused := next((place for place in (folder, folder / "corpora") if _others_can_write(place)), None):
        return (
            f"WordNet: METEOR is left out of the scores, as NLTK reads nothing in {refused}: others can write to it; "
            f"`chmod go-w {refused}`, or name a folder of your own, then run this again"
        )
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=".wordnet-", suffix=".partial", dir=folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); name another folder for WordNet") from error
    failures = []
    try:
        for name, way in _ways(timeout_s):
            announce(f"WordNet: trying {name} ...")
            candidate = workspace / name.replace(" ", "-")
            candidate.mkdir(mode=0o755)
            try:
                way(candidate)
                _move_into_place(candidate, folder)
            except _Failed as error:
                failures.append(f"{name}: {error}")
            else:
                return f"WordNet: in {folder}, from {name}"
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return (
        f"WordNet: could not be had, so METEOR is left out of the scores ({'; '.join(failures)}). With a network, run "
        f"`python -m nltk.downloader -d {folder} wordnet`; without, copy {folder} from a machine that has it"
    )


def readable_by_nltk(folder: Path, or_elsewhere: bool = False) -> bool:
    """Whether NLTK reads WordNet in `folder`, or in one of its own places too."""
    command = [sys.executable, "-c", _READ_TEST, str(folder.resolve()), "or elsewhere" if or_elsewhere else "only"]
    test = subprocess.run(command, capture_output=True, check=False)
    return test.returncode == 0


def _others_can_write(folder: Path) -> bool:
    """NLTK's rule: a folder of data must belong to this user or root, and to nobody else to write to."""
    if not folder.is_dir():
        return False
    status = folder.stat()
    return bool(status.st_mode & 0o022) or status.st_uid not in (0, os.geteuid())


def build_corpus(source: Path, corpus: Path) -> None:
    """Copy WordNet's database files and add those that NLTK needs besides.

    Args:
        source: has `data.POS`, `index.POS` and `POS.exc` for the four parts of speech, `cntlist.rev` perhaps.
        corpus: the new folder `corpora/wordnet`.

    Raises:
        OSError: a file is missing or cannot be written.
        ValueError: a file is not in WordNet's format.
    """
    corpus.mkdir(parents=True)
    for part in PARTS_OF_SPEECH:
        for name in (f"data.{part}", f"index.{part}", f"{part}.exc"):
            shutil.copyfile(source / name, corpus / name)
    numbers = {part: number for number, part in enumerate(PARTS_OF_SPEECH, start=1)}
    lexnames = [
        f"{n:02d}\t{name}\t{numbers[name.split('.')[0]]}\n" for n, name in enumerate(LEXICOGRAPHER_FILES.split())
    ]
    (corpus / "lexnames").write_text("".join(lexnames), encoding="utf-8")
    for name in ("index.sense", "cntlist.rev"):
        if (source / name).is_file():
            shutil.copyfile(source / name, corpus / name)
    if not (corpus / "index.sense").exists():
        (corpus / "index.sense").write_text("".join(sorted(set(sense_index(corpus)))), encoding="utf-8")


def sense_index(corpus: Path) -> Iterator[str]:
    """Lines of `index.sense`: sense key, offset of the synset, number of the sense, times seen in tagged texts.

    A sense key is `lemma%type:file:id:head:head id`, the last two for satellites of an adjective only.
    """
    times_seen = {}
    if (corpus / "cntlist.rev").is_file():
        for line in (corpus / "cntlist.rev").read_text(encoding="utf-8").splitlines():
            key, _, times = line.split()
            times_seen[key] = times
    for part in PARTS_OF_SPEECH:
        sense_numbers = _sense_numbers(corpus / f"index.{part}")
        synsets = dict(_synsets(corpus / f"data.{part}"))
        for offset, (file_number, kind, words, head_offset) in synsets.items():
            head = head_id = ""
            if kind == "s":
                head, head_id = synsets[head_offset][2][0]
            for word, word_id in words:
                number = "nvars".index(kind) + 1
                key = f"{word}%{number}:{file_number}:{word_id}:{head}:{head_id}".lower()
                yield f"{key} {offset} {sense_numbers[word.lower(), offset]} {times_seen.get(key, '0')}\n"


_Synset = tuple[str, str, list[tuple[str, str]], str]  # file number, type, (word, two-digit id) of each word, head


def _synsets(path: Path) -> Iterator[tuple[str, _Synset]]:
    """(Offset, synset) of each line of a `data.POS` file. The head is what a satellite is similar to ('&')."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue  # the licence
        offset, file_number, kind, count, *rest = line.split(" | ")[0].split()
        end = 2 * int(count, 16)
        # "(a)", "(p)" and "(ip)" behind an adjective say where it may stand; they are not part of it.
        words = [(word.split("(")[0], f"{int(number, 16):02d}") for word, number in zip(rest[:end:2], rest[1:end:2])]
        pointers = rest[end + 1 : end + 1 + 4 * int(rest[end])]
        similar = [target for symbol, target in zip(pointers[::4], pointers[1::4]) if symbol == "&"]
        yield offset, (file_number, kind, words, similar[0] if similar else "")


def _sense_numbers(path: Path) -> dict[tuple[str, str], int]:
    """{(lemma, offset): number of the sense} of an `index.POS` file, which lists senses from the most frequent on."""
    numbers = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            lemma, _, count, *rest = line.split()
            for number, offset in enumerate(rest[-int(count) :], start=1):
                numbers[lemma, offset] = number
    return numbers


def _ways(timeout_s: float) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(Name, function that fills a given folder with `corpora/wordnet`) of each way, in order."""
    if DEBIAN_FOLDER.is_dir():
        yield "the installed wordnet-base", lambda candidate: _from_debian_files(DEBIAN_FOLDER, candidate)
    yield "nltk.downloader", lambda candidate: _from_nltk(candidate, timeout_s)
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        yield "the wordnet-base package", lambda candidate: _from_debian_archive(candidate, timeout_s)


def _from_debian_files(source: Path, candidate: Path) -> None:
    try:
        build_corpus(source, candidate / "corpora" / "wordnet")
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise _Failed(f"not WordNet's files ({type(error).__name__}: {error})") from error


def _from_nltk(candidate: Path, timeout_s: float) -> None:
    _command([sys.executable, "-c", _DOWNLOAD, str(candidate)], candidate, timeout_s)


def _from_debian_archive(candidate: Path, timeout_s: float) -> None:
    download = candidate / "download"
    (download / "lists" / "partial").mkdir(parents=True)
    # Its unprivileged download user, which root's apt-get switches to, could not write to our private folder.
    apt = ["apt-get", "-qq", "-o", "Acquire::Retries=0", "-o", "APT::Sandbox::User=root"]
    # Small container images come without package lists; a private copy needs no root.
    private = ["-o", f"Dir::State::lists={download / 'lists'}", "-o", f"Dir::Cache={download}"]
    try:
        _command([*apt, "download", "wordnet-base"], download, timeout_s)
    except _Failed as error:
        if "timed out" in str(error):
            raise
        _command([*apt, *private, "update"], download, timeout_s)
        _command([*apt, *private, "download", "wordnet-base"], download, timeout_s)
    packages = sorted(download.glob("wordnet-base_*.deb"))
    if not packages:
        raise _Failed("apt-get downloaded no package")
    _command(["dpkg-deb", "-x", str(packages[0]), "unpacked"], download, timeout_s)
    _from_debian_files(download / "unpacked" / DEBIAN_FOLDER.relative_to("/"), candidate)


def _command(command: list[str], folder: Path, timeout_s: float) -> None:
    """Run a command that must succeed in time, without a terminal to ask questions on."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            printed, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise _Failed(f"timed out after {timeout_s:g} s") from error
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its children, which would keep our pipes open
    if process.returncode != 0:
        said = " ".join((errors.strip() or printed).replace("[nltk_data]", "").split())
        raise _Failed(said[:160] or f"exit code {process.returncode}")


def _move_into_place(candidate: Path, folder: Path) -> None:
    """Check that NLTK reads what is under `candidate`, then rename it to its final name under `folder`."""
    corpora = candidate / "corpora"
    if not corpora.is_dir():
        raise _Failed("nothing came")
    for path in [corpora, *corpora.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # NLTK reads nothing that a group may write to
    if not readable_by_nltk(candidate):
        raise _Failed("NLTK does not read the files")
    target = folder / "corpora"
    target.mkdir(mode=0o755, exist_ok=True)
    for path in sorted(corpora.iterdir()):
        final = target / path.name
        try:
            if final.exists():  # a WordNet that NLTK could not read
                final.rename(candidate / f"unreadable-{path.name}")
            path.rename(final)
        except OSError as error:
            if not final.exists():
                raise _Failed(f"cannot be written under {target} ({error.strerror})") from error
            # Another process was faster; what it put there was checked as ours was.


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mdnet_dist.metrics.wordnet", description="Get WordNet for METEOR.")
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER, help="where to (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=20.0, help="limit of each attempt (default: %(default)s)")
    arguments = parser.parse_args()
    terminal = sys.stderr.isatty()
    print(
        get_wordnet(
            arguments.folder,
            arguments.timeout_s,
            announce=lambda line: print(line, file=sys.stderr, flush=True) if terminal else None,
        )
    )


if __name__ == "__main__":
    run_program(main)
