"""`launch/cross_validate.py`: which folds are missing, the table, and the command stopped and started again."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdnet_dist.config_file import as_yaml, load_config
from mdnet_dist.cross_validation import (
    FoldRun,
    Model,
    arguments_of,
    as_markdown,
    images_seen,
    mean_and_std,
    plan_folds,
    plan_models,
    prepare_folder,
    results_of,
    scores_of,
    summary_metrics,
    table_text,
)
from mdnet_dist.cross_validation_run import Request, _write_table
from mdnet_dist.errors import InputError
from mdnet_dist.figures import draw_folds
from mdnet_dist.run_folder import alone_in
from mdnet_dist.shards import ShardManifest, load_manifest
from mdnet_dist.side_by_side import Devices
from mdnet_dist.tracking import Tracker
from tests.conftest import REPOSITORY
from tests.test_train import _environment, run
from tests.tiny import tiny_config, tiny_set

BASELINES = REPOSITORY / "launch" / "configs" / "baselines"
COMMAND = [sys.executable, "launch/cross_validate.py"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> ShardManifest:
    folder = tmp_path_factory.mktemp("folds") / "shards"
    tiny_set(folder, folds=3)
    return load_manifest(folder)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration over a tiny set in three folds."""
    tiny_set(tmp_path / "shards", folds=3)
    path = tmp_path / "tiny.yaml"
    path.write_text(as_yaml(tiny_config(tmp_path / "shards", tmp_path / "runs")))
    (tmp_path / "plain.yaml").write_text("model: {sharpening: none}\n")
    return path


# ----------------------------------------------------------------------------------------------------- what there is


def test_a_baseline_differs_in_what_its_overlay_says_alone(config: Path, tmp_path: Path) -> None:
    mdnet, sat, plain = plan_models(
        str(config), ["train.epochs=2"], ["show_attend_tell", str(tmp_path / "plain.yaml")], BASELINES
    )
    assert [mdnet.name, sat.name, plain.name] == ["mdnet", "show_attend_tell", "plain"]
    assert (mdnet.config.model.sharpening, plain.config.model.sharpening) == ("cam", "none")
    assert mdnet.config.train.epochs == plain.config.train.epochs == 2
    same = mdnet.config.model.model_copy(update={"sharpening": "none"})
    assert mdnet.config.model_copy(update={"model": same}) == plain.config


def test_unknown_and_repeated_baselines_are_named(config: Path) -> None:
    with pytest.raises(InputError, match=r"--baselines nothing: no such file .*; known: neuraltalk2, resnet, show_att"):
        plan_models(str(config), [], ["nothing"], BASELINES)
    with pytest.raises(InputError, match="'resnet' is there already"):
        plan_models(str(config), [], ["resnet", "resnet"], BASELINES)


def test_folds_are_planned_one_after_another(config: Path, manifest: ShardManifest, tmp_path: Path) -> None:
    models = plan_models(str(config), [], [str(tmp_path / "plain.yaml")], BASELINES)
    runs = plan_folds(models, manifest, None, tmp_path / "cv")
    assert [run.name for run in runs] == [f"{model} fold {fold}" for fold in range(3) for model in ("mdnet", "plain")]
    assert runs[-1].folder == tmp_path / "cv" / "plain" / "fold2"
    assert [run.fold for run in plan_folds(models[:1], manifest, [2, 0, 2], tmp_path)] == [2, 0]
    with pytest.raises(InputError, match=r"data\.fold 3: the shard set has 3 folds"):
        plan_folds(models, manifest, [3], tmp_path)


def test_a_set_without_folds_is_refused(tmp_path: Path) -> None:
    tiny_set(tmp_path / "shards")
    (tmp_path / "tiny.yaml").write_text(as_yaml(tiny_config(tmp_path / "shards", tmp_path / "runs")))
    models = plan_models(str(tmp_path / "tiny.yaml"), [], [], BASELINES)
    with pytest.raises(InputError, match=r"dealt into train, val, test, not into folds; .* --folds 5"):
        plan_folds(models, load_manifest(tmp_path / "shards"), None, tmp_path)


