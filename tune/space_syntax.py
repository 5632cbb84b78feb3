"""How a space is written in YAML, made into parameters and templates (`tune.space` shows one).

A template is a value of a run's configuration with a `Hole` wherever a distribution stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from mdnet_dist.errors import InputError, nearest
from tune.parameter import KINDS, Kind, Parameter, Path, divides
from tune.records import Scalar

STEP = "step"


class SpaceError(InputError):
    """A space that is written wrongly."""

    def __init__(self, where: str, path: Path, problem: str) -> None:
        """Args: path: keys and positions, below the space, of what is wrong."""
        super().__init__(": ".join(filter(None, (where, ".".join(map(str, path)), problem))))
        self.path = path
        self.problem = problem


@dataclass(frozen=True)
class Hole:
    """Stands in a template for the value of a parameter."""

    name: str
    options: tuple[tuple[Scalar, Any], ...] = ()  # of a choice: labels and the templates that they stand for


def read_space(values: Mapping[str, Any], where: str) -> tuple[dict[str, Parameter], dict[str, Any]]:
    """All parameters by name, each behind the choice that it depends on, and {dotted key: its template}.

    Raises:
        SpaceError: as `tune.space.Space.parse` says.
    """
    if not values:
        raise SpaceError(where, (), f"holds nothing; give {{key: distribution}}, {_FORMS}")
    parser = _Parser(where)
    templates = {}
    for key, value in values.items():
        path: Path = (str(key),)
        if _distribution_kind(value) is None:
            parser.refuse_near_miss(value, path)
            advice = "a constant is put under overrides"
            if isinstance(value, dict) and value:
                advice = f"keys below it are written with dots, as {key}.{next(iter(value))}"
            raise SpaceError(where, path, f"must be a distribution, {_FORMS}; {advice}")
        templates[str(key)] = parser.node(value, str(key), path, None)
    return parser.parameters, templates


_FORMS = "such as {choice: [...]}, {uniform: [low, high]}, {log_uniform: [low, high]} or {integers: [low, high]}"
_LABELLED = "write choice as a mapping, {label: option, ...}"
_MOST_STEPS = 1_000_000  # of reals: with more of them, floating point could not tell whether they fill the range
_NEAR = 0.75  # as alike as this, a key is a misspelt distribution; `form` and `uniform` are less so


def _distribution_kind(value: Any) -> Kind | None:
    return next((kind for kind in KINDS if kind in value), None) if isinstance(value, dict) else None


class _Parser:
    """Makes templates, and collects the parameters that they have."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.parameters: dict[str, Parameter] = {}

    def node(self, value: Any, name: str, path: Path, parent: tuple[str, Scalar] | None) -> Any:
        """The template of a value: a distribution, or something plain with distributions in it."""
        if kind := _distribution_kind(value):
            return self._distribution(kind, value, name, path, parent)
        if isinstance(value, dict):
            self.refuse_near_miss(value, path)
            return {key: self.node(below, f"{name}.{key}", (*path, str(key)), parent) for key, below in value.items()}
        if isinstance(value, list):
            return [self.node(below, f"{name}.{number}", (*path, number), parent) for number, below in enumerate(value)]
        self._scalar(value, path)
        return value

    def refuse_near_miss(self, value: Any, path: Path) -> None:
        """Refuse a mapping that was meant to be a distribution, as {unifrom: [0, 1]}."""
        names = [str(key) for key in value if key != STEP] if isinstance(value, dict) else []
        if len(names) == 1 and get_close_matches(names[0], KINDS, n=1, cutoff=_NEAR):
            self._refuse((*path, names[0]), f"unknown distribution; {nearest(names[0], KINDS)}")

    def _distribution(
        self, kind: Kind, value: dict[Any, Any], name: str, path: Path, parent: tuple[str, Scalar] | None
    ) -> Hole:
        given = [other for other in KINDS if other in value]
        if len(given) > 1:
            self._refuse(path, f"has {' and '.join(given)}; give one of them")
        allowed = (kind, STEP) if kind in ("uniform", "integers") else (kind,)
        for key in value:
            if key not in allowed:
                self._refuse((*path, str(key)), f"unknown key of a {kind} distribution; {nearest(str(key), allowed)}")
        if name in self.parameters:
            self._refuse(path, f"parameter '{name}' is there twice; call the option differently")
        below = (*path, kind)
        if kind != "choice":
            low, high = self._bounds(kind, value[kind], below)
            step = self._step(kind, low, high, value[STEP], (*path, STEP)) if STEP in value else None
            ends = ((*below, 0), (*below, 1))
            self.parameters[name] = Parameter(
                name=name, kind=kind, path=path, places=ends, low=low, high=high, step=step, parent=parent
            )
            return Hole(name)
        options = self._options(value[kind], below)
        labels, _, places = zip(*options)
        self.parameters[name] = Parameter(name=name, kind=kind, path=path, places=places, labels=labels, parent=parent)
        return Hole(
            name,
            tuple((label, self.node(option, f"{name}.{label}", at, (name, label))) for label, option, at in options),
        )

    def _options(self, options: Any, path: Path) -> list[tuple[Scalar, Any, Path]]:
        """Labels, options and where these stand."""
        if not isinstance(options, dict | list) or not options:
            self._refuse(path, "must be a list of options, or a mapping of labels to options, and not empty")
        if isinstance(options, dict):
            for label in options:
                if not isinstance(label, str):
                    self._refuse((*path, str(label)), f"label {label!r} must be a string; put it in quotes")
            return [(label, option, (*path, label)) for label, option in options.items()]
        found: list[tuple[Scalar, Any, Path]] = []
        for number, option in enumerate(options):
            at = (*path, number)
            label = self._label(option, at)
            # 1, 1.0, "1" and true are not the same, but no reader of a table could tell.
            if any(label == other or str(label) == str(other) for other, _, _ in found):
                self._refuse(at, f"label '{label}' is given twice; {_LABELLED}")
            found.append((label, option, at))
        return found

    def _label(self, option: Any, path: Path) -> Scalar:
        """What an option of a list is called."""
        if not isinstance(option, dict | list):
            self._scalar(option, path)
            return option
        tag = next((option[key] for key in ("kind", "form") if key in option), None) if isinstance(option, dict) else ""
        if not isinstance(tag, str) or not tag:
            self._refuse(path, f"has no kind or form to be called by; {_LABELLED}")
        return tag

    def _scalar(self, value: Any, path: Path) -> None:
        if not isinstance(value, str | int | float | bool | None):
            self._refuse(path, f"must be a number, a string, true, false or null, but it is a {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(path, f"must be finite, but it is {value}")

    def _bounds(self, kind: Kind, bounds: Any, path: Path) -> tuple[float, float]:
        number = "whole numbers" if kind == "integers" else "numbers"
        if not isinstance(bounds, list) or len(bounds) != 2 or not all(_is_number(bound, kind) for bound in bounds):
            self._refuse(path, f"must be two {number}, [low, high], but it is {bounds!r:.60}")
        low, high = bounds if kind == "integers" else map(float, bounds)
        if not low < high:
            self._refuse(path, f"low {low:g} must be less than high {high:g}")
        if not math.isfinite(high - low):
            self._refuse(path, f"{low:g} and {high:g} are too far apart")
        if kind == "log_uniform" and low <= 0:
            self._refuse(path, f"low {low:g} must be above 0, because the logarithm is drawn")
        return low, high

    def _step(self, kind: Kind, low: float, high: float, step: Any, path: Path) -> float:
        if not _is_number(step, kind) or step <= 0:
            number = "a whole number" if kind == "integers" else "a number"
            self._refuse(path, f"must be {number} above 0, but it is {step!r:.60}")
        if kind != "integers" and step * _MOST_STEPS < high - low:
            self._refuse(path, f"{step:g} divides the range of {low:g} to {high:g} into over {_MOST_STEPS:,} steps")
        if step > high - low or not divides(step, high - low):
            self._refuse(path, f"{step:g} does not divide the range of {low:g} to {high:g}")
        return step if kind == "integers" else float(step)

    def _refuse(self, path: Path, problem: str) -> Any:
        raise SpaceError(self.where, path, problem)


def _is_number(value: Any, kind: Kind) -> bool:
    """Whether it is a finite number of that kind, and a float can hold it."""
    if isinstance(value, bool) or not isinstance(value, int if kind == "integers" else (int, float)):
        return False
    return abs(value) < 2**53 if isinstance(value, int) else math.isfinite(value)
