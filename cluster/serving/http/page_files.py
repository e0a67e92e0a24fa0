"""The page at `/`: one image asked about densely and pruned, side by side, and the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import FastAPI
from fastapi.responses import Response

_FOLDER: Final = Path(__file__).parent / "page"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Of the page's own files alone: it asks no other party for anything, and none may frame it.
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Adds the page's files, which are read once."""
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _TYPES:
            _add(app, "/" if path.name == "index.html" else f"/{path.name}", path)


def _add(app: FastAPI, route: str, path: Path) -> None:
    content, kind = path.read_bytes(), _TYPES[path.suffix]

    @app.get(route, include_in_schema=False)
    async def send() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)
