"""Checkpoints appear whole or not at all; damaged ones are named; the newest and the best are kept."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdnet_dist import checkpoint
from mdnet_dist.checkpoint import (
    Progress,
    best_checkpoint,
    checkpoint_of_step,
    checkpoints,
    copy_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_progress,
    save_checkpoint,
)
from mdnet_dist.errors import InputError
from tests.conftest import REPOSITORY
from tests.soak import SOAK


def progress_at(step: int, score: float | None = None) -> Progress:
    return Progress(
        step=step,
        updates=step - 1,
        bad_steps=1,
        eta_norms=[0.25, 1e-300],
        epoch_end_due=False,
        sequence={},
        score=score,
        best_score=score,
    )


def some_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image_model.stem.weight": torch.randn(4, 3, 7, 7, generator=generator),
        "bn.running_var": torch.rand(5, generator=generator),
        "bn.num_batches_tracked": torch.tensor(12345678901),
        "optimizer": torch.ones(2),  # a weight may have a name that begins like the optimiser's keys
        "transposed": torch.randn(3, 4, generator=generator).t(),
    }


STATE = {"momentum_buffer/image_model.stem.weight": torch.full((4, 3, 7, 7), 0.5), "exp_avg/bn": torch.tensor([1e-30])}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


def save(run: Path, step: int, score: float | None = None) -> Path:
    return save_checkpoint(run, progress_at(step, score), some_weights(step), STATE)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------------- save and load


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    folder = save(tmp_path, 120, 0.1 + 0.2)
    assert folder == tmp_path / "checkpoints" / "step-00000120"
    progress, weights, state = load_checkpoint(folder)
    assert progress == progress_at(120, 0.1 + 0.2)
    assert same(weights, some_weights(120))
    assert same(state, STATE)
    assert names(tmp_path) == ["step-00000120"]
    assert sorted(path.name for path in folder.iterdir()) == ["SHA256SUMS", "state.json", "state.safetensors"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, allow_infinity=False), min_size=2, max_size=2), st.none() | st.floats(allow_nan=False))
def test_numbers_come_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, norms: list[float], score: float | None
) -> None:
    progress = Progress(
        step=3, updates=2, bad_steps=0, eta_norms=norms, epoch_end_due=False, sequence={}, score=score, best_score=None
    )
    folder = tmp_path_factory.getbasetemp() / "numbers"
    assert read_progress(save_checkpoint(folder, progress, {}, {})) == progress


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for path in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError)):
            pickle.loads(path.read_bytes())


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5, 0.1)
    save(tmp_path, 5, 0.2)
    assert read_progress(tmp_path / "checkpoints" / "step-00000005").score == 0.2
    assert names(tmp_path) == ["step-00000005"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []
    for step in (999_999_999, 3, 20, 100_000_000):
        save(tmp_path, step)
    strangers = ["step-3", "step-00000007.old", ".step-00000009.partial", "notes.txt", "step-abcdefgh"]
    for name in strangers:
        (tmp_path / "checkpoints" / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-00000003", "step-00000020", "step-100000000", "step-999999999",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ best and prune


def test_the_best_is_the_oldest_of_the_highest_scores(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path) is None
    for step, score in ((1, None), (2, 0.5), (3, 0.75), (4, None), (5, 0.75), (6, -1.0)):
        save(tmp_path, step, score)
        if step == 1:
            assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000001", "nothing scored: the last"
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000003"


@settings(max_examples=25, deadline=None)
@given(
    scores=st.lists(st.none() | st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=7),
    keep_last=st.integers(1, 4),
    keep_best=st.integers(0, 3),
)
def test_the_newest_and_the_best_are_kept(
    scores: list[float | None], keep_last: int, keep_best: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.getbasetemp() / "prune"
    shutil.rmtree(run, ignore_errors=True)
    for step, score in enumerate(scores):
        save_checkpoint(run, progress_at(step + 1, score), {}, {})
    best_before = best_checkpoint(run)
    prune_checkpoints(run, keep_last, keep_best)
    steps = range(1, len(scores) + 1)
    newest = list(steps)[-keep_last:]
    scored = [step for step in steps if scores[step - 1] is not None]
    best = sorted(scored, key=lambda step: (-(scores[step - 1] or 0), step))
    assert names(run) == [f"step-{step:08d}" for step in sorted({*newest, *best[:keep_best]})]
    if keep_best:
        assert best_checkpoint(run) == best_before


# --------------------------------------------------------------------------------------------------------------- kills

# It forks instead of starting anew, because importing PyTorch takes longer than all that is tested here. A child says
# when it begins a checkpoint, so that the kills fall into them however slow the machine is.
KILLS = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    from mdnet_dist.checkpoint import *
    from mdnet_dist.checkpoint import _PARTIAL

    torch.set_num_threads(1)
    run, kills, parent = Path(sys.argv[1]), int(sys.argv[2]), os.getpid()
    random.seed(int(sys.argv[3]))

    def write(step):
        weights = {name: torch.full((300, 300), float(step)) for name in "abc"}
        others = dict(bad_steps=0, eta_norms=[0, 0], epoch_end_due=False, sequence={}, best_score=None)
        progress = Progress(step=step, updates=step, score=(step * 7 % 11) / 11, **others)
        save_checkpoint(run, progress, weights, {"exp_avg/a": weights["a"] + 0})
        prune_checkpoints(run, 2, 1)

    started = time.monotonic()
    for last in range(1, 6):
        write(last)
    seconds = (time.monotonic() - started) / 5
    partial = 0
    for _ in range(kills):
        hears, says = os.pipe()
        child = os.fork()
        if child == 0:
            while os.getppid() == parent:
                last += 1
                os.write(says, b"x")
                write(last)
                write(last)  # as a resumed run does that was stopped at the end of an epoch
            os._exit(0)
        for _ in range(random.randint(1, 3)):
            os.read(hears, 1)
        time.sleep(random.uniform(0, 1.2 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(hears)
        os.close(says)
        left = [path for path in (run / "checkpoints").iterdir() if path.name.endswith(_PARTIAL)]
        partial += bool(left)
        assert len(left) <= 3, left
        assert newest_checkpoint(run) is not None
        found = checkpoints(run)
        for path in found:
            progress, weights, state = load_checkpoint(path)
            numbers = {float(tensor.min()) for tensor in [*weights.values(), *state.values()]}
            numbers |= {float(tensor.max()) for tensor in [*weights.values(), *state.values()]}
            assert numbers == {float(progress.step)} and len(weights) == 3, (path, numbers)
            assert path.name == f"step-{progress.step:08d}"
        step = read_progress(found[-1]).step
        assert step >= last, f"step {last} is lost, {step} is the last"
        last = step
        assert best_checkpoint(run) in found
    write(last + 1)
    assert len(checkpoints(run)) <= 3
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.endswith(_PARTIAL)]
    print(last, partial)
"""


