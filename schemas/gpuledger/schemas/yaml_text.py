"""Reads YAML that people write: safe, exact, and without silent surprises.

Numbers with a point become `Decimal` (money is never a float) and a key written twice is an error, where plain PyYAML
would keep the last one and say nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from decimal import Decimal, InvalidOperation
from typing import Any

import yaml

from gpuledger.schemas.exceptions import SchemaError

__all__ = ["parse_yaml"]


class _Loader(yaml.SafeLoader):
    """SafeLoader with exact numbers and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key_node.value!r} is written twice; keep one of them",
                        problem_mark=key_node.start_mark,
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _exact_number(loader: _Loader, node: yaml.ScalarNode) -> Decimal:
    text = str(node.value)
    try:
        number = Decimal(text.replace("_", ""))
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise yaml.MarkedYAMLError(
            problem=f"{text!r} is not a finite decimal number; quote it if it is text", problem_mark=node.start_mark
        )
    return number


_Loader.add_constructor("tag:yaml.org,2002:float", _exact_number)


def parse_yaml(text: str, name: str) -> Any:
    """The one document of `text` as dicts, lists and scalars; numbers with a point as `Decimal`, dates as `date`.

    Raises:
        SchemaError: not YAML, a duplicate key or a number that is not finite; the text starts with `name` and the
            position.
    """
    try:
        # A subclass of SafeLoader: it builds plain data and nothing else.
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise SchemaError(f"{name}{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SchemaError(f"{name}: {error}") from error
