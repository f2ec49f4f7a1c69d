"""From a YAML file and command-line overrides to a `RunConfig`, with one clear line for each mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from gemma_xla.config import RunConfig
from gemma_xla.config_base import Section
from gemma_xla.config_data import SourceSection
from gemma_xla.errors import UserError, nearest

# Our words for what pydantic says of a value, by the name it gives the mistake.
_MUST = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text; quote what YAML would read as something else",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must not hold the character of no name, \\0",
    "list_type": "must be a list, such as [a, b]",
    "too_short": "must have at least one entry",
    "dict_type": "must hold `key: value` pairs",
    "model_type": "must hold `key: value` pairs",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (PyYAML reads ``1e-3`` as text), no dates, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: text that looks like a float goes into quotes."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a run's YAML file and apply overrides such as ``train.steps=10``.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value is impossible.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror or error}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: it is not UTF-8 text; give the path of a YAML file") from error
    try:
        tree = _parse(text, f"config {path}")
    except UserError as error:
        raise UserError(f"{error}; correct the file there") from error
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: it must hold `key: value` lines, such as those in recipes/configs")
    for override in overrides:
        _override(tree, override)
    return validate(tree, str(path))


def validate(tree: dict[str, Any], origin: str) -> RunConfig:
    """Turn nested plain values into a `RunConfig`; ``origin`` is named in errors."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(f"config {origin}: {line}" for line in _explain(error.errors()))) from None
    for key in set(config.checkpoint.accept_changes) - (fields := set(_fields(RunConfig))):
        raise UserError(
            f"config {origin}: checkpoint.accept_changes has {key!r}; name keys of the config{nearest(key, fields)}"
        )
    return config


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML; `load_config` reads it back to an equal value."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{origin}{where}: not valid YAML: {problem}") from error


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise UserError(f"--set {override!r}: write it as key=value, such as train.steps=10")
    node = tree
    for depth, part in enumerate(parents, start=1):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {'.'.join(parents[:depth])} has no keys; set it as a whole")
    try:
        node[last] = _parse(value, f"--set {key}")
    except UserError as error:
        raise UserError(f"{error}; text with such characters needs quotes of its own: --set '{key}=\"...\"'") from None


def _explain(errors: list[dict[str, Any]]) -> list[str]:
    """A line for each mistake: the field, the value, the way out."""
    unknown = {_field(e): _suggestion(e["loc"]) for e in errors if e["type"] == "extra_forbidden"}
    lines = []
    for error in errors:
        field, kind = _field(error), error["type"]
        if field in unknown:
            lines.append(f"unknown key {field!r}; {unknown[field]}")
        elif kind == "missing":
            # A misspelt key is one mistake, not two.
            if f"did you mean {field!r}?" not in unknown.values():
                lines.append(f"{field} is missing; add it")
        elif kind == "value_error":
            lines.append(f"{field}: {error['ctx']['error']}")
        elif error["loc"][-1] == "[key]" or kind == "invalid_key":
            lines.append(f"unknown key {field!r}; keys must be text")
        else:
            lines.append(f"{field} is {_shown(error['input'])}; {_must(error)}")
    return lines


def _field(error: dict[str, Any]) -> str:
    """The dotted name of where a mistake is: ``data.train[0].path``."""
    field = ""
    for part in error["loc"]:
        if isinstance(part, int):
            field += f"[{part}]"
        elif part != "[key]":
            field += f".{part}" if field else part
    return field


def _must(error: dict[str, Any]) -> str:
    message = error["msg"].replace("Input should be", "must be")
    if error["type"] == "int_from_float":
        return _MUST["int_type"]
    return _MUST.get(error["type"], message)


def _shown(value: Any) -> str:
    """A value as its YAML file would have it, near enough."""
    if value is None:
        return "empty"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _suggestion(loc: tuple[str | int, ...]) -> str:
    """What to write instead of an unknown key."""
    name, section = str(loc[-1]), _section(loc[:-1])
    prefix = _field({"loc": loc[:-1]}) + "." if len(loc) > 1 else ""
    close = difflib.get_close_matches(name, section.model_fields, n=1)
    elsewhere = [field for field in _fields(RunConfig) if field.split(".")[-1] == name]
    if close or elsewhere:
        return f"did you mean {prefix + close[0] if close else elsewhere[0]!r}?"
    return f"valid keys here: {', '.join(section.model_fields)}"


def _section(loc: tuple[str | int, ...]) -> type[Section]:
    """The section that a location leads to."""
    node: Any = RunConfig
    for part in loc:
        if isinstance(part, str):
            # Lists hold sources.
            node = _as_section(node.model_fields[part].annotation) or SourceSection
    return node


def _fields(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields that are not sections themselves."""
    for name, field in section.model_fields.items():
        if inner := _as_section(field.annotation):
            yield from _fields(inner, f"{prefix}{name}.")
        yield prefix + name


def _as_section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, perhaps an optional one."""
    kinds = get_args(annotation) or (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
