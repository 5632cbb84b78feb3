"""The baselines of the paper: overlays over the shipped configurations, and NeuralTalk2 from training to its pages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_shards.prepare import open_image
from mdnet_dist.config import GoogLeNetImageModel, LanguageModelConfig, ModelConfig, RunConfig
from mdnet_dist.config_file import flatten, load_config
from mdnet_dist.evaluate_run import Request, evaluate_run
from mdnet_dist.explain import page
from mdnet_dist.explain_run import explain_sources
from mdnet_dist.export import ModelCard, make_card
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.predict import answers_of, split_answers
from mdnet_dist.predict_folder import predict_folder
from mdnet_dist.run_data import open_data
from mdnet_dist.saved import open_model
from mdnet_dist.sentences import REPORT, as_one_sentence, join_topics, joining_order
from mdnet_dist.shards import CONCLUSION
from mdnet_dist.vocabulary import SPECIAL_WORDS, Vocabulary, tokenize
from tests.conftest import REPOSITORY
from tests.networks import one_thread  # noqa: F401 (a fixture)
from tests.saved import untrained_run
from tests.test_googlenet import published_weights
from tests.test_learns import eight_reports, encode_sentences, optimizer_of
from tests.test_train import run, the_one_line, write_yaml
from tests.tiny import CLASSES, tiny_config, tiny_set

CONFIGS = REPOSITORY / "launch" / "configs"
BASELINES = CONFIGS / "baselines"
BLADDER_WORDS = 112 + len(SPECIAL_WORDS)
NEURALTALK2 = {
    "data.sentences": "report",
    "data.max_tokens": 30,
    "data.image_size": 64,
    "model.image": {"form": "googlenet", "width": 0.05},
    "model.language.attention": 0,
    "model.sharpening": "none",
}
"""Over the tiny configuration."""


# ------------------------------------------------------------------------------------------------------------ overlays

CHANGED = {
    "resnet": {"model.image.concat_depth"},
    "show_attend_tell": {"model.sharpening"},
    "neuraltalk2": {"data.sentences", "data.max_tokens", "model.language.attention", "model.sharpening"},
}


@pytest.mark.parametrize("base", ["demo", "bcidr"])
@pytest.mark.parametrize("name", CHANGED)
def test_an_overlay_changes_what_makes_the_baseline_and_nothing_else(name: str, base: str) -> None:
    before = flatten(load_config(CONFIGS / f"{base}.yaml"))
    after = flatten(load_config(CONFIGS / f"{base}.yaml", [str(BASELINES / f"{name}.yaml")]))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    if name == "neuraltalk2":  # another image model
        assert after["model.image.form"] == "googlenet"
        changed = {key for key in changed if not key.startswith("model.image.")}
    assert changed == CHANGED[name] | {"name"}
    assert after["name"] == name


@pytest.mark.parametrize(("base", "width"), [("demo", None), ("bcidr", 0.72)])
def test_neuraltalk2_has_as_many_weights_as_mdnet(base: str, width: float | None) -> None:
    """As the overlay's head says, at the words of the synthetic bladder set."""
    overlay = BASELINES / "neuraltalk2.yaml"
    override = [] if width is None else [f"model.image.width={width}"]
    mdnet = weights(load_config(CONFIGS / f"{base}.yaml"), topics=6)
    neuraltalk2 = weights(load_config(CONFIGS / f"{base}.yaml", [str(overlay), *override]), topics=1)
    assert neuraltalk2 == pytest.approx(mdnet, rel=0.01)
    assert f"({neuraltalk2:,} to {mdnet:,}" in overlay.read_text(encoding="utf-8")


def weights(config: RunConfig, topics: int) -> int:
    with torch.device("meta"):
        network = MDNet(config.model, topics, 4, BLADDER_WORDS)
    return sum(weight.numel() for weight in network.parameters())


# ------------------------------------------------------------------------------------------------------------- learning


def test_whole_reports_are_memorised_and_their_conclusions_read_off() -> None:
    reports = eight_reports()[::2]
    topics = ["size", "crowding", CONCLUSION]
    vocabulary = Vocabulary(sorted({word for report in reports for said in report.values() for word in tokenize(said)}))
    config = ModelConfig(
        image=GoogLeNetImageModel(width=0.05),
        language=LanguageModelConfig(embedding=24, hidden=48, attention=0, dropout=0.0),
        sharpening="none",
    )
    card = card_of(config, topics, vocabulary, {name: {name: 1} for name in {r[CONCLUSION] for r in reports}})
    tokens, lengths = encode_sentences([[as_one_sentence(report, card.topics_read)] for report in reports], vocabulary)
    labels = torch.arange(4) % 3
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    network = card.build()
    optimizer = optimizer_of(network, image_rate=0.02, rate=0.01)
    for _ in range(100):
        network.blend.set(0.5, 1.0)
        losses = network(card.normalise(images), labels, tokens, lengths)
        optimizer.zero_grad()
        (losses.m / 4 + losses.l / lengths.sum()).backward()
        optimizer.step()
    network.eval()
    for width in (1, 3):
        answers = answers_of(network, card, images, width)
        said = [{topic: " ".join(words) for topic, words in image.items()} for image in answers.words]
        assert said == [join_topics(report, topics) for report in reports]
        for answer in split_answers(network, card, answers, range(4)):
            for topic, words in answer.words.items():
                assert answer.attention[topic].shape == (len(words), 2, 2)
                assert np.allclose(answer.attention[topic], 1 / 4)
            assert not answer.attends


