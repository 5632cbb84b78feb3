"""The exported model as a folder that MLflow serves: `mlflow models serve -m RUN/mlflow_model --env-manager local`.

MLmodel            signature, intended use, what is needed
served_code.py     what MLflow runs (`mdnet_dist.served_code`)
code/mdnet_dist/   those files of this package that it imports
artifacts/         model.safetensors, model.json
input_example.json, serving_input_example.json    an image of one colour, and the request that asks for its report
requirements.txt, conda.yaml, python_env.yaml     the versions that are installed here

Nothing in it is pickled, and nothing in it names a place on this machine. `launch/export.py` writes it too.
"""

from __future__ import annotations

import ast
import os
import shutil
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from mdnet_dist import __version__
from mdnet_dist.errors import InputError
from mdnet_dist.export import CARD, WEIGHTS, ModelCard, load_card
from mdnet_dist.images import encode_png
from mdnet_dist.mlflow_store import quieten

PACKAGE = Path(__file__).resolve().parent
CODE = PACKAGE / "served_code.py"
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "safetensors", "torch")
"""What `CODE` and the files that it needs import."""


def write_served_model(model: Path, out: Path) -> None:
    """Package an exported model for MLflow. The folder appears whole or not at all, in place of one of that name.

    Args:
        model: folder with `model.safetensors` and `model.json`.

    Raises:
        InputError: there is no such model, or the folder cannot be written.
    """
    card = load_card(model)
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    doomed = aside.with_suffix(".old")
    try:
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's, about type hints of its own
            _save(card, model, aside, _copy_needed_files(Path(scratch)))
        for name in (WEIGHTS, CARD):
            _share(model / name, aside / "artifacts" / name)
        if out.exists():
            out.rename(doomed)
        aside.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(doomed, ignore_errors=True)


def _save(card: ModelCard, model: Path, folder: Path, code: Path) -> None:
    """Write the folder by MLflow's own function, then take out what it says of this machine."""
    quieten()
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types.schema import ColSpec, DataType, Map, ParamSchema, ParamSpec, Schema

    answers = {
        "predicted_label": DataType.string,
        "probabilities": Map(DataType.double),
        "report": Map(DataType.string),
    }
    described = Model()
    save_model(
        path=str(folder),
        python_model=str(CODE),
        code_paths=[str(code)],
        artifacts={"weights": str(model / WEIGHTS), "card": str(model / CARD)},
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.binary, "image")]),
            outputs=Schema(
                [ColSpec(kind, name, required=False) for name, kind in {**answers, "error": DataType.string}.items()]
            ),
            params=ParamSchema([ParamSpec("beam_width", DataType.long, 1)]),
        ),
        input_example=(pd.DataFrame({"image": [_example(card)]}), {"beam_width": 1}),
        pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS],
        metadata={"intended_use": card.intended_use, "mdnet_dist": __version__},
        mlflow_model=described,
    )
    served: dict[str, Any] = described.flavors["python_function"]
    served["model_code_path"] = CODE.name
    for artifact in served["artifacts"].values():
        artifact["uri"] = artifact["path"]
    del served["cloudpickle_version"]  # written always, used only for models that are pickled
    described.save(str(folder / "MLmodel"))


def _example(card: ModelCard) -> bytes:
    """A PNG file in the mean colour of the training images: nobody's picture."""
    size = int(card.data["image_size"])
    red, green, blue = (round(255 * value) for value in card.image_mean)
    return encode_png(Image.new("RGB", (size, size), (red, green, blue)))


def _copy_needed_files(folder: Path) -> Path:
    """Copy what `CODE` needs of this package below a folder; returns the copied package."""
    for path in needed_files(CODE) - {CODE}:
        copy = folder / path.relative_to(PACKAGE.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return folder / PACKAGE.name


def needed_files(start: Path) -> set[Path]:
    """The files of this package that one of them imports, directly or through others, and itself."""
    found: set[Path] = set()
    ahead = [start]
    while ahead:
        path = ahead.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
                names = str(node.module).split(".")
                parents = [PACKAGE.parent.joinpath(*names[:depth], "__init__.py") for depth in range(1, len(names) + 1)]
                module = PACKAGE.parent.joinpath(*names).with_suffix(".py")
                ahead += [path for path in (*parents, module) if path.is_file()]
    return found


def _share(original: Path, copy: Path) -> None:
    """Make a copy take no place, where there are hard links; no writer changes these files, all replace them."""
    link = copy.with_suffix(".link")
    try:
        os.link(original, link)
    except OSError:
        return
    os.replace(link, copy)
