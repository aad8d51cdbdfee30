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

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
"""An environment variable in a space file."""

BUNDLE = "ranksearch_secrets"
"""Folder on ``PYTHONPATH`` in which a job carries secrets."""

_SECRET_NAME = re.compile(r"PASS|SECRET|TOKEN|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w://)([^/\s:@'\"]*):([^/\s'\"]*)@")
"""Up to the last ``@`` before a slash: an unescaped password may hold one."""
_NAMED_VALUE = re.compile(
    r"(?i)\b([\w-]*(?:password|passwd|secret|token|credential|api_?key|access_?key|private_?key)[\w-]*['\"]?\s*[=:]\s*)"
    r"(?:bearer\s+)?['\"]?(?!\$\{)[^\s'\",;&}\])]+"
)
_BEARER = re.compile(r"(?i)\bbearer\s+[\w.~+/=-]{6,}")
_MASK = "***"
_SHORTEST = 6
"""Characters of a variable's value that is masked wherever it stands; shorter ones would mask plain words."""


def looks_secret(name: str) -> bool:
    """Whether a variable of this name is taken for a secret."""
    return _SECRET_NAME.search(name) is not None


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without passwords of URLs, values of keys that look secret, and values of secret variables.

    Args:
        text: of a log, an error, a reason.
        environment: whose secret variables are masked; that of the process by default.
    """
    found = os.environ if environment is None else environment
    values = {value for name, value in found.items() if looks_secret(name) and len(value) >= _SHORTEST}
    # A file's path is named after what it holds, as RAY_AUTH_TOKEN_PATH; paths are no secrets.
    for value in sorted((v for v in values if not v.startswith("/")), key=len, reverse=True):
        text = text.replace(value, _MASK)
    text = _URL_PASSWORD.sub(rf"\1\2:{_MASK}@", text)
    text = _NAMED_VALUE.sub(rf"\1{_MASK}", text)
    return _BEARER.sub(f"Bearer {_MASK}", text)


def has_password(url: str) -> bool:
    """Whether a URL carries a literal password; ``${NAME}`` in its place is none."""
    found = _URL_PASSWORD.search(url)
    return found is not None and VARIABLE.sub("", found[3]) != ""


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
