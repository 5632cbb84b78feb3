"""Configurations as files: YAML, overlays and overrides, read into a checked `RunConfig` and written out again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from mdnet_dist.config import RunConfig, Section
from mdnet_dist.config_check import COMMAND_LINE, check_section, cut, section_tag, sections_in, shown, tag_key
from mdnet_dist.errors import InputError

MAX_CHARACTERS = 1 << 18
"""Longest configuration file that is read."""


class _Loader(yaml.SafeLoader):
    """Safe YAML without what a configuration does not need, and with one thing that it does.

    1e-3 is a number: YAML 1.1 wants 1.0e-3 and makes the other a string. A key given twice is an error: one of its
    values would be lost. So is an alias: with a few of them ten lines stand for billions of values.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise ConstructorError(problem=f"alias *{event.anchor}; write the value out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in given:
                    raise ConstructorError(problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark)
                given.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would take for a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, change it as overrides say, in their order, and check the result.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, the value written as in YAML; or the name of an overlay, a YAML file with a part
            of a configuration, which is laid over what came before (`merged`).

    Raises:
        InputError: no such file, not YAML, an unknown key, a wrong type or value, or a contradiction.
    """
    values = read_yaml(path)
    origins: dict[str, str] = {}
    for override in overrides:
        if is_overlay(override):
            over = read_yaml(override)
            values = merged(values, over)
            changed = dict.fromkeys(_leaves(over), override)
        else:
            apply_override(values, override)
            changed = {override.partition("=")[0]: COMMAND_LINE}
        origins = {key: origin for key, origin in origins.items() if key not in changed} | changed
    return check_config(values, str(path), origins)


def is_overlay(override: str) -> bool:
    """Whether an override names a YAML file rather than a key and its value."""
    return "=" not in override and override.endswith((".yaml", ".yml"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, loaded safely.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    values = parse_yaml(_read_text(path), str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a mapping of keys to values")
    return values


def key_lines(path: str | Path) -> dict[str, int]:
    """The line, from 1, in which each key and each item of a list begins in a YAML file, by dotted key.

    Raises:
        InputError: as `read_yaml`.
    """
    read_yaml(path)  # what can be composed below is no valid configuration yet
    root = yaml.compose(_read_text(path), _Loader)
    lines: dict[str, int] = {}
    below: list[tuple[str, yaml.Node | None]] = [("", root)]
    while below:
        prefix, node = below.pop()
        if isinstance(node, yaml.MappingNode):
            entries = [(str(key.value), key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            entries = [(str(number), item, item) for number, item in enumerate(node.value)]
        else:
            continue
        for name, start, value in entries:
            lines[f"{prefix}{name}"] = start.start_mark.line + 1
            below.append((f"{prefix}{name}.", value))
    return lines


def _read_text(path: str | Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a YAML file such as launch/configs/demo.yaml") from error
    except ValueError as error:  # not UTF-8, or a NUL in the path
        raise InputError(f"{path}: not a YAML file: {error}") from error
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{path}: longer than {MAX_CHARACTERS:,} characters; a configuration is a page or two")
    return text


def parse_yaml(text: str, where: str) -> Any:
    """What is written in YAML, loaded safely.

    Raises:
        InputError: not YAML, beginning with `where`.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}: not valid YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where}: not valid YAML: {error}") from error
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def apply_override(values: dict[str, Any], override: str, section: type[Section] = RunConfig) -> None:
    """Set one `dotted.key=value` in a nested mapping, in place; a mapping is merged into the one that is there.

    Args:
        section: what `values` are, for `merged`.

    Raises:
        InputError: no equals sign, a value that is not YAML, or a key below something that is not a mapping.
    """
    key, equals, text = override.partition("=")
    where = f"override '{cut(override)}'"
    if not equals or not key:
        raise InputError(f"{where}: must be dotted.key=value, as train.epochs=3, or a YAML file")
    over = parse_yaml(text, where)
    *above, last = key.split(".")
    below: Any = values
    for name in above:
        below = below.get(name, {})
        if not isinstance(below, dict):
            raise InputError(f"{where}: '{name}' is {shown(below)}, not a mapping")
    for name in reversed([*above, last]):
        over = {name: over}
    try:
        values.update(merged(values, over, section))
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def merged(
    below: Mapping[str, Any], over: Mapping[str, Any], section: type[Section] | None = RunConfig
) -> dict[str, Any]:
    """One part of a configuration laid over another: mappings are merged key by key, all else is replaced.

    Where a tag (`kind`, `form`) chooses among sections and `over` gives another than the one below, its mapping
    replaces the one below whole: the keys of one kind mean nothing, or something else, in another.

    Args:
        section: what both are a part of; None where the configuration does not say what keys there are.
    """
    result = dict(below)
    for key, value in over.items():
        known = result.get(key)
        result[key] = value
        if not isinstance(value, dict) or not isinstance(known, dict):
            continue
        field = section.model_fields.get(key) if section else None
        choices = sections_in(field) if field else []
        if field and len(choices) > 1:
            name = tag_key(choices[0])
            tag = known.get(name, getattr(field.default, name))
            if value.get(name, tag) != tag:
                continue
            choices = [choice for choice in choices if section_tag(choice) == tag]
        result[key] = merged(known, value, choices[0] if choices else None)
    return result


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a nested mapping's values that are not mappings."""
    leaves = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        leaves += _leaves(value, f"{key}.") if isinstance(value, dict) else [key]
    return leaves


def check_config(values: Mapping[str, Any], source: str, origins: Mapping[str, str] | None = None) -> RunConfig:
    """Turn a nested mapping into a checked configuration: `check_section` for a whole run."""
    return check_section(RunConfig, values, source, origins)


def as_yaml(config: Section) -> str:
    """The resolved configuration, every default written out; `load_config` reads it back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flatten(config: Section) -> dict[str, Any]:
    """`{"train.epochs": 3, ...}`: one entry a leaf, lists whole."""

    def leaves(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in values.items():
            key = f"{prefix}{name}"
            flat.update(leaves(f"{key}.", value) if isinstance(value, dict) and value else {key: value})
        return flat

    return leaves("", config.model_dump(mode="json"))
