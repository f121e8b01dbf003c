"""The side of a peer: reads {"prompts": [[ids]], "new_tokens": n} a line from stdin, answers {"answers": [[ids]]}.

Each peer runs in a virtual environment of its own (see install.sh), so nothing of this kit can be imported here.
"""

import json
import os
import sys
from collections.abc import Callable


def serve(start: Callable[[], tuple[str, Callable[[list[list[int]], int], list[list[int]]]]]) -> None:
    """start() -> (version, generate). What the peer itself prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    version, generate = start()
    print(json.dumps({"version": version}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"answers": generate(asked["prompts"], asked["new_tokens"])}), file=answers)
