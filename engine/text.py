"""The text of an answer while it grows: shown as early as it is certain, cut exactly at a stop string.

A token may end inside a UTF-8 character, and a stop string may end inside a token. So text that the next token could
still change, and text that could still become a stop string, is held back.
"""

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for a character whose bytes are not all there
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

    def add(self, token: int) -> None:
        self.window.append(token)
        decoded = self.decode(self.window)
        certain = decoded.removesuffix(UNFINISHED)
        if len(certain) > self.taken:
            self.extend(certain[self.taken :])
            self.taken = len(certain)
        if len(self.window) >= 2 * WINDOW and certain == decoded:
            self.window = self.window[-WINDOW:]  # not less: some decoders drop the space before a first token
            self.taken = len(self.decode(self.window))

    def end(self) -> None:
        """No token comes any more: what was held back is certain now."""
        if self.stopped_by is None:
            self.extend(self.decode(self.window)[self.taken :])
        self.ended = True

    def take(self) -> str:
        """The text that has become certain since the last call."""
        upto = len(self.text) - (0 if self.ended else self.held_back())
        new = self.text[self.shown : upto]
        self.shown = max(self.shown, upto)
        return new

    def extend(self, new: str) -> None:
        """Append to the text, and cut it where the first stop string begins."""
        searched = max(len(self.text) - self.longest_stop + 1, 0)
        self.text += new
        if self.stop:
            found = [(self.text.find(stop, searched), stop) for stop in self.stop]
            places = [(place, stop) for place, stop in found if place >= 0]
            if places:
                place, self.stopped_by = min(places)
                self.text = self.text[:place]

    def held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if not self.stop or self.stopped_by is not None:
            return 0
        ends = range(min(self.longest_stop - 1, len(self.text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self.text[-n:]) for stop in self.stop)), 0)
