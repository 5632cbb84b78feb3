"""What a search's file is refused for before anything starts (`tune.search_config.load_search`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, get_origin

from mdnet_dist.config import RunConfig, Section
from mdnet_dist.config_check import sections_in
from mdnet_dist.errors import InputError, nearest
from tune.parameter import Path
from tune.population import BETA, ETA
from tune.records import Point, describe
from tune.search_sections import AshaScheduler, GridSearcher, OptunaSearcher, PbtScheduler, RandomSearcher

if TYPE_CHECKING:
    from tune.search_config import Search

FIXED = ("name", "runs_folder", "data.shards", "tracking", "train.seed")
"""Keys that may not be in a space: the search owns the first two and the seed, and scores must be comparable."""
LARGEST_GRID = 10_000


class Place(Protocol):
    """Says where a key stands."""

    def __call__(self, *names: str) -> str:
        """File, line and dotted key. Args: names: the key's parts."""


def check_search(search: Search, place: Place) -> None:
    """Try out everything that a search would do with its training configurations.

    Raises:
        InputError: the first thing that is wrong.
    """
    _check_keys(search.space.keys(), place)
    _check_searcher(search, place)
    if isinstance(search.config.scheduler, PbtScheduler):
        _check_population(search, search.config.scheduler, place)
    _check_points(search, place)


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Say where the file is wrong, before what is wrong."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _check_keys(keys: Sequence[str], place: Place) -> None:
    """Refuse keys that no training configuration has, that may not vary, and that are parts of others."""
    for key in keys:
        where = place("space", key)
        _check_known(key, where)
        for fixed in FIXED:
            if key == fixed or key.startswith(f"{fixed}."):
                raise InputError(f"{where}: may not be in the space; all trials have the same {fixed}")
        for other in keys:
            if key.startswith(f"{other}."):
                raise InputError(f"{where}: is a part of '{other}', which is in the space too; keep one of them")


def _check_known(key: str, where: str) -> None:
    sections: list[type[Section]] = [RunConfig]
    names = key.split(".")
    for count, name in enumerate(names):
        if not sections:
            raise InputError(f"{where}: unknown key; {'.'.join(names[:count])} is no section")
        fields = {known: field for section in sections for known, field in section.model_fields.items()}
        if name not in fields:
            raise InputError(f"{where}: unknown key; {nearest(name, fields)}")
        holders = [section.model_fields[name] for section in sections if name in section.model_fields]
        if any(get_origin(field.annotation) is dict for field in holders):  # it may hold anything
            return
        sections = [below for field in holders for below in sections_in(field)]


def _check_searcher(search: Search, place: Place) -> None:
    """Refuse a number of trials that is missing or too large, and a library that is not there."""
    searcher, count = search.config.searcher, search.config.trials.count
    if count is None and not isinstance(searcher, GridSearcher):
        raise InputError(f"{place('trials', 'count')}: missing; searcher {searcher.kind} wants a number of trials")
    if isinstance(searcher, GridSearcher):
        size = search.space.grid_size(searcher.points)
        if size > LARGEST_GRID:
            raise InputError(f"{place('space')}: the grid has {size:,} points; it may have {LARGEST_GRID:,}")
        if count is not None and count > size:
            raise InputError(
                f"{place('trials', 'count')}: {count} exceeds the {size} points of the grid; null takes all"
            )
    if isinstance(searcher, OptunaSearcher) and importlib.util.find_spec("optuna") is None:
        raise InputError(f"{place('searcher')}: Optuna is not installed; pip install '.[optuna]'")


