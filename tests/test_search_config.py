"""The file of a search: what it says, what training configurations come of it, and what is refused and how."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mdnet_dist.config import Section
from mdnet_dist.config_check import describe_field, sections_in
from mdnet_dist.config_file import as_yaml, key_lines, load_config
from mdnet_dist.errors import InputError
from mdnet_dist.schedules import beta_at
from tests.conftest import REPOSITORY
from tests.tiny import tiny_config
from tune.parameter import RandomChooser
from tune.population import Settings
from tune.records import Point
from tune.search_config import Search, SearchConfig, load_search

SHIPPED = sorted((REPOSITORY / "tune").glob("*.yaml"))
SEARCH = """\
name: a
base: base.yaml
overrides: [train.epochs=8]
space:
  blend.beta:
    choice:
      - {kind: constant, value: {uniform: [0.05, 0.95]}}
      - kind: linear
        start: {uniform: [0, 1]}
        end: {uniform: [0, 1]}
  train.global_batch: {integers: [8, 16]}
trials:
  count: 4
  overrides: [train.epochs=4, evaluate.every_epochs=2]
scheduler: {kind: asha, grace_epochs: 2}
"""
PBT = """\
name: p
base: base.yaml
space:
  blend.beta.value: {uniform: [0.05, 0.95]}
  blend.eta: {log_uniform: [0.3, 30]}
trials: {count: 2, overrides: [train.epochs=4]}
scheduler: {kind: pbt}
"""
GRID = """\
name: g
base: base.yaml
space: {model.image.concat_depth: {choice: [0, 1, full]}, blend.eta: {log_uniform: [1, 100]}}
searcher: {kind: grid}
scheduler: {kind: none}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a training configuration."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(as_yaml(tiny_config(tmp_path / "set", tmp_path / "runs")))
    return tmp_path


def search_of(text: str = SEARCH, *overrides: str) -> Search:
    Path("a.yaml").write_text(text)
    return load_search("a.yaml", overrides)


