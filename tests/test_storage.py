"""Folders and addresses are told apart, and nothing takes one for the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_shards.__main__ import build_parser
from mdnet_dist.config import DataConfig
from mdnet_dist.config_file import apply_override, check_config
from mdnet_dist.errors import InputError
from mdnet_dist.evaluate_run import Request
from mdnet_dist.run_data import open_data
from mdnet_dist.storage import LocalSource, absolute, is_address, last_name, open_source, place_of_set
from tests.tiny import tiny_config, tiny_set
from tune.search_config import _load_absolute

ADDRESSES = ["https://host/sets/a", "s3://bucket/a", "http://127.0.0.1:80/a/", "pipe:cat x::y", "file:///a", "a::b"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_stays_as_it_is(address: str) -> None:
    assert is_address(address)
    assert absolute(address) == address


@pytest.mark.parametrize("folder", ["runs/data/a", "/data/a", "../a", "C:/a", "a:b", ".", "https:/a", "pipe:cat a"])
def test_a_folder_becomes_absolute(folder: str) -> None:
    assert not is_address(folder)
    assert absolute(folder) == str(Path(folder).absolute()) and Path(absolute(folder)).is_absolute()
    assert isinstance(open_source(DataConfig(shards=folder)), LocalSource)


def test_names_of_sets() -> None:
    assert last_name("data/nuclei he/") == "nuclei he"
    assert last_name("https://host/sets/nuclei/?a=b/c") == last_name("s3://bucket/sets/nuclei") == "nuclei"
    assert last_name("https://me:secret@host/") == last_name("https://me:secret@host") == "host"
    run = Path("runs/a")
    assert Request(run=run, shards="https://me:secret@host/sets/nuclei/").name == "test-nuclei"
    assert place_of_set(DataConfig(shards="https://me@host/a")) == "https://host/a"
    assert place_of_set(DataConfig(shards="runs/a")) == "runs/a"


def test_a_search_keeps_addresses_and_makes_folders_absolute(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("name: a\ndata: {shards: sets/one}\n")
    assert _load_absolute(str(base), []).data.shards == str(Path("sets/one").absolute())
    assert _load_absolute(str(base), ["data.shards=https://host/sets/one"]).data.shards == "https://host/sets/one"


@pytest.mark.parametrize("command", ["verify", "show"])
def test_programs_for_folders_say_so(command: str) -> None:
    with pytest.raises(InputError) as caught:
        build_parser().parse_args([command, "https://me:secret@host/sets/one"])
    said = "https://host/sets/one: an address, but this works on folders only; copy the set here"
    assert str(caught.value) == said
    assert build_parser().parse_args([command, "sets/one"]).folder == Path("sets/one")


def test_shards_may_be_linked_within_their_folder_only(tmp_path: Path) -> None:
    manifest = tiny_set(tmp_path / "set", train=10, val=0, test=0)
    source, shard = LocalSource(tmp_path / "set"), manifest.shards[0]
    path = tmp_path / "set" / shard.file
    path.rename(tmp_path / "set" / "kept")
    path.symlink_to("kept")
    source.check(shard)
    source.open(shard).close()
    path.unlink()
    (tmp_path / "set" / "kept").rename(tmp_path / "set-kept")
    path.symlink_to(tmp_path / "set-kept")
    for use in (source.check, source.open):
        with pytest.raises(InputError, match="a link that leaves the folder; put the shard itself there"):
            use(shard)
    (tmp_path / "linked").symlink_to(tmp_path / "set")  # the set itself may be one
    LocalSource(tmp_path / "linked").check(manifest.shards[1])


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    manifest = tiny_set(tmp_path / "set", train=10, val=0, test=0)
    raw = (tmp_path / "set" / "manifest.json").read_text().replace(manifest.shards[0].file, name)
    (tmp_path / "set" / "manifest.json").write_text(raw)
    with pytest.raises(InputError, match="the manifest lists this shard, but it"):
        open_data(tiny_config(tmp_path / "set", tmp_path / "runs", {"train.global_batch": 4}))


def test_the_policy_is_a_choice_of_two() -> None:
    for value, message in (("skpi", "must be 'strict' or 'skip'"), ("true", "must be 'strict' or 'skip'")):
        values = {"name": "a", "data": {"shards": "b"}}
        with pytest.raises(InputError, match=message):
            apply_override(values, f"data.damaged={value}")
            check_config(values, "a.yaml")
