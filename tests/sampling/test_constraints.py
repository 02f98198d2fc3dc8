# SPDX-License-Identifier: Apache-2.0
"""Deciding in the order of the text, and what `d2f.step` makes of it."""

import pytest
import torch

from vllm_d2f.d2f import Beginning, D2FParams, Window, activated, add, step
from vllm_d2f.sampling.constraints import NOT_YET, BadWords, InOrderDecoder
from vllm_d2f.sampling.sample import sample_greedy

MASK, VOCAB = 0, 9


class Recorder:
    """Forbids nothing and remembers what was accepted."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def forbid(self, logits_V):
        pass

    def accept(self, token):
        self.accepted.append(token)


def logits_of(tokens, confidences):
    """Rows whose most probable token and its probability are as given."""
    rows = torch.empty(len(tokens), VOCAB)
    for row, (token, p) in enumerate(zip(tokens, confidences, strict=True)):
        rows[row] = torch.log(torch.tensor((1 - p) / (VOCAB - 2)))
        rows[row, token] = torch.log(torch.tensor(p))
    rows[:, MASK] = -torch.inf
    return rows


def decode(order, logits):
    return order.decode_in_order(logits, lambda row: sample_greedy(logits[row : row + 1], MASK))


@pytest.mark.parametrize(
    ("confidences", "decided"),
    [
        ([0.95, 0.99, 0.95, 0.95], 4),
        ([0.95, 0.4, 0.99, 0.99], 1),
        ([0.3, 0.99, 0.99, 0.99], 1),  # the first always, and after an unsure one nothing
        ([0.95, 0.95, 0.5, 0.99], 2),
    ],
)
def test_it_goes_on_while_it_is_sure(confidences, decided):
    seen = Recorder()
    order = InOrderDecoder([seen], 0.9, ends=[])
    tokens = [3, 4, 5, 6]
    token, confidence = decode(order, logits_of(tokens, confidences))
    assert seen.accepted == tokens[:decided] == token[:decided].tolist()
    torch.testing.assert_close(confidence[:decided], torch.tensor(confidences[:decided]))
    assert (confidence[decided:] == NOT_YET).all()


def test_rows_may_come_in_several_calls_and_forwards_begin_anew():
    seen = Recorder()
    order = InOrderDecoder([seen], 0.9, ends=[])
    decode(order, logits_of([3, 4], [0.95, 0.95]))
    decode(order, logits_of([5, 6], [0.5, 0.95]))  # not the first of its forward: it waits
    decode(order, logits_of([7], [0.95]))
    assert seen.accepted == [3, 4]
    order.begin_forward()
    decode(order, logits_of([5], [0.5]))
    assert seen.accepted == [3, 4, 5]


def test_it_stops_behind_an_end_token():
    seen = Recorder()
    _, confidence = decode(InOrderDecoder([seen], 0.5, ends=[4]), logits_of([3, 4, 5], [0.9] * 3))
    assert seen.accepted == [3, 4]
    assert confidence[2] == NOT_YET


@pytest.mark.parametrize("tau", [0.6, 0.9])
def test_a_confidence_of_exactly_the_threshold_is_not_above_it(tau):
    """In float32, as `step` compares: 0.6 there is a little more than 0.6."""
    seen = Recorder()
    order = InOrderDecoder([seen], tau, ends=[])
    exactly = torch.tensor([tau], dtype=torch.float32)
    order.decode_in_order(torch.zeros(2, VOCAB), lambda row: (torch.tensor([3 + row]), exactly))
    assert seen.accepted == [3]


def test_bad_words_are_never_completed():
    words = [[3, 4], [5, 5, 5], [4, 6, 3]]
    generator = torch.Generator().manual_seed(0)
    bad = BadWords(words)
    answer = []
    for _ in range(3000):
        # Few tokens, so that beginnings of words are frequent.
        logits = torch.where(torch.arange(VOCAB) < 7, torch.randn(VOCAB, generator=generator), -9.0)
        logits[:3] = -9.0
        bad.forbid(logits)
        token = int(logits.argmax())
        bad.accept(token)
        answer.append(token)
    text = bytes(answer)
    assert all(bytes(word) not in text for word in words)
    # What is not a bad word does occur: only the last token of one is forbidden, and only there.
    assert all(bytes(word) in text for word in ([3, 3], [4, 3], [5, 5], [4, 6], [6, 3]))


@pytest.mark.parametrize("seed", range(20))
def test_step_decodes_what_the_decoder_accepted(seed):
    """On random windows, until the answers are done."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    width, ends = 24, [8]
    params = D2FParams(
        pick(1, 3, 4, 8), pick(1, 2, 3), pick(0, 0.1, 1), pick(0, 0.5, 1), pick(0, 0.6, 0.9, 1)
    )
    window = Window.empty(1, width, 1, MASK)
    window.start([0], [Beginning(params, pick(5, 13, 40), pick(17, 80), ends)], MASK)
    add(window)
    seen = Recorder()
    order = InOrderDecoder([seen], float(window.tau_R1), ends)
    committed: list[int] = []
    for _ in range(200):
        open_ = int(window.open_R)
        masked = (~window.decoded_RW[0, :open_]).nonzero()[:, 0]
        # What is decided is a beginning of the text, and what comes next may be forced.
        assert masked.tolist() == list(range(open_ - len(masked), open_))
        assert not len(masked) or activated(window)[0, masked[0]]
        tokens = [pick(1, 2, 3, 4, 5, 6, 7, 8) if pick(0, 0, 1) else 1 for _ in masked]
        logits = logits_of(tokens, [pick(0.3, 0.7, 0.95, 0.99) for _ in masked])
        before = len(seen.accepted)
        order.begin_forward()
        proposal, confidence = torch.zeros(1, width, dtype=torch.int64), torch.zeros(1, width)
        proposal[0, masked], confidence[0, masked] = decode(order, logits)
        expected = seen.accepted[before:]
        result = step(window, proposal, confidence, MASK)
        accepted = result.accepted_RW[0].nonzero()[:, 0]
        assert accepted.tolist() == masked[: len(expected)].tolist()
        assert result.tokens_RW[0, accepted].tolist() == expected
        answer = committed + result.tokens_RW[0, : int(result.emit_R)].tolist()
        committed += result.tokens_RW[0, : int(result.commit_R)].tolist()
        if bool(result.done_R):
            break
        add(window)
    else:
        pytest.fail("not done")
    assert answer == seen.accepted[: len(answer)]