def refusal(text: str, *overrides: str) -> str:
    Path("a.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_search("a.yaml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edited(old: str, new: str, text: str = SEARCH) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


# ----------------------------------------------------------------------------------------------------------- what it is


def test_the_defaults() -> None:
    config = search_of("name: a\nbase: base.yaml\nspace: {blend.eta: {uniform: [1, 2]}}\n", "trials.count=1",
                       "train.epochs=4").config  # fmt: skip
    assert (config.metric, config.mode, config.seed, config.runs_folder) == ("val/score", "max", 0, "runs")
    assert config.searcher.model_dump() == {"kind": "random"}
    assert config.scheduler.model_dump() == {"kind": "asha", "grace_epochs": 4, "reduction": 3}
    assert config.confirm.seeds == 1
    trials = {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0.0, "at_once": None, "restarts": 2}
    assert config.trials.model_dump() == {"count": 1, "overrides": [], "max_failed_share": 0.5} | trials
    for kind, others in (
        ("searcher", {"optuna": {"startup_trials": 8}, "grid": {"points": 3}}),
        (
            "scheduler",
            {"none": {}, "pbt": {"every_epochs": 2, "copied_share": 0.25, "resampled_share": 0.25, "step": 0.5}},
        ),
    ):
        for name, values in others.items():
            section = SearchConfig.model_validate(config.model_dump() | {kind: {"kind": name}})
            assert getattr(section, kind).model_dump() == {"kind": name, **values}


def test_every_field_says_what_it_means() -> None:
    def check(section: type[Section]) -> int:
        assert section.__doc__
        fields = section.model_fields
        assert all(len(describe_field(section, name)) > 8 for name in fields), section
        return len(fields) + sum(check(below) for field in fields.values() for below in sections_in(field))

    assert check(SearchConfig) > 30


def test_the_record_of_a_search_reads_back() -> None:
    search = search_of(SEARCH, "trials.count=7", "train.seed=3", "seed=5")
    record = search.as_yaml()
    again = search_of(record)
    assert again.config == search.config and again.as_yaml() == record
    assert again.base == search.base and again.short_base == search.short_base
    assert search.config.overrides == ["train.epochs=8", "train.seed=3"]
    assert (search.config.trials.count, search.config.seed) == (7, 5)


def test_the_folder_is_absolute(folder: Path) -> None:
    assert search_of().folder == folder / "runs" / "a"
    assert search_of(SEARCH, "name=b", "runs_folder=x/y").folder == folder / "x" / "y" / "b"
    assert search_of(SEARCH, "runs_folder=/abs").folder == Path("/abs/a")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_searches_load_and_say_how_they_are_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    search = load_search(path.relative_to(REPOSITORY))
    first, second, third = path.read_text().splitlines()[:3]
    assert first == f"# python launch/tune_beta.py tune/{path.name}"
    assert second == "#" and third.startswith("# ")
    assert search.config.name == path.stem
    assert search.short_base.data.shards == str(REPOSITORY / "runs" / "data" / "bladder")
    for _, _, point in search.space.probes():
        assert search.run_config(point, short=False).train.epochs == 24


def test_the_shipped_searches_are_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert [path.name for path in SHIPPED] == ["beta.yaml", "depth.yaml", "pbt.yaml", "rates.yaml"]
    beta, depth, pbt, rates = (load_search(path) for path in SHIPPED)
    kinds = ("constant", "linear", "cosine", "sigmoid", "delayed_step")
    assert beta.space.parameters()["blend.beta"].labels == kinds
    generator = RandomChooser(np.random.default_rng(0))
    seen = set()
    for _ in range(60):
        config = beta.run_config(beta.space.draw(generator), short=True)
        seen.add(config.blend.beta.kind)
        assert all(0 <= beta_at(config.blend.beta, fraction / 10) <= 1 for fraction in range(11))
        assert (config.train.epochs, config.evaluate.every_epochs) == (12, 2)
    assert seen == set(kinds)
    assert depth.space.grid(2) == [{"model.image.concat_depth": depth} for depth in (0, 1, "full")]
    assert (depth.config.confirm.seeds, beta.config.confirm.seeds) == (0, 3)
    assert pbt.population_settings() == Settings(beta=(0.05, 0.95), eta=(0.3, 30.0), eta_log=True)
    assert pbt.config.trials.count == 6
    assert {"optimizer.image.lr", "optimizer.language.lr"} < set(rates.space.keys())
    assert rates.config.searcher.kind == "optuna"


# ------------------------------------------------------------------------------------------------------- configurations


POINT: Point = {
    "blend.beta": "linear",
    "blend.beta.linear.start": 0.25,
    "blend.beta.linear.end": 0.75,
    "train.global_batch": 12,
}


def test_a_point_is_laid_over_the_base() -> None:
    search = search_of()
    short, whole = search.run_config(POINT, short=True), search.run_config(POINT, short=False)
    for config in (short, whole):
        assert config.blend.beta.model_dump() == {"kind": "linear", "start": 0.25, "end": 0.75}
        assert config.train.global_batch == 12
        assert (config.name, config.model) == ("tiny", load_config("base.yaml").model)
    assert (short.train.epochs, short.evaluate.every_epochs) == (4, 2)
    assert (whole.train.epochs, whole.evaluate.every_epochs) == (8, 1)
    assert (search.base.train.epochs, search.short_base.train.epochs) == (8, 4)
    assert search.base.blend == load_config("base.yaml").blend


def test_another_kind_replaces_the_section_and_the_same_kind_keeps_the_rest() -> None:
    text = edited("train.global_batch: {integers: [8, 16]}", "optimizer.kind: {choice: [sgd_adam, adamw]}\n  "
                  "optimizer.head.lr: {uniform: [1, 2]}")  # fmt: skip
    search = search_of(text, "optimizer.image.lr=0.5", "optimizer.head.weight_decay=0.25", "blend.beta={kind: linear}")
    beta: Point = {"blend.beta": "constant", "blend.beta.constant.value": 0.5, "optimizer.head.lr": 1.5}
    same = search.run_config({**beta, "optimizer.kind": "sgd_adam"}, short=True)
    other = search.run_config({**beta, "optimizer.kind": "adamw"}, short=True)
    assert same.blend.beta.model_dump() == {"kind": "constant", "value": 0.5}
    assert (same.optimizer.image.lr, same.optimizer.head.weight_decay, same.optimizer.head.lr) == (0.5, 0.25, 1.5)
    assert (other.optimizer.image.lr, other.optimizer.head.weight_decay, other.optimizer.head.lr) == (1e-3, 0, 1.5)


def test_paths_become_absolute(folder: Path) -> None:
    text = edited("train.global_batch: {integers: [8, 16]}", "model.image: {choice: {a: {form: googlenet, pretrained: "
                  "w/x.pth}, b: {form: googlenet, pretrained: /abs/y.pth}}}")  # fmt: skip
    overrides = ("data.shards=sets/one", "tracking.uri=sqlite:///store/m.db")
    search = search_of(text, *overrides)
    point: Point = {"blend.beta": "constant", "blend.beta.constant.value": 0.5}
    a, b = (search.run_config({**point, "model.image": label}, short=True) for label in "ab")
    assert (a.model.image.pretrained, b.model.image.pretrained) == (f"{folder}/w/x.pth", "/abs/y.pth")  # type: ignore[union-attr]
    for config in (a, search.base, search.short_base):
        assert config.data.shards == f"{folder}/sets/one"
        assert config.tracking.uri == f"sqlite:///{folder}/store/m.db"
    assert search_of(SEARCH, "tracking.uri=null").base.tracking.uri is None
    assert search_of(SEARCH, "tracking.uri=http://host:5/x").base.tracking.uri == "http://host:5/x"


def test_points_of_another_search_are_refused() -> None:
    search = search_of()
    with pytest.raises(InputError) as caught:
        search.run_config({**POINT, "blend.beta.linear.start": 2.0}, short=True)
    assert str(caught.value) == (
        "a.yaml: parameter 'blend.beta.linear.start' is 2; it must be a number from 0 to 1; was the space changed?"
    )


def test_contradictions_among_several_parameters_name_the_point() -> None:
    text = edited("  train.global_batch: {integers: [8, 16]}\n", "  augment.shift_px: {integers: [0, 31]}\n"
                  "  data.image_size: {choice: [32, 16]}\n")  # fmt: skip
    search = search_of(text)
    point: Point = {"blend.beta": "constant", "blend.beta.constant.value": 0.5}
    with pytest.raises(InputError) as caught:
        search.run_config({**point, "augment.shift_px": 20, "data.image_size": 16}, short=True)
    assert str(caught.value) == (
        "a.yaml: blend.beta constant, blend.beta.constant.value 0.5, augment.shift_px 20, data.image_size 16: "
        "augment.shift_px 20 must be less than data.image_size 16"
    )


def test_a_population_keeps_the_base_constant() -> None:
    search = search_of(PBT, "blend.beta.value=0.9")
    config = search.run_config({"blend.beta.value": 0.25, "blend.eta": 2.5}, short=True)
    assert config.blend.beta.model_dump() == {"kind": "constant", "value": 0.25}
    assert config.blend.eta == 2.5
    alone = search_of(PBT.replace("  blend.eta: {log_uniform: [0.3, 30]}\n", ""), "scheduler.step=0.25", "seed=3")
    assert alone.population_settings() == Settings(beta=(0.05, 0.95), step=0.25, seed=3)
    uniform = search_of(PBT, "space.blend.eta={uniform: [1, 2]}", "scheduler.copied_share=0.5")
    assert uniform.population_settings() == Settings(beta=(0.05, 0.95), eta=(1.0, 2.0), eta_log=False, copied_share=0.5)


# ------------------------------------------------------------------------------------------------------------ overrides


def test_overrides_of_the_search_and_of_its_runs() -> None:
    Path("over.yaml").write_text("train: {seed: 9}\n")
    search = search_of(SEARCH, "scheduler.kind=none", "over.yaml", "searcher.kind=optuna", "train.epochs=6", "mode=min")
    assert search.config.scheduler.model_dump() == {"kind": "none"}
    assert search.config.searcher.model_dump() == {"kind": "optuna", "startup_trials": 8}
    assert search.config.overrides == ["train.epochs=8", "over.yaml", "train.epochs=6"]
    assert (search.base.train.seed, search.base.train.epochs, search.short_base.train.epochs) == (9, 6, 4)
    search = search_of(SEARCH, "trials={overrides: [], workers: 2}", "confirm.seeds=0")
    assert (search.config.trials.count, search.config.trials.workers, search.config.confirm.seeds) == (4, 2, 0)
    assert search.short_base.train.epochs == 8


def test_distributions_are_replaced_whole_or_added() -> None:
    overrides = ("space.train.global_batch={choice: [8, 16]}", "space.blend.eta={uniform: [1, 2]}")
    space = search_of(SEARCH, *overrides).space
    assert space.keys() == ["blend.beta", "train.global_batch", "blend.eta"]
    assert space.parameters()["train.global_batch"].labels == (8, 16)
    assert search_of(SEARCH, "space={blend.eta: {uniform: [1, 2]}}").space.keys() == ["blend.eta"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trails.count=4", "override 'trails.count': unknown key; did you mean 'trials'?"),
        ("zzz=4", "override 'zzz': unknown key; known: augment, base, blend, confirm, data,"),
        ("trials.cuont=4", "override 'trials.cuont': unknown key; did you mean 'count'?"),
        ("trials.count=x", "override 'trials.count': must be a valid integer, but it is 'x'"),
        ("scheduler.kind=ahsa", "a.yaml line 15: scheduler: kind must be one of asha, none, pbt"),
        ("searcher.points=3", "override 'searcher.points': unknown key; known: kind"),
        ("trials", "override 'trials': must be dotted.key=value"),
        ("space", "override 'space': must be dotted.key=value"),
        ("space=1", "override 'space': must be a mapping of keys to values, but it is 1"),
        ("space.blend.eta={unifrom: [1, 2]}", "override 'space.blend.eta.unifrom': unknown distribution; did you mean"),
        ("space.blend.eta={uniform: [0, 2]}", "override 'space.blend.eta.uniform.0': blend.eta 0: blend.eta: must be"),
        ("space.blend.eta=[", "override 'space.blend.eta': not valid YAML in line 1"),
        ("space.blend.eta=1", "override 'space.blend.eta': must be a distribution"),
        ("train.epocs=4", "override 'train.epocs': unknown key; did you mean 'epochs'?"),
        ("data.fold=x", "override 'data.fold': must be a valid integer, but it is 'x'"),
        ("absent.yaml", "absent.yaml: No such file"),
        ("base=absent.yml", "override 'base': absent.yml: No such file"),
        ("trials.overrides=[x=1]", "override 'trials.overrides': override 'x': unknown key"),
        ("overrides=[train.epocs=1]", "override 'overrides': override 'train.epocs': unknown key; did you mean"),
        ("trials.count=null", "override 'trials.count': missing; searcher random wants a number of trials"),
    ],
)
def test_wrong_overrides_are_named(override: str, message: str) -> None:
    assert refusal(SEARCH, override).startswith(message)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: a\n", "name: a b\n", "a.yaml line 1: name: must be a string that matches '^[A-Za-z0-9]"),
        ("name: a\n", "nmae: a\n", "a.yaml line 1: nmae: unknown key; did you mean 'name'?"),
        ("  count: 4\n", "  cuont: 4\n", "a.yaml line 13: trials.cuont: unknown key; did you mean 'count'?"),
        ("  count: 4\n", "  count: 0\n", "a.yaml line 13: trials.count: must be greater than 0, but it is 0"),
        ("  count: 4\n", "  at_once: 1\n", "a.yaml line 12: trials.count: missing; searcher random wants a number"),
        ("  count: 4\n", "  count: [\n", "a.yaml: not valid YAML in line"),
        ("base: base.yaml\n", "", "a.yaml: base: missing; A training configuration, as launch/train.py takes it."),
        ("base: base.yaml", "base: no.yaml", "a.yaml line 2: base: no.yaml: No such file or directory; name a YAML"),
        ("[train.epochs=8]", "[train.epocs=8]", "a.yaml line 3: overrides: override 'train.epocs': unknown key; did"),
        ("[train.epochs=8]", "train.epochs=8", "a.yaml line 3: overrides: must be a valid list, but it is"),
        ("[train.epochs=8]", "[1]", "a.yaml line 3: overrides.0: must be a valid string, but it is 1"),
        ("[train.epochs=4,", "[train.epochs=0,", "a.yaml line 14: trials.overrides: override 'train.epochs': must be"),
        ("grace_epochs: 2", "grace_epoch: 2", "a.yaml line 15: scheduler.grace_epoch: unknown key; did you mean"),
        ("kind: asha,", "kind: ahsa,", "a.yaml line 15: scheduler: kind must be one of asha, none, pbt"),
        ("grace_epochs: 2", "reduction: 1", "a.yaml line 15: scheduler.reduction: must be greater than or equal to 2"),
        ("scheduler:", "metric: score\nscheduler:", "a.yaml line 15: metric: must be a string that matches '^(val|t"),
        ("scheduler:", "mode: most\nscheduler:", "a.yaml line 15: mode: must be 'max' or 'min', but it is 'most'"),
        ("scheduler:", "1: 2\nscheduler:", "a.yaml line 15: 1: must be"),
        # The space itself.
        ("{integers: [8, 16]}", "16", "a.yaml line 11: space.train.global_batch: must be a distribution, such as"),
        ("{integers: [8, 16]}", "{integer: [8, 16]}", "a.yaml line 11: space.train.global_batch.integer: unknown dist"),
        ("{integers: [8, 16]}", "{integers: [8]}", "a.yaml line 11: space.train.global_batch.integers: must be two wh"),
        ("kind: linear\n", "knd: linear\n", "a.yaml line 8: space.blend.beta.choice.1: has no kind or form to be"),
        (
            "end: {uniform: [0, 1]}",
            "end: {unifrm: [0, 1]}",
            "a.yaml line 10: space.blend.beta.choice.1.end.unifrm: unk",
        ),
        # Keys that the training configuration has not, or that may not vary.
        (
            "train.global_batch:",
            "train.globl_batch:",
            "a.yaml line 11: space.train.globl_batch: unknown key; did you mean 'global_batch'?",
        ),
        ("train.global_batch:", "trian.x:", "a.yaml line 11: space.trian.x: unknown key; did you mean 'train'?"),
        (
            "train.global_batch:",
            "train.epochs.x:",
            "a.yaml line 11: space.train.epochs.x: unknown key; train.epochs is no",
        ),
        ("train.global_batch:", "model.image.wdith:", "space.model.image.wdith: unknown key; did you mean 'width'?"),
        ("train.global_batch:", "train.seed:", "a.yaml line 11: space.train.seed: may not be in the space; all trials"),
        ("train.global_batch:", "name:", "space.name: may not be in the space; all trials have the same name"),
        ("train.global_batch:", "runs_folder:", "space.runs_folder: may not be in the space"),
        ("train.global_batch:", "data.shards:", "space.data.shards: may not be in the space"),
        (
            "train.global_batch:",
            "tracking.experiment:",
            "space.tracking.experiment: may not be in the space; all trials have the same tracking",
        ),
        ("train.global_batch:", "tracking:", "space.tracking: may not be in the space"),
        (
            "train.global_batch: {integers: [8, 16]}",
            "train: {choice: {a: {epochs: 4}, b: {seed: 4}}}",
            "a.yaml line 11: space.train.choice.b: train b: changes one of name, runs_folder, data.shards, "
            "tracking, train.seed, which all",
        ),
        (
            "train.global_batch:",
            "blend.beta.value:",
            "a.yaml line 11: space.blend.beta.value: is a part of 'blend.beta', which is in the space too; keep "
            "one of them",
        ),
        # What cannot be trained.
        (
            "{integers: [8, 16]}",
            "{integers: [2, 16]}",
            "a.yaml line 11: space.train.global_batch.integers.0: train.global_batch 2: train.micro_batch 4 "
            "exceeds train.global_batch 2",
        ),
        (
            "{integers: [8, 16]}",
            "{choice: [8, x]}",
            "a.yaml line 11: space.train.global_batch.choice.1: train.global_batch x: train.global_batch: must "
            "be a valid integer, but it is 'x'",
        ),
        (
            "end: {uniform: [0, 1]}",
            "end: {uniform: [0, 1.5]}",
            "a.yaml line 10: space.blend.beta.choice.1.end.uniform.1: blend.beta.linear.end 1.5: blend.beta.end: "
            "must be less than or equal to 1, but it is 1.5",
        ),
        (
            "end: {uniform: [0, 1]}",
            "end: {choice: {low: 0, high: 2}}",
            "a.yaml line 10: space.blend.beta.choice.1.end.choice.high: blend.beta.linear.end high: "
            "blend.beta.end: must be less than or equal to 1, but it is 2",
        ),
        (
            "end: {uniform: [0, 1]}",
            "at: {uniform: [0, 1]}",
            "a.yaml line 8: space.blend.beta.choice.1: blend.beta linear: blend.beta.at: unknown key; known: "
            "end, kind, start",
        ),
        (
            "[0.05, 0.95]",
            "[-1, 0.95]",
            "a.yaml line 5: space.blend.beta: blend.beta constant, blend.beta.constant.value -1: blend.beta.value: "
            "must be greater than or equal to 0, but it is -1.0",
        ),
        (
            "kind: linear\n",
            "kind: linaer\n",
            "a.yaml line 8: space.blend.beta.choice.1: blend.beta linaer: blend.beta: kind must be one of "
            "constant, linear",
        ),
        # What the scheduler cannot judge.
        (
            "grace_epochs: 2",
            "grace_epochs: 5",
            "a.yaml line 15: scheduler: scheduler.grace_epochs 5 exceeds the trials' train.epochs 4",
        ),
        (
            "every_epochs=2]",
            "every_epochs=3]",
            "a.yaml line 15: scheduler: the trials' evaluate.every_epochs 3 exceeds scheduler.grace_epochs 2",
        ),
        (
            "train.global_batch: {integers: [8, 16]}",
            "train.epochs: {integers: [1, 4]}",
            "a.yaml line 11: space.train.epochs.integers.0: train.epochs 1: scheduler.grace_epochs 2 exceeds the "
            "trials' train.epochs 1",
        ),
    ],
)
def test_wrong_files_are_named_with_line_and_key(old: str, new: str, message: str) -> None:
    found = refusal(edited(old, new))
    assert message in found
    assert found.startswith("a.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "blend.eta:",
            "train.micro_batch:",
            "a.yaml line 5: space.train.micro_batch: scheduler pbt searches blend.beta.value and blend.eta alone",
        ),
        (
            "{log_uniform: [0.3, 30]}",
            "{choice: [1, balanced]}",
            "a.yaml line 5: space.blend.eta: scheduler pbt wants uniform or log_uniform here, without a step",
        ),
        (
            "{log_uniform: [0.3, 30]}",
            "{uniform: [1, 3], step: 1}",
            "a.yaml line 5: space.blend.eta: scheduler pbt wants",
        ),
        (
            "{uniform: [0.05, 0.95]}",
            "{log_uniform: [0.05, 0.95]}",
            "a.yaml line 4: space.blend.beta.value: scheduler pbt wants uniform here, without a step",
        ),
        (
            "  blend.beta.value: {uniform: [0.05, 0.95]}\n",
            "",
            "a.yaml line 3: space: scheduler pbt searches blend.beta.value; give it a uniform distribution",
        ),
        ("[0.05, 0.95]", "[0.0, 0.0005]", "a.yaml line 3: space: bounds of beta 0.0, 0.0005: must"),
        ("[0.05, 0.95]", "[0.05, 1.5]", "a.yaml line 3: space: bounds of beta 0.05, 1.5: must"),
        ("count: 2,", "count: 1,", "a.yaml line 6: trials.count: 1 is no population; scheduler pbt wants 2 members"),
        ("count: 2,", "", "a.yaml line 6: trials.count: missing; searcher random wants a number of trials"),
        (
            "scheduler:",
            "searcher: {kind: grid}\nscheduler:",
            "a.yaml line 7: searcher: scheduler pbt wants searcher ra",
        ),
        (
            "{kind: pbt}",
            "{kind: pbt, every_epochs: 3}",
            "a.yaml line 7: scheduler.every_epochs: 3 must divide the trials' train.epochs 4 into two stretches "
            "or more",
        ),
        (
            "{kind: pbt}",
            "{kind: pbt, every_epochs: 4}",
            "a.yaml line 7: scheduler.every_epochs: 4 must divide the trials' train.epochs 4 into two stretches "
            "or more",
        ),
        (
            "train.epochs=4]",
            "train.epochs=8, evaluate.every_epochs=3]",
            "a.yaml line 7: scheduler.every_epochs: the trials' evaluate.every_epochs 3 must divide 2, so that "
            "each stretch ends with a score",
        ),
        (
            "{kind: pbt}",
            "{kind: pbt, copied_share: 0.6}",
            "a.yaml line 7: scheduler.copied_share: must be less than or",
        ),
        (
            "base: base.yaml",
            "base: base.yaml\noverrides: ['blend.beta={kind: linear}']",
            "a.yaml line 2: base: blend.beta is linear; under scheduler pbt the base has a constant",
        ),
    ],
)
def test_populations_that_cannot_be_are_refused(old: str, new: str, message: str) -> None:
    assert refusal(edited(old, new, PBT)).startswith(message)


