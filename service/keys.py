"""API keys: who may ask. Kept as hashes, compared in constant time, never shown."""

import hashlib
import hmac
from collections.abc import Sequence

from service.errors import ApiError

NOBODY = ""  # the key's hash where none is asked for


class Keys:
    def __init__(self, keys: Sequence[str]) -> None:
        self.hashes = [digest(key) for key in keys]

    def check(self, authorization: str | None) -> str:
        """The hash of the key in an Authorization header, of which eight digits may be shown. ApiError 401.

        Every kept key is compared, whatever was found before: the time tells nothing.
        """
        if not self.hashes:
            return NOBODY
        scheme, _, given = (authorization or "").partition(" ")
        mine = digest(given.strip())
        known = 0
        for kept in self.hashes:
            known |= hmac.compare_digest(mine, kept)
        if not known or scheme.lower() != "bearer":
            raise ApiError(
                401, "invalid_api_key", "The API key is missing or wrong: send Authorization: Bearer KEY.",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return mine


def digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
