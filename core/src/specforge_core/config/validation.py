# SPDX-License-Identifier: Apache-2.0
"""Pydantic's errors as a person wants to read them: where, what, and the key that was probably meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError

from specforge_core.config.document import Keys
from specforge_core.contracts.redaction import HIDDEN, hide_secrets, is_secret_name, show_value
from specforge_core.hooks.discovery import suggest
from specforge_core.hooks.sections import Section

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SectionT = TypeVar("SectionT", bound=Section)


def validate_section(
    model: type[SectionT], values: Any, *, locate: Callable[[Keys], str], keys: Keys = ()
) -> tuple[SectionT | None, list[tuple[str, str]]]:
    """Check a section.

    :param locate: says where in the user's file keys stand.
    :param keys: where the section itself stands.
    :returns: the section and no problems, or None and (where, what) of every problem.
    """
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    return None, [_problem(detail, model, locate((*keys, *_file_keys(detail, values)))) for detail in details]


def _problem(detail: ErrorDetails, model: type[BaseModel], where: str) -> tuple[str, str]:
    """Where and what; the value of a secret stands in neither."""
    secret = _is_secret(detail["loc"], model)
    if secret and isinstance(detail["input"], str) and detail["input"]:
        where = where.replace(detail["input"], HIDDEN)
    return where, _describe(detail, model, shown=HIDDEN if secret else show_value(detail["input"]))


def _is_secret(location: tuple[int | str, ...], model: type[BaseModel]) -> bool:
    """A setting is one by its name, or as its section declares it (``repr=False``, ``SecretStr``)."""
    section = _section_at(location[:-1], model)
    last = str(location[-1]) if location else ""
    declared = section.model_fields.get(last) if section is not None else None
    return is_secret_name(last) or (declared is not None and not (declared.repr and _may_show(declared.annotation)))


def _may_show(annotation: Any) -> bool:
    return not {annotation, *get_args(annotation)} & {SecretStr, SecretBytes}


def _file_keys(detail: ErrorDetails, values: Any) -> Keys:
    """The part of pydantic's location that stands in the file (it also names union members and the like)."""
    found: list[str | int] = []
    rest = list(detail["loc"])
    while rest:
        key = rest.pop(0)
        inside = isinstance(values, Mapping) and key in values
        inside = inside or (isinstance(values, list) and isinstance(key, int) and key < len(values))
        if inside:
            found.append(key)
            values = values[key]
        elif detail["type"] == "missing" and not rest:
            found.append(key)
    return tuple(found)


def _describe(detail: ErrorDetails, model: type[BaseModel], *, shown: str) -> str:
    kind, location = detail["type"], detail["loc"]
    if kind == "extra_forbidden":
        return _describe_unknown(location, model)
    if kind == "missing":
        return "is missing and has no default"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        message = "must be a section of keys and values"
        if len(location) == 1 and isinstance(detail["input"], str):
            message += f", like {location[0]}: {{name: {hide_secrets(detail['input'])}}}"
    elif kind == "list_type":
        message = "must be a list, like [a, b]"
    return f"{message}, got {shown}"


def _describe_unknown(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    key = str(location[-1])
    section = _section_at(location[:-1], model)
    siblings = list(section.model_fields) if section is not None else []
    elsewhere = [path for path in _dotted_keys(model) if path.rpartition(".")[2] == key]
    hint = suggest(key, siblings)
    if not hint and elsewhere:
        hint = f"did you mean {elsewhere[0]!r}?"
    if not hint and siblings:
        hint = f"known here: {', '.join(siblings)}"
    what = "unknown section" if len(location) == 1 and section is model and _dotted_keys(model) else "unknown key"
    return f"{what} {show_value(key)}; {hint}" if hint else f"{what} {show_value(key)}"


def _section_at(location: tuple[int | str, ...], model: type[BaseModel]) -> type[BaseModel] | None:
    """The section that a location leads to; an item's number and the name of a union's member lead nowhere else."""
    section: type[BaseModel] | None = model
    inside = False
    for step in location:
        if section is None or (inside and str(step) not in section.model_fields):
            continue
        annotation = section.model_fields[str(step)].annotation if str(step) in section.model_fields else None
        section = _section_of(section, str(step))
        inside = get_origin(annotation) is list
    return section


def _section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a field that is a section itself, also where the field may be null."""
    if name not in model.model_fields:
        return None
    members = [model.model_fields[name].annotation]
    for member in members:  # of what it is made of, level by level
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
        members += get_args(member)
    return None


def _dotted_keys(model: type[BaseModel]) -> list[str]:
    """``section.key`` of every key one section deep."""
    dotted = []
    for name in model.model_fields:
        section = _section_of(model, name)
        dotted += [f"{name}.{key}" for key in section.model_fields] if section is not None else []
    return dotted
