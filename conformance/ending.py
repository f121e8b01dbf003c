"""B6 seen from outside: how it ends. The rest needs an engine that can be held and broken."""

import signal
import subprocess
import time

from conformance.judge import Verdict, otherwise, passed, unsafe, unseen
from conformance.target import Target, first_event
from conformance.transport import to_the_end
from conformance.wire import Hung

ENDS = (0, -signal.SIGTERM)  # some drain, and then let the signal do its work
DRAIN_S = 40.0  # the matrix wants 30 + 2


def told_to_end(target: Target) -> Verdict:
    """SIGTERM in the middle of a stream. The last thing that is asked of a server."""
    if target.process is None:
        return unseen("its process was not started here")
    with target.open_chat(
        "Write a story.", stream=True, max_tokens=min(150, target.long_tokens), **target.long
    ) as connection:
        first_event(connection, 60 * target.slow)
        begin = time.monotonic()
        target.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        late = late_comer(target)
        rest, _ = to_the_end(connection, DRAIN_S)
    try:
        status = target.process.wait(DRAIN_S)
    except subprocess.TimeoutExpired:
        return unsafe(f"it has not ended {time.monotonic() - begin:.0f} s after SIGTERM")
    whole = b"[DONE]" in rest or b'"finish_reason":"' in rest.replace(b" ", b"")
    if not whole and b'"error"' not in rest:
        return otherwise(f"its streams are cut without a word (status {status})")
    if late == 200:
        return otherwise("a new request is let in while it ends")
    if status not in ENDS:
        return otherwise(f"status {status}")
    return passed(f"the stream {'ends' if whole else 'is told'}" + ", and then the signal ends it" * (status < 0))


def late_comer(target: Target) -> int:
    """The status of a request after SIGTERM; 0 where the door is shut."""
    try:
        return target.chat(max_tokens=1).status
    except (Hung, OSError):
        return 0


HELD = unseen("needs an engine that can be held for a moment")
BROKEN = unseen("needs an engine that can be broken on purpose")
HIDDEN = {
    31: unseen("needs a model whose template refuses something"),
    56: HELD, 57: HELD, 58: unseen("needs KV memory that is short"),
    59: unseen("needs a machine that is short of memory"),
    68: BROKEN, 69: BROKEN, 70: BROKEN, 71: BROKEN, 72: BROKEN, 74: BROKEN,
}  # fmt: skip
LAST = {73: told_to_end}
