# SPDX-License-Identifier: Apache-2.0
"""Examples and batches: generated problems, JSONL files, Hugging Face datasets.

Batch number `i` depends on the seed and on `i` alone: a resumed training sees the same data as one
that was never interrupted, and there is no data state to save.

Shapes: B rows, T tokens, D documents (examples) of a batch.
"""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from training.arithmetic import make, problems
from training.config import DataSection, is_file

GROUPED = 16


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its answer without the end token; the answer's text.

    Attributes:
        ended: False where the answer was cut off, so that no end token must be learnt there.
        end: the token that ends the answer, where it is another than fills the rest.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    ended: bool = True
    end: int | None = None


@dataclass(frozen=True)
class Batch:
    """Rows of one or more documents.

    Attributes:
        ids_BT: int64; end tokens behind the answer and in the padding.
        position_BT: int64, in the document.
        document_BT: int64, counted over the whole batch; -1 is padding.
        prompt_BT: int64, prompt length of the token's document.
        end_BT: int64, position of the document's first end token.
        documents: D.
        fill: the end token that follows an answer.
        window_BT, first_BT, before_BT: of a batch with windows (`training.windows`): number of
            the token's window, 0 in the clean sequence; position where that window begins; index
            in the row of the token before.
    """

    ids_BT: Tensor
    position_BT: Tensor
    document_BT: Tensor
    prompt_BT: Tensor
    end_BT: Tensor
    documents: int
    fill: int = 0
    window_BT: Tensor | None = None
    first_BT: Tensor | None = None
    before_BT: Tensor | None = None

    @property
    def answer_BT(self) -> Tensor:
        """Positions behind a prompt."""
        return (self.document_BT >= 0) & (self.position_BT >= self.prompt_BT)

    @property
    def tail_BT(self) -> Tensor:
        """Positions behind a first end token."""
        return (self.document_BT >= 0) & (self.position_BT > self.end_BT)

    def begin_BT(self, block_size: int, block_origin: str = "prompt_end") -> Tensor:
        """Return the position at which the first block of the answer begins.

        Blocks that are counted from position 0 may begin inside the prompt.
        """
        if block_origin == "zero":
            return self.prompt_BT.div(block_size, rounding_mode="floor") * block_size
        return self.prompt_BT

    def block_BT(self, block_size: int, block_origin: str = "prompt_end") -> Tensor:
        """Answer block of every position, from 0; negative before it."""
        begin_BT = self.begin_BT(block_size, block_origin)
        return (self.position_BT - begin_BT).div(block_size, rounding_mode="floor")

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)


class Source(Protocol):
    """Where batches come from."""

    def examples(self, index: int, size: int, seed: int) -> list[Example]:
        """Return the examples of batch number `index`."""

    def report(self) -> dict[str, int]:
        """Return what became of the records."""


@dataclass
class Arithmetic:
    """Endless generated problems; a batch holds one number of steps, so nothing is padded."""

    tokenizer: Any
    step_counts: Sequence[int]

    def examples(self, index: int, size: int, seed: int) -> list[Example]:
        rng = random.Random(f"{seed}:{index}")
        steps = rng.choice(self.step_counts)
        return encode_problems([make(rng, steps, "train") for _ in range(size)], self.tokenizer)

    def report(self) -> dict[str, int]:
        return {}


@dataclass
class Records:
    """A finite set, in another order in every epoch."""

    all: list[Example]
    counts: dict[str, int] = field(default_factory=dict)
    grouped: int = 1
    """The examples of this many batches are sorted into batches by length."""
    _last: tuple[str, list[int]] = ("", [])

    def examples(self, index: int, size: int, seed: int) -> list[Example]:
        if self.grouped > 1:
            group, at = divmod(index, self.grouped)
            order = list(range(self.grouped))
            random.Random(f"{seed}:{group}").shuffle(order)
            pool = self._next(group, size * self.grouped, seed)
            pool.sort(key=lambda example: len(example.prompt) + len(example.answer))
            return pool[order[at] * size :][:size]
        return self._next(index, size, seed)

    def _next(self, index: int, size: int, seed: int) -> list[Example]:
        chosen: list[Example] = []
        at = index * size
        while len(chosen) < size:
            epoch, offset = divmod(at + len(chosen), len(self.all))
            need = size - len(chosen)
            order = self.order(f"{seed}:{epoch}")
            chosen += [self.all[i] for i in order[offset : offset + need]]
        return chosen

    def order(self, epoch: str) -> list[int]:
        """Return the records in the order of an epoch; the last one is remembered."""
        if self._last[0] != epoch:
            order = list(range(len(self.all)))
            random.Random(epoch).shuffle(order)
            self._last = epoch, order
        return self._last[1]

    def report(self) -> dict[str, int]:
        return self.counts


def encode_problems(items: Sequence[Any], tokenizer: Any) -> list[Example]:
    """Encode arithmetic problems as examples."""
    prompts = tokenizer([item.question for item in items]).input_ids
    answers = tokenizer([item.answer for item in items]).input_ids
    return [
        Example(tuple(prompt), tuple(answer), item.answer)
        for prompt, answer, item in zip(prompts, answers, items, strict=True)
    ]


