# SPDX-License-Identifier: Apache-2.0
"""Start-up: weight files that may come from a stranger are looked at before anything is loaded.

Only safetensors are read, never pickle. A local folder's index and links lead to its own files,
every header is checked by the safetensors library, and what config.json makes vLLM allocate is what
the files hold: sizes that a few bytes of JSON claim cannot exhaust the machine.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_d2f.hub.errors import HubError
from vllm_d2f.hub.folder import TensorInfo, index_of, plain_file, read_header, refuse_pickle
from vllm_d2f.models.olmo_names import to_llama

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PICKLED_FORMATS = ("pt", "npcache")
"""vLLM's `--load-format` values that read pickle."""

_PLAIN = ("F64", "F32", "BF16", "F16")


def check_weight_files(vllm_config: "VllmConfig") -> None:
    """Refuse weights that are not safetensors, and local files that are not what they say.

    A Hub id is left to vLLM's download, with nothing but safetensors to load.

    Raises:
        ValueError: with what to change.
    """
    load_config, model_config = vllm_config.load_config, vllm_config.model_config
    load_format = str(load_config.load_format)
    if load_format in PICKLED_FORMATS:
        raise ValueError(
            f"--load-format {load_format}: it reads pickle, which can run any code; D2F models are "
            "read from safetensors only. Remove it"
        )
    if load_format in ("auto", "hf"):
        # Both fall back to pickle where there are no safetensors.
        load_config.load_format = "safetensors"
    folder = Path(model_config.model)
    if load_format == "dummy" or not folder.is_dir():
        return
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        refuse_pickle(folder, "model")
        if load_format in ("auto", "hf", "safetensors"):
            raise HubError(f"{folder}: no .safetensors files; is it a checkpoint's folder?")
        return
    index_of(folder)
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        tensors |= read_header(plain_file(folder, name)).tensors
    _check_sizes(folder, model_config.hf_config, {to_llama(n): i for n, i in tensors.items()})


def _check_sizes(folder: Path, config: Any, tensors: Mapping[str, TensorInfo]) -> None:
    """What config.json says is as large as the tensors are."""
    hidden = config.hidden_size
    for layer in (0, config.num_hidden_layers - 1):
        if not any(name.startswith(f"model.layers.{layer}.") for name in tensors):
            raise HubError(
                f"{folder}: config.json says {config.num_hidden_layers} layers, but the weight "
                f"files hold nothing of layer {layer}; they do not belong together"
            )
    expected = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.layers.0.mlp.gate_proj.weight": (config.intermediate_size, hidden),
        "model.layers.0.self_attn.q_proj.weight": (hidden, hidden),
    }
    for name, shape in expected.items():
        info = tensors.get(name)
        # Quantized weights are packed in their own ways.
        if info is not None and info.dtype in _PLAIN and info.shape != shape:
            raise HubError(
                f"{folder}: {name} has the shape {info.shape}, config.json says {shape}; they do "
                "not belong together"
            )
