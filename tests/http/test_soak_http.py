# SPDX-License-Identifier: Apache-2.0
"""Mixed traffic with closed connections, in short (`benchmarks.reliability.soak` at length)."""

import asyncio
import random

from benchmarks.reliability.server import settle
from benchmarks.reliability.traffic import Client, make_http_asks, server_config
from benchmarks.reliability.truth import load_truth

KINDS = (
    *("greedy", "long prompt", "preset", "block size", "random tokens", "drawn", "n"),
    *("logprobs", "penalty", "stop string", "regex", "schema", "endless", "bad"),
)
WINDOW = 64  # as the fixture's server has it


async def traffic(url, asks):
    """Each request whole and streamed, and closed connections between; the tally, what is left."""
    async with Client(url, 8) as client:

        async def one_client(number):
            rng = random.Random(number)
            for ask in asks[number::8]:
                await client.ask(ask, stream=False)
                if ask.known is not None:
                    await client.abort(ask, rng)
                    await client.abort(ask, rng)
                await client.ask(ask, stream=True)

        await asyncio.gather(*map(one_client, range(8)))
        return client.tally, await settle(url, 120)


def test_answers_are_the_references_and_nothing_is_left(server):
    asks = make_http_asks(28, 5, load_truth(server_config(), window=WINDOW), kinds=KINDS)
    tally, left = asyncio.run(traffic(server.url, asks))
    assert tally.wrong == []
    assert left == {}
    choices = sum(len(ask.known) for ask in asks if ask.known)
    assert sum(tally.equal.values()) + sum(tally.ties.values()) == 2 * choices
    assert sum(tally.ties.values()) <= 2
    assert sum(tally.refused.values()) == 2 * sum(ask.known is None for ask in asks)
    assert sum(tally.aborted.values()) == 2 * sum(ask.known is not None for ask in asks)
