"""The tree as TOML and as documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.configuration import load
from appliance.settings import Settings
from appliance.settings_reference import as_markdown, as_toml, setting_fields, toml_value

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_reference_is_current() -> None:
    """docs/settings.md is what `appliance config --markdown` prints."""
    assert (ROOT / "docs/settings.md").read_text() == as_markdown(), "run: appliance config --markdown > docs/settings.md"


def test_every_setting_is_described() -> None:
    """Each leaf has a sentence and a range."""
    for field in setting_fields().values():
        assert field.description.endswith("."), field.key
        assert field.allowed, field.key


def test_what_config_prints_loads_to_the_same_tree(tmp_path: Path) -> None:
    """The printed TOML is a settings file with the same meaning."""
    environ = {"APPLIANCE_SERVER__PORT": "9", "APPLIANCE_SLO__TTFT_SECONDS": "1e-5", "APPLIANCE_FLEET": 'a"b\\c\x7f\u00e9\U0001f600'}
    loaded = load([], environ)
    file = tmp_path / "printed.toml"
    file.write_text(as_toml(loaded.settings, loaded.sources))
    assert load([], {}, file).settings == loaded.settings
    assert "port = 9  # environment APPLIANCE_SERVER__PORT" in file.read_text()


def test_secrets_are_masked_in_print() -> None:
    """No secret's value is in the printed settings, and the mask is a comment, so that it is not loaded as one."""
    loaded = load([], {"APPLIANCE_SERVER__API_KEY": "hunter2", "APPLIANCE_STORE__URL": "postgresql+asyncpg://u:hunter2@h/d"})
    text = as_toml(loaded.settings, loaded.sources)
    assert "hunter2" not in text
    assert '# api_key = "********"  # environment APPLIANCE_SERVER__API_KEY' in text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_string_survives_toml(text: str) -> None:
    """Quotes, control characters and emoji come back as they were."""
    import tomllib

    assert tomllib.loads(f"x = {toml_value(text)}")["x"] == text


@pytest.mark.parametrize(("value", "text"), [(True, "true"), (3, "3"), (0.5, "0.5"), (("a", "b"), '["a", "b"]'), (Path("/x"), '"/x"')])
def test_values_in_toml(value: object, text: str) -> None:
    """Each kind of value in TOML's form."""
    assert toml_value(value) == text


def test_the_default_tree_passes_its_own_checks() -> None:
    """The defaults are a valid configuration."""
    assert load([], {}).settings == Settings()
