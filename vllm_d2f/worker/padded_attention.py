# SPDX-License-Identifier: Apache-2.0
"""Heads of a size the attention backend has no kernel for, padded with zeros to one that it has.

Zeros add nothing to q.k and give zeros in the output, and the scale stays that of the real size,
so the result is exact. Published models have heads of 128 and are never padded; tiny ones are.
"""

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention


class PaddedAttention(nn.Module):
    """vLLM's attention layer with `head_size` channels seen from outside and more inside.

    Shape suffixes: T tokens, D channels of all heads.
    """

    def __init__(self, layer: Attention, padded: int, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.head_size, self.extra = layer.head_size, padded - layer.head_size
        # The padded layer takes the place of the first one under its name.
        vllm_config.compilation_config.static_forward_context.pop(layer.layer_name)
        self.inner = Attention(
            layer.num_heads,
            padded,
            layer.impl.scale,
            num_kv_heads=layer.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=layer.quant_config,
            prefix=layer.layer_name,
        )

    def forward(self, query_TD: Tensor, key_TD: Tensor, value_TD: Tensor) -> Tensor:
        out_TD = self.inner(self._pad(query_TD), self._pad(key_TD), self._pad(value_TD))
        out = out_TD.unflatten(-1, (-1, self.head_size + self.extra))[..., : self.head_size]
        return out.flatten(-2)

    def _pad(self, x_TD: Tensor) -> Tensor:
        heads = x_TD.unflatten(-1, (-1, self.head_size))
        return torch.nn.functional.pad(heads, (0, self.extra)).flatten(-2)


def pad_heads(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Replace attention layers whose head size their backend does not support."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if not isinstance(layer, Attention):
                continue
            sizes = layer.attn_backend.get_supported_head_sizes()
            if not sizes or layer.head_size in sizes:
                continue
            larger = [size for size in sizes if size > layer.head_size]
            if not larger:
                raise ValueError(
                    f"{layer.attn_backend.get_name()} has no kernel for heads of "
                    f"{layer.head_size}, only for {sizes}; choose another --attention-backend"
                )
            setattr(module, name, PaddedAttention(layer, min(larger), vllm_config))