def make_source(data: DataSection, tokenizer: Any, block_size: int) -> Source:
    """Return the training examples that a config names."""
    if data.source == "arithmetic":
        return Arithmetic(tokenizer, data.step_counts)
    return read_records(data, data.source, data.split, tokenizer, block_size)


def validation(
    data: DataSection, tokenizer: Any, block_size: int, count: int, seed: str = "watch"
) -> list[Example]:
    """`count` examples to decode during training, never those trained on."""
    if not count:
        return []
    if data.source == "arithmetic":
        return encode_problems(problems("validation", count, seed, data.step_counts), tokenizer)
    if data.validation is None:
        return []
    name, split = (data.validation, data.split)
    if not is_file(name):
        name, split = data.source, data.validation
    read = read_records(data, name, split, tokenizer, block_size, "data.validation")
    return read.all[:count]


def check_source(data: DataSection) -> None:
    """Read the files once, before a tokenizer or a model is there to use them.

    Raises:
        FileNotFoundError: a file is missing; the field is named.
        ValueError: a file is empty, no JSONL, or a record lacks a field (which is named).
    """
    for name in ("source", "validation"):
        value = getattr(data, name)
        if value is None or not is_file(value):
            continue
        if not Path(value).is_file():
            raise FileNotFoundError(f"data.{name}: {value} does not exist")
        if not sum(1 for _ in _wanted(data, value, data.split)):
            raise ValueError(f"data.{name}: {value} has no usable record; it is empty")


def _wanted(data: DataSection, name: str, split: str) -> Iterator[tuple[Any, str]]:
    """Yield prompts and answers of the records up to `data.limit`."""
    for number, record in enumerate(_records(name, split), 1):
        if data.limit is not None and number > data.limit:
            return
        yield _texts(record, data, f"{name}, record {number}")


def read_records(
    data: DataSection,
    name: str,
    split: str,
    tokenizer: Any,
    block_size: int,
    option: str = "data.source",
) -> Records:
    """Return records of a JSONL file or a Hugging Face dataset as examples.

    Args:
        option: which one named it, for messages.

    Raises:
        ValueError: no record is left, or one lacks a field (which is named).
    """
    check_tokenizer(data, tokenizer)
    counts = {"records": 0, "truncated": 0, "dropped": 0}
    kept: list[Example] = []
    for example in _encoded(_wanted(data, name, split), data, tokenizer):
        counts["records"] += 1
        if not example.prompt:
            raise ValueError(f"{name}, record {counts['records']}: the prompt has no tokens")
        room = data.max_length - len(example.prompt)
        if len(example.answer) + 1 > room:
            if data.too_long == "drop" or room < block_size:
                counts["dropped"] += 1
                continue
            counts["truncated"] += 1
            example = replace(example, answer=example.answer[:room], ended=False)
        kept.append(example)
    if not kept:
        raise ValueError(
            f"{option}: {name} has no usable record ({counts['records']} read, "
            f"{counts['dropped']} longer than data.max_length {data.max_length})"
        )
    return Records(kept, counts, GROUPED if data.group_by_length else 1)