def test_the_size_of_a_grid_is_limited() -> None:
    assert search_of(GRID).space.grid_size(3) == 9
    assert search_of(GRID, "trials.count=9").config.trials.count == 9
    assert refusal(GRID, "trials.count=10") == (
        "override 'trials.count': 10 exceeds the 9 points of the grid; null takes all"
    )
    assert refusal(edited("[1, 100]", "[1, 100]}, train.log_every_steps: {integers: [1, 9999], step: 1", GRID)) == (
        "a.yaml line 3: space: the grid has 89,991 points; it may have 10,000"
    )
    assert refusal(GRID, "searcher.points=1") == (
        "override 'searcher.points': must be greater than or equal to 2, but it is 1"
    )


def test_a_missing_optuna_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert search_of(SEARCH, "searcher.kind=optuna").config.searcher.kind == "optuna"
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else found(name))
    assert search_of(SEARCH).config.searcher.kind == "random"
    assert refusal(SEARCH + "searcher: {kind: optuna}\n") == (
        "a.yaml line 16: searcher: Optuna is not installed; pip install '.[optuna]'"
    )


def test_a_base_may_need_what_the_command_line_gives() -> None:
    Path("base.yaml").write_text("name: b\ndata: {image_size: 32}\ntrain: {global_batch: 8, micro_batch: 8}\n")
    assert refusal(SEARCH).startswith("a.yaml line 2: base: base.yaml: data.shards: missing; Folder of the shard set")
    assert search_of(SEARCH, "data.shards=x").base.data.image_size == 32
    assert refusal(SEARCH, "data.shards=x", "train.epocs=1").startswith("override 'train.epocs': unknown key")
    assert refusal(SEARCH, "data.shards=x", "tracking.uri=file:x").startswith("tracking.uri 'file:x': MLflow keeps")


