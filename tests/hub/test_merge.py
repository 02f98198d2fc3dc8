# SPDX-License-Identifier: Apache-2.0
"""The merge gives what peft's merge gives; what it cannot merge it refuses by name."""

import json
import multiprocessing
import resource
from pathlib import Path

import pytest
import torch
from checkpoints import write_dream, write_llada
from lora import change_config, change_tensors, make, olmo_name
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_d2f.hub import HubError
from vllm_d2f.hub.checkpoint import open_checkpoint
from vllm_d2f.hub.merge import merge_weights, read_adapter
from vllm_d2f.hub.prepare import MergePlan, merge


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def merged(made, out: Path, **options) -> dict[str, torch.Tensor]:
    merge(out, MergePlan(str(made.base), str(made.adapter), **options))
    return weights_of(out)


def llama_names(made, olmo: bool) -> dict[str, str]:
    """Return the merged tensor's name in the checkpoint -> in peft's model."""
    top = {
        "model.embed_tokens.weight": "model.transformer.wte.weight",
        "model.norm.weight": "model.transformer.ln_f.weight",
        "lm_head.weight": "model.transformer.ff_out.weight",
    }
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm"}
    names = {}
    for name in made.merged:
        own = name
        if olmo:
            own = top.get(name, olmo_name(name))
            for llama, other in norms.items():
                own = own.replace(f".{llama}.", f".{other}.")
        names[own] = name
    return names


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1, "o_proj": 3}},
    "mlp": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "some layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_equals_pefts_merge_exactly(tmp_path, family, options):
    write = write_dream if family == "dream" else write_llada
    base = write(tmp_path / "base", shards=3, seed=7)
    made = make(base, tmp_path / "lora", olmo=family == "llada", **options)
    found = merged(made, tmp_path / "out")
    names = llama_names(made, olmo=family == "llada")
    assert found.keys() == names.keys()
    before = weights_of(base)
    changed = 0
    for name, tensor in found.items():
        assert torch.equal(tensor, made.merged[names[name]]), name
        changed += not torch.equal(tensor, before[name])
    targets = options.get("target_modules", ["q", "k", "v", "o"])
    layers = len(options.get("layers_to_transform", range(3)))
    assert changed == len(targets) * layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_float32_and_rounds_once(tmp_path, dtype):
    base = write_dream(tmp_path / "base", dtype=dtype, shards=2)
    made = make(base, tmp_path / "lora", olmo=False)  # peft on the base in float32
    found = merged(made, tmp_path / "out")
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, made.merged[name].to(dtype)), name


def test_an_adapter_in_bfloat16_counts_in_float32(dream, tmp_path):
    change_tensors(dream.adapter, lambda t: {k: v.bfloat16() for k, v in t.items()})
    found = merged(dream, tmp_path / "out")
    adapter = load_file(dream.adapter / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{module}.lora_{side}.weight"].float() for side in "AB")
    base = weights_of(dream.base)[f"{module}.weight"]
    assert torch.equal(found[f"{module}.weight"], base + b @ a * 1.5)


def test_the_layout_is_the_bases(made_dream, tmp_path):
    merged(made_dream, tmp_path / "out")
    base, out = made_dream.base, tmp_path / "out"
    index = "model.safetensors.index.json"
    assert (out / index).read_text() == (base / index).read_text()
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as a, safe_open(out / file.name, "pt") as b:
            assert set(a.keys()) == set(b.keys()) and a.metadata() == b.metadata()


def test_no_remote_code_comes_along(dream, tmp_path):
    for name in ("modeling_dream.py", "configuration_dream.py", "pytorch_model.bin", "run.sh"):
        (dream.base / name).write_text("raise SystemExit")
    merge(tmp_path / "out", MergePlan(str(dream.base), str(dream.adapter)))
    out = tmp_path / "out"
    suffixes = {path.suffix for path in out.iterdir()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".md", ".jinja"}
    assert "auto_map" in json.loads((dream.base / "config.json").read_text())
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((out / name).read_text())


# ---- refusals ------------------------------------------------------------------------------------


def refused(made, tmp_path, message: str) -> str:
    with pytest.raises(HubError, match=message) as error:
        merge(tmp_path / "out", MergePlan(str(made.base), str(made.adapter)))
    left = [path.name for path in tmp_path.iterdir() if path.name.lstrip(".").startswith("out")]
    assert left == [], "something was left behind"
    return str(error.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"r": 8}, "lora_A .4, 64. .*says rank 8"),
        ({"r": 0}, "r = 0"),
        ({"r": True}, "r = True"),
        ({"r": 10**12}, "r = 1000000000000"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_something_new": True}, "use_something_new"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "ff_proj"]}, "'ff_proj'"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}, "up_proj.*no lo"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
        ({"rank_pattern": {"(a+)+b": 2}}, "pattern"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_an_adapter_config(dream, tmp_path, entries, message):
    change_config(dream.adapter, **entries)
    refused(dream, tmp_path, message)


Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_A.weight"}, "has no lora_A"),
        (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, "has no lora_B"),
        (lambda t: {k: v for k, v in t.items() if Q not in k}, "layers.1.self_attn.q_proj"),
        (lambda t: t | {f"{Q}.lora_B.weight": t[f"{Q}.lora_B.weight"][:-1]}, "of another size"),
        (lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"][:2]}, "says rank 4"),
        (lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"] * float("inf")}, "infinite"),
        (lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(3)}, "lora_magnitude_vector"),
        (lambda t: t | {"lm_head.weight": torch.ones(3, 3)}, "'lm_head.weight'"),
        (lambda t: {k.replace("layers.2", "layers.9"): v for k, v in t.items()}, "layers.9"),
        (lambda t: {}, "no tensors"),
    ],
)
def test_refuses_adapter_weights(dream, tmp_path, change, message):
    change_tensors(dream.adapter, change)
    refused(dream, tmp_path, message)


def test_refuses_another_family(made_dream, made_llada, tmp_path):
    with pytest.raises(HubError, match="which the base does not have"):
        merge(
            tmp_path / "out",
            MergePlan(str(made_llada.base), str(made_dream.adapter), check_variant=False),
        )


def test_refuses_pickle(dream, tmp_path):
    (dream.adapter / "adapter_model.safetensors").rename(dream.adapter / "adapter_model.bin")
    assert "safe_serialization" in refused(dream, tmp_path, "pickle.*any code")


def test_refuses_a_quantized_base(dream, tmp_path):
    for file in dream.base.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if "q_proj.weight" in name:
                tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors, file)
    refused(dream, tmp_path, "stored as I8.*bfloat16")


