"""Turns a tree of plain values and ``GPULEDGER_…`` variables into a frozen msgspec struct.

msgspec checks the types; this module exists for what a person needs when a value is wrong: the path of the field, the
value it has, and what to write instead, for all wrong fields at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Protocol, TypeVar, cast, get_args, get_origin

import msgspec
from msgspec import inspect

from gpuledger.schemas.exceptions import ConfigError, SchemaError
from gpuledger.schemas.yaml_text import parse_yaml

__all__ = ["Secret", "Setting", "describe", "read_settings", "to_builtins"]

S = TypeVar("S", bound=msgspec.Struct)


class Secret:
    """A text that must not be shown: repr, str, `to_builtins` and logs have ``***``; `reveal` gives the text."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


#: A check of one value beyond its type: None when it is right, else what was expected instead.
Check = Callable[[Any], str | None]


class Crosschecked(Protocol):
    """A struct that checks its fields against each other: (field, complaint with the fix) for each problem."""

    def problems(self) -> Iterator[tuple[str, str]]: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the configuration, for documentation: `path` has dots, `default` is a plain value."""

    path: str
    type: str
    default: Any
    doc: str
    secret: bool


@dataclass(frozen=True, slots=True)
class _Variable:
    """A value that came from the environment: text until the field's type is known."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class _Field:
    """A struct's field without its msgspec wrapping."""

    name: str
    annotation: Any
    type: inspect.Type
    default: Any
    required: bool
    doc: str
    example: Any
    check: Check | None


def _fields(struct: type[msgspec.Struct]) -> Iterator[_Field]:
    for info in msgspec.structs.fields(struct):
        kind, doc, example, check = inspect.type_info(info.type), "", None, None
        if isinstance(kind, inspect.Metadata):
            schema = kind.extra_json_schema or {}
            doc = str(schema.get("description", ""))
            example = next(iter(cast(list[Any], schema.get("examples", []))), None)
            check = cast(Check | None, (kind.extra or {}).get("check"))
            kind = kind.type
        default = info.default if info.default is not msgspec.NODEFAULT else None
        if info.default_factory is not msgspec.NODEFAULT:
            default = info.default_factory()
        yield _Field(info.name, info.type, kind, default, info.required, doc, example, check)


def _alternatives(kind: inspect.Type) -> tuple[list[inspect.Type], bool]:
    """The types of a union without None, and whether None was among them."""
    parts: list[inspect.Type] = list(kind.types) if isinstance(kind, inspect.UnionType) else [kind]
    kept = [part for part in parts if not isinstance(part, inspect.NoneType)]
    return [part.type if isinstance(part, inspect.Metadata) else part for part in kept], len(kept) < len(parts)


def _is_secret(kind: inspect.Type) -> bool:
    return any(isinstance(part, inspect.CustomType) and part.cls is Secret for part in _alternatives(kind)[0])


def _expected(kind: inspect.Type) -> str:
    """In words: what may be written for this type."""
    parts, optional = _alternatives(kind)
    text = " or ".join(_expected_part(part) for part in parts)
    return f"{text} or null" if optional else text


def _expected_part(kind: inspect.Type) -> str:
    match kind:
        case inspect.IntType(ge=low, le=high):
            if low is not None and high is not None:
                return f"a whole number from {low} to {high}"
            return f"a whole number of {low} or more" if low is not None else "a whole number"
        case inspect.FloatType(gt=low, le=high) if low is not None and high is not None:
            return f"a number above {low:g} and at most {high:g}"
        case inspect.FloatType():
            return "a number"
        case inspect.DecimalType():
            return "a decimal"
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType(min_length=low) if low:
            return "text that is not empty"
        case inspect.StrType():
            return "text"
        case inspect.LiteralType(values=values):
            return f"one of {', '.join(str(value) for value in values)}"
        case inspect.VarTupleType(item_type=item):
            return "a list of settings" if isinstance(item, inspect.StructType) else f"a list, each {_expected(item)}"
        case inspect.DictType(value_type=value):
            return f"a mapping, each value {_expected(value)}"
        case inspect.StructType():
            return "a mapping"
        case _:
            return "text"


