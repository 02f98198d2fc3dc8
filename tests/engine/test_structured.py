# SPDX-License-Identifier: Apache-2.0
"""Structured outputs: every answer is valid, and the engine decides as the reference does.

d2f-tiny knows arithmetic only, so what it says under a schema means nothing; but it must parse,
validate, and end. Schemas are bounded, so that a full answer fits.
"""

import itertools
import json
import re

import jsonschema
import numpy as np
import pytest
from rules import Rule, reference_frames
from vllm.exceptions import VLLMValidationError

from benchmarks.parity import load_forward, preemptions, shut_down
from benchmarks.structured import SCHEMAS, cases
from vllm_d2f.d2f import D2FParams
from vllm_d2f.hub.names import resolve
from vllm_d2f.metrics import denoising_forwards
from vllm_d2f.scheduler import adaptive
from vllm_d2f.worker.grammar import Grammars

PARAMS = D2FParams(16, 4)  # as d2f-tiny is served


OTHERS = {
    "regex": dict(regex=r"(pens|apples): [0-9]{1,4}"),
    "choice": dict(choice=["yes", "no", "maybe", "Leo has 9 pens"]),
    "grammar": dict(
        grammar='root ::= "Leo " verb " " [0-9]+ " pens."\nverb ::= "has" | "finds" | "loses"'
    ),
    "json_object": dict(json_object=True),
}


def start(backend="xgrammar", **options):
    """d2f-tiny in this process. Whitespace between JSON tokens would have no end."""
    from vllm import LLM

    compact = backend in ("xgrammar", "guidance")  # the others never allow much of it
    defaults = dict(
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 27,
        max_num_seqs=32,
        block_size=32,
        disable_log_stats=True,
        structured_outputs_config={"backend": backend, "disable_any_whitespace": compact},
    )
    return LLM("d2f-tiny", **defaults | options)


@pytest.fixture(scope="module")
def llm():
    llm = start()
    yield llm
    shut_down(llm)


@pytest.fixture(scope="module")
def prompts():
    from vllm_d2f.demo import bundled_problems

    return [problem.question for problem in bundled_problems()]


def structured(max_tokens=128, temperature=0.0, seed=None, options=None, **constraint):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    return SamplingParams(
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        structured_outputs=StructuredOutputsParams(**constraint),
        **options or {},
    )


