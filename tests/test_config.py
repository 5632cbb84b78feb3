"""Configuration: files, overrides, what is refused and how, and its documentation."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mdnet_dist.config import DataConfig, PiecewiseEta, RunConfig, Section, TrackingConfig
from mdnet_dist.config_check import COMMAND_LINE, sections_in
from mdnet_dist.config_docs import reference
from mdnet_dist.config_file import apply_override, as_yaml, check_config, flatten, load_config, read_yaml
from mdnet_dist.errors import InputError, TrainingFailed
from mdnet_dist.program import run_program
from tests.conftest import REPOSITORY

SMALLEST: dict[str, Any] = {"name": "a", "data": {"shards": "set"}}
CONFIGS = sorted((REPOSITORY / "launch" / "configs").glob("*.yaml"))


def all_sections(section: type[Section] = RunConfig) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        for below in sections_in(field):
            yield from all_sections(below)


def refusal(*overrides: str, values: dict[str, Any] | None = None) -> str:
    """The message with which the smallest configuration and these overrides are refused."""
    values = copy.deepcopy(SMALLEST if values is None else values)
    with pytest.raises(InputError) as caught:
        for override in overrides:
            apply_override(values, override)
        check_config(values, "file.yaml", {override.partition("=")[0]: COMMAND_LINE for override in overrides})
    message = str(caught.value)
    assert "\n" not in message
    return message


def accepted(*overrides: str) -> RunConfig:
    values = copy.deepcopy(SMALLEST)
    for override in overrides:
        apply_override(values, override)
    return check_config(values, "file.yaml")


@pytest.fixture
def smallest_file(tmp_path: Path) -> Path:
    path = tmp_path / "file.yaml"
    path.write_text("name: a\ndata: {shards: set}\n")
    return path


# ----------------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load_and_say_how_they_are_run(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem.replace("_", "-") or config.name == path.stem
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and f"launch/configs/{path.name}" in first


def test_some_configs_are_shipped() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_survive_being_written_out(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "out.yaml").write_text(as_yaml(config))
    assert load_config(tmp_path / "out.yaml") == config


@pytest.mark.parametrize(
    "overrides",
    [
        ["blend.beta={kind: piecewise, knots: [[0, 0.1], [0.5, 1], [1, 0]]}", "blend.eta=balanced"],
        ["blend.beta={kind: sigmoid}", "model.image={form: cifar, concat_depth: full}", "data.fold=2"],
        ["optimizer={kind: adamw, language: {betas: [0.8, 0.9], eps: 1e-6}}", "tracking.uri='sqlite:///x y.db'"],
        ["deepspeed={comms_logger: {enabled: true, x: [1, null, 2.5, y]}}", "train.zero_stage=3"],
        ["data.shards='yes'", "runs_folder='1e3'", "name=null-is-not-a-name", "train.clip_norm=1e-7"],
    ],
)
def test_any_kind_survives_being_written_out(overrides: list[str], tmp_path: Path) -> None:
    config = accepted(*overrides)
    path = tmp_path / "out.yaml"
    path.write_text(as_yaml(config))
    assert load_config(path) == config
    assert as_yaml(load_config(path)) == path.read_text()


def test_the_written_configuration_holds_every_default() -> None:
    flat = flatten(accepted())
    assert flat["train.epochs"] == 100
    assert flat["optimizer.language.schedule.milestones"] == [0.3, 0.6, 0.8]
    assert flat["blend.beta.kind"] == "constant"
    assert flat["data.fold"] is None
    assert set(yaml.safe_load(as_yaml(accepted()))) == set(RunConfig.model_fields)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", ".1e-2", "0.001", "1.0e-3"])
def test_powers_of_ten_are_numbers(text: str) -> None:
    assert accepted(f"train.clip_norm={text}").train.clip_norm == 0.001


@pytest.mark.parametrize("text", ["e3", "1e", "1e3.5", "1-e3", "abc1e3", "1e3x"])
def test_what_looks_like_a_power_of_ten_but_is_none_stays_text(text: str) -> None:
    assert accepted(f"data.shards={text}").data.shards == text


def test_overrides_win_and_the_last_one_wins(smallest_file: Path) -> None:
    smallest_file.write_text("name: a\ndata: {shards: set, image_size: 64}\ntrain: {epochs: 3, seed: 7}\n")
    config = load_config(smallest_file, ["train.epochs=4", "data.image_size=32", "train.epochs=5"])
    assert (config.train.epochs, config.train.seed, config.data.image_size) == (5, 7, 32)


def test_a_mapping_is_merged_and_makes_the_mappings_above_it() -> None:
    config = accepted("train={seed: 3}", "train={epochs: 2}", "optimizer.image.schedule={kind: step}")
    assert (config.train.seed, config.train.epochs) == (3, 2)
    assert config.optimizer.image.schedule.kind == "step"
    assert config.optimizer.head.schedule.kind == "cosine"


def test_mappings_are_merged_at_every_depth() -> None:
    config = accepted("optimizer.image.lr=0.3", "optimizer={image: {schedule: {kind: step}}, head: {lr: 1}}")
    assert (config.optimizer.image.lr, config.optimizer.head.lr) == (0.3, 1.0)
    assert config.optimizer.image.schedule.kind == "step"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["blend.beta={kind: linear, start: 0.2}", "blend.beta={kind: constant}"], {"kind": "constant", "value": 0.5}),
        (["blend.beta={kind: constant, value: 0.3}", "blend.beta.kind=linear"], {"kind": "linear", "start": 0.1}),
        (["blend.beta={kind: linear, start: 0.2}", "blend.beta={kind: linear, end: 1}"], {"start": 0.2, "end": 1.0}),
        (["blend.beta={kind: linear, start: 0.2}", "blend.beta={end: 1}"], {"start": 0.2, "end": 1.0}),
    ],
)
def test_another_kind_replaces_the_one_below_whole(overrides: list[str], expected: dict[str, Any]) -> None:
    assert expected.items() <= accepted(*overrides).blend.beta.model_dump().items()


ETA_KNOTS = "blend.eta={kind: piecewise, knots: [[0, 4], [1, 0.5]]}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["blend.eta=3"], 3.0),
        ([ETA_KNOTS], [[0.0, 4.0], [1.0, 0.5]]),
        ([ETA_KNOTS, "blend.eta=2.0"], 2.0),
        ([ETA_KNOTS, "blend.eta=balanced"], "balanced"),
        (["blend.eta=2.0", ETA_KNOTS], [[0.0, 4.0], [1.0, 0.5]]),
        (["blend.eta=balanced", ETA_KNOTS], [[0.0, 4.0], [1.0, 0.5]]),
        ([ETA_KNOTS, "blend.eta.knots=[[0.5, 7]]"], [[0.5, 7.0]]),
        ([ETA_KNOTS, "blend.eta={knots: [[0.5, 7]]}"], [[0.5, 7.0]]),
        ([ETA_KNOTS, "blend={eta: 5, eta_memory: 0.5}"], 5.0),
    ],
)
def test_eta_is_a_number_or_balanced_or_knots_and_each_replaces_the_other(
    overrides: list[str], expected: Any, smallest_file: Path
) -> None:
    config = accepted(*overrides)
    eta = config.blend.eta
    assert (eta.knots if isinstance(eta, PiecewiseEta) else eta) == expected
    flat = flatten(config)
    assert flat.get("blend.eta", flat.get("blend.eta.knots")) == expected
    smallest_file.write_text(as_yaml(config))
    assert load_config(smallest_file) == config
    assert load_config(smallest_file, ["blend.eta=9"]).blend.eta == 9.0
    assert load_config(smallest_file, [ETA_KNOTS]).blend == accepted(*overrides, ETA_KNOTS).blend


def test_knots_of_eta_in_an_overlay_replace_a_number(smallest_file: Path, tmp_path: Path) -> None:
    smallest_file.write_text("name: a\ndata: {shards: set}\nblend: {eta: 2.0}\n")
    overlay = tmp_path / "over.yaml"
    overlay.write_text("blend: {eta: {kind: piecewise, knots: [[0, 1], [0.5, 2]]}}\n")
    assert load_config(smallest_file, [str(overlay)]).blend.eta == PiecewiseEta(
        kind="piecewise", knots=[[0.0, 1.0], [0.5, 2.0]]
    )
    overlay.write_text("blend: {eta: {kind: piecewise, knots: [[0, 1], [0.5, x]]}}\n")
    with pytest.raises(InputError, match=r"over\.yaml: blend\.eta\.knots\.1\.1: must be a valid number, but it is 'x'"):
        load_config(smallest_file, [str(overlay)])
    with pytest.raises(InputError, match=r"'blend\.eta\.knots=\[\[0, 1\]\]': 'eta' is 2\.0, not a mapping"):
        load_config(smallest_file, ["blend.eta.knots=[[0, 1]]"])


def test_a_tag_that_is_not_given_means_the_default() -> None:
    config = accepted("model.image.stem_channels=16", "model.image={form: medical, concat_depth: 0}")
    assert (config.model.image.stem_channels, config.model.image.concat_depth) == (16, 0)  # type: ignore[union-attr]
    config = accepted("model.image.stem_channels=16", "model.image={form: cifar, concat_depth: 0}")
    assert config.model.image.model_dump() == {"form": "cifar", "depth": 56, "widening": 12, "concat_depth": 0}
    config = accepted("optimizer.image.nesterov=false", "optimizer={kind: adamw, image: {eps: 1}}")
    assert (config.optimizer.kind, config.optimizer.image.eps) == ("adamw", 1.0)  # type: ignore[union-attr]


def test_overlays_are_laid_over_in_the_order_given(smallest_file: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yml"
    smallest_file.write_text("name: a\ndata: {shards: set}\nmodel: {image: {stem_channels: 16}, sharpening: none}\n")
    one.write_text("name: b\ntrain: {epochs: 2, seed: 2}\nmodel: {image: {form: cifar}}\n")
    other.write_text("train: {epochs: 4}\n")
    config = load_config(smallest_file, ["train.epochs=1", "train.seed=1", str(one), "train.epochs=3", str(other)])
    assert (config.name, config.data.shards, config.model.sharpening) == ("b", "set", "none")
    assert (config.train.epochs, config.train.seed, config.model.image.form) == (4, 2, "cifar")
    assert load_config(smallest_file, [str(other), "train.epochs=5"]).train.epochs == 5
    assert smallest_file.read_text().startswith("name: a\n")


@pytest.mark.parametrize(
    ("overlay", "overrides", "message"),
    [
        ("train: {epocs: 3}", [], "over.yaml: train.epocs: unknown key; did you mean 'epochs'?"),
        ("train: {epochs: x}", [], "over.yaml: train.epochs: must be a valid integer, but it is 'x'"),
        ("train: {epochs: x}", ["train.epochs=y"], "override 'train.epochs': must be a valid integer, but it is 'y'"),
        ("model: {image: {form: cifra}}", [], "over.yaml: model.image: form must be one of medical, cifar"),
        ("train: null", [], "over.yaml: train: must be a mapping of keys to values, but it is None"),
        (
            "model: {image: {concat_depth: 7}}",
            [],
            "file.yaml with over.yaml: model.image: concat_depth 7 exceeds the 6 units",
        ),
        ("blend: {beta: {kind: piecewise}}", [], "file.yaml with over.yaml: blend.beta.knots: missing; [[fraction of"),
        ("train: {seed: 1}", ["train.micro_batch=65"], "file.yaml with over.yaml: train.micro_batch 65 exceeds"),
        ("train: {seed: 1}", ["data.fold=x"], "override 'data.fold': must be a valid integer, but it is 'x'"),
        ("- 1", [], "over.yaml: must hold a mapping"),
        ("a: [", [], "over.yaml: not valid YAML"),
    ],
)
def test_errors_name_the_overlay(
    overlay: str, overrides: list[str], message: str, smallest_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(smallest_file.parent)
    Path("over.yaml").write_text(overlay)
    with pytest.raises(InputError) as caught:
        load_config("file.yaml", ["over.yaml", *overrides])
    assert message in str(caught.value)
    with pytest.raises(InputError, match=r"absent\.yaml: No such file"):
        load_config("file.yaml", ["absent.yaml"])


def test_a_value_may_hold_an_equals_sign() -> None:
    assert accepted("tracking.uri=sqlite:///a?b=c").tracking.uri == "sqlite:///a?b=c"


def test_nothing_can_be_changed_afterwards() -> None:
    config = accepted()
    for holder, name in ((config, "name"), (config.train, "epochs"), (config.model.image, "concat_depth")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(holder, name, getattr(holder, name))
    with pytest.raises(ValidationError, match="frozen"):
        config.train.unknown = 1  # type: ignore[attr-defined]


def test_defaults_are_valid() -> None:
    for section in set(all_sections()):
        for name, field in section.model_fields.items():
            if field.is_required():
                continue
            value = field.default.model_dump() if isinstance(field.default, Section) else field.default
            given = {key: other for key, other in _required(section).items() if key != name}
            assert section.model_validate({**given, name: value}), (section, name)


def _required(section: type[Section]) -> dict[str, Any]:
    examples = {"shards": "x", "name": "x", "data": {"shards": "x"}, "knots": [[0, 1]]}
    tags = {"kind": section.model_fields.get("kind"), "form": section.model_fields.get("form")}
    return {
        name: examples[name] if name in examples else tags[name].annotation.__args__[0]  # type: ignore[union-attr]
        for name, field in section.model_fields.items()
        if field.is_required()
    }


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epocs=3", "override 'train.epocs': unknown key; did you mean 'epochs'?"),
        ("trian.epochs=3", "file.yaml: trian: unknown key; did you mean 'train'?"),
        ("blend.beta={kind: linear, strat: 0.1}", "override 'blend.beta.strat': unknown key; did you mean 'start'?"),
        ("model.image={form: cifar, stem_channel: 3}", "override 'model.image.stem_channel': unknown key; known: "),
        ("optimizer={kind: adamw, image: {momentum: 0.9}}", "override 'optimizer.image.momentum': unknown key; known:"),
        ("optimizer.image.schedule.warmupp=0.1", "'optimizer.image.schedule.warmupp': unknown key; did you mean 'warm"),
        ("data.1=2", "override 'data.1': unknown key; known: cache, cache_gib, damaged, decoded_cache_mib, fit"),
        ("a..b=1", "file.yaml: a: unknown key"),
        ("blend.beta={}", "override 'blend.beta': kind must be one of constant, linear, cosine, sigmoid, delayed_step"),
        ("blend.beta=5", "override 'blend.beta': kind must be one of constant"),
        ("model.image={form: [1]}", "override 'model.image': form must be one of medical, cifar"),
        ("blend.beta={kind: piecewise}", "override 'blend.beta.knots': missing; [[fraction of training done, beta]"),
        ("train=3", "override 'train': must be a mapping of keys to values, but it is 3"),
        ("train.epochs='3'", "override 'train.epochs': must be a valid integer, but it is '3'"),
        ("train.epochs=1e1", "override 'train.epochs': must be a valid integer, but it is 10.0"),
        ("train.epochs=true", "override 'train.epochs': must be a valid integer, but it is True"),
        ("train.epochs=0", "override 'train.epochs': must be greater than 0, but it is 0"),
        ("train.epochs=4000000000", "override 'train.epochs': must be less than 2147483648, but it is 4000000000"),
        ("train.zero_stage=true", "override 'train.zero_stage': must be a valid integer, but it is True"),
        ("train.zero_stage=4", "override 'train.zero_stage': must be less than or equal to 3, but it is 4"),
        ("model.image.stage_strides=[true, 2, 2, 1]", "override 'model.image.stage_strides.0': must be a valid int"),
        ("model.image.concat_depth=ful", "'model.image.concat_depth': must be a valid integer or 'full', but it is"),
        (
            "blend.eta=balancd",
            "'blend.eta': must be a valid number or 'balanced' or a mapping with kind: piecewise, but it is 'balancd'",
        ),
        ("blend.eta=true", "'blend.eta': must be a valid number or 'balanced' or a mapping with kind: piecewise, but"),
        (
            "blend.eta=[1]",
            "'blend.eta': must be a valid number or 'balanced' or a mapping with kind: piecewise, but it",
        ),
        (
            "blend.eta=0",
            "'blend.eta': must be greater than 0 or 'balanced' or a mapping with kind: piecewise, but it is 0",
        ),
        ("blend.eta={}", "override 'blend.eta.kind': missing; piecewise, the one kind of schedule that eta has."),
        ("blend.eta={kind: linear}", "override 'blend.eta.kind': must be 'piecewise', but it is 'linear'"),
        ("blend.eta={kind: value}", "override 'blend.eta.kind': must be 'piecewise', but it is 'value'"),
        ("blend.eta={kind: piecewise}", "override 'blend.eta.knots': missing; [[fraction of training done, eta], ..."),
        ("blend.eta={kind: piecewise, knotts: 1}", "override 'blend.eta.knotts': unknown key; did you mean 'knots'?"),
        ("blend.eta={kind: piecewise, knots: 1}", "override 'blend.eta.knots': must be a valid list, but it is 1"),
        (
            "blend.eta={kind: piecewise, knots: [[0, x]]}",
            "'blend.eta.knots.0.1': must be a valid number, but it is 'x'",
        ),
        ("blend.eta={kind: piecewise, knots: [[0, .inf]]}", "'blend.eta.knots.0.1': must be a finite number, but it"),
        ("blend.eta={kind: piecewise, knots: [[0, -1]]}", "'blend.eta.knots.0.1': must be greater than or equal to 0"),
        (
            "blend.eta={kind: piecewise, knots: [[-0.5, 1]]}",
            "'blend.eta.knots.0.0': must be greater than or equal to 0",
        ),
        ("blend.beta={kind: piecewise, knots: [[0, 2]]}", "'blend.beta.knots.0.1': must be less than or equal to 1"),
        ("augment.mirror=1", "override 'augment.mirror': must be a valid boolean, but it is 1"),
        ("train.clip_norm=.inf", "override 'train.clip_norm': must be a finite number, but it is inf"),
        ("train.label_smoothing=.nan", "override 'train.label_smoothing': must be a finite number, but it is nan"),
        ("train.precision=fp16", "override 'train.precision': must be 'fp32', 'bf16' or 'auto', but it is 'fp16'"),
        ("data.shards=3", "override 'data.shards': must be a valid string, but it is 3"),
        ("name=a/b", "override 'name': must be a string that matches '^[A-Za-z0-9][A-Za-z0-9._-]*$', but it is 'a/b'"),
        ("name=..", "override 'name': must be a string that matches"),
        ("name='a\n'", "override 'name': must be a string that matches"),
        ("deepspeed={a: 2001-01-01}", "override 'deepspeed': must be made of numbers, strings, lists and mappings"),
        ("deepspeed={a: .inf}", "override 'deepspeed': must be a finite number"),
        ("train.epochs", "override 'train.epochs': must be dotted.key=value, as train.epochs=3"),
        ("=3", "override '=3': must be dotted.key=value"),
        ("train.epochs=[1", "override 'train.epochs=[1': not valid YAML in line 1"),
        ("name.first=b", "override 'name.first=b': 'name' is 'a', not a mapping"),
    ],
)
def test_wrong_overrides_are_named(override: str, message: str) -> None:
    assert message in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (["train.micro_batch=65"], ["train.micro_batch 65", "train.global_batch 64"]),
        (["augment.shift_px=64", "data.image_size=32"], ["augment.shift_px 64", "data.image_size 32"]),
        (["model.image.concat_depth=7"], ["concat_depth 7", "6 units"]),
        (["model.image={form: cifar, depth: 20, concat_depth: 3}"], ["concat_depth 3", "2 units"]),
        (["model.image={form: cifar, depth: 12}"], ["depth 12", "9n + 2"]),
        (["model.image.stage_channels=[8, 8]"], ["stage_channels [8, 8]", "units_per_stage [3, 4, 6, 3]"]),
        (["model.image.stage_channels=[8, 8, 8, 6]"], ["stage_channels [8, 8, 8, 6]", "multiples of 4"]),
        (["model.image={form: googlenet, width: 0.5, pretrained: a.pth}"], ["width 0.5", "pretrained a.pth"]),
        (["model.language.attention=0"], ["sharpening cam", "language.attention 0"]),
        (["optimizer.image.schedule.milestones=[0.5, 0.2]"], ["milestones [0.5, 0.2] must rise"]),
        (["optimizer.head.betas=[0.9]"], ["betas [0.9]", "two numbers below 1"]),
        (["blend.beta={kind: piecewise, knots: [[0.5, 0.1], [0.5, 0.2]]}"], ["[0.5, 0.5] must rise"]),
        (["blend.beta={kind: piecewise, knots: []}"], ["knots [] must be pairs"]),
        (["blend.beta={kind: piecewise, knots: [[0, 1, 1]]}"], ["knots [[0.0, 1.0, 1.0]] must be pairs"]),
        (["blend.eta={kind: piecewise, knots: []}"], ["blend.eta': knots [] must be pairs [fraction, eta]"]),
        (["blend.eta={kind: piecewise, knots: [[0, 1], [0.5]]}"], ["knots [[0.0, 1.0], [0.5]] must be pairs"]),
        (["blend.eta={kind: piecewise, knots: [[0.5, 1], [0.2, 2]]}"], ["knots' fractions [0.5, 0.2] must rise"]),
        (["blend.eta={kind: piecewise, knots: [[0, 1], [2, 2]]}"], ["fractions [0.0, 2.0] must not exceed 1"]),
        (["blend.eta={kind: piecewise, knots: [[0, 0]]}"], ["blend.eta': knots [[0.0, 0.0]] must have eta above 0"]),
        (["deepspeed.train_batch_size=3"], ["deepspeed.train_batch_size 3", "train.global_batch"]),
        (["deepspeed.optimizer={type: Adam}"], ["deepspeed.optimizer {'type': 'Adam'}", "set optimizer"]),
        (["deepspeed.zero_optimization.stage=2"], ["zero_optimization.stage 2", "train.zero_stage 0"]),
        (["deepspeed.zero_optimization=3"], ["deepspeed.zero_optimization 3 must be a mapping"]),
    ],
)
def test_contradictions_name_both_values(overrides: list[str], values: list[str]) -> None:
    message = refusal(*overrides)
    for value in values:
        assert value in message


@pytest.mark.parametrize(
    "address",
    [
        "http://me:SECRET@host/set",
        "http://me:SEC/RET@host/set",
        "http://me:SEC@RET@host/set",
        "HTTP://:SECRET@host",
        "http://group/me:SECRET@host",
        "https://host:8080/set:SECRET@2",
        "s3://KEY:SEC/RET@bucket/set",
        "filecache::http://me:SECRET@host/set",
        "https://host/set?token=SECRET",
        "https://host/set#SECRET",
        "https://host/set SECRET",
        "https://host/set\nme:SECRET@x",
    ],
)
def test_an_address_with_a_password_is_refused_and_not_shown(address: str) -> None:
    message = refusal(f"data.shards={json.dumps(address)}")
    assert message.startswith(("file.yaml: data: shards was given ", "override 'data'", "override 'data.shards'"))
    assert "with a password" in message or "?, # or a blank" in message
    assert "SEC" not in message and "RET" not in message


@pytest.mark.parametrize(
    "address",
    [
        "abfs://container@account.dfs.core.windows.net/sets/a:b",
        "az://container/sets/a@b:c@d",
        "s3://bucket/sets/a:b@c",
        "gs://bucket/2024-01-01T10:00/a@b",
        "https://host:8080/sets/a",
        "https://host/sets/v@2",
        "https://host:8080/sets/v%402",
        "http://[::1]:8080/sets",
        "runs/data/why?/a#1 b:c@d",
    ],
)
def test_an_address_in_which_no_password_can_be_meant_is_taken(address: str) -> None:
    assert DataConfig(shards=address).shards == address


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:SECRET@host",
        "https://me:SEC/RET@host:5000/mlflow",
        "https://host/mlflow?x=SECRET",
        "https://host/mlflow#SECRET",
        "postgresql://me:SECRET@host/db",
        "mysql+pymysql://me:SEC/RET@host/db",
        "postgresql://host/db?user=me&password=SECRET",
        "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3DSECRET",
    ],
)
def test_a_store_with_a_password_is_refused_and_not_shown(uri: str) -> None:
    message = refusal(f"tracking.uri={json.dumps(uri)}")
    assert "MLFLOW_TRACKING_URI instead, or user and password into MLFLOW_TRACKING_USERNAME and" in message
    assert "SEC" not in message and "RET" not in message


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "https://host/mlflow",
        "databricks://profile",
        "postgresql://me@host/db?sslmode=require",
        "sqlite:////srv/a:b@c/mlflow.db?timeout=3",
        "sqlite:///runs/mlflow.db",
    ],
)
def test_a_store_without_a_password_is_taken(uri: str) -> None:
    assert TrackingConfig(uri=uri).uri == uri


def test_what_is_missing_is_explained() -> None:
    assert (
        refusal(values={"name": "a"}) == "file.yaml: data: missing; Which samples are read and how they become tensors."
    )
    assert "file.yaml: data.shards: missing; Folder of the shard set" in refusal(values={"name": "a", "data": {}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping"),
        ("- a\n- b\n", "must hold a mapping"),
        ("a: [1\n", "not valid YAML in line 2"),
        ("a: 1\n\tb: 2\n", "not valid YAML in line 2"),
        ("a: b: c\n", "not valid YAML in line 1"),
        ("train: {epochs: 1}\ntrain: {seed: 1}\n", "not valid YAML in line 2: key 'train' is given twice"),
        ("train:\n  epochs: 1\n  epochs: 2\n", "not valid YAML in line 3: key 'epochs' is given twice"),
        ("a: &x 1\nb: *x\n", "not valid YAML in line 2: alias *x; write the value out"),
        ("name: !!python/object/apply:os.system ['touch executed']\n", "not valid YAML in line 1: could not determine"),
        ("name: !!python/name:os.system\n", "could not determine a constructor"),
        ("name: !!python/object:os.system {}\n", "could not determine a constructor"),
        ("name: !<tag:yaml.org,2002:python/object/new:os.system> [x]\n", "could not determine a constructor"),
        ("name: \x00", "not valid YAML"),
        ("[" * 2000, "nested too deeply"),
        ("{a: " * 2000, "nested too deeply"),
        (f"train: {{epochs: {'1' * 5000}}}", "not valid YAML"),
        ("1: 2\nname: a\ndata: {shards: x}\n", "file.yaml: 1: must be"),
        ("? [1, 2]\n: 3\n", "not valid YAML in line 1"),
        ("x" * 300_000, "longer than 262,144 characters"),
    ],
)
def test_wrong_files_are_named(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("file.yaml")
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value).startswith("file.yaml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [found.name for found in tmp_path.iterdir()] == ["file.yaml"], "the file was executed"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("absent.yaml", "No such file or directory; name a YAML file such as launch/configs/demo.yaml"),
        ("folder", "Is a directory"),
        ("latin.yaml", "not a YAML file"),
        ("a\0b", "not a YAML file"),
    ):
        with pytest.raises(InputError, match=message):
            load_config(tmp_path / name)


BOMBS = {
    "lists": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(12)),
    "mappings": "name: a\ndeepspeed:\n  a0: &a0 {x: 1}\n"
    + "".join(f"  a{n + 1}: &a{n + 1} {{{', '.join(f'k{i}: *a{n}' for i in range(9))}}}\n" for n in range(12)),
    "merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}\n" for n in range(12)),
    "itself": "a: &a [*a, *a]\n",
    "wide": "name: a\ndata: {shards: s}\nx: [" + "[], " * 15_000 + "]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_soon(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    started = time.process_time()
    with pytest.raises(InputError):
        load_config(path)
    assert time.process_time() - started < 20


def test_numbers_and_nests_too_large_to_show_are_still_refused() -> None:
    assert "a int too large to show" in refusal("train.epochs=-0x" + "f" * 5000)
    assert "file.yaml" in refusal(".".join(["deepspeed"] + ["a"] * 3000) + "=.inf")
    assert "file.yaml" in refusal(".".join(["a"] * 3000) + "=1")
    assert len(refusal(f"train.epochs={'x' * 5000}")) < 300
    assert len(refusal(f"{'x' * 5000}=1")) < 500


def test_an_error_is_one_line_that_no_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise InputError("sample 'a\n\r\x1b[2J\x07\u2028\ud800b':  wrong")

    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.endswith("sample 'a \\x1b[2J\\x07 \\ud800b': wrong\n")
    assert told.count("\n") == 1


def test_ranks_say_the_same_line_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for error, code, line in (
        (InputError("all know"), 2, ""),
        (TrainingFailed("x"), 3, ""),
    ):

        def main(error: Exception = error) -> None:
            raise error

        with pytest.raises(SystemExit) as ended:
            run_program(main)
        assert ended.value.code == code
        told = capsys.readouterr().err
        assert line in told and bool(told) == bool(line)


def test_the_command_ends_with_code_2_and_one_line(smallest_file: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), str(smallest_file), "train.epoch=3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "train.py: override 'train.epoch': unknown key; did you mean 'epochs'?\n"
    overlay = smallest_file.with_name("over.yaml")
    overlay.write_text("train: {epoch: 3}\n")
    ended = subprocess.run([*command[:3], str(overlay)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr == f"train.py: {overlay}: train.epoch: unknown key; did you mean 'epochs'?\n"


# ----------------------------------------------------------------------------------------------------------------- fuzz

FIELDS = {name for section in all_sections() for name in section.model_fields}
KEYS = st.sampled_from(sorted(FIELDS | {"", "x", "<<", "stage", "train_batch_size"}))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            "1e3",
            "\ud800",
            "constant",
            "linear",
            "sigmoid",
            "piecewise",
            "sgd_adam",
            "adamw",
            "medical",
            "cifar",
            "full",
            "balanced",
        ]
    )
)
VALUES = st.recursive(
    SCALARS, lambda below: st.lists(below, max_size=4) | st.dictionaries(KEYS, below, max_size=4), max_leaves=20
)
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def survives(values: Any) -> bool:
    """Whether it is refused with one line, or accepted and then the same after having been written and read."""
    try:
        config = check_config(values, "file.yaml")
    except InputError as error:
        return "\n" not in str(error)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        file.write(as_yaml(config))
        file.flush()
        return load_config(file.name) == config


@FUZZ
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_mapping_is_refused_in_one_line_or_accepted(values: dict[str, Any]) -> None:
    assert survives(values)
    assert survives({**SMALLEST, **values})


@FUZZ
@given(st.data())
def test_any_value_for_any_key_is_refused_in_one_line_or_accepted(data: st.DataObject) -> None:
    """Values are put where they are more likely to be nearly right than in a random mapping."""
    values: dict[str, Any] = copy.deepcopy(SMALLEST)
    section: type[Section] = RunConfig
    place = values
    while True:
        name = data.draw(st.sampled_from(sorted(section.model_fields)))
        choices = sections_in(section.model_fields[name])
        if not choices or data.draw(st.integers(0, 9)) == 0:
            place[name] = data.draw(VALUES)
            break
        section = data.draw(st.sampled_from(choices))
        place[name] = {**place.get(name, {}), **_required(section)}
        place = place[name]
        if "kind" in section.model_fields and len(choices) > 1:
            place["kind"] = section.model_fields["kind"].annotation.__args__[0]  # type: ignore[union-attr]
    assert survives(values)


YAML_TEXT = st.text("abk&*!<>|{}[]:,-?'\"\n\t #%@1e.=~", max_size=40)


@FUZZ
@given(st.one_of(YAML_TEXT, st.text(max_size=30), st.builds("{}={}".format, KEYS, YAML_TEXT)))
def test_any_override_is_refused_in_one_line_or_accepted(override: str) -> None:
    values = copy.deepcopy(SMALLEST)
    try:
        apply_override(values, override)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert survives(values)


@FUZZ
@given(text=st.one_of(YAML_TEXT, st.text(max_size=60), st.binary(max_size=60)))
def test_any_file_is_refused_in_one_line_or_read(text: str | bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        assert survives(read_yaml(path))
    except InputError as error:
        assert "\n" not in str(error)


# -------------------------------------------------------------------------------------------------------- documentation


def test_every_field_is_described() -> None:
    for section in all_sections():
        assert section.__doc__ and section.__doc__ != Section.__doc__, section
        for name, field in section.model_fields.items():
            assert field.description and field.description.strip().endswith("."), (section, name)


def test_the_reference_names_every_field_and_is_current() -> None:
    page = reference()
    for section in set(all_sections()):
        for name in section.model_fields:
            assert f"\n| `{name}` |" in page
    path = REPOSITORY / "docs" / "configuration.md"
    assert path.read_text(encoding="utf-8") == page, "run `python -m mdnet_dist.config_docs > docs/configuration.md`"


def test_the_reference_shows_types_limits_and_defaults() -> None:
    rows = reference().splitlines()
    assert "| `fit` | `pad`, `crop`, `stretch` | `pad` | How an image that is not square" in "\n".join(rows)
    for row in (
        "| `fold` | whole number from 0 or `null` | `null` |",
        "| `eta` | number above 0 or `balanced` or section | `1.0` |",
        "| `knots` | list of list of number from 0 | required | [[fraction of training done, eta], ...]",
        "## `blend.eta`",
        "| `dropout` | number from 0 below 1 | `0.3` |",
        "| `knots` | list of list of number from 0 to 1 | required |",
        "| `mirror` | `true`, `false` | `false` |",
        "| `optimizer` | section, by its `kind` | `kind: sgd_adam` |",
    ):
        assert any(line.startswith(row) for line in rows), row
    assert all(line.count(" | ") == 3 for line in rows if line.startswith("| `"))


def test_powers_are_what_python_reads() -> None:
    """The number in a file and the same number in Python are one."""
    for exponent in range(-30, 31):
        value = accepted(f"optimizer.image.lr=3e{exponent}").optimizer.image.lr
        assert value == float(f"3e{exponent}") and math.isfinite(value)
