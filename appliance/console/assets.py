"""The console's files, read once at start: its own, and the chart library out of the package that is installed for it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import logging
import mimetypes
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.resources.abc import Traversable

_log = logging.getLogger(__name__)

# uPlot 1.6.31 (MIT), byte for byte as its author released it; the package only carries it. Its files are recognised by their digest, here and
# again by the browser (subresource integrity), so no other bytes under this name ever run.
CHART_PACKAGE = "youplot"
CHART_FILES = {
    "uplot.js": ("youplot/vendor/uplot.iife.min.js", "sha384-XMP23k7YSCFr13Xrkxh4IO0v1W+8fB6AP+3Vycxphp2Z0V2vocAZHyuGaFCysrtM"),
    "uplot.css": ("youplot/vendor/uplot.min.css", "sha384-IfV0B7MIOYuO95kO9G5ySKPz/85zqFNOAs8iy4tkK5zd9izhJAB8b7lHrwYqqmYE"),
}
_LEAST_COMPRESSED_BYTES = 1024
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file in memory. `compressed` is None where gzip would not pay."""

    body: bytes
    compressed: bytes | None
    content_type: str


@dataclass(frozen=True, slots=True)
class Assets:
    """All files by name. `version` is a digest of them all: it is part of their URLs, so that a browser may keep them forever."""

    files: dict[str, Asset]
    version: str
    has_charts: bool


def load_assets() -> Assets:
    """Read and compress everything. Without the chart package the console works, with tables instead of charts."""
    folder = resources.files("appliance.console").joinpath("static")
    contents = {name: file.read_bytes() for name, file in _walk(folder, "")}
    charts = _chart_files()
    contents |= charts
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"{name}\0{len(contents[name])}\0".encode())
        digest.update(contents[name])
    return Assets({name: _asset(name, body) for name, body in contents.items()}, digest.hexdigest()[:16], bool(charts))


def integrity_of(body: bytes) -> str:
    """The value of an integrity attribute for `body`."""
    return "sha384-" + base64.b64encode(hashlib.sha384(body).digest()).decode()


def _chart_files() -> dict[str, bytes]:
    """The chart library's files; none at all unless each is there with the bytes that are expected."""
    try:
        package = metadata.distribution(CHART_PACKAGE)
        found = {}
        for name, (path, expected) in CHART_FILES.items():
            body = package.locate_file(path).read_bytes()  # type: ignore[attr-defined] # a Path, for what pip installs
            if integrity_of(body) != expected:
                raise ValueError(f"{path} is not the file it should be")
            found[name] = body
    except (metadata.PackageNotFoundError, OSError, ValueError) as error:
        _log.warning("the console has no charts: the package %s is missing or another than expected (%s)", CHART_PACKAGE, error)
        return {}
    return found


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    found = []
    for child in folder.iterdir():
        if child.is_dir():
            found += _walk(child, f"{prefix}{child.name}/")
        elif not child.name.startswith("."):
            found.append((prefix + child.name, child))
    return found


def _asset(name: str, body: bytes) -> Asset:
    suffix = name[name.rfind(".") :]
    content_type = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    compressed = gzip.compress(body, 9, mtime=0) if len(body) >= _LEAST_COMPRESSED_BYTES else None
    return Asset(body, compressed if compressed is not None and len(compressed) < len(body) else None, content_type)
