"""Passwords and tokens: filled in where they are used, carried by a job apart from its description, never written.

A space names a secret as ``${NAME}``. The study, MLflow, rank maps and logs keep that name; the value is read from the
environment where a connection or a factory needs it. A literal password in an error's message is masked.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
"""An environment variable in a space file."""

BUNDLE = "ranksearch_secrets"
"""Folder on ``PYTHONPATH`` in which a job carries secrets."""

_WORD = (
    r"(?:[a-z0-9]*(?:password|passwd|passphrase|secret|token|apikey|accesskey|privatekey)|pass|credentials?"
    r"|(?:api|access|private)[_-]key)\d*"
)
_KEY = rf"[_-]*(?:[a-z0-9]+[_-]+)*{_WORD}(?:[_-]+[a-z0-9]+)*+[_-]*+"
"""Whole words between underscores or hyphens: PGPASSWORD and HUB_TOKEN, not TOKENIZER_DIR, max_tokens or COMPASS."""
_SECRET_NAME = re.compile(_KEY, re.IGNORECASE)
_URL_PASSWORD = re.compile(
    r"(?i)((?:\b(postgres|mysql|mariadb|mssql|oracle)[\w+]*|\w)://[^/\s:@'\"]*:)"
    r"([^/\s'\"]*|(?(2)|(?!\d+[/?#]))[^@\s'\"]*)@"
)
"""Up to the last ``@`` before a slash: an unescaped password may hold one. Else, as SQLAlchemy reads it, up to
the first ``@``, unless a port before a slash is meant."""
_ODBC_PASSWORD = re.compile(r"(?i)((?:^|;|%3B|odbc_connect=)\s*pwd(?:=|%3D))((?:(?!%3B)[^\s;&'\"])+)")
_NAMED_VALUE = re.compile(
    rf"(?i)(?<![\w-])({_KEY}['\"]?\s*(?:=\s*(?:bearer\s+)?['\"]?|:\s*['\"]|:\s*(?=[^\s'\",;&}}\])]{{8}})(?![a-z]+\b(?![\w-]))))"
    r"(?!\$\{)((?<=\")[^\"\n]+|(?<=')[^'\n]+|[^\s'\",;&}\])]+)"
)
"""After a mere colon, as in prose, a value is a secret if it is quoted, or long and no plain word."""
_BEARER = re.compile(r"(?i)\bbearer\s+[\w.~+/=-]{6,}")
_MASK = "***"
SHORTEST = 6
"""Characters of a secret that is looked for wherever it may stand; shorter ones would be found in plain words."""


def looks_secret(name: str) -> bool:
    """Whether a variable of this name is taken for a secret."""
    return _SECRET_NAME.fullmatch(name) is not None


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without passwords of URLs, values of keys that look secret, and values of secret variables.

    Args:
        text: of a log, an error, a reason.
        environment: whose secret variables are masked; that of the process by default.
    """
    found = os.environ if environment is None else environment
    values = {value for name, value in found.items() if looks_secret(name) and len(value) >= SHORTEST}
    # A file's path is named after what it holds, as RAY_AUTH_TOKEN_PATH; paths are no secrets.
    for value in sorted((v for v in values if not v.startswith("/")), key=len, reverse=True):
        text = text.replace(value, _MASK)
    text = _URL_PASSWORD.sub(rf"\1{_MASK}@", text)
    text = _ODBC_PASSWORD.sub(rf"\1{_MASK}", text)
    text = _NAMED_VALUE.sub(rf"\1{_MASK}", text)
    return _BEARER.sub(f"Bearer {_MASK}", text)


def has_password(url: str) -> bool:
    """Whether a URL carries a literal password, in its authority or its query; ``${NAME}`` in its place is none."""
    if "://" not in url:
        return False
    found = [match[3] for match in _URL_PASSWORD.finditer(url)]
    for key, value in parse_qsl(url.partition("?")[2]):
        found += [value] if looks_secret(key) or key.lower() == "pwd" else []
        found += [match[2] for match in _ODBC_PASSWORD.finditer(value)]
    return any(VARIABLE.sub("", password) for password in found)


def filled(value: Any) -> Any:
    """``value`` with every ``${NAME}`` in its texts replaced by that variable; unknown ones stay as they are."""
    if isinstance(value, dict):
        return {key: filled(below) for key, below in value.items()}
    if isinstance(value, list):
        return [filled(below) for below in value]
    if not isinstance(value, str):
        return value
    return VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value)


def bundle(secrets: Mapping[str, str], folder: Path) -> Path:
    """Write secrets into a folder below ``folder`` that :func:`adopt` finds on ``PYTHONPATH``; returns it."""
    place = folder / BUNDLE
    place.mkdir(mode=0o700)
    file = place / "secrets.json"
    file.touch(mode=0o600)
    file.write_text(json.dumps(dict(secrets)), encoding="utf-8")
    return place


def adopt() -> None:
    """Set the variables of a bundle that came with this job, where there is one."""
    for entry in sys.path:
        file = Path(entry) / BUNDLE / "secrets.json"
        if file.is_file():
            os.environ.update(json.loads(file.read_text(encoding="utf-8")))
            return
