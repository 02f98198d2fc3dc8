# SPDX-License-Identifier: Apache-2.0
"""Models, LoRA and export: equal to transformers and PEFT, in the Hub's layout."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import write_dream, write_dream_tokenizer, write_llada
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from training.arithmetic import problems
from training.attention import allowed
from training.config import (
    DecodingSection,
    LoraSection,
    ModelSection,
    Sizes,
    StageSection,
    make_config,
    merged,
)
from training.data import Example, padded
from training.export import export, merged_state
from training.model import (
    BY_NAME,
    Predictor,
    add_lora,
    as_teacher,
    load,
    lora_modules,
    open_base,
)
from training.report import card
from training.tokenizer import build_tokenizer
from vllm_d2f.hub.names import resolve_embedded
from vllm_d2f.hub.prepare import MergePlan, merge
from vllm_d2f.models import register_configs
from vllm_d2f.models.hf import load_hf
from vllm_d2f.models.llada import FAMILY as LLADA

SIZES = Sizes(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
NEW = ModelSection(sizes=SIZES)
DECODING = DecodingSection(block_size=8, max_blocks=2)
LORA = LoraSection(r=4, alpha=8, dropout=0.1)
WRITERS = {"dream": write_dream, "llada": write_llada}


def stage(objective="d2f", **more):
    return StageSection(objective=objective, steps=1, **more)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=["dream", "llada"])
def base(request, tmp_path):
    """A tiny checkpoint in an official layout, as a section that names it."""
    path = WRITERS[request.param](tmp_path / "base")
    return ModelSection(base=str(path), family=request.param)


def example_batch(vocab=190):
    rng = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(0, vocab, (n,), generator=rng).tolist())  # noqa: E731
    return padded([Example(draw(5), draw(11), ""), Example(draw(7), draw(9), "")], [21, 23], 0)


def predict(predictor, batch, rule="block_causal"):
    with torch.no_grad():
        return predictor(batch.ids_BT, batch.position_BT, allowed(batch, rule, 8), batch.answer_BT)


def test_a_base_predicts_as_the_reference_model(base):
    """The shift and LLaDA's names are right: `load_hf` is what the engine is held to."""
    loaded = load(base, "eager")
    batch = example_batch()
    got = predict(Predictor(loaded.model.eval(), loaded.shift, "eager"), batch)
    theirs, config = load_hf(base.base)
    rows = []
    for b in range(2):
        real = batch.document_BT[b] >= 0
        n = int(real.sum())
        mask = allowed(batch, "block_causal", 8)[b : b + 1, :n, :n]
        with torch.no_grad():
            logits = theirs(batch.ids_BT[b : b + 1, :n], attention_mask=mask[:, None]).logits[0]
        at = batch.answer_BT[b].nonzero()[:, 0]
        rows.append(logits[at - int(config.logits_shift)])
    torch.testing.assert_close(got, torch.cat(rows), rtol=1e-4, atol=1e-4)


