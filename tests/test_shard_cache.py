"""The cache of downloaded shards: right bytes are handed out, the folder stays below its cap, nobody waits for ever."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnet_dist import shard_cache
from mdnet_dist.errors import InputError
from mdnet_dist.shard_cache import ShardCache

FORK = multiprocessing.get_context("fork")


def content_of(number: int, size: int = 1000) -> bytes:
    return random.Random(number).randbytes(size)


def name_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Origin:
    """Where downloads come from; counts them."""

    def __init__(self) -> None:
        self.downloads = 0

    def of(self, content: bytes) -> Callable[[BinaryIO], None]:
        def download(file: BinaryIO) -> None:
            self.downloads += 1
            assert file.seek(0, os.SEEK_END) == len(content), "the room is reserved before the first byte"
            file.seek(0)
            file.write(content)

        return download


@pytest.fixture
def origin() -> Origin:
    return Origin()


def get(cache: ShardCache, content: bytes, origin: Origin) -> bytes:
    with cache.get(name_of(content), len(content), origin.of(content)) as file:
        return file.read()


def must_not_download(file: BinaryIO) -> None:
    raise AssertionError("this shard is in the cache")


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def bytes_in(folder: Path) -> int:
    """Size of all shards and downloads, at one moment: the cache changes nothing while its lock is held."""
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.lstat().st_size for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------- one process


def test_a_shard_is_downloaded_once_and_survives_restarts(tmp_path: Path, origin: Origin) -> None:
    contents = [content_of(number) for number in range(3)]
    for _ in range(3):
        cache = ShardCache(tmp_path / "made" / "here", 1 << 20)
        assert [get(cache, content, origin) for content in contents * 2] == contents * 2
        assert origin.downloads == 3
    assert files_in(tmp_path / "made" / "here") == {f"{name_of(content)}.tar" for content in contents}


def test_an_empty_shard_is_one(tmp_path: Path, origin: Origin) -> None:
    cache = ShardCache(tmp_path, 10)
    assert [get(cache, b"", origin), get(cache, b"", origin), origin.downloads] == [b"", b"", 1]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_least_recently_used_goes_first_and_the_cap_holds(data, tmp_path_factory) -> None:
    """Against a model: a list in the order of use, cut from the front until the newcomer fits."""
    folder = tmp_path_factory.mktemp("cache")
    sizes = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=6))
    contents = [content_of(number, size) for number, size in enumerate(sizes)]
    cap = data.draw(st.integers(max(sizes), sum(sizes)))
    origin, held = Origin(), []
    for number in data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=15)):
        if number in held:
            held.remove(number)
        else:
            while sum(sizes[old] for old in held) + sizes[number] > cap:
                held.pop(0)
        held.append(number)
        # A new object each time: what counts lies in the folder.
        assert get(ShardCache(folder, cap), contents[number], origin) == contents[number]
        assert files_in(folder) == {f"{name_of(contents[old])}.tar" for old in held}
        assert bytes_in(folder) <= cap


def test_a_reader_keeps_what_makes_room(tmp_path: Path, origin: Origin) -> None:
    first, second = content_of(1), content_of(2)
    cache = ShardCache(tmp_path, 1500)
    with cache.get(name_of(first), 1000, origin.of(first)) as file:
        assert file.read(10) == first[:10]
        get(cache, second, origin)
        assert files_in(tmp_path) == {f"{name_of(second)}.tar"}
        assert file.read() == first[10:]


def test_what_is_not_the_caches_is_left_alone_and_not_counted(tmp_path: Path, origin: Origin) -> None:
    mine = tmp_path / "notes.tar"
    mine.write_bytes(bytes(5000))
    cache = ShardCache(tmp_path, 1000)
    for number in range(3):
        get(cache, content_of(number), origin)
    assert mine.stat().st_size == 5000


def test_a_file_of_the_wrong_size_is_fetched_again(tmp_path: Path, origin: Origin) -> None:
    content = content_of(1)
    cache = ShardCache(tmp_path, 5000)
    get(cache, content, origin)
    for damaged in (content[:-1], content + b"\0", b""):
        (tmp_path / f"{name_of(content)}.tar").write_bytes(damaged)
        assert get(cache, content, origin) == content
    assert origin.downloads == 4


@pytest.mark.parametrize("place", [0, 499, 999])
@pytest.mark.parametrize("linked", [False, True])
def test_a_flipped_byte_is_found_by_the_next_process(tmp_path: Path, origin: Origin, place: int, linked: bool) -> None:
    content = content_of(1)
    path = tmp_path / "cache" / f"{name_of(content)}.tar"
    get(ShardCache(tmp_path / "cache", 5000), content, origin)
    flipped = bytearray(content)
    flipped[place] ^= 1
    path.write_bytes(flipped)
    if linked:
        path.symlink_to(path.rename(tmp_path / "elsewhere"))
    assert get(ShardCache(tmp_path / "cache", 5000), content, origin) == content
    assert origin.downloads == 2
    assert path.read_bytes() == content


def test_the_checksum_is_computed_once_in_a_process(tmp_path: Path, origin: Origin, monkeypatch) -> None:
    content, computed = content_of(1), []
    monkeypatch.setattr(shard_cache, "digest_of", lambda file: computed.append(1) or name_of(file.read()))
    get(ShardCache(tmp_path, 5000), content, origin)
    assert not computed, "what was downloaded was compared on the way"
    cache = ShardCache(tmp_path, 5000)
    assert [get(cache, content, origin) for _ in range(3)] == [content] * 3
    assert computed == [1]


def test_leftovers_of_killed_downloads_make_room(tmp_path: Path, origin: Origin) -> None:
    contents = [content_of(number) for number in range(3)]
    for content in contents[:2]:
        (tmp_path / f"{name_of(content)}.partial").write_bytes(content[:400] + bytes(600))
    cache = ShardCache(tmp_path, 1000)
    assert get(cache, contents[2], origin) == contents[2]
    assert files_in(tmp_path) == {f"{name_of(contents[2])}.tar"}
    assert get(cache, contents[0], origin) == contents[0]


def test_a_leftover_of_the_same_shard_is_overwritten(tmp_path: Path, origin: Origin) -> None:
    content = content_of(1)
    (tmp_path / f"{name_of(content)}.partial").write_bytes(bytes(3000))
    assert get(ShardCache(tmp_path, 1000), content, origin) == content
    assert (tmp_path / f"{name_of(content)}.tar").read_bytes() == content
    assert files_in(tmp_path) == {f"{name_of(content)}.tar"}


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "/" + "a" * 63]
)
def test_what_is_no_checksum_names_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is not a SHA-256 of 64 hexadecimal digits; build the shard set again"):
        ShardCache(tmp_path / "cache", 5000).get(name, 10, must_not_download)
    assert not (tmp_path / "cache").exists()


def test_a_cap_below_one_shard_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        ShardCache(tmp_path, 999).get("a" * 64, 1000, must_not_download)
    assert str(caught.value) == (
        f"{tmp_path}: data.cache_gib allows 999 bytes, but a shard has 1,000; allow several times as much"
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        ShardCache(tmp_path / "file" / "cache", 5000).get("a" * 64, 1000, must_not_download)
    assert str(caught.value) == (
        f"{tmp_path / 'file' / 'cache'}: cannot keep a shard of 1,000 bytes: Not a directory; data.cache names a "
        "folder that can be written, with room for data.cache_gib"
    )


def read_only(number: int, *arguments: object) -> None:
    raise OSError(number, os.strerror(number))


def test_a_full_disk_is_found_before_the_download(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: read_only(errno.ENOSPC))
    with pytest.raises(InputError, match="cannot keep a shard of 1,000 bytes: No space left on device;"):
        ShardCache(tmp_path, 5000).get("a" * 64, 1000, must_not_download)
    assert files_in(tmp_path) == set()


def test_a_file_system_that_cannot_reserve_is_used_without(tmp_path: Path, origin: Origin, monkeypatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: read_only(errno.EOPNOTSUPP))
    assert get(ShardCache(tmp_path, 5000), content_of(1), origin) == content_of(1)

    def fills_the_disk(file: BinaryIO) -> None:
        file.write(b"half")
        read_only(errno.ENOSPC)

    with pytest.raises(InputError, match="No space left on device"):
        ShardCache(tmp_path, 5000).get("a" * 64, 1000, fills_the_disk)
    assert files_in(tmp_path) == {f"{name_of(content_of(1))}.tar"}


def test_a_real_limit_of_the_file_size(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(InputError, match="cannot keep a shard of 100,000 bytes: File too large"):
            ShardCache(tmp_path, 1 << 20).get("a" * 64, 100_000, must_not_download)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files_in(tmp_path) == set()


def test_a_folder_that_can_only_be_read_serves_what_it_holds(tmp_path: Path, origin: Origin, monkeypatch) -> None:
    content = content_of(1)
    get(ShardCache(tmp_path, 5000), content, origin)
    system_open = os.open

    def refuse_writing(path, flags, *rest, **named):
        return read_only(errno.EROFS) if flags & (os.O_RDWR | os.O_CREAT) else system_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse_writing)
    monkeypatch.setattr(os, "utime", lambda *_, **__: read_only(errno.EROFS))
    with ShardCache(tmp_path, 5000).get(name_of(content), 1000, must_not_download) as file:
        assert file.read() == content
    with pytest.raises(InputError, match="cannot keep a shard of 1,000 bytes: Read-only file system;"):
        ShardCache(tmp_path, 5000).get("a" * 64, 1000, must_not_download)


@pytest.mark.parametrize("failure", [InputError("no such file"), KeyboardInterrupt(), ValueError("a mistake of ours")])
def test_a_failed_download_leaves_nothing(tmp_path: Path, origin: Origin, failure: BaseException) -> None:
    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        raise failure

    content = content_of(1)
    cache = ShardCache(tmp_path, 5000)
    with pytest.raises(type(failure)):
        cache.get(name_of(content), 1000, fails)
    assert files_in(tmp_path) == set()
    assert get(cache, content, origin) == content


def test_no_file_stays_open(tmp_path: Path, origin: Origin) -> None:
    def fails(file: BinaryIO) -> None:
        raise InputError("no such file")

    before = len(list(Path("/proc/self/fd").iterdir()))
    cache = ShardCache(tmp_path, 2500)
    for number in range(20):
        get(cache, content_of(number % 4), origin)
        with pytest.raises(InputError, match="no such file"):
            cache.get("a" * 64, 1000, fails)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# ------------------------------------------------------------------------------------------- several processes


def started(target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def ended(*processes: multiprocessing.process.BaseProcess, seconds: float = 60) -> list[int | None]:
    """Exit codes; a process that does not end is one that waits for ever."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail("a process has not ended")
    return [process.exitcode for process in processes]


