# SPDX-License-Identifier: Apache-2.0
"""Streams under preemption, and their text; each test starts an engine of its own."""

import random
from dataclasses import asdict

import pytest
from checkpoints import write_dream
from common import MAX_LEN, WINDOW, grid_cases, random_prompts

from benchmarks.parity import preemptions, sampling_params, shut_down, start_engine

PAGE = 32


@pytest.mark.parametrize("name", ["dream", "llada"])
def test_preemption_repeats_and_loses_nothing(name, request):
    """What left before a preemption does not leave again, and penalties still see all of it."""
    from vllm import SamplingParams

    model, cases = request.getfixturevalue(name), grid_cases()
    pages = -(-MAX_LEN // PAGE) + 8
    options = dict(window=WINDOW, max_model_len=MAX_LEN, max_num_seqs=24)
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    penalised = [
        SamplingParams(
            temperature=0,
            max_tokens=96,
            detokenize=False,
            presence_penalty=1.5,
            ignore_eos=True,
            extra_args={f"d2f_{k}": v for k, v in asdict(case.params).items()},
        )
        for case in cases
    ]
    plain, answers = [], []
    for override in ({}, {"num_gpu_blocks_override": pages}):
        engine = start_engine(model, **options, **override)
        outputs = engine.generate(prompts, penalised, use_tqdm=False)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
        if override:
            assert preemptions(engine) > 0
        plain.append(stepped(engine, cases))
        assert engine.llm_engine.engine_core.engine_core.scheduler.streams == {}
        shut_down(engine)
    for first, second in (plain, answers):
        # Rounding may decide one: pages elsewhere, sums in another order.
        assert sum(a == b for a, b in zip(first, second, strict=True)) >= len(cases) - 1


def stepped(llm, cases):
    """Answers, while every output is seen to begin with the one before it."""
    engine, said = llm.llm_engine, {}
    for index, case in enumerate(cases):
        engine.add_request(
            str(index), {"prompt_token_ids": list(case.prompt)}, sampling_params(case)
        )
    while engine.has_unfinished_requests():
        for output in engine.step():
            before = said.get(output.request_id, [])
            said[output.request_id] = list(output.outputs[0].token_ids)
            assert said[output.request_id][: len(before)] == before
    return [said[str(index)] for index in range(len(cases))]


def talker(folder):
    """Return an engine whose tokens are single bytes and more: characters are cut across tokens."""
    path = write_dream(folder, vocab_size=300, seed=5)
    return start_engine(
        str(path),
        window=64,
        max_model_len=256,
        skip_tokenizer_init=False,
        additional_config={"d2f": {"block_size": 16, "max_blocks": 4}},
    )


def texts(llm, requests, kind):
    """Text of each request, its pieces joined, and its tokens, finish and stop reason."""
    engine = llm.llm_engine
    for index, (prompt, params) in enumerate(requests):
        params = params.clone()
        params.output_kind = kind
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    text = ["" for _ in requests]
    tokens = [[] for _ in requests]
    ends, pieces = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            index, completion = int(output.request_id), output.outputs[0]
            text[index] += completion.text
            tokens[index] += completion.token_ids
            pieces += 1
            if output.finished:
                ends[index] = (completion.finish_reason, completion.stop_reason)
    return text, tokens, ends, pieces


def test_200_streams_join_to_the_unstreamed_text(tmp_path):
    """Stop strings inside blocks, characters of several tokens, end tokens inside blocks."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm, rng = talker(tmp_path), random.Random(7)
    prompts = random_prompts(200, seed=41, vocab=290, longest=30)

    def request(index, **options):
        return SamplingParams(
            temperature=1.0,
            seed=index,
            max_tokens=rng.randint(20, 60),
            extra_args={"d2f_tau_conf": 0.3, "d2f_block_size": rng.choice([4, 8, 16])},
            **options,
        )

    free = [(p, request(i)) for i, p in enumerate(prompts)]
    said, tokens, _, _ = texts(llm, free, RequestOutputKind.FINAL_ONLY)
    requests = []
    for index, (prompt, params) in enumerate(free):
        params = params.clone()
        if index % 3 == 0 and len(said[index]) > 8:
            at = rng.randrange(4, len(said[index]) - 2)
            params.stop = [said[index][at : at + rng.randint(1, 3)], "never said"]
            params.output_text_buffer_length = max(map(len, params.stop)) - 1
            params.include_stop_str_in_output = index % 2 == 0
        elif index % 3 == 1:
            params.stop_token_ids = [tokens[index][rng.randrange(len(tokens[index]))]]
        requests.append((prompt, params))
    whole = texts(llm, requests, RequestOutputKind.FINAL_ONLY)
    stream = texts(llm, requests, RequestOutputKind.DELTA)
    shut_down(llm)
    assert stream[:3] == whole[:3]
    assert stream[3] > 3 * whole[3] == 600
    reasons = [reason for reason, _ in whole[2].values()]
    stopped = [r for r in whole[2].values() if isinstance(r[1], str)]
    assert len(stopped) > 40 and reasons.count("stop") - len(stopped) > 40
    # Multi-byte characters that came out whole, although their bytes are tokens of their own.
    assert sum(ord(c) > 127 and c != "\ufffd" for text in whole[0] for c in text) > 100
