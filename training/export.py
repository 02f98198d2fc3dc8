# SPDX-License-Identifier: Apache-2.0
"""Write a trained model as a checkpoint directory that transformers and vLLM load."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from training.model import TinyQwen2
from vllm_d2f.d2f import D2FParams

KINDS = ("ar", "dream", "d2f")

CARDS = {
    "ar": "Autoregressive Qwen2. The other two tiny models started from these weights.",
    "dream": "Bidirectional masked diffusion, Dream layout (the output at i - 1 predicts i). "
    "The teacher of `d2f-tiny`; needs full attention.",
    "d2f": "Discrete Diffusion Forcing, Dream layout, distilled from `dream-tiny`. Attention is "
    "bidirectional inside a block and causal between blocks.",
}


def model_config(
    model: TinyQwen2, tokenizer: PreTrainedTokenizerFast, kind: str, d2f: D2FParams
) -> dict:
    """The `config.json` of a model of this kind."""
    sizes = asdict(model.config)
    end = tokenizer.eos_token_id
    config = {
        "architectures": ["Qwen2ForCausalLM" if kind == "ar" else "DreamModel"],
        "model_type": "qwen2" if kind == "ar" else "Dream",
        **sizes,
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "hidden_act": "silu",
        "max_window_layers": sizes["num_hidden_layers"],
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if kind != "ar":
        config["mask_token_id"] = tokenizer.mask_token_id
    if kind == "d2f":
        config["d2f"] = asdict(d2f)
    return config


def card(kind: str, figures: str) -> str:
    """A short model card."""
    return (
        f"---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n# {kind}-tiny\n\n"
        f"{CARDS[kind]}\n\nIt solves arithmetic word problems like *Tom has 34 apples, buys 25 "
        "more, gives 18 away. How many apples does Tom have?* with the worked answer "
        "*34+25=59-18=41*: two to six steps, every number and running total between 10 "
        "and 99, sentences as `training/arithmetic.py` makes them. It knows nothing else. It "
        "exists so that tests and demos need no download.\n\n"
        f"{figures}Made by `python -m training.tiny --out DIR` on a 2-core CPU from generated data "
        "alone.\n"
    )


def export(
    model: TinyQwen2,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    d2f: D2FParams,
    directory: Path,
    figures: str = "",
) -> None:
    """Write config, weights, tokenizer and card; the directory appears, or changes, as a whole."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} does not exist; use one of {KINDS}")
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tokenizer.save_pretrained(part)
    # A template of its own file is not read by older readers of tokenizer_config.json.
    settings_file, template_file = part / "tokenizer_config.json", part / "chat_template.jinja"
    settings = json.loads(settings_file.read_text())
    if template_file.exists():
        settings["chat_template"] = template_file.read_text()
        template_file.unlink()
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(settings_file, settings)
    _write_json(part / "config.json", model_config(model, tokenizer, kind, d2f))
    end = tokenizer.eos_token_id
    _write_json(
        part / "generation_config.json",
        {"bos_token_id": end, "do_sample": False, "eos_token_id": end, "pad_token_id": end},
    )
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    (part / "model.safetensors").chmod(0o644)
    (part / "README.md").write_text(card(kind, figures))
    _replace(part, directory)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _replace(new: Path, old: Path) -> None:
    gone = old.with_name(old.name + ".old")
    shutil.rmtree(gone, ignore_errors=True)
    if old.exists():
        os.rename(old, gone)
    os.rename(new, old)
    shutil.rmtree(gone, ignore_errors=True)
