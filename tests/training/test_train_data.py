# SPDX-License-Identifier: Apache-2.0
"""Examples and batches: files, templates, lengths, packing, order."""

import json

import pytest
import torch

from training.arithmetic import split_of
from training.attention import allowed, as_argument
from training.config import DataSection
from training.data import (
    Example,
    check_source,
    make_source,
    packed,
    padded,
    training_batch,
    validation,
)
from training.tokenizer import build_tokenizer
from vllm_d2f.d2f import may_attend


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_prompt_and_response_fields(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [{"q": "Tom has 34", "a": "34+25=59"}] * 3)
    data = DataSection(source=file, prompt="q", response="a")
    (example,) = make_source(data, tokenizer, 16).examples(0, 1, 0)
    assert tokenizer.decode(example.prompt) == "Tom has 34"
    assert tokenizer.decode(example.answer) == example.text == "34+25=59"


def test_chat_messages_go_through_the_template(tmp_path, tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "Tom"}, {"role": "assistant", "content": "34"}]
    file = write(tmp_path / "a.jsonl", [{"messages": turns}])
    data = DataSection(source=file, messages="messages")
    (example,) = make_source(data, tokenizer, 16).examples(0, 1, 0)
    assert tokenizer.decode(example.prompt) == "<|im_start|>Tom<|im_end|><|im_start|>"
    assert example.text == "34"
    plain = DataSection(
        source=write(tmp_path / "b.jsonl", [{"prompt": "Tom", "response": "34"}]),
        chat_template=True,
    )
    assert make_source(plain, tokenizer, 16).examples(0, 1, 0) == [example]


def test_hugging_face_datasets_load_from_a_folder(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    records = [{"prompt": f"Tom has {i}", "response": str(i)} for i in range(5)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "set" / "train.parquet"))
    data = DataSection(source=str(tmp_path / "set"), limit=4)
    source = make_source(data, tokenizer, 16)
    assert source.report()["records"] == 4
    assert {e.text for e in source.examples(0, 4, 0)} == {"0", "1", "2", "3"}


def test_lengths_are_honoured_and_counted(tmp_path, tokenizer):
    records = [
        {"prompt": "1", "response": "2" * 5},
        {"prompt": "1", "response": "2" * 40},  # too long an answer
        {"prompt": "1" * 40, "response": "2"},  # no room for an answer
    ]
    file = write(tmp_path / "a.jsonl", records)
    dropping = make_source(DataSection(source=file, max_length=32), tokenizer, 8)
    assert dropping.report() == {"records": 3, "truncated": 0, "dropped": 2}
    data = DataSection(source=file, max_length=32, too_long="truncate")
    source = make_source(data, tokenizer, 8)
    assert source.report() == {"records": 3, "truncated": 1, "dropped": 1}
    examples = source.examples(0, 2, 0)
    assert sorted(len(e.prompt) + len(e.answer) for e in examples) == [6, 32]
    # No end token is taught where the answer was cut off.
    batch = training_batch(source, data, 0, 2, 0, 8, tokenizer.eos_token_id)
    cut = next(b for b in range(2) if len(set(batch.ids_BT[b].tolist())) == 2)
    assert tokenizer.eos_token_id not in batch.ids_BT[cut].tolist()
    assert not batch.tail_BT[cut].any()


