# SPDX-License-Identifier: Apache-2.0
"""What decides a training, from a YAML file and `a.b=value` overrides.

Every value is checked before anything is loaded. An unknown name, a wrong type or a value out of
range is an error with the full name of the field.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
StepCount = Annotated[int, Field(ge=1, le=12)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""The name of a folder that a run writes; a path is refused."""

# Fields that only some choices read.
OF_RECORDS = (
    "split", "limit", "prompt", "response", "messages", "chat_template", "answer_end", "too_long",
    "validation", "group_by_length",
)  # fmt: skip
OF_D2F = (
    "schedule", "full_tail", "prompt_attention", "block_origin", "windows", "window_blocks",
    "teacher", "teacher_input", "accept", "kl", "temperature", "data_weight",
)  # fmt: skip
OF_DIFFUSION = ("pattern", "low")


def is_file(source: str) -> bool:
    return source.endswith((".json", ".jsonl"))


def _refuse(section: BaseModel, names: Sequence[str], given: str) -> None:
    """Refuse settings that would have no effect: those of `names` must keep their defaults."""
    defaults = type(section).model_fields
    changed = [n for n in names if getattr(section, n) != defaults[n].default]
    if changed:
        raise ValueError(f"{', '.join(changed)}: without effect with {given}; leave it out")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Sizes(Section):
    """Sizes of a model, under Hugging Face's names."""

    vocab_size: Positive | None = None
    hidden_size: Positive = 128
    intermediate_size: Positive = 352
    num_hidden_layers: Positive = 4
    num_attention_heads: Positive = 4
    num_key_value_heads: Positive = 2
    max_position_embeddings: Positive = 512
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0

    @model_validator(mode="after")
    def _heads_fit(self) -> "Sizes":
        for of, by in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            whole, parts = getattr(self, of), getattr(self, by)
            if whole % parts:
                raise ValueError(f"{of} {whole} is no multiple of {by} {parts}")
        return self


class ModelSection(Section):
    """Where the first stage's model comes from.

    Attributes:
        base: a folder or a Hub id in Dream's or LLaDA's official layout. None: a new model.
        revision: of a Hub id.
        sizes: of a new model; of a base, what its config must say (and `--dry-run` goes by).
        family: layout of a new model, and what a base must be. `llama`, `qwen2` and `qwen3` are
            checkpoints with an autoregressive head.
        mask_token: of a checkpoint that has none: one of its tokens that never occurs in text, or
            a new one; `<|mask|>` by default.
        chat_template: replaces the base's, in Jinja.
        dtype: of the weights.
        attention: `auto` is `eager` on a CPU and `sdpa` on CUDA. All give the same result.
        gradient_checkpointing: compute activations again in the backward pass; less memory.
        compile: `torch.compile` the layers; worth a minute's wait for trainings of ten or more.
    """

    base: str | None = None
    revision: str | None = None
    sizes: Sizes | None = None
    family: Literal["dream", "llada", "llama", "qwen2", "qwen3"] = "dream"
    mask_token: Annotated[str, Field(min_length=1)] | None = None
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "xformers"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _somewhere(self) -> "ModelSection":
        if self.base is None and self.sizes is None:
            raise ValueError("base: give base (a folder or Hub id), or sizes (of a new model)")
        return self