def slowly(content: bytes, begun: Path, seconds: float) -> Callable[[BinaryIO], None]:
    """A download that notes in a file that it was begun."""

    def download(file: BinaryIO) -> None:
        with open(begun, "a") as note:
            note.write(f"{os.getpid()}\n")
        file.seek(0)
        for place in range(0, len(content), 100):
            file.write(content[place : place + 100])
            file.flush()
            time.sleep(seconds / (len(content) / 100))

    return download


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_all_often(folder: Path, cap: int, contents: list[bytes], rounds: int, seed: int, begun: Path) -> None:
    """Read all shards in random order, up to three of them open at a time."""
    cache, rng, opened = ShardCache(folder, cap), random.Random(seed), []
    for _ in range(rounds):
        for number in rng.sample(range(len(contents)), len(contents)):
            content = contents[number]
            opened.append((cache.get(name_of(content), len(content), slowly(content, begun, 0.005)), content))
            while len(opened) > rng.randrange(4):
                file, expected = opened.pop(0)
                with file:
                    assert file.read() == expected


@pytest.mark.slow
@pytest.mark.parametrize("room", [1.0, 2.5, 6.0])
def test_processes_share_a_folder_too_small_for_all(tmp_path: Path, room: float) -> None:
    contents = [content_of(number, 1500 + 100 * number) for number in range(6)]
    cap, folder, begun = int(room * 2000), tmp_path / "cache", tmp_path / "begun"
    readers = [started(read_all_often, folder, cap, contents, 8, seed, begun) for seed in range(4)]
    wait_for(folder.is_dir)
    largest = samples = 0
    while any(reader.is_alive() for reader in readers):
        largest, samples = max(largest, bytes_in(folder)), samples + 1
        time.sleep(0.002)
    assert ended(*readers) == [0] * 4
    assert samples > 3
    assert 0 < largest <= cap
    assert not [name for name in files_in(folder) if name.endswith(".partial")]
    downloads = len(begun.read_text().split())
    if room == 6.0:
        assert downloads == 6
    assert downloads < 4 * 8 * 6


