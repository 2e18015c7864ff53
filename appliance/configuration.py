"""Reads the settings once: TOML file < environment < flags, with every problem reported at once and the source of every value kept."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from appliance.configuration_checks import cross_checks
from appliance.errors import ConfigError, ConfigProblem
from appliance.settings import Settings
from appliance.settings_reference import MASK, SettingField, setting_fields
from appliance.webhook_urls import printable

ENV_PREFIX = "APPLIANCE_"
CONFIG_VARIABLE = "APPLIANCE_CONFIG"
# Variables of ours that are no settings: the file's path, what the CPU kernels' build reads (kernels/cpu/build.py), and what the test suite does.
_OTHER_VARIABLES = (CONFIG_VARIABLE, "APPLIANCE_CACHE_DIR", "APPLIANCE_CPU_ARCHITECTURE", "APPLIANCE_TEST_")
# systemd's LoadCredential= names -> the setting they fill. `path`: the setting is the file itself; else its content.
_CREDENTIALS = {"api-keys": ("server.api_keys_file", True), "webhook-secret": ("scaling.webhook_secret", False), "store-url": ("store.url", False)}


@dataclass(frozen=True, slots=True)
class Override:
    """One setting given on the command line: its dotted key, the text, and the flag's name as it was typed."""

    key: str
    value: str
    flag: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings in effect, and where each came from: `default`, `file PATH`, `environment NAME`, `credential NAME` or `flag --NAME`."""

    settings: Settings
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Given:
    """A raw value and its source; the last one of a key wins."""

    key: str
    value: Any
    source: str


def load(overrides: Iterable[Override], environ: Mapping[str, str], config_file: Path | None = None) -> Loaded:
    """The settings in effect. Raises ConfigError with every problem found; nothing is read twice and nothing is started.

    `config_file` None takes the path of $APPLIANCE_CONFIG, if that is set; without either there is no file.
    """
    problems: list[ConfigProblem] = []
    if config_file is None and environ.get(CONFIG_VARIABLE):
        config_file = Path(environ[CONFIG_VARIABLE])
    given: dict[str, _Given] = {}
    for layer in (
        _from_file(config_file, problems),
        _from_credentials(environ, problems),
        _from_environment(environ),
        _from_flags(overrides, problems),
    ):
        for item in layer:
            if item.key in setting_fields():
                given[item.key] = item
            else:
                problems.append(_unknown(item))
    settings, failed = _validate(given, problems)
    sources = {key: item.source for key, item in given.items()}
    problems += cross_checks(settings, sources, failed)
    if problems:
        raise ConfigError(problems)
    return Loaded(settings, sources)


def _from_file(path: Path | None, problems: list[ConfigProblem]) -> Iterator[_Given]:
    """The leaves of a TOML file. Tables that are no section are reported as unknown keys."""
    if path is None:
        return
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(
            ConfigProblem("--config", str(path), f"a readable TOML file ({getattr(error, 'strerror', None) or error})", "command line or environment")
        )
        return
    except tomllib.TOMLDecodeError as error:
        problems.append(ConfigProblem("--config", str(path), f"valid TOML: {error}", f"file {path}"))
        return
    yield from _leaves(tree, "", f"file {path}")


def _leaves(table: Mapping[str, Any], prefix: str, source: str) -> Iterator[_Given]:
    sections = {key.rpartition(".")[0] for key in setting_fields()}
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and key in sections:
            yield from _leaves(value, key + ".", source)
        else:
            yield _Given(key, value, source)


def _from_credentials(environ: Mapping[str, str], problems: list[ConfigProblem]) -> Iterator[_Given]:
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return
    for name, (key, is_path) in _CREDENTIALS.items():
        path = Path(directory) / name
        try:
            if path.is_file():
                yield _Given(key, str(path) if is_path else path.read_text(encoding="utf-8").strip(), f"credential {name}")
        except OSError as error:
            problems.append(ConfigProblem(key, str(path), f"a readable credential ({error.strerror})", f"credential {name}"))


def _from_environment(environ: Mapping[str, str]) -> Iterator[_Given]:
    for name, text in sorted(environ.items()):
        if name.startswith(ENV_PREFIX) and not name.startswith(_OTHER_VARIABLES):
            key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            yield _Given(key, _from_text(setting_fields().get(key), text), f"environment {name}")


def _from_flags(overrides: Iterable[Override], problems: list[ConfigProblem]) -> Iterator[_Given]:
    for override in overrides:
        field = setting_fields().get(override.key)
        source = f"flag {override.flag}"
        if field is not None and field.secret:
            allowed = f"no secret on a command line, where every user of the machine can read it: use {field.env} or the file"
            problems.append(ConfigProblem(override.key, MASK, allowed, source))
        else:
            yield _Given(override.key, _from_text(field, override.value), source)


def _from_text(field: SettingField | None, text: str) -> Any:
    """What a variable or flag means: "" is None where that is allowed; a list is JSON or has commas. Pydantic reads numbers and booleans itself."""
    if field is None:
        return text
    if text == "" and field.optional:
        return None
    if field.kind.startswith("list"):
        if text.lstrip().startswith("["):
            try:
                return json.loads(text)
            except ValueError:
                return text
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _validate(given: Mapping[str, _Given], problems: list[ConfigProblem]) -> tuple[Settings, frozenset[str]]:
    """The tree with every value that is in order, and the keys that are not (each is a problem, and has its default in the tree)."""
    failed: set[str] = set()
    for item in given.values():
        field = setting_fields()[item.key]
        if _wrong_type(field, item):
            failed.add(item.key)
            problems.append(_out_of_range(item))
    while True:
        try:
            return Settings.model_validate(_nest(item for item in given.values() if item.key not in failed)), frozenset(failed)
        except ValidationError as error:
            keys = {_key_of(detail["loc"]) for detail in error.errors(include_url=False)}
            if keys & failed or not keys <= given.keys():
                raise
            failed |= keys
            problems += [_out_of_range(given[key]) for key in sorted(keys)]


def _wrong_type(field: SettingField, item: _Given) -> bool:
    """Whether a TOML value is of a kind that pydantic would convert but the file's author did not mean: true for 1, "8000" for 8000, 1 for true."""
    if not item.source.startswith("file "):
        return False
    if field.kind in ("integer", "number"):
        return isinstance(item.value, bool | str)
    return field.kind == "boolean" and not isinstance(item.value, bool)


def _key_of(loc: tuple[int | str, ...]) -> str:
    """The dotted key of an error's location, without the index of a list item or the branch of a union."""
    parts: list[str] = []
    for part in loc:
        parts.append(str(part))
        if ".".join(parts) in setting_fields():
            break
    return ".".join(parts)


def _nest(items: Iterable[_Given]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for item in items:
        *sections, name = item.key.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = item.value
    return tree


def _out_of_range(item: _Given) -> ConfigProblem:
    field = setting_fields()[item.key]
    text = MASK if field.secret else printable(json.dumps(item.value, ensure_ascii=False, default=str))
    return ConfigProblem(item.key, text, field.allowed, item.source)


def _unknown(item: _Given) -> ConfigProblem:
    """No such key. Its value may be a secret under a misspelt name, so it is not printed."""
    near = difflib.get_close_matches(item.key, setting_fields(), n=1, cutoff=0.6)
    if not near:
        name = item.key.rpartition(".")[2]
        near = [key for key in setting_fields() if key.rpartition(".")[2] == name][:1]
    hint = f"unknown key; did you mean {near[0]}?" if near else "unknown key; `appliance config` prints all there are"
    return ConfigProblem(item.key, MASK, hint, item.source)