class DataSection(Section):
    """The examples.

    Attributes:
        source: `arithmetic` (generated), a JSONL file, or a Hugging Face dataset's id or folder.
        split: of a Hugging Face dataset.
        limit: use so many records only.
        prompt, response: fields of a record.
        messages: field of a chat record, used instead of the two when given; the last message of
            the assistant is the response.
        chat_template: put prompts through the tokenizer's chat template.
        answer_end: the token that ends an answer, if it is not the end token that fills the rest of
            the canvas: `<|eot_id|>` for LLaDA-Instruct.
        max_length: positions of prompt, answer and end tokens together.
        too_long: cut the answer off, or leave the record out. A prompt that leaves no room for an
            answer is left out always. Both are counted and reported.
        packing: put several examples into one row of `max_length`, none seeing another.
        canvas: behind the end token end tokens follow up to the end of the block, or up to
            `max_length` as the authors pad.
        group_by_length: batches of records of about the same length, so that little is padding.
        multiple: rows are padded to a multiple of this; few different shapes compute faster on a
            CPU.
        extra_blocks: weights of 0, 1, 2 ... blocks of end tokens more. Decoding opens a block
            before it knows that the answer has ended.
        long_canvas: the share of batches whose canvas reaches to a length drawn log-uniformly
            between the block's end and `max_length`.
        step_counts: steps of arithmetic problems.
        validation: where the problems come from that are decoded: a JSONL file, or a split of the
            Hugging Face dataset `source`. Arithmetic has its own.
    """

    source: str = "arithmetic"
    split: str = "train"
    limit: Positive | None = None
    prompt: str = "prompt"
    response: str = "response"
    messages: str | None = None
    chat_template: bool = False
    answer_end: Annotated[str, Field(min_length=1)] | None = None
    max_length: Positive = 512
    too_long: Literal["truncate", "drop"] = "drop"
    packing: bool = False
    group_by_length: bool = False
    multiple: Positive = 1
    canvas: Literal["block", "max_length"] = "block"
    extra_blocks: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (1.0,)
    long_canvas: Share = 0.0
    step_counts: Annotated[tuple[StepCount, ...], Field(min_length=1)] = (2, 3, 4, 5, 6)
    validation: str | None = None

    @model_validator(mode="after")
    def _fits_its_source(self) -> "DataSection":
        if not sum(self.extra_blocks):
            raise ValueError("extra_blocks: one of the weights must be greater than 0")
        generated = self.source == "arithmetic"
        _refuse(self, OF_RECORDS if generated else ("step_counts",), f"source: {self.source}")
        if is_file(self.source) and self.validation and not is_file(self.validation):
            raise ValueError(
                f"validation: {self.validation!r} must be a JSONL file, as source is one"
            )
        return self

    @property
    def held_out(self) -> bool:
        """Whether there are problems that are not trained on."""
        return self.source == "arithmetic" or self.validation is not None


class LossSection(Section):
    """How sequences are noised and what is compared; see `training/objectives.py`.

    Attributes:
        schedule: how the blocks' mask ratios are drawn.
        full_tail: the share of sequences whose blocks behind a random one are wholly masked, as
            every block is when decoding opens it.
        prompt_attention: `block_causal` cuts the prompt into blocks too, which makes chunked
            prefill and prefix caching exact in the engine.
        block_origin: `prompt_end`: the blocks of the answer begin behind the prompt; `zero`: blocks
            begin at multiples of `block_size` from position 0, in a block-causal prompt too.
        windows: so many windows of `window_blocks` noised blocks, each from a drawn block on, share
            a clean sequence (`training/windows.py`); 0: the sequence itself is noised.
        teacher: `bidirectional` sees the whole noised sequence, as in the paper; `next_token` is
            the autoregressive model on the clean text; `greedy`: the answers are those that it
            gives; `data`: no teacher, the answers themselves.
        teacher_input: `same` noised sequence as the student's; `student`: both see what the
            student made of it in one forward; `fresh`: other masks for the teacher.
        accept: probability above which `teacher_input: student` takes the student's own tokens; the
            confidence that the engine will use.
        kl: `forward` is KL(teacher || student), `reverse` KL(student || teacher), `mixed` half of
            each.
        weight: `inverse_ratio` weights a position by 1 / its block's mask ratio.
        normalise: divide by the sum of the `weights`, or by the number of `tokens`.
        end_padding: end tokens behind the first one that are noised and in the loss: `all`, those
            of the first end token's `block`, or `none`.
        tail_weight: weight of those positions; they are always the same token, so soon learnt.
        data_weight: weight of the cross-entropy with the data that is added.
        pattern: masks of the `diffusion` objective: one ratio per sequence (`uniform`), or mostly
            like a partly decoded answer (`decoding`).
        low: least mask ratio of `uniform`.
    """

    schedule: Literal["monotone", "paper", "chain_uniform", "sorted_uniform", "random"] = (
        "chain_uniform"
    )
    full_tail: Share = 0.5
    block_size: Positive = 16
    prompt_attention: Literal["bidirectional", "block_causal"] = "bidirectional"
    block_origin: Literal["prompt_end", "zero"] = "prompt_end"
    windows: Annotated[int, Field(ge=0)] = 0
    window_blocks: Positive = 4
    teacher: Literal["bidirectional", "next_token", "greedy", "data"] = "bidirectional"
    teacher_input: Literal["same", "student", "fresh"] = "same"
    accept: Share = 0.9
    kl: Literal["forward", "reverse", "mixed"] = "forward"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    weight: Literal["none", "inverse_ratio"] = "none"
    normalise: Literal["weights", "tokens"] = "weights"
    end_padding: Literal["all", "block", "none"] = "all"
    tail_weight: Share = 0.2
    data_weight: Annotated[float, Field(ge=0)] = 0.0
    pattern: Literal["uniform", "decoding"] = "decoding"
    low: Share = 0.3

    @model_validator(mode="after")
    def _fits_its_teacher(self) -> "LossSection":
        if self.windows and self.teacher == "bidirectional":
            raise ValueError(
                "windows: a bidirectional teacher sees whole sequences; set teacher to next_token "
                "or data, or leave it out"
            )
        if not self.distils:
            _refuse(self, ("kl", "temperature", "data_weight"), f"teacher: {self.teacher}")
        if self.teacher != "bidirectional" and self.teacher_input == "fresh":
            raise ValueError(f"teacher_input: fresh is without effect with teacher: {self.teacher}")
        return self

    @property
    def distils(self) -> bool:
        """Whether the teacher's distribution is compared, and not only a text."""
        return self.teacher in ("bidirectional", "next_token")


