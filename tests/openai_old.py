"""Asks a service through whatever version of OpenAI's client this interpreter has; what it gave, as JSON on stdout.

Run by test_service_openai.py in an environment with version 2, so it may import nothing else of the tests.
"""

import asyncio
import json
import sys

import openai

WORDS = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
STREAM = {**WORDS, "stream": True, "stream_options": {"include_usage": True}}


def text_of(chunks: list) -> str:
    return "".join(piece.delta.content or "" for chunk in chunks for piece in chunk.choices)


async def asynchronously(access: dict) -> dict:
    async with openai.AsyncOpenAI(**access) as client:
        whole = await client.chat.completions.create(**WORDS)
        chunks = [chunk async for chunk in await client.chat.completions.create(**STREAM)]
        return {"text": whole.choices[0].message.content, "streamed": text_of(chunks)}


def main(address: str) -> dict:
    access = {"base_url": f"{address}/v1", "api_key": "any", "max_retries": 0}
    with openai.OpenAI(**access) as client:
        whole = client.chat.completions.create(**WORDS)
        chunks = list(client.chat.completions.create(**STREAM))
        plain = client.completions.create(model="tiny", prompt="hello", max_tokens=3)
        found = {
            "version": openai.__version__,
            "models": [model.id for model in client.models.list()],
            "text": whole.choices[0].message.content,
            "request_id": whole._request_id,
            "usage": whole.usage.to_dict(),
            "streamed": text_of(chunks),
            "streamed_usage": chunks[-1].usage.to_dict(),
            "completion_tokens": plain.usage.completion_tokens,
        }
        try:
            client.chat.completions.create(**{**WORDS, "temperature": 9})
        except openai.BadRequestError as error:
            found["error"] = {"status": error.status_code, "code": error.code, "param": error.param}
    return found | {"async": asyncio.run(asynchronously(access))}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