def test_images_seen_follow_from_the_folds_that_train(config: Path, manifest: ShardManifest) -> None:
    """Of 37 images, fold 0 is for testing and fold 1 for validation; batches of 8, and the rest sits out."""
    assert sum(part.samples for part in manifest.parts.values()) == 37
    training = manifest.parts["fold2"].samples
    assert images_seen(load_config(config), manifest, 0) == training // 8 * 8
    assert images_seen(load_config(config, ["train.epochs=5"]), manifest, 0) == 5 * (training // 8 * 8)


def test_what_deepspeed_is_given(config: Path, tmp_path: Path) -> None:
    """A run that was begun is resumed; an overlay comes before what belongs to the fold."""
    [_, model] = plan_models(str(config), [], [str(tmp_path / "plain.yaml")], BASELINES)
    run = FoldRun(model=model, fold=1, folder=tmp_path / "cv" / "plain" / "fold1")
    given = arguments_of(run, "demo.yaml", ["train.epochs=2"], "abc")
    assert given[:4] == ["launch/train.py", "demo.yaml", "train.epochs=2", str(tmp_path / "plain.yaml")]
    assert given[4:] == [
        "data.fold=1", f"runs_folder={tmp_path}/cv/plain", "name=fold1", "--parent-run", "abc",
    ]  # fmt: skip
    run.folder.mkdir(parents=True)
    assert arguments_of(run, "demo.yaml", [], "abc")[-1] == "--resume"


def test_a_fold_is_done_when_its_test_part_is_scored(tmp_path: Path) -> None:
    assert scores_of(tmp_path) is None
    (tmp_path / "metrics.json").write_text('{"val/dca": 0.5}')
    assert scores_of(tmp_path) is None
    (tmp_path / "metrics.json").write_text('{"val/dca": 0.5, "test/dca": 0.25}')
    assert scores_of(tmp_path) == {"dca": 0.25}
    for damaged in ("", "[]", '{"test/dca": "x"}', "{"):
        (tmp_path / "metrics.json").write_text(damaged)
        with pytest.raises(InputError, match=r"metrics\.json: damaged .*; delete"):
            scores_of(tmp_path)


def test_another_configuration_does_not_go_on_in_the_folder(config: Path, tmp_path: Path) -> None:
    prepare_folder(tmp_path / "cv", plan_models(str(config), [], [], BASELINES))
    prepare_folder(tmp_path / "cv", plan_models(str(config), [], [str(tmp_path / "plain.yaml")], BASELINES))
    with pytest.raises(InputError, match=r"mdnet/config\.yaml: train\.epochs was 1 there and is 2 now"):
        prepare_folder(tmp_path / "cv", plan_models(str(config), ["train.epochs=2"], [], BASELINES))


def test_the_shared_configuration_lies_in_the_folder_and_out_names_it(config: Path, tmp_path: Path) -> None:
    models = plan_models(str(config), ["train.epochs=2"], [str(tmp_path / "plain.yaml")], BASELINES)
    assert Request(config=str(config), overrides=[], models=models).folder == tmp_path / "runs" / "tiny-cv"
    folder = Request(config=str(config), overrides=[], models=models, out=tmp_path / "else").folder
    prepare_folder(folder, models)
    assert folder == tmp_path / "else"
    assert load_config(folder / "config.yaml") == models[0].config
    assert load_config(folder / "plain" / "config.yaml") == models[1].config


def test_a_fold_of_another_configuration_is_not_gone_on_with(
    config: Path, manifest: ShardManifest, tmp_path: Path
) -> None:
    """The fold's own config.yaml counts: somebody may have put a run there."""
    models = plan_models(str(config), [], [], BASELINES)
    runs = plan_folds(models, manifest, None, tmp_path / "cv")
    for run_of_fold in runs[:2]:
        run_of_fold.folder.mkdir(parents=True)
        given = arguments_of(run_of_fold, str(config), [], None)
        overrides = [argument for argument in given[2:] if not argument.startswith("--")]
        as_trained = load_config(config, overrides)
        assert as_trained == run_of_fold.config, "what the command resolves to is what is expected"
        (run_of_fold.folder / "config.yaml").write_text(as_yaml(as_trained))
    prepare_folder(tmp_path / "cv", models, runs)
    (runs[1].folder / "config.yaml").write_text(as_yaml(runs[0].config))
    with pytest.raises(InputError, match=r"fold1/config\.yaml: name was fold0 there and is fold1 now"):
        prepare_folder(tmp_path / "cv", models, runs)


def test_the_command_is_found_from_any_folder(
    config: Path, manifest: ShardManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [run_of_fold, *_] = plan_folds(plan_models(str(config), [], [], BASELINES), manifest, [0], tmp_path)
    monkeypatch.chdir(tmp_path)
    assert Path(arguments_of(run_of_fold, str(config), [], None)[0]).resolve() == REPOSITORY / "launch" / "train.py"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ended=st.sets(st.tuples(st.sampled_from(["mdnet", "a", "b"]), st.integers(0, 2))))
def test_the_table_has_what_has_ended_with_models_in_their_order(
    ended: set[tuple[str, int]], manifest: ShardManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever folds have ended: each is there once, models stand in the order that was asked for, folds in theirs."""
    base = tiny_config(Path("shards"), Path("runs"))
    models = [Model(name=name, overlay=None, config=base) for name in ("mdnet", "a", "b")]
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patched:
        patched.setattr("mdnet_dist.cross_validation.parameters_of", lambda folder: 7)
        for name, fold in ended:
            path = Path(folder, name, f"fold{fold}", "metrics.json")
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"test/dca": fold / 10}))
        runs = plan_folds(models, manifest, None, Path(folder))
        missing = [run_of_fold for run_of_fold in runs if scores_of(run_of_fold.folder) is None]
        found = results_of(runs, manifest)
    assert {(one.model.name, one.fold) for one in missing} == {(one.model.name, one.fold) for one in runs} - ended
    assert list(found) == [name for name in ("mdnet", "a", "b") if any(name == model for model, _ in ended)]
    for name, row in found.items():
        folds = sorted(fold for model, fold in ended if model == name)
        assert row["folds"] == {str(fold): {"dca": fold / 10} for fold in folds}
        assert list(row["folds"]) == [str(fold) for fold in folds]


def test_devices_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    on_gpus = Devices(accelerators=2, slot=1, side_by_side=4, gpus=8)
    assert on_gpus.launcher_options() == ["--include", "localhost:2,3"]
    assert on_gpus.environment() == {}
    on_cpus = Devices(accelerators=1, slot=1, side_by_side=2)
    assert on_cpus.launcher_options() == ["--num_accelerators", "1"]
    assert int(on_cpus.environment()["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)


# --------------------------------------------------------------------------------------------------------- the table


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_mean_and_deviation(values: list[float]) -> None:
    mean, std = mean_and_std(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert std == pytest.approx(statistics.stdev(values), abs=1e-6)


def test_one_fold_has_no_deviation() -> None:
    assert math.isnan(mean_and_std([3.0])[1])
    assert "dca_std" not in " ".join(summary_metrics(results(mdnet=[{"dca": 0.5}])))


def results(**models: list[dict[str, float]]) -> dict[str, Any]:
    return {
        name: {"parameters": 1234, "images_seen": 5678, "folds": {str(k): scores for k, scores in enumerate(folds)}}
        for name, folds in models.items()
    }


def test_the_table_as_people_read_it() -> None:
    """Means 60 and 70 %; deviations |50 - 70| / sqrt(2) and 0."""
    found = results(mdnet=[{"dca": 0.5, "cider": 1.0}, {"dca": 0.7, "cider": 2.0}], other=[{"dca": 0.7}, {"dca": 0.7}])
    metrics = [("bleu4", "BLEU-4", 100), ("cider", "CIDEr-D", 1), ("dca", "DCA", 100)]
    assert as_markdown(found, metrics) == (
        "| model | folds | weights | images seen | CIDEr-D | DCA |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| mdnet | 2 | 1,234 | 5,678 | 1.50 ± 0.71 | 60.00 ± 14.14 |\n"
        "| other | 2 | 1,234 | 5,678 |  | **70.00** ± 0.00 |\n"
    )
    text = table_text(found, "title")
    assert text.startswith("# title\n")
    assert "annotations" not in text
    assert "against the annotations" in table_text(results(mdnet=[{"energy/sentences": 0.5}]), "title")


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    draw_folds({"DCA": {"mdnet": [60.0, 70.0], "other": [65.0]}, "BLEU-4": {"mdnet": [50.0]}}, tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_the_means_of_more_folds_are_logged_at_a_step_of_their_own(
    config: Path, manifest: ShardManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker sends no step twice (`open_parent`): at the same step the store would keep the means of one fold."""
    monkeypatch.setattr("mdnet_dist.cross_validation.parameters_of", lambda folder: 7)
    models = plan_models(str(config), [], [], BASELINES)
    runs = plan_folds(models, manifest, None, tmp_path)
    prepare_folder(tmp_path, models)
    logged: list[tuple[int, dict[str, float]]] = []
    sent: list[Path] = []
    tracker = SimpleNamespace(
        log_metrics=lambda metrics, step: logged.append((step, metrics)), log_artifact=lambda path: sent.append(path)
    )
    for run_of_fold, dca in zip(runs[:2], (0.5, 0.7)):
        run_of_fold.folder.mkdir(parents=True)
        (run_of_fold.folder / "metrics.json").write_text(json.dumps({"test/dca": dca}))
        _write_table(tmp_path, runs, manifest, cast("Tracker", tracker))
    assert logged[0] == (1, {"mdnet/dca_mean": 0.5})
    assert logged[1][0] == 2
    assert logged[1][1] == pytest.approx({"mdnet/dca_mean": 0.6, "mdnet/dca_std": 0.02**0.5})
    assert {path.name for path in sent} == {"config.yaml", "table.md", "table.png", "results.json"}
    assert "2 folds of 3 by patient" in (tmp_path / "table.md").read_text()


# ---------------------------------------------------------------------------------------------------------- the command


def metrics_times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("*/*/metrics.json")}


def nested_runs(config: Path) -> tuple[list[str], dict[str, str]]:
    """Ids of the parents, and {name of a nested run: its parent}, of the store."""
    from mlflow import MlflowClient

    client = MlflowClient(load_config(config).tracking.uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = list(client.search_runs(experiments))
    parents = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in runs}
    nested = [(run.info.run_name, run.data.params["model.sharpening"]) for run in runs if parents[run.info.run_id]]
    assert len(nested) == len(set(nested)), "no fold of a model has two runs"
    return (
        [run_id for run_id, parent in parents.items() if parent is None],
        {run.info.run_name: parent for run in runs if (parent := parents[run.info.run_id])},
    )


def processes_with(text: str) -> list[str]:
    """Command lines of processes that run and hold a text."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue  # it has ended meanwhile
    return [line for line in lines if text in line]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_started_again_it_goes_on_with_what_is_missing(config: Path, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "runs" / "tiny-cv"
    command = [
        *COMMAND,
        str(config),
        "--folds",
        "0",
        "1",
        "--baselines",
        str(tmp_path / "plain.yaml"),
        "--at-once",
        "2",
    ]
    with open(tmp_path / "out.txt", "w") as out:
        driver = subprocess.Popen(command, cwd=REPOSITORY, env=_environment(), stdout=out, stderr=out)
        deadline = time.monotonic() + 200
        while not metrics_times(folder):
            assert driver.poll() is None, (tmp_path / "out.txt").read_text()
            assert time.monotonic() < deadline, (tmp_path / "out.txt").read_text()
            time.sleep(0.1)
        driver.send_signal(number)
        code = driver.wait(90)
    if number == signal.SIGTERM:
        assert code == 143, (tmp_path / "out.txt").read_text()
        assert "stopped by SIGTERM; the same command goes on" in (tmp_path / "out.txt").read_text()
        assert not processes_with(f"runs_folder={folder}"), "no process may be left"
    else:
        again = run(*command)  # what the dead driver left running still holds the folder
        if again.returncode == 2:
            assert "still works there" in again.stderr
        while processes_with(f"runs_folder={folder}"):
            assert time.monotonic() < deadline + 60
            time.sleep(0.2)
    before = metrics_times(folder)
    finished = run(*command)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    after = metrics_times(folder)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before, "a fold that was done is not trained again"
    found = json.loads((folder / "results.json").read_text())
    assert {model: sorted(row["folds"]) for model, row in found.items()} == {"mdnet": ["0", "1"], "plain": ["0", "1"]}
    assert "| mdnet | 2 |" in finished.stdout
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    parents, nested = nested_runs(config)
    assert len(parents) == 1
    assert nested == {"fold0": parents[0], "fold1": parents[0]}


@pytest.mark.slow
def test_a_fold_that_fails_ends_it_and_names_its_log(config: Path, tmp_path: Path) -> None:
    finished = run(*COMMAND, config, "optimizer.image.lr=1e30", "train.max_bad_steps=1", "train.epochs=3")
    assert finished.returncode == 3, finished.stdout + finished.stderr
    log = tmp_path / "runs" / "tiny-cv" / "mdnet" / "fold0.log"
    assert finished.stderr.splitlines()[-1].startswith("cross_validate.py: mdnet fold 0 ended with exit code")
    assert str(log) in finished.stderr
    assert "not finite" in log.read_text()


@pytest.mark.slow
def test_wrong_commands_end_with_one_line(config: Path) -> None:
    for arguments, named in (
        (["--at-once", "0"], "--at-once 0: must be at least 1"),
        (["--baselines", "none"], "--baselines none: no such file"),
        (["--folds", "7"], "data.fold 7: the shard set has 3 folds"),
        (["train.epoch=3"], "unknown key; did you mean 'epochs'?"),
    ):
        finished = run(*COMMAND, config, *arguments)
        assert finished.returncode == 2
        assert named in finished.stderr
        assert len(finished.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- alone in a folder


def test_one_works_in_a_folder_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    for _ in range(2):
        with (
            alone_in(lock, "a cross-validation"),
            pytest.raises(InputError) as caught,
            alone_in(lock, "a cross-validation"),
        ):
            pass
        assert str(caught.value) == (f"{tmp_path}: a cross-validation still works there; wait for it, or stop it")
    with alone_in(lock, "x"), alone_in(tmp_path / ".other", "x"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".other"]


def test_one_that_waits_begins_when_the_other_has_ended(tmp_path: Path) -> None:
    lock, order = tmp_path / ".lock", []
    begun = threading.Event()

    def first() -> None:
        with alone_in(lock, "the first"):
            begun.set()
            time.sleep(0.3)
            order.append("first ends")

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(20)
    with alone_in(lock, "the first", wait_seconds=20):
        order.append("second begins")
    thread.join()
    assert order == ["first ends", "second begins"]
    started = time.monotonic()
    with (
        alone_in(lock, "the first"),
        pytest.raises(InputError, match="the first still works there"),
        alone_in(lock, "the first", wait_seconds=0.3),
    ):
        pass
    assert time.monotonic() - started >= 0.3


def test_what_a_killed_one_has_left_running_keeps_others_out(tmp_path: Path) -> None:
    killed = """
        import os, subprocess, sys
        from pathlib import Path
        from mdnet_dist.run_folder import alone_in
        with alone_in(Path(sys.argv[1]), "it") as lock:
            left = subprocess.Popen(["sleep", "60"], pass_fds=[lock], stdout=subprocess.DEVNULL)
            print(left.pid, flush=True)
            os.kill(os.getpid(), 9)
    """
    lock = tmp_path / ".lock"
    command = [sys.executable, "-c", textwrap.dedent(killed), str(lock)]
    ended = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=100)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(InputError), alone_in(lock, "it"):
        pass
    os.kill(int(ended.stdout), signal.SIGKILL)
    with alone_in(lock, "it", wait_seconds=20):
        pass
