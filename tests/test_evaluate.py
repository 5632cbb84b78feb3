"""`launch/evaluate.py`: any saved network, any shards, any number of ranks, the same numbers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdnet_dist.config_file import as_yaml, load_config
from mdnet_dist.data import EvaluationStream
from mdnet_dist.errors import InputError
from mdnet_dist.evaluate_run import Request, _make
from mdnet_dist.evaluation import Evaluation, evaluate, recalibrated, reliability_of, score, temperature_of
from mdnet_dist.explain_run import best_and_worst, explain_best_and_worst
from mdnet_dist.export import CARD, WEIGHTS, export_model, load_card
from mdnet_dist.run_data import open_part
from mdnet_dist.saved import open_model, saved_config
from tests.saved import untrained_run
from tests.test_train import deepspeed, run
from tests.tiny import CLASSES, tiny_config, tiny_set

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_set(folder / "shards", test=22)
    return untrained_run(tiny_config(folder / "shards", folder / "runs"))[0]


def evaluated(folder: Path, ranks: int = 1, checkpoint: str | None = None, part: str = "test") -> Evaluation:
    """As so many ranks do it, one after another."""
    network, card, _ = open_model(folder, checkpoint)
    config = saved_config(folder, card)
    data, parts = open_part(config, card, part)
    predictions = []
    for rank in range(ranks):
        stream = EvaluationStream(data.encoder, data.manifest, parts, batch=4, ranks=ranks, rank=rank)
        predictions += evaluate(network, card, stream, device=CPU, pictures=2).predictions
    metrics = score(predictions, card)
    return Evaluation(metrics=metrics, predictions=sorted(predictions, key=lambda one: one.key), explained=[])


# ----------------------------------------------------------------------------------------------------- the same numbers


def test_every_number_is_the_same_for_any_number_of_ranks(saved: Path) -> None:
    """To the last bit; some ranks have nothing to do. The network must be one that tells images apart."""
    alone = evaluated(saved)
    assert len(alone.predictions) == 22
    assert len({tuple(prediction.logits) for prediction in alone.predictions}) == 22
    assert len({tuple(prediction.probabilities.values()) for prediction in alone.predictions}) > 10
    for ranks in (2, 3, 7):
        assert evaluated(saved, ranks) == alone


def test_the_exported_model_is_the_best_checkpoint(saved: Path) -> None:
    exported = evaluated(saved)
    assert evaluated(saved, checkpoint="best") == exported
    assert evaluated(saved, checkpoint="step-00000006") == exported
    assert evaluated(saved, checkpoint=str(saved / "checkpoints" / "step-00000006")) == exported
    other = evaluated(saved, checkpoint="step-00000003")
    assert other.metrics["loss_m"] != exported.metrics["loss_m"]


def test_the_best_and_the_worst(saved: Path) -> None:
    predictions = evaluated(saved).predictions
    chosen = best_and_worst(predictions, 5)
    ranked = sorted((one.loss_m, one.key) for one in predictions if one.loss_m is not None)
    assert chosen == [key for _, key in [*ranked[:3], *ranked[-2:]]]
    assert best_and_worst(predictions, 0) == best_and_worst([], 4) == []
    assert len(best_and_worst(predictions, 99)) == len(ranked)
    unlabelled = [replace(one, label=None, loss_m=None) for one in predictions]
    assert len(best_and_worst(unlabelled, 4)) == 4


# --------------------------------------------------------------------------------------------------- what is asked for


def test_names_of_evaluations() -> None:
    run = Path("runs/demo")
    assert Request(run=run).default_out == run
    for request, name in (
        (Request(run=run, part="val"), "val"),
        (Request(run=run, checkpoint="last", beam_width=3), "test-last-beam3"),
        (Request(run=run, checkpoint="other/checkpoints/step-00000003"), "test-step-00000003"),
        (Request(run=run, shards="data/nuclei he/"), "test-nuclei_he"),
    ):
        assert request.default_out == run / "evaluations" / name


@pytest.mark.parametrize(
    ("checkpoint", "named"),
    [
        ("step-00000004", "known: best, last, step-00000003, step-00000006"),
        ("/etc", "known: best, last"),
        ("", "known: best, last"),
    ],
)
def test_an_unknown_checkpoint_is_named(saved: Path, checkpoint: str, named: str) -> None:
    with pytest.raises(InputError, match=f"--checkpoint {checkpoint}: not a checkpoint") as caught:
        open_model(saved, checkpoint)
    assert named in str(caught.value)


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    """It has no export: its card follows from configuration and shards, and is the one that it would export."""
    tiny_set(tmp_path / "shards")
    folder, card = untrained_run(tiny_config(tmp_path / "shards", tmp_path / "runs"))
    (folder / CARD).unlink()
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="--checkpoint last takes its newest weights"):
        open_model(folder)
    _, found, step = open_model(folder, "last")
    assert (found, step) == (card, 6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"model\.json: No such file"):
        open_model(tmp_path / "empty")
    with pytest.raises(InputError, match="no such folder"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="this run has no checkpoint"):
        open_model(tmp_path / "empty", "last")


def test_an_exported_model_alone_is_scored_on_other_shards(saved: Path, tmp_path: Path) -> None:
    for name in (CARD, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    network, card, step = open_model(tmp_path)
    assert step is None
    with pytest.raises(InputError, match="give --shards DIR"):
        saved_config(tmp_path, card)
    tiny_set(tmp_path / "other", seed=5)
    config = saved_config(tmp_path, card, str(tmp_path / "other"))
    data, parts = open_part(config, card, "test")
    found = evaluate(network, card, data.evaluation_batches(config, parts, False), device=CPU)
    assert found.metrics["images"] == 7


@pytest.mark.parametrize("address", ["http://me:SECRET@host/set", "https://host/set?token=SECRET"])
@pytest.mark.parametrize("alone", [False, True], ids=["of a run", "of a model alone"])
def test_other_shards_are_checked_as_those_of_a_configuration(
    saved: Path, tmp_path: Path, address: str, alone: bool
) -> None:
    """What the command line says goes through the same checks: a password would be logged."""
    card = load_card(saved)
    with pytest.raises(InputError, match="shards was given ") as caught:
        saved_config(tmp_path if alone else saved, card, address)
    assert "SECRET" not in str(caught.value)
    other = saved_config(saved, card, "https://host/set")
    assert other.data == load_config(saved / "config.yaml").data.model_copy(update={"shards": "https://host/set"})


def test_other_shards_must_have_known_classes(saved: Path, tmp_path: Path) -> None:
    """A set may lack classes and topics of the network; a label that the network lacks is named before any work."""
    card = load_card(saved)
    config = saved_config(saved, card)
    fewer = replace(card, classes=CLASSES[:2])
    with pytest.raises(InputError, match="label 'normal' is not a class of the network"):
        open_part(config, fewer, "test")
    open_part(config, replace(card, classes=[*CLASSES, "more"], topics=["other", *card.topics]), "test")
    with pytest.raises(InputError, match="part 'tset' is not in this shard set; did you mean 'test'"):
        open_part(config, card, "tset")


def test_parts_of_a_set_in_folds(tmp_path: Path) -> None:
    manifest = tiny_set(tmp_path / "shards", folds=4)
    config = tiny_config(tmp_path / "shards", tmp_path / "runs", {"data.fold": 1})
    _, card = untrained_run(config)
    named = {part: open_part(config, card, part)[1] for part in ("train", "val", "test", "fold3")}
    assert named == {"train": ["fold0", "fold3"], "val": ["fold2"], "test": ["fold1"], "fold3": ["fold3"]}
    config = saved_config(Path("nowhere"), card, str(tmp_path / "shards")).model_copy(
        update={"data": config.data.model_copy(update={"fold": None})}
    )
    assert open_part(config, card, "fold0")[1] == ["fold0"], "a network from elsewhere, on one fold"
    assert manifest.folds == 4


# --------------------------------------------------------------------------------------------------------- calibration


def test_the_temperature_changes_probabilities_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    """What the trainer does at its end equals evaluating anew with the card that it exports."""
    validation = evaluated(saved, part="val")
    network, card, _ = open_model(saved)
    temperature = temperature_of(validation.predictions, card.classes)
    assert temperature != 1.0
    warm = replace(card, temperature=temperature)
    again = recalibrated(validation, warm)
    export_model(tmp_path, warm, network.state_dict())
    (tmp_path / "config.yaml").write_bytes((saved / "config.yaml").read_bytes())
    anew = evaluated(tmp_path, part="val")
    assert [one.probabilities for one in again.predictions] == [one.probabilities for one in anew.predictions]
    assert again.metrics == anew.metrics
    assert again.metrics["ece"] != validation.metrics["ece"]
    assert {k: v for k, v in again.metrics.items() if k != "ece"} == {
        k: v for k, v in validation.metrics.items() if k != "ece"
    }
    for before, after in zip(validation.predictions, again.predictions):
        assert replace(after, probabilities=before.probabilities) == before
        powers = {name: value ** (1 / temperature) for name, value in before.probabilities.items()}
        for name, value in after.probabilities.items():
            assert value == pytest.approx(powers[name] / sum(powers.values()), abs=2e-3)
    assert reliability_of([replace(one, label=None) for one in again.predictions]) is None


def test_cards_from_before_there_was_a_temperature(saved: Path, tmp_path: Path) -> None:
    fields = json.loads((saved / CARD).read_text())
    del fields["temperature"]
    (tmp_path / CARD).write_text(json.dumps(fields))
    assert load_card(tmp_path).temperature == 1.0
    for wrong in (0.0, -1.0, "hot"):
        (tmp_path / CARD).write_text(json.dumps({**fields, "temperature": wrong}))
        with pytest.raises(InputError, match="temperature"):
            load_card(tmp_path)


# -------------------------------------------------------------------------------------------------------- where it goes


@pytest.mark.parametrize(
    "link", ["explained", "pictures", "evaluations", "evaluations/val", "evaluations/val/explained"]
)
def test_nothing_is_written_through_a_link_in_a_run_folder(link: str, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    (run / link).parent.mkdir(parents=True)
    other.mkdir()
    (run / link).symlink_to(other)
    request = Request(run=run, part="val" if link.startswith("evaluations") else "test")
    with pytest.raises(InputError, match=f"{link}: a link, through which nothing is written; remove it, or name"):
        _make(request.default_out, run)
    assert list(other.iterdir()) == []
    (tmp_path / "linked").symlink_to(run)  # what the user names may be one
    (run / link).unlink()
    _make(replace(request, run=tmp_path / "linked").default_out, tmp_path / "linked")
    own = tmp_path / "own"
    own.symlink_to(other)
    _make(own, own)
    assert [path.name for path in other.iterdir()] == ["pictures"]


def test_pages_are_not_written_through_a_link(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "explained").symlink_to(tmp_path / "other")
    network, card, _ = open_model(saved)
    found = evaluated(saved)
    with pytest.raises(InputError, match="explained: a link, through which nothing is written"):
        explain_best_and_worst(
            *(network, card, found.predictions, saved_config(saved, card).data, ["test"]),
            *(tmp_path / "explained", "title"),
            count=2,
        )
    assert list((tmp_path / "other").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_on_three_ranks_and_on_one(saved: Path, tmp_path: Path) -> None:
    outs = []
    for ranks in (1, 3):
        outs.append(tmp_path / str(ranks))
        launcher = [sys.executable] if ranks == 1 else deepspeed(ranks)
        finished = run(*launcher, "launch/evaluate.py", saved, "--out", outs[-1], "--beam", "2")
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("test scores") == 1, "one rank prints"
        assert "people" in finished.stdout
        assert "Traceback" not in finished.stderr
    for name in ("metrics.json", "predictions.jsonl", "confusion.json", "calibration.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
    metrics = json.loads((outs[0] / "metrics.json").read_text())
    assert metrics["test/images"] == 22
    confusion = json.loads((outs[0] / "confusion.json").read_text())
    lines = (outs[0] / "predictions.jsonl").read_text().splitlines()
    labelled = sum(json.loads(line)["label"] is not None for line in lines)
    assert confusion["columns"] == [*CLASSES, "no class"]
    for name in ("label", "conclusion"):
        assert sum(map(sum, confusion[name])) == labelled
    right = sum(confusion["label"][i][i] for i in range(len(CLASSES)))
    assert metrics["test/label_accuracy"] == pytest.approx(right / labelled)
    assert {"confusion_label.png", "reliability.png"} <= {path.name for path in (outs[0] / "pictures").iterdir()}


@pytest.mark.slow
def test_a_trained_run_gets_the_scores_that_training_gave_it_and_mlflow_hears_of_more(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tiny_set(tmp_path / "shards")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        as_yaml(tiny_config(tmp_path / "shards", tmp_path / "runs", {"train.epochs": 2, "evaluate.pictures": 2}))
    )
    trained = run(sys.executable, "launch/train.py", path)
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "runs" / "tiny"
    reported = json.loads((folder / "metrics.json").read_text())
    predicted = (folder / "predictions.jsonl").read_bytes()
    explained = {path.name: path.read_bytes() for path in (folder / "explained").iterdir()}
    assert len(explained) == 5, "an index, the best and the worst image"
    assert load_card(folder).temperature != 1.0, "training ends by fitting it"

    again = run(sys.executable, "launch/evaluate.py", folder)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("which is not told") == 1, "the store that a folder names may be a stranger's"
    assert json.loads((folder / "metrics.json").read_text()) == reported, "val/ kept, test/ the same"
    assert (folder / "predictions.jsonl").read_bytes() == predicted
    assert {path.name: path.read_bytes() for path in (folder / "explained").iterdir()} == explained
    uri = load_config(folder / "config.yaml").tracking.uri
    last = run(
        *(sys.executable, "launch/evaluate.py", folder, "--part", "val", "--checkpoint", "last"),
        environment={"MLFLOW_TRACKING_URI": str(uri)},
    )
    assert last.returncode == 0, last.stderr
    out = folder / "evaluations" / "val-last"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["val/images"] == 6
    assert json.loads((folder / "metrics.json").read_text()) == reported

    run_id = json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    client = MlflowClient(uri)
    logged = client.get_run(run_id)
    assert logged.info.status == "FINISHED"
    points = client.get_metric_history(run_id, "final/val-last/loss_m")
    assert [(point.step, point.value) for point in points] == [(6, metrics["val/loss_m"])]
    assert len(client.get_metric_history(run_id, "final/test/loss_m")) == 1
    kept = {artifact.path.rpartition("/")[2] for artifact in client.list_artifacts(run_id, "evaluations/val-last")}
    files = {"metrics.json", "predictions.jsonl", "confusion.json", "calibration.json"}
    assert kept == files | {"pictures", "explained"}
    shown = [artifact.path for artifact in client.list_artifacts(run_id, "evaluations/val-last/pictures")]
    assert any(name.endswith("confusion_label.png") for name in shown), shown
    explained = [artifact.path for artifact in client.list_artifacts(run_id, "evaluations/val-last/explained")]
    assert sorted(name.rpartition(".")[2] for name in explained) == ["html", "html", "html", "png", "png"]


@pytest.mark.slow
def test_mlflow_has_the_model_of_a_trained_run(tmp_path: Path) -> None:
    tiny_set(tmp_path / "shards")
    config = tiny_config(tmp_path / "shards", tmp_path / "runs")
    path = tmp_path / "tiny.yaml"
    path.write_text(as_yaml(config))
    trained = run(sys.executable, "launch/train.py", path)
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "runs" / "tiny"
    run_id = json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    program = f"""