def kill_writers(run: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kill processes that write checkpoints; the steps written, and how often a kill left something half-written."""
    command = [sys.executable, "-c", textwrap.dedent(KILLS), str(run), str(kills), str(seed)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    last, partial = map(int, ended.stdout.split())
    return last, partial


def test_killed_writers_lose_nothing_that_was_written(tmp_path: Path) -> None:
    last, partial = kill_writers(tmp_path, kills=30, seed=0)
    assert last >= 15
    assert partial >= 3, "no kill came while something was being written, so nothing was tested"


@pytest.mark.slow
def test_writers_killed_five_hundred_times(tmp_path: Path) -> None:
    kills = 500 if SOAK else 100
    last, partial = kill_writers(tmp_path, kills=kills, seed=1)
    assert last >= kills * 3 // 5 and partial >= kills // 10


def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path: Path) -> None:
    """The old one has its name no more and the new one not yet: the old one gets its name back."""
    old = save(tmp_path, 5, 0.5)
    moved = old.rename(old.with_name(".step-00000005.replaced.partial"))
    assert newest_checkpoint(tmp_path) == old and not moved.exists()
    assert read_progress(old).score == 0.5
    # The new one is there, and the old one not deleted yet.
    shutil.copytree(old, moved)
    save_again = save(tmp_path, 5, 0.75)
    assert names(tmp_path) == ["step-00000005"] and read_progress(save_again).score == 0.75


def test_a_step_that_is_damaged_twice_is_set_aside_twice(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for _ in range(3):
        flip(save(tmp_path, 2) / "state.safetensors", 500)
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000001"
    aside = [f"damaged-step-00000002{number}" for number in ("", "-2", "-3")]
    assert names(tmp_path) == [*aside, "step-00000001"]


def test_leftovers_of_killed_writers_go_with_the_next_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".step-00000002.partial", ".step-00000001.deleted.partial", ".step-00000003.4711.partial"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "state.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / "notes.partial").write_text("of the user")
    save(tmp_path, 2)
    assert names(tmp_path) == ["notes.partial", "step-00000001", "step-00000002"]


# --------------------------------------------------------------------------------------------------- cannot be written


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match=r"step-00000001: cannot be written \(.*\); make room there, then --resume"):
        save(tmp_path, 1)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_folder_that_is_read_only(error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as a user who can write anywhere."""
    save(tmp_path, 1)

    def refuse(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError) as caught:
        save(tmp_path, 2)
    assert str(caught.value).startswith(f"{tmp_path}/checkpoints/step-00000002: cannot be written ({error.strerror})")
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("function", ["save_file", "_synchronise"])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, function, full)
    with pytest.raises(InputError, match="No space left on device"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert same(load_checkpoint(checkpoints(tmp_path)[-1])[1], some_weights(1))


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="a small disk is made as a tmpfs in a namespace of its own, which this machine does not allow",
)
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs of 1 MiB: the first checkpoint fits, the second does not."""
    program = """
        import sys
        from pathlib import Path
        import torch
        from mdnet_dist.checkpoint import *
        from mdnet_dist.errors import InputError
        run = Path(sys.argv[1])
        small, large = torch.zeros(100_000), torch.zeros(1_000_000)
        progress = dict(updates=0, bad_steps=0, eta_norms=[0, 0], epoch_end_due=False, sequence={})
        progress |= dict(score=None, best_score=None)
        save_checkpoint(run, Progress(step=1, **progress), {"a": small}, {})
        try:
            save_checkpoint(run, Progress(step=2, **progress), {"a": large}, {})
        except InputError as error:
            print(error)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
        load_checkpoint(run / "checkpoints" / "step-00000001")
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=1m none "{disk}" && exec "{sys.executable}" "{tmp_path / "program.py"}" "{disk}"'
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "step-00000002: cannot be written" in ended.stdout


