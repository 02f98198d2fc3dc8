# SPDX-License-Identifier: Apache-2.0
"""The reference loop gives what the authors' own code gave on a random Dream checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from published_runs import DATA, next_below, published_runs
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from vllm_d2f.d2f import D2FParams
from vllm_d2f.models import PRESETS
from vllm_d2f.models.hf import load_hf
from vllm_d2f.reference import decode, generate, hf_forward

GOLDEN = Path(__file__).parent / "data" / "golden"
RUNS = json.loads((GOLDEN / "runs.json").read_text())
MASK, END = 198, 199


@pytest.fixture(scope="module")
def forward():
    config = json.loads((GOLDEN / "config.json").read_text())
    keep = Qwen2Config().to_dict().keys() | {"rope_theta"}
    config = Qwen2Config(
        **{
            k: v
            for k, v in config.items()
            if k in keep and k not in ("model_type", "architectures")
        }
    )
    model = Qwen2ForCausalLM(config).float().eval()
    model.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    return hf_forward(model)


def settings(run):
    return D2FParams(
        run["block_size"],
        run["max_new_tokens"] // run["block_size"],
        run["tau_add"],
        run["tau_act"],
        run["tau_conf"],
    )


@pytest.mark.parametrize("run", RUNS, ids=range(len(RUNS)))
def test_authors_runs(forward, run):
    common = dict(max_tokens=run["max_new_tokens"], mask_id=MASK, ends=[END], shift=True)
    tokens, forwards = generate(forward, run["prompt"], settings(run), run_on=True, **common)
    assert forwards == run["forwards"]
    assert tokens == run["output"]
    # Without running on behind an end token: the same text, never more forwards.
    tokens, fewer = generate(forward, run["prompt"], settings(run), **common)
    stop = run["output"].index(END) + 1 if END in run["output"] else len(run["output"])
    assert tokens == run["output"][:stop]
    assert fewer == forwards if END not in run["output"] else fewer <= forwards


def test_frames_tell_the_whole_story(forward):
    run = RUNS[0]
    frames = list(
        decode(
            forward,
            run["prompt"],
            settings(run),
            max_tokens=16,
            mask_id=MASK,
            ends=[END],
            shift=True,
        )
    )
    assert [f.forward for f in frames] == list(range(1, run["forwards"] + 1))
    assert [f.done for f in frames] == [False] * (len(frames) - 1) + [True]
    seen: dict[int, int] = {}
    for frame in frames:
        for position in frame.accepted:
            assert position not in seen  # decided once
            seen[position] = frame.forward
        for position, (token, decided) in enumerate(zip(frame.tokens, frame.decided, strict=True)):
            assert decided == (position in seen)
            assert decided or token == MASK
            assert (frame.confidences[position] > 0) == decided
        assert frame.committed % 4 == 0 or frame.done
        assert not frame.activated or frame.activated[0]
    assert frames[-1].tokens == run["output"]


def test_last_block_is_cut_by_the_models_length(forward):
    prompt = RUNS[1]["prompt"]
    tokens, _ = generate(
        forward,
        prompt,
        D2FParams(8, 4, 0.1, 0.95, 0.5),
        max_tokens=30,
        mask_id=MASK,
        ends=[],
        shift=True,
        max_len=len(prompt) + 19,
    )
    assert len(tokens) == 19


def test_max_tokens_inside_a_block(forward):
    common = dict(mask_id=MASK, ends=[], shift=True)
    params = D2FParams(8, 4, 0.1, 0.95, 0.9)
    longer, _ = generate(forward, RUNS[0]["prompt"], params, max_tokens=16, **common)
    shorter, _ = generate(forward, RUNS[0]["prompt"], params, max_tokens=13, **common)
    assert shorter == longer[:13]


def test_empty_prompt_is_refused(forward):
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(forward, [], D2FParams(), max_tokens=4, mask_id=MASK, ends=[], shift=True)


@pytest.mark.parametrize("max_len", [1, 2])
def test_a_prompt_without_room_for_an_answer_is_refused(forward, max_len):
    common = dict(max_tokens=4, mask_id=MASK, ends=[], shift=True)
    with pytest.raises(ValueError, match=f"2 tokens leaves no room .*max_len = {max_len}"):
        generate(forward, [1, 2], D2FParams(), max_len=max_len, **common)


def test_no_shift_reads_the_row_of_the_position_itself():
    def forward(tokens_T, mask_TT):
        # Row i says token i + 10 with certainty.
        logits = torch.full((len(tokens_T), 64), -30.0)
        logits[torch.arange(len(tokens_T)), torch.arange(len(tokens_T)) + 10] = 30.0
        return logits

    common = dict(max_tokens=4, mask_id=0, ends=[])
    params = D2FParams(4, 1)
    assert generate(forward, [1, 2], params, shift=False, **common) == ([12, 13, 14, 15], 1)
    assert generate(forward, [1, 2], params, shift=True, **common) == ([11, 12, 13, 14], 1)


@pytest.mark.parametrize("family", ["sdar", "llada2", "stable_diffcoder"])
def test_runs_of_block_diffusion_families(family):
    """The authors' own loops: the tokens, and the forwards to the end of each block."""
    model, config = load_hf(DATA / family)
    forward = hf_forward(model)
    how = dict(mask_id=config.mask_token_id, shift=config.logits_shift, block_origin="zero")
    for run in published_runs(family):
        tokens, forwards = generate(
            forward, run.prompt, run.params, max_tokens=run.goal, ends=(), **how
        )
        assert tuple(tokens[: len(run.answer)]) == run.answer
        assert run.forwards in (None, forwards)


def test_stable_diffcoder_accepts_its_threshold_too():
    """Greater than the preset's `tau_conf` is at least 0.95, in float32."""
    preset = PRESETS["stable_diffcoder-default"]
    assert preset == dict(block_size=4, max_blocks=1, tau_conf=0.9499999, cut_last_block=1)
    assert torch.tensor(preset["tau_conf"]) == torch.tensor(next_below(0.95))
    assert torch.tensor(0.95) > torch.tensor(next_below(0.95)) >= torch.tensor(0.95) - 1e-7
