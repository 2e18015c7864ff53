"""Which URLs may be told of scale decisions: one rule for the settings and for the courier."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from appliance.settings_reference import MASK

ALLOWED = "http:// or https:// URLs with a host and without user or password (the receiver knows the sender by its signature)"
_MAY_HOLD_PASSWORD = re.compile(r":.*@", re.DOTALL)


def is_webhook_url(url: str) -> bool:
    """Whether signals may be sent to `url`. Not with a user or password in it: URLs are stored in SQL and printed in logs."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def printable(text: str) -> str:
    """`text`, or a mask where it looks like a URL with a password. Well-formed or not: of `http://a:b/c@d` nobody knows where the password ends."""
    return MASK if _MAY_HOLD_PASSWORD.search(text) else text
