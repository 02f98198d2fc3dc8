# SPDX-License-Identifier: Apache-2.0
"""Lookahead branches give what LoPA's authors' code gave on a random Dream checkpoint.

`tests/data/golden/lopa.json` has their runs with block-causal attention and released settings; the
checkpoint lies beside it. Their code forces the anchor to win or makes no branch in some of them.
"""

import json
import math
from pathlib import Path

import pytest

from vllm_d2f.d2f import D2FParams
from vllm_d2f.lookahead import generate
from vllm_d2f.models.hf import load_hf
from vllm_d2f.reference import decode, hf_forward

GOLDEN = Path(__file__).parent / "data" / "golden"
RUNS = json.loads((GOLDEN / "lopa.json").read_text())
MASK, END = 198, 199


@pytest.fixture(scope="module")
def forward():
    return hf_forward(load_hf(str(GOLDEN))[0])


def look(forward, run, **options):
    blocks = run["max_new_tokens"] // run["block_size"]
    taus = (run["tau_add"], run["tau_act"], run["tau_conf"])
    given = dict(
        lookaheads=run["lookaheads"],
        max_tokens=blocks * run["block_size"],
        mask_id=MASK,
        ends=[END],
        shift=True,
    )
    params = D2FParams(run["block_size"], blocks, *taus)
    return generate(forward, run["prompt"], params, **given | options)


@pytest.mark.parametrize("run", RUNS, ids=range(len(RUNS)))
def test_authors_runs(forward, run):
    margin = math.inf if run["anchor_always_wins"] else 0.0
    found = look(forward, run, margin=margin, run_on=True)
    assert found.tokens == run["output"]
    assert found.rounds == run["steps"] and found.winners == run["winners"]
    for scores, theirs in zip(found.scores, run["scores"], strict=True):
        # They count the mask token among the candidates, and an anchor alone twice.
        assert scores == pytest.approx(theirs[: len(scores)], abs=1e-3)


def test_a_lookahead_must_win_by_the_margin(forward):
    run = RUNS[3]
    assert run["lookaheads"] == 4 and any(run["winners"])
    wins = []
    for margin in (0.0, 0.05, 1.0, math.inf):
        found = look(forward, run, margin=margin)
        for scores, winner in zip(found.scores, found.winners, strict=True):
            assert len(scores) <= 5 and winner < len(scores)
            assert (winner > 0) == (max(scores[:-1], default=-math.inf) >= scores[-1] + margin)
            if winner:
                assert scores[winner - 1] == max(scores[:-1])
        wins.append(sum(winner > 0 for winner in found.winners))
    assert wins[0] > wins[2] >= wins[3] == 0
    alone = look(forward, run, lookaheads=0)
    assert found.tokens == alone.tokens and found.rounds == alone.rounds


@pytest.mark.parametrize("lookaheads", [0, 2])
def test_an_answer_ends_with_its_first_end_token(forward, lookaheads):
    ended = 0
    for run in RUNS[:24:4]:
        free = look(forward, run, lookaheads=lookaheads, ends=[])
        end = free.tokens[len(free.tokens) // 2]
        found = look(forward, run, lookaheads=lookaheads, ends=[end])
        assert MASK not in found.tokens and end not in found.tokens[:-1]
        ended += found.tokens[-1] == end
        assert found.rounds <= free.rounds
    assert ended >= 5


@pytest.mark.parametrize("prompt_block", [None, 4])
def test_without_lookaheads_it_is_d2f(forward, prompt_block):
    """Where the forced token has the lowest entropy; a prompt may be causal by blocks."""
    cases = 0
    for seed in range(12):
        prompt = [(31 * seed + 7 * i) % 190 for i in range(11)]
        params = D2FParams(4, 3, 0.1, 0.95, 0.0)
        given = dict(max_tokens=16, mask_id=MASK, ends=[END], shift=True, prompt_block=prompt_block)
        *_, last = decode(forward, prompt, params, **given)
        found = generate(forward, prompt, params, lookaheads=0, **given)
        assert found.tokens == last.tokens and found.rounds == last.forward
        other = generate(forward, prompt, params, lookaheads=0, **given | {"prompt_block": 2})
        cases += other.tokens != found.tokens
    assert cases
