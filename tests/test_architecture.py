"""What the README promises of the shape of the tree: who imports what, what an import costs, what is written where."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = sorted(
    path for folder in ("mdnet_dist", "data_shards", "launch", "tune") for path in (REPOSITORY / folder).rglob("*.py")
)
SERVED_CODE = "mdnet_dist/served_code.py"
"""MLflow runs this file as it is, so that importing it gives MLflow a model: no other module imports it."""

ALONE: dict[str, tuple[str, ...]] = {
    "deepspeed": ("mdnet_dist/engine.py",),
    "webdataset": ("mdnet_dist/reading.py",),
    # Runs are recorded by one file. A model is packaged by another, and served by a third, which travels with it.
    "mlflow": ("mdnet_dist/mlflow_store.py", "mdnet_dist/served_model.py", SERVED_CODE),
    "ray": ("tune/",),
    "optuna": ("tune/proposals.py",),
    "sklearn": ("tune/importance.py",),
}
"""Each heavy dependency and the one file, or folder, that may import it; MLflow has one for each of three tasks."""

LIGHT = ["mdnet_dist/model/", "mdnet_dist/vocabulary.py", "mdnet_dist/decoding.py", "mdnet_dist/metrics/"]
"""What runs and is tested on a laptop with torch, numpy and nltk alone."""


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "computed"


def test_the_sources_are_found() -> None:
    assert {"mdnet_dist/plan.py", "data_shards/writer.py", "launch/train.py"} <= set(map(relative, SOURCES))


# ------------------------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("dependency", ALONE)
def test_one_heavy_dependency_one_file(dependency: str) -> None:
    users = [relative(path) for path in SOURCES if dependency in {name.partition(".")[0] for name in imported(path)}]
    assert all(user.startswith(ALONE[dependency]) for user in users)
    assert users, f"nobody uses {dependency}: this test would not notice a second user"


def test_the_network_and_its_scores_need_torch_numpy_and_nltk_alone() -> None:
    light = [path for path in SOURCES if relative(path).startswith(tuple(LIGHT))]
    assert len(light) > 10
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "nltk", "mdnet_dist"}
    for path in light:
        strangers = {name.partition(".")[0] for name in imported(path)} - allowed
        assert not strangers, f"{relative(path)} imports {strangers}"


def test_the_network_and_its_scores_run_without_the_other_dependencies() -> None:
    """They are imported where no other dependency of the project can be; the configuration needs pydantic and YAML."""
    lines = (REPOSITORY / "setup.cfg").read_text(encoding="utf-8").splitlines()
    block = lines[lines.index("install_requires =") + 1 :]
    names = [re.match(r"    ([a-z]+)", line) for line in block[: block.index("")]]
    required = {"pillow": "PIL", "pyyaml": "yaml", "scikit": "sklearn"}
    heavy = {required.get(found[1], found[1]) for found in names if found} - {
        "torch",
        "numpy",
        "nltk",
        "pydantic",
        "yaml",
    }
    assert heavy >= {"deepspeed", "webdataset", "mlflow", "ray", "PIL", "safetensors", "matplotlib", "tqdm", "sklearn"}
    modules = [
        relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in SOURCES
        if relative(path).startswith(tuple(LIGHT))
    ]
    program = f"""
        import importlib, sys
        for name in {sorted(heavy | {"pandas", "pydicom", "pycocoevalcap", "optuna"})}:
            sys.modules[name] = None  # an import of it then fails
        for name in {modules}:
            importlib.import_module(name)
        from mdnet_dist.config import ModelConfig
        from mdnet_dist.model.mdnet import MDNet
        MDNet(ModelConfig(), 6, 4, 50)
    """
    run_python(program)


def run_python(program: str, cwd: Path = REPOSITORY) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_what_mlflow_runs_is_imported_by_nothing() -> None:
    module = SERVED_CODE.removesuffix(".py").replace("/", ".")
    assert not [relative(path) for path in SOURCES if module in imported(path)]


@pytest.mark.slow
def test_imports_have_no_side_effects(tmp_path: Path) -> None:
    """No file, no thread, no process, no output, no signal handler, no environment variable, no random number."""
    modules = [
        relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in SOURCES
        if not relative(path).startswith("launch/") and path.name != "__main__.py" and relative(path) != SERVED_CODE
    ]
    program = f"""
        import importlib, logging, multiprocessing, os, random, signal, threading, warnings
        import matplotlib, numpy, PIL, torch  # what these do is theirs
        def state():
            return (
                dict(os.environ), [signal.getsignal(n) for n in range(1, 32)], threading.active_count(),
                multiprocessing.active_children(), os.getcwd(), random.getstate(), numpy.random.get_state()[1].tolist(),
                torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
                logging.getLogger().level, logging.getLogger().handlers[:],
            )
        before = state()
        for name in {modules}:
            importlib.import_module(name)
            for one, other in zip(before, state()):
                assert one == other, (name, one, other)
    """
    assert run_python(program, cwd=tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "command",
    [["-c", "import mdnet_dist"], *[[relative(path), "--help"] for path in SOURCES if path.parent.name == "launch"]],
    ids=lambda command: command[-2] if command[-1] == "--help" else "import",
)
def test_help_comes_at_once(command: list[str]) -> None:
    """Under a second of processor time, and without torch."""
    before = cpu_seconds()
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert ("usage:" in ended.stdout) == ("--help" in command)
    modules = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "encodings" in modules, "the list of imports was not understood"
    assert not modules & {"torch", "deepspeed", "mlflow", "ray", "matplotlib", "optuna", "sklearn"}
    assert cpu_seconds() - before < 1


# --------------------------------------------------------------------------------------------------------------- texts


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes, and the public methods of public classes."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def test_everything_public_has_a_docstring() -> None:
    silent = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            silent.append(relative(path))
        silent += [
            f"{relative(path)}: {name}"
            for name, node in public_definitions(tree)
            if not ast.get_docstring(node)  # type: ignore[arg-type]
        ]
    assert not silent, "no docstring: " + ", ".join(silent)


def test_the_readme_names_every_file() -> None:
    listed = dict(listed_in_readme())
    for name in listed:
        assert (REPOSITORY / name).exists(), f"README.md lists {name}, which does not exist"
    # A folder with a line of its own and none for its files stands for them.
    summed_up = tuple(f"{name}/" for name, has_lines_below in listed.items() if not has_lines_below)
    missing = [
        relative(path)
        for path in SOURCES
        if path.name != "__init__.py" and relative(path) not in listed and not relative(path).startswith(summed_up)
    ]
    assert not missing, "README.md's architecture section does not name " + ", ".join(missing)


def listed_in_readme() -> Iterator[tuple[str, bool]]:
    """The paths in the architecture section, and whether lines for files below them follow."""
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## Architecture")[2]
    lines = [match for line in section.splitlines() if (match := re.match(r"    ( *)([\w./-]+)(?:\s{1,}\S.*)?$", line))]
    above: list[str] = []
    for number, match in enumerate(lines):
        depth = len(match[1]) // 2
        above = [*above[:depth], match[2].rstrip("/")]
        deeper = number + 1 < len(lines) and len(lines[number + 1][1]) // 2 > depth
        yield "/".join(above), deeper


def text_files() -> Iterator[Path]:
    left_out = {"runs", "build", "dist", "mlruns", "__pycache__"}
    for folder, folders, files in os.walk(REPOSITORY):
        folders[:] = [
            name
            for name in folders
            if name not in left_out and (not name.startswith(".") or name == ".ci") and not name.endswith(".egg-info")
        ]
        for name in files:
            path = Path(folder, name)
            if path.suffix not in (".png", ".jpg", ".db", ".pyc") and name != ".git":  # a file, in a second worktree
                yield path


def test_no_path_of_a_machine_is_in_the_tree() -> None:
    places = {str(REPOSITORY), str(Path.home()), sys.prefix} - {"/"}
    # Put together here, so that this file does not hold what it looks for.
    usual = ["/" + "root/", "/" + "work/", "/" + r"home/\w", "/" + r"Users/\w", "C:" + r"\\Users"]
    pattern = re.compile("|".join([*(re.escape(place) + r"(?![\w.-])" for place in places), *usual]))
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{relative(path)}:{number}: {line.strip():.100}")
    assert not found, "\n".join(found)


def test_text_files_are_found() -> None:
    assert {"README.md", ".ci/run", "mdnet_dist/plan.py"} <= set(map(relative, text_files()))
