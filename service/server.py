"""The web server: uvicorn, with an end of our own. Told to stop, it lets nobody in, finishes what runs, then goes."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import uvicorn

from service.connection import connection_class
from service.guard import Guard
from service.house import House
from service.notify import Notifier

BACKLOG = 2048


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains, for drain_timeout seconds at most; a second one ends the drain.

    uvicorn's own way closes the door at once, so that nobody could see why, and ends with the signal's status.
    """

    def __init__(self, app: Guard, house: House, ready: Callable[[str], None]) -> None:
        settings = house.serving.settings
        super().__init__(uvicorn.Config(
            app, host=settings.host, port=settings.port, log_config=None, access_log=False, lifespan="on", ws="none",
            backlog=BACKLOG, server_header=False, proxy_headers=False, timeout_graceful_shutdown=1,
            http=connection_class(app, house.watch.connections, settings.header_timeout, settings.send_timeout),
        ))  # fmt: skip
        self.house, self.ready = house, ready
        self.draining: asyncio.Task[None] | None = None
        self.notifier = Notifier.of(os.environ)

    async def startup(self, sockets: Any = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self.ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        self.notifier.say("READY=1", "STATUS=serving")
        self.beating = self.loop.create_task(self.notifier.beat(self.house.watch.alive))

    def handle_exit(self, sig: int, frame: Any) -> None:  # noqa: ARG002
        if self.draining is None and self.started:
            self.draining = self.loop.create_task(self.drain())
        else:
            self.should_exit = True
            self.loop.call_soon_threadsafe(self.house.serving.end_all)  # they are told, not just cut off

    async def drain(self) -> None:
        self.notifier.say("STOPPING=1", "STATUS=finishing what runs")
        await self.house.serving.drain(self.house.serving.settings.drain_timeout)
        self.should_exit = True


def run(app: Guard, house: House, ready: Callable[[str], None]) -> None:
    """Serve until a signal ends it. ready: called with the address. SystemExit: the port cannot be had."""
    server = Server(app, house, ready)
    asyncio.run(server.serve())
