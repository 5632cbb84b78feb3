"""The space of a search: which configuration keys vary, and over what.

    space = Space.parse({"blend.beta": {"choice": [
        {"kind": "constant", "value": {"uniform": [0.05, 0.95]}},
        {"kind": "linear", "start": {"uniform": [0, 1]}, "end": {"uniform": [0, 1]}},
    ]}}, "search.yaml")
    point = space.draw(RandomChooser(numpy.random.default_rng(0)))
    space.values(point)     # {"blend.beta": {"kind": "linear", "start": 0.64, "end": 0.27}}

A distribution is a mapping with one of the keys choice, uniform, log_uniform and integers. Wherever one stands there is
a parameter, called by the key, the label of the option that it is in and its place there: here `blend.beta`,
`blend.beta.constant.value`, `blend.beta.linear.start` and `blend.beta.linear.end`. A point holds the parameters that
the chosen options have, and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mdnet_dist.errors import InputError, nearest
from tune.parameter import Chooser, Parameter, RandomChooser
from tune.records import Point, Scalar, shown
from tune.space_syntax import Hole, SpaceError, read_space

__all__ = ["Chooser", "Parameter", "RandomChooser", "Space", "SpaceError"]


class Space:
    """Parameters, and the configuration values that they make."""

    def __init__(self, parameters: Mapping[str, Parameter], templates: Mapping[str, Any]) -> None:
        """Use `Space.parse`. Args: templates: {dotted key: its value, with holes}."""
        self._parameters = dict(parameters)
        self._templates = dict(templates)

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Space:
        """Read a space.

        Args:
            values: {dotted key of a run's configuration: a distribution}, as read from YAML.
            where: what it was read from, for messages.

        Raises:
            SpaceError: what is wrong, and where. Whether a run's configuration has such keys is not looked at.
        """
        return cls(*read_space(values, where))

    def parameters(self) -> dict[str, Parameter]:
        """All parameters by name, each behind the choice that it depends on."""
        return dict(self._parameters)

    def keys(self) -> list[str]:
        """The configuration's dotted keys that vary."""
        return list(self._templates)

    def draw(self, chooser: Chooser) -> Point:
        """A point, its parameters asked for one after another, and only those that the labels so far call for."""
        point: Point = {}
        for parameter in self._parameters.values():
            if _exists(parameter, point):
                point[parameter.name] = parameter.choose(chooser)
        return point

    def values(self, point: Mapping[str, Scalar]) -> dict[str, Any]:
        """{dotted key: its value} of a point.

        Raises:
            InputError: the point is not of this space, and which parameter shows it.
        """
        for name, value in point.items():
            if name not in self._parameters:
                raise InputError(f"parameter '{name}' is not in the space; {nearest(name, self._parameters)}")
            parameter = self._parameters[name]
            if not _exists(parameter, point):
                raise InputError(f"parameter '{name}' exists only with {_condition(parameter)}")
            if problem := parameter.problem(value):
                raise InputError(f"parameter '{name}' is {shown(value)}; it {problem}")
        for name, parameter in self._parameters.items():
            if name not in point and _exists(parameter, point):
                raise InputError(f"parameter '{name}' has no value; it {parameter.problem(_Absent)}")
        return {key: _filled(template, point) for key, template in self._templates.items()}

    def probes(self) -> Iterator[tuple[Parameter, Scalar, Point]]:
        """For each label of each choice and both ends of each range a point with it; in all else, and in the choices
        that it depends on as far as they are free, a point has the first labels and the lower ends."""
        for parameter in self._parameters.values():
            for value in parameter.ends():
                forced = {parameter.name: value}
                above = parameter.parent
                while above:
                    forced[above[0]] = above[1]
                    above = self._parameters[above[0]].parent
                yield parameter, value, self.draw(_Forced(forced))

    def grid_size(self, points: int) -> int:
        """How many points `grid` has, without making them."""
        return self._size_below(None, points)

    def _size_below(self, parent: tuple[str, Scalar] | None, points: int) -> int:
        size = 1
        for parameter in self._parameters.values():
            if parameter.parent != parent:
                continue
            if parameter.kind == "choice":
                size *= sum(self._size_below((parameter.name, label), points) for label in parameter.labels)
            else:
                size *= parameter.count(points)
        return size

    def grid(self, points: int) -> list[Point]:
        """All combinations, the last parameter changing first; parameters of an option only where it is chosen.

        Args:
            points: how many values, at least 2, stand for a range without a step.
        """
        if points < 2:
            raise ValueError(f"{points} points: both ends of a range are two")
        found: list[Point] = [{}]
        for parameter in self._parameters.values():
            values = parameter.grid(points)
            found = [
                longer
                for point in found
                for longer in (
                    [{**point, parameter.name: value} for value in values] if _exists(parameter, point) else [point]
                )
            ]
        return found


_Absent: Any = object()


class _Forced:
    """Chooses what it is told, else the first label or the lower end."""

    def __init__(self, forced: Mapping[str, Any]) -> None:
        self.forced = forced

    def category(self, name: str, labels: Sequence[Scalar]) -> Scalar:
        return self.forced.get(name, labels[0])

    def real(self, name: str, low: float, high: float, log: bool, step: float | None) -> float:
        return self.forced.get(name, low)

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return self.forced.get(name, low)


def _exists(parameter: Parameter, point: Mapping[str, Scalar]) -> bool:
    return parameter.parent is None or (
        parameter.parent[0] in point and point[parameter.parent[0]] == parameter.parent[1]
    )


def _condition(parameter: Parameter) -> str:
    assert parameter.parent is not None
    return f"{parameter.parent[0]} {parameter.parent[1]}"


def _filled(template: Any, point: Mapping[str, Scalar]) -> Any:
    """A template with its holes filled."""
    if isinstance(template, Hole):
        value = point[template.name]
        return next((_filled(option, point) for label, option in template.options if label == value), value)
    if isinstance(template, dict):
        return {key: _filled(value, point) for key, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, point) for value in template]
    return template
