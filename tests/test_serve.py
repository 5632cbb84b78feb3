"""The model as MLflow serves it: packaged, loaded, and asked over HTTP."""

from __future__ import annotations

import base64
import json
import os
import pickletools
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data_shards.prepare import open_image
from launch.mlflow_ui import stop
from mdnet_dist.errors import InputError
from mdnet_dist.export import CARD, WEIGHTS, load_card
from mdnet_dist.machine import free_port
from mdnet_dist.predict_folder import predict_folder
from mdnet_dist.saved import open_model
from mdnet_dist.served_model import CODE, needed_files, write_served_model
from tests.conftest import REPOSITORY
from tests.saved import untrained_run
from tests.test_train import run
from tests.tiny import CLASSES, TOPICS, tiny_config, tiny_set

# MLflow remarks, when it is imported, on type hints of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*type hint")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is packaged."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_set(folder / "shards")
    run_folder, _ = untrained_run(tiny_config(folder / "shards", folder / "runs"), seed=1)
    write_served_model(run_folder, run_folder / "mlflow_model")
    return run_folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png", "c.tiff", "d.webp"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    Image.fromarray(rng.integers(0, 65536, (40, 40), dtype=np.uint16)).save(folder / "e.png")
    return folder


def expected(saved: Path, images: Path, out: Path, beam_width: int = 1) -> list[dict[str, Any]]:
    """What `launch/predict.py` writes of the images, as rows of a served model's answer."""
    network, card, _ = open_model(saved)
    predict_folder(network, card, images, out, open_image, beam_width=beam_width)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return [{**{name: line[name] for name in line if name != "image"}, "error": None} for line in lines]


# ---------------------------------------------------------------------------------------------------------- the folder


def test_the_folder_holds_what_is_needed_and_nothing_of_this_machine(saved: Path) -> None:
    folder = saved / "mlflow_model"
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    code = {name.removeprefix("code/") for name in files if name.startswith("code/")}
    assert code == {path.relative_to(REPOSITORY).as_posix() for path in needed_files(CODE) - {CODE}}
    assert "mdnet_dist/model/mdnet.py" in code and "mdnet_dist/trainer.py" not in code
    assert files.keys() - {f"code/{name}" for name in code} == {
        "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json",
        "serving_input_example.json", CODE.name, f"artifacts/{WEIGHTS}", f"artifacts/{CARD}",
    }  # fmt: skip
    for path in files.values():
        content = path.read_bytes()
        for place in (saved.parent, REPOSITORY, Path.home()):
            assert str(place).encode() not in content or place == Path("/"), path
        assert b'shards":' not in content or path.suffix == ".py", path
    for name in (WEIGHTS, CARD):
        assert (folder / "artifacts" / name).samefile(saved / name), "it takes no place twice"
    described = yaml.safe_load(files["MLmodel"].read_text())
    assert described["metadata"]["intended_use"] == load_card(saved).intended_use == "research only, not diagnosis"
    required = files["requirements.txt"].read_text().splitlines()
    assert all("==" in line and "+" not in line for line in required)
    assert {line.partition("==")[0] for line in required} >= {"mlflow", "torch", "safetensors", "pillow", "pydantic"}


