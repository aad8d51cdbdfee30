"""A secret is filled in where it is used, and stands in nothing that is written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ranksearch.config import literal_passwords, load_space, parse_space
from ranksearch.engine import reason
from ranksearch.errors import ModelError, SpaceError, StudyError
from ranksearch.factory import call_factory
from ranksearch.secrecy import adopt, bundle, filled, has_password, looks_secret, redacted
from ranksearch.setting import Setting
from ranksearch.space import TrackingSpec
from ranksearch.storage import Store
from ranksearch.tracking.store import store_uri
from tests.studies import setting_of, space_of

SECRET = "Pa55word-of-mine"


@pytest.mark.parametrize(
    "text",
    [
        f"cannot reach postgresql://me:{SECRET}@host:5432/db",
        f"postgresql+psycopg2://me:{SECRET}@host/db and http://other.example",
        f"could not connect: password={SECRET} host=db",
        f'{{"api_key": "{SECRET}"}}',
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"x-ray-authorization: Bearer {SECRET}",
        f"token: {SECRET}, host: a",
        f"a://u:{SECRET}@b c://v:{SECRET}@d",
        f"s3://me:a@sign-{SECRET}@host",
        f"s3://me:a/b-{SECRET}@host/c",
        f"cannot reach postgresql://me:12/{SECRET}@host/db",
        f"postgresql://host/db?user=me&password={SECRET}",
        f"postgresql://host/db?sslpassword={SECRET}&sslmode=require",
        f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BUID%3Dme%3BPWD%3D{SECRET}%3BServer%3Dh",
        f"PGPASSWORD={SECRET} psql",
        f'{{"password": "two words and {SECRET}"}}',
        f"accessToken: '{SECRET}'",
    ],
)
def test_passwords_are_masked_wherever_they_stand(text: str) -> None:
    assert SECRET in text
    shown = redacted(text, {})
    assert SECRET not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        "layer1.0.conv2: 7 of 9 tokens are used",
        "cannot read http://host:8265/api and file:///a/b@c",
        "postgresql://me@host/db",
        "a price table of 12 layers at 10:30, see $.model.name",
        "the layers of tokens: must be a list, found tokens: 3",
        "token: must be a list, found token: 3",
        "secret: credentials must be given, max_tokens=4096, tokenizer: bert-base-uncased",
        "cannot read http://host:8265/api/a@b",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redacted(text, {"HOME": "/home/me", "RAY_AUTH_TOKEN_PATH": "/a/b@c", "MY_TOKEN": "used"}) == text


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text", ["a-_" * 2000, "ab_" * 3000 + "token", "x" * 100_000, "token_" * 1000, "a://b:c/" * 2000]
)
def test_long_texts_take_no_time(text: str) -> None:
    assert redacted(text, {}) == text


def test_values_of_secret_variables_are_masked_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert reason(ValueError(f"refused {SECRET}\nby the server")) == "ValueError: refused *** by the server"


def test_which_names_are_secret() -> None:
    for name in ("MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_API_KEY"):
        assert looks_secret(name)
    for name in ("PGPASSWORD", "SECRET", "HF_TOKEN_2", "GOOGLE_APPLICATION_CREDENTIALS", "DB_PASS", "GITHUB_APIKEY"):
        assert looks_secret(name)
    for name in ("RANKSEARCH_DATA", "HOME", "KEYBOARD", "AWS_REGION", "TOKENIZER_DIR", "MAX_TOKENS", "COMPASS", "PWD"):
        assert not looks_secret(name)


WITH_PASSWORDS = (
    "postgresql://h/db?user=u&password=x",
    "postgresql://u:p/w@host/db",
    "postgresql://u:12/w@host/db",
    "mysql+pymysql://h/db?passwd=x",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7Bx%7D%3BUID%3Du%3BPWD%3Dx",
    "mssql+pyodbc:///?odbc_connect=PWD%3Dx",
)
WITHOUT = (
    "postgresql://h/db?user=u&password=${PW}",
    "postgresql://h/db?user=u&sslmode=require",
    "http://host:8265/a@b",
    "sqlite:////a/b@c.db",
    "PASSWORD=x",
)


def test_which_urls_have_a_password() -> None:
    for url in (
        f"postgresql://me:{SECRET}@host/db",
        "http://:pw@host",
        "postgresql://me:pw${TAIL}@host/db",
        *WITH_PASSWORDS,
    ):
        assert has_password(url), url
    for url in (
        "postgresql://me@host:5432/db",
        "http://host:5000",
        "postgresql://me:${PW}@host/db",
        "/a/folder",
        *WITHOUT,
    ):
        assert not has_password(url), url


def test_a_study_keeps_the_name_of_a_secret_not_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PW", SECRET)
    monkeypatch.setenv("HUB_TOKEN", SECRET)
    monkeypatch.setenv("WIDTH", "12")
    uri = "http://me:${STORE_PW}@127.0.0.1:5000"
    options = {"token": "${HUB_TOKEN}", "width": "${WIDTH}"}
    space = parse_space({"model": {"name": "own:net", "options": options}, "tracking": {"uri": uri}})
    assert space.tracking.uri == uri
    assert space.model.options == {"token": "${HUB_TOKEN}", "width": "12"}
    setting = setting_of(space_of(tracking={"uri": uri}))
    written = json.dumps(setting.to_json())
    assert SECRET not in written
    assert store_uri(TrackingSpec(uri=uri), Path("/nowhere")) == f"http://me:{SECRET}@127.0.0.1:5000"
    monkeypatch.delenv("STORE_PW")
    assert Setting.from_json(json.loads(written)).space.tracking.uri == uri, "it is read where the variable is not set"


def test_declared_secrets_and_urls_with_a_password_keep_their_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    monkeypatch.setenv("DATABASE_URL", f"postgresql://me:{SECRET}@host/db")
    monkeypatch.setenv("WIDTH", "12")
    options = {"k": "${MY_KEY}", "u": "${DATABASE_URL}", "w": "${WIDTH}"}
    space = parse_space({"model": {"name": "own:net", "options": options}, "job": {"secrets": ["MY_KEY"]}})
    assert space.model.options == {**options, "w": "12"}
    assert filled(space.model.options["k"]) == SECRET


def test_a_secret_where_nobody_fills_it_in_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZER_DIR", "/somewhere")
    monkeypatch.setenv("HUB_TOKEN", SECRET)
    model = {"name": "resnet20"}
    assert parse_space({"model": model, "data": {"root": "${TOKENIZER_DIR}/x"}}).data.root == "/somewhere/x"
    with pytest.raises(SpaceError, match=r"\$\.data\.train\[0\]: a secret variable must stand where") as caught:
        parse_space({"model": model, "data": {"train": ["${HUB_TOKEN}"], "options": {"token": "${HUB_TOKEN}"}}})
    assert len(caught.value.problems) == 1
    assert SECRET not in str(caught.value)


def test_a_secret_that_is_not_set_is_a_problem() -> None:
    with pytest.raises(SpaceError, match=r"\$\.tracking\.uri: an environment variable must be set.*Set NO_SUCH_PW"):
        parse_space({"model": {"name": "resnet20"}, "tracking": {"uri": "http://me:${NO_SUCH_PW}@host"}})


def _own_factory(token: str, nested: dict[str, object]) -> tuple[str, dict[str, object]]:
    return token, nested


def test_a_factory_gets_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", SECRET)
    options = {"token": "${HUB_TOKEN}", "nested": {"list": ["${HUB_TOKEN}", 1]}}
    assert filled(options) == {"token": SECRET, "nested": {"list": [SECRET, 1]}}
    made = call_factory("tests.unit.test_secrecy:_own_factory", options, ModelError)
    assert made == (SECRET, {"list": [SECRET, 1]})


def test_literal_passwords_are_refused() -> None:
    space = parse_space(
        {
            "model": {"name": "resnet20"},
            "tracking": {"uri": f"postgresql://me:{SECRET}@host/db"},
            "job": {"environment": {"HUB_TOKEN": SECRET, "DATA": "/data", "STORE": f"redis://:{SECRET}@host"}},
        }
    )
    problems = literal_passwords(space)
    assert {problem.address for problem in problems} == {
        "$.tracking.uri",
        "$.job.environment.HUB_TOKEN",
        "$.job.environment.STORE",
    }
    assert SECRET not in "".join(map(str, problems))


def test_a_search_with_a_literal_password_writes_nothing(tmp_path: Path, storage: Path) -> None:
    import ranksearch

    file = tmp_path / "space.yaml"
    file.write_text(f"model: {{name: digits-cnn}}\ntracking: {{uri: 'http://me:{SECRET}@127.0.0.1:1'}}\n")
    load_space(file)  # the form is right
    with pytest.raises(SpaceError, match=r"a password must not stand in a space") as caught:
        ranksearch.search(file)
    assert SECRET not in str(caught.value)
    assert not storage.exists()


def test_a_storage_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"there must be a study 'none' in sqlite.*studies\.db") as caught:
        Store(f"sqlite:///file:{tmp_path}/studies.db?uri=true&password={SECRET}").open("none")
    assert SECRET not in str(caught.value)


def test_a_job_adopts_the_secrets_it_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRIED_TOKEN", "an older one")
    place = bundle({"CARRIED_TOKEN": SECRET}, tmp_path)
    assert (place.stat().st_mode & 0o077, (place / "secrets.json").stat().st_mode & 0o077) == (0, 0)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    adopt()
    assert os.environ["CARRIED_TOKEN"] == SECRET
