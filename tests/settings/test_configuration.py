"""Reading the settings: layers, sources, and every problem at once."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from appliance.configuration import Loaded, Override, load
from appliance.errors import ConfigError, ConfigProblem
from appliance.settings import Settings
from appliance.settings_reference import setting_fields, value_at

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()


def problems(overrides: list[Override] | None = None, environ: dict[str, str] | None = None, file: Path | None = None) -> dict[str, ConfigProblem]:
    """The problems of a load that must fail, by key."""
    with pytest.raises(ConfigError) as caught:
        load(overrides or [], environ or {}, file)
    return {problem.key: problem for problem in caught.value.problems}


def write(folder: Path, text: str) -> Path:
    """A settings file."""
    path = folder / "appliance.toml"
    path.write_text(text)
    return path


def test_without_anything_the_defaults_hold() -> None:
    """No file, no variable, no flag: the tree's defaults, and no source but the default."""
    assert load([], {}) == Loaded(Settings(), {})


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    """Each layer wins over the one below it, and the source says which it was."""
    file = write(tmp_path, 'fleet = "f"\n[server]\nport = 1\nmax_choices = 2\ndrain_seconds = 3\n')
    environ = {"APPLIANCE_SERVER__PORT": "10", "APPLIANCE_SERVER__MAX_CHOICES": "20", "HOME": "/"}
    loaded = load([Override("server.port", "100", "--port")], environ, file)
    assert (loaded.settings.server.port, loaded.settings.server.max_choices, loaded.settings.server.drain_seconds) == (100, 20, 3.0)
    assert loaded.settings.fleet == "f"
    assert loaded.sources == {
        "fleet": f"file {file}",
        "server.port": "flag --port",
        "server.max_choices": "environment APPLIANCE_SERVER__MAX_CHOICES",
        "server.drain_seconds": f"file {file}",
    }


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    """$APPLIANCE_CONFIG names the file where --config does not."""
    file = write(tmp_path, "[server]\nport = 1234\n")
    assert load([], {"APPLIANCE_CONFIG": str(file)}).settings.server.port == 1234


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    """Bad values of all layers, unknown keys and broken relations come together, each with value, allowed range and source."""
    file = write(
        tmp_path, "[server]\nport = 99999\nprot = 1\n[slo]\ntarget = 1.0\n[scaling]\nmin_replicas = 9\nmax_replicas = 2\n[nonsense]\na = 1\n"
    )
    environ = {"APPLIANCE_ENGINE__BLOCK_SIZE": "17", "APPLIANCE_LOG__LEVEL": "loud", "APPLIANCE_STORE__QUEUE_ROWS": "many"}
    found = problems([Override("engine.device", "tpu", "--device")], environ, file)
    assert set(found) == {
        "server.port", "server.prot", "slo.target", "scaling.min_replicas", "nonsense", "engine.block_size", "log.level", "store.queue_rows",
        "engine.device",
    }  # fmt: skip
    assert found["server.port"] == ConfigProblem("server.port", "99999", "integer from 0 to 65535", f"file {file}")
    assert found["server.prot"].allowed == "unknown key; did you mean server.port?"
    assert found["slo.target"].allowed == "number above 0, below 1"
    assert found["engine.block_size"].allowed == "integer from 8 to 256, a multiple of 8"
    assert found["engine.block_size"].source == "environment APPLIANCE_ENGINE__BLOCK_SIZE"
    assert found["engine.device"] == ConfigProblem("engine.device", '"tpu"', "one of auto, cpu, cuda", "flag --device")
    assert found["scaling.min_replicas"].allowed == "at most scaling.max_replicas (2)"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[server]\nport = true\n", "server.port"),
        ('[server]\nport = "8000"\n', "server.port"),
        ("[log]\nprompts = 1\n", "log.prompts"),
        ("[server]\ndrain_seconds = nan\n", "server.drain_seconds"),
        ("[server]\ndrain_seconds = inf\n", "server.drain_seconds"),
        ("[scaling]\nwebhook_urls = [1]\n", "scaling.webhook_urls"),
        ("[server.port]\nx = 1\n", "server.port"),
        ("server = 1\n", "server"),
        ("port = 1\n", "port"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(tmp_path: Path, text: str, key: str) -> None:
    """TOML has types, and one that does not fit is an error rather than converted."""
    assert list(problems(file=write(tmp_path, text))) == [key]


@pytest.mark.parametrize("text", ["[server\n", "a = \x00", "x"])
def test_a_file_that_is_no_toml_is_one_problem(tmp_path: Path, text: str) -> None:
    """A syntax error is reported with the file's name, not as a traceback."""
    file = write(tmp_path, text)
    assert str(file) in problems(file=file)["--config"].value


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    """A file that was named must be there."""
    assert "No such file" in problems(file=tmp_path / "absent.toml")["--config"].allowed


def test_an_unknown_variable_is_refused_but_other_programs_are_left_alone() -> None:
    """APPLIANCE_ variables must be settings; the value is not echoed, since it may be a misspelt secret. Other variables are not ours."""
    found = problems(environ={"APPLIANCE_SERVER__API_KEYY": "hunter2", "OTHER": "1", "APPLIANCE_TEST_STATE": "/x", "APPLIANCE_CACHE_DIR": "/x"})
    assert list(found) == ["server.api_keyy"]
    assert "hunter2" not in str(found)
    assert "server.api_key?" in found["server.api_keyy"].allowed


def test_text_means_what_a_person_means() -> None:
    """From variables: numbers, booleans, comma lists, JSON lists, and "" for `chosen at start`."""
    environ = {
        "APPLIANCE_LOG__PROMPTS": "true",
        "APPLIANCE_SCALING__WEBHOOK_URLS": "http://a/x, https://b/y",
        "APPLIANCE_SCALING__WEBHOOK_SECRET": SECRET,
        "APPLIANCE_ENGINE__NUM_BLOCKS": "",
        "APPLIANCE_SLO__TTFT_SECONDS": "0.25",
    }
    settings = load([Override("model.context_length", "4096", "--context-length")], environ).settings
    assert settings.log.prompts is True
    assert settings.scaling.webhook_urls == ("http://a/x", "https://b/y")
    assert settings.engine.num_blocks is None
    assert (settings.slo.ttft_seconds, settings.model.context_length) == (0.25, 4096)
    as_json = load([], environ | {"APPLIANCE_SCALING__WEBHOOK_URLS": '["http://a/x"]'}).settings
    assert as_json.scaling.webhook_urls == ("http://a/x",)


def test_every_setting_can_be_given_in_every_way(tmp_path: Path) -> None:
    """Each leaf of the tree is reached by its variable and, unless it is a secret, by a flag."""
    for key, field in setting_fields().items():
        value = value_at(Settings(), key)
        if value is None or field.kind.startswith("list"):
            continue
        assert load([], {field.env: str(value)}).sources[key] == f"environment {field.env}"
        assert load([Override(key, str(value), f"--{key}")], {}).sources[key] == f"flag --{key}"


@pytest.mark.parametrize("key", ["server.api_key", "scaling.webhook_secret", "store.url"])
def test_secrets_are_not_taken_from_flags_nor_printed(key: str) -> None:
    """A command line can be read by every user: a secret there is refused, and its value is masked in what is printed."""
    found = problems([Override(key, "hunter2", f"--{key}")])
    assert "hunter2" not in str(found)
    assert setting_fields()[key].env in found[key].allowed


def test_other_addresses_than_loopback_need_a_key(tmp_path: Path) -> None:
    """An open server is for this machine only; with a key it may face the network."""
    keys = tmp_path / "keys"
    keys.write_text("ops:sk-1\n")
    for host in ("0.0.0.0", "::", "192.168.1.2", "example"):
        assert list(problems(environ={"APPLIANCE_SERVER__HOST": host})) == ["server.host"]
        assert load([], {"APPLIANCE_SERVER__HOST": host, "APPLIANCE_SERVER__API_KEY": "sk-1"}).settings.server.host == host
        assert load([], {"APPLIANCE_SERVER__HOST": host, "APPLIANCE_SERVER__API_KEYS_FILE": str(keys)}).settings.server.host == host
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert load([], {"APPLIANCE_SERVER__HOST": host}).settings.server.host == host


def test_key_files_must_hold_a_key(tmp_path: Path) -> None:
    """A file that is absent or empty would close the API to everybody, or open it: neither is meant."""
    empty = tmp_path / "keys"
    empty.write_text("# nobody yet\n\n")
    assert "at least one" in problems(environ={"APPLIANCE_SERVER__API_KEYS_FILE": str(empty)})["server.api_keys_file"].allowed
    assert "No such file" in problems(environ={"APPLIANCE_SERVER__API_KEYS_FILE": str(tmp_path / "no")})["server.api_keys_file"].allowed


@pytest.mark.parametrize(
    "secret", ["abc", "whsec_", "whsec_!!!", "whsec_" + base64.b64encode(b"x" * 23).decode(), "whsec_" + base64.b64encode(b"x" * 65).decode(), " "]
)
def test_webhook_secrets_have_a_form(secret: str) -> None:
    """`whsec_` and base64 of 24 to 64 bytes; the value does not appear in the message."""
    found = problems(environ={"APPLIANCE_SCALING__WEBHOOK_SECRET": secret})
    assert found["scaling.webhook_secret"].value == "********"


def test_webhook_secrets_may_rotate() -> None:
    """Several secrets, separated by spaces, are one setting."""
    environ = {"APPLIANCE_SCALING__WEBHOOK_SECRET": f"{SECRET} {SECRET}"}
    assert load([], environ).sources == {"scaling.webhook_secret": "environment APPLIANCE_SCALING__WEBHOOK_SECRET"}


def test_acting_needs_somewhere_to_deliver_to_and_a_secret() -> None:
    """`act` without URL and secret, and URLs without a secret, are refused."""
    assert set(problems(environ={"APPLIANCE_SCALING__MODE": "act"})) == {"scaling.mode", "scaling.webhook_secret"}
    assert set(problems(environ={"APPLIANCE_SCALING__WEBHOOK_URLS": "http://h/x"})) == {"scaling.webhook_secret"}
    bad = {"APPLIANCE_SCALING__WEBHOOK_URLS": "ftp://h/x,http://", "APPLIANCE_SCALING__WEBHOOK_SECRET": SECRET}
    assert set(problems(environ=bad)) == {"scaling.webhook_urls"}


@pytest.mark.parametrize(
    "url", ["http://ops:hunter2@h/x", "https://ops@h/x", "http://ops:hun/ter2@h/x", "ops:hunter2@h", "http://h:0/x", "http://h:99999/x"]
)
def test_webhook_urls_carry_no_password(url: str) -> None:
    """URLs are stored in SQL and printed in logs: one with a user or password is refused by its place in the list, and shown only without one."""
    environ = {"APPLIANCE_SCALING__WEBHOOK_URLS": f"http://fine/x,{url}", "APPLIANCE_SCALING__WEBHOOK_SECRET": SECRET}
    with pytest.raises(ConfigError) as caught:
        load([], environ)
    assert [problem.key for problem in caught.value.problems] == ["scaling.webhook_urls"]
    assert "ter2" not in str(caught.value)
    assert (url in str(caught.value)) == ("@" not in url)
    assert "without user or password (the receiver knows the sender by its signature), unlike number 2" in str(caught.value)


def test_a_webhook_url_that_is_no_list_is_not_printed_with_its_password(tmp_path: Path) -> None:
    """The type is wrong before the rule is asked."""
    found = problems(file=write(tmp_path, '[scaling]\nwebhook_urls = "http://ops:hunter2@h/x"\n'))
    assert "hunter2" not in str(found)


def test_signals_need_the_store() -> None:
    """What is delivered or approved is kept in SQL: without it the loop would decide and nobody would ever hear."""
    ready = {"APPLIANCE_STORE__ENABLED": "false", "APPLIANCE_SCALING__WEBHOOK_URLS": "http://h/x", "APPLIANCE_SCALING__WEBHOOK_SECRET": SECRET}
    for mode in ("act", "approve"):
        found = problems(environ=ready | {"APPLIANCE_SCALING__MODE": mode})
        assert list(found) == ["scaling.mode"]
        assert found["scaling.mode"].value == mode
        assert "store.enabled" in found["scaling.mode"].allowed
        assert load([], ready | {"APPLIANCE_SCALING__MODE": mode, "APPLIANCE_STORE__ENABLED": "true"}).settings.scaling.mode == mode
    for mode in ("off", "advise"):
        assert load([], ready | {"APPLIANCE_SCALING__MODE": mode}).settings.scaling.mode == mode


def test_signals_need_measurements() -> None:
    """Without metrics there is no policy loop: a mode that promises signals is a mistake, the default one is not."""
    ready = {"APPLIANCE_METRICS__ENABLED": "false", "APPLIANCE_SCALING__WEBHOOK_URLS": "http://h/x", "APPLIANCE_SCALING__WEBHOOK_SECRET": SECRET}
    for mode in ("act", "approve"):
        found = problems(environ=ready | {"APPLIANCE_SCALING__MODE": mode})
        assert list(found) == ["scaling.mode"]
        assert "metrics.enabled" in found["scaling.mode"].allowed
    assert load([], ready).settings.scaling.mode == "advise"


def test_a_check_is_silent_where_its_setting_is_already_wrong() -> None:
    """A value out of range is one problem, not also a broken relation with the default that stands in for it."""
    found = problems(environ={"APPLIANCE_SCALING__MAX_REPLICAS": "0", "APPLIANCE_SCALING__MIN_REPLICAS": "9"})
    assert list(found) == ["scaling.max_replicas"]


def test_databases_need_an_async_driver() -> None:
    """Another URL is refused before anything connects, and its password is not printed."""
    found = problems(environ={"APPLIANCE_STORE__URL": "postgresql://u:hunter2@h/d"})
    assert "postgresql+asyncpg://" in found["store.url"].allowed
    assert "hunter2" not in str(found)
    found = problems(environ={"APPLIANCE_STORE__URL": "postgresql+asyncpg://u:hunter2@h:port/d"})
    assert "number as port" in found["store.url"].allowed
    assert "hunter2" not in str(found)


def test_systemd_credentials_are_picked_up(tmp_path: Path) -> None:
    """LoadCredential= files fill their settings; the environment still wins."""
    (tmp_path / "api-keys").write_text("ops:sk-1\n")
    (tmp_path / "webhook-secret").write_text(SECRET + "\n")
    loaded = load([], {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert loaded.settings.server.api_keys_file == tmp_path / "api-keys"
    assert loaded.settings.scaling.webhook_secret is not None
    assert loaded.settings.scaling.webhook_secret.get_secret_value() == SECRET
    assert loaded.sources["server.api_keys_file"] == "credential api-keys"
    other = tmp_path / "other"
    other.write_text("a:b\n")
    assert load([], {"CREDENTIALS_DIRECTORY": str(tmp_path), "APPLIANCE_SERVER__API_KEYS_FILE": str(other)}).settings.server.api_keys_file == other
