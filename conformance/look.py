"""All probes against one server, in an order in which they do not disturb each other, and whether it survives each."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from config import UserError
from conformance import clients, ending, identity, overload, transport, values
from conformance.judge import Kind, Verdict, otherwise, unsafe, unseen
from conformance.matrix import cases
from conformance.target import Target
from conformance.wire import Hung
from lab import console

Look = Callable[[Target], Verdict]
PATIENT: dict[int, Look] = transport.PATIENT | clients.PATIENT
IN_TURN: dict[int, Look] = (
    transport.PROBES | identity.PROBES | clients.PROBES | overload.PROBES | values.PROBES  # the heaviest come last
)
STARTS = 6  # a server that has to be started more often is looked at no further


class Gone(Exception):
    """The server cannot be looked at any more. Its text says why."""


class Looks:
    """start() gives the server, again after it broke; None where it was not started here."""

    def __init__(self, start: Callable[[], Target], again: bool) -> None:
        self.start, self.again, self.starts = start, again, 1
        self.target = start()
        self.found: dict[int, Verdict] = dict(ending.HIDDEN)

    def all(self, numbers: set[int] | None = None) -> dict[int, Verdict]:
        """The verdict on each case. numbers: these cases only."""
        wanted = set(cases()) if numbers is None else numbers
        try:
            self.target.meet()
            self.side_by_side({number: look for number, look in PATIENT.items() if number in wanted})
            in_turn = {number: look for number, look in IN_TURN.items() if number in wanted}
            for number in console.progress(in_turn, len(in_turn), self.target.name):
                self.one(number, in_turn[number])
            self.found |= {
                number: attempted(look, self.target) for number, look in ending.LAST.items() if number in wanted
            }
        except (Gone, Hung, OSError) as why:
            rest = {number: unseen(f"it was not asked: {why}") for number in cases()}
            self.found = rest | self.found
        finally:
            self.target.close()
        return self.known(numbers)

    def known(self, numbers: set[int] | None = None) -> dict[int, Verdict]:
        """What there is by now. numbers: of these cases only."""
        return {number: self.found[number] for number in sorted(self.found) if numbers is None or number in numbers}

    def side_by_side(self, looks: dict[int, Look]) -> None:
        with ThreadPoolExecutor(max(len(looks), 1)) as pool:
            futures = {number: pool.submit(attempted, look, self.target) for number, look in looks.items()}
            self.found |= {number: future.result() for number, future in futures.items()}
        if looks and not self.survived(sorted(looks)) and len(looks) > 1:
            self.one_by_one(looks)

    def one_by_one(self, looks: dict[int, Look]) -> None:
        """Asked side by side they broke it: which of them was it? All of them, where it takes all of them."""
        together = {number: self.found[number] for number in looks}
        for number, look in looks.items():
            self.one(number, look)
        if not any(self.found[number].kind == Kind.UNSAFE for number in looks):
            self.found |= together

    def one(self, number: int, look: Look) -> None:
        self.found[number] = attempted(look, self.target)
        self.survived([number])

    def survived(self, numbers: list[int]) -> bool:
        """A verdict is worth less where the server suffers afterwards. False: it broke, and was started anew. Gone."""
        harm = self.target.harm()
        if harm is None:
            return True
        for number in numbers:
            before = self.found[number]
            says = "; ".join(filter(None, (before.says, harm)))
            if "another text" not in harm:
                self.found[number] = unsafe(says)
            elif before.kind == Kind.PASS:
                self.found[number] = Verdict(Kind.OTHERWISE, says)
        if "another text" in harm:
            return True
        self.begin_again(harm)
        return False

    def begin_again(self, harm: str) -> None:
        if not self.again or self.starts == STARTS:
            raise Gone(harm)
        self.target.close()
        self.starts += 1
        try:
            self.target = self.start()
        except UserError as why:
            raise Gone(f"{harm}; and then {str(why).rstrip('.')}") from why
        self.target.meet()


def attempted(look: Look, target: Target) -> Verdict:
    """What the probe finds. No answer at all is a finding too."""
    try:
        return look(target)
    except Hung as why:
        return unsafe(f"it {why}")
    except UserError as why:  # another one of it, with limits, did not start
        return unseen(str(why).rstrip("."))
    except ConnectionRefusedError:
        return unsafe(target.ended() or "nobody takes a connection any more")
    except OSError as why:
        return unsafe(f"the connection broke ({why.strerror or why})")
    except Exception as why:  # an answer may be odd in more ways than anybody lists
        return otherwise(f"its answer has no known form ({type(why).__name__}: {' '.join(str(why).split())[:100]})")
