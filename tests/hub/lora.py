# SPDX-License-Identifier: Apache-2.0
"""Random adapters that peft itself writes, in the layout of the published ones, and their merge."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import hf_twin
from safetensors.torch import load_file, save_file

# Llama's module names -> OLMo's, written out here: the tests must not ask the code they test.
OLMO = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Made:
    """A base, an adapter on it, and what peft makes of the two (under Llama's tensor names)."""

    base: Path
    adapter: Path
    merged: dict[str, torch.Tensor]
    model: Any


def make(base: Path, adapter: Path, *, olmo: bool, seed: int = 0, **options: Any) -> Made:
    """Write an adapter for `base` with peft, and merge it with peft in float32."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 6, "target_modules": list(ATTENTION)} | options
    torch.manual_seed(seed)
    net = get_peft_model(hf_twin(base), LoraConfig(lora_dropout=0.1, **options))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    net.save_pretrained(adapter)
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n# an adapter\n")
    change_config(adapter, base_model_name_or_path="/home/someone/model")
    if olmo:
        _to_olmo(adapter)
    model = net.merge_and_unload().eval()
    return Made(base, adapter, dict(model.state_dict()), model)


def change_config(adapter: Path, **entries: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_tensors(adapter: Path, change: Any) -> None:
    """Rewrite the adapter's weights through a function from and to a dict of tensors."""
    path = adapter / "adapter_model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})


def olmo_name(name: str) -> str:
    """Return OLMo's name of a Llama tensor or module in a layer."""
    for llama, olmo in OLMO.items():
        name = name.replace(f".{llama}.", f".{olmo}.")
    return name.replace("model.layers.", "model.transformer.blocks.")


def _to_olmo(adapter: Path) -> None:
    change_tensors(adapter, lambda tensors: {olmo_name(k): v for k, v in tensors.items()})
    config = json.loads((adapter / "adapter_config.json").read_text())
    short = {llama.split(".")[1]: olmo for llama, olmo in OLMO.items()}
    change_config(adapter, target_modules=[short[name] for name in config["target_modules"]])
    for entry in ("rank_pattern", "alpha_pattern"):
        change_config(adapter, **{entry: {short.get(k, k): v for k, v in config[entry].items()}})
