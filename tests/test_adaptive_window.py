# SPDX-License-Identifier: Apache-2.0
"""The adaptive window's tables and its choice, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_d2f.d2f import Beginning, Window, add, step
from vllm_d2f.scheduler import D2FScheduler
from vllm_d2f.scheduler.adaptive import (
    LEVELS,
    PRIOR,
    AdaptiveWindow,
    DecisionRates,
    StepCost,
    Windows,
    choose,
)
from vllm_d2f.settings import request_params, served_settings
from vllm_d2f.wire import StepStats

M, X = 1, 7  # the mask token, any other


def test_costs_never_fall_and_go_on_in_proportion():
    cost = StepCost({8: 0.01, 32: 0.01, 64: 0.02})
    asked = np.array([1.0, 8, 32, 48, 64, 128, 1 << 16])
    # The sizes between measured ones lie on a line.
    expected = [0.01, 0.01, 0.01, 0.015, 0.02, 0.04, 20.48]
    assert cost.seconds(asked) == pytest.approx(expected, rel=0.01)
    fell = StepCost({8: 0.03, 64: 0.01}).seconds(np.array([1.0, 8, 64]))
    assert (np.diff(fell) >= 0).all() and 0.01 <= fell[0] <= 0.03


def test_a_machine_that_was_busy_while_it_was_measured():
    """Served steps correct the table, and one long pause does not spoil it."""
    cost = StepCost({16: 0.3, 64: 0.3, 256: 0.9})
    true = {16: 0.01, 64: 0.012, 256: 0.04}
    for _ in range(60):
        for positions, seconds in true.items():
            cost.correct(positions, seconds)
    assert cost.seconds(np.array([16.0, 64, 256])) == pytest.approx(list(true.values()), rel=0.05)
    cost.correct(64, 10.0)
    assert cost.seconds(np.array([64.0]))[0] < 0.012 * math.exp(0.2 * 1.5) * 1.06


def windows():
    """Blocks of 4: one request at its first, one with a tail of 2 whose first block is decided."""
    return Windows.of([[X, M, M, X, M, M, M, M], [X, X, X, M, M, X]], [0, -2], [4, 4], [0, 2], M)


def test_windows_by_block():
    found = windows()
    assert found.size_RJ.tolist() == [[4, 4], [4, 4]]
    assert found.masked_RJ.tolist() == [[2, 4], [0, 2]]
    # The block before is half decided in the first window and wholly decided in the second.
    assert found.place_RJ().tolist() == [
        [LEVELS - 1, LEVELS + 2],
        [LEVELS - 1, LEVELS + LEVELS - 1],
    ]
    # A decided block is committed beside the block of the first mask.
    assert found.least_R().tolist() == [1, 2]


def test_rates():
    rates, (_, share) = DecisionRates(), PRIOR
    assert rates.expected_RJ(windows()) == pytest.approx(share * np.array([[2.0, 4.0], [0.0, 2.0]]))
    place = np.array([LEVELS - 1])
    for _ in range(400):
        rates.learn(place, np.array([4]), np.array([1]))
    assert rates.expected_RJ(windows())[0] == pytest.approx([0.5, 4 * share], rel=0.02)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        # Every step costs the same: the widest windows.
        ({8: 0.01, 512: 0.01}, [2, 2]),
        # In proportion to positions: blocks below the best density stay out.
        ({8: 0.001, 80: 0.01}, [1, 1]),
        # In between: of the second blocks only the better one pays.
        ({8: 0.01, 16: 0.01, 24: 0.0112, 32: 0.0135}, [2, 1]),
    ],
)
def test_choice(seconds, chosen):
    gain_RJ = np.array([[4.0, 2.0], [4.0, 1.0]])
    size_RJ = np.full((2, 2), 8)
    least_R = np.array([1, 1])
    assert choose(gain_RJ, size_RJ, least_R, StepCost(seconds), 0).tolist() == chosen


def test_choice_keeps_what_must_go_in_and_offers_no_block_that_is_not_open():
    gain_RJ = np.array([[0.0, 1.0, 9.0], [4.0, 0.0, 0.0]])
    size_RJ = np.array([[8, 8, 8], [8, 0, 0]])
    dear = StepCost({8: 0.001, 80: 0.01})
    assert choose(gain_RJ, size_RJ, np.array([2, 1]), dear, 0).tolist()[1] == 1
    assert choose(gain_RJ, size_RJ, np.array([2, 1]), dear, 0).tolist()[0] >= 2
    every_decided = choose(np.zeros((1, 2)), np.array([[8, 8]]), np.array([3]), dear, 0)
    assert every_decided.tolist() == [2]


def test_learns_from_what_came_of_the_choice():
    """The first window moves by a block; the second loses a block behind an end token."""
    adaptive = AdaptiveWindow({8: 0.01, 512: 0.01}, M)
    widths = adaptive.choose(
        ["a", "b"],
        [[X, M, X, X, M, M, M, M], [M, M, M, M, M, M, M, M]],
        [0, 4],
        [4, 4],
        [0, 0],
        others=0,
    )
    assert widths == [8, 8]
    before = adaptive.rates.decided.copy(), adaptive.rates.masked.copy()
    adaptive.learn(["b", "a", "new"], [[X, X, M, M], [M, M, X, X], [M]], [4, 4, 0], [0, 0, 0])
    decided = adaptive.rates.decided - before[0] * 0.995
    masked = adaptive.rates.masked - before[1] * 0.995
    first, second = LEVELS - 1, LEVELS + 3  # the block before is decided to three quarters
    assert decided[first] == pytest.approx(1 + 2)  # one of one in a, two of four in b
    assert masked[first] == pytest.approx(1 + 4)
    assert decided[second] == pytest.approx(2) and masked[second] == pytest.approx(4)
    assert decided.sum() == pytest.approx(5)  # the lost block counts for nothing


def scheduler():
    """Make vLLM's scheduler with D2F, for d2f-tiny with adaptive windows, and no engine."""
    options = {"additional_config": {"d2f": {"adaptive_window": True}}, "enforce_eager": True}
    config = EngineArgs(
        model="d2f-tiny", dtype="float32", enable_prefix_caching=False, **options
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = 200
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(200, [], [KVCacheGroupSpec(["layer"], spec)])
    manager = StructuredOutputManager(config)
    return config, D2FScheduler(config, cache, manager, 16, hash_block_size=16, log_stats=True)


def test_more_tokens_than_a_short_prompt_and_a_narrow_query_have_positions():
    """The scheduler and the device agree where a query begins, whatever a step emits.

    Of the first block the first position is decoded last; then everything behind it is emitted.
    """
    config, host = scheduler()
    sampling = SamplingParams(temperature=0, max_tokens=100)
    sampling.update_from_generation_config({}, 0)
    params = request_params(served_settings(config.model_config), None)
    prompt = [5, 6, 7, 8, 9]
    host.add_request(Request("r", prompt, sampling, None))
    window = Window.empty(1, params.window, 8, M)
    window.start([0], [Beginning(params, 100, 512 - len(prompt), [0])], M)
    add(window)
    begin, emitted, most = 0, 0, 0
    while "r" in host.requests:
        scheduled = host.schedule()
        new, cached = scheduled.scheduled_new_reqs, scheduled.scheduled_cached_reqs
        computed = new[0].num_computed_tokens if new else cached.num_computed_tokens[0]
        assert computed == begin
        drafts = len(scheduled.scheduled_spec_decode_tokens.get("r", ()))
        position_W = torch.arange(params.window) + int(window.start_R)
        sure_W = torch.where(position_W < 16, 0.3 + 0.01 * position_W, torch.tensor(0.99))
        sure_W[drafts:] = -1.0  # not computed
        done = step(window, (position_W % 50 + 10)[None], sure_W[None].float(), M)
        add(window)
        first, last = int(done.emitted_R), int(done.emit_R)
        begin += scheduled.num_scheduled_tokens["r"] - drafts + int(done.commit_R)
        emitted, most = emitted + last - first, max(most, last - first - drafts)
        stats = StepStats.pack(0, 0, 0, int(window.open_R), 0)
        tokens = done.tokens_RW[0, first:last].tolist()
        host.update_from_output(
            scheduled,
            ModelRunnerOutput(
                req_ids=["r"],
                req_id_to_index={"r": 0},
                sampled_token_ids=[tokens],
                prompt_logprobs_dict={},
                num_nans_in_logits={"r": stats},
            ),
        )
        open_W = torch.where(window.column_W < window.open_R[:, None], window.tokens_RW, -1)
        host.update_draft_token_ids(DraftTokenIds(["r"], open_W.tolist()))
    assert emitted == 100 and most > len(prompt)