def test_attention_implementations_agree(base):
    batch = example_batch()
    loaded = load(base, "sdpa")
    got = predict(Predictor(loaded.model.eval(), loaded.shift, "sdpa"), batch)
    eager = load(base, "eager")
    expected = predict(Predictor(eager.model.eval(), eager.shift, "eager"), batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", "xformers"])
def test_attention_gradients_agree_on_cuda(base, attention):
    from training.attention import chosen_attention

    if attention == "xformers":
        pytest.importorskip("xformers")
    device = torch.device("cuda")
    batch = example_batch().to(device)
    gradients = []
    for name in ("eager", chosen_attention(attention, device)):
        loaded = load(base, name)
        net = loaded.model.to(device)
        predictor = Predictor(net, loaded.shift, name)
        mask = allowed(batch, "block_causal", 8)
        predictor(batch.ids_BT, batch.position_BT, mask, batch.answer_BT).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def random_adapter(loaded, section=LORA):
    """Return an adapter that changes something; as initialised B is zero."""
    net = add_lora(loaded, section, 0)
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def test_teacher_is_the_base_with_the_adapter_off(base):
    """One copy of the weights: what the base says before, the teacher says after."""
    loaded, batch = load(base, "eager"), example_batch()
    before = predict(Predictor(loaded.model.eval(), loaded.shift, "eager"), batch, "full")
    count = sum(p.numel() for p in loaded.model.parameters())
    net = random_adapter(loaded)
    predictor = Predictor(net, loaded.shift, "eager").train()
    storages = {p.untyped_storage().data_ptr() for p in predictor.parameters()}
    adapters = sum(p.numel() for n, p in net.named_parameters() if "lora_" in n)
    assert sum(p.numel() for p in predictor.parameters()) == count + adapters
    assert len(storages) == len(list(predictor.parameters()))
    trained = [name for name, p in predictor.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    with as_teacher(predictor, None):
        teacher = predict(predictor, batch, "full")
    assert net.training, "dropout is back for the student"
    torch.testing.assert_close(teacher, before)
    student = predict(predictor.eval(), batch, "full")
    assert (student - teacher).abs().max() > 1e-3


def test_merged_equals_unmerged_and_peft(base, tmp_path):
    loaded, batch = load(base, "eager"), example_batch()
    net = random_adapter(loaded).eval()
    unmerged = predict(Predictor(net, loaded.shift, "eager"), batch)
    export(loaded, net, stage(lora=LORA), DECODING, tmp_path / "out", "card", base.base)
    ours, config = load_hf(tmp_path / "out")
    merged = predict(Predictor(ours, config.logits_shift, "eager"), batch)
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    expected = {n: t.clone() for n, t in net.merge_and_unload().state_dict().items()}
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((Path(base.base) / "config.json").read_text())
    assert written.pop("d2f")["block_size"] == 8
    original.pop("auto_map", None)
    original.pop("d2f", None)
    assert written == original
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        ours_named = set(file.keys())
    names = set()
    for path in Path(base.base).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    assert ours_named == names


def test_an_adapter_alone_has_the_official_names(base, tmp_path):
    loaded = load(base, "eager")
    net = random_adapter(loaded)
    state = merged_state(net)
    kept = stage(lora=LORA, merge=False)
    export(loaded, net, kept, DECODING, tmp_path / "adapter", "card", base.base)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    output = "attn_out" if base.family == "llada" else "o_proj"
    assert config["target_modules"] == sorted([output, "k_proj", "q_proj", "v_proj"])
    assert config["base_model_name_or_path"] == base.base
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    inner = "transformer.blocks.0." if base.family == "llada" else "layers.0.self_attn."
    name = f"base_model.model.model.{inner}{output}"
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    plain = load(base, "eager").model.state_dict()
    target = LLADA.to_stack(f"model.{inner}{output}") + ".weight"
    torch.testing.assert_close(plain[target] + 2.0 * b @ a, state[target], rtol=1e-5, atol=1e-6)


def test_an_adapter_of_the_head_is_merged(base, tmp_path):
    """By `python -m vllm_d2f merge`, to what `merge: true` writes."""
    loaded = load(base, "eager")
    head = LORA.model_copy(update={"targets": ("q_proj", "lm_head")})
    net = random_adapter(loaded, head)
    state = merged_state(net)
    export(loaded, net, stage(lora=head, merge=False), DECODING, tmp_path / "a", "card", base.base)
    written = merge(tmp_path / "m", MergePlan(base.base, str(tmp_path / "a"), check_variant=False))
    for file in written.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(tensor, state[BY_NAME[base.family].to_stack(name)])


def test_an_adapter_of_a_tied_head_would_be_lost():
    config = SimpleNamespace(tie_word_embeddings=True)
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(2, 2)})
    model.config = config
    with pytest.raises(ValueError, match="lora.targets: lm_head is the embedding of this base"):
        lora_modules(model, ("lm_head",))


def test_names_go_there_and_back():
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.3.mlp.down_proj.weight"):
        own = LLADA.to_checkpoint(name)
        assert own != name and LLADA.to_stack(own) == name
    assert LLADA.to_stack("model.transformer.ff_out.weight") == "lm_head.weight"