def _shown(value: object) -> str:
    if isinstance(value, Decimal):
        return str(value)
    return json.dumps(value, default=str, ensure_ascii=False)


def _close(name: object, known: list[str]) -> str:
    guess = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {guess[0]}?" if guess else f"known here: {', '.join(known)}"


class _Reader:
    """Reads one tree; collects every problem instead of stopping at the first."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def struct(self, kind: type[msgspec.Struct], tree: Any, path: str) -> Any:
        if tree is None:
            tree = {}
        if not isinstance(tree, dict):
            self._complain(path or "the file", "expected a mapping of settings", tree, "write one setting per line")
            return None
        given = dict(cast(dict[Any, Any], tree))
        values: dict[str, Any] = {}
        names = [field.name for field in _fields(kind)]
        failed = False
        for field in _fields(kind):
            here = f"{path}.{field.name}" if path else field.name
            if field.name not in given:
                if field.required:
                    example = f"; write {_shown(field.example)}" if field.example is not None else ""
                    self.problems.append(f"{here}: is missing; expected {_expected(field.type)}{example}")
                    failed = True
                continue
            before = len(self.problems)
            values[field.name] = self.value(field, given.pop(field.name), here)
            failed = failed or len(self.problems) > before
        for name, value in given.items():
            here = f"{path}.{name}" if path else str(name)
            if isinstance(value, _Variable):
                here = value.name
            self.problems.append(f"{here}: there is no such setting; {_close(name, names)}")
        if failed:
            return None
        result = kind(**values)
        if hasattr(result, "problems"):
            for name, complaint in cast(Crosschecked, result).problems():
                self.problems.append(f"{path}.{name}: {complaint}" if path else f"{name}: {complaint}")
        return result

    def value(self, field: _Field, value: Any, path: str) -> Any:
        parts, optional = _alternatives(field.type)
        part = parts[0]
        if isinstance(part, inspect.StructType):
            return self.struct(part.cls, value, path)
        origin = ""
        if _is_secret(field.type):
            return self._secret(value, path)
        if isinstance(value, _Variable):
            origin = f" (from {value.name})"
            value = self._from_text(value, part, optional)
        if isinstance(part, inspect.VarTupleType) and isinstance(part.item_type, inspect.StructType):
            return self._structs(part.item_type.cls, value, path)
        if isinstance(part, inspect.DictType):
            return self._mapping(part, field, value, path)
        return self._leaf(field, part, value, path, origin)

    def _structs(self, item: type[msgspec.Struct], value: Any, path: str) -> Any:
        if not isinstance(value, list):
            self._complain(path, "expected a list", value, "write [] for none")
            return ()
        return tuple(self.struct(item, entry, f"{path}[{n}]") for n, entry in enumerate(cast(list[Any], value)))

    def _mapping(self, part: inspect.DictType, field: _Field, value: Any, path: str) -> Any:
        """Keys that are not given keep their defaults; keys without a default are unknown."""
        known = cast(dict[str, Any], field.default)
        if not isinstance(value, dict):
            self._complain(path, f"expected {_expected(part)}", value, f"write {_shown(known)}")
            return known
        merged = dict(known)
        annotation = field.annotation
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        value_annotation = get_args(annotation)[1]
        for key, entry in cast(dict[Any, Any], value).items():
            here = f"{path}.{key}"
            if key not in known:
                self.problems.append(f"{here}: there is no such setting; {_close(key, list(known))}")
                continue
            inner = _Field(str(key), value_annotation, part.value_type, known[key], False, "", None, None)
            merged[key] = self.value(inner, entry, here)
        return merged

    def _secret(self, value: Any, path: str) -> Secret | None:
        if isinstance(value, _Variable):
            return Secret(value.text) if value.text else None
        if value is None:
            return None
        self.problems.append(
            f"{path}: a secret is not read from here, only from the environment or a file of its own; write {path}_file"
        )
        return None

    def _from_text(self, variable: _Variable, part: inspect.Type, optional: bool) -> Any:
        if optional and variable.text == "":
            return None
        if isinstance(part, inspect.StrType | inspect.LiteralType):
            return variable.text
        try:
            value = parse_yaml(variable.text, variable.name)
        except SchemaError:
            return variable.text
        if isinstance(part, inspect.VarTupleType) and isinstance(value, str):
            return [piece.strip() for piece in value.split(",") if piece.strip()]
        return value

    def _leaf(self, field: _Field, part: inspect.Type, value: Any, path: str, origin: str) -> Any:
        if isinstance(part, inspect.FloatType) and isinstance(value, Decimal):
            value = float(value)
        elif isinstance(part, inspect.DecimalType) and isinstance(value, int) and not isinstance(value, bool):
            value = Decimal(value)
        wanted = field.example if field.example is not None else field.default
        fix = f"write {_shown(wanted)}"
        if isinstance(part, inspect.StrType) and isinstance(value, int | Decimal) and not isinstance(value, bool):
            fix = f'write "{value}"'
        try:
            result = msgspec.convert(value, field.annotation)
        except msgspec.ValidationError:
            self._complain(path, f"expected {_expected(field.type)}", value, fix, origin)
            return field.default
        complaint = field.check(result) if field.check is not None and result is not None else None
        if complaint is not None:
            self._complain(path, complaint, value, fix, origin)
        return result

    def _complain(self, path: str, expected: str, value: object, fix: str, origin: str = "") -> None:
        self.problems.append(f"{path}: {expected}, got {_shown(value)}{origin}; {fix}")


def _overlay(
    kind: type[msgspec.Struct], tree: Any, environ: Mapping[str, str], prefix: str, other: Collection[str]
) -> Any:
    """A copy of the tree with the variables put in their places."""
    merged = _copy(tree)
    for name in sorted(environ):
        if not name.startswith(prefix) or name in other:
            continue
        *sections, last = name.removeprefix(prefix).lower().split("__")
        node: Any = merged
        for section in sections:
            if isinstance(node, dict):
                branch = cast(dict[Any, Any], node)
                if branch.get(section) is None:
                    branch[section] = {}
                node = branch[section]
        if not isinstance(node, dict):
            raise ConfigError(f"{name}: {'.'.join(sections)} is not a section; remove the variable")
        branch = cast(dict[Any, Any], node)
        if isinstance(branch.get(last), dict) or (not sections and last in kind.__struct_fields__):
            raise ConfigError(f"{name}: names a section; write one variable per setting, {name}__<SETTING>")
        branch[last] = _Variable(name, environ[name])
    return merged


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in cast(dict[Any, Any], tree).items()}
    return tree


def read_settings(kind: type[S], tree: Any, environ: Mapping[str, str], prefix: str, other: Collection[str] = ()) -> S:
    """The struct `kind` from a tree of plain values (None: empty), overlaid with variables.

    A variable is `prefix` and the path in capitals, ``__`` between its parts; `other` names variables with the prefix
    that are no settings. Lists may be written as YAML or as texts with commas, an empty text is null where allowed.

    Raises:
        ConfigError: one line for each problem: path, what was expected, what was found, what to write.
    """
    reader = _Reader()
    result = reader.struct(kind, _overlay(kind, tree if tree is not None else {}, environ, prefix, other), "")
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return cast(S, result)


def to_builtins(value: Any) -> Any:
    """Plain values for showing: secrets as ``***``, decimals as text, tuples as lists."""
    if isinstance(value, msgspec.Struct):
        return {name: to_builtins(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Secret | Decimal):
        return str(value)
    if isinstance(value, dict):
        return {key: to_builtins(entry) for key, entry in cast(dict[str, Any], value).items()}
    if isinstance(value, tuple | list):
        return [to_builtins(entry) for entry in cast(list[Any], value)]
    return value


def describe(kind: type[msgspec.Struct], path: str = "") -> Iterator[Setting]:
    """Every setting below `kind`, in order; those of list items have ``[]`` in their path."""
    for field in _fields(kind):
        here = f"{path}.{field.name}" if path else field.name
        part = _alternatives(field.type)[0][0]
        if isinstance(part, inspect.StructType):
            yield from describe(part.cls, here)
            continue
        yield Setting(here, _expected(field.type), to_builtins(field.default), field.doc, _is_secret(field.type))
        if isinstance(part, inspect.VarTupleType) and isinstance(part.item_type, inspect.StructType):
            yield from describe(part.item_type.cls, f"{here}[]")
