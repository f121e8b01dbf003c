"""The chat for people at /: a few files, read once, that ask nobody but this service."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response

FOLDER = Path(__file__).with_name("page")  # beside this file, wherever the service was started from
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
METHODS = ["GET", "HEAD"]
ALWAYS = {
    # What a model says is only ever text; should a mistake of ours make it more, the browser still loads nothing.
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask every time whether it has changed: by its ETag that costs next to nothing
}


@dataclass(frozen=True)
class File:
    """One file of the page. etag: its contents' name."""

    data: bytes
    kind: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> "File":
        data = path.read_bytes()
        return cls(data, f"{TYPES[path.suffix]}; charset=utf-8", f'"{hashlib.sha256(data).hexdigest()[:20]}"')

    def answer(self, known: str) -> Response:
        """known: the If-None-Match of who has asked before."""
        headers = ALWAYS | {"etag": self.etag, "content-type": self.kind}
        if self.etag in (name.strip().removeprefix("W/") for name in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.data, headers=headers)


def add_page(app: FastAPI) -> None:
    """/ and the files that it names. No other path leads into the folder."""
    for path in sorted(one for one in FOLDER.iterdir() if one.suffix in TYPES):
        where = "/" if path.name == "index.html" else f"/page/{path.name}"
        app.add_route(where, shown(File.read(path)), methods=METHODS, include_in_schema=False)


def shown(file: File) -> Callable[[Request], Awaitable[Response]]:
    async def show(http: Request) -> Response:
        return file.answer(http.headers.get("if-none-match", ""))

    return show
