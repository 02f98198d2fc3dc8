# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for works with every family, or is refused by name.

Each family decodes as it is published, on tiny random weights. Tokens, forwards and
log-probabilities are those of the reference; texts are checked by what the request asked for.
"""

import json
import re
import shutil

import pytest
from checkpoints import (
    write_dream,
    write_dream_reasoner,
    write_llada,
    write_llada_tokenizer,
    write_sdar_moe,
)
from common import random_prompts
from published_runs import DATA
from rules import Rule, engine_answers, reference_answers

from benchmarks.harness.engine import shut_down, start_engine
from vllm_d2f.d2f import D2FParams

MAX_LEN, WINDOW, END = 144, 64, 199
DRAWN = dict(temperature=0.8, seed=11)
OPTIONS = {
    "greedy": {},
    "temperature and seed": DRAWN,
    "top_p, top_k, min_p": DRAWN | dict(top_p=0.9, top_k=20, min_p=0.01),
    "stop_token_ids": dict(stop_token_ids=list(range(0, 200, 9))),
    "repetition_penalty": dict(repetition_penalty=1.4),
    "presence_penalty": dict(presence_penalty=1.9),
    "frequency_penalty": dict(frequency_penalty=2.0),
    "logprobs": dict(logprobs=5),
    "logprobs, drawn": DRAWN | dict(logprobs=0),
    "logit_bias": dict(logit_bias={7: 6.0}),
    "min_tokens": dict(min_tokens=20, stop_token_ids=list(range(0, 200, 9))),
}
PUBLISHED = {
    "dream": D2FParams(16, 4, 0.1, 0.95, 0.9),
    "llada": D2FParams(16, 4, 0.1, 0.95, 0.9),
    "sdar": D2FParams(4, 1, tau_conf=0.85),
    "sdar_moe": D2FParams(4, 1, tau_conf=0.85),
    "dream_reasoner": D2FParams(32, 1, tau_conf=0.9),
    "llada2": D2FParams(32, 1, tau_conf=0.95),
    "fast_dllm_v2": D2FParams(32, 2, tau_add=1.0, tau_conf=0.9, sub_block_size=8),
    "stable_diffcoder": D2FParams(4, 1, tau_conf=0.9499999, cut_last_block=1),
}

pytestmark = pytest.mark.slow


def write(family, path):
    """Return a tiny checkpoint of the family with a byte-level tokenizer."""
    if family == "dream":
        return write_dream(path)
    if family == "llada":
        return write_llada(path)
    if family == "sdar_moe":
        return write_sdar_moe(path)
    if family == "dream_reasoner":
        write_dream_reasoner(path)
    else:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(DATA / family / name, path / name)
    config = json.loads((path / "config.json").read_text())
    config |= {"mask_token_id": END - 1, "eos_token_id": END, "pad_token_id": END}
    (path / "config.json").write_text(json.dumps(config))
    write_llada_tokenizer(path, config["vocab_size"])
    return path


@pytest.fixture(scope="module", params=PUBLISHED)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, tmp_path_factory):
    return str(write(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def llm(model):
    llm = start_engine(
        model,
        window=WINDOW,
        max_model_len=MAX_LEN,
        skip_tokenizer_init=False,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )
    yield llm
    shut_down(llm)


def asked(family, **options):
    """Sampling parameters with the family's published settings, and a text as the answer."""
    rule = Rule((), {"detokenize": True} | options, params=PUBLISHED[family])
    return rule.sampling_params()


def answers(llm, request, prompt="what is 2 + 3?"):
    return llm.generate(prompt, request, use_tqdm=False)[0].outputs


def test_sampling_parameters(family, model, llm):
    prompts = random_prompts(len(OPTIONS), seed=5)
    rules = [
        Rule(tuple(prompt), options, params=PUBLISHED[family])
        for prompt, options in zip(prompts, OPTIONS.values(), strict=True)
    ]
    expected, got = reference_answers(model, rules, MAX_LEN), engine_answers(llm, rules)
    for name, want, have in zip(OPTIONS, expected, got, strict=True):
        assert (have.tokens, have.forwards) == (want.tokens, want.forwards), name
        if "logprobs" in OPTIONS[name]:
            assert have.logprobs == pytest.approx(want.logprobs, abs=1e-3), name


def test_a_stop_string_cuts_the_text(family, llm):
    text = answers(llm, asked(family, ignore_eos=True))[0].text
    stop = text[len(text) // 2 :][:3]
    stopped = answers(llm, asked(family, ignore_eos=True, stop=[stop]))[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop" and stopped.stop_reason == stop


@pytest.mark.parametrize("options", [{}, DRAWN])
def test_structured_outputs(family, llm, options):
    from vllm.sampling_params import StructuredOutputsParams

    for regex, constraint in (
        ("yes|no|maybe 7", dict(choice=["yes", "no", "maybe 7"])),
        ("(pens|apples): [0-9]{1,4}", dict(regex="(pens|apples): [0-9]{1,4}")),
    ):
        structured = StructuredOutputsParams(**constraint)
        found = answers(llm, asked(family, structured_outputs=structured, **options))[0]
        assert re.fullmatch(regex, found.text) and found.finish_reason == "stop"


def test_n_answers_are_those_of_n_seeds(family, llm):
    several = answers(llm, asked(family, temperature=0.8, seed=3, n=3))
    alone = [answers(llm, asked(family, temperature=0.8, seed=3 + i))[0] for i in range(3)]
    assert [one.text for one in several] == [one.text for one in alone]
    assert len({one.text for one in several}) == 3


def test_streamed_pieces_are_the_whole_text(family, llm):
    from vllm.sampling_params import RequestOutputKind

    whole = answers(llm, asked(family, ignore_eos=True))[0].text
    request = asked(family, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    llm.llm_engine.add_request("streamed", "what is 2 + 3?", request)
    pieces = []
    while llm.llm_engine.has_unfinished_requests():
        pieces += [output.outputs[0].text for output in llm.llm_engine.step()]
    assert "".join(pieces) == whole and sum(map(bool, pieces)) > 1


def test_what_is_not_supported_is_refused_by_name(family, llm):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
        answers(llm, asked(family, prompt_logprobs=1))
