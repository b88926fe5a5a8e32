"""The schema in words: what each field is called, what it takes, and what it means."""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from topd_ray.config.schema import TopdConfig
from topd_ray.config.section import Section

_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null (unset)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldDoc:
    """One field of the config."""

    path: str
    """dotted key"""
    type_text: str
    default: Any
    """as JSON would hold it; meaningless where `required`"""
    required: bool
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionDoc:
    """One section of the config."""

    path: str
    description: str
    fields: tuple[FieldDoc, ...]


@cache
def sections() -> tuple[SectionDoc, ...]:
    """Every section in the order of the schema; a nested one follows the one that holds it."""
    return tuple(_walk("", TopdConfig))[1:]


@cache
def fields() -> Mapping[str, FieldDoc]:
    """Every field by its dotted key."""
    return {field.path: field for section in sections() for field in section.fields}


@cache
def section_paths() -> Mapping[str, SectionDoc]:
    """Every section by its dotted key."""
    return {section.path: section for section in sections()}


def _walk(path: str, section: type[BaseModel]) -> Iterator[SectionDoc]:
    own: list[FieldDoc] = []
    nested: list[tuple[str, type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        key = f"{path}.{name}" if path else name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            nested.append((key, field.annotation))
        else:
            own.append(_document(key, field))
    yield SectionDoc(path=path, description=" ".join((section.__doc__ or "").split()), fields=tuple(own))
    for key, annotation in nested:
        yield from _walk(key, annotation)


def _document(key: str, field: FieldInfo) -> FieldDoc:
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    return FieldDoc(
        path=key,
        type_text=_type_text(field.annotation, field.metadata),
        default=list(default) if isinstance(default, tuple) else default,
        required=field.is_required(),
        description=" ".join((field.description or "").split()),
    )


def _type_text(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [
            part for extra in arguments[1:] for part in (extra.metadata if isinstance(extra, FieldInfo) else [extra])
        ]
        return _type_text(arguments[0], [*inner, *constraints])
    if origin in (Union, types.UnionType):
        return ", or ".join(_type_text(one) for one in arguments)
    if origin is Literal:
        return " | ".join(str(one) for one in arguments)
    if origin is tuple:
        length = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"list{length}, each: {_type_text(arguments[0])}"
    if origin is dict:
        return f"mapping of text to: {_type_text(arguments[1])}"
    limits = [text for constraint in constraints if (text := _limit_text(constraint))]
    return " ".join([_WORDS[annotation], " and ".join(limits)]).strip()


def _limit_text(constraint: Any) -> str:
    match constraint:
        case annotated_types.Gt(gt=bound):
            return f"> {bound}"
        case annotated_types.Ge(ge=bound):
            return f">= {bound}"
        case annotated_types.Lt(lt=bound):
            return f"< {bound}"
        case annotated_types.Le(le=bound):
            return f"<= {bound}"
    pattern = getattr(constraint, "pattern", None)
    return f"matching {pattern}" if pattern else ""