def test_all_that_the_code_imports_is_required(saved: Path) -> None:
    import ast

    names = {"PIL": "pillow"}
    required = {
        line.partition("==")[0] for line in (saved / "mlflow_model" / "requirements.txt").read_text().splitlines()
    }
    imported = set()
    for path in needed_files(CODE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    strangers = imported - set(sys.stdlib_module_names) - {"mdnet_dist"}
    assert {names.get(name, name) for name in strangers} == required


def test_nothing_is_pickled(saved: Path) -> None:
    for path in (saved / "mlflow_model").rglob("*"):
        assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin")
        if path.is_file():
            content = path.read_bytes()
            assert not content.startswith((b"\x80", b"PK\x03\x04")), path  # a pickle of protocol 2 or later, a zip
            with pytest.raises(ValueError):
                list(pickletools.genops(content))
    assert "pickle" not in (saved / "mlflow_model" / "MLmodel").read_text()


def test_packaging_again_replaces_and_packaging_nothing_is_named(saved: Path, tmp_path: Path) -> None:
    before = (saved / "mlflow_model" / "MLmodel").read_text()
    stray = saved / "mlflow_model" / "stray"
    stray.write_text("")
    write_served_model(saved, saved / "mlflow_model")
    assert not stray.exists() and (saved / "mlflow_model" / "MLmodel").read_text() != before
    assert not list(saved.glob(".mlflow_model*"))
    with pytest.raises(InputError, match=r"model\.json: No such file"):
        write_served_model(tmp_path, tmp_path / "mlflow_model")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_served_model(saved, tmp_path / "file" / "mlflow_model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_packaging_asks_no_network(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_served_model(saved, tmp_path / "mlflow_model")
    assert (tmp_path / "mlflow_model" / "MLmodel").exists()


# --------------------------------------------------------------------------------------------------------- in a process


def test_its_answers_are_those_of_predict(saved: Path, images: Path, tmp_path: Path) -> None:
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model(str(saved / "mlflow_model"))
    rows = expected(saved, images, tmp_path / "greedy.jsonl")
    assert len(rows) == 5 and len({str(row) for row in rows}) == 5
    paths = sorted(images.iterdir())
    frame = pd.DataFrame({"image": [path.read_bytes() for path in paths]})
    answer = model.predict(frame)
    assert list(answer.columns) == ["predicted_label", "probabilities", "report", "error"]
    assert answer.to_dict(orient="records") == rows
    text = pd.DataFrame({"image": [base64.b64encode(path.read_bytes()).decode() for path in paths]})
    assert model.predict(text).to_dict(orient="records") == rows, "base64 text"
    wide = expected(saved, images, tmp_path / "wide.jsonl", beam_width=3)
    assert model.predict(frame, params={"beam_width": 3}).to_dict(orient="records") == wide != rows


def test_bad_images_and_wrong_requests(saved: Path, images: Path) -> None:
    import mlflow
    import pandas as pd
    from mlflow.exceptions import MlflowException

    model = mlflow.pyfunc.load_model(str(saved / "mlflow_model"))
    good = (images / "a.jpg").read_bytes()
    bomb = good.replace(b"\x00\x28\x00\x32", b"\xff\xff\xff\xff", 1)  # 40 x 50 becomes 65535 x 65535
    assert bomb != good
    bad = [b"", b"hello", good[:200], bomb, "?", "aGVsbG8=", None]
    answer = model.predict(pd.DataFrame({"image": [*bad, good]}, dtype=object)).to_dict(orient="records")
    for number, row in enumerate(answer[:-1], start=1):
        assert row["error"].startswith(f"image {number}: ")
        assert (row["predicted_label"], row["probabilities"], row["report"]) == (None, None, None)
    assert "4,294,836,225 pixels" in answer[3]["error"]
    assert answer[-1]["error"] is None and list(answer[-1]["report"]) == TOPICS
    for frame, params, message in (
        (pd.DataFrame({"image": bad}, dtype=object), {}, "no image of 7 can be read: image 1: not a JPEG"),
        (pd.DataFrame({"picture": [good]}), {}, r"Model is missing inputs \['image'\]"),
        (pd.DataFrame({"image": [good]}), {"beam_width": 0}, "beam_width 0: must be from 1 to 32"),
        (pd.DataFrame({"image": [good]}), {"beam_width": 10**9}, "beam_width 1000000000: must be from 1 to 32"),
    ):
        with pytest.raises(MlflowException, match=message) as caught:
            model.predict(frame, params=params)
        assert caught.value.get_http_status_code() == 400


def test_signature_and_input_example(saved: Path) -> None:
    import mlflow
    from mlflow.models.utils import load_serving_example
    from mlflow.pyfunc.scoring_server import invocations

    folder = str(saved / "mlflow_model")
    model = mlflow.pyfunc.load_model(folder)
    signature = model.metadata.signature
    assert [(column.name, column.type.name) for column in signature.inputs] == [("image", "binary")]
    assert signature.outputs.input_names() == ["predicted_label", "probabilities", "report", "error"]
    assert [(param.name, param.default) for param in signature.params] == [("beam_width", 1)]
    # The request that lies in the folder, through the server's own parser.
    request = load_serving_example(folder)
    answer = invocations(request, "application/json", model, signature.inputs)
    assert answer.status == 200
    (row,) = json.loads(answer.response)["predictions"]
    assert row["error"] is None and list(row["probabilities"]) == CLASSES
    (direct,) = model.predict(model.input_example).to_dict(orient="records")
    assert direct == row


# ------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def server(saved: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a real server that has the folder alone: another current folder, no PYTHONPATH."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    command = ["-m", "mlflow", "models", "serve", "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "-m", str(saved / "mlflow_model")],
            cwd=tmp_path,
            env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1", "PATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while ask(f"http://127.0.0.1:{port}/ping")[0] != 200:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no process of the group is left
    assert ask(f"http://127.0.0.1:{port}/ping")[0] == 0


def ask(address: str, body: Any = None) -> tuple[int, Any]:
    """Status and content of an answer; 0 where nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if data else text
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, None


@pytest.mark.slow
def test_a_real_server_answers_posted_images(server: str, saved: Path, images: Path, tmp_path: Path) -> None:
    rows = expected(saved, images, tmp_path / "out.jsonl")
    a, b = (base64.b64encode((images / name).read_bytes()).decode() for name in ("a.jpg", "b.png"))
    broken = base64.b64encode((images / "a.jpg").read_bytes()[:300]).decode()
    three = [{"image": text} for text in (a, broken, b)]
    for body in (
        {"dataframe_records": three},
        {"dataframe_split": {"columns": ["image"], "data": [[a], [broken], [b]]}},
        {"inputs": {"image": [a, broken, b]}},
        {"inputs": three},
        {"instances": three},
    ):
        status, answer = ask(f"{server}/invocations", body)
        assert status == 200, answer
        first, second, third = answer["predictions"]
        assert [first, third] == rows[:2], body.keys()
        assert second["error"].startswith("image 2: the image does not decode")
        assert [second[name] for name in ("predicted_label", "probabilities", "report")] == [None] * 3
    status, answer = ask(f"{server}/invocations", {"dataframe_records": [{"image": broken}]})
    assert status == 400 and "no image of 1 can be read" in answer["message"]
    status, answer = ask(f"{server}/invocations", {"dataframe_records": three[:1], "params": {"beam_width": 3}})
    assert answer["predictions"] == expected(saved, images, tmp_path / "wide.jsonl", beam_width=3)[:1]


@pytest.mark.slow
def test_the_folder_brings_its_own_code(saved: Path, tmp_path: Path) -> None:
    """In a process that finds no other copy of this package."""
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")
import mlflow
model = mlflow.pyfunc.load_model({str(saved / "mlflow_model")!r})
import mdnet_dist, mdnet_dist.predict
print(mdnet_dist.__file__)
print(mdnet_dist.predict.__file__)
print("webdataset" in sys.modules or "deepspeed" in sys.modules)
print(model.predict(model.input_example)["error"][0])
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    code = saved / "mlflow_model" / "code" / "mdnet_dist"
    assert ended.stdout.splitlines()[-4:] == [str(code / "__init__.py"), str(code / "predict.py"), "False", "None"]


@pytest.mark.slow
def test_the_command(saved: Path, images: Path, tmp_path: Path) -> None:
    """`launch/export.py`: of an old run, of a checkpoint, and wrong."""
    import mlflow
    import pandas as pd

    old = tmp_path / "old"
    old.mkdir()
    for name in (CARD, WEIGHTS):
        (old / name).write_bytes((saved / name).read_bytes())
    finished = run(sys.executable, "launch/export.py", old)
    assert finished.returncode == 0, finished.stderr
    assert f"-m {old / 'mlflow_model'}" in finished.stdout and "research only" in finished.stdout
    other = tmp_path / "made" / "other"
    finished = run(sys.executable, "launch/export.py", saved, "--checkpoint", "step-00000003", "--out", other)
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in other.iterdir()} == {CARD, WEIGHTS, "mlflow_model"}
    frame = pd.DataFrame({"image": [(images / "a.jpg").read_bytes()]})
    answers = [
        mlflow.pyfunc.load_model(str(folder / "mlflow_model")).predict(frame).to_dict(orient="records")
        for folder in (old, saved, other)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert answers[2] == expected(other, images, tmp_path / "out.jsonl")[:1]
    for arguments, named in (
        ((saved, "--checkpoint", "best"), "--checkpoint needs --out DIR"),
        ((saved, "--checkpoint", "worst", "--out", other), "--checkpoint worst: not a checkpoint"),
        ((tmp_path / "none",), "no such folder"),
        ((saved, "--out", "setup.cfg"), "setup.cfg: cannot be written"),
    ):
        wrong = run(sys.executable, "launch/export.py", *arguments)
        assert wrong.returncode == 2, wrong.stderr
        assert named in wrong.stderr.splitlines()[-1]
        assert "Traceback" not in wrong.stderr