@pytest.mark.slow
def test_one_downloads_and_the_others_wait(tmp_path: Path) -> None:
    content, begun = content_of(1, 5000), tmp_path / "begun"

    def read() -> None:
        with ShardCache(tmp_path / "cache", 5000).get(name_of(content), 5000, slowly(content, begun, 0.5)) as file:
            assert file.read() == content

    assert ended(*(started(read) for _ in range(4))) == [0] * 4
    assert len(begun.read_text().split()) == 1


@pytest.mark.slow
def test_a_killed_downloader_is_succeeded(tmp_path: Path) -> None:
    """By one that waits already and by one that comes later; another's download makes room of what it left."""
    content, other, begun, folder = content_of(1, 5000), content_of(2, 5000), tmp_path / "begun", tmp_path / "cache"

    def read(content: bytes, seconds: float) -> None:
        with ShardCache(folder, 5000).get(name_of(content), 5000, slowly(content, begun, seconds)) as file:
            assert file.read() == content

    killed = started(read, content, 600)
    wait_for(lambda: begun.exists() and (folder / f"{name_of(content)}.partial").stat().st_size == 5000)
    waiting, waiting_for_room = started(read, content, 0.1), started(read, other, 0.1)
    time.sleep(0.3)
    assert waiting.is_alive()
    assert waiting_for_room.is_alive()
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    assert ended(killed, waiting, waiting_for_room, started(read, content, 0.1)) == [-signal.SIGKILL, 0, 0, 0]


