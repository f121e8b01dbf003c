"""A27: who may find whose prefixes. Blocks are 16 tokens; the prompt below fills five of them."""

import pytest
from service_kit import served

pytestmark = pytest.mark.slow

PROMPT = list(range(60, 150))
KEYS = ("first", "second")


def cached(here, key: str = "first", **wishes) -> int:
    reply = here.complete(PROMPT, headers={"Authorization": f"Bearer {key}"}, **wishes)
    assert reply.status == 200, reply.body
    return reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(params=[False, True])
def isolated(request):
    return request.param


@pytest.fixture
def here(checkpoint_folder, tmp_path, isolated):
    (tmp_path / "keys").write_text("\n".join(KEYS[1:]))
    wishes = {"api_key": KEYS[0], "api_keys_file": str(tmp_path / "keys"), "isolate_keys": isolated}
    with served(checkpoint_folder, **wishes) as found:
        yield found


def test_two_salts_never_share_a_block_and_one_salt_does(here):
    assert cached(here, cache_salt="a") == 0 and cached(here, cache_salt="a") == 80
    assert cached(here, cache_salt="b") == 0 and cached(here) == 0, "not without one either"
    assert cached(here, "second", cache_salt="a") == 0, "another key that guesses the salt finds nothing"
    assert cached(here, cache_salt="b") == cached(here, "second", cache_salt="a") == cached(here) == 80


def test_without_a_salt_keys_share_unless_they_are_isolated(here, isolated):
    assert cached(here) == 0 and cached(here, "second") == (0 if isolated else 80)


def test_a_salt_cannot_be_chosen_so_that_it_is_another_keys(here):
    """A salted request's blocks are named by key and salt with a mark between; a key alone has no such mark."""
    first = here.house.keys.hashes[0]
    assert cached(here) == 0
    for salt in (first, f"{first}:", ":", f":{first}"):
        assert cached(here, "second", cache_salt=salt) == 0, salt


def test_time_does_not_tell_either_as_much_is_computed_as_for_a_prompt_that_nobody_sent(here):
    """What a stopwatch could see is the work: steps, and tokens in them."""

    def work(**wishes) -> tuple[int, int]:
        before = here.runner.steps, here.bridge.count("computed")
        cached(here, **wishes)
        return here.runner.steps - before[0], here.bridge.count("computed") - before[1]

    unseen = work(cache_salt="nobody")
    assert unseen == (5, len(PROMPT) + 3) == work(cache_salt="somebody") == work()
    assert work() == (4, len(PROMPT) + 3 - 80)


@pytest.mark.parametrize("salt", ["", 5, ["a"], "x" * 513])
def test_a_salt_is_a_text_of_up_to_512_characters(checkpoint_folder, salt):
    with served(checkpoint_folder) as here:
        reply = here.chat(cache_salt=salt)
        assert (reply.status, reply.error["param"]) == (400, "cache_salt")
        assert here.chat(cache_salt="ä" * 512).status == here.chat(cache_salt=None).status == 200
        described = here.ask("/openapi.json").json["components"]["schemas"]
        for kind in ("ChatRequest", "CompletionRequest"):
            assert "same API key and the same salt" in str(described[kind]["properties"]["cache_salt"])
