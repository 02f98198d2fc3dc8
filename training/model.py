# SPDX-License-Identifier: Apache-2.0
"""A compact Qwen2 with Hugging Face's tensor names, for training on a CPU.

Written out instead of taken from transformers because it is several times faster at this size:
only the selected positions go through `lm_head`, attention is plain matrix products, and one
compiled block is shared by all layers. The weights load in `Qwen2ForCausalLM` unchanged.

Shapes: B sequences, T tokens, C hidden size, H query heads, K key heads, D head size,
V vocabulary, M selected positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, with the names of a Hugging Face config."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 512
    initializer_range: float = 0.02

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC.float()
        return x_BTC * torch.rsqrt(x_BTC.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary embedding of the half-split kind."""
    first, second = x_BHTD.chunk(2, -1)
    return x_BHTD * cos_TD + torch.cat((-second, first), -1) * sin_TD


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_size
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, kv_size)
        self.v_proj = nn.Linear(size, kv_size)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x_BTC: Tensor, bias_BTT: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        K, D = self.config.num_key_value_heads, self.config.head_size
        groups = self.config.num_attention_heads // K
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        bias = torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias))
        heads = F.linear(x_BTC, weight, bias).view(B, T, -1, D).transpose(1, 2)
        q_BHTD, k_BKTD, v_BKTD = heads.split((K * groups, K, K), 1)
        q_BHTD = rotate(q_BHTD, cos_TD, sin_TD) * D**-0.5
        k_BKTD = rotate(k_BKTD, cos_TD, sin_TD)
        # The query heads of one key head are stacked along T, so that no key is repeated.
        q_BKgTD = q_BHTD.reshape(B, K, groups * T, D).to(x_BTC.dtype)
        scores = q_BKgTD @ k_BKTD.transpose(-1, -2).to(x_BTC.dtype)
        scores = scores.view(B, K, groups, T, T).float() + bias_BTT[:, None, None]
        probs = scores.softmax(-1).to(v_BKTD.dtype).view(B, K, groups * T, T)
        out = (probs @ v_BKTD).view(B, K * groups, T, D).transpose(1, 2).reshape(B, T, C)
        return self.o_proj(out)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTC: Tensor, bias_BTT: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), bias_BTT, cos_TD, sin_TD)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class Backbone(nn.Module):
    """Everything below `lm_head`; in the tensor names this is `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TinyQwen2(nn.Module):
    """The language model. `compile_layers` speeds up long trainings, after about a minute."""

    cos_TD: Tensor
    sin_TD: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._layer = Layer.__call__
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        frequencies_D = config.rope_theta ** (
            -torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
        )
        positions_T = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles_TD = torch.outer(positions_T, frequencies_D).repeat(1, 2)
        self.register_buffer("cos_TD", angles_TD.cos(), persistent=False)
        self.register_buffer("sin_TD", angles_TD.sin(), persistent=False)

    def compile_layers(self) -> None:
        self._layer = torch.compile(Layer.__call__, dynamic=True)

    def hidden(self, ids_BT: Tensor, bias_BTT: Tensor) -> Tensor:
        """Final hidden states (B, T, C). `bias_BTT` is added to the attention scores."""
        cos_TD, sin_TD = self.cos_TD[: ids_BT.shape[1]], self.sin_TD[: ids_BT.shape[1]]
        x_BTC = self.model.embed_tokens(ids_BT)
        for layer in self.model.layers:
            x_BTC = self._layer(layer, x_BTC, bias_BTT, cos_TD, sin_TD)
        return self.model.norm(x_BTC)

    def forward(self, ids_BT: Tensor, bias_BTT: Tensor) -> Tensor:
        """Logits (B, T, V); the output at i - 1 predicts position i."""
        return self.lm_head(self.hidden(ids_BT, bias_BTT))

    def predict(self, ids_BT: Tensor, bias_BTT: Tensor, chosen_BT: Tensor) -> Tensor:
        """Logits (M, V) that predict the chosen positions, shift included; position 0 has none."""
        hidden_BTC = self.hidden(ids_BT, bias_BTT)
        return self.lm_head(hidden_BTC[:, :-1][chosen_BT[:, 1:]])


def attention_bias(allowed: Tensor) -> Tensor:
    """Additive bias from a boolean mask (query, key), True where attention is allowed."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