import warnings
warnings.simplefilter("ignore")
import mlflow
models = [mlflow.pyfunc.load_model(uri) for uri in ("runs:/{run_id}/model", {str(folder / "mlflow_model")!r})]
one, other = (model.predict(models[0].input_example).to_dict(orient="records") for model in models)
assert one == other and one[0]["error"] is None, (one, other)
"""
    loaded = run(sys.executable, "-c", program, environment={"MLFLOW_TRACKING_URI": str(config.tracking.uri)})
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.slow
@pytest.mark.parametrize("address", ["http://me:SEC/RET@host/set", "https://host/set?token=SECRET"])
@pytest.mark.parametrize("program", ["train", "evaluate", "explain", "retrieve"])
def test_a_password_on_the_command_line_is_not_repeated(
    saved: Path, tmp_path: Path, program: str, address: str
) -> None:
    arguments: dict[str, list[object]] = {
        "train": [saved / "config.yaml", f"data.shards={address}"],
        "evaluate": [saved, "--shards", address],
        "explain": [saved, address, "--out", tmp_path],
        "retrieve": [saved, "nuclei are crowded", "--shards", address],
    }
    finished = run(sys.executable, f"launch/{program}.py", *arguments[program])
    assert finished.returncode == 2, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.startswith(f"{program}.py: ")]
    assert len(lines) == 1 and "shards was given " in lines[0], finished.stderr
    assert "Traceback" not in finished.stderr
    said = finished.stdout + finished.stderr
    assert "SEC" not in said and "RET" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "arguments", "named"),
    [
        (1, ["--beam", "0"], "--beam 0"),
        (2, ["--checkpoint", "worst"], "--checkpoint worst: not a checkpoint"),
        (1, ["--shards", "nowhere"], "nowhere/manifest.json: no such file"),
        (1, ["--out", "setup.cfg"], "setup.cfg: cannot be written"),
    ],
)
def test_wrong_input_ends_with_one_line(saved: Path, ranks: int, arguments: list[str], named: str) -> None:
    launcher = [sys.executable] if ranks == 1 else deepspeed(ranks)
    finished = run(*launcher, "launch/evaluate.py", saved, *arguments)
    assert finished.returncode == 2, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.startswith("evaluate.py: ")]
    assert len(lines) == 1 and named in lines[0], finished.stderr
    assert "Traceback" not in finished.stderr