def test_refuses_a_sum_out_of_range(tmp_path):
    base = write_dream(tmp_path / "base", dtype=torch.float16)
    made = make(base, tmp_path / "lora", olmo=False)
    change_config(made.adapter, lora_alpha=1e8)
    refused(made, tmp_path, "does not fit torch.float16")


# ---- memory --------------------------------------------------------------------------------------


def peak_of_merge(base: Path, adapter: Path, out: Path, result) -> None:
    import torch  # noqa: F401  (what it takes by itself is in both figures)

    torch.ones(64, 64) @ torch.ones(64, 64)
    checkpoint, lora = open_checkpoint(base), read_adapter(adapter)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    merge_weights(checkpoint, lora, out)
    result.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def test_memory_is_that_of_a_few_matrices(tmp_path):
    """Two files of 200 MB each; a matrix is 4 MiB in float32, the embedding 64 MiB."""
    hidden, layers, rank = 1024, 24, 8
    base, adapter, out = (tmp_path / name for name in ("base", "lora", "out"))
    for folder in (base, adapter, out):
        folder.mkdir()
    lora, weight_map = {}, {}
    for shard in range(2):
        tensors = {f"other.{shard}.weight": torch.zeros(16384, hidden)}
        for layer in range(shard * layers // 2, (shard + 1) * layers // 2):
            for target in ("q_proj", "o_proj", "v_proj"):
                module = f"model.layers.{layer}.self_attn.{target}"
                tensors[f"{module}.weight"] = torch.zeros(hidden, hidden)
                lora[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, hidden)
                lora[f"base_model.model.{module}.lora_B.weight"] = torch.ones(hidden, rank)
        file = f"model-{shard}.safetensors"
        save_file(tensors, base / file)
        weight_map |= dict.fromkeys(tensors, file)
    save_file(lora, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    config["target_modules"] = ["q_proj", "o_proj", "v_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (base / "config.json").write_text("{}")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert all(file.stat().st_size > 200e6 for file in base.glob("*.safetensors"))

    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=peak_of_merge, args=(base, adapter, out, result))
    process.start()
    grown = result.get(timeout=300)
    process.join()
    # The sum, the product, the base as read and as written: under 12 matrices, far under a file.
    assert grown < 12 * hidden * hidden * 4, f"{grown / 1e6:.0f} MB"
    with safe_open(out / "model-1.safetensors", "pt") as merged_file:
        tensor = merged_file.get_tensor("model.layers.23.self_attn.v_proj.weight")
        assert torch.equal(tensor, torch.full((hidden, hidden), float(rank)))