def _check_population(search: Search, scheduler: PbtScheduler, place: Place) -> None:
    """Refuse what a population cannot search, or not in stretches."""
    if not isinstance(search.config.searcher, RandomSearcher):
        raise InputError(f"{place('searcher')}: scheduler pbt wants searcher random: its members start at random")
    if search.config.trials.count == 1:
        raise InputError(f"{place('trials', 'count')}: 1 is no population; scheduler pbt wants 2 members or more")
    parameters = search.space.parameters()
    for parameter in parameters.values():
        where = place("space", *map(str, parameter.path))
        if parameter.name not in (BETA, ETA):
            raise InputError(f"{where}: scheduler pbt searches {BETA} and {ETA} alone")
        kinds = ("uniform",) if parameter.name == BETA else ("uniform", "log_uniform")
        if parameter.kind not in kinds or parameter.step:
            raise InputError(f"{where}: scheduler pbt wants {' or '.join(kinds)} here, without a step")
    if BETA not in parameters:
        raise InputError(f"{place('space')}: scheduler pbt searches {BETA}; give it a uniform distribution")
    for config in (search.base, search.short_base):
        if config.blend.beta.kind != "constant":
            raise InputError(
                f"{place('base')}: blend.beta is {config.blend.beta.kind}; under scheduler pbt the base has a constant"
            )
    with placed(place("space")):
        search.population_settings()
    epochs, every = search.short_base.train.epochs, scheduler.every_epochs
    where = place("scheduler", "every_epochs")
    if epochs % every or epochs < 2 * every:
        raise InputError(f"{where}: {every} must divide the trials' train.epochs {epochs} into two stretches or more")
    if every % search.short_base.evaluate.every_epochs:
        raise InputError(
            f"{where}: the trials' evaluate.every_epochs {search.short_base.evaluate.every_epochs} must divide "
            f"{every}, so that each stretch ends with a score"
        )


def _check_points(search: Search, place: Place) -> None:
    """Refuse options and ends of ranges that make no training configuration, or one that this search cannot run."""
    if problem := _problem(search, {}):
        raise InputError(f"{place('scheduler')}: {problem}")
    for number, (parameter, value, point) in enumerate(search.space.probes()):
        if not (problem := _problem(search, search.space.values(point))):
            continue
        at, blamed = parameter.places[parameter.ends().index(value)], {parameter.name: value}
        if number == 0:
            at, blamed = _blame(search, point, problem)
        raise InputError(f"{place('space', *map(str, at))}: {describe(blamed)}: {problem}")


def _blame(search: Search, point: Point, problem: str) -> tuple[Path, Point]:
    """Of the first point, whose parameters are all new, those with which there is a problem, and where they stand."""
    parameters = search.space.parameters()
    for key, value in search.space.values(point).items():
        if _problem(search, {key: value}) == problem:
            own = {name: drawn for name, drawn in point.items() if parameters[name].path[0] == key}
            return (parameters[key].places[0] if len(own) == 1 else (key,)), own
    return (), point


def _problem(search: Search, values: Mapping[str, Any]) -> str:
    """Why trials cannot have these values, {dotted key: value}; empty where they can."""
    for short in (False, True):
        base = search.short_base if short else search.base
        try:
            config = search.laid_over(values, short=short, where=search.source)
        except InputError as error:
            return str(error).removeprefix(f"{search.source}: ")
        if _fixed(config) != _fixed(base):
            return f"changes one of {', '.join(FIXED)}, which all trials have the same"
    return _too_short(config, search.config.scheduler)


def _fixed(config: RunConfig) -> tuple[Any, ...]:
    return config.name, config.runs_folder, config.data.shards, config.tracking, config.train.seed


def _too_short(config: RunConfig, scheduler: Section) -> str:
    """Why a trial ends, or is scored, only after the first rung of the scheduler; empty where it is in time."""
    if not isinstance(scheduler, AshaScheduler):
        return ""
    grace, epochs, every = scheduler.grace_epochs, config.train.epochs, config.evaluate.every_epochs
    if grace > epochs:
        return f"scheduler.grace_epochs {grace} exceeds the trials' train.epochs {epochs}"
    return f"the trials' evaluate.every_epochs {every} exceeds scheduler.grace_epochs {grace}" if every > grace else ""
