"""A search as its file describes it, checked as a whole before anything starts.

    search = load_search("tune/beta.yaml", ["trials.count=4", "data.shards=DIR"])
    search.run_config(search.space.draw(chooser), short=True)     # what a trial trains

Whatever a trial could draw alone is tried out on the training configuration while the file is read: a search does not
fail after hours because a range reaches too far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdnet_dist.config import RunConfig
from mdnet_dist.config_check import COMMAND_LINE, check_section, place_of
from mdnet_dist.config_file import (
    apply_override,
    as_yaml,
    check_config,
    is_overlay,
    key_lines,
    load_config,
    merged,
    parse_yaml,
    read_yaml,
)
from mdnet_dist.errors import InputError, nearest
from mdnet_dist.mlflow_store import tracking_uri
from mdnet_dist.storage import absolute
from tune.population import BETA, ETA, Settings
from tune.records import Point, describe
from tune.search_checks import Place, check_search, placed
from tune.search_sections import AshaScheduler, GridSearcher, OptunaSearcher, PbtScheduler, RandomSearcher, SearchConfig
from tune.space import Space, SpaceError

__all__ = [
    "AshaScheduler",
    "GridSearcher",
    "OptunaSearcher",
    "PbtScheduler",
    "RandomSearcher",
    "Search",
    "SearchConfig",
    "load_search",
]


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search that was read and checked."""

    config: SearchConfig
    space: Space
    source: str  # the file
    folder: Path  # where everything of the search lies; absolute
    base: RunConfig  # the base with the search's overrides, paths absolute
    short_base: RunConfig  # and with those of trials

    def as_yaml(self) -> str:
        """The resolved file, every default and every override written out."""
        return as_yaml(self.config)

    def run_config(self, point: Point, *, short: bool) -> RunConfig:
        """The training configuration of a point; paths in it are absolute, because Ray's workers stand elsewhere.

        Args:
            short: with the overrides of trials.

        Raises:
            InputError: the point is not of this space, or makes no valid configuration.
        """
        try:
            values = self.space.values(point)
        except InputError as error:
            raise InputError(f"{self.source}: {error}; was the space changed?") from error
        return self.laid_over(values, short=short, where=f"{self.source}: {describe(point)}")

    def laid_over(self, values: Mapping[str, Any], *, short: bool, where: str) -> RunConfig:
        """The same of `Space.values`, {dotted key: value}. Args: where: what messages begin with."""
        return _laid_over(self.short_base if short else self.base, values, where)

    def population_settings(self) -> Settings:
        """What `tune.population` wants to know of a search with scheduler pbt.

        Raises:
            InputError: bounds that make no population.
        """
        scheduler, parameters = self.config.scheduler, self.space.parameters()
        assert isinstance(scheduler, PbtScheduler)
        beta, eta = parameters[BETA], parameters.get(ETA)
        return Settings(
            beta=(beta.low, beta.high),
            eta=(eta.low, eta.high) if eta else None,
            eta_log=eta is None or eta.kind == "log_uniform",
            copied_share=scheduler.copied_share,
            resampled_share=scheduler.resampled_share,
            step=scheduler.step,
            seed=self.config.seed,
        )


def load_search(path: str | Path, overrides: Sequence[str] = ()) -> Search:
    """Read a search.

    Args:
        path: the YAML file.
        overrides: `key=value` sets a key of the file where it has such a key (`trials.count=4`, or
            `space.blend.eta='{uniform: [1, 2]}'`, which replaces or adds that distribution); any other, and overlays,
            are appended to the file's `overrides`.

    Raises:
        InputError: what is wrong, with file, line and key.
    """
    source = str(path)
    values = read_yaml(path)
    lines = key_lines(path)
    origins: dict[str, str] = {}
    for_runs = [override for override in overrides if not _set_here(values, override, origins)]
    config = check_section(SearchConfig, values, source, origins, lines)

    def place(*names: str) -> str:
        return place_of(names, source, origins, lines)

    base = _load_base(config.base, config.overrides, for_runs, place)
    config = config.model_copy(update={"overrides": [*config.overrides, *for_runs]})
    with placed(place("trials", "overrides")):
        short_base = _load_absolute(config.base, [*config.overrides, *config.trials.overrides])
    try:
        space = Space.parse(config.space, "")
    except SpaceError as error:
        raise InputError(f"{place('space', *map(str, error.path))}: {error.problem}") from error
    folder = (Path(config.runs_folder) / config.name).absolute()
    search = Search(config=config, space=space, source=source, folder=folder, base=base, short_base=short_base)
    check_search(search, place)
    return search


# -------------------------------------------------------------------------------------------------- laying things over


def _set_here(values: dict[str, Any], override: str, origins: dict[str, str]) -> bool:
    """Apply an override to the search's own values; False where it is one of the training configuration."""
    key = override.partition("=")[0]
    first, _, below = key.partition(".")
    if is_overlay(override):
        return False
    if first not in SearchConfig.model_fields:
        if first not in RunConfig.model_fields:
            known = {*SearchConfig.model_fields, *RunConfig.model_fields}
            raise InputError(f"override '{key}': unknown key; {nearest(first, known)}")
        return False
    if first == "space" and "=" in override:
        # Keys of the space have dots themselves, and half of one distribution means nothing in another.
        given, space = parse_yaml(override.partition("=")[2], f"override '{key}'"), values.get("space")
        values["space"] = {**(space if isinstance(space, dict) else {}), below: given} if below else given
    else:
        apply_override(values, override, SearchConfig)
    origins[key] = COMMAND_LINE
    return True


def _load_base(base: str, overrides: Sequence[str], more: Sequence[str], place: Place) -> RunConfig:
    """The training configuration; what is wrong is told where it was written.

    Args:
        overrides: those of the file.
        more: those of the command line.
    """
    try:
        return _load_absolute(base, [*overrides, *more])
    except InputError as error:
        problem = error
    for key, given in (("base", ()), ("overrides", overrides)):
        try:
            _load_absolute(base, given)
        except InputError as error:
            if str(error) == str(problem):
                raise InputError(f"{place(key)}: {problem}") from None
    raise problem


def _load_absolute(base: str, overrides: Sequence[str]) -> RunConfig:
    return _laid_over(load_config(base, overrides), {}, base)


def _laid_over(config: RunConfig, values: Mapping[str, Any], source: str) -> RunConfig:
    """A configuration with values, {dotted key: value}, laid over it, and its paths absolute."""
    over: dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".")
        below = over
        for name in above:
            below = below.setdefault(name, {})
        below[last] = value
    nested = merged(config.model_dump(mode="json"), over)
    checked = check_config(nested, source)
    result = checked.model_dump(mode="json")
    result["data"]["shards"] = absolute(checked.data.shards)
    if pretrained := result["model"]["image"].get("pretrained"):
        result["model"]["image"]["pretrained"] = str(Path(pretrained).absolute())
    if checked.tracking.uri is not None:
        result["tracking"]["uri"] = tracking_uri(checked.tracking)
    return check_config(result, source)
