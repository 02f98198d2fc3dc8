# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the embedded tiny models: byte-level BPE in which a domain word is one token.

Any text can be encoded, as the alphabet is the 256 bytes. Digits are always tokens of their own,
and nothing is added when a text is encoded: the ids of a prompt are the ids of its text.

Text is cut into pieces exactly as Qwen2's tokenizer does. transformers loads `Qwen2Tokenizer` for
every checkpoint of that model type, whatever tokenizer_config.json asks for; with other pieces the
model would silently be given other tokens than it was trained on.
"""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.arithmetic import words

END, MASK, TURN, TURN_END = "<|endoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, MASK, TURN, TURN_END)
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A chat of one user message has exactly the ids of the same text as a plain prompt.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def vocabulary_texts() -> list[str]:
    """Return every text that must be one token: words with and without a space, and the rest."""
    spaced = [text for word in words() for text in (f" {word}", word)]
    return [*spaced, *"0123456789", *"+-=.,? "]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the BPE on the domain's words until each is a single token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocabulary_texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        mask_token=MASK,
        additional_special_tokens=[TURN, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def padded_vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the vocabulary size for a model's config: a multiple of 64."""
    return -(-len(tokenizer) // 64) * 64
