# SPDX-License-Identifier: Apache-2.0
"""Where settings come from, what wins, and how wrong ones are refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from vllm_d2f.d2f import D2FParams
from vllm_d2f.settings import (
    MAX_WINDOW,
    PRESETS,
    Settings,
    checkpoint_settings,
    request_params,
    settings_from_dict,
    wants_trace,
)


def test_weakest_first():
    settings = settings_from_dict(
        {"block_size": 8, "tau_conf": 0.5}, None, {"block_size": 16, "max_blocks": 2}
    )
    assert settings == Settings(D2FParams(16, 2, tau_conf=0.5), window=32)


def test_a_preset_is_weaker_than_what_stands_beside_it():
    settings = settings_from_dict({"preset": "dream-humaneval", "tau_add": 0.5, "max_blocks": 2})
    assert settings.params == D2FParams(32, 2, tau_add=0.5, tau_act=0.95, tau_conf=0.95)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    assert settings_from_dict({"preset": name}).window <= MAX_WINDOW


def test_nothing_at_all_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"--additional-config '\{\"d2f\": \{\"block_size\": 32"):
        settings_from_dict(None, None)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"blocksize": 3}, "unknown setting 'blocksize'; known are accept, adaptive_window"),
        ({"preset": "gsm"}, "unknown preset 'gsm'; known are dream-gsm8k"),
        ({"block_size": "16"}, "block_size must be an integer"),
        ({"tau_act": 7}, r"tau_act must be a number in \[0, 1\]"),
        (
            {"accept": "bold"},
            "d2f: accept must be one of threshold, frechet, factor, entropy, leftmost, got",
        ),
        ({"accept": "entropy"}, "accept entropy needs a tau_conf beside it, .* for threshold"),
        ({"preset": "dream-gsm8k", "accept": "factor"}, "accept factor needs a tau_conf"),
        ({"accept": "entropy", "tau_conf": 21}, r"tau_conf must be a number in \[0, 20\] nats"),
        ({"block_size": 32, "max_blocks": 4, "window": 64}, "between block_size"),
        ({"window": 1e9}, "window must be an integer"),
        ({"window": 10**9}, "between block_size"),
        ({"prompt_attention": "causal"}, "one of bidirectional, block_causal"),
        ({"block_origin": 0}, "block_origin must be one of prompt_end, zero, got 0"),
        ({"block_origin": "zero"}, "zero .*needs prompt_attention block_causal, got bidirectional"),
        ([], "must be an object"),
    ],
)
def test_wrong_sections(section, message):
    with pytest.raises(ValueError, match=message):
        settings_from_dict(section)


def test_blocks_counted_from_zero():
    """The setting reaches the worker with the others, and a request's block size is its own."""
    section = {"block_origin": "zero", "prompt_attention": "block_causal", "max_blocks": 2}
    settings = settings_from_dict(section)
    assert settings.block_origin == "zero" and settings_from_dict({}).block_origin == "prompt_end"
    assert settings_from_dict(settings.as_dict()) == settings
    assert request_params(settings, {"d2f_block_size": 4}) == D2FParams(4, 2)


def test_defaults_of_a_family_are_the_weakest():
    family = SimpleNamespace(
        name="toy", block_origin="zero", prompt_attention="block_causal", presets={}
    )
    settings = settings_from_dict(None, {"block_size": 4}, family=family)
    assert (settings.block_origin, settings.family) == ("zero", "toy")
    other = settings_from_dict({"block_origin": "prompt_end"}, family=family)
    assert (other.block_origin, other.prompt_attention) == ("prompt_end", "block_causal")
    with pytest.raises(ValueError, match="zero .*needs prompt_attention block_causal"):
        settings_from_dict({"prompt_attention": "bidirectional"}, family=family)
    with pytest.raises(ValueError, match="no D2F settings"):
        settings_from_dict(None, family=family)