# ------------------------------------------------------------------------------------------------- from run to run


def test_a_checkpoint_is_found_by_its_step(tmp_path: Path) -> None:
    assert checkpoint_of_step(tmp_path, 3) is None
    for step in (3, 30, 300_000_000):
        save(tmp_path, step)
    for step in (3, 30, 300_000_000):
        found = checkpoint_of_step(tmp_path, step)
        assert found is not None and read_progress(found).step == step
    for step in (0, 2, 4, 33, 3000):
        assert checkpoint_of_step(tmp_path, step) is None


@settings(max_examples=25, deadline=None)
@given(own=st.sets(st.integers(1, 6)), copied=st.integers(1, 6))
def test_a_copy_becomes_the_newest_checkpoint_of_the_other_run(
    own: set[int], copied: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "copies"
    shutil.rmtree(folder, ignore_errors=True)
    source = save_checkpoint(folder / "parent", progress_at(copied, 0.5), some_weights(copied), STATE)
    for step in own:
        save_checkpoint(folder / "child", progress_at(step, 0.25), some_weights(100 + step), {})
    copy = copy_checkpoint(source, folder / "child")
    assert copy == checkpoints(folder / "child")[-1] == folder / "child" / "checkpoints" / f"step-{copied:08d}"
    progress, weights, state = load_checkpoint(copy)
    assert (progress, same(weights, some_weights(copied)), same(state, STATE)) == (progress_at(copied, 0.5), True, True)
    kept = sorted(step for step in own if step < copied)
    assert names(folder / "child") == [f"step-{step:08d}" for step in [*kept, copied]]
    for path, step in zip(checkpoints(folder / "child"), kept):
        assert same(load_checkpoint(path)[1], some_weights(100 + step))
    assert names(folder / "parent") == [f"step-{copied:08d}"]
    assert copy_checkpoint(source, folder / "child") == copy, "a second time changes nothing"
    assert same(load_checkpoint(copy)[1], some_weights(copied))


@pytest.mark.parametrize("function", ["copyfile", "_synchronise"])
def test_a_copy_for_which_there_is_no_room_leaves_everything_as_it_was(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "parent", 2)
    for step in (1, 2, 3):
        save(tmp_path / "child", step, 0.5)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil if function == "copyfile" else checkpoint, function, full)
        with pytest.raises(InputError) as caught:
            copy_checkpoint(source, tmp_path / "child")
    assert str(caught.value) == (
        f"{tmp_path}/child/checkpoints/step-00000002: cannot be written (No space left on device); make room there, "
        "then --resume"
    )
    assert names(tmp_path / "child") == ["step-00000001", "step-00000002", "step-00000003"]
    assert read_progress(tmp_path / "child" / "checkpoints" / "step-00000002").score == 0.5


