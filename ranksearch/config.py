"""Reading a space file: YAML with ``--set`` changes, into a validated :class:`~ranksearch.space.Space`.

All the problems of a file are reported at once, each with its address, the rule, the value and the remedy.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ranksearch.errors import Problem, SpaceError
from ranksearch.secrecy import VARIABLE, has_password, looks_secret, redacted
from ranksearch.space import Space

_FILLED_LATE = ("$.tracking.uri",)
"""Where variables are filled in by the one that connects: the study keeps the name."""
_FILLED = ("$.tracking.uri", "$.model.options.", "$.data.options.", "$.job.environment.")
"""Where a variable that is kept by its name is filled in when it is used; anywhere else the name would be the value."""

_UNREADABLE = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What PyYAML raises; values that contradict their tag (``!!int x``, ``!!timestamp x``) give Python's own errors."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key given twice and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


Check = Callable[[Space], Sequence[Problem]]
"""Finds what is wrong beyond types and ranges; of a faulty file it sees the sound parts, with defaults for the rest."""


def _nothing_more(space: Space) -> Sequence[Problem]:
    return ()


def load_space(
    path: str | Path,
    settings: Sequence[str] = (),
    check: Check = _nothing_more,
    *,
    variables: Mapping[str, str] | None = None,
) -> Space:
    """The space in the YAML file ``path``, after ``settings`` of the form ``dotted.key=value``.

    Args:
        path: of the file.
        settings: in this order.
        check: finds what is wrong beyond types and ranges.
        variables: what ``${NAME}`` stands for; the environment by default.

    Raises:
        SpaceError: naming every problem of the file and the settings, those that ``check`` finds among them.
    """
    data = read_document(path, settings)
    named = {
        "name": Path(path).stem,
        **{key: value for key, value in data.items() if value is not None or key != "name"},
    }
    return parse_space(named, str(path), check, variables=variables)


def read_document(path: str | Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file after ``settings``, nothing of it checked, no variable filled in.

    Raises:
        SpaceError: it is no mapping in YAML, or a setting is none.
    """
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _problem(
            source, "$", "a space file must be readable UTF-8 text", str(error), "Check the path."
        ) from error
    data = _parse(source, text)
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise _problem(source, "$", "a space file must be a mapping", kind, "Start with `model:`; see search_spaces/.")
    for setting in settings:
        _apply(source, data, setting)
    return data


def parse_space(
    data: dict[str, Any],
    source: str = "space",
    check: Check = _nothing_more,
    *,
    variables: Mapping[str, str] | None = None,
) -> Space:
    """The space in a mapping of JSON types; raises :class:`SpaceError` naming every problem, ``check``'s too.

    ``${NAME}`` stands for the environment variable of that name, or that of ``variables``. Secret ones (by their name,
    by ``job.secrets``, or for a password in a URL), and those of ``tracking.uri``, must be set but stay as they are:
    whoever uses them fills them in.
    """
    problems: list[Problem] = []
    found = os.environ if variables is None else variables
    secret = {name for name, value in found.items() if looks_secret(name) or has_password(value)} | _declared(data)
    try:
        expanded = _expand(data, "$", problems, found, secret)
    except RecursionError as error:
        rule, remedy = "a section must not hold itself, nor be too deep", "Write the anchor's content out."
        raise _problem(source, "$", rule, "", remedy) from error
    space: Space | None
    try:
        space = Space.model_validate(expanded)
    except ValidationError as error:
        # Defaults that go by another key wait until all others are right: they are not wrong themselves.
        wrong = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
        problems += [_explain(detail) for detail in wrong]
        space = _sound_part(expanded, wrong)
    if space is not None:
        problems += check(space)
    if problems or space is None:
        raise SpaceError(source, problems)
    return space


def recorded_space(data: dict[str, Any]) -> Space:
    """The space that a study recorded: no variable is filled in, so the study can be read where they are not set.

    Raises:
        ValueError: it is none.
    """
    if "price_points" not in data.get("strategy", {}):  # recorded before there was a choice: all were measured
        data = {**data, "strategy": {**data.get("strategy", {}), "price_points": None}}
    evaluation = data.get("evaluation", {})
    tune = evaluation.get("fine_tune", {})
    if "learning_rate" in tune and tune["learning_rate"] is None:  # recorded before defaults were
        tune = {**tune, "learning_rate": {"adam": 3e-4, "sgd": 1e-2}[tune["optimiser"]]}
        data = {**data, "evaluation": {**evaluation, "fine_tune": tune}}
    return Space.model_validate(data)


