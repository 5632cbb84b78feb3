"""What a search keeps of its trials: records that come back whole, reports read off metrics.jsonl, names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnet_dist.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint
from mdnet_dist.errors import InputError
from tune.ledger import Ledger, reports_of, trial_name
from tune.records import ENDED, Point, Report, Segment, TrialRecord

SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=5)
POINTS = st.dictionaries(st.text(min_size=1, max_size=8), SCALARS, max_size=3)
SEGMENTS = st.builds(
    Segment,
    number=st.integers(0, 9),
    parent=st.none() | st.just("member-02"),
    point=POINTS,
    first_step=st.integers(0, 99),
    last_step=st.integers(0, 99),
)
RECORDS = st.builds(
    TrialRecord,
    number=st.integers(1, 999),
    name=st.just("t"),
    point=POINTS,
    status=st.sampled_from(["waiting", "running", *ENDED]),
    reason=st.text(max_size=20),
    segments=st.lists(SEGMENTS, max_size=3),
    config=st.fixed_dictionaries({"train": st.dictionaries(st.text(max_size=5), SCALARS, max_size=2)}),
    weights=st.integers(0, 2**40),
    flops=st.integers(0, 2**60),
    run_id=st.text("0123456789abcdef", max_size=8),
    seconds=st.floats(0, 1e9),
)


def log(folder: Path, *lines: tuple[int, float, dict[str, Any]], cut: str = "") -> None:
    """Write metrics.jsonl as the tracker does: (step, time, metrics)."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"step": step, "time": time, "metrics": metrics} for step, time, metrics in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + cut)


def validation(epoch: int, score: float | str) -> dict[str, Any]:
    return {"val/score": score, "val/dca": 0.5, "progress/epoch": float(epoch)}


# -------------------------------------------------------------------------------------------------------------- records


@settings(max_examples=60, deadline=None)
@given(record=RECORDS)
def test_a_record_comes_back_as_it_was(record: TrialRecord, tmp_path_factory: pytest.TempPathFactory) -> None:
    ledger = Ledger(tmp_path_factory.getbasetemp() / "records")
    ledger.write(record)
    [found] = Ledger(ledger.folder).read()
    assert found == record
    assert [type(value) for value in found.point.values()] == [type(value) for value in record.point.values()]