@pytest.mark.slow
def test_those_who_wait_share_a_failure_but_not_with_another_source(tmp_path: Path) -> None:
    begun, release, failures = tmp_path / "begun", tmp_path / "release", tmp_path / "failures"
    content = content_of(1)

    def fails(file: BinaryIO) -> None:
        with open(begun, "a") as note:
            note.write("begun\n")
        wait_for(release.exists)
        file.write(b"x" * 100)
        raise InputError("http://host/set/a.tar: the server is änderbar")

    def read(source: str) -> None:
        try:
            ShardCache(tmp_path / "cache", 5000, source).get(name_of(content), 1000, fails).close()
        except InputError as error:
            with open(failures, "a") as note:
                note.write(f"{source}: {error}\n")

    def read_elsewhere() -> None:
        with ShardCache(tmp_path / "cache", 5000, "there").get(name_of(content), 1000, Origin().of(content)) as file:
            assert file.read() == content

    first = started(read, "here")
    wait_for(begun.exists)
    others = [started(read, "here") for _ in range(3)]
    time.sleep(0.5)  # they wait now
    elsewhere = started(read_elsewhere)
    time.sleep(0.2)
    release.touch()
    assert ended(first, *others, elsewhere) == [0] * 5
    assert failures.read_text() == "here: http://host/set/a.tar: the server is änderbar\n" * 4
    assert begun.read_text() == "begun\n"
    assert files_in(tmp_path / "cache") == {f"{name_of(content)}.tar"}


def test_threads_of_one_process_share_it_too(tmp_path: Path) -> None:
    contents, wrong = [content_of(number) for number in range(4)], []
    cache = ShardCache(tmp_path, 2000)

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            content = rng.choice(contents)
            if get(cache, content, Origin()) != content:
                wrong.append(content)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert bytes_in(tmp_path) <= 2000
