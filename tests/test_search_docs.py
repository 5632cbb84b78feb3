"""What is written of searches: the reference of the keys, and the page for people, whose files and keys are tried."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, Tag

from mdnet_dist.config import Section, chosen_by
from mdnet_dist.config_check import sections_in
from mdnet_dist.config_docs import reference
from tests.conftest import REPOSITORY
from tune.search_config import Search, SearchConfig, load_search
from tune.search_docs import page

SEARCH_PAGE = (REPOSITORY / "docs" / "search.md").read_text(encoding="utf-8")
README = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## Searching")[2].partition("\n## ")[0]


def sections_below(section: type[Section]) -> list[type[Section]]:
    below = [inner for field in section.model_fields.values() for inner in sections_in(field)]
    return [section, *(found for inner in below for found in sections_below(inner))]


# ----------------------------------------------------------------------------------------------------------- reference


def test_the_reference_names_every_field_and_is_current() -> None:
    sections = sections_below(SearchConfig)
    assert len(sections) == 9
    blocks = page().split("\n## ")
    assert len(blocks) == 1 + len(sections)
    for section in sections:
        [block] = [block for block in blocks if " ".join((section.__doc__ or "").split()) in block]
        assert re.findall(r"^\| `(\w+)` \|", block, re.MULTILINE) == list(section.model_fields)
    path = REPOSITORY / "docs" / "search_file.md"
    assert path.read_text(encoding="utf-8") == page(), "run `python -m tune.search_docs > docs/search_file.md`"


@pytest.mark.parametrize(
    "row",
    [
        "## The search",
        "## `searcher` with `searcher.kind: grid`",
        "| `space` | mapping | required | {dotted key of the training configuration: its distribution}.",
        "| `count` | whole number above 0 or `null` | `null` |",
        "| `searcher` | section, by its `kind` | `kind: random` |",
        "| `trials` | section | see there |",
        "| `copied_share` | number from 0 to 0.5 | `0.25` |",
        "| `reduction` | whole number from 2 | `3` |",
        "| `mode` | `max`, `min` | `max` |",
    ],
)
def test_the_reference_shows_types_limits_and_defaults(row: str) -> None:
    assert sum(line.startswith(row) for line in page().splitlines()) == 1


def test_any_section_can_be_the_root_of_a_reference() -> None:
    class Left(Section):
        """Turns left."""

        kind: Literal["left"] = "left"
        """Chooses this section."""

    class Right(Section):
        """Turns right | wrong."""

        kind: Literal["right"]
        """Chooses this section."""
        degrees: Annotated[float, Field(gt=0.0, le=90.0)] = 45.0
        """Of the turn, if a < b."""

    class Way(Section):
        """A way."""

        turn: Annotated[Annotated[Left, Tag("left")] | Annotated[Right, Tag("right")], chosen_by("kind", "left")] = (
            Left()
        )
        """Where it turns."""

    assert reference(Way, "# Ways", "The way") == textwrap.dedent(
        """\
        # Ways

        ## The way

        A way.

        | key | type or choices | default | meaning |
        | --- | --- | --- | --- |
        | `turn` | section, by its `kind` | `kind: left` | Where it turns. |

        ## `turn` with `turn.kind: left`

        Turns left.

        | key | type or choices | default | meaning |
        | --- | --- | --- | --- |
        | `kind` | `left` | `left` | Chooses this section. |

        ## `turn` with `turn.kind: right`

        Turns right \\| wrong.

        | key | type or choices | default | meaning |
        | --- | --- | --- | --- |
        | `kind` | `right` | required | Chooses this section. |
        | `degrees` | number above 0 to 90 | `45.0` | Of the turn, if a &lt; b. |
        """
    )


# ------------------------------------------------------------------------------------------------- the page for people


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def load(text: str, tmp_path: Path, *overrides: str) -> Search:
    path = tmp_path / "search.yaml"
    path.write_text(text, encoding="utf-8")
    return load_search(path, overrides)


def example() -> str:
    [found] = re.findall(r"```yaml\n(.*?)```", SEARCH_PAGE, re.DOTALL)
    return found


def test_the_example_is_a_search(tmp_path: Path) -> None:
    search = load(example(), tmp_path)
    assert search.config.scheduler.kind == "asha" and search.config.trials.count == 12
    names = set(search.space.parameters())
    assert {"blend.beta.constant.value", "blend.beta.linear.start"} <= names and len(search.space.keys()) == 6
    assert {parameter.kind for parameter in search.space.parameters().values()} == {
        "choice", "uniform", "log_uniform", "integers",
    }  # fmt: skip
    assert search.short_base.train.epochs == 12 != search.base.train.epochs


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("space.blend.eta={choice: {balanced: balanced, fixed: {log_uniform: [1, 9]}}}", "asha"),
        ("space.blend.eta={uniform: [1, 2]}", "asha"),
        ("scheduler={kind: none}", "none"),
    ],
)
def test_overrides_of_the_pages_are_taken(override: str, kind: str, tmp_path: Path) -> None:
    assert override.partition("=")[2] in SEARCH_PAGE + page()
    assert load(example(), tmp_path, override).config.scheduler.kind == kind


def test_trials_keep_what_their_own_overrides_say(tmp_path: Path) -> None:
    search = load(example(), tmp_path, "train.epochs=6")
    assert (search.base.train.epochs, search.short_base.train.epochs) == (6, 12)
    assert "`trials.overrides='[train.epochs=6, evaluate.every_epochs=2]'`, not with `train.epochs=6`" in SEARCH_PAGE
    search = load(example(), tmp_path, "trials.overrides=[train.epochs=6, evaluate.every_epochs=2]")
    assert (search.base.train.epochs, search.short_base.train.epochs) == (24, 6)


def commands() -> list[list[str]]:
    """Arguments of each line that starts a search, on both pages."""
    lines = re.findall(
        r"^    (?:ray job submit -- )?python launch/tune_beta\.py (.*)$", SEARCH_PAGE + README, re.MULTILINE
    )
    return [shlex.split(line, comments=True) for line in lines]


def test_commands_name_searches_that_exist() -> None:
    found = commands()
    assert len(found) >= 8 and {arguments[0] for arguments in found} == {
        "tune/beta.yaml", "tune/depth.yaml", "tune/pbt.yaml", "tune/rates.yaml",
    }  # fmt: skip
    for file, *overrides in found:
        assert (
            load_search(file, [override for override in overrides if override != "--resume"]).config.name
            == Path(file).stem
        )


def test_the_page_names_only_keys_that_exist() -> None:
    known = {
        f"{name}.{key}"
        for name, field in SearchConfig.model_fields.items()
        for section in sections_in(field)
        for key in section.model_fields
    }
    told = set(re.findall(r"`((?:trials|searcher|scheduler|confirm)\.\w+)", SEARCH_PAGE + README)) - {"trials.csv"}
    assert len(told) >= 12 and told <= known, told - known


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((\w+\.md)\)", SEARCH_PAGE + page())
    assert {"search_file.md", "configuration.md", "search.md"} <= set(links)
    assert all((REPOSITORY / "docs" / link).is_file() for link in links)
