"""A further way to serve the requests: any running server that speaks OpenAI's completions protocol."""

import json
import threading
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from config import UserError
from experiments.ways import Load, Moments

TIMEOUT_S = 600


class Endpoint:
    """Sends the prompts as text, and times the chunks that come back: a chunk may hold several tokens, or none.

    How many tokens there were is what the server says (usage), else the number of chunks. Its token ids are not known,
    so its answers are compared with nobody's.
    """

    def __init__(self, name: str, url: str, decode: Callable[[Sequence[int]], str]) -> None:
        self.name, self.url, self.decode = name, url.rstrip("/"), decode
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=10) as reply:
            self.model = json.load(reply)["data"][0]["id"]

    def run(self, load: Load) -> dict[str, Any]:
        """UserError when a request is not answered."""
        seen, counts, errors = Moments(load), {}, []
        seen.begin()

        def ask(i: int) -> None:
            try:
                counts[i] = self.ask(load, seen, i)
            except (OSError, ValueError, KeyError) as error:
                errors.append(error)

        askers = [threading.Thread(target=ask, args=(i,)) for i in range(len(load.prompts))]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        silent = [i for i in range(len(load.prompts)) if not seen.token_s[i]]
        if errors or silent:
            why = f": {errors[0]}" if errors else ""
            raise UserError(
                f"{self.name} left {len({*silent}) or len(errors)} of {len(load.prompts)} requests without an answer"
                f"{why}. Look at that server, or leave --endpoint out."
            )
        return seen.trial(computed_positions=None, answers=None, new_tokens=sum(counts.values()))

    def ask(self, load: Load, seen: Moments, i: int) -> int:
        """Stream request i; how many new tokens it had."""
        body = {
            "model": self.model, "prompt": self.decode(load.prompts[i]), "max_tokens": load.new_tokens[i],
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        seen.wait(load.dues_s[i])
        said = None
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            for line in reply:
                data = line.removeprefix(b"data: ").strip()
                if not line.startswith(b"data: ") or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                said = (chunk.get("usage") or {}).get("completion_tokens", said)
                if chunk.get("choices") and chunk["choices"][0].get("text"):
                    seen.token_s[i].append(seen.now())
        return len(seen.token_s[i]) if said is None else said