def test_an_answer_may_end_with_a_token_of_its_own(tmp_path):
    """LLaDA's end of a turn, and end tokens behind it."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    turn, end = tokenizer.convert_tokens_to_ids("<|eot_id|>"), tokenizer.eos_token_id
    file = write(tmp_path / "a.jsonl", [{"prompt": "1", "response": "2" * 5}])
    data = DataSection(source=file, answer_end="<|eot_id|>")
    source = make_source(data, tokenizer, 8)
    batch = training_batch(source, data, 0, 1, 0, 8, end)
    two = tokenizer("2").input_ids
    assert batch.ids_BT[0].tolist() == [*tokenizer("1").input_ids, *two * 5, turn, end, end]
    assert batch.end_BT[0, 0] == 6 and batch.tail_BT[0].tolist() == [False] * 7 + [True] * 2
    unknown = data.model_copy(update={"answer_end": "<|eod|>"})
    with pytest.raises(ValueError, match="data.answer_end: '<|eod|>' is no token"):
        make_source(unknown, tokenizer, 8)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, r"record 1: field 'response' \(data.response\) is missing"),
        ({"prompt": "a", "response": 3}, "missing or no text"),
        ([1], "line 1: must be an object"),
        (
            {"prompt": "a \ud83d", "response": "b"},
            r"a.jsonl, record 1: field 'prompt' \(data.prompt\) holds half of a character \('\\ud8",
        ),
        (
            {"prompt": "a", "response": "\udc00"},
            r"field 'response' .*\('\\udc00', a lone surrogate",
        ),
    ],
)
def test_bad_records_are_named(tmp_path, tokenizer, record, message):
    file = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(ValueError, match=message):
        make_source(DataSection(source=file), tokenizer, 16)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, r"field 'messages' \(data.messages\) must be a list of messages"),
        ([{"role": "user", "content": "a"}] * 2, "the last message must be the assistant's"),
        (["a", "b"], "a message needs role and content, both text"),
        ([{"role": "user"}, {"role": "assistant"}], "a message needs role and content"),
        ([{"role": "user", "content": "\ud83d"}] * 2, "field 'messages' holds half of a character"),
    ],
)
def test_bad_messages_are_named(tmp_path, messages, message):
    record = {} if messages is None else {"messages": messages}
    file = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(ValueError, match=f"record 1: .*{message}"):
        check_source(DataSection(source=file, messages="messages"))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_not_utf_8_is_named(tmp_path, encoding):
    good = json.dumps({"prompt": "x", "response": "y"}) + "\n"
    bad = '{"prompt": "caf\u00e9", "response": "b"}\n'.encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(good.encode() + bad)
    with pytest.raises(ValueError, match="a.jsonl, line 2: not UTF-8 .*; save the file as UTF-8"):
        check_source(DataSection(source=str(tmp_path / "a.jsonl")))


def test_a_dataset_that_cannot_be_read_is_named(tokenizer):
    with pytest.raises(ValueError, match="data.source: nobody/nothing, split train, cannot be"):
        make_source(DataSection(source="nobody/nothing"), tokenizer, 16)


def test_a_chat_template_is_needed_where_it_is_asked_for(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    file = write(tmp_path / "a.jsonl", [{"prompt": "1", "response": "2"}])
    with pytest.raises(ValueError, match="data.chat_template: the tokenizer has no chat template"):
        make_source(DataSection(source=file, chat_template=True), tokenizer, 16)


def test_empty_sets_and_missing_files_are_named(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [])
    with pytest.raises(ValueError, match="no usable record"):
        make_source(DataSection(source=file), tokenizer, 16)
    (tmp_path / "b.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        make_source(DataSection(source=str(tmp_path / "b.jsonl")), tokenizer, 16)
    (tmp_path / "c.jsonl").write_text('{"prompt": "1", "response": "2"}\n')
    with pytest.raises(FileNotFoundError, match="data.validation"):
        check_source(DataSection(source=str(tmp_path / "c.jsonl"), validation="nowhere.jsonl"))


def test_order_is_a_function_of_seed_and_number(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [{"prompt": "1", "response": str(i)} for i in range(7)])
    source = make_source(DataSection(source=file), tokenizer, 16)
    texts = [[e.text for e in source.examples(i, 3, seed=5)] for i in range(7)]
    assert texts == [[e.text for e in source.examples(i, 3, seed=5)] for i in range(7)]
    flat = sum(texts, [])
    for epoch in range(3):  # every record once an epoch, in another order
        assert sorted(flat[7 * epoch : 7 * epoch + 7]) == [str(i) for i in range(7)]
    assert flat[:7] != flat[7:14]


def test_arithmetic_batches_are_training_problems_without_padding(tokenizer):
    data = DataSection(extra_blocks=(1, 1), max_length=128)
    source = make_source(data, tokenizer, 16)
    widths = set()
    for index in range(12):
        batch = training_batch(source, data, index, 4, 3, 16, tokenizer.eos_token_id)
        assert (batch.document_BT >= 0).all()
        assert (batch.answer_BT.sum(1) % 16 == 0).all()
        widths.add(int(batch.answer_BT.sum(1)[0]))
        for ids, end, prompt in zip(batch.ids_BT, batch.end_BT, batch.prompt_BT, strict=True):
            answer = tokenizer.decode(ids[int(prompt[0]) : int(end[0])])
            start, *rest = answer.replace("=", "+=+").split("+=+")
            steps, total = [], int(start.split("+")[0].split("-")[0])
            for part in [answer.split("=")[0], *rest[:-1]]:
                sign = "+" if "+" in part else "-"
                steps.append(int(sign + part.split(sign)[1]))
            assert split_of(total, tuple(steps)) == "train"
    assert len(widths) > 1
    held_out = validation(data, tokenizer, 16, 5)
    assert len(held_out) == 5 and validation(data, tokenizer, 16, 0) == []


def test_canvas_reaches_to_max_length_when_asked(tokenizer):
    source = make_source(DataSection(), tokenizer, 16)
    whole = DataSection(canvas="max_length", max_length=96)
    assert training_batch(source, whole, 0, 2, 0, 16, 0).ids_BT.shape == (2, 96)
    some = DataSection(long_canvas=1.0, max_length=256)
    widths = [training_batch(source, some, i, 1, 0, 16, 0).ids_BT.shape[1] for i in range(40)]
    assert max(widths) > 180 and min(widths) < 110 and max(widths) <= 256


def brute_force(batch, rule, block_size, prompt_block=None, block_origin="prompt_end"):
    """Who sees whom, one pair at a time."""
    B, T = batch.ids_BT.shape
    seen = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        for q in range(T):
            for k in range(T):
                document = batch.document_BT[b, q]
                if document != batch.document_BT[b, k] or document < 0:
                    seen[b, q, k] = q == k
                    continue
                i, j = int(batch.position_BT[b, q]), int(batch.position_BT[b, k])
                seen[b, q, k] = {
                    "full": True,
                    "causal": j <= i,
                    "block_causal": bool(
                        may_attend(
                            torch.tensor(i), torch.tensor(j), int(batch.prompt_BT[b, q]),
                            block_size, prompt_block,
                        )
                        if block_origin == "prompt_end"
                        else j // block_size <= i // block_size
                    ),
                }[rule]  # fmt: skip
    return seen


EXAMPLES = [
    Example((1, 2, 3), (4, 5), "a"),
    Example((1,), (4, 5, 6, 7, 8), "b"),
    Example((1, 2, 3, 4, 5), (6,), "c"),
]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "rule",
    [
        ("full",),
        ("causal",),
        ("block_causal", 4),
        ("block_causal", 4, 2),
        ("block_causal", 4, None, "zero"),
        ("block_causal", 2, 2, "zero"),
    ],
)
def test_masks_pair_by_pair(layout, rule):
    lengths = [7, 9, 9]
    if layout == "padded":
        batch = padded(EXAMPLES, lengths, 0)
    else:
        batch = packed(EXAMPLES, lengths, 18, 0)
        assert batch.ids_BT.shape[0] == 2
    expected = brute_force(batch, *(rule if len(rule) > 1 else (*rule, 1)))
    assert torch.equal(allowed(batch, *rule), expected)


def test_every_form_of_a_mask_says_the_same():
    from torch.nn.attention.flex_attention import create_mask

    mask = allowed(padded(EXAMPLES, [7, 9, 9], 0), "block_causal", 4)
    eager = as_argument(mask, "eager", torch.float32)
    assert torch.equal(eager[:, 0] == 0, mask) and (eager[:, 0][~mask] < -1e30).all()
    assert torch.equal(as_argument(mask, "sdpa", torch.float32)[:, 0], mask)
    flex = as_argument(mask, "flex_attention", torch.float32)
    dense = create_mask(flex.mask_mod, 3, None, 9, 9, device="cpu")
    assert torch.equal(dense[:, 0], mask)


def test_packing_changes_no_document(tokenizer):
    """Packed and padded, a model says the same about every position."""
    from training.config import ModelSection, Sizes
    from training.model import Predictor, load

    sizes = Sizes(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    loaded = load(ModelSection(sizes=sizes), "eager")
    predictor = Predictor(loaded.model.eval(), True, "eager")
    results = []
    for batch in (padded(EXAMPLES, [7, 9, 9], 0), packed(EXAMPLES, [7, 9, 9], 18, 0)):
        chosen = batch.answer_BT
        with torch.no_grad():
            rows = predictor(
                batch.ids_BT, batch.position_BT, allowed(batch, "block_causal", 4), chosen
            )
        order = torch.argsort(batch.document_BT[chosen] * 100 + batch.position_BT[chosen])
        results.append(rows[order])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
