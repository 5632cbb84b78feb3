"""The decode suite: both decoders say the same, and the rows are those that are promised."""

from __future__ import annotations

import pytest
import torch

from mdnet_dist.benchmark import decode_suite
from mdnet_dist.benchmark.decode_suite import Maps, practise, said_one_by_one, said_together
from mdnet_dist.benchmark.subject import Subject
from mdnet_dist.config import LanguageModelConfig
from mdnet_dist.model.language_model import LanguageModel
from mdnet_dist.vocabulary import END
from tests.networks import language_model_of, one_thread  # noqa: F401 (a fixture)
from tests.tiny import tiny_config, tiny_set

C, K, V, IMAGES = 6, 3, 14, 6


def model_and_maps(seed: int, attention: int, sharpness: float) -> tuple[LanguageModel, Maps]:
    """Weights large enough for sentences to differ, some of which end."""
    torch.manual_seed(seed)
    config = LanguageModelConfig(embedding=6, hidden=8, attention=attention, dropout=0.3)
    model = LanguageModel(config, C, K, V, sharpness=sharpness).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
        model.output.bias[END] += 3
    sharpening = torch.randn(IMAGES, 9) if sharpness else None
    return model, Maps(features=2 * torch.rand(IMAGES, C, 3, 3), sharpening=sharpening)


@pytest.mark.parametrize("width", [1, 2, 3, 40])
@pytest.mark.parametrize(("attention", "sharpness"), [(5, 1.5), (5, 0.0), (0, 0.0)])
def test_both_decoders_say_the_same(attention: int, sharpness: float, width: int) -> None:
    lengths = set()
    for seed in range(4):
        model, maps = model_and_maps(seed, attention, sharpness)
        together = said_together(model, maps, 7, width)
        assert together == said_one_by_one(model, maps, 7, width)
        lengths |= {len(words) for image in together for words in image}
    assert len(lengths) > 2


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("decode")
    tiny_set(folder / "shards")
    return Subject("tiny", tiny_config(folder / "shards", folder / "runs"), short=True)


def test_practice_gives_sentences_of_several_lengths_on_which_both_agree(subject: Subject) -> None:
    network = subject.network()
    maps = practise(network, subject)
    model = language_model_of(network)
    assert len(maps.features) == decode_suite.IMAGES and not model.training
    for width in (1, 3):
        few = maps.of(slice(0, 8))
        together = said_together(model, few, 6, width)
        assert together == said_one_by_one(model, few, 6, width)
        assert len({len(words) for image in together for words in image}) > 1


def test_the_rows_are_those_promised(subject: Subject) -> None:
    rows = decode_suite.measure(subject)
    assert [(row.name, row.unit, row.target) for row in rows] == [
        ("greedy: batch of 64 by one at a time", "x", 5.0),
        ("greedy: the same with the image model", "x", None),
        ("greedy: batch of 64", "images/s", None),
        ("beam 3: batch of 64 by one at a time", "x", 5.0),
        ("beam 3: the same with the image model", "x", None),
        ("beam 3: batch of 64", "images/s", None),
        ("greedy: seconds a live token, ending by endless", "x", decode_suite.MOST_PER_LIVE_TOKEN),
    ]
    assert all(row.suite == "decode" and row.config == "tiny" and row.value > 0 and row.low for row in rows)
    # Tiny tensors are all overhead, and that is what a batch saves most of.
    assert rows[0].value > 2 and rows[3].value > 2 and rows[-1].better == "less"


def test_a_network_without_topics_has_nothing_to_decode(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    network = subject.network()
    network.language_model = None
    monkeypatch.setattr(Subject, "network", lambda self, seed=0: network)
    assert decode_suite.measure(subject) == []
