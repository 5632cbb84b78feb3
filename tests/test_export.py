"""The exported model: two files that hold all that inference needs, and execute nothing."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mdnet_dist.config_file import check_config
from mdnet_dist.errors import InputError
from mdnet_dist.export import CARD, WEIGHTS, ModelCard, export_model, load_card, load_model, make_card
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.vocabulary import UNKNOWN, Vocabulary
from tests.networks import one_thread  # noqa: F401 (used by every test)

WORDS = ["gland", "marked", "mild"]


def a_card(**data: Any) -> ModelCard:
    config = check_config(
        {
            "name": "a",
            "data": {"shards": "secret/place", "image_size": 32, **data},
            "model": {
                "image": {"stem_channels": 4, "stage_channels": [8], "units_per_stage": [2], "stage_strides": [1]},
                "language": {"embedding": 6, "hidden": 8, "attention": 4},
            },
        },
        "test",
    )
    return make_card(
        config,
        ["crowding", "conclusion"],
        ["normal", "high grade"],
        Vocabulary(WORDS),
        {"normal": {"no gland": 3}},
        [0.5, 0.25, 0.125],
        [0.1, 0.2, 0.4],
    )


def a_network(card: ModelCard) -> MDNet:
    torch.manual_seed(0)
    network = card.build()
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return network


@pytest.fixture
def run(tmp_path: Path) -> Path:
    card = a_card()
    export_model(tmp_path, card, a_network(card).state_dict())
    return tmp_path


def test_a_model_comes_back_with_the_same_outputs(run: Path) -> None:
    before = a_network(a_card()).eval()
    network, card = load_model(run)
    assert card == a_card()
    assert not network.training
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.tensor([[[[4, 5, 2], [6, 2, 0]]]] * 3)
    arguments = (card.normalise(images), torch.tensor([0, 1, -1]), tokens, torch.tensor([[[3, 2]]] * 3))
    with torch.no_grad():
        assert torch.equal(network.see(arguments[0]).logits, before.see(arguments[0]).logits)
        for ours, theirs in zip(network(*arguments), before(*arguments)):
            assert torch.equal(ours, theirs)
    for name, tensor in before.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_the_card_comes_back(run: Path) -> None:
    card = load_card(run)
    assert card == a_card()
    assert card.vocabulary == Vocabulary(WORDS)
    assert card.vocabulary.encode(["mild", "gland", "other"])[:3] == [6, 4, UNKNOWN]
    assert "research" in card.intended_use
    assert json.loads((run / CARD).read_text()) == asdict(card)


def test_where_the_data_lay_is_not_told(run: Path) -> None:
    for path in run.iterdir():
        assert b"secret" not in path.read_bytes()


def test_a_card_holds_any_script(tmp_path: Path) -> None:
    card = ModelCard(
        **{**asdict(a_card()), "words": ["\u6838\u5206\u88c2", "\u00e4", "\U0001f52c"], "classes": ["\u00df"]}
    )
    export_model(tmp_path, card, card.build().state_dict())
    assert load_model(tmp_path)[1] == card
    assert "\u6838" in (tmp_path / CARD).read_text(encoding="utf-8"), "people read it, too"


def test_normalised_pixels_have_the_training_parts_mean_and_deviation() -> None:
    card = a_card()
    images = torch.tensor([0, 127.5, 255]).to(torch.uint8)[None, :, None, None].expand(2, 3, 4, 4)
    expected = [(0 / 255 - 0.5) / 0.1, (127 / 255 - 0.25) / 0.2, (1 - 0.125) / 0.4]
    normalised = card.normalise(images)
    assert normalised.dtype == torch.float32
    assert normalised.shape == (2, 3, 4, 4)
    assert normalised[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_nothing_is_pickled_and_nothing_else_is_written(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [CARD, WEIGHTS]
    for path in run.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError)):
            pickle.loads(path.read_bytes())


def test_weights_in_any_layout_are_exported(tmp_path: Path) -> None:
    card = a_card()
    network = a_network(card).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    export_model(tmp_path, card, network.state_dict())
    for name, tensor in load_model(tmp_path)[0].state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])


def test_an_export_replaces_the_one_before(run: Path) -> None:
    other = ModelCard(**{**asdict(a_card()), "words": ["a"]})
    export_model(run, other, other.build().state_dict())
    assert load_model(run)[1].words == ["a"]


# -------------------------------------------------------------------------------------------------------------- damage


def edit(**fields: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        card = json.loads(path.read_text())
        card.update(fields)
        path.write_text(json.dumps(card))

    return apply


def drop(field: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        card = json.loads(path.read_text())
        del card[field]
        path.write_text(json.dumps(card))

    return apply


def content(raw: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_bytes(raw)

    return apply


WRONG_CARDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "absent": (Path.unlink, "No such file or directory; a finished run's folder has one"),
    "empty": (content(b""), "not a model card"),
    "not JSON": (content(b"{"), "not a model card"),
    "not UTF-8": (content(b'{"format": "\xff"}'), "not a model card"),
    "too deep": (content(b"[" * 100_000), "not a model card"),
    "a list": (content(b"[1]"), "not a model card (Input should be an object); export it again"),
    "a number": (content(b"1"), "not a model card"),
    "a pickle": (content(pickle.dumps({"a": 1})), "not a model card"),
    "a field more": (edit(extra=1), "not a model card (extra: Unexpected keyword argument)"),
    "no words": (drop("words"), "not a model card (words: "),
    "no format": (drop("format"), "format None, but this version reads format 2"),
    "another version": (edit(format=3, news=1), "format 3, but this version reads format 2"),
    "a word twice": (edit(words=["a", "a"]), "not a model card (a vocabulary must not repeat a word)"),
    "a special word": (edit(words=["<pad>"]), "not a model card (a vocabulary must not repeat a word)"),
    "words that are numbers": (edit(words=[1]), "not a model card (words.0: Input should be a valid string)"),
    "topics that are a number": (edit(topics=3), "not a model card (topics: Input should be a valid array)"),
    "two means": (edit(image_mean=[0.1, 0.2]), "not a model card (image_mean: List should have at least 3 items"),
    "means above 1": (edit(image_mean=[0.1, 1.1, 0.2]), "not a model card (image_mean.1: Input should be less than"),
    "a deviation of 0": (
        edit(image_std=[0.1, 0.2, 0.0]),
        "not a model card (image_std.2: Input should be greater than",
    ),
    "a deviation of about 0": (edit(image_std=[1e-300, 0.2, 0.1]), "not a model card (image_std.0: "),
    "sentences without end": (
        edit(data={"max_tokens": 2**31 - 1}),
        "not a model card (max_tokens: Input should be less",
    ),
    "a mean that is no number": (edit(image_std=[0.1, float("nan"), 1.0]), "not a model card (image_std.1: "),
    "an unknown key": (edit(model={"imagge": {}}), "not a model card (imagge: "),
    "an unknown fit": (edit(data={"fit": "squeeze"}), "not a model card (fit: "),
    "units without end": (edit(model={"image": {"units_per_stage": [10**9]}}), "not a model card (image.medical.units"),
}


@pytest.mark.parametrize("name", WRONG_CARDS)
def test_wrong_cards_are_named(name: str, run: Path) -> None:
    damage, message = WRONG_CARDS[name]
    damage(run / CARD)
    for load in (load_card, load_model):
        with pytest.raises(InputError) as caught:
            load(run)
        assert str(caught.value).startswith(f"{run / CARD}: {message}")
        assert "\n" not in str(caught.value)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


WRONG_WEIGHTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "absent": (WEIGHTS, Path.unlink, "No such file or directory; a finished run's folder has one"),
    "empty": (WEIGHTS, content(b""), "does not fit model.json"),
    "cut off": (WEIGHTS, cut_off, "does not fit model.json"),
    "a pickle": (WEIGHTS, content(pickle.dumps({"a": 1})), "does not fit model.json"),
    "a header of any size": (WEIGHTS, content(b"\xff" * 64), "does not fit model.json"),
    "other words": (CARD, edit(words=["a"]), "does not fit model.json (Error(s) in loading state_dict for MDNet: size"),
    "other classes": (CARD, edit(classes=["a"]), "does not fit model.json"),
    "other topics": (CARD, edit(topics=["a"]), "does not fit model.json"),
    "no topics": (CARD, edit(topics=[]), "does not fit model.json"),
    "another network": (CARD, edit(model={}), "does not fit model.json"),
    "a network larger than any memory": (
        CARD,
        edit(model={"language": {"hidden": 2**30, "embedding": 2**30}}),
        "does not fit model.json",
    ),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_named(name: str, run: Path) -> None:
    file, damage, message = WRONG_WEIGHTS[name]
    damage(run / file)
    with pytest.raises(InputError) as caught:
        load_model(run)
    assert str(caught.value).startswith(f"{run / WEIGHTS}: {message}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float, run: Path) -> None:
    weights = a_network(a_card()).state_dict()
    name = next(name for name, tensor in weights.items() if tensor.ndim == 4)
    weights[name][-1, -1, -1, -1] = value
    export_model(run, a_card(), weights)
    with pytest.raises(InputError) as caught:
        load_model(run)
    assert str(caught.value) == f"{run / WEIGHTS}: '{name}' holds numbers that are not finite; export it again"


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.json: No such file or directory"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [(1, 7), (4, 32)])
def test_images_are_normalised_channel_by_channel(size: tuple[int, int]) -> None:
    """To the bit as the formula says, and channels last in memory, as convolutions want it."""
    images, side = size
    card = a_card()
    pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).mul(255).view(1, 3, 1, 1) for values in (card.image_mean, card.image_std))
    found = card.normalise(pixels)
    assert torch.equal(found, (pixels.float() - mean) / std)
    assert torch.equal(card.normalise(pixels.contiguous()), found)
    assert found.is_contiguous(memory_format=torch.channels_last)