def test_settings_of_a_checkpoint_come_from_its_files_and_the_user():
    rule = dict(name="toy", block_origin="zero", prompt_attention="block_causal")
    family = SimpleNamespace(**rule, presets={"default": {"block_size": 4, "max_blocks": 1}})
    config = SimpleNamespace(family=family, d2f={"tau_conf": 0.8}, block_size=32)
    assert checkpoint_settings(config, {}).params == D2FParams(32, 1, tau_conf=0.8)
    generation, given = {"d2f": {"tau_conf": 0.7, "max_blocks": 2}}, {"tau_add": 0.5}
    settings = checkpoint_settings(config, generation, given)
    assert settings.params == D2FParams(32, 2, tau_add=0.5, tau_conf=0.8)
    # Only a family with a preset `default` has a `block_size` that means this one.
    config.family = SimpleNamespace(**rule, presets={})
    assert checkpoint_settings(config, {}).params == D2FParams(tau_conf=0.8)


SERVED = Settings(D2FParams(16, 4), window=64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, D2FParams(16, 4)),
        ({}, D2FParams(16, 4)),
        ({"d2f_block_size": 8}, D2FParams(8, 4)),
        ({"d2f_block_size": 32}, D2FParams(32, 2)),
        ({"d2f_block_size": 64}, D2FParams(64, 1)),
        ({"d2f_block_size": 4, "d2f_max_blocks": 16}, D2FParams(4, 16)),
        ({"d2f_tau_conf": "0.5", "d2f_block_size": "8"}, D2FParams(8, 4, tau_conf=0.5)),
        ({"d2f_tau_add": 0, "d2f_tau_act": 1}, D2FParams(16, 4, tau_add=0, tau_act=1)),
        ({"d2f_min_per_step": "2"}, D2FParams(16, 4, min_per_step=2)),
        ({"d2f_cut_last_block": "1"}, D2FParams(16, 4, cut_last_block=1)),
        (
            {"d2f_accept": "entropy", "d2f_tau_conf": "1.5"},
            D2FParams(16, 4, tau_conf=1.5, accept="entropy"),
        ),
        ({"d2f_accept": "threshold"}, D2FParams(16, 4)),
    ],
)
def test_request_options(options, expected):
    assert request_params(SERVED, options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"d2f_tau": 0.5},
            "unknown option 'd2f_tau'; D2F options are d2f_accept, d2f_ad",
        ),
        ({"diffusion_max_steps": 4}, "unknown option 'diffusion_max_steps'"),
        ({"tau_conf": 0.5}, "unknown option 'tau_conf'; D2F options are .*d2f_tau_conf"),
        ({"kv_transfer_params": {"a": 1}}, "no connector that takes it, remove it"),
        ({"d2f_block_size": 0}, r"d2f_block_size must be an integer in \[1, 64\], got 0"),
        ({"d2f_block_size": 65}, r"d2f_block_size must be an integer in \[1, 64\], got 65"),
        ({"d2f_block_size": 8.0}, r"d2f_block_size must be an integer in \[1, 64\]"),
        ({"d2f_max_blocks": -1}, r"d2f_max_blocks must be an integer in \[1, 64\]"),
        ({"d2f_max_blocks": 5}, r"16 \* 5 = 80 must be in \[1, 64\].*at most 4 blocks of 16"),
        ({"d2f_tau_conf": 1.01}, r"d2f_tau_conf must be a number in \[0, 1\], got 1.01"),
        ({"d2f_tau_conf": float("nan")}, r"d2f_tau_conf must be a number in \[0, 1\]"),
        ({"d2f_tau_act": "much"}, "d2f_tau_act must be a number"),
        ({"d2f_min_per_step": 0}, "d2f_min_per_step must be an integer of at least 1, got 0"),
        ({"d2f_cut_last_block": 2}, "d2f_cut_last_block must be 0 or 1, got 2"),
        ({"d2f_tau_act": True}, "d2f_tau_act must be a number"),
        (
            {"d2f_accept": "bold"},
            "d2f_accept must be one of threshold, frechet, factor, entropy, leftmost",
        ),
        (
            {"d2f_accept": 1},
            "d2f_accept must be one of threshold, frechet, factor, entropy, leftmost, got 1",
        ),
        ({"d2f_accept": ["x"]}, "d2f_accept must be one of"),
        ({"d2f_accept": "factor"}, "d2f_accept factor needs a d2f_tau_conf beside it"),
        ({"d2f_accept": "entropy", "d2f_tau_conf": -1}, r"must be a number in \[0, 20\] nats"),
        ({"d2f_tau_act": [0.5]}, "d2f_tau_act must be a number"),
        ({"d2f_block_size": "1e400"}, "d2f_block_size must be"),
    ],
)
def test_wrong_request_options(options, message):
    with pytest.raises(ValueError, match=message):
        request_params(SERVED, options)


