"""The reference of all keys of a search's file, made from their docstrings.

python -m tune.search_docs > docs/search_file.md
"""

from __future__ import annotations

from mdnet_dist.config_docs import reference
from tune.search_sections import SearchConfig

INTRODUCTION = """\
# The file of a search

Every key of the YAML file that `launch/tune_beta.py` reads; [search.md](search.md) says what a search does with them.
This page is made from `tune/search_sections.py` by `python -m tune.search_docs > docs/search_file.md`.

On the command line a key is written with dots and its value as in YAML: `trials.count=4`, `scheduler='{kind: none}'`,
`space.blend.eta='{uniform: [1, 2]}'`. It wins over the file; a mapping is merged into the file's, but a key of the
space is replaced whole. A key that only the training configuration has ([configuration.md](configuration.md)) is
appended to `overrides`. Unknown keys, wrong types, keys given twice and YAML aliases are errors. Whole numbers are
below 2^31."""


def page() -> str:
    """The whole page, as Markdown."""
    return reference(SearchConfig, INTRODUCTION, "The search")


if __name__ == "__main__":
    print(page(), end="")
