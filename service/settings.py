"""What the service can be told, on the command line or by LLM_INFER_ variables."""

import importlib.util
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from config import UserError, knob
from engine.settings import EngineConfig

OTEL_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
SECRET = ("api_key", "api_keys_file")


@dataclass(frozen=True)
class ServeConfig(EngineConfig):
    """Every field is also an environment variable: LLM_INFER_PORT and so on."""

    env_prefix: ClassVar[str] = "LLM_INFER_"

    host: str = knob("127.0.0.1", "the address to listen on; 0.0.0.0 is everybody's")
    port: int = knob(8000, "the port to listen on; 0 takes a free one", least=0, most=65535)
    served_name: str | None = knob(None, "the model's name for clients; by default its own")
    api_key: str | None = knob(None, "clients must send this key (better in the environment than on the command line)")
    api_keys_file: str | None = knob(None, "a file with a key in each line")
    max_running: int = knob(16, "answers computed at once (max_num_seqs); 32 is good on a GPU", least=1)
    max_queued: int = knob(0, "requests that may wait; 0 = twice max_running", least=0)
    max_queued_tokens: int = knob(
        0, "tokens that all requests in the house may add up to; 0 = what max_running contexts hold", least=0
    )
    max_connections: int = knob(1000, "connections at once; idle ones go first when there are more", least=1)
    max_new_tokens: int = knob(1024, "new tokens of an answer that names no limit, at most", least=1)
    queue_timeout: float = knob(30.0, "seconds that a request may wait for its first step", least=0.1)
    request_timeout: float = knob(
        300.0, "seconds that a request may take; a client's own shorter limit counts", least=0.1
    )
    max_body: int = knob(1 << 20, "bytes of a request's body, at most", least=1024)
    body_timeout: float = knob(30.0, "seconds in which a request's body must have come", least=0.1)
    header_timeout: float = knob(10.0, "seconds in which a request's headers must have come", least=0.1)
    send_timeout: float = knob(20.0, "seconds that a reader may leave us waiting", least=0.1)
    heartbeat: float = knob(15.0, "seconds between signs of life while a stream has nothing to say", least=0.1)
    drain_timeout: float = knob(30.0, "seconds for what is running when the service is told to end", least=0)
    stall_after: float = knob(60.0, "seconds after which a step that does not end makes /health/live fail", least=0.1)
    quarantine_minutes: float = knob(
        10.0, "for which an input is refused that failed the engine twice; 0 = never", least=0
    )
    requests_per_minute: int = knob(0, "of each key; 0 = no limit", least=0)
    tokens_per_minute: int = knob(0, "of each key, prompt and answer together; 0 = no limit", least=0)
    breaker: str = knob(
        "on", "stop asking an engine that fails most of the time; open: never ask it", choices=("on", "off", "open")
    )
    degrade_max_tokens: int = knob(
        0, "new tokens of an answer while the queue is half full; 0 = no such limit", least=0
    )
    fallback_url: str | None = knob(
        None, "an OpenAI-compatible server (http://host/v1) for what the engine cannot take; its key is "
        "LLM_INFER_FALLBACK_KEY"
    )  # fmt: skip
    fallback_model: str | None = knob(None, "the model to ask for there")
    fallback_timeout: float = knob(30.0, "seconds that it may say nothing", least=0.1)
    result_cache_bytes: int = knob(0, "of answers kept for requests that can only have one; 0 = none are", least=0)
    result_cache_ttl: float = knob(3600.0, "seconds that a kept answer is good for", least=0.1)
    isolate_keys: bool = knob(False, "never share a prefix's keys and values between API keys")
    page: bool = knob(True, "whether a chat for people is served at /", flags={"--no-page": False})
    cors_origin: str | None = knob(None, "let browsers of this origin ask (CORS); * is everybody's")
    ignore_unknown: bool = knob(False, "drop fields that are not known, and name them in x-ignored-params")
    otlp_endpoint: str | None = knob(
        None, "send traces to this OpenTelemetry collector, such as http://127.0.0.1:4318 (OTLP over HTTP)"
    )
    log_prompts: bool = knob(False, "write prompts and answers into the log")
    log_file: str | None = knob(None, "append the log to this file instead of stderr")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.fallback_url is None) != (self.fallback_model is None):
            raise UserError("--fallback-url and --fallback-model belong together: give both, or none.")
        if not is_plain(self.fallback_url or "http://none"):
            raise UserError(
                "--fallback-url must be like http://host:8000/v1, without a user, a key or a query: a key belongs in "
                f"{self.env_prefix}FALLBACK_KEY."
            )
        named = self.fallback_model or ""
        if not (named.isascii() and named.isprintable()):
            raise UserError("--fallback-model is told in a header, which takes printable ASCII: give another name.")

    @property
    def queued(self) -> int:
        return self.max_queued or 2 * self.max_running

    def fallback_key(self) -> str | None:
        """Of the other server. Only from the environment: a command line can be read by everybody on the machine."""
        return os.environ.get(f"{self.env_prefix}FALLBACK_KEY") or None

    def keys(self) -> list[str]:
        """UserError when the file cannot be read."""
        found = [] if self.api_key is None else [self.api_key]
        if not found and os.environ.get(f"{self.env_prefix}API_KEY") == "":  # a secret that was never filled in
            found = [""]
        if self.api_keys_file:
            try:
                lines = Path(self.api_keys_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--api-keys-file {self.api_keys_file} cannot be read ({error}): check it.") from error
            found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not found:
                raise UserError(f"--api-keys-file {self.api_keys_file} holds no key: anybody could come in. Write one.")
        if "" in found:
            raise UserError("The API key is empty: anybody could come in. Give one, or unset LLM_INFER_API_KEY.")
        if not all(key.isascii() and key.isprintable() and " " not in key for key in found):
            raise UserError("API keys are ASCII without spaces, as HTTP's headers are: change the one that is not.")
        return found

    def check_tracing(self) -> None:
        """UserError when --otlp-endpoint is no address, or what it needs is not installed."""
        if self.otlp_endpoint is None:
            return
        address = urlsplit(self.otlp_endpoint)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UserError(f"--otlp-endpoint {self.otlp_endpoint} is no address like http://127.0.0.1:4318: give one.")
        if address.username or address.password or address.query:  # /config shows it
            raise UserError("--otlp-endpoint takes no secrets: put them into OTEL_EXPORTER_OTLP_HEADERS.")
        try:
            missing = [name for name in OTEL_PACKAGES if importlib.util.find_spec(name) is None]
        except ModuleNotFoundError as error:  # what they lie in is not there either
            missing = [error.name or OTEL_PACKAGES[0]]
        if missing:
            raise UserError(f"--otlp-endpoint needs {missing[0]}, which this Python lacks: "
                            "`pip install -r requirements-otel.txt`.")  # fmt: skip

    def shown(self) -> dict[str, object]:
        """All of it, for /config, with secrets left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {name: "set" if values[name] else None for name in SECRET}


def is_plain(address: str) -> bool:
    """http or https, a host, perhaps a port and a path."""
    try:
        parts = urlsplit(address)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port_fits and not (
        "@" in parts.netloc or parts.query
    )  # fmt: skip
