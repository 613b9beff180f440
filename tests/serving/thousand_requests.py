"""Memory of the server over 1,000 requests of all kinds. It takes minutes, so its name keeps it out of CI:

python -m pytest -s tests/serving/thousand_requests.py
"""

import asyncio
import random
import time

import openai
import psutil
from openai import AsyncOpenAI

from served import Served, save_tiny


async def request(api: AsyncOpenAI, seed: int) -> None:
    """Whole or streamed, read to its end or left, with experts, too long or wrong."""
    draw = random.Random(seed)
    prompt = draw.choices(range(20, 100), k=draw.choice([3, 30, 300]))
    options = {"model": "words", "prompt": prompt, "max_tokens": draw.choice([4, 40, 120]), "seed": seed}
    kind = draw.choice(["whole", "stream", "leave", "experts", "wrong", "long"])
    if kind in ("stream", "leave"):
        stream = await api.completions.create(**options, stream=True)
        async for _ in stream:
            if kind == "leave":
                break
        await stream.close()
    elif kind in ("wrong", "long"):
        wrong = {"temperature": 1e9} if kind == "wrong" else {"max_tokens": 10**6}
        try:
            await api.completions.create(**{**options, **wrong})
        except openai.BadRequestError:
            return
        raise AssertionError(f"{wrong} was taken")
    else:
        await api.completions.create(**options, extra_body={"experts": kind == "experts"})


async def requests(url: str, seeds: range, at_once: int = 32) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as api:
        places = asyncio.Semaphore(at_once)

        async def placed(seed: int) -> None:
            async with places:
                await request(api, seed)

        await asyncio.gather(*map(placed, seeds))


def test_memory_after_a_thousand_requests_is_that_after_the_first(tmp_path):
    server = Served(save_tiny(tmp_path / "words"), tmp_path / "log")
    process, sizes = psutil.Process(server.process.pid), []
    try:
        for first in range(0, 1200, 200):
            started = time.monotonic()
            asyncio.run(requests(server.url, range(first, first + 200)))
            seconds = time.monotonic() - started
            time.sleep(1.5)  # for the log
            sizes.append(process.memory_info().rss / 2**20)
            print(
                f"{first + 200:5} requests: {sizes[-1]:.1f} MiB, {process.num_fds()} files, {seconds:.0f} s", flush=True
            )
        print(server.log.splitlines()[-1])
    finally:
        server.stop()
    assert max(sizes[1:]) < sizes[0] + 20  # the first 200 fill the pools of the allocator
