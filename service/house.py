"""The parts of the service, put together: what its routes need."""

from dataclasses import dataclass
from typing import Any

from service.books import Books
from service.keys import Keys
from service.life import Tracing
from service.serving import Serving
from service.watch import Watch


@dataclass(frozen=True)
class House:
    """What the routes need. about: what may be known of the model and the machine."""

    serving: Serving
    keys: Keys
    books: Books
    watch: Watch
    about: dict[str, Any]
    traces: Tracing | None = None

    @property
    def name(self) -> str:
        """The model's, for clients."""
        return self.serving.settings.served_name or self.about["name"]