def literal_passwords(space: Space) -> list[Problem]:
    """Passwords that stand in a space, which the study would keep."""
    problems = []
    uri = space.tracking.uri
    if uri is not None and has_password(uri):
        problems.append(
            Problem(
                address="$.tracking.uri",
                rule="a password must not stand in a space, which the study keeps",
                value=redacted(uri),
                remedy="Write ${MLFLOW_PASSWORD} in its place and set that variable.",
            )
        )
    for name, value in space.job.environment.items():
        if has_password(value) or (looks_secret(name) and VARIABLE.sub("", value)):
            problems.append(
                Problem(
                    address=f"$.job.environment.{name}",
                    rule="a secret must not stand in a space, which the study keeps",
                    value="one",
                    remedy=f"Set {name} where you submit, and name it in job.secrets.",
                )
            )
    return problems


def _sound_part(data: dict[str, Any], wrong: Sequence[ErrorDetails]) -> Space | None:
    """The space without the keys that are wrong, which are removed from ``data``; None if it is wrong as a whole."""
    for detail in wrong:
        _remove(data, detail["loc"])
    data.setdefault("model", {"name": "unknown"})  # the one key without a default
    try:
        return Space.model_validate(data)
    except ValidationError:
        return None


def _remove(data: dict[str, Any], location: tuple[int | str, ...]) -> None:
    """Remove the innermost key on the way to ``location`` that is there."""
    section: Any = data
    found: tuple[dict[Any, Any], Any] | None = None
    for part in location:
        if not isinstance(section, dict) or part not in section:
            break
        found, section = (section, part), section[part]
    if found is not None:
        del found[0][found[1]]


def json_schema() -> dict[str, Any]:
    """JSON Schema of a space file, for editors."""
    return Space.model_json_schema()


def _parse(source: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except _UNREADABLE as error:
        raise _problem(source, "$", "a space file must be valid YAML", str(error), "Correct the line named.") from error


def _problem(source: str, address: str, rule: str, value: str, remedy: str) -> SpaceError:
    return SpaceError(source, [Problem(address=address, rule=rule, value=value, remedy=remedy)])


def _apply(source: str, data: dict[str, Any], setting: str) -> None:
    """Write one ``dotted.key=value`` into ``data``; the value is read as YAML."""
    key, equals, text = setting.partition("=")
    remedy = "Write --set section.key=value, e.g. --set budget.trials=40."
    if not equals or not all(key.split(".")):
        raise _problem(source, "--set", "a setting must be dotted.key=value", repr(setting), remedy)
    *parents, last = key.split(".")
    place = data
    for parent in parents:
        below = place.setdefault(parent, {})
        if below is None:
            below = place[parent] = {}
        if not isinstance(below, dict):
            raise _problem(source, f"--set {key}", f"`{parent}` must be a section", repr(below), remedy)
        place = below
    place[last] = _parse(f"--set {setting}", text)


def _declared(data: Mapping[str, Any]) -> set[str]:
    """The names in ``job.secrets``, of data that is not checked yet."""
    job = data.get("job")
    names = job.get("secrets") if isinstance(job, dict) else None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _expand(
    value: Any, address: str, problems: list[Problem], variables: Mapping[str, str], secret: Collection[str]
) -> Any:
    """``value`` with every ``${NAME}`` replaced by that variable, but for those that are filled in late."""
    if isinstance(value, dict):
        return {key: _expand(below, f"{address}.{key}", problems, variables, secret) for key, below in value.items()}
    if isinstance(value, list):
        return [_expand(below, f"{address}[{i}]", problems, variables, secret) for i, below in enumerate(value)]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in variables:
            setting = address.removeprefix("$.")
            problems.append(
                Problem(
                    address=address,
                    rule="an environment variable must be set before it is used",
                    value=match[0],
                    remedy=f"Set {match[1]}, or give --set {setting}=...",
                )
            )
        if match[1] in secret and match[1] in variables and not address.startswith(_FILLED):
            problems.append(
                Problem(
                    address=address,
                    rule="a secret variable must stand where it is filled in late: options of factories, tracking.uri "
                    "or job.environment",
                    value=match[0],
                    remedy="Give the variable a name without a word such as TOKEN or PASSWORD if it holds no secret.",
                )
            )
        if address in _FILLED_LATE or match[1] in secret:
            return match[0]
        return variables.get(match[1], match[0])

    return VARIABLE.sub(variable, value)


def _explain(detail: ErrorDetails) -> Problem:
    """One of pydantic's errors, with our remedy."""
    address = "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])
    value = "" if isinstance(detail["input"], dict | list) else _shown(detail["input"])
    rule = detail["msg"].removeprefix("Value error, ")
    remedy = "Correct the value; `ranksearch schema` describes every key."
    if detail["type"] == "extra_forbidden":
        known = _keys_at(detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        rule, value = "unknown key", _shown(detail["loc"][-1])
        remedy = f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(known)}."
    elif detail["type"] == "missing":
        rule, value, remedy = "this key must be given", "", "Add it."
    return Problem(address=address, rule=rule, value=value, remedy=remedy)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a very large number"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys known in the section at ``location``."""
    section: type[BaseModel] = Space
    for part in location:
        field = section.model_fields.get(str(part))
        section = (_section_in(field.annotation) if field else None) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section within a field's type, such as that of the values of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