def ask(llm, prompts, requests):
    return [output.outputs[0] for output in llm.generate(prompts, requests, use_tqdm=False)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_300_answers_parse_and_validate(llm, prompts, temperature):
    """What it costs: `python -m benchmarks.structured`."""
    asked = cases(prompts)
    requests = [
        structured(temperature=temperature, seed=seed if temperature else None, json=SCHEMAS[name])
        for name, _, seed in asked
    ]
    answers = ask(llm, [prompt for _, prompt, _ in asked], requests)
    for (name, _, _), answer in zip(asked, answers, strict=True):
        jsonschema.validate(json.loads(answer.text), SCHEMAS[name])
        assert answer.finish_reason == "stop"
    assert len(answers) == 300 and len({answer.text for answer in answers}) > 50


def test_regex_choice_grammar_and_json_object(llm, prompts):
    for temperature in (0.0, 0.8):
        for name, constraint in OTHERS.items():
            request = structured(temperature=temperature, seed=5, **constraint)
            for answer in ask(llm, prompts[:6], request):
                text = answer.text
                if name == "regex":
                    assert re.fullmatch(constraint["regex"], text)
                elif name == "choice":
                    assert text in constraint["choice"]
                elif name == "grammar":
                    assert re.fullmatch(r"Leo (has|finds|loses) \d+ pens\.", text) or (
                        # Digits have no bound: max_tokens may cut them, as in vLLM.
                        answer.finish_reason == "length"
                        and re.match(r"Leo (has|finds|loses) \d+", text)
                    )
                elif answer.finish_reason == "stop":
                    assert isinstance(json.loads(text), dict)
                else:
                    assert text.startswith("{")


def as_reference(llm, prompts, requests):
    """Compare with the reference loop, grammar and all: tokens and forwards.

    If a request has a trace with the widths of an adaptive window, the reference takes these.
    """
    tokenizer = llm.get_tokenizer()
    outputs = llm.generate(prompts, requests, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    loaded = load_forward(resolve("d2f-tiny"))
    grammars = Grammars(llm.llm_engine.vllm_config, loaded[1].mask_token_id)
    for prompt, request, output in zip(prompts, requests, outputs, strict=True):
        answer, trace = output.outputs[0], output.kv_transfer_params
        options = dict(
            temperature=request.temperature,
            seed=request.seed,
            stop_token_ids=request.stop_token_ids,
            min_tokens=request.min_tokens,
            logit_bias=request.logit_bias,
            repetition_penalty=request.repetition_penalty,
        )
        rule = Rule(tuple(tokenizer(prompt).input_ids), options, (), PARAMS, request.max_tokens)
        *_, frame = reference_frames(
            loaded,
            rule.prompt,
            PARAMS,
            rule.sampling_params(),
            max_len=512,
            window=PARAMS.window,
            grammar=grammars.constraint(request),
            widths=trace and trace["d2f"]["widths"] + [PARAMS.window] * 64,
        )
        assert list(answer.token_ids) == frame.tokens
        assert denoising_forwards(answer) == frame.forward
    return answers


def mixed(prompts):
    constraints = [dict(json=schema) for schema in SCHEMAS.values()]
    constraints += [OTHERS[name] for name in ("regex", "choice", "grammar")]
    requests = [structured(max_tokens=64, **constraint) for constraint in constraints]
    requests += [
        structured(max_tokens=64, temperature=0.8, seed=i, **constraint)
        for i, constraint in enumerate(constraints)
    ]
    requests += [
        structured(json=SCHEMAS["list"], options=dict(min_tokens=12)),
        structured(choice=["yes", "no"], options=dict(min_tokens=40)),
        structured(regex="[0-9]{4}", options=dict(logit_bias={28: 50.0})),
        structured(regex="[0-9]{9}", options=dict(repetition_penalty=1.5)),
    ]
    return [prompts[i % len(prompts)] for i in range(len(requests))], requests


def test_equal_to_the_reference(llm, prompts):
    answers = as_reference(llm, *mixed(prompts))
    # min_tokens asks for longer answers where the grammar has any; where it has none, it wins.
    assert len(answers[-4].token_ids) >= 12
    assert answers[-3].text in ("yes", "no")
    assert answers[-2].text == "9999"


def test_narrow_windows_equal_the_reference(llm, prompts, monkeypatch):
    """An adaptive window that computes one block more than it must, or not, in turn."""
    if llm.llm_engine.vllm_config.scheduler_config.async_scheduling:
        pytest.skip("adaptive windows need synchronous scheduling")
    turn = itertools.count()

    def choose(gain_RJ, size_RJ, least_R, cost, others):
        return np.minimum(least_R + next(turn) % 2, (size_RJ > 0).sum(1))

    monkeypatch.setattr(adaptive, "choose", choose)
    asked, requests = mixed(prompts)
    for request in requests:
        request.extra_args = {"d2f_trace": 1, "d2f_adaptive_window": 1}
    as_reference(llm, asked, requests)
    assert next(turn) > 20


def test_plain_requests_beside_structured_ones_stay_as_they_are(llm, prompts):
    from vllm import SamplingParams

    plain = [SamplingParams(temperature=0, max_tokens=64)] * 8
    alone = ask(llm, prompts[:8], plain)
    others = [structured(json=schema) for schema in SCHEMAS.values()][:8]
    both = ask(llm, prompts[:8] * 2, plain + others)
    for one, other in zip(alone, both[:8], strict=True):
        assert one.token_ids == other.token_ids
        assert denoising_forwards(one) == denoising_forwards(other)


def test_max_tokens_cuts_and_ends_count(llm, prompts):
    """A cut answer is the beginning of the whole one; other end tokens stop it where it may end."""
    whole, cut = (
        ask(llm, prompts[:1], structured(max_tokens=n, json=SCHEMAS["flat"]))[0] for n in (128, 7)
    )
    assert cut.finish_reason == "length" and len(cut.token_ids) == 7
    assert list(whole.token_ids[:7]) == list(cut.token_ids)
    options = dict(ignore_eos=True)
    further = ask(llm, prompts[:1], structured(max_tokens=64, regex="[0-9]{3}", options=options))[0]
    assert re.match("[0-9]{3}", further.text) and len(further.token_ids) == 64
    tokenizer = llm.get_tokenizer()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    options = dict(stop_token_ids=[stop], logit_bias={stop: 100.0})
    other = ask(llm, prompts[:1], structured(regex="[0-9]{3}", options=options))[0]
    assert re.fullmatch("[0-9]{3}", other.text) and other.token_ids[-1] == stop


def test_logprobs_of_structured_answers(llm, prompts):
    """They are the model's own, before the grammar: most of what it must say it would not."""
    request = structured(json=SCHEMAS["enum"], options=dict(logprobs=2))
    answer = ask(llm, prompts[:1], request)[0]
    assert len(answer.logprobs) == len(answer.token_ids)
    chosen = [e[t] for t, e in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert any(item.rank > 1 and item.logprob < -5 for item in chosen)


def test_a_grammar_that_does_not_compile_fails_alone(llm, prompts):
    with pytest.raises(VLLMValidationError, match="regex"):
        ask(llm, prompts[:1], structured(regex="([0-9]"))
    assert ask(llm, prompts[:1], structured(choice=["yes"]))[0].text == "yes"


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_grammar_that_cannot_go_on_ends_its_own_request(llm, prompts, ignore_eos, monkeypatch):
    """Not the engine, and not the others; the worker's grammar must not be taken for a bug.

    Admission refuses what it recognises, so here it looks away.
    """
    monkeypatch.setattr("vllm_d2f.admission.stuck_rules", lambda grammar: [])
    lost = structured(
        grammar='root ::= "7" more\nmore ::= more', options=dict(ignore_eos=ignore_eos)
    )
    plain = structured(regex="[0-9]{3}")
    alone = ask(llm, prompts[:1], plain)[0]
    first, second, third = ask(llm, prompts[:1] * 3, [plain, lost, plain])
    assert second.finish_reason == "error" and second.text in ("", "7")
    assert list(first.token_ids) == list(third.token_ids) == list(alone.token_ids)
    monkeypatch.undo()
    for grammar, rule in (
        ("root ::= root", "root"),
        ('root ::= "7" more\nmore ::= more', "more"),
        ('root ::= "a" | "7" more\nmore ::= more "x"', "more"),
    ):
        with pytest.raises(VLLMValidationError, match=f"no text matches `{rule}`"):
            ask(llm, prompts[:1], structured(grammar=grammar))


def test_a_schema_that_refers_to_itself(llm, prompts):
    """Refused if it never ends, as a dict and as text; answered if it can."""
    for endless in ({"$ref": "#"}, '{"$ref": "#"}'):
        with pytest.raises(VLLMValidationError, match=r"json: no text matches.*`\$ref`"):
            ask(llm, prompts[:1], structured(json=endless))
    tree = {"type": "array", "items": {"$ref": "#"}}
    assert json.loads(ask(llm, prompts[:1], structured(json=tree))[0].text) is not None


def test_refused(llm, prompts):
    for options in (dict(bad_words=["pens"]), dict(allowed_token_ids=[5, 6])):
        with pytest.raises(VLLMValidationError, match="write them into the grammar"):
            ask(llm, prompts[:1], structured(choice=["yes"], options=options))
    with pytest.raises(VLLMValidationError, match="cannot be an empty list"):
        ask(llm, prompts[:1], structured(choice=[]))


def test_y_preemption_changes_nothing(llm, prompts):
    texts, requests = mixed(prompts)
    expected = ask(llm, texts, requests)
    shut_down(llm)
    small = start(num_gpu_blocks_override=16 + 6)
    answers = ask(small, texts, requests)
    assert preemptions(small) > 0
    for one, other in zip(expected, answers, strict=True):
        assert one.token_ids == other.token_ids
        assert denoising_forwards(one) == denoising_forwards(other)
    shut_down(small)


@pytest.mark.parametrize("backend", ["guidance", "outlines"])
def test_z_other_backends(prompts, backend):
    """outlines takes an integer's range for no bound, so there are none here."""
    llm = start(backend)
    schemas = [SCHEMAS[name] for name in ("boolean and null", "pair", "pattern")]
    answers = ask(llm, prompts[:3], [structured(json=schema) for schema in schemas])
    for schema, answer in zip(schemas, answers, strict=True):
        jsonschema.validate(json.loads(answer.text), schema)
        assert answer.finish_reason == "stop"
    constraints = [OTHERS["choice"], OTHERS["regex"], dict(json=SCHEMAS["pattern"])]
    as_reference(llm, prompts[:3], [structured(**constraint) for constraint in constraints])
    shut_down(llm)
