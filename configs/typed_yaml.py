"""Typed YAML: a value is read as what its field holds, so that a text stays as it was typed, whatever YAML
would make of it.

YAML takes `on` for true, `0123` for 83 and `1:30` for 90. Where a dataclass says str, int or float, the
characters count.
"""

import dataclasses
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

MOST_VALUES = 200_000  # of a document, with what its anchors stand for
PREFIX = "tag:yaml.org,2002:"
TEXT = f"{PREFIX}str"
WORDS = {
    f"{PREFIX}{kind}" for kind in ("bool", "int", "float", "timestamp", "value", "merge")
}  # what YAML takes a plain word for
NUMBERS = {f"{PREFIX}{kind}" for kind in ("int", "float", "timestamp")}
NULL = f"{PREFIX}null"
NULLS = ("", "~", "null", "Null", "NULL")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(text: str, kind: Any) -> Any:
    """Plain values (dicts, lists, texts, numbers, None) of a YAML document that holds a `kind`: a dataclass,
    list[float], ….

    Numbers of int and float fields come as the text that was typed. Raises yaml.YAMLError, also for a key
    that stands twice.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _mark(node, kind, iter(range(MOST_VALUES)))
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it nests too deep, or refers to itself") from None
    finally:
        loader.dispose()


def word(text: str, kind: Any) -> Any:
    """The value of one key=value word: a text field's as it was typed, unless it is quoted; any other as
    YAML.
    """
    bare, (inner, optional) = text.strip(), _without_none(kind)
    if _is_text(inner) and bare[:1] not in ("'", '"'):
        return None if optional and bare in NULLS else bare
    return read(text, kind)


def field_kind(schema: Any, path: list[str]) -> Any:
    """The type of a key, outer.inner as its parts; None for one that there is not."""
    for part in path:
        schema = _without_none(schema)[0]
        if dataclasses.is_dataclass(schema):
            schema = get_type_hints(schema).get(part)
        else:
            schema = get_args(schema)[-1] if get_origin(schema) is dict else None
    return schema


def item_kind(kind: Any) -> Any:
    """What a list holds; None for what is no list."""
    kind = _without_none(kind)[0]
    return get_args(kind)[0] if get_origin(kind) in (list, tuple) and get_args(kind) else None


def _mark(node: yaml.Node, kind: Any, left: Iterator[int]) -> None:
    """Tells every scalar inside that it is text where its field holds text or numbers."""
    if next(left, None) is None:
        raise yaml.YAMLError(f"it holds more than {MOST_VALUES} values, or anchors that refer to themselves")
    kind, optional = _without_none(kind)
    if isinstance(node, yaml.ScalarNode):
        empty = node.tag == NULL and not node.value and not optional
        if _is_text(kind) and (node.tag in WORDS or empty) or kind in (int, float) and node.tag in NUMBERS:
            node.tag = TEXT
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _mark(child, item_kind(kind), left)
    elif isinstance(node, yaml.MappingNode):
        _mark_mapping(node, kind, left)


def _mark_mapping(node: yaml.MappingNode, kind: Any, left: Iterator[int]) -> None:
    seen = set()
    for key, value in node.value:
        if key.tag == f"{PREFIX}merge":  # <<: what it brings in has the same fields
            _mark(value, list[kind] if isinstance(value, yaml.SequenceNode) and kind else kind, left)
            continue
        if isinstance(key, yaml.ScalarNode):
            key.tag = TEXT
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found duplicate key {key.value}", key.start_mark
                )
            seen.add(key.value)
        _mark(value, field_kind(kind, [str(key.value)]), left)


def _without_none(kind: Any) -> tuple[Any, bool]:
    """X of `X | None`, and whether it may be None."""
    if get_origin(kind) in (Union, UnionType):
        inner = [part for part in get_args(kind) if part is not NoneType]
        return (inner[0] if len(inner) == 1 else None), len(inner) < len(get_args(kind))
    return kind, False


def _is_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal
