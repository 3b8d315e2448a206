"""Settings as pydantic models: dotted keys, YAML files, overrides, error messages, and the list of all keys.

The models are in `config.py`. In this module `root` is the top model. Its fields are sections (other models),
and the fields of a section are sections or keys.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import functools
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from mapo_jax.errors import UserError
from mapo_jax.files import as_path

S = TypeVar("S", bound="Section")
_TEXT, _NUMBER = (str, str | None), (float, float | None)


class Section(BaseModel):
    """A frozen model; an unknown key or a value of another type is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


def key(default: Any, description: str, **options: Any) -> Any:
    """A field with its default, its description, and further options of pydantic's Field, such as bounds."""
    return Field(default, description=description, **options)


def updated(section: S, changes: Mapping[str, Any]) -> S:
    """A copy with other values for some dotted keys.

    The values are not checked, so they must not come from a user; use `validated` for those.
    Raises KeyError for an unknown key.
    """
    for dotted, value in changes.items():
        name, _, rest = dotted.partition(".")
        if name not in type(section).model_fields:
            raise KeyError(dotted)
        inner = updated(getattr(section, name), {rest: value}) if rest else value
        section = section.model_copy(update={name: inner})
    return section


def value_of(section: Section, dotted: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, dotted.split("."), section)


def value_at(tree: Any, dotted: str) -> Any:
    """The value under a dotted key of nested mappings; None if there is none."""
    for name in dotted.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    dotted = ((f"{prefix}.{name}" if prefix else str(name), value) for name, value in tree.items())
    return {key: value for name, inner in dotted for key, value in flat(inner, name).items()}


