# SPDX-License-Identifier: Apache-2.0
"""What prompts share, and how they are cut: the answers stay the reference's.

Each test starts engines of its own, and there is one engine at a time in a process.
"""

import pytest
from common import MAX_LEN, check, random_prompts

from benchmarks.parity import (
    Case,
    engine_answers,
    preemptions,
    reference_answers,
    sampling_params,
    shut_down,
    start_engine,
)
from vllm_d2f.d2f import D2FParams

PAGE, BLOCK = 32, 16


@pytest.fixture(scope="module", params=["dream", "llada"])
def model(request):
    return request.getfixturevalue(request.param)


def long_prompt(length, seed=9):
    return tuple(
        token for prompt in random_prompts(length, seed=seed, longest=2) for token in prompt[:1]
    )


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


class Hits:
    """vLLM's own metrics: (positions looked up, positions found) since the last call."""

    def __init__(self, llm):
        self.llm, self.seen = llm, (0, 0)

    def __call__(self):
        values = {m.name: m.value for m in self.llm.get_metrics() if hasattr(m, "value")}
        names = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
        seen, self.seen = self.seen, tuple(int(values[name]) for name in names)
        return tuple(now - before for now, before in zip(self.seen, seen, strict=True))


def test_identical_prompts_skip_their_prefill(model):
    """A retry and the answers of n > 1 find the whole pages of their prompt, and only theirs."""
    from vllm import SamplingParams

    prompt = long_prompt(100)
    drawn = SamplingParams(
        n=3,
        temperature=0.9,
        seed=5,
        max_tokens=40,
        detokenize=False,
        extra_args={"d2f_block_size": 8, "d2f_max_blocks": 4, "d2f_tau_conf": 0.6},
    )
    case = Case(prompt, D2FParams(8, 4, 0.1, 0.95, 0.6), 40)
    expected = reference_answers(model, [case], MAX_LEN)
    answers = []
    for cached in (False, True):
        llm = start_engine(
            model,
            window=64,
            max_model_len=MAX_LEN,
            enable_prefix_caching=cached,
            disable_log_stats=False,
        )
        (output,) = llm.generate({"prompt_token_ids": list(prompt)}, drawn, use_tqdm=False)
        answers.append([list(completion.token_ids) for completion in output.outputs])
        if cached:
            hits = Hits(llm)
            # Three answers: the second and third find what the first one wrote.
            assert hits() == (300, 2 * 96)
            check([case], expected, engine_answers(llm, [case], "batch"))
            assert hits() == (100, 96)
            # Another prompt with the same beginning, and the same with other blocks: nothing.
            other = Case(prompt + (7,), case.params, 40)
            blocks = Case(prompt, D2FParams(4, 4, 0.1, 0.95, 0.6), 40)
            check(
                [other, blocks],
                reference_answers(model, [other, blocks], MAX_LEN),
                engine_answers(llm, [other, blocks], "batch"),
            )
            assert hits() == (201, 0)
        shut_down(llm)
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers[0]))) == 3


def causal_engine(model, block=BLOCK, **options):
    section = {"block_size": block, "max_blocks": 2, "prompt_attention": "block_causal"}
    return start_engine(
        model,
        window=2 * block,
        max_model_len=MAX_LEN,
        disable_log_stats=False,
        additional_config={"d2f": section},
        **options,
    )


def watch_chunks(llm):
    """Return (start, stop, prompt length, whole length) of all chunks that end early."""
    scheduler, chunks = scheduler_of(llm), []
    schedule = scheduler.schedule

    def watched(*args, **kwargs):
        before = {r: q.num_computed_tokens for r, q in scheduler.requests.items()}
        output = schedule(*args, **kwargs)
        for data in output.scheduled_new_reqs:
            before[data.req_id] = data.num_computed_tokens
        for request_id, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[request_id]
            if request.is_prefill_chunk:
                start = before[request_id]
                chunks.append((start, start + count, request.num_prompt_tokens, request.num_tokens))
        return output

    scheduler.schedule = watched
    return chunks


