"""The data suite: the rows are those that are promised, and the stages are those of a batch."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch

from mdnet_dist.benchmark import data_suite
from mdnet_dist.benchmark.subject import Subject
from tests.tiny import tiny_config, tiny_set


@pytest.fixture
def subject(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Subject:
    folder = tmp_path_factory.mktemp("data")
    tiny_set(folder / "shards")
    monkeypatch.setattr(data_suite, "seconds_of_a_step", lambda subject: 0.01)
    return Subject("tiny", tiny_config(folder / "shards", folder / "runs"), short=True)


def test_the_rows_are_those_promised(subject: Subject) -> None:
    threads = torch.get_num_threads()
    rows = data_suite.measure(subject)
    assert torch.get_num_threads() == threads
    assert [(row.name, row.unit, row.target) for row in rows] == [
        ("whole path by bare decode", "x", 0.9),
        ("the same, later epochs", "x", 0.9),
        ("first epoch, images not changed", "x", None),
        ("bare decode", "images/s", None),
        ("whole path", "images/s", None),
        ("whole path, later epochs", "images/s", None),
        ("shards read, records parsed", "images/s", None),
        ("the same", "MB/s", None),
        *((f"{stage}: share of the whole path", "", None) for stage in ("read", "decode", "fit", "augment", "collate")),
        ("fetching a batch by a step", "", 0.02),
    ]
    assert all(row.suite == "data" and row.config == "tiny" and row.value > 0 for row in rows)
    ratio, _, _, bare, whole = (row.value for row in rows[:5])
    assert ratio < 2 and abs(whole / bare - ratio) < ratio, "both are of the same pictures"
    streams = [data_suite.stream_of(subject, subject.config.augment, 1, keeps=keeps) for keeps in (False, True)]
    assert [stream.encoder.config.decoded_cache_mib for stream in streams] == [0, 256]
    for _ in range(100):
        if not multiprocessing.active_children():
            break
        time.sleep(0.05)
    assert not multiprocessing.active_children(), "the loader process is left"
