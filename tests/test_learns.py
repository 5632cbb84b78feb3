"""The network learns: eight images with their reports by heart, and the same first losses every time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdnet_dist.config import AdamGroup, LanguageModelConfig, ModelConfig, ScheduleConfig, SgdAdamConfig, SgdGroup
from mdnet_dist.decoding import decode
from mdnet_dist.model.mdnet import NO_LABEL, MDNet
from mdnet_dist.optimizer import PartOptimizer
from mdnet_dist.vocabulary import PAD, Vocabulary, tokenize
from tests.networks import (
    IMAGE_SIZE,
    TINY_IMAGE_MODEL,
    language_model_of,
    one_thread,  # noqa: F401 (a fixture)
    random_inputs,
    tiny_network,
)

TOPICS = ("size", "crowding", "conclusion")
SIZES = ("nuclei are alike", "nuclei vary a little in size", "nuclei vary much", "large nuclei and small nuclei")
CROWDING = ("no crowding", "the nuclei lie close to each other")
CONCLUSIONS = ("normal", "low grade carcinoma", "high grade carcinoma")


def eight_reports() -> list[dict[str, str]]:
    """Eight different reports that share words and whole sentences; some topics are missing."""
    reports = [{"size": SIZES[i % 4], "crowding": CROWDING[i // 4], "conclusion": CONCLUSIONS[i % 3]} for i in range(8)]
    del reports[2]["crowding"], reports[5]["size"]
    return reports


def encode(reports: list[dict[str, str]], vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Tokens (B, 1, K, T) and lengths (B, 1, K)."""
    return encode_sentences([[report.get(topic, "") for topic in TOPICS] for report in reports], vocabulary)


def encode_sentences(reports: list[list[str]], vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Tokens (B, 1, K, T) and lengths (B, 1, K) of reports of K sentences, of which the empty ones are missing."""
    sentences = [[vocabulary.encode(tokenize(said)) if said else [] for said in report] for report in reports]
    longest = max(len(sentence) for report in sentences for sentence in report)
    tokens = [[sentence + [PAD] * (longest - len(sentence)) for sentence in report] for report in sentences]
    lengths = [[len(sentence) for sentence in report] for report in sentences]
    return torch.tensor(tokens)[:, None], torch.tensor(lengths)[:, None]


def optimizer_of(network: MDNet, image_rate: float, rate: float) -> PartOptimizer:
    constant = ScheduleConfig(kind="constant", warmup=0.0)
    adam = AdamGroup(lr=rate, schedule=constant)
    config = SgdAdamConfig(image=SgdGroup(lr=image_rate, schedule=constant), head=adam, language=adam)
    optimizer = PartOptimizer({name: part.parameters() for name, part in network.parts().items()}, config)
    optimizer.schedule(0.5)
    return optimizer


def test_eight_image_report_pairs_are_memorised_word_for_word() -> None:
    reports = eight_reports()
    vocabulary = Vocabulary(sorted({word for report in reports for said in report.values() for word in tokenize(said)}))
    tokens, lengths = encode(reports, vocabulary)
    labels = torch.arange(8) % 3
    torch.manual_seed(0)
    images = torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE)
    language = LanguageModelConfig(embedding=24, hidden=32, attention=12, dropout=0.0)
    network = MDNet(ModelConfig(image=TINY_IMAGE_MODEL, language=language), len(TOPICS), 3, len(vocabulary))
    optimizer = optimizer_of(network, image_rate=0.05, rate=0.01)
    for _ in range(250):
        network.blend.set(0.5, 1.0)
        losses = network(images, labels, tokens, lengths)
        optimizer.zero_grad()
        (losses.m / 8 + losses.l / lengths.sum()).backward()
        optimizer.step()

    network.eval()
    seen = network.see(images)
    assert seen.logits.argmax(1).tolist() == labels.tolist()
    model = language_model_of(network)
    for width in (1, 3):
        said = decode(model, model.look(seen.features, seen.sharpening_map), 12, width).tokens.tolist()
        for report, sentences in zip(reports, said, strict=True):
            for topic, sentence in zip(TOPICS, sentences, strict=True):
                if topic in report:
                    assert " ".join(vocabulary.decode(sentence)) == report[topic]


GOLDEN = {
    "cam": [(1.0798, 2.6599, 0.06919, 0.03885), (1.0322, 2.5547, 0.06757, 0.03364), (0.9402, 2.4870, 0.06436, 0.02032)],
    "none": [
        (1.0798, 2.6410, 0.06919, 0.01333),
        (0.9858, 2.5757, 0.06560, 0.01161),
        (0.9303, 2.5187, 0.06392, 0.00997),
    ],
}
"""Of three steps: L_M, L_L, and the norms of their gradients at the map."""


@pytest.mark.parametrize("sharpening", GOLDEN)
def test_the_first_losses_are_what_they_were(sharpening: str) -> None:
    """Whoever changes initialisation, network, blend or optimiser sees it here, and says so."""
    network, inputs = tiny_network(0, sharpening=sharpening), random_inputs(0)
    optimizer = optimizer_of(network, image_rate=0.1, rate=0.01)
    for golden in GOLDEN[sharpening]:
        network.blend.set(0.5, 2.0)
        losses = network(*inputs)
        loss_m, loss_l = losses.m / (inputs.labels != NO_LABEL).sum(), losses.l / inputs.lengths.sum()
        optimizer.zero_grad()
        (loss_m + loss_l).backward()
        optimizer.step()
        measured = (loss_m.item(), loss_l.item(), *network.blend.squared_norms.sqrt().tolist())
        assert measured == pytest.approx(golden, rel=1e-3)