class LoraSection(Section):
    """Low-rank adapters instead of full fine-tuning. `targets` are names of the base's modules."""

    r: Positive = 32
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class OptimizerSection(Section):
    """`muon` updates the layers' matrices with Muon and the rest with AdamW."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    final_lr: Share = 0.02
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    muon_factor: Annotated[float, Field(gt=0)] = 2.0
    clip: Annotated[float, Field(gt=0)] = 1.0


class StageSection(Section):
    """One training.

    Attributes:
        objective: `next_token` (autoregressive), `diffusion` (bidirectional teacher) or `d2f`
            (distillation; the teacher is the model as the stage finds it).
        start: the stage whose weights it begins with; None: the model of the config.
        batch_size: sequences per forward and process.
        accumulate: forwards per update.
        evaluate_every, save_every, log_every: in updates; evaluation also happens at the end.
        evaluate: validation problems that are decoded.
        export: name of the folder its model is written to under `OUT/models`.
        merge: write LoRA merged into the base; else the adapter alone.
    """

    objective: Literal["next_token", "diffusion", "d2f"]
    start: str | None = None
    steps: Positive
    batch_size: Positive = 1
    accumulate: Positive = 1
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    lora: LoraSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossSection = LossSection()
    data: DataSection | None = None
    log_every: Positive = 50
    save_every: Positive = 500
    evaluate_every: Positive = 500
    evaluate: Annotated[int, Field(ge=0)] = 100
    export: Name | None = None
    merge: bool = True

    @model_validator(mode="after")
    def _fits_its_objective(self) -> "StageSection":
        unread = {
            "next_token": (*OF_D2F, *OF_DIFFUSION),
            "diffusion": OF_D2F,
            "d2f": OF_DIFFUSION,
        }[self.objective]
        _refuse(self.loss, unread, f"objective: {self.objective}")
        if not self.merge and self.lora is None:
            raise ValueError("merge: without effect without lora; leave it out")
        return self


class DecodingSection(Section):
    """How students are decoded in evaluations, and the `d2f` section of the exported config."""

    block_size: Positive = 16
    max_blocks: Positive = 4
    tau_add: Share = 0.1
    tau_act: Share = 0.95
    tau_conf: Share = 0.9
    accept: Literal["threshold", "frechet", "factor", "entropy", "leftmost"] = "threshold"
    max_tokens: Positive = 64


class FinalSection(Section):
    """The evaluation at the end of a whole run: problems, and canvas of the vanilla teacher."""

    problems: Annotated[int, Field(ge=0)] = 0
    canvas: Positive = 48


class Config(Section):
    """A whole run: the stages in order."""

    name: Name
    model: ModelSection
    data: DataSection = DataSection()
    decoding: DecodingSection = DecodingSection()
    stages: dict[str, StageSection] = Field(min_length=1)
    final: FinalSection = FinalSection()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    @model_validator(mode="after")
    def _stages_fit(self) -> "Config":
        seen: set[str] = set()
        exports: dict[str, str] = {}
        for name, stage in self.stages.items():
            if not name.replace("-", "").replace("_", "").isalnum() or name == "models":
                raise ValueError(
                    f"stages.{name}: use letters, digits, - and _ in a stage's name; `models` is "
                    "the folder of exports"
                )
            if stage.export is not None and exports.setdefault(stage.export, name) != name:
                raise ValueError(
                    f"stages.{name}.export: {exports[stage.export]!r} has the same; name another"
                )
            if stage.start is not None and stage.start not in seen:
                raise ValueError(
                    f"stages.{name}.start: {stage.start!r} is no earlier stage; "
                    f"earlier ones are {sorted(seen)}"
                )
            before = self.stages[stage.start].lora if stage.start is not None else None
            if before is not None and stage.lora != before:
                raise ValueError(
                    f"stages.{name}.start: {stage.start!r} trains an adapter, which goes on with "
                    "the same lora section only; else export it and name the folder as model.base"
                )
            data = stage.data or self.data
            wants = "evaluate" in stage.model_fields_set and stage.evaluate
            if wants and not data.held_out:
                raise ValueError(
                    f"stages.{name}.evaluate: needs data.validation (problems not trained on)"
                )
            if stage.loss.prompt_attention == "block_causal":
                trained, served = stage.loss.block_size, self.decoding.block_size
                if trained != served:
                    raise ValueError(
                        f"stages.{name}.loss.prompt_attention: block_causal prompts are served in "
                        f"blocks of decoding.block_size {served}; make loss.block_size {trained} "
                        "the same"
                    )
            elif stage.loss.block_origin == "zero":
                raise ValueError(
                    f"stages.{name}.loss.block_origin: zero cuts prompt and answer into the same "
                    "blocks; set loss.prompt_attention: block_causal"
                )
            if stage.loss.teacher == "greedy" and data.source == "arithmetic":
                raise ValueError(f"stages.{name}.loss.teacher: greedy needs records as data.source")
            if stage.loss.windows and data.packing:
                raise ValueError(f"stages.{name}.loss.windows: need data.packing: false")
            if stage.lora is not None and stage.optimizer.name == "muon":
                raise ValueError(f"stages.{name}.optimizer.name: use adamw with lora")
            seen.add(name)
        if self.model.sizes:
            self.check_positions(self.model.sizes.max_position_embeddings)
        if self.final.problems and not self.data.held_out:
            raise ValueError("final.problems: needs data.validation (problems not trained on)")
        return self

    def check_positions(self, positions: int) -> None:
        """Refuse sequences that are longer than the model's positions.

        Raises:
            ValueError: naming the field.
        """
        for name, stage in self.stages.items():
            length = (stage.data or self.data).max_length
            if length > positions:
                own = f"stages.{name}." if stage.data else ""
                raise ValueError(
                    f"{own}data.max_length {length} is more than the model's "
                    f"max_position_embeddings {positions}"
                )


class ConfigError(ValueError):
    """What is wrong with a config, field by field."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), variant: str | None = None
) -> Config:
    """Read a YAML file.

    Args:
        overrides: `a.b.c=value`; values are YAML.
        variant: a section under `variants` whose values replace the file's, such as `smoke`.

    Raises:
        ConfigError: naming every field that is unknown, missing or out of range.
        FileNotFoundError: naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config; see training/configs")
    try:
        values = _yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping")
    variants = values.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(
        isinstance(v or {}, dict) for v in variants.values()
    ):
        raise ConfigError(f"{path}: variants: must map names to sections")
    if variant is not None:
        if variant not in variants:
            raise ConfigError(f"{path}: has no variant {variant!r}; it has {sorted(variants)}")
        values = merged(values, variants[variant] or {})  # an empty one changes nothing
    for override in overrides:
        values = merged(values, parse_override(override))
    return make_config(values, str(path))


def make_config(values: Mapping[str, Any], source: str = "config") -> Config:
    """Check plain values."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            field = ".".join(map(str, problem["loc"]))
            if problem["type"] == "value_error":  # ours, which begin with the field
                own = problem["msg"].removeprefix("Value error, ")
                lines.append(f"{field}.{own}" if field else own)
                continue
            got = problem.get("input")
            shown = "" if isinstance(got, dict) else f" (got {got!r:.60})"
            lines.append(f"{field or 'config'}: {problem['msg']}{shown}")
        raise ConfigError(f"{source}:\n  " + "\n  ".join(lines)) from None


def parse_override(text: str) -> dict[str, Any]:
    """Turn `a.b=1` into `{"a": {"b": 1}}`."""
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError(f"{text!r}: write overrides as section.field=value")
    # YAML reads 1e-4 as text, which becomes a number where one is wanted.
    parsed = _yaml(value, repr(text))
    for part in reversed(name.split(".")):
        parsed = {part: parsed}
    return parsed


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({error})") from None


def merged(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings section by section. `other` wins."""
    result = dict(base)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
