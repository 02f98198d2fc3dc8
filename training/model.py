# SPDX-License-Identifier: Apache-2.0
"""The models that are trained: transformers' own Qwen2 (Dream) and Llama (LLaDA).

Shapes: B rows, T tokens, Q queries, K keys, C hidden size, M chosen positions, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from training.attention import as_argument
from training.config import LoraSection, ModelSection
from training.tokenizer import build_tokenizer, padded_vocab_size
from vllm_d2f.hub import checkpoint, download, names
from vllm_d2f.models import FAMILIES, register_configs

# An autoregressive base is called by its stack: `llama` becomes the family `d2f_llama`.
BY_NAME = {family.name.removeprefix("d2f_"): family for family in FAMILIES.values()}
AUTOREGRESSIVE = tuple(name for name, family in BY_NAME.items() if family.name != name)
MODELS: dict[str, Any] = {name: getattr(transformers, f.hf) for name, f in BY_NAME.items()}
CONFIGS: dict[str, Any] = {
    name: MODELS[name].config_class if name in AUTOREGRESSIVE else family.config
    for name, family in BY_NAME.items()
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """A model's config, tokenizer and folder, without its weights.

    Attributes:
        folder: where it lies; None for a new model.
    """

    tokenizer: Any
    config: Any
    family: str
    folder: Path | None = None

    @property
    def shift(self) -> bool:
        """Whether the output at i - 1 predicts position i."""
        return BY_NAME[self.family].logits_shift == "previous"

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        eos = self.config.eos_token_id
        listed = tuple(eos) if isinstance(eos, list) else (eos,)
        return getattr(self.config, "end_token_ids", listed)

    @property
    def end(self) -> int:
        eos = self.config.eos_token_id
        return eos[0] if isinstance(eos, list) else eos

    @property
    def mask_id(self) -> int:
        return self.config.mask_token_id


@dataclass(frozen=True)
class Loaded(Base):
    """A model with its config, tokenizer and folder."""

    model: Any = None


def new_config(section: ModelSection, tokenizer: Any = None) -> Any:
    """Make the config of a model of `section.sizes`, with the token ids of `tokenizer` if given."""
    assert section.sizes is not None
    values = section.sizes.model_dump()
    if tokenizer is not None:
        end = tokenizer.eos_token_id
        values["vocab_size"] = values["vocab_size"] or padded_vocab_size(tokenizer)
        values |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        values["mask_token_id"] = tokenizer.mask_token_id
    if values["vocab_size"] is None:
        del values["vocab_size"]
    theta = values.pop("rope_theta")
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return CONFIGS[section.family](**values)


def open_base(section: ModelSection) -> Base:
    """Return config and tokenizer of the base, or of a new model, without weights.

    Raises:
        ValueError: the base is not what the config says, or has no mask or end token.
    """
    register_configs()
    if section.base is None:
        tokenizer: Any = build_tokenizer()
        return Base(tokenizer, new_config(section, tokenizer), section.family)
    folder = local_folder(section, SMALL_FILES)
    config = AutoConfig.from_pretrained(folder)
    check_base(section, config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if section.chat_template is not None:
        tokenizer.chat_template = section.chat_template
    if section.family in AUTOREGRESSIVE:
        choose_mask(section, config, tokenizer)
    check_tokens(section, config, tokenizer)
    return Base(tokenizer, config, section.family, folder)


def load(section: ModelSection, attention: str, seed: int = 0) -> Loaded:
    """Return the base of a run, or a new model.

    Raises:
        ValueError: the base is not what the config says, or has no mask token.
    """
    base = open_base(section)
    if base.folder is None:
        torch.manual_seed(seed)
        base.config._attn_implementation = attention
        model = MODELS[section.family](base.config).to(DTYPES[section.dtype])
    else:
        folder = local_folder(section, ("*.safetensors", *SMALL_FILES))
        model = load_weights(folder, base.config, section, attention)
    loaded = Loaded(base.tokenizer, base.config, base.family, base.folder, model)
    prepare(loaded, section)
    return loaded


SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def local_folder(section: ModelSection, patterns: Sequence[str]) -> Path:
    """Return the folder of the base. Files of a Hub id are downloaded, but no code and no pickle.

    Raises:
        FileNotFoundError: it looks like a folder, and there is none.
        ValueError: with what to do.
    """
    assert section.base is not None
    try:
        path = Path(names.resolve(section.base)).expanduser()
        if path.is_dir() and section.revision is not None:
            raise ValueError(f"{section.base} is a folder, and model.revision is for a Hub id")
        if not path.is_dir():
            if path.is_absolute() or section.base.startswith((".", "~")) or len(path.parts) > 2:
                raise FileNotFoundError(f"model.base: {section.base} does not exist")
            path = download.snapshot(section.base, section.revision, patterns)
        checkpoint.check_tokenizer_files(path)
    except ValueError as error:
        raise ValueError(f"model.base: {error}") from None
    return path


def check_tokens(section: ModelSection, config: Any, tokenizer: Any) -> None:
    """Check that mask and end token exist, and are the same in config and tokenizer.

    Raises:
        ValueError: naming the field and the file.
    """
    where = f"model.base: {section.base}"
    mask_id = config.mask_token_id
    if mask_id is None:
        raise ValueError(f"{where} names no mask_token_id in config.json")
    if config.eos_token_id is None:
        raise ValueError(f"{where} names no eos_token_id in config.json")
    token = tokenizer.convert_ids_to_tokens(mask_id) if mask_id < len(tokenizer) else None
    if token is None:
        raise ValueError(
            f"{where}: the tokenizer has no mask token: mask_token_id {mask_id} of config.json is "
            "none of its tokens; add it to tokenizer.json"
        )
    if tokenizer.mask_token_id not in (None, mask_id):
        raise ValueError(
            f"{where}: the tokenizer's mask_token is {tokenizer.mask_token_id}, and mask_token_id "
            f"of config.json {mask_id}"
        )


def choose_mask(section: ModelSection, config: Any, tokenizer: Any) -> None:
    """Give an autoregressive checkpoint the mask token `model.mask_token`.

    A new token takes a row of the embedding that no token has, or a row that is added.
    """
    if getattr(config, "mask_token_id", None) is None:
        tokenizer.add_special_tokens({"mask_token": section.mask_token or "<|mask|>"})
        config.mask_token_id = tokenizer.mask_token_id
    config.vocab_size = max(config.vocab_size, config.mask_token_id + 1)


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return the tensor with rows added up to `rows`, each the mean of those there are."""
    missing = rows - len(tensor)
    return torch.cat((tensor, tensor.mean(0, keepdim=True).expand(missing, -1)))