def test_a_copy_that_was_killed_is_copied_again_and_never_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of the operations that change the child's folder."""
    source = save(tmp_path / "parent", 2, 0.75)

    class Killed(BaseException):
        pass

    operations = {Path: ("mkdir", "rename"), checkpoint.shutil: ("copyfile",)}
    for survived in range(20):
        child = tmp_path / f"child-{survived}"
        for step in (1, 2, 3):
            save(child, step, 0.5)
        left = [survived]
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.shutil, "rmtree", lambda *arguments, **options: None)  # a kill cleans up nothing
            for owner, fused in operations.items():
                for name in fused:
                    patch.setattr(owner, name, fuse_of(left, Killed, getattr(owner, name)))
            try:
                copy_checkpoint(source, child)
            except Killed:
                pass
            else:
                break
        for path in checkpoints(child):
            progress, weights, _ = load_checkpoint(path)
            assert same(weights, some_weights(progress.step)) and progress.score in (0.5, 0.75)
        copy_checkpoint(source, child)
        assert names(child) == ["step-00000001", "step-00000002"]
        assert read_progress(checkpoints(child)[-1]).score == 0.75
    assert survived >= 5


def fuse_of(left: list[int], killed: type[BaseException], function: Callable[..., object]) -> Callable[..., object]:
    """The function, which kills once so many calls of its like have been made."""

    def call(*arguments: object, **options: object) -> object:
        if left[0] == 0:
            raise killed
        left[0] -= 1
        return function(*arguments, **options)

    return call


