# SPDX-License-Identifier: Apache-2.0
"""Mixed traffic with closed connections, in short (`make stress` has it at length)."""

import asyncio
import random

from stress.server import settle
from stress.traffic import Client, server_asks

KINDS = (
    *("greedy", "long prompt", "preset", "block size", "random tokens", "drawn", "n"),
    *("logprobs", "penalty", "stop string", "regex", "schema", "endless", "bad"),
)
WINDOW = 64  # as the fixture's server has it


async def traffic(url, asks):
    """Send each request whole and streamed, with aborts between. Return counts and leftovers."""
    async with Client(url, 8) as client:

        async def one_client(number):
            rng = random.Random(number)
            for ask in asks[number::8]:
                await client.ask(ask, stream=False)
                if ask.known:
                    await client.abort(ask, rng)
                    await client.abort(ask, rng)
                await client.ask(ask, stream=True)

        await asyncio.gather(*map(one_client, range(8)))
        return client.tally, await settle(url, 120)


def test_answers_are_the_references_and_nothing_is_left(server):
    asks = server_asks(28, 5, KINDS, WINDOW)
    tally, left = asyncio.run(traffic(server.url, asks))
    assert tally.wrong == []
    assert left == {}
    choices = sum(len(ask.known) for ask in asks)
    assert sum(tally.equal.values()) + sum(tally.ties.values()) == 2 * choices
    assert sum(tally.ties.values()) <= 2
    assert sum(tally.refused.values()) == 2 * sum(not ask.known for ask in asks)
    assert sum(tally.aborted.values()) == 2 * sum(bool(ask.known) for ask in asks)
