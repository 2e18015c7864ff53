"""What the settings tree says of itself: every key with type, range, default and sentence; as Markdown, and an effective tree as TOML."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic_core import PydanticUndefined

from appliance.settings import Settings

MASK = "********"
_MADE_AT_START = {"state_dir": "the user's state folder", "instance_id": "the host name"}


@dataclass(frozen=True, slots=True)
class SettingField:
    """One leaf of the tree."""

    key: str  # dotted: "server.port"
    kind: str  # "integer", "number", "boolean", "string", "path", "list of strings" or the choices
    allowed: str  # type and range in words, as an error prints it
    optional: bool  # None is a value: chosen at start
    secret: bool
    default: Any  # the Python value; None where it is made at start
    description: str

    @property
    def env(self) -> str:
        """The environment variable that sets it."""
        return "APPLIANCE_" + self.key.upper().replace(".", "__")

    @property
    def default_text(self) -> str:
        """The default as docs print it."""
        if self.key in _MADE_AT_START:
            return _MADE_AT_START[self.key]
        if self.default is None:
            return "none" if self.secret or self.kind == "path" else "chosen at start"
        return toml_value(self.default)


@functools.cache
def setting_fields() -> Mapping[str, SettingField]:
    """Every setting by its dotted key, in the tree's order."""
    return {field.key: field for field in _walk(Settings, "")}


def value_at(settings: Settings, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def toml_value(value: Any) -> str:
    """`value` (bool, int, float, str, path or sequence of them) in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def as_toml(settings: Settings, sources: Mapping[str, str]) -> str:
    """The tree as TOML that loads to the same tree, with each value's source as a comment.

    Secrets are masked and commented out, and so is what is chosen at start: the file then neither leaks nor pins them.
    """
    lines: list[str] = []
    section = ""
    for field in setting_fields().values():
        head, _, name = field.key.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        value, source = value_at(settings, field.key), sources.get(field.key, "default")
        if value is None:
            lines.append(f"# {name} =  # {field.default_text}")
        elif isinstance(value, SecretStr):
            lines.append(f"# {name} = {toml_value(MASK)}  # {source}")
        else:
            lines.append(f"{name} = {toml_value(value)}  # {source}")
    return "\n".join(lines) + "\n"


def as_markdown() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Made by `appliance config --markdown`; a test keeps it current.",
        "",
        "A TOML file (`--config FILE` or `APPLIANCE_CONFIG`) is overridden by the environment, and both by flags. A key such as `server.port` is",
        "`port` under `[server]` in the file, `APPLIANCE_SERVER__PORT` in the environment, and `--server.port 9000` or `--set server.port=9000` as a",
        "flag. An empty variable means *chosen at start* where that is the default; lists are separated by commas. Secrets come from the file, the",
        "environment or systemd credentials (`api-keys`, `webhook-secret`, `store-url`), never from a flag. All mistakes are reported together, and",
        "nothing is started (exit status 2). `appliance config` prints what is in effect, and where each value came from.",
    ]
    section: str | None = None
    for field in setting_fields().values():
        head, _, name = field.key.rpartition(".")
        if head != section:
            section = head
            about = (type(value_at(Settings(), head)) if head else Settings).__doc__ or ""
            lines += ["", f"## {head or 'Top level'}", "", about.strip().splitlines()[0], ""]
            lines += ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |"]
        cells = (f"`{name}`", field.allowed, f"`{field.default_text}`", field.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _walk(model: type[BaseModel], prefix: str) -> Iterator[SettingField]:
    properties = model.model_json_schema(mode="validation")["properties"]
    nested: list[Iterator[SettingField]] = []
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            nested.append(_walk(annotation, f"{prefix}{name}."))
            continue
        schema = properties[name]
        variants = schema.get("anyOf", [schema])
        shape = next(v for v in variants if v.get("type") != "null")
        optional = any(v.get("type") == "null" for v in variants)
        yield SettingField(
            key=prefix + name,
            kind=_kind(shape),
            allowed=_allowed(shape),
            optional=optional,
            secret=bool(shape.get("writeOnly")),
            default=None if info.default is PydanticUndefined else info.default,
            description=info.description or "",
        )
    for fields in nested:
        yield from fields


def _kind(shape: Mapping[str, Any]) -> str:
    if "enum" in shape:
        return "choice"
    if shape.get("format") == "path":
        return "path"
    if shape["type"] == "array":
        items = shape.get("items", {})
        return f"list of {', '.join(map(str, items['enum']))}" if "enum" in items else f"list of {items.get('type', 'string')}s"
    return str(shape["type"])


def _allowed(shape: Mapping[str, Any]) -> str:
    if "enum" in shape:
        return "one of " + ", ".join(map(str, shape["enum"]))
    text = _kind(shape)
    low, above = shape.get("minimum"), shape.get("exclusiveMinimum")
    high, below = shape.get("maximum"), shape.get("exclusiveMaximum")
    if low is not None and high is not None:
        text += f" from {_plain(low)} to {_plain(high)}"
    else:
        bounds = (("at least", low), ("above", above), ("at most", high), ("below", below))
        text += ",".join(f" {word} {_plain(bound)}" for word, bound in bounds if bound is not None)
    if "multipleOf" in shape:
        text += f", a multiple of {shape['multipleOf']}"
    if "maxLength" in shape:
        text += f" of {shape.get('minLength', 0)} to {shape['maxLength']} characters"
    return text


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)