def load_weights(folder: Path, config: Any, section: ModelSection, attention: str) -> Any:
    """Build the model without weights, then put them in, one file at a time.

    Raises:
        FileNotFoundError: no safetensors.
        ValueError: tensors are missing, or there are others.
    """
    dtype = DTYPES[section.dtype]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"model.base: {folder} has no .safetensors files")
    config._attn_implementation = attention
    with init_empty_weights():
        model = MODELS[section.family](config)
    missing = set(model.state_dict())
    for file in files:
        to_stack = BY_NAME[section.family].to_stack
        weights = {to_stack(name): tensor.to(dtype) for name, tensor in load_file(file).items()}
        if unknown := sorted(set(weights) - missing):
            raise ValueError(f"model.base: {file} has tensors the model has not: {unknown[:3]}")
        missing -= set(weights)
        for name in weights.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            if len(weights[name]) < config.vocab_size and section.family in AUTOREGRESSIVE:
                weights[name] = with_rows(weights[name], config.vocab_size)
        model.load_state_dict(weights, strict=False, assign=True)
    if missing and not (config.tie_word_embeddings and missing == {"lm_head.weight"}):
        raise ValueError(f"model.base: {folder} lacks the tensors {sorted(missing)[:3]}")
    model.tie_weights()
    return model.requires_grad_(True)


def prepare(loaded: Loaded, section: ModelSection) -> None:
    """Switch gradient checkpointing and compilation on, as the config says."""
    loaded.model.config.use_cache = False
    if section.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        loaded.model.enable_input_require_grads()
    if section.compile:
        for layer in loaded.model.model.layers:
            layer.compile(dynamic=True)


