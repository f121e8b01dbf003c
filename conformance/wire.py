"""Bare HTTP: what is sent is sent as it stands, and whatever comes back is looked at, be it an answer or not."""

import http.client
import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

PATIENCE_S = 20.0  # for an answer that should take milliseconds


class Hung(Exception):
    """No answer came in the time there was. Its text is the end of a sentence about the server."""


@dataclass(frozen=True)
class Reply:
    """What came back. status: 0 when the connection was closed without an answer."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    took_s: float = 0.0

    @cached_property
    def json(self) -> Any:
        """None where the body is no JSON."""
        with suppress(ValueError):
            return json.loads(self.body, parse_constant=no_json)
        return None

    @property
    def error(self) -> dict[str, Any] | None:
        """OpenAI's error object: {"error": {"message": …}}. None where there is none."""
        found = self.json.get("error") if isinstance(self.json, dict) else None
        return found if isinstance(found, dict) and isinstance(found.get("message"), str) else None

    @property
    def events(self) -> list[Any]:
        """The data of every event of a stream; "[DONE]" and what is no JSON as text."""
        found = []
        for block in self.body.decode("utf-8", "replace").replace("\r\n", "\n").split("\n\n"):
            if block.startswith("data:"):
                data = block.removeprefix("data:").strip()
                try:
                    found.append(json.loads(data))
                except ValueError:
                    found.append(data)
        return found

    @property
    def text(self) -> str:
        """What was said, in one piece or in a stream."""
        if isinstance(self.json, dict) and self.json.get("choices"):
            choice = self.json["choices"][0]
            return choice["message"].get("content") or "" if "message" in choice else choice.get("text", "")
        deltas = [
            one["choices"][0].get("delta", {}) for one in self.events if isinstance(one, dict) and one.get("choices")
        ]
        return "".join(delta.get("content") or "" for delta in deltas)

    @property
    def known_text(self) -> str | None:
        """The same; None where the answer has no known form."""
        with suppress(AttributeError, LookupError, TypeError):
            return self.text
        return None

    @property
    def usage(self) -> dict[str, int]:
        """Of either form; empty where nothing was told."""
        told = [self.json] if isinstance(self.json, dict) else [one for one in self.events if isinstance(one, dict)]
        return next((one["usage"] for one in reversed(told) if one.get("usage")), {})

    @property
    def broken_inside(self) -> bool:
        """A stream that began with 200 and told of an error later."""
        return any(isinstance(one, dict) and "error" in one for one in self.events)


def no_json(literal: str) -> None:
    raise ValueError(f"{literal} is no JSON")


def request(path: str, body: Any = None, *headers: str, method: str | None = None, version: str = "1.1") -> bytes:
    """A request as bytes. body: an object for JSON, or bytes as they are; None is none."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method or ('GET' if data is None else 'POST')} {path} HTTP/{version}", "Host: here"]
    if data is not None:
        if not any(header.lower().startswith("content-type:") for header in headers):
            lines.append("Content-Type: application/json")
        lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join([*lines, *headers, "", ""]).encode() + (data or b"")


def opened(place: tuple[str, int], patience_s: float = PATIENCE_S, room: int | None = None) -> socket.socket:
    """A connection. room: bytes that may wait for us to read them, about."""
    connection = socket.socket()
    if room is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connection.settimeout(patience_s)
    try:
        connection.connect(place)
    except TimeoutError as error:
        connection.close()
        raise Hung("takes no connection") from error
    except BaseException:
        connection.close()
        raise
    return connection


def sent(connection: socket.socket, raw: bytes) -> None:
    """All of it, or as much as the other side takes before it answers and closes."""
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(raw)


def answer(
    connection: socket.socket, patience_s: float = PATIENCE_S, until: Callable[[bytes], bool] = lambda _: False
) -> Reply:
    """The next answer on this connection, or as much of it as comes before it is closed.

    until: stop reading its body as soon as this is true of it. Hung.
    """
    begin, body = time.monotonic(), b""
    connection.settimeout(patience_s)
    with http.client.HTTPResponse(connection) as found:
        try:
            found.begin()
            while (piece := found.read1(65536)) and not until(body := body + piece):
                if time.monotonic() - begin > patience_s:
                    raise TimeoutError
        except TimeoutError as error:
            raise Hung(f"did not answer within {patience_s:.3g} s") from error
        except (http.client.HTTPException, OSError, ValueError):  # closed, reset, or no HTTP
            if not isinstance(found.status, int):
                return Reply(took_s=time.monotonic() - begin)
        headers = {name.lower(): value for name, value in found.getheaders()}
        return Reply(found.status, headers, body, time.monotonic() - begin)


def exchange(place: tuple[str, int], raw: bytes, patience_s: float = PATIENCE_S, **wishes: Any) -> Reply:
    """One request on a connection of its own. Hung, or OSError where nobody takes the connection."""
    with opened(place, patience_s) as connection:
        sent(connection, raw)
        return answer(connection, patience_s, **wishes)
