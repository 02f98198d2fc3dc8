# SPDX-License-Identifier: Apache-2.0
"""Models that say NaN, infinity, everything alike or the mask token: a bounded number of forwards,
the reference's answer, and a count of the proposals that had no distribution.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "engine")]
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from broken_models import (  # noqa: E402
    INF_TOKEN,
    MASK,
    NAN_TOKEN,
    POISON,
    embedding,
    head,
    write_broken,
)
from common import random_prompts  # noqa: E402

from benchmarks.parity import (  # noqa: E402
    Case,
    engine_answers,
    load_forward,
    sampling_params,
    shut_down,
    start_engine,
)
from vllm_d2f.d2f import D2FParams  # noqa: E402
from vllm_d2f.metrics import D2FStatLogger  # noqa: E402
from vllm_d2f.reference import decode  # noqa: E402

WINDOW, MAX_LEN, MAX_TOKENS = 64, 128, 24
SETTINGS = [
    D2FParams(8, 4, 0.1, 0.95, 0.9),
    D2FParams(4, 8, 0.9, 0.5, 0.0),
    D2FParams(16, 1, 0.0, 0.0, 1.0),
]


class Engine:
    """An engine whose weights are replaced, as starting one for each model takes seconds."""

    def __init__(self, folder: str) -> None:
        self.llm = start_engine(
            folder,
            window=WINDOW,
            max_model_len=MAX_LEN,
            max_num_seqs=16,
            kv_cache_memory_bytes=1 << 24,
            disable_log_stats=False,
        )
        # As a server does; vLLM's offline engine does not load plugins for metrics.
        engine = self.llm.llm_engine
        logger = D2FStatLogger(engine.vllm_config, [0])
        logger.log_engine_initialized()
        engine.logger_manager.stat_loggers.append(logger)

    def load(self, folder: str) -> None:
        """Take over the two matrices in which the models differ; the others are packed away."""
        weights = load_file(Path(folder) / "model.safetensors")
        changed = {
            n: t for n, t in weights.items() if t is head(weights) or t is embedding(weights)
        }
        assert len(changed) == 2

        def take(model) -> None:
            model.load_weights(iter(changed.items()))
            # On a CPU it is multiplied with a packed copy.
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

        self.llm.apply_model(take)

    def nonfinite(self) -> int:
        """Return the counter as on /metrics."""
        metrics = self.llm.get_metrics()
        (value,) = [m.value for m in metrics if m.name == "vllm:d2f_nonfinite_proposals"]
        return value


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Iterator[Callable[[str], Engine]]:
    """Layout -> an engine for it; one at a time."""
    running: dict[str, Engine] = {}

    def get(layout: str) -> Engine:
        if layout not in running:
            for engine in running.values():
                shut_down(engine.llm)
            running.clear()
            folder = write_broken(tmp_path_factory.mktemp(layout), "equal", layout)
            running[layout] = Engine(folder)
        return running[layout]

    yield get
    for engine in running.values():
        shut_down(engine.llm)


def without(prompts, token):
    return [[t if t != token else token + 1 for t in prompt] for prompt in prompts]


def make_cases(count=2):
    prompts = without(random_prompts(count, seed=5, longest=40), POISON)
    return [Case(tuple(p), s, MAX_TOKENS) for p in prompts for s in SETTINGS]


def reference(folder, cases):
    """For each case the last frame, and the proposals without a distribution in all of them."""
    forward, config = load_forward(folder)
    known = []
    for case in cases:
        frames = list(
            decode(
                forward,
                case.prompt,
                case.params,
                max_tokens=case.max_tokens,
                mask_id=config.mask_token_id,
                ends=config.end_token_ids,
                shift=config.logits_shift,
                max_len=MAX_LEN,
            )
        )
        known.append((frames[-1], sum(frame.nonfinite for frame in frames)))
    return known


def compare(known, answers):
    assert [answer.tokens for answer in answers] == [tuple(frame.tokens) for frame, _ in known]
    assert [answer.forwards for answer in answers] == [frame.forward for frame, _ in known]
    for (frame, _), answer in zip(known, answers, strict=True):
        # A forward decides at least one position, or it commits a block where none may be opened.
        blocks = -(-MAX_TOKENS // frame.block_size)
        assert answer.forwards <= blocks * (frame.block_size + 1)
    assert all(MASK not in answer.tokens for answer in answers)


@pytest.mark.parametrize(
    ("kind", "layout", "tokens"),
    [
        ("inf", "llada", None),
        ("all_nan", "llada", {0}),
        ("nan", "dream", {NAN_TOKEN}),
        ("equal", "dream", {0}),
        ("mask", "dream", None),
    ],
)
def test_the_engine_says_what_the_reference_says(tmp_path, engines, kind, layout, tokens):
    folder = write_broken(tmp_path, kind, layout)
    cases = make_cases()
    known = reference(folder, cases)
    engine = engines(layout)
    engine.load(folder)
    before = engine.nonfinite()
    compare(known, engine_answers(engine.llm, cases, "batch"))
    assert engine.nonfinite() - before == sum(nonfinite for _, nonfinite in known)
    for frame, nonfinite in known:
        assert tokens is None or set(frame.tokens) == tokens
        # One position of one block at a time at least, and all of it without a distribution.
        if kind in ("nan", "all_nan"):
            assert nonfinite >= MAX_TOKENS and max(frame.confidences) == 0
        elif kind == "inf":
            assert nonfinite > 0 and INF_TOKEN in frame.tokens
        else:
            assert nonfinite == 0
    if kind in ("nan", "all_nan", "equal"):  # they never end
        assert all(len(frame.tokens) == MAX_TOKENS for frame, _ in known)


@pytest.fixture
def poisoned(tmp_path, engines):
    folder = write_broken(tmp_path, "poison")
    engine = engines("dream")
    engine.load(folder)
    return folder, engine


def test_a_request_with_nan_hurts_no_other(poisoned):
    """Beside it, and on the pages and slots that it left behind."""
    folder, engine = poisoned
    good = make_cases(4)
    bad = [
        Case((*case.prompt[: i + 1], POISON, *case.prompt[i + 1 :]), case.params, case.max_tokens)
        for i, case in enumerate(good)
    ]
    known, known_bad = reference(folder, good), reference(folder, bad)
    assert all(n == 0 for _, n in known) and all(n >= MAX_TOKENS for _, n in known_bad)
    mixed = [case for pair in zip(good, bad, strict=True) for case in pair]
    before = engine.nonfinite()
    for _ in range(3):
        answers = engine_answers(engine.llm, mixed, "batch")
        compare(known, answers[::2])
        compare(known_bad, answers[1::2])
        compare(known, engine_answers(engine.llm, good, "batch"))
    assert engine.nonfinite() - before == 3 * sum(n for _, n in known_bad)


def test_without_a_limit_the_models_length_is_one(poisoned):
    llm = poisoned[1].llm
    params = sampling_params(Case((POISON, 3), SETTINGS[0], MAX_TOKENS))
    params.max_tokens = None
    (output,) = llm.generate([{"prompt_token_ids": [POISON, 3]}], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == MAX_LEN - 2
    assert output.outputs[0].finish_reason == "length"


def test_everything_a_request_may_ask_of_nan(poisoned):
    """Temperature, limits, penalties, log-probabilities: it ends, and JSON can carry it."""
    llm = poisoned[1].llm
    prompts, asked = [], []
    for options in (
        dict(temperature=1.0, seed=3),
        dict(temperature=1.0, seed=3, top_p=0.5, top_k=3, min_p=0.1),
        dict(repetition_penalty=1.3, presence_penalty=1, frequency_penalty=1),
        dict(logprobs=3),
        dict(logprobs=3, temperature=0.5),
        dict(logit_bias={9: 50.0}),
        dict(allowed_token_ids=[5, 6]),
        dict(min_tokens=20),
    ):
        params = sampling_params(Case((POISON,), SETTINGS[0], MAX_TOKENS))
        for name, value in options.items():
            setattr(params, name, value)
        prompts.append({"prompt_token_ids": [4, POISON]})
        asked.append(params)
    for output in llm.generate(prompts, asked, use_tqdm=False):
        tokens = list(output.outputs[0].token_ids)
        assert 0 < len(tokens) <= MAX_TOKENS and MASK not in tokens[:-1]
        for entry in output.outputs[0].logprobs or ():
            # vLLM raises -inf to -9999 and leaves the rest as it is.
            values = [max(found.logprob, -9999.0) for found in entry.values()]
            json.dumps(values, allow_nan=False)