def check_base(section: ModelSection, config: Any) -> None:
    """Refuse a base of another family or size than the config says.

    Raises:
        ValueError: naming the field.
    """
    expected = CONFIGS[section.family].model_type
    if config.model_type != expected:
        raise ValueError(
            f"model.base: {section.base} is a {config.model_type} model, and model.family says "
            f"{section.family} ({expected})"
        )
    if section.sizes is None:
        return
    for name, value in section.sizes.model_dump().items():
        if name in ("rope_theta", "rms_norm_eps") or value is None:
            continue
        if getattr(config, name) != value:
            raise ValueError(
                f"model.base: {section.base} has {name} {getattr(config, name)}, "
                f"and model.sizes.{name} says {value}"
            )


class Predictor(nn.Module):
    """A causal language model as the losses call it (`training.objectives.Logits`).

    A module, so that it can be wrapped for several devices as a whole. Only the chosen positions go
    through the LM head.
    """

    def __init__(self, net: Any, shift: bool, attention: str) -> None:
        super().__init__()
        self.net = net
        self.shift = shift
        self.attention = attention
        # FSDP wraps the layers of these classes.
        self._no_split_modules = getattr(net, "_no_split_modules", None)

    def forward(
        self,
        ids_BT: Tensor,
        position_BT: Tensor,
        allowed_BTT: Tensor,
        chosen_BT: Tensor,
        before_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of the chosen positions.

        Args:
            before_BT: index of the token before each, where that is not the one on the left.
        """
        inner = self.net.get_base_model() if hasattr(self.net, "peft_config") else self.net
        hidden_BTC = inner.model(
            input_ids=ids_BT,
            position_ids=position_BT,
            attention_mask=as_argument(allowed_BTT, self.attention, inner.dtype),
            use_cache=False,
        ).last_hidden_state
        if self.shift and before_BT is not None:
            return inner.lm_head(hidden_BTC[chosen_BT.nonzero()[:, 0], before_BT[chosen_BT]])
        if self.shift:
            # No output predicts position 0, which is in the prompt: prompts are never empty.
            return inner.lm_head(hidden_BTC[:, :-1][chosen_BT[:, 1:]])
        return inner.lm_head(hidden_BTC[chosen_BT])


class PrefixCache:
    """A `Predictor` for one sequence that is decoded, called like it and without a gradient.

    It keeps keys, values and logits of the beginning that no later position is visible to and that
    is as it was in the call before, such as committed blocks. Results differ by rounding only.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.cache = transformers.DynamicCache()
        self.ids_T = torch.empty(0, dtype=torch.int64)
        self.allowed_TT = torch.empty(0, 0, dtype=torch.bool)
        self.rows_TV = torch.empty(0)

    def __call__(
        self, ids_1T: Tensor, position_1T: Tensor, allowed_1TT: Tensor, chosen_1T: Tensor
    ) -> Tensor:
        """Return the logits that predict the chosen positions."""
        net, shift = self.predictor.net, int(self.predictor.shift)
        inner = net.get_base_model() if hasattr(net, "peft_config") else net
        kept = self._kept(ids_1T[0], allowed_1TT[0])
        if kept:
            self.cache.crop(kept - len(self.ids_T))
        else:
            self.cache = transformers.DynamicCache()
        mask = as_argument(allowed_1TT[:, kept:], self.predictor.attention, inner.dtype)
        hidden_TC = inner.model(
            input_ids=ids_1T[:, kept:],
            position_ids=position_1T[:, kept:],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[0]
        rows_TV = inner.lm_head(hidden_TC[: len(hidden_TC) - shift])
        if not kept:
            before_TV = rows_TV.new_zeros(shift, rows_TV.shape[1])  # nothing predicts position 0
        else:
            before_TV = self.rows_TV[: kept + shift]
        self.rows_TV = torch.cat((before_TV, rows_TV))
        self.ids_T, self.allowed_TT = ids_1T[0], allowed_1TT[0]
        return self.rows_TV[chosen_1T[0]]

    def _kept(self, ids_T: Tensor, allowed_TT: Tensor) -> int:
        """Return the length of the beginning that is as it was and sees nothing behind it."""
        # One less, for logits of the position behind it are kept as well.
        n = max(min(len(ids_T), len(self.ids_T)) - 1, 0)
        same_N = ids_T[:n] == self.ids_T[:n]
        same_N &= (allowed_TT[:n, :n] == self.allowed_TT[:n, :n]).all(1)
        for mask_TT in (allowed_TT, self.allowed_TT):
            same_N &= ~mask_TT[:n, n:].any(1)
        lead = int(same_N.cumprod(0).sum())
        while lead and any(m[:lead, lead:].any() for m in (allowed_TT, self.allowed_TT)):
            lead -= 1
        return lead


def add_lora(loaded: Loaded, section: LoraSection, seed: int, masks: bool = True) -> Any:
    """Return the model with adapters, the only weights to train; they are in float32.

    Args:
        masks: whether it will be shown masks.

    Raises:
        ValueError: a target is no module of the model. (PEFT is content when any of them is.)
    """
    from peft import LoraConfig, get_peft_model

    targets = lora_modules(loaded.model, section.targets)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        bias="none",
    )
    net: Any = get_peft_model(loaded.model, config, autocast_adapter_dtype=True)
    if masks and loaded.family in AUTOREGRESSIVE:
        train_mask_row(net.get_base_model().model.embed_tokens, loaded.mask_id)
    return net


MASK_ROW = "mask_row"


def train_mask_row(embedding: Any, mask_id: int) -> None:
    """Train the mask token's embedding beside adapters: an autoregressive base never saw it.

    The embedding itself stays frozen; the row has a parameter of its own.
    """
    row_C = embedding.weight[mask_id].detach().float().clone()
    embedding.register_parameter(MASK_ROW, nn.Parameter(row_C))
    embedding.mask_id = mask_id

    def put(module: Any, args: tuple[Tensor, ...], out_BTC: Tensor) -> Tensor:
        return torch.where((args[0] == mask_id)[..., None], module.mask_row.to(out_BTC), out_BTC)

    embedding.register_forward_hook(put)


def adapter_state(net: Any) -> dict[str, Tensor]:
    """Return what is trained beside a frozen base: adapters, and the mask token's embedding."""
    names = (".lora_", f".{MASK_ROW}")
    return {k: v for k, v in net.state_dict().items() if any(name in k for name in names)}


def lora_modules(model: Any, targets: tuple[str, ...]) -> list[str]:
    """Return full names of the targets, which may have the checkpoint's names (`attn_out`)."""
    family = getattr(model.config, "family", None)  # an autoregressive base has none
    own = family.to_checkpoint if family is not None else str
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen: list[str] = []
    for target in targets:
        found = [n for n in linear if target in (n.rsplit(".", 1)[-1], own(n).rsplit(".", 1)[-1])]
        if not found:
            ends = sorted({n.rsplit(".", 1)[-1] for n in linear})
            raise ValueError(f"lora.targets: the model has no {target!r}; it has {ends}")
        chosen += found
    if "lm_head" in chosen and model.config.tie_word_embeddings:
        raise ValueError(
            "lora.targets: lm_head is the embedding of this base (tie_word_embeddings), and an "
            "adapter would be lost; leave it out"
        )
    return chosen


@contextlib.contextmanager
def as_teacher(predictor: Predictor, adapter: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Let one copy of the base's weights serve as the teacher inside, and as the student outside.

    Args:
        adapter: the teacher's, which is exchanged for the student's inside; None: it has none.
    """
    net = predictor.net
    training = net.training
    net.eval()  # no dropout in the teacher
    if adapter is None:
        with net.disable_adapter():
            yield
    else:
        own = adapter_state(net)
        student = {name: tensor.clone() for name, tensor in own.items()}
        for weights in (adapter, student):
            for name, tensor in weights.items():
                own[name].copy_(tensor)
            # Autocast keeps weights in its type, and does not see that others were put in.
            torch.clear_autocast_cache()
            if weights is adapter:
                yield
    net.train(training)