def test_what_is_not_there_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step-00000009: cannot be written \(No such file"):
        copy_checkpoint(tmp_path / "parent" / "checkpoints" / "step-00000009", tmp_path / "child")
    assert names(tmp_path / "child") == []


# -------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def header_of(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no tensors": ("state.safetensors", lambda path: path.unlink()),
    "empty": ("state.safetensors", lambda path: path.write_bytes(b"")),
    "cut off": ("state.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "half": ("state.safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000])),
    "a bit in the header": ("state.safetensors", lambda path: flip(path, 9)),
    "a header of any size": ("state.safetensors", lambda path: path.write_bytes(b"\xff" * 16)),
    "a header that is no JSON": ("state.safetensors", lambda path: header_of(path, b"{")),
    "a type nobody knows": (
        "state.safetensors",
        lambda path: header_of(path, b'{"a":{"dtype":"XX","shape":[],"data_offsets":[0,0]}}'),
    ),
    "tensors that overlap": (
        "state.safetensors",
        lambda path: header_of(path, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    ),
    "a pickle": ("state.safetensors", lambda path: path.write_bytes(pickle.dumps({"a": 1}))),
    "a folder": ("state.safetensors", replace_by_folder),
    "no progress": ("state.json", lambda path: path.unlink()),
    "progress empty": ("state.json", lambda path: path.write_text("")),
    "progress cut off": ("state.json", lambda path: path.write_text(path.read_text()[:-5])),
    "progress a list": ("state.json", lambda path: path.write_text("[1]")),
    "progress not UTF-8": ("state.json", lambda path: path.write_bytes(b'{"step": "\xff"}')),
    "progress too deep": ("state.json", lambda path: path.write_text("[" * 100_000)),
    "a field more": ("state.json", lambda path: edit(path, extra=1)),
    "step is text": ("state.json", lambda path: edit(path, step="3")),
    "step is a fraction": ("state.json", lambda path: edit(path, step=3.5)),
    "three norms": ("state.json", lambda path: edit(path, eta_norms=[1.0, 2.0, 3.0])),
    "norms of text": ("state.json", lambda path: edit(path, eta_norms=["1", "2"])),
    "score is text": ("state.json", lambda path: edit(path, score="good")),
    "another score": ("state.json", lambda path: edit(path, score=0.99)),
    "a bit in a tensor": ("state.safetensors", lambda path: flip(path, path.stat().st_size - 3)),
    "no sums": ("SHA256SUMS", lambda path: path.unlink()),
    "sums not UTF-8": ("SHA256SUMS", lambda path: path.write_bytes(b"\xff")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    file, damage = DAMAGE[name]
    damage(folder / file)
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / file}: damaged (")
    assert "\n" not in message


def test_any_cut_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 7) / "state.safetensors"
    content = path.read_bytes()
    for cut in {*range(0, len(content), 37), len(content) - 1}:
        path.write_bytes(content[:cut])
        with pytest.raises(InputError):
            load_checkpoint(path.parent)


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), 1 if len(content) < 1000 else 53):
            flip(path, place)
            with pytest.raises(InputError, match=r"damaged \("):
                load_checkpoint(folder)
            path.write_bytes(content)
    load_checkpoint(folder)


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=save(tmp_path, 7), capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == "state.json: OK\nstate.safetensors: OK\n"


@pytest.mark.parametrize("name", DAMAGE)
def test_the_one_before_a_damaged_one_is_used(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound, folder = save(tmp_path, 6), save(tmp_path, 7)
    file, damage = DAMAGE[name]
    damage(folder / file)
    assert newest_checkpoint(tmp_path) == sound
    line = " ".join(capsys.readouterr().out.split())
    assert line.startswith(f"{folder}/"), line
    assert line.endswith("the checkpoint is passed over") and "damaged (" in line
    # It is kept for whoever wants to look into it, but no longer in the way: not even of pruning.
    assert names(tmp_path) == ["damaged-step-00000007", "step-00000006"]
    save(tmp_path, 8)
    prune_checkpoints(tmp_path, keep_last=1, keep_best=0)
    assert names(tmp_path) == ["damaged-step-00000007", "step-00000008"]
    assert newest_checkpoint(tmp_path) == checkpoints(tmp_path)[-1]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_in_silence(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.safetensors", 200)
    with pytest.raises(InputError, match="checkpoints: every checkpoint is damaged; start a new run under another"):
        newest_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None


def test_the_best_of_those_that_are_whole(tmp_path: Path) -> None:
    for step, score in ((10, 0.9), (20, 0.5), (30, 0.6)):
        save(tmp_path, step, score)
    flip(tmp_path / "checkpoints" / "step-00000010" / "state.safetensors", 500)
    best, whole = best_checkpoint(tmp_path), best_checkpoint(tmp_path, whole=True)
    assert best is not None and best.name == "step-00000010"
    assert whole is not None and whole.name == "step-00000030"


def test_an_old_checkpoint_that_is_damaged_does_not_end_a_sound_run(tmp_path: Path) -> None:
    for step, score in ((10, 0.9), (20, 0.5), (30, 0.6)):
        save(tmp_path, step, score)
    (tmp_path / "checkpoints" / "step-00000010" / "state.json").write_text("{")
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.name == "step-00000030"
    prune_checkpoints(tmp_path, keep_last=1, keep_best=1)
    assert names(tmp_path) == ["step-00000030"]