def card_of(
    model: ModelConfig, topics: list[str], vocabulary: Vocabulary, conclusions: dict[str, dict[str, int]]
) -> ModelCard:
    config = RunConfig.model_validate(
        {
            "name": "a",
            "data": {"shards": "", "image_size": 64, "sentences": "report", "max_tokens": 30},
            "model": model.model_dump(),
        }
    )
    words = list(vocabulary.words[len(SPECIAL_WORDS) :])
    return make_card(config, topics, CLASSES, Vocabulary(words), conclusions, [0.5] * 3, [0.25] * 3)


# ------------------------------------------------------------------------------------------------------ a saved network


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_set(folder / "shards")
    return untrained_run(tiny_config(folder / "shards", folder / "runs", NEURALTALK2))[0]


def test_the_network_is_told_whole_reports(saved: Path) -> None:
    config = load_config(saved / "config.yaml")
    data = open_data(config)
    assert data.card.topics == [REPORT, CONCLUSION]
    for record in data.training_records():
        for report in record.reports:
            (numbers,) = data.encoder.sentences(report)
            joined = [word for topic in joining_order(data.manifest.topics) for word in tokenize(report.get(topic, ""))]
            assert data.card.vocabulary.decode(numbers) == joined[:30]
    assert data.encoder.sentences({}) == [[]]
    assert not data.cuts_sentences()
    assert open_data(
        config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": 12})})
    ).cuts_sentences()


def test_it_is_evaluated_in_its_own_topics(saved: Path) -> None:
    result = evaluate_run(Request(run=saved, out=saved / "evaluated"))
    assert result.metrics.keys() >= {f"test/{name}" for name in ("bleu4", "dca", "exact/report", "exact/conclusion")}
    lines = [json.loads(line) for line in (saved / "evaluated" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 7
    for line in lines:
        assert list(line["report"]) == [REPORT, CONCLUSION]
        assert line["references"] and all({REPORT, CONCLUSION} >= set(report) for report in line["references"])
        assert "reports" not in line


def test_it_predicts_and_explains(saved: Path, tmp_path: Path) -> None:
    network, card, _ = open_model(saved)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert predict_folder(network, card, tmp_path, tmp_path / "out.jsonl", open_image) == (1, 0)
    assert list(json.loads((tmp_path / "out.jsonl").read_text())["report"]) == [REPORT, CONCLUSION]

    shards = saved.parent.parent / "shards"
    for shown in explain_sources(network, card, [shards, tmp_path / "a.png"], open_image):
        text = page(shown, card.intended_use)
        assert "This network has no attention" in text
        assert all({REPORT, CONCLUSION} >= set(report) for report in shown.references)


# ---------------------------------------------------------------------------------------------------- the real commands


@pytest.mark.slow
def test_the_overlay_trains_exports_and_evaluates(tmp_path: Path) -> None:
    tiny_set(tmp_path / "shards")
    config = write_yaml(tmp_path, tmp_path / "shards", data__image_size=64)
    weights = tmp_path / "googlenet.safetensors"
    save_file(published_weights(), weights)
    overlay = BASELINES / "neuraltalk2.yaml"
    finished = run(
        sys.executable, "launch/train.py", config, overlay, "model.image.width=1", f"model.image.pretrained={weights}"
    )
    assert finished.returncode == 0, finished.stderr + finished.stdout
    folder = tmp_path / "runs" / "neuraltalk2"
    assert f"GoogLeNet of width 1, from {weights}" in finished.stdout
    assert {"people", "network"} & set(finished.stdout.split())
    card = json.loads((folder / "model.json").read_text())
    assert card["model"]["image"]["pretrained"] == weights.name, "not where it lay"

    weights.unlink()  # what is saved needs it no more
    before = json.loads((folder / "metrics.json").read_text())
    finished = run(sys.executable, "launch/evaluate.py", folder)
    assert finished.returncode == 0, finished.stderr + finished.stdout
    assert json.loads((folder / "metrics.json").read_text()) == before
    finished = run(sys.executable, "launch/train.py", folder / "config.yaml", "train.epochs=2", "--resume")
    assert finished.returncode == 0, finished.stderr + finished.stdout

    # A new run does need it, and leaves nothing behind without it.
    finished = run(sys.executable, "launch/train.py", folder / "config.yaml", "name=other")
    assert f"{weights}: No such file or directory" in the_one_line(finished)
    assert not (tmp_path / "runs" / "other").exists()