def test_trials_come_by_number_and_folders_are_no_records(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trials")
    assert ledger.read() == []
    for number in (10, 2, 1):
        ledger.write(TrialRecord(number=number, name=f"{number}-x", point={}))
    log(ledger.folder / "2-x", (3, 5.0, validation(1, 0.25)))
    (ledger.folder / "2-x.log").write_text("{")
    found = ledger.read()
    assert [trial.name for trial in found] == ["1-x", "2-x", "10-x"]
    assert [len(trial.reports) for trial in found] == [0, 1, 0]
    assert (ledger.run_folder(found[1]), ledger.log(found[1])) == (ledger.folder / "2-x", ledger.folder / "2-x.log")


def test_reports_are_not_kept_twice(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    report = Report(epoch=1, step=3, seconds=1.0, metrics={"val/score": 0.5})
    ledger.write(TrialRecord(number=1, name="a", point={}, reports=[report]))
    assert "reports" not in json.loads((tmp_path / "a.json").read_text())
    assert ledger.read()[0].reports == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: {**record, "status": "lost"},
        lambda record: {**record, "number": "one"},
        lambda record: {**record, "segments": [{"number": 0}]},
        lambda record: {key: value for key, value in record.items() if key != "name"},
        lambda record: [record],
        lambda record: None,
    ],
)
def test_a_damaged_record_is_named_with_what_to_do(damage: Any, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(TrialRecord(number=1, name="a", point={}))
    path = tmp_path / "a.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(InputError) as caught:
        ledger.read()
    assert str(caught.value).startswith(f"{path}: damaged (")
    assert str(caught.value).endswith("; remove it, and the folder beside it, to lose this trial")


def test_a_record_that_was_cut_off_is_damaged(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(TrialRecord(number=1, name="a", point={}))
    content = (tmp_path / "a.json").read_bytes()
    for end in range(len(content) - 2):
        (tmp_path / "a.json").write_bytes(content[:end])
        with pytest.raises(InputError, match=r"a\.json: damaged"):
            ledger.read()


# -------------------------------------------------------------------------------------------------------------- reports


def test_reports_are_the_validations_with_what_was_last_measured_of_training(tmp_path: Path) -> None:
    log(
        tmp_path,
        (1, 100.0, {"train/loss_m": 3.0, "speed/images_per_second": 7.0}),
        (2, 101.0, {"train/loss_m": 2.0, "speed/images_per_second": 8.0}),
        (2, 101.5, validation(1, 0.25)),
        (4, 104.0, validation(2, "nan")),
        (5, 105.0, {"train/loss_m": 1.0}),
        (6, 106.25, validation(3, 0.5)),
        (6, 110.0, {"final/val/score": 0.9}),
        (6, 110.0, {"val/score": 0.9}),  # an evaluation afterwards: of no epoch
        cut='{"step": 8, "ti',
    )
    first, second, third = reports_of(tmp_path)
    assert first == Report(
        epoch=1,
        step=2,
        seconds=1.5,
        metrics={"train/loss_m": 2.0, "speed/images_per_second": 8.0, **validation(1, 0.25)},
    )
    assert (second.epoch, second.step, second.metrics["train/loss_m"]) == (2, 4, 2.0)
    assert second.metrics["val/score"] != second.metrics["val/score"]
    assert (third.seconds, third.metrics["train/loss_m"], "speed/images_per_second" in third.metrics) == (
        6.25,
        1.0,
        False,
    )


def test_a_trial_that_has_not_begun_has_reported_nothing(tmp_path: Path) -> None:
    assert reports_of(tmp_path / "none") == []
    log(tmp_path, (1, 1.0, {"train/loss_m": 3.0}))
    assert reports_of(tmp_path) == []


# -------------------------------------------------------------------------------------------------------------- weights


def save(run: Path, step: int, value: float) -> None:
    progress = Progress(
        step=step,
        updates=step,
        bad_steps=0,
        eta_norms=[1.0, 2.0],
        epoch_end_due=False,
        sequence={},
        score=value,
        best_score=value,
    )
    save_checkpoint(run, progress, {"w": torch.full((2,), value)}, {"m/w": torch.full((2,), -value)})


def test_weights_are_copied_and_the_child_s_own_later_ones_are_gone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    parent, child = (TrialRecord(number=n, name=name, point={}) for n, name in enumerate(("parent", "child"), start=1))
    for step in (3, 6, 9):
        save(tmp_path / "parent", step, step + 0.5)
        save(tmp_path / "child", step, step + 0.25)
    ledger.copy_weights(parent, child, 6)
    assert [path.name for path in checkpoints(tmp_path / "child")] == ["step-00000003", "step-00000006"]
    assert [path.name for path in checkpoints(tmp_path / "parent")][-1] == "step-00000009"
    progress, weights, state = load_checkpoint(checkpoints(tmp_path / "child")[-1])
    assert (progress.step, progress.best_score) == (6, 6.5)
    assert (weights["w"].tolist(), state["m/w"].tolist()) == ([6.5, 6.5], [-6.5, -6.5])
    assert load_checkpoint(checkpoints(tmp_path / "child")[0])[1]["w"].tolist() == [3.25, 3.25]


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    save(tmp_path / "a", 3, 1.0)
    a = TrialRecord(number=1, name="a", point={})
    with pytest.raises(InputError, match=rf"^{tmp_path}/a/checkpoints: no checkpoint of step 6; b cannot copy it$"):
        Ledger(tmp_path).copy_weights(a, replace(a, name="b"), 6)
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("number", "point", "labels", "name"),
    [
        (7, {"blend.beta": "linear", "blend.eta": "balanced", "d": 1}, ["blend.beta", "blend.eta", "d"],
         "007-linear-balanced-1"),
        (12, {"a": 0.25, "d": "full"}, ["d"], "012-full"),
        (1234, {}, ["d"], "1234"),
        (1, {"e": "x"}, ["d", "e"], "001-x"),
        (1, {"d": "../../a b_c"}, ["d"], "001-abc"),
        (1, {"d": "/"}, ["d"], "001"),
        (1, {"d": None}, ["d"], "001-None"),
        (1, {"d": "abcdefghijklmnop"}, ["d"], "001-abcdefghijkl"),
        (1, dict.fromkeys("abcdef", "x"), list("abcdef"), "001-x-x-x-x"),
    ],
)  # fmt: skip
def test_names_say_number_and_choices(number: int, point: Point, labels: list[str], name: str) -> None:
    assert trial_name(number, point, labels) == name


@settings(max_examples=100, deadline=None)
@given(number=st.integers(1, 99_999), point=POINTS)
def test_a_name_is_a_file_s_and_begins_with_its_number(number: int, point: Point) -> None:
    name = trial_name(number, point, list(point))
    assert set(name) <= set("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-")
    assert len(name) <= 5 + 4 * 13 and int(name.partition("-")[0]) == number and not name.endswith("-")
