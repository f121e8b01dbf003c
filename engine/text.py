"""The text of an answer while it grows: shown as early as it is certain, cut exactly at a stop string.

A token may end inside a UTF-8 character, and a stop string may end inside a token. So text that the next token could
still change, and text that could still become a stop string, is held back.
"""

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for a character whose bytes are not all there
PATIENCE = 32  # tokens; where no character has ended for so long, the bytes make none
OPEN = 3  # characters at the end that a next byte could still make into one
WINDOW = 8  # tokens decoded together at the least: decoding all of them for each new one would be quadratic


class Text:
    """decode: token ids -> text. stop: strings at which it ends, themselves not in it.

    add() each token, end() after the last; take() what has become certain since it was last asked. text: all that is
    decoded so far, cut at the stop string once one was found; stopped_by: which.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, stop
        self.longest_stop = max(map(len, stop), default=0)
        self.text, self.stopped_by = "", None
        self.ended = False
        self.shown = 0  # characters taken
        self.window: list[int] = []  # the last tokens, and of their text the characters that are in self.text
        self.taken = 0
        self.unfinished = 0  # tokens since a character last ended

    def add(self, token: int) -> None:
        self.window.append(token)
        decoded = self.decode(self.window)
        self.unfinished = self.unfinished + 1 if decoded.endswith(UNFINISHED) else 0
        if 0 < self.unfinished < PATIENCE:  # some decoders then show whole characters before it so too: wait
            return
        certain = max(len(decoded) - (OPEN if self.unfinished else 0), self.taken)
        self.extend(decoded[self.taken : certain])
        self.taken = certain
        if len(self.window) >= 2 * WINDOW:
            self.cut_window(decoded)

    def cut_window(self, decoded: str) -> None:
        """Forget the tokens that can change nothing any more: the rest must still read as the end of the whole."""
        rest = self.window[-WINDOW:]  # not fewer: some decoders drop the space before a first token
        tail, left = self.decode(rest), len(decoded) - self.taken
        whole = tail and not tail.startswith(UNFINISHED)
        if (whole or self.unfinished) and len(tail) >= left and decoded.endswith(tail):
            self.window, self.taken = rest, len(tail) - left

    def end(self) -> None:
        """No token comes any more: what was held back is certain now."""
        if not self.ended:
            self.extend(self.decode(self.window)[self.taken :])
        self.ended = True

    def take(self) -> str:
        """The text that has become certain since the last call."""
        # In this order, and once each: another thread may be adding to them.
        final, text = self.ended or self.stopped_by is not None, self.text
        upto = len(text) - (0 if final else self.held_back(text))
        new = text[self.shown : upto]
        self.shown = max(self.shown, upto)
        return new

    def extend(self, new: str) -> None:
        """Append to the text, and cut it where the first stop string begins. Nothing comes after that."""
        if self.stopped_by is not None:
            return
        text, searched = self.text + new, max(len(self.text) - self.longest_stop + 1, 0)
        found = [(text.find(stop, searched), stop) for stop in self.stop]
        places = [(place, stop) for place, stop in found if place >= 0]
        if not places:
            self.text = text
            return
        place, stopped_by = min(places)
        self.text = text[:place]
        self.stopped_by = stopped_by

    def held_back(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        ends = range(min(self.longest_stop - 1, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
