"""The page itself, its files, and the headers that keep both apart from other sites."""

from __future__ import annotations

import base64
import hashlib
import html
import re

from aiohttp import hdrs, web

from appliance.console.assets import CHART_FILES, Assets
from appliance.errors import NotFound

# 'self' alone: no inline script, no inline style element or attribute, nothing from anywhere else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_LOGIN_POLICY = "default-src 'none'; style-src '{style}'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_FOREVER = "public, max-age=31536000, immutable"


class Pages:
    """Makes the responses of GET /, of the login page and of the files. Everything is built once, here."""

    def __init__(self, assets: Assets, *, title: str) -> None:
        self._assets = assets
        self._base = f"/console/static/{assets.version}"
        values = {
            "title": html.escape(title),
            "base": self._base,
            "charts": "yes" if assets.has_charts else "no",
            "uplot_js": CHART_FILES["uplot.js"][1],
            "uplot_css": CHART_FILES["uplot.css"][1],
        }
        self._index = _fill(self._text("index.html"), values).encode()
        style = self._text("login.css")
        self._login = _fill(self._text("login.html"), {"title": html.escape(title), "style": style})
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        self._login_policy = _LOGIN_POLICY.format(style=f"sha256-{digest}")

    def index(self) -> web.Response:
        """The console. Revalidated every time, since it names the version of all other files."""
        return _page(self._index, _POLICY)

    def login(self, message: str = "", status: int = 200) -> web.Response:
        """The login form, by itself: it needs no other file, so that no other route has to be open. `message` says why it is shown again."""
        alert = f'<p role="alert">{html.escape(message)}</p>' if message else ""
        return _page(self._login.replace("<!--alert-->", alert).encode(), self._login_policy, status)

    def file(self, request: web.Request) -> web.Response:
        """One of the files. Raises NotFound, also for those of another version: they would not fit together."""
        asset = self._assets.files.get(request.match_info["name"])
        if asset is None or request.match_info["version"] != self._assets.version:
            raise NotFound("no such file; after an update, load the page again")
        headers = {**_SECURITY_HEADERS, hdrs.CACHE_CONTROL: _FOREVER, hdrs.VARY: hdrs.ACCEPT_ENCODING}
        body = asset.body
        if asset.compressed is not None and "gzip" in request.headers.get(hdrs.ACCEPT_ENCODING, ""):
            body = asset.compressed
            headers[hdrs.CONTENT_ENCODING] = "gzip"
        charset = None if asset.content_type.startswith("image/") else "utf-8"
        return web.Response(body=body, content_type=asset.content_type, charset=charset, headers=headers)

    def _text(self, name: str) -> str:
        return self._assets.files[name].body.decode()


def _fill(template: str, values: dict[str, str]) -> str:
    """`{{name}}` replaced by its value."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _page(body: bytes, policy: str, status: int = 200) -> web.Response:
    headers = {**_SECURITY_HEADERS, "Content-Security-Policy": policy, hdrs.CACHE_CONTROL: "no-store"}
    return web.Response(status=status, body=body, content_type="text/html", charset="utf-8", headers=headers)