def test_a_base_of_other_sizes_or_family_is_refused(base):
    wrong = base.model_copy(update={"sizes": Sizes(hidden_size=96)})
    with pytest.raises(ValueError, match="has hidden_size 64, and model.sizes.hidden_size says 96"):
        load(wrong, "eager")
    other = {"dream": "llada", "llada": "dream"}[base.family]
    with pytest.raises(ValueError, match="model.family says"):
        load(base.model_copy(update={"family": other}), "eager")


def test_a_tokenizer_without_mask_token_is_refused_before_the_weights(tmp_path):
    path = write_dream(tmp_path / "base")
    (path / "model.safetensors").unlink()  # nobody gets as far as this
    write_dream_tokenizer(path, 150)
    with pytest.raises(ValueError, match="tokenizer has no mask token: mask_token_id 198"):
        load(ModelSection(base=str(path)), "eager")
    write_dream_tokenizer(path, 200)
    with pytest.raises(FileNotFoundError, match="has no .safetensors files"):
        load(ModelSection(base=str(path)), "eager")
    with pytest.raises(FileNotFoundError, match="model.base: ./nowhere does not exist"):
        load(ModelSection(base="./nowhere"), "eager")


def test_a_base_by_name_or_with_the_remedy(tmp_path):
    """Names of the package are known; what cannot be had says what `prepare` says."""
    named = open_base(ModelSection(base="dream-tiny"))
    assert named.folder == resolve_embedded("dream-tiny")
    for base, revision, message in (
        ("dream-tny", None, "model.base: unknown model name 'dream-tny'. Did you mean dream-tiny"),
        ("nobody/nothing", "v1", "model.base: nobody/nothing at revision v1 is not in the cache"),
        ("dream-tiny", "v1", "model.base: dream-tiny is a folder, and model.revision is for a Hub"),
    ):
        with pytest.raises(ValueError, match=message):
            open_base(ModelSection(base=base, revision=revision))
    path = write_dream(tmp_path / "base")
    for name in ("tokenizer.json", "vocab.json"):
        (path / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="model.base: .* holds no tokenizer, neither tokenizer.j"):
        open_base(ModelSection(base=str(path)))


def test_cards_name_no_licence_of_a_base_and_no_folder(tmp_path):
    values = {
        "name": "x",
        "model": {"sizes": {}},
        "stages": {"s": {"objective": "d2f", "steps": 1}},
    }
    assert "license: apache-2.0" in card(make_config(values), "s")
    for base, said in ((str(tmp_path), False), ("someone/model", True)):
        text = card(make_config(merged(values, {"model": {"base": base}})), "s")
        assert "license" not in text and str(tmp_path) not in text
        assert ("base_model: someone/model" in text) == said


@pytest.mark.parametrize("objective", ["next_token", "diffusion", "d2f"])
def test_new_models_are_written_in_their_layouts(tmp_path, objective):
    loaded = load(NEW, "eager")
    folder = tmp_path / "m"
    for block_size in (8, 16):  # the second replaces the first
        decoding = DecodingSection(block_size=block_size)
        export(loaded, loaded.model, stage(objective), decoding, folder, "card")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    config = json.loads((folder / "config.json").read_text())
    architecture = "Qwen2ForCausalLM" if objective == "next_token" else "DreamModel"
    assert config["architectures"] == [architecture]
    assert ("d2f" in config) == (objective == "d2f")
    if objective == "d2f":
        assert config["d2f"]["block_size"] == 16
    register_configs()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    built = build_tokenizer()
    for problem in problems("test", 10, seed=0):
        assert tokenizer(problem.question).input_ids == built(problem.question).input_ids
    question = problems("test", 1, seed=0)[0].question
    chat = [{"role": "user", "content": question}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == question
    read = AutoConfig.from_pretrained(folder)
    assert read.rope_parameters["rope_theta"] == 10000.0
    if objective == "next_token":
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    else:
        assert read.mask_token_id == tokenizer.mask_token_id


def test_block_causal_prompts_are_said_in_the_config(tmp_path):
    loaded = load(NEW, "eager")
    causal = stage(loss={"prompt_attention": "block_causal"})
    export(loaded, loaded.model, causal, DECODING, tmp_path / "m", "card")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["d2f"]["prompt_attention"] == "block_causal"
