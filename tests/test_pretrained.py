"""Published weights from a file: what is loaded, and what is refused without being run."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mdnet_dist.config import GoogLeNetImageModel, ModelConfig
from mdnet_dist.errors import InputError
from mdnet_dist.model.googlenet import GoogLeNet
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.pretrained import pretrained_weights
from tests.test_googlenet import published_weights

CLASSIFIERS = {"fc.weight": torch.zeros(1000, 1024), "aux1.conv.conv.weight": torch.zeros(128, 512, 1, 1)}


def model(path: Path | str) -> ModelConfig:
    return ModelConfig(image=GoogLeNetImageModel(pretrained=str(path)))


def write(path: Path, weights: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


@pytest.mark.parametrize("name", ["googlenet.pth", "googlenet.safetensors"])
def test_published_weights_are_loaded_without_their_classifiers(name: str, tmp_path: Path) -> None:
    weights = published_weights()
    found = pretrained_weights(model(write(tmp_path / name, weights | CLASSIFIERS)))
    assert found is not None
    network = MDNet(model("anywhere"), topics=1, classes=2, words=5)  # the network itself reads no file
    network.image_model.load_state_dict(found)
    for key, value in network.image_model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_weights_of_before_batches_were_counted_are_loaded(tmp_path: Path) -> None:
    old = {name: value for name, value in published_weights().items() if not name.endswith("num_batches_tracked")}
    found = pretrained_weights(model(write(tmp_path / "old.pth", old)))
    assert found is not None
    GoogLeNet(GoogLeNetImageModel()).load_state_dict(found)  # raises where a name is missing


def test_without_a_file_a_run_starts_from_scratch() -> None:
    assert pretrained_weights(ModelConfig()) is None
    assert pretrained_weights(ModelConfig(image=GoogLeNetImageModel())) is None


class _Runs:
    """Creates a file where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.made,)


EVIL: list[Callable[[_Runs, Path], Any]] = [
    torch.save,
    *(lambda runs, path, protocol=protocol: path.write_bytes(pickle.dumps(runs, protocol)) for protocol in (0, 2, 4)),
]


@pytest.mark.parametrize("write_evil", EVIL, ids=["torch", "protocol 0", "protocol 2", "protocol 4"])
def test_nothing_in_a_file_is_executed(write_evil: Callable[[_Runs, Path], Any], tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "evil.pth"
    write_evil(_Runs(made), path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match=r"evil\.pth: holds something else than weights") as refused:
            pretrained_weights(model(path))
    assert "\n" not in str(refused.value)
    assert not told, "one line is enough"
    assert not made.exists()
    if write_evil is not torch.save:
        pickle.loads(path.read_bytes())
        assert made.exists(), "the file was harmless"


def test_another_pickle_protocol_is_read_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "googlenet.pth"
    torch.save(published_weights(), path, pickle_protocol=3)
    with pytest.warns(UserWarning, match="pickle protocol"):  # what is kept from the user
        torch.load(path, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pretrained_weights(model(path)) is not None


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in published_weights().items() if key != name}


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing.pth": (lambda path: None, "No such file or directory"),
    "folder.pth": (lambda path: path.mkdir(), "Is a directory"),
    "weights.bin": (lambda path: write(path, published_weights()), "must end in .pth or .safetensors"),
    "missing.safetensors": (lambda path: None, "No such file or directory"),
    "garbage.pth": (lambda path: path.write_bytes(b"garbage"), "damaged"),
    "empty.pth": (lambda path: path.write_bytes(b""), "damaged"),
    "garbage.safetensors": (lambda path: path.write_bytes(b"garbage"), "damaged"),
    "lacking.pth": (lambda path: write(path, without("inception4c.branch3.1.conv.weight")), "inception4c.branch3.1"),
    "more.pth": (lambda path: write(path, published_weights() | {"layer4.0": torch.zeros(1)}), "'layer4.0'"),
    "shape.pth": (
        lambda path: write(path, published_weights() | {"conv2.conv.weight": torch.zeros(64, 64, 3, 3)}),
        "'conv2.conv.weight' is [64, 64, 3, 3], but model.image has [64, 64, 1, 1]",
    ),
    "nan.pth": (
        lambda path: write(path, published_weights() | {"conv1.bn.bias": torch.full((64,), torch.nan)}),
        "'conv1.bn.bias' holds numbers that are not finite",
    ),
    "list.pth": (lambda path: torch.save([torch.zeros(1)], path), "mapping of names to weights"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(name: str, tmp_path: Path) -> None:
    make, expected = WRONG[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError) as refused:
        pretrained_weights(model(path))
    assert str(refused.value).startswith(f"{path}: ")
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_cut_off_is_damaged(tmp_path: Path) -> None:
    for name in ("cut.pth", "cut.safetensors"):
        path = write(tmp_path / name, published_weights())
        path.write_bytes(path.read_bytes()[:100_000])
        with pytest.raises(InputError, match="damaged"):
            pretrained_weights(model(path))
