"""Checking a part of a configuration: the first thing that is wrong, in one line that names the file and the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mdnet_dist.config import Section
from mdnet_dist.errors import InputError, nearest

AnySection = TypeVar("AnySection", bound=Section)
COMMAND_LINE = ""
"""Where a key comes from that no file gives."""


def check_section(
    section: type[AnySection],
    values: Mapping[str, Any],
    source: str,
    origins: Mapping[str, str] | None = None,
    lines: Mapping[str, int] | None = None,
) -> AnySection:
    """Turn a nested mapping into a checked section.

    Args:
        section: what the file describes.
        values: as read from YAML.
        source: file name for messages.
        origins: {dotted key: the overlay's file name, or `COMMAND_LINE`} of what does not come from `source`, in the
            order in which it was applied; for messages.
        lines: {dotted key: its line in `source`} (`key_lines`), where messages are to name it.

    Raises:
        InputError: the first thing that is wrong, with its dotted key.
    """
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(_first_error(section, error, source, origins or {}, lines or {})) from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply") from None


def _first_error(
    section: type[Section], error: ValidationError, source: str, origins: Mapping[str, str], lines: Mapping[str, int]
) -> str:
    """One line for pydantic's first error; unknown keys come first, because a misspelt key causes others."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    holder, names = _locate(detail["loc"], section)
    kind = detail["type"]
    place = place_of(names, source, origins, lines, missing=kind == "missing")
    if kind == "extra_forbidden":
        return f"{place}: unknown key; {nearest(names[-1], holder.model_fields)}"
    if kind == "missing":
        return f"{place}: missing; {describe_field(holder, names[-1])}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        sections = sections_in(holder.model_fields[names[-1]])
        return f"{place}: {tag_key(sections[0])} must be one of {', '.join(map(section_tag, sections))}"
    if kind == "value_error":
        return f"{place}: {detail['msg'].removeprefix('Value error, ')}"
    # A field that may be one of several types has one message for each.
    wanted = dict.fromkeys(
        _wanted(other["type"], other["msg"]) for other in details if _locate(other["loc"], section)[1] == names
    )
    if names and (field := holder.model_fields.get(names[-1])) and _has_branches(field):
        wanted |= {f"a mapping with {tag_key(section)}: {section_tag(section)}": None for section in sections_in(field)}
    return f"{place}: must be {' or '.join(wanted)}, but it is {shown(detail['input'])}"


def place_of(
    names: Sequence[str],
    source: str,
    origins: Mapping[str, str],
    lines: Mapping[str, int] | None = None,
    *,
    missing: bool = False,
) -> str:
    """Where what is wrong was written: the file and the line, or the command line, and the dotted key.

    Args:
        names: the key's parts.
        source, origins, lines: as for `check_section`.
        missing: nothing was written there, so the section that lacks it has to do.
    """
    key = ".".join(names)
    for dotted, origin in reversed(list(origins.items())):
        if key == dotted or key.startswith(f"{dotted}."):
            return f"override '{cut(key)}'" if origin == COMMAND_LINE else f"{origin}: {cut(key)}"
    # What is missing, or contradicts itself, may be so because of all the files that speak of its section.
    section = ".".join(names[:-1] if missing else names)
    within = f"{section}." if section else ""
    files = [origin for dotted, origin in origins.items() if origin != COMMAND_LINE and dotted.startswith(within)]
    known = [".".join(names[:count]) for count in range(len(names), 0, -1)]
    line = next((lines[part] for part in known if part in lines), None) if lines else None
    place = " with ".join(dict.fromkeys([f"{source} line {line}" if line else source, *files]))
    return f"{place}: {cut(key)}" if key else place


def _wanted(kind: str, message: str) -> str:
    """What pydantic wanted, as it goes on behind "must be"."""
    if kind in ("model_type", "dict_type"):
        return "a mapping of keys to values"
    if kind == "invalid-json-value":
        return "made of numbers, strings, lists and mappings"
    return message.replace("Input should be ", "").replace("String should match pattern", "a string that matches")


def shown(value: Any) -> str:
    """A value as it stands in a message."""
    try:
        return cut(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, mappings nested as deep
        return f"a {type(value).__name__} too large to show"


def cut(text: str) -> str:
    """At most 100 characters of a text."""
    return text if len(text) <= 100 else f"{text[:97]}..."


def _locate(location: tuple[int | str, ...], root: type[Section]) -> tuple[type[Section], list[str]]:
    """The section that owns a pydantic error location, and the location as the user writes it: without union tags."""
    holder = root
    choices = [root]
    names: list[str] = []
    at_branch = False
    for step in location:
        if at_branch:  # pydantic names the branch of a union here, the user does not
            choices = [section for section in choices if section_tag(section) == step]
            at_branch = False
        elif choices:
            holder = choices[0]
            names.append(str(step))
            field = holder.model_fields.get(str(step))
            choices = sections_in(field) if field else []
            at_branch = field is not None and _has_branches(field)
        elif isinstance(step, int):
            names.append(str(step))
    return holder, names


def _has_branches(field: FieldInfo) -> bool:
    """Whether a field holds one of several sections, or a section or something else."""
    return bool(sections_in(field)) and len(get_args(field.annotation)) > 1


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field, or a type, can hold: one, several of which a tag chooses, or none."""
    annotation = getattr(annotation, "annotation", annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def tag_key(section: type[Section]) -> str:
    """The key whose value chooses this section among others."""
    return "form" if "form" in section.model_fields else "kind"


def section_tag(section: type[Section]) -> str:
    """The value of that key."""
    return str(get_args(section.model_fields[tag_key(section)].annotation)[0])


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found wrong in a file of ours, with its place there."""
    detail = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def describe_field(section: type[Section], name: str) -> str:
    """A field's docstring on one line."""
    return " ".join((section.model_fields[name].description or name).split())