def test_a_threshold_stays_with_its_rule():
    """The number of one rule is never read by another, wherever the two come from."""
    section = {"accept": "entropy", "tau_conf": 2.0, "window": 128}
    served = settings_from_dict({"tau_conf": 0.5}, section)
    assert settings_from_dict(served.as_dict()) == served
    assert request_params(served, {}).tau_conf == 2.0
    assert request_params(served, {"d2f_tau_conf": 3}).accept == "entropy"
    preset = request_params(served, {"d2f_preset": "dream-gsm8k"})
    assert (preset.accept, preset.tau_conf) == ("threshold", 0.9)
    mixed = {"d2f_preset": "dream-gsm8k", "d2f_accept": "frechet"}
    for options in ({"d2f_accept": "threshold"}, mixed):
        with pytest.raises(ValueError, match="needs a d2f_tau_conf beside it"):
            request_params(served, options)
    assert settings_from_dict(section, {"preset": "dream-gsm8k"}).params.accept == "threshold"
    with pytest.raises(ValueError, match=r"chosen for entropy"):
        settings_from_dict(section, {"accept": "threshold"})


def test_a_request_names_a_preset_of_the_served_family():
    served = settings_from_dict({"block_size": 16, "max_blocks": 4, "window": 128})
    for family in ("dream", "llada"):
        settings = replace(served, family=family)
        short = request_params(settings, {"d2f_preset": "gsm8k"})
        assert short == request_params(settings, {"d2f_preset": f"{family}-gsm8k"})
        assert short.block_size == PRESETS[f"{family}-gsm8k"]["block_size"]
        assert short.window <= 128
    other = request_params(replace(served, family="llada"), {"d2f_preset": "dream-humaneval"})
    assert (other.tau_add, other.tau_conf, other.max_blocks) == (0.9, 0.95, 4)


def test_what_stands_beside_a_requests_preset_is_stronger():
    served = replace(settings_from_dict({"window": 128}), family="dream")
    params = request_params(
        served, {"d2f_preset": "mbpp", "d2f_tau_conf": 0.5, "d2f_max_blocks": 1}
    )
    assert (params.block_size, params.max_blocks, params.tau_conf) == (48, 1, 0.5)


@pytest.mark.parametrize(
    "name, message",
    [
        ("gsm", "d2f_preset must be one of gsm8k, mbpp, math, humaneval, dream-gsm8k, .*'gsm'"),
        (3, "d2f_preset must be one of"),
        ("math", "blocks of 64, the served window is 32.*window"),
    ],
)
def test_a_preset_that_is_refused(name, message):
    served = replace(settings_from_dict({"block_size": 16, "max_blocks": 2}), family="dream")
    with pytest.raises(ValueError, match=message):
        request_params(served, {"d2f_preset": name})


@pytest.mark.parametrize(
    "value, wanted", [(1, True), (0, False), (True, True), ("1", True), ("0", False), (1.0, True)]
)
def test_a_trace_is_asked_for(value, wanted):
    assert wants_trace({"d2f_trace": value}) is wanted
    request_params(settings_from_dict({}), {"d2f_trace": value})


@pytest.mark.parametrize("value", [2, "yes", None, [1]])
def test_a_trace_is_yes_or_no(value):
    with pytest.raises(ValueError, match="d2f_trace must be 0 or 1"):
        request_params(settings_from_dict({}), {"d2f_trace": value})