def test_lines_are_those_of_an_editor() -> None:
    text = "# first\n\na:\n  b.c: 1\n\n  d: [x,\n    {e: 2}, {f: 3}]\n'g h': |\n  long\n  text\ni: end\n"
    Path("lines.yaml").write_text(text)
    lines = {"a": 3, "a.b.c": 4, "a.d": 6, "a.d.0": 6, "a.d.1": 7, "a.d.1.e": 7, "a.d.2": 7, "a.d.2.f": 7, "g h": 8}
    assert key_lines("lines.yaml") == {**lines, "i": 11}
    Path("lines.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match=r"lines\.yaml: not valid YAML in line 2"):
        key_lines("lines.yaml")


def test_importing_a_search_brings_in_nothing_heavy() -> None:
    code = "import sys, tune.search_config, tune.proposals; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr
    loaded = set(ran.stdout.split())
    assert "tune.space" in loaded
    assert not loaded & {"ray", "optuna", "mlflow", "deepspeed", "matplotlib", "sklearn", "torch"}


def test_files_that_are_no_search_are_named() -> None:
    for text, message in (
        ("- 1\n", "a.yaml: must hold a mapping of keys to values"),
        ("name: !!python/name:os.system\n", "a.yaml: not valid YAML in line 1"),
        ("name: a\nspace: {}\nbase: base.yaml\ntrials: {count: 1}\n", "a.yaml line 2: space: holds nothing; give"),
        ("name: a\nspace: {1: 2}\nbase: base.yaml\n", "a.yaml line 2: space.1: must be a valid string"),
        (yaml.safe_dump({"name": "a", "base": "a.yaml"}), "a.yaml: space: missing; {dotted key of the training"),
    ):
        assert refusal(text).startswith(message)
    with pytest.raises(InputError, match=r"none\.yaml: No such file"):
        load_search("none.yaml")
