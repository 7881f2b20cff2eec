"""Every knob: a flag beats its variable, a variable beats the default, and errors name which of them was wrong."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from predictor.cli import app, serve
from predictor.errors import ConfigurationError
from predictor.settings import PREFIX, Settings, flag, load_settings


@pytest.fixture(autouse=True)
def _no_variables_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.upper().startswith(PREFIX)]:
        monkeypatch.delenv(variable)


def refusal(flags: dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(flags)
    return str(caught.value)


def test_defaults_are_what_the_documents_say() -> None:
    settings = load_settings({})
    assert settings.models == [("aitextgen", "models/bard")]
    assert (settings.port, settings.queue_limit, settings.grace_period_s) == (8080, 512, 30)
    assert (settings.backend, settings.dtype, settings.device) == ("engine", "auto", "auto")


def test_flag_beats_variable_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings({"port": None}).port == 8080
    monkeypatch.setenv("PREDICTOR_PORT", "9001")
    assert load_settings({"port": None}).port == 9001
    assert load_settings({"port": 9002}).port == 9002


SET = {
    "model": ("m=some/folder", ("m=some/folder",)),
    "revision": ("v1.0", "v1.0"),
    "backend": ("transformers", "transformers"),
    "dtype": ("bfloat16", "bfloat16"),
    "device": ("cuda:1", "cuda:1"),
    "host": ("127.0.0.1", "127.0.0.1"),
    "port": ("9000", 9000),
    "grace_period_s": ("5", 5),
    "kv_memory_mib": ("64", 64),
    "max_running": ("7", 7),
    "queue_limit": ("8", 8),
    "prefill_chunk_tokens": ("16", 16),
    "step_tokens": ("32", 32),
    "speculation": ("false", False),
    "draft": ("some/folder", "some/folder"),
    "compat": ("seldon, nanogpt", ("seldon", "nanogpt")),
    "cors": ("https://a.example https://b.example", ("https://a.example", "https://b.example")),
    "jobs": ("redis://queue:6379/0", "redis://queue:6379/0"),
    "job_concurrency": ("0", 0),
    "job_limit": ("5", 5),
    "job_expiry_s": ("60", 60),
    "webhook_host": ("a.example", ("a.example",)),
    "api_keys": ("keys.txt", "keys.txt"),
    "admin_key": ("admin.txt", "admin.txt"),
    "rate_limit": ("30", 30),
    "banned": ("banned.txt", "banned.txt"),
    "strikes": ("3", 3),
    "strikes_expiry_s": ("60", 60),
    "chat_template": ("chat.jinja", "chat.jinja"),
    "max_instances": ("3", 3),
    "max_body_bytes": ("4096", 4096),
    "timeout_s": ("1.5", 1.5),
    "threads": ("2", 2),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
}


def test_every_setting_is_tried() -> None:
    assert set(SET) == set(Settings.model_fields)


@pytest.mark.parametrize("name", SET)
def test_every_setting_has_a_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = SET[name]
    monkeypatch.setenv(PREFIX + name.upper(), text)
    if name.startswith("strikes"):  # of no use without
        monkeypatch.setenv("PREDICTOR_BANNED", "banned.txt")
    assert getattr(load_settings({}), name) == value


def test_every_setting_is_a_flag_of_serve() -> None:
    assert set(inspect.signature(serve).parameters) == set(Settings.model_fields)


def test_settings_cannot_be_changed_while_running() -> None:
    settings = load_settings({})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


# setting, a value outside its limits, the limit
OUTSIDE = [
    ("port", 0, "1"),
    ("port", 65536, "65535"),
    ("grace_period_s", 0, "1"),
    ("grace_period_s", 3601, "3600"),
    ("kv_memory_mib", 0, "1"),
    ("max_running", 0, "1"),
    ("max_running", 4097, "4096"),
    ("queue_limit", 0, "1"),
    ("queue_limit", 100_001, "100000"),
    ("prefill_chunk_tokens", 0, "1"),
    ("prefill_chunk_tokens", 65537, "65536"),
    ("step_tokens", 0, "1"),
    ("step_tokens", 65537, "65536"),
    ("max_instances", 0, "1"),
    ("max_instances", 4097, "4096"),
    ("max_body_bytes", 1023, "1024"),
    ("max_body_bytes", 2**30 + 1, str(2**30)),
    ("timeout_s", 0, "0"),
    ("timeout_s", 3600.5, "3600"),
    ("timeout_s", float("nan"), "3600"),
    ("timeout_s", float("inf"), "3600"),
    ("threads", 0, "1"),
    ("threads", 1025, "1024"),
    ("job_concurrency", -1, "0"),
    ("job_limit", 0, "1"),
    ("job_expiry_s", 0, "1"),
    ("rate_limit", 0, "1"),
    ("strikes", 0, "1"),
    ("strikes_expiry_s", 0, "1"),
    ("jobs", "mysql://x", "redis"),
    ("jobs", "none://x", "none"),
    ("compat", "bert", "'seldon'"),
    ("backend", "tensorflow", "'engine', 'transformers' or 'aitextgen'"),
    ("dtype", "int4", "'float32'"),
    ("log_level", "loud", "'debug'"),
    ("log_format", "xml", "'json'"),
]


@pytest.mark.parametrize(("name", "value", "limit"), OUTSIDE)
def test_outside_its_limits_the_flag_is_named(name: str, value: object, limit: str) -> None:
    message = refusal({name: value})
    assert message.startswith(f"{flag(name)} must be ")
    assert limit in message
    assert str(value) in message


@pytest.mark.parametrize(("name", "value", "limit"), OUTSIDE)
def test_outside_its_limits_the_variable_is_named(
    name: str, value: object, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PREFIX + name.upper(), str(value))
    message = refusal({})
    assert message.startswith(f"{PREFIX}{name.upper()} must be ")
    assert limit in message
    assert str(value) in message


@pytest.mark.parametrize("value", ["", "eighty", "80.5", "0x50"])
def test_a_variable_that_is_no_number_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_PORT", value)
    assert refusal({}).startswith("PREDICTOR_PORT must be ")


def test_a_flag_hides_the_variable_it_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_PORT", "not a port")
    assert load_settings({"port": 9002}).port == 9002


@pytest.mark.parametrize(
    ("model", "name", "source"),
    [
        ("aitextgen=models/bard", "aitextgen", "models/bard"),
        ("a=openai-community/gpt2-xl", "a", "openai-community/gpt2-xl"),
        ("gpt2-v1.0_b=/srv/m", "gpt2-v1.0_b", "/srv/m"),
        ("m=/srv/a=b c", "m", "/srv/a=b c"),
        ("7=~/x", "7", "~/x"),
    ],
)
def test_a_model_is_a_name_and_a_source(model: str, name: str, source: str) -> None:
    settings = load_settings({"model": model})
    assert settings.models == [(name, source)]


@pytest.mark.parametrize("model", ["", "gpt2", "=gpt2", "name=", "a b=c", "a/b=c", "-a=b", ".=b", "é=b", "a:b=c"])
def test_a_model_without_name_or_source_is_refused(model: str) -> None:
    message = refusal({"model": model})
    assert message.startswith("--model must be NAME=SOURCE")
    assert repr(model) in message


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("PREDICTOR_PROT", "PREDICTOR_PORT"),
        ("PREDICTOR_MODEL_NAME", "PREDICTOR_MODEL"),
        ("PREDICTOR_TIMEOUT", "PREDICTOR_TIMEOUT_S"),
        ("predictor_prot", "PREDICTOR_PORT"),
    ],
)
def test_an_unknown_variable_is_refused_with_a_hint(variable: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    message = refusal({})
    assert variable in message
    assert "no setting" in message
    assert message.endswith(f"did you mean {hint}?")


def test_an_unknown_variable_like_none_of_ours_is_refused_without_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_ZZZZZZZZZZZZZZZZZZZZZZZZZ", "1")
    assert "did you mean" not in refusal({})


def test_variables_of_others_are_let_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTORS_PORT", "1")
    monkeypatch.setenv("MY_PREDICTOR_PORT", "1")
    monkeypatch.setenv("PREDICTOR", "1")
    assert load_settings({}).port == 8080


# What Kubernetes 1.2x puts into every container of a namespace that holds a Service called predictor.
SERVICE_LINKS = {
    "PREDICTOR_SERVICE_HOST": "10.96.0.9",
    "PREDICTOR_SERVICE_PORT": "80",
    "PREDICTOR_SERVICE_PORT_HTTP": "80",
    "PREDICTOR_PORT": "tcp://10.96.0.9:80",
    "PREDICTOR_PORT_80_TCP": "tcp://10.96.0.9:80",
    "PREDICTOR_PORT_80_TCP_PROTO": "tcp",
    "PREDICTOR_PORT_80_TCP_PORT": "80",
    "PREDICTOR_PORT_80_TCP_ADDR": "10.96.0.9",
}


@pytest.mark.parametrize("variable", [name for name in SERVICE_LINKS if name != "PREDICTOR_PORT"])
def test_a_variable_of_kubernetes_service_links_is_explained(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, SERVICE_LINKS[variable])
    message = refusal({})
    assert variable in message
    assert "enableServiceLinks: false" in message


def test_all_variables_of_kubernetes_service_links_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whichever of them is found first.
    for variable in reversed(SERVICE_LINKS):
        monkeypatch.setenv(variable, SERVICE_LINKS[variable])
        assert "enableServiceLinks: false" in refusal({})


# The command line.


def run(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, [*arguments], env=environment, terminal_width=120)


def test_serve_help_lists_every_setting_with_its_variable() -> None:
    result = run("serve", "--help")
    assert result.exit_code == 0
    told = " ".join(result.output.split())
    for name, field in Settings.model_fields.items():
        assert f"{flag(name)} " in told
        assert f"[env: {PREFIX}{name.upper()}]" in told
        assert field.description in told
        if field.default is not None:
            shown = " ".join(field.default) if isinstance(field.default, tuple) else field.default
            if shown:
                assert f"[default: {shown}]" in told


def test_help_tells_a_stranger_the_commands() -> None:
    told = run("--help").output
    assert "serve" in told
    assert "generate" in told
    assert "temperature" in run("generate", "--help").output


def test_several_models_have_names_of_their_own() -> None:
    settings = load_settings({"model": ["a=x", "b=y"]})
    assert settings.models == [("a", "x"), ("b", "y")]
    assert "name of its own" in refusal({"model": ["a=x", "a=y"]})


def test_several_models_in_a_variable_are_separated_by_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_MODEL", "a=my models/x b=y")
    assert load_settings({}).models == [("a", "my models/x"), ("b", "y")]


@pytest.mark.parametrize("name", ["revision", "draft"])
def test_what_belongs_to_one_model_is_refused_beside_another(name: str) -> None:
    assert flag(name) in refusal({"model": ["a=x", "b=y"], name: "main"})


@pytest.mark.parametrize("name", ["strikes", "strikes_expiry_s"])
def test_strikes_need_banned_prompts(name: str) -> None:
    assert flag(name) in refusal({name: 5})


@pytest.mark.parametrize("host", ["https://a.example", "a.example:8080", "a.example/x", "", "-a"])
def test_a_webhooks_host_is_a_host(host: str) -> None:
    assert refusal({"webhook_host": [host]}).startswith("--webhook-host must be a host")


def test_an_older_server_that_is_named_twice_is_answered_once() -> None:
    assert load_settings({"compat": "seldon,nanogpt,seldon"}).compat == ("seldon", "nanogpt")


def test_no_older_server_is_answered_when_none_is_named() -> None:
    assert load_settings({"compat": "none"}).compat == ()


@pytest.mark.parametrize(
    ("jobs", "redis"),
    [
        (None, None),
        ("none", None),
        ("sqlite:///x/redis://y", None),
        ("redis://q:6379/0", "redis://q:6379/0"),
        ("rediss://q", "rediss://q"),
    ],
)
def test_replicas_share_a_redis_where_jobs_name_one(jobs: str | None, redis: str | None) -> None:
    assert load_settings({"jobs": jobs}).redis == redis


def test_an_unknown_flag_is_a_usage_error() -> None:
    result = run("serve", "--no-such-flag")
    assert result.exit_code == 2
    assert "--no-such-flag" in result.output


def python_m_predictor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "predictor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_python_m_predictor_serves_the_same_help() -> None:
    done = python_m_predictor("serve", "--help", COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert "PREDICTOR_QUEUE_LIMIT" in done.stdout


def test_a_wrong_setting_is_one_line_on_stderr_and_exit_code_1() -> None:
    done = python_m_predictor("serve", "--backend", "tensorflow", PREDICTOR_PORT="9000")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: --backend must be 'engine', 'transformers' or 'aitextgen', got 'tensorflow'"
    ]
    done = python_m_predictor("serve", PREDICTOR_PROT="9000")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: the variable PREDICTOR_PROT is no setting of this server; did you mean PREDICTOR_PORT?"
    ]
