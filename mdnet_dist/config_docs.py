"""The reference of all configuration keys, made from their docstrings.

python -m mdnet_dist.config_docs > docs/configuration.md
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from mdnet_dist.config import RunConfig, Section
from mdnet_dist.config_check import describe_field, section_tag, sections_in, tag_key

INTRODUCTION = """\
# Configuration

Every key of a run's YAML file, as `launch/train.py` and the base of a search read it. This page is made from
`mdnet_dist/config.py` by `python -m mdnet_dist.config_docs > docs/configuration.md`.

On the command line a key is written with dots and its value as in YAML: `train.epochs=3`,
`blend.beta='{kind: linear, start: 0.1, end: 0.9}'`, `optimizer.image.schedule.kind=step`. It wins over the file; a
mapping is merged into the file's. Unknown keys, wrong types, keys given twice and YAML aliases are errors. Whole
numbers are below 2^31."""

PLAIN_TYPES = {int: "whole number", float: "number", str: "string", bool: "`true`, `false`", type(None): "`null`"}
LIMITS = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
INT_LIMIT = 2**31
"""Of all whole numbers: said once, in the introduction."""


def reference(root: type[Section] = RunConfig, introduction: str = INTRODUCTION, title: str = "The run") -> str:
    """The whole page, as Markdown.

    Args:
        root: the section that a file holds.
        introduction: what the page begins with.
        title: of the root's own keys.
    """
    places: dict[type[Section], dict[str, str]] = {root: {}}
    _collect(root, "", "", places)
    holders = Counter(key for keys in places.values() for key in keys)
    blocks = [introduction]
    for section, keys in places.items():
        headings = [f"`{key}`{chosen if holders[key] > 1 else ''}" for key, chosen in keys.items()]
        blocks.append(f"## {', '.join(headings) or title}")
        blocks.append(_prose(section.__doc__ or ""))
        rows = [
            f"| `{name}` | {_type(field)} | {_default(field)} | {_prose(describe_field(section, name))} |"
            for name, field in section.model_fields.items()
        ]
        blocks.append("\n".join(["| key | type or choices | default | meaning |", "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(blocks) + "\n"


def _collect(section: type[Section], key: str, chosen: str, places: dict[type[Section], dict[str, str]]) -> None:
    """Note for each section below this one the keys that can hold it, and what chooses it where there is a choice."""
    for name, field in section.model_fields.items():
        below = f"{key}.{name}".removeprefix(".")
        choices = sections_in(field)
        for choice in choices:
            chosen_by = f" with `{below}.{tag_key(choice)}: {section_tag(choice)}`" if len(choices) > 1 else chosen
            places.setdefault(choice, {}).setdefault(below, chosen_by)
            _collect(choice, below, chosen_by, places)


def _prose(docstring: str) -> str:
    return html.escape(" ".join(docstring.split()), quote=False).replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        choice = type(field.default)
        return f"`{tag_key(choice)}: {section_tag(choice)}`" if len(sections_in(field)) > 1 else "see there"
    return f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _type(field: FieldInfo) -> str:
    sections = sections_in(field)
    if len(sections) > 1:
        return f"section, by its `{tag_key(sections[0])}`"
    if sections:
        others = [choice for choice in get_args(field.annotation) if not sections_in(choice)]
        return " or ".join([*map(_type_name, others), "section"])
    return _type_name(field.annotation, field.metadata)


def _type_name(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type as a reader of YAML calls it, with its limits."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0], arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if arguments:
        return " or ".join(map(_type_name, arguments))
    return " ".join([PLAIN_TYPES[annotation], *_limits(metadata)])


def _limits(metadata: Iterable[Any]) -> Iterator[str]:
    for limit in metadata:
        if isinstance(limit, FieldInfo):
            yield from _limits(limit.metadata)
        for name, wording in LIMITS.items():
            value = getattr(limit, name, None)
            if value is not None and value != INT_LIMIT:
                yield f"{wording} {value:g}"


if __name__ == "__main__":
    print(reference(), end="")
