"""Published weights for the image model, read from a file that the user names (`model.image.pretrained`).

A .pth file is a pickle: it is read as weights only, so that nothing in it is executed. The weights that torchvision
publishes were trained on pixels scaled to -1..1; here they meet pixels normalised over the training part, which the
batch normalisation behind the first convolution takes up as it is fine-tuned.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mdnet_dist.config import GoogLeNetImageModel, ModelConfig
from mdnet_dist.errors import InputError
from mdnet_dist.model.googlenet import GoogLeNet

IGNORED = ("fc.", "aux1.", "aux2.")
"""What the published file has besides: classifiers of photographs."""


def pretrained_weights(config: ModelConfig) -> dict[str, Tensor] | None:
    """The weights that the image model of a new run starts from; None where it starts from scratch.

    Raises:
        InputError: the file is missing or damaged, or does not hold exactly the weights of this image model.
    """
    image = config.image
    if not isinstance(image, GoogLeNetImageModel) or image.pretrained is None:
        return None
    path = Path(image.pretrained)
    found = {name: value for name, value in _read(path).items() if not name.startswith(IGNORED)}
    with torch.device("meta"):
        wanted = GoogLeNet(image).state_dict()
    for name, value in wanted.items():
        if name not in found:
            if name.endswith(".num_batches_tracked"):  # files of before PyTorch 0.4.1 lack it; nothing depends on it
                found[name] = torch.zeros((), dtype=value.dtype)
                continue
            raise InputError(
                f"{path}: has no '{name}'; model.image.pretrained names weights of torchvision's googlenet"
            )
        if found[name].shape != value.shape:
            raise InputError(
                f"{path}: '{name}' is {list(found[name].shape)}, but model.image has {list(value.shape)} there; "
                "name weights of torchvision's googlenet"
            )
        if not found[name].isfinite().all():
            raise InputError(f"{path}: '{name}' holds numbers that are not finite; download the file again")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise InputError(f"{path}: '{unknown[0]}' is nothing of GoogLeNet; name weights of torchvision's googlenet")
    return found


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix != ".pth":
            raise InputError(f"{path}: model.image.pretrained must end in .pth or .safetensors")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                if any(part.file_size > part.compress_size for part in parts.infolist()):
                    raise InputError(
                        f"{path}: is compressed, and may be of any size inside; torch.save writes it plain"
                    )
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # pickle protocols, TorchScript: refused below or harmless
            found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}; model.image.pretrained names a file of weights"
        ) from error
    except pickle.UnpicklingError as error:  # also what would execute something
        raise InputError(f"{path}: holds something else than weights, or is damaged; nothing of it was run") from error
    except InputError:
        raise
    except MemoryError as error:  # torch's old format says how much there is before it is there
        raise InputError(f"{path}: claims more weights than memory holds; download it again") from error
    except Exception as error:  # torch's readers raise nearly anything on damaged files
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: damaged ({reason:.100}); download it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path}: must hold a mapping of names to weights")
    return {str(name): value for name, value in found.items()}
