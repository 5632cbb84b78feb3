"""What MLflow runs when it serves a network; `mdnet_dist.served_model` puts it into the folder of a served model.

A row in    image               the bytes of a JPEG, PNG, TIFF or WebP file; over HTTP their base64 text
A row out   predicted_label     the most probable class
            probabilities       {class: probability}
            report              {topic: sentence}
            error               what is wrong with the image; the other columns are then null
"""

from __future__ import annotations

import base64
import binascii
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image

from mdnet_dist.distributed import local_device
from mdnet_dist.errors import InputError
from mdnet_dist.export import load_model
from mdnet_dist.images import decode_image
from mdnet_dist.predict import answer_files

MOST_BEAMS = 32  # of what is asked for over a network
_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]+={0,2}\s*")  # no image file is made of these bytes alone


class ReportModel(PythonModel):
    """Reports on images."""

    def load_context(self, context: Any) -> None:
        """Load the network, onto a GPU where there is one."""
        self.device = local_device()
        self.network, self.card = load_model(Path(context.artifacts["weights"]).parent, self.device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answer all rows, in their order.

        Args:
            params: beam_width.

        Raises:
            MlflowException: the column or the beam width is wrong, or none of the images can be read (HTTP 400).
        """
        beam_width = int((params or {}).get("beam_width", 1))
        if not 1 <= beam_width <= MOST_BEAMS:
            raise MlflowException.invalid_parameter_value(f"beam_width {beam_width}: must be from 1 to {MOST_BEAMS}")
        numbered = list(enumerate(model_input["image"], start=1))
        answers = answer_files(self.network, self.card, numbered, _decode, device=self.device, beam_width=beam_width)
        rows: list[dict[str, Any]] = []
        problems: list[str] = []
        for _, _, answer in answers:
            if isinstance(answer, InputError):
                problems.append(str(answer))
                rows.append({"error": str(answer)})
            else:
                rows.append(answer.as_line())
        if problems and len(problems) == len(rows):
            raise MlflowException.invalid_parameter_value(f"no image of {len(rows)} can be read: {problems[0]}")
        columns = ["predicted_label", "probabilities", "report", "error"]
        # As objects, because None would become NaN otherwise, which is no JSON.
        return pd.DataFrame([[row.get(name) for name in columns] for row in rows], columns=columns, dtype=object)


def _decode(numbered: tuple[int, Any]) -> Image.Image:
    number, given = numbered
    where = f"image {number}"
    raw = given.encode() if isinstance(given, str) else given
    if not isinstance(raw, bytes):
        raise InputError(f"{where}: not the bytes of an image file, which over HTTP are sent as base64 text")
    if _BASE64.fullmatch(raw):  # of {"inputs": ...} and {"instances": ...} MLflow decodes nothing
        with suppress(binascii.Error):
            raw = base64.b64decode(raw)
    return decode_image(raw, where)


set_model(ReportModel())
