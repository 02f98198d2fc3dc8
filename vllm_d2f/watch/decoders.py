# SPDX-License-Identifier: Apache-2.0
"""The two decoders to watch, on transformers' models: D2F's reference loop, and greedy decoding.

The reference loop recomputes the whole sequence in each forward, so its seconds say nothing about
the engine. Its forwards do: the engine needs as many.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_d2f.hub.names import resolve
from vllm_d2f.models import FAMILIES, family_config, register_configs
from vllm_d2f.models.hf import load_hf
from vllm_d2f.reference import decode, hf_forward
from vllm_d2f.settings import MAX_WINDOW, Settings, checkpoint_settings
from vllm_d2f.watch.picture import Picture, autoregressive, pictures


class WatchError(ValueError):
    """A model or a question that cannot be decoded. The message says what to change."""


class _Decoder:
    """A model's configuration, tokenizer and end tokens.

    Args:
        model: an embedded or published name, or a folder.
        raw: ask without the chat template.
    """

    def __init__(self, model: str, raw: bool) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.name = model if not Path(model).is_dir() else Path(model).resolve().name
        self.folder = Path(resolve(model))
        if not (self.folder / "config.json").is_file():
            raise WatchError(f"{model}: no folder with a config.json; give a name or a folder")
        register_configs()
        self.config = family_config(AutoConfig.from_pretrained(self.folder))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        self.raw = raw
        self.ends: tuple[int, ...] = ()

    def prompt(self, question: str, max_tokens: int) -> list[int]:
        """Return the question's tokens, in the model's chat template if it has one.

        Raises:
            WatchError: the question is empty, or leaves too few positions for an answer.
        """
        text = question
        if self.tokenizer.chat_template and not self.raw:
            messages = [{"role": "user", "content": question}]
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        ids = list(self.tokenizer(text).input_ids)
        longest = self.config.max_position_embeddings
        if not ids:
            raise WatchError("the question is empty")
        if len(ids) + max_tokens > longest:
            raise WatchError(
                f"the question has {len(ids)} tokens; with --max-tokens {max_tokens} that is more "
                f"than the {longest} positions of {self.name}"
            )
        return ids

    def show(self, token: int) -> str:
        """Return the text of one token."""
        return "END" if token in self.ends else self.tokenizer.decode([token])

    def text(self, tokens: Any) -> str:
        """Return the text of an answer, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class D2FDecoder(_Decoder):
    """A D2F model, with settings that override its own, `preset` among them.

    Raises:
        WatchError: the model is no D2F model, or has no settings and none are given.
        ValueError: a setting is out of range.
    """

    def __init__(self, model: str, given: Mapping[str, Any], raw: bool = False) -> None:
        super().__init__(model, raw)
        if not hasattr(self.config, "family"):
            known = ", ".join(family.model_type for family in FAMILIES.values())
            raise WatchError(
                f"{model} is a {self.config.model_type} model, not one of D2F's ({known}); watch "
                "it with --ar, or give a D2F model"
            )
        self.settings = self._settings(given)
        # The picture names the settings that differ from the model's.
        if given:
            self.name += f" ({', '.join(f'{name} {value}' for name, value in given.items())})"
        hf_model, self.config = load_hf(self.folder)
        self.forward = hf_forward(hf_model)
        self.ends = self.config.end_token_ids

    def _settings(self, given: Mapping[str, Any]) -> Settings:
        file, config = self.folder / "generation_config.json", self.config
        generation = json.loads(file.read_text()) if file.is_file() else {}
        own = generation.get("d2f"), config.d2f, config.family.presets.get("default")
        if not given and own == (None, None, None):
            raise WatchError(
                f"{self.name} does not say how it decodes; add --preset NAME or --block-size N"
            )
        # There is no engine here, and no window that the blocks must fit into.
        return checkpoint_settings(config, generation, {**given, "window": MAX_WINDOW})

    def run(self, question: str, max_tokens: int) -> Iterator[Picture]:
        """Yield one picture per forward."""
        params = self.settings.params
        bidirectional = self.settings.prompt_attention == "bidirectional"
        frames = decode(
            self.forward,
            self.prompt(question, max_tokens),
            params,
            max_tokens=max_tokens,
            mask_id=self.config.mask_token_id,
            ends=self.ends,
            shift=self.config.logits_shift,
            max_len=self.config.max_position_embeddings,
            prompt_block=None if bidirectional else params.block_size,
            block_origin=self.settings.block_origin,
        )
        return pictures(self.name, frames, self.show, self.text)


class ARDecoder(_Decoder):
    """An autoregressive model of transformers, decoded greedily with a KV cache."""

    def __init__(self, model: str, raw: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(model, raw)
        if hasattr(self.config, "family"):
            raise WatchError(f"--ar {model} is a diffusion model; give a plain one, or --no-ar")
        loaded = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.model: Any = loaded.eval()
        eos = self.model.generation_config.eos_token_id
        self.ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)

    def run(self, question: str, max_tokens: int) -> Iterator[Picture]:
        """Yield one picture per forward, that is, one per token."""
        tokens = self._tokens(self.prompt(question, max_tokens), max_tokens)
        return autoregressive(self.name, tokens, self.show, self.text)

    def _tokens(self, prompt: list[int], max_tokens: int) -> Iterator[tuple[int, float, bool]]:
        cache, ids = None, prompt
        for count in range(1, max_tokens + 1):
            with torch.inference_mode():
                out = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            confidence, token = out.logits[0, -1].softmax(-1).max(-1)
            ids = [int(token)]
            done = ids[0] in self.ends or count == max_tokens
            yield ids[0], float(confidence), done
            if done:
                return