def causal_cases(block=BLOCK):
    prompts = [long_prompt(n, seed=n) for n in (1, 15, 16, 17, 63, 64, 65, 100, 130, 200, 241, 260)]
    return [
        Case(p, D2FParams(size, 32 // size, 0.1, 0.95, 0.7), 40)
        for p, size in zip(prompts, [8, 16, 4, block] * 3, strict=True)
    ]


@pytest.mark.parametrize("caching", [False, True])
def test_block_causal_prompts_are_cut_between_blocks(model, caching):
    """With a budget of 64 tokens a step, prompts go in pieces, beside others' windows."""
    cases = causal_cases()
    expected = reference_answers(model, cases, MAX_LEN, prompt_block=BLOCK)
    llm = causal_engine(model, max_num_batched_tokens=64, enable_prefix_caching=caching)
    chunks = watch_chunks(llm)
    check(cases, expected, engine_answers(llm, cases, "batch"))
    assert len(chunks) > 12
    assert all(stop % BLOCK == 0 for _, stop, _, _ in chunks)
    assert any(start > 0 for start, _, _, _ in chunks)
    check(cases, expected, engine_answers(llm, cases, "arrivals", seed=3))
    if caching:
        before, hits = len(chunks), Hits(llm)
        hits()
        check(cases, expected, engine_answers(llm, cases, "batch"))
        queries, found = hits()
        assert 0.7 * queries < found < queries
        assert len(chunks) - before < before / 2
    shut_down(llm)


def test_block_causal_requests_come_back_in_pieces(model):
    """Preempted ones compute prompt and committed blocks again, cut where either kind ends.

    (Scheduled ahead, a query is wider and this budget too small to cut answers.)
    """
    cases = [Case(c.prompt[:150], D2FParams(4, 4, 0.1, 0.95, 0.7), 120) for c in causal_cases()]
    expected = reference_answers(model, cases, MAX_LEN, prompt_block=BLOCK)
    llm = causal_engine(
        model,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=-(-MAX_LEN // PAGE) + 8,
        max_num_seqs=12,
        async_scheduling=False,
    )
    chunks = watch_chunks(llm)
    check(cases, expected, engine_answers(llm, cases, "batch"))
    assert preemptions(llm) > 0
    for _, stop, prompt, _ in chunks:
        assert stop % BLOCK == 0 if stop < prompt else (stop - prompt) % 4 == 0
    assert any(stop > prompt for _, stop, prompt, _ in chunks), "no answer was cut"
    shut_down(llm)


def test_a_prompt_that_continues_with_an_answer_finds_the_prompts_pages_only(model):
    """The next turn of a chat: the answer's blocks began where the first prompt ended."""
    llm = causal_engine(model, enable_prefix_caching=True)
    hits = Hits(llm)
    params = D2FParams(BLOCK, 2, 0.1, 0.95, 0.7)
    first = Case(long_prompt(105), params, 120)
    (known,) = reference_answers(model, [first], MAX_LEN, prompt_block=BLOCK)
    for _ in range(2):
        check([first], [known], engine_answers(llm, [first], "batch"))
    assert hits()[1] == 96
    again = Case(first.prompt + known.answer.tokens[:100] + (5,), params, 40)
    expected = reference_answers(model, [again], MAX_LEN, prompt_block=BLOCK)
    check([again], expected, engine_answers(llm, [again], "batch"))
    assert hits()[1] == 96
    shut_down(llm)


def test_pages_that_end_inside_blocks_are_shared_by_identical_prompts_only(model):
    """Pages of 32 and prompt blocks of 12: a common beginning is not enough."""
    llm = causal_engine(model, block=12, enable_prefix_caching=True)
    hits = Hits(llm)
    prompt = long_prompt(100)
    cases = [Case(p, D2FParams(12, 2, 0.1, 0.95, 0.7), 30) for p in (prompt, prompt + (7,))]
    expected = reference_answers(model, cases, MAX_LEN, prompt_block=12)
    check(cases, expected, engine_answers(llm, cases, "single"))
    assert hits()[1] == 0
    check(cases, expected, engine_answers(llm, cases, "single"))
    assert hits()[1] == 2 * 96
    shut_down(llm)


@pytest.mark.parametrize("ahead, least", [(False, 32), (True, 64)])
def test_a_budget_below_the_window_is_refused(dream, ahead, least):
    with pytest.raises(ValueError, match=f"--max-num-batched-tokens 16 must be at least {least}"):
        causal_engine(dream, max_num_batched_tokens=16, max_num_seqs=4, async_scheduling=ahead)


def test_a_request_of_its_own_asks_for_chunks_too(dream):
    """One long prompt alone: the budget alone makes pieces of it."""
    llm = causal_engine(dream, max_num_batched_tokens=48, max_num_seqs=4, async_scheduling=False)
    case = Case(long_prompt(200), D2FParams(16, 2, 0.1, 0.95, 0.7), 20)
    chunks = watch_chunks(llm)
    check(
        [case],
        reference_answers(dream, [case], MAX_LEN, prompt_block=BLOCK),
        engine_answers(llm, [case], "single"),
    )
    assert [stop for _, stop, _, _ in chunks] == [48, 96, 144, 192]
    output = llm.generate(
        {"prompt_token_ids": list(case.prompt)}, sampling_params(case), use_tqdm=False
    )[0]
    assert len(output.outputs[0].token_ids) > 0
    shut_down(llm)