def fingerprint(examples: Sequence[Example]) -> str:
    """Return the sha256 of the training content of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        learnt = (example.prompt, example.answer, example.ended, example.end)
        digest.update(repr(learnt).encode())
    return digest.hexdigest()


def check_tokenizer(data: DataSection, tokenizer: Any) -> None:
    """Check that the tokenizer has what data asks of it.

    Raises:
        ValueError: naming the option.
    """
    if (data.chat_template or data.messages) and not tokenizer.chat_template:
        option = "chat_template" if data.chat_template else "messages"
        raise ValueError(f"data.{option}: the tokenizer has no chat template")
    if data.answer_end is not None and end_of(data, tokenizer) is None:
        raise ValueError(f"data.answer_end: {data.answer_end!r} is no token of the tokenizer")


def end_of(data: DataSection, tokenizer: Any) -> int | None:
    """Return the id of `data.answer_end`."""
    return None if data.answer_end is None else tokenizer.get_vocab().get(data.answer_end)


def _records(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    if is_file(name):
        with Path(name).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode())
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{name}, line {number}: not UTF-8 ({error}); save the file as UTF-8"
                    ) from None
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name}, line {number}: not JSON ({error})") from None
                if not isinstance(record, dict):
                    raise ValueError(f"{name}, line {number}: must be an object")
                yield record
        return
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # of the network, the Hub, or the dataset's files
        raise ValueError(
            f"data.source: {name}, split {split}, cannot be read: {error}. Give a JSONL file, or a "
            "folder or Hub id that datasets.load_dataset takes"
        ) from None
    yield from loaded  # type: ignore[misc]


def _texts(record: Mapping[str, Any], data: DataSection, where: str) -> tuple[Any, str]:
    """Return prompt (text or messages) and answer of a record."""
    if data.messages is not None:
        messages = record.get(data.messages)
        if not isinstance(messages, list) or len(messages) < 2:
            raise ValueError(
                f"{where}: field {data.messages!r} (data.messages) must be a list of messages; "
                f"it has {sorted(record)}"
            )
        for message in messages:
            said = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not said or not isinstance(message.get("content"), str):
                raise ValueError(
                    f"{where}: field {data.messages!r}: a message needs role and content, both text"
                )
            _check_text(message["role"] + message["content"], f"{where}: field {data.messages!r}")
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the last message must be the assistant's")
        return messages[:-1], messages[-1]["content"]
    for option in ("prompt", "response"):
        name = getattr(data, option)
        if not isinstance(record.get(name), str):
            raise ValueError(
                f"{where}: field {name!r} (data.{option}) is missing or no text; "
                f"it has {sorted(record)}"
            )
        _check_text(record[name], f"{where}: field {name!r} (data.{option})")
    return record[data.prompt], record[data.response]


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half of a character ({text[error.start]!r}, a lone surrogate); "
            "write the whole character, or leave the record out"
        ) from None


def _encoded(
    texts: Iterator[tuple[Any, str]], data: DataSection, tokenizer: Any
) -> Iterator[Example]:
    """Yield prompts and answers as token ids, many per call of the tokenizer: calls are slow."""
    template = data.chat_template or data.messages is not None
    end = end_of(data, tokenizer)
    while chunk := list(itertools.islice(texts, 1000)):
        prompts, answers = ([pair[i] for pair in chunk] for i in (0, 1))
        if template:
            chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
            prompts = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=False
            )
        # The template writes the special tokens itself.
        prompt_ids = tokenizer(prompts, add_special_tokens=not template).input_ids
        answer_ids = tokenizer(answers, add_special_tokens=False).input_ids
        for prompt, ids, answer in zip(prompt_ids, answer_ids, answers, strict=True):
            yield Example(tuple(prompt), tuple(ids), answer, end=end)


def training_batch(
    source: Source, data: DataSection, index: int, size: int, seed: int, block_size: int, end: int
) -> Batch:
    """Return batch number `index`, with end tokens behind every answer as `data` says."""
    rng = random.Random(f"canvas:{seed}:{index}")
    examples = source.examples(index, size, seed)
    extra = rng.choices(range(len(data.extra_blocks)), data.extra_blocks)[0]
    long = rng.random() < data.long_canvas
    share = rng.random()
    lengths = []
    for example in examples:
        prompt, answer = len(example.prompt), len(example.answer) + example.ended
        most = data.max_length - prompt
        room = min((-(-answer // block_size) + extra) * block_size, most)
        if data.canvas == "max_length":
            room = most
        elif long:
            room = max(answer, round(math.exp(_between(math.log(room), math.log(most), share))))
        lengths.append(prompt + room)
    if data.packing:
        return packed(examples, lengths, data.max_length, end)
    return padded(examples, lengths, end, data.multiple)


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def padded(
    examples: Sequence[Example], lengths: Sequence[int], end: int, multiple: int = 1
) -> Batch:
    """Lay out one example per row."""
    width = -(-max(lengths) // multiple) * multiple
    return _lay_out(examples, lengths, [[i] for i in range(len(examples))], width, end)


def packed(examples: Sequence[Example], lengths: Sequence[int], max_length: int, end: int) -> Batch:
    """Lay out examples side by side in rows of at most `max_length`, the longest first."""
    rows: list[list[int]] = []
    used: list[int] = []
    for i in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        fits = [r for r in range(len(rows)) if used[r] + lengths[i] <= max_length]
        if fits:
            rows[fits[0]].append(i)
            used[fits[0]] += lengths[i]
        else:
            rows.append([i])
            used.append(lengths[i])
    return _lay_out(examples, lengths, rows, max(used), end)


def _lay_out(
    examples: Sequence[Example],
    lengths: Sequence[int],
    rows: Sequence[Sequence[int]],
    width: int,
    end: int,
) -> Batch:
    shape = (len(rows), width)
    ids_BT = torch.full(shape, end)
    position_BT = torch.zeros(shape, dtype=torch.int64)
    document_BT = torch.full(shape, -1)
    prompt_BT = torch.zeros(shape, dtype=torch.int64)
    end_BT = torch.zeros(shape, dtype=torch.int64)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            example, place = examples[i], slice(at, at + lengths[i])
            tokens = [*example.prompt, *example.answer]
            if example.ended and example.end is not None:
                tokens.append(example.end)
            ids_BT[r, at : at + len(tokens)] = torch.tensor(tokens)
            position_BT[r, place] = torch.arange(lengths[i])
            document_BT[r, place] = i
            prompt_BT[r, place] = len(example.prompt)
            end_BT[r, place] = len(example.prompt) + len(example.answer)
            at += lengths[i]
    return Batch(ids_BT, position_BT, document_BT, prompt_BT, end_BT, len(examples), end)
