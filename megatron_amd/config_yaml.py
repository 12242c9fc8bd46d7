"""From strict YAML and `section.field=value` overrides to a tree of frozen dataclasses.

Nothing here knows which sections exist: `config.py` declares them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from typing import Any, Literal

import yaml

from megatron_amd.errors import InputError


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice and reads 1e-5 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key {key.value!r} is written twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes every text which StrictLoader would read as a number."""


# YAML 1.1, which PyYAML follows, wants a point before the exponent and a sign in it: 1.0e-5, not 1e-5.
for _yaml_class in (StrictLoader, StrictDumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str, source: str) -> Any:
    """The value that one YAML document holds; `source` names it in errors."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "is not valid YAML"
        raise InputError(f"{source}{where}: {problem}; correct the YAML") from None


def write_yaml(tree: Any) -> str:
    """YAML text, keys in their order, that `parse_yaml` reads back to an equal value."""
    return yaml.dump(tree, Dumper=StrictDumper, sort_keys=False, width=100, allow_unicode=True)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put the value of `section.field=value` into the tree that the file gave, in place."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        hint = f"; did you mean --config {override}?" if override.endswith((".yaml", ".yml")) else ""
        raise InputError(f"command line: {override!r} is not section.field=value, such as objective.beta=0.7{hint}")
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise InputError(f"command line: {name}: {parent!r} is not a section")
    node[leaf] = parse_yaml(text, f"command line: {name}")


def build_section(
    base: Any, tree: Any, *, source: str, where: str = "", overridden: typing.Collection[str] = ()
) -> Any:
    """The section `base` with the fields that `tree` names replaced; the others keep their values.

    Args:
        source: the file, for errors.
        where: dotted name of the section.
        overridden: dotted names that the command line has set: their errors are its own.
    """
    if tree is None:  # a section whose lines are all commented out
        tree = {}
    if not isinstance(tree, dict):
        raise InputError(f"{source}: {where or 'top level'}: must be a section with named fields, not {tree!r}")
    hints = typing.get_type_hints(type(base))
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        origin = "command line" if name in overridden else source
        if key not in hints:
            raise InputError(f"{origin}: {name}: unknown key{_nearest(str(key), list(hints), where)}")
        current = getattr(base, key)
        if dataclasses.is_dataclass(current):
            values[key] = build_section(current, value, source=origin, where=name, overridden=overridden)
        else:
            values[key] = _convert(value, hints[key], f"{origin}: {name}")
    try:
        return dataclasses.replace(base, **values)
    except InputError as error:
        origin = "command line" if any(name in str(error) for name in overridden) else source
        raise InputError(f"{origin}: {error}") from None


def _nearest(key: str, known: list[str], where: str) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {where + '.' if where else ''}{close[0]}?"
    return f"; known here: {', '.join(known)}"


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type `hint`, where that loses nothing (1 for 1.0, a list for a tuple); `name` is for errors."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            if type(None) in args:
                return None
        else:
            (hint,) = [a for a in args if a is not type(None)]
            return _convert(value, hint, name)
    elif origin is Literal:
        if value in args and isinstance(value, str):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            if args[-1] is Ellipsis:
                return tuple(_convert(v, args[0], f"{name}[{i}]") for i, v in enumerate(value))
            if len(value) == len(args):
                return tuple(_convert(v, a, f"{name}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    elif origin is dict:
        if value is None:  # as for a section
            return {}
        if isinstance(value, dict):
            return dict(value)
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif hint is str and isinstance(value, str):
        return value
    cure = ""
    if origin is tuple and args[0] is str:  # YAML takes what follows a bare # for a comment
        cure = f"; write [{json.dumps(value)}]" if isinstance(value, str) else '; write a list such as ["###"]'
    raise InputError(f"{name}: must be {type_name(hint)}, not {value!r}{cure}")


def type_name(hint: Any) -> str:
    """A field's type in a reader's words, such as "list of 2 number" or "text or unset"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in args)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"list of {count}{type_name(args[0])}"
    if origin is dict:
        return "mapping"
    if hint is type(None):
        return "unset"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