def differing_keys(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two nested mappings or sections differ."""
    one, other = (tree.model_dump() if isinstance(tree, Section) else tree for tree in (one, other))
    keys = []
    for name in dict.fromkeys([*one, *other]):
        left, right = one.get(name), other.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            keys += differing_keys(left, right, f"{prefix}{name}.")
        elif left != right:
            keys.append(f"{prefix}{name}")
    return keys


@functools.cache
def fields(root: type[Section]) -> Mapping[str, FieldInfo]:
    """Every dotted key (no sections) with its field."""

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from walk(field.annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field

    return dict(walk(root, ""))


# --- Reading. ---


def read_yaml(path: Path | str) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's content, and for each dotted key its file and line as the prefix of an error message.

    Raises:
      UserError: the file cannot be read, is not a YAML mapping, or has a key twice.
    """
    places: dict[str, str] = {}

    def collect_places(node: yaml.Node | None, prefix: str = "") -> None:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            dotted, line = f"{prefix}{name.value}", name.start_mark.line + 1
            if dotted in places:
                raise UserError(f"{path}, line {line}: `{dotted}` is there a second time; remove one of them")
            places[dotted] = f"{path}, line {line}: "
            collect_places(value, f"{dotted}.")

    try:
        loader = yaml.SafeLoader(as_path(path).read_text())
        node = loader.get_single_node()
        collect_places(node)
        content = node and loader.construct_document(node)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, no date, a recursive alias
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of sections, not a {type(content).__name__}")
    return content or {}, places


def parse_settings(
    root: type[Section],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    section: str = "training",
) -> argparse.Namespace:
    """Parses a command line with options and `key=value` settings in any order.

    Exits with status 2 for an unknown option; if it is the name of a setting, the message has its form. A
    name is looked for in `section` first; that of a section means its first key, as `model` the path.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options, unknown = parser.parse_known_intermixed_args(words)
    for option in unknown:
        name, _, value = option.lstrip("-").partition("=")
        value = value or "".join(words[words.index(option) + 1 :][:1])
        name = name.replace("-", "_")
        named = [f"{section}.{name}", *(_keys_below(root, name) if name in root.model_fields else ())]
        close = next((key for key in named if key in fields(root)), None) or _meant(root, name)
        if option.startswith("--") and close:
            setting = shlex.quote(f"{close}={value or 'VALUE'}")
            parser.exit(2, f"error: `{option}` is no option; write the setting {setting}\n")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def read_override(root: type[Section], override: str) -> dict[str, Any]:
    """The values of a `key=value` override, by dotted key. Raises UserError if it has another form."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise UserError(f"`{override}` is not an override; write it as key=value, e.g. training.steps=20")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    field = fields(root).get(dotted)
    if field and field.annotation in _TEXT and isinstance(value, int | float | datetime.date):
        value = text
    return leaves(root, nested(dotted, value))


def leaves(root: type[Section], tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by dotted key, without empty sections; a key's mapping stays whole."""
    values = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict) and value and dotted not in fields(root):
            values |= leaves(root, value, f"{dotted}.")
        elif value not in (None, {}) or not _keys_below(root, dotted):
            values[dotted] = value
    return values


def merged(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overridden by `update`; mappings in both are merged recursively."""
    result = dict(base)
    for name, value in update.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def validated(root: type[S], values: Mapping[str, Any], places: Mapping[str, str]) -> S:
    """The settings with these values by dotted key; all other keys have their defaults.

    Args:
      places: prefixes of error messages, by dotted key.

    Raises:
      UserError: an unknown key, a value of the wrong type or out of bounds, an invalid combination.
    """
    for dotted in values:
        if dotted not in fields(root):
            raise UserError(f"{places.get(dotted, '')}{_unknown(root, dotted)}")
    kinds = {dotted: fields(root)[dotted].annotation for dotted in values}
    trees = (nested(dotted, _converted(kinds[dotted], value)) for dotted, value in values.items())
    try:
        return root.model_validate(functools.reduce(merged, trees, {}))
    except ValidationError as error:
        raise UserError(_message(root, error.errors(include_url=False)[0], values, places)) from None


def _converted(kind: Any, value: Any) -> Any:
    """Converts 1e-3, which YAML reads as text, to a number, and a name such as 7 or 2024-01-31 to text."""
    if isinstance(value, str) and kind in _NUMBER:
        with suppress(ValueError):
            return float(value)
    if isinstance(value, list) and kind == list[float]:
        return [_converted(float, item) for item in value]
    is_name = isinstance(value, int | float | datetime.date) and not isinstance(value, bool)
    return str(value) if is_name and kind in _TEXT else value


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """Mappings in which the dotted key has the value."""
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


def _keys_below(root: type[Section], section: str) -> list[str]:
    return [dotted for dotted in fields(root) if dotted.startswith(f"{section}.")]


def _unknown(root: type[Section], dotted: str) -> str:
    if keys := _keys_below(root, dotted):
        return f"`{dotted}` is a section; set one of its keys, e.g. `{keys[0]}`"
    close = _meant(root, dotted) or difflib.get_close_matches(dotted, fields(root), n=1, cutoff=0.0)[0]
    return f"unknown key `{dotted}`; the nearest known one is `{close}`"


def _meant(root: type[Section], dotted: str) -> str | None:
    """The key meant by another name: `steps`, `optimizer.lr` (initials), `algorithm.gamma` (described so)."""
    section, _, name = dotted.rpartition(".")
    if dotted in fields(root):
        return dotted
    inside = _keys_below(root, section)
    for keys in (inside, list(fields(root))):
        for key in keys:
            last = key.rpartition(".")[2]
            if name == last or (len(name) > 1 and name == "".join(word[0] for word in last.split("_"))):
                return key
    if close := difflib.get_close_matches(dotted, fields(root), n=1, cutoff=0.9):
        return close[0]
    described = (key for key in inside if re.search(rf"\b{re.escape(name)}\b", fields(root)[key].description))
    return next(described, None)


def _message(
    root: type[Section], error: Mapping[str, Any], values: Mapping[str, Any], places: Mapping[str, str]
) -> str:
    """One of pydantic's errors as a sentence: place, key, value, and the rule."""
    if not error["loc"]:  # an invalid combination, whose message names its keys
        return str(error["ctx"]["error"])
    names = [str(name) for name in error["loc"]]
    dotted = next(d for n in range(len(names), 0, -1) if (d := ".".join(names[:n])) in fields(root))
    schema, value = _schema(root, dotted), values[dotted]
    if error["type"] == "value_error":
        complaint = str(error["ctx"]["error"])
    elif error["type"].endswith("_type"):
        complaint = f"must be {_kind(schema)}, not {value!r}"
    else:
        complaint = f"is {value!r}; it must be {_bounds(schema) or _kind(schema)}"
    return f"{places.get(dotted, '')}`{dotted}` {complaint}"


# --- Describing. ---


@functools.cache
def json_schema(root: type[Section]) -> dict[str, Any]:
    """The settings as a JSON schema, for editors."""
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | root.model_json_schema()


def describe(root: type[Section], keys: list[str]) -> str:
    """These keys with default, description, type and bounds, under their sections; 80 columns wide."""
    lines, last = [], ""
    for dotted in keys:
        field, schema, section = fields(root)[dotted], _schema(root, dotted), dotted.rpartition(".")[0]
        if section != last:
            about = f"{section}: {_schema(root, section)['description']}"
            lines += ["", *textwrap.wrap(about, 80, initial_indent="# ", subsequent_indent="# ")]
        default, last = field.default, section
        kind = ", ".join(filter(None, (_kind(schema), _bounds(schema))))
        lines.append(f"{dotted} = {default if isinstance(default, str) else json.dumps(default)}")
        lines.append(textwrap.indent(textwrap.fill(f"{field.description} ({kind})", 76), "    "))
    return "\n".join(lines[1:])


def _schema(root: type[Section], dotted: str) -> dict[str, Any]:
    """The JSON schema of a key or a section."""
    top = schema = json_schema(root)
    for name in dotted.split("."):
        schema = schema["properties"][name]
        schema = top["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return schema


_KINDS = {
    "integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text",
    "object": "a mapping", "null": "null",
}  # fmt: skip


def _kind(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema["type"] == "array":
        return f"a list of {'numbers' if schema['items']['type'] == 'number' else 'names'}"
    return _KINDS[schema["type"]]


def _bounds(schema: Mapping[str, Any]) -> str:
    schema = schema.get("anyOf", [schema])[0]
    low, high = schema.get("minimum"), schema.get("maximum")
    if "enum" in schema.get("items", {}):
        return f"some of {', '.join(schema['items']['enum'])}, each at most once"
    if "exclusiveMinimum" in schema:
        return f"above {schema['exclusiveMinimum']}"
    if low is None:
        return ""
    return f"at least {low}" if high is None else f"between {low} and {high}"
