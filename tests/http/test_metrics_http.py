# SPDX-License-Identifier: Apache-2.0
"""D2F's metrics on a real server, and that the dashboard shows metrics that exist."""

import json
import re
from pathlib import Path

import httpx
import pytest
from http_server import MODEL
from prometheus_client.parser import text_string_to_metric_families

from vllm_d2f.demo import bundled_problems

PROBLEMS = bundled_problems()
DEPLOY = Path(__file__).parents[2] / "deploy"


def scrape(server) -> dict[str, float]:
    """Sample name -> value, summed over labels."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


@pytest.fixture(scope="module")
def measured(server):
    """What eleven traced requests add to the metrics, and their answers."""
    # Twice the same prompt each time, longer than a page of the cache.
    prompts = [" ".join(p.question for p in PROBLEMS[i // 2 : i // 2 + 6]) for i in range(10)]
    options = [{"d2f_block_size": 8}] * 10
    # One token a block and forward, and blocks as fast as they open: some are opened in vain.
    prompts.append(PROBLEMS[0].question)
    options.append({"d2f_block_size": 8, "d2f_tau_add": 0, "d2f_tau_conf": 1.0})
    before = scrape(server)
    answers = [
        server.client.completions.create(
            model=MODEL,
            prompt=prompt,
            temperature=0,
            max_tokens=48,
            extra_body={"vllm_xargs": {"d2f_trace": 1, **xargs}},
        )
        for prompt, xargs in zip(prompts, options, strict=True)
    ]
    after = scrape(server)
    return answers, {name: value - before.get(name, 0.0) for name, value in after.items()}


def test_counts_are_those_of_the_answers(measured):
    answers, added = measured
    traces = [answer.kv_transfer_params["d2f"] for answer in answers]
    tokens = sum(answer.usage.completion_tokens for answer in answers)
    forwards = sum(trace["forwards"] for trace in traces)
    assert added["vllm:d2f_output_tokens_total"] == tokens
    assert added["vllm:d2f_forwards_total"] == forwards
    assert added["vllm:d2f_tokens_per_forward_count"] == len(answers)
    per_forward = sum(trace["tokens_per_forward"] for trace in traces)
    assert added["vllm:d2f_tokens_per_forward_sum"] == pytest.approx(per_forward)
    assert added["vllm:diffusion_num_denoising_steps_total"] == forwards


def test_work_adds_up(measured):
    answers, added = measured
    prompts = sum(answer.usage.prompt_tokens for answer in answers)
    tokens = added["vllm:d2f_output_tokens_total"]
    accepted = (
        added["vllm:d2f_fully_activated_accepts_total"]
        + added["vllm:d2f_semi_activated_accepts_total"]
    )
    # Behind an end token some are decided that never leave.
    assert accepted >= tokens
    assert 0 < added["vllm:d2f_committed_tokens_total"] < tokens
    assert added["vllm:d2f_committed_tokens_total"] % 8 == 0
    windows = added["vllm:diffusion_num_canvas_positions_total"]
    hits = added["vllm:prefix_cache_hits_total"]
    assert added["vllm:d2f_processed_tokens_total"] == windows + prompts - hits
    assert added["vllm:d2f_dropped_blocks_total"] > 0


def test_nothing_is_open_when_nothing_runs(server, measured):
    assert scrape(server)["vllm:d2f_open_blocks"] == 0


def test_repeated_prompts_hit(measured):
    answers, added = measured
    prompts = sum(answer.usage.prompt_tokens for answer in answers)
    assert added["vllm:prefix_cache_queries_total"] == prompts
    assert added["vllm:prefix_cache_hits_total"] >= 0.2 * prompts


def test_every_metric_of_the_dashboard_exists(server, measured):
    text = (DEPLOY / "grafana/dashboards/d2f.json").read_text(encoding="utf-8")
    dashboard = json.loads(text)
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    expressions += [variable["query"] for variable in dashboard["templating"]["list"]]
    shown = {name for e in expressions for name in re.findall(r"vllm:\w+", e)}
    assert len(shown) > 15
    existing = scrape(server)
    assert not sorted(shown - existing.keys())
    # And it leaves none of ours out.
    ours = {re.sub(r"_(created|sum|count)$", "", name) for name in existing if ":d2f_" in name}
    ours = {re.sub(r"_total$|_bucket$", "", name) for name in ours}
    assert ours == {re.sub(r"_total$|_bucket$", "", n) for n in shown if ":d2f_" in n}


def test_the_readme_lists_every_metric(server, measured):
    listed = set(re.findall(r"`(vllm:d2f_\w+)`", (DEPLOY / "README.md").read_text("utf-8")))
    families = {
        name
        for name in scrape(server)
        if ":d2f_" in name and not re.search(r"_(created|sum|count|bucket)$", name)
    }
    assert listed == families | {"vllm:d2f_tokens_per_forward"}
