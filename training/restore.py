# SPDX-License-Identifier: Apache-2.0
"""The job `restore`: what a speech recogniser writes becomes written text.

A recogniser of the CTC kind writes capitals (others lower case) without punctuation, spells numbers
out, and keeps what the speaker did: fillers, repeated words. `degrade` makes such a transcript of a
written text, the same one for the same seed; training, tests and the demonstration share it.

`spoken` is its deterministic part: the words of a text as they are spoken. Scores compare
these, so that "$12" and "twelve dollars", which sound alike, count as the same words.

`exchange` puts other words into a text, any of a tokenizer's vocabulary. GSM8K has few words, and a
model that learns from it alone writes a likelier word where it reads one that it seldom saw.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_d2f.output import output_file

FILLERS = ("um", "uh", "er", "you know", "well")
# Pairs that sound alike and that recognisers mix up.
HOMOPHONES = {
    "their": "there", "there": "their", "its": "it's", "it's": "its", "too": "to",
    "your": "you're", "you're": "your", "than": "then", "then": "than", "whose": "who's",
}  # fmt: skip
SYMBOLS = {
    "&": "and", "+": "plus", "=": "equals", "*": "times", "@": "at", "#": "number",
    "€": "euros", "£": "pounds", "°": "degrees",
}  # fmt: skip
AMOUNTS = {
    "hundred", "thousand", "million", "billion", "point", "half", "halves", "third", "thirds",
    "quarter", "quarters", "dollar", "dollars", "cent", "cents", "percent", "clock", "over",
    *SYMBOLS.values(),
}  # fmt: skip
PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " "}
)

NUMBER = r"\d[\d,]*(?:\.\d+)?|\.\d+"
SCALE = r"(?:\s(?:hundred|thousand|million|billion)\b)?"
SPOKEN = re.compile(
    rf"""
    (?P<article>\b[Aa]n?\s)?\$\s?(?P<money>{NUMBER})(?P<scale>{SCALE})
  | (?P<percent>{NUMBER})\s?%
  | (?P<hour>\d{{1,2}}):(?P<minute>\d\d)
  | (?P<whole>\d+)\s(?P<above>\d+)/(?P<below>\d+)
  | (?P<top>\d+)/(?P<bottom>\d+)
  | (?P<ordinal>\d[\d,]*)(?:st|nd|rd|th)\b
  | (?P<number>{NUMBER})
  | (?P<symbol>[&+=*@\#€£°])
    """,
    re.VERBOSE | re.IGNORECASE,
)


def written(text: str) -> str:
    """Return a text with plain quotes, dashes and single spaces: the form that is restored."""
    return " ".join(text.translate(PLAIN).split())


@lru_cache(maxsize=100_000)
def _say(number: str, to: str = "cardinal") -> str:
    """Return a number of digits in words: no commas, no hyphens, no "and"."""
    from num2words import num2words

    plain = number.replace(",", "").rstrip(".")
    value: Any = float(plain) if "." in plain else int(plain or 0)
    if "." in plain and to == "cardinal":
        before, after = plain.split(".")
        digits = " ".join(num2words(int(d)) for d in after)
        return f"{_say(before or '0')} point {digits}"
    said = num2words(value, to=to)
    return said.replace(",", "").replace("-", " ").replace(" and ", " ")


def _money(amount: str, scale: str) -> str:
    whole, _, cents = amount.replace(",", "").partition(".")
    if scale or len(cents) not in (0, 2):
        return f"{_say(amount)}{scale} dollars"
    parts = []
    if int(whole or 0) or not int(cents or 0):
        parts.append(f"{_say(whole)} {'dollar' if whole == '1' else 'dollars'}")
    if int(cents or 0):
        parts.append(f"{_say(cents)} {'cent' if int(cents) == 1 else 'cents'}")
    return " and ".join(parts)


def _fraction(above: str, below: str) -> str:
    one = int(above) == 1
    if int(below) == 2:
        part = "half" if one else "halves"
    elif int(below) == 4:
        part = "quarter" if one else "quarters"
    elif 2 < int(below) <= 100:
        part = _say(below, "ordinal") + ("" if one else "s")
    else:
        return f"{_say(above)} over {_say(below)}"
    return f"{_say(above)} {part}"


def _said(match: re.Match[str]) -> str:
    part = match.groupdict()
    if part["money"]:
        said = _money(part["money"], part["scale"])
        if part["article"]:  # "a $5 fee" is "a five dollar fee"
            said = part["article"] + said.removesuffix("s")
    elif part["percent"]:
        said = f"{_say(part['percent'])} percent"
    elif part["hour"]:
        minute = part["minute"]
        tail = "o'clock" if minute == "00" else _say(minute)
        said = f"{_say(part['hour'])} {'oh ' if '01' <= minute <= '09' else ''}{tail}"
    elif part["whole"]:
        said = f"{_say(part['whole'])} and {_fraction(part['above'], part['below'])}"
    elif part["top"]:
        said = _fraction(part["top"], part["bottom"])
    elif part["ordinal"]:
        said = _say(part["ordinal"], "ordinal")
    elif part["symbol"]:
        said = SYMBOLS[part["symbol"]]
    else:
        said = _say(part["number"])
    return f" {said} "


def spoken(text: str) -> list[str]:
    """Return the words of a text as spoken: lower case, no punctuation, numbers in words."""
    said = SPOKEN.sub(_said, written(text)).lower()
    words = re.findall(r"[a-z]+(?:'[a-z]+)*", said)
    # "one hundred and five" and "one hundred five" are the same number.
    return [
        word
        for at, word in enumerate(words)
        if not (word == "and" and 0 < at < len(words) - 1 and _joins(words[at - 1], words[at + 1]))
    ]


@lru_cache(maxsize=1)
def _amounts() -> frozenset[str]:
    """Return the words that are written as digits and signs, or stand beside such."""
    return _number_words() | AMOUNTS


@lru_cache(maxsize=1)
def _number_words() -> frozenset[str]:
    return frozenset(word for n in range(100) for word in _say(str(n)).split())


def _joins(before: str, after: str) -> bool:
    return before in ("hundred", "thousand", "million") and after in _number_words()


def degrade(text: str, seed: int | str, capitals: bool = True, slips: bool = True) -> str:
    """Return what a recogniser would have written of `text`.

    Args:
        slips: half of the texts get fillers, repeated words and mixed-up homophones, about one of
            them in twenty words.
    """
    rng = random.Random(f"restore:{seed}")
    words = spoken(text)
    if slips and rng.random() < 0.5:
        words = list(_slip(words, rng))
    heard = " ".join(words)
    return heard.upper() if capitals else heard


def _slip(words: list[str], rng: random.Random) -> Iterator[str]:
    for word in words:
        chance = rng.random()
        if chance < 0.02:
            yield rng.choice(FILLERS)
        elif chance < 0.035:
            yield word
        if word in HOMOPHONES and rng.random() < 0.05:
            yield HOMOPHONES[word]
        else:
            yield word


Words = tuple[list[str], list[str]]
"""Words in lower case, and words with a capital."""


def vocabulary(tokenizer: Any) -> Words:
    """Return the words of four letters and more that are one token behind a space.

    Those that say a number or an amount are left out.
    """
    tokens = sorted(tokenizer.get_vocab())
    words = [token[1:] for token in tokens if re.fullmatch("Ġ[A-Za-z][a-z]{3,}", token)]
    words = [word for word in words if word.lower() not in _amounts()]
    return [w for w in words if w.islower()], [w for w in words if not w.islower()]


def exchange(text: str, seed: int | str, words: Words, share: float) -> str:
    """Return a text in which a share of the longer words are others, alike wherever they stand.

    Words that say a number or an amount stay, for they are written as digits and signs.
    """
    rng = random.Random(f"exchange:{seed}")
    found: dict[str, str] = {}

    def other(match: re.Match[str]) -> str:
        word = match[0]
        if word not in found:
            chosen = word.lower() not in _amounts() and rng.random() < share
            found[word] = rng.choice(words[word[0].isupper()]) if chosen else word
        return found[word]

    return re.sub(r"\b[A-Za-z][a-z]{3,}\b", other, text)


Pair = tuple[str, str]
"""The right text, and the text that a model wrote."""


def word_errors(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Count words inserted, deleted or exchanged, and all words of the right texts, as spoken."""
    wrong = words = 0
    for right, found in pairs:
        ours, theirs = spoken(right), spoken(found)
        row = list(range(len(theirs) + 1))
        for above, word in enumerate(ours, 1):
            corner, row[0] = row[0], above
            for at, other in enumerate(theirs, 1):
                corner, row[at] = (
                    row[at],
                    min(row[at] + 1, row[at - 1] + 1, corner + (word != other)),
                )
        wrong, words = wrong + row[-1], words + len(ours)
    return wrong, words


def scores(pairs: Sequence[Pair]) -> dict[str, float]:
    """Score restored texts.

    `word_error_rate` ignores case and punctuation. `punctuation_f1` and `case_f1` are of the marks
    behind words and of words with a capital, with words paired by alignment. `numbers` is the share
    of numbers in digits that are there again.
    """
    wrong, words = word_errors(pairs)
    marks, capitals, numbers = [0, 0, 0], [0, 0, 0], [0, 0]
    for right, found in pairs:
        ours, theirs = (re.findall(r"[\w'$%.,:/-]*\w%?|[^\w\s]+", text) for text in (right, found))
        for counts, value in ((marks, _mark), (capitals, _capital)):
            for kept, mine, other in _aligned(ours, theirs, value):
                counts[0] += kept
                counts[1] += mine
                counts[2] += other
        there, again = (Counter(re.findall(NUMBER, text)) for text in (right, found))
        numbers[0] += (there & again).total()
        numbers[1] += there.total()
    return {
        "word_error_rate": wrong / max(words, 1),
        "punctuation_f1": _f1(*marks),
        "case_f1": _f1(*capitals),
        "numbers": numbers[0] / max(numbers[1], 1),
        "exact": sum(right == found for right, found in pairs) / max(len(pairs), 1),
    }


def _mark(units: list[str], at: int) -> str:
    """Return the mark behind a word."""
    behind = units[at + 1] if at + 1 < len(units) else ""
    return "" if re.match(r"\w|[$']", behind) else behind


def _capital(units: list[str], at: int) -> str:
    return units[at] if units[at] != units[at].lower() else ""


def _aligned(
    ours: list[str], theirs: list[str], value: Callable[[list[str], int], str]
) -> Iterator[tuple[bool, bool, bool]]:
    """Yield for each pair of words whether the values agree, and whether either has one."""
    words = [[unit.lower() for unit in units] for units in (ours, theirs)]
    matcher = SequenceMatcher(None, words[0], words[1], autojunk=False)
    for _, i, end, j, stop in matcher.get_opcodes():
        for step in range(max(end - i, stop - j)):
            mine = value(ours, i + step) if i + step < end else ""
            other = value(theirs, j + step) if j + step < stop else ""
            yield bool(mine) and mine == other, bool(mine), bool(other)


def _f1(right: int, ours: int, theirs: int) -> float:
    return 2 * right / (ours + theirs) if ours + theirs else 1.0


def usable(text: str) -> bool:
    """Return whether a text can be a target: ASCII, and more than three words."""
    return text.isascii() and len(spoken(text)) > 3


def plain_sentences(answer: str) -> str | None:
    """Return the sentences of a worked GSM8K answer that hold no calculation, as one text."""
    text = re.sub(r"<<[^>]*>>", "", answer.partition("####")[0])
    lines = [written(line) for line in text.splitlines()]
    kept = [line for line in lines if line and not re.search(r"[-+*/=x×]\s*\$?\d|=", line)]
    return " ".join(kept) if kept else None


def main(argv: list[str] | None = None) -> None:
    """Write a JSONL file of prompts and responses from GSM8K's questions (and answers)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("texts", type=Path, help="JSONL file with question and answer")
    parser.add_argument("--out", type=output_file, required=True)
    parser.add_argument("--copies", type=int, default=1, help="transcripts per text")
    parser.add_argument("--capitals", type=float, default=1.0, help="share of them in capitals")
    parser.add_argument("--answers", action="store_true", help="use sentences of answers too")
    parser.add_argument(
        "--exchange", type=float, default=0.0, help="share of the longer words that are exchanged"
    )
    parser.add_argument("--tokenizer", help="folder or Hub id: whose words these become")
    parser.add_argument("--seed", default="0")
    args = parser.parse_args(argv)
    if not 0 <= args.exchange <= 1:
        parser.error(f"--exchange {args.exchange} must be in [0, 1]")
    if (args.exchange > 0) is not bool(args.tokenizer):
        parser.error("--exchange SHARE and --tokenizer go together")
    words: Words = ([], [])
    if args.tokenizer:
        from transformers import AutoTokenizer

        words = vocabulary(AutoTokenizer.from_pretrained(args.tokenizer))
        if not all(words):
            parser.error(f"--tokenizer {args.tokenizer}: its vocabulary has no tokens like Ġword")
    texts = []
    for line in args.texts.read_text().splitlines():
        record = json.loads(line)
        texts.append(written(record["question"]))
        if args.answers and (answer := plain_sentences(record["answer"])):
            texts.append(answer)
    texts = [text for text in texts if usable(text)]
    with args.out.open("w") as file:
        for copy in range(args.copies):
            for at, text in enumerate(texts):
                seed = f"{args.seed}:{copy}:{at}"
                capitals = random.Random(seed).random() < args.capitals
                right = exchange(text, seed, words, args.exchange) if args.exchange else text
                prompt = degrade(right, seed, capitals)
                file.write(json.dumps({"prompt": prompt, "response": right}) + "\n")


if __name__ == "__main__":
    main()
