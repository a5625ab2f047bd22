"""Every text Qwen gets its adapter; settings that cannot work are refused; untrained tokens are
named."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qwenlora.configs.combinations import Machine
from qwenlora.configs.estimate import Sizes, base_bytes
from qwenlora.configs.schema import Config, Data, Lora, Model, Strategy
from qwenlora.trainer.model import base as models
from qwenlora.trainer.model import loading, pretrained
from qwenlora.trainer.model.checks import untrained_tokens
from qwenlora.trainer.model.files import check_init_from
from qwenlora.trainer.model.lora import add_lora, count_parameters

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
HYBRID = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
KINDS = {
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3 tied": {"tie_word_embeddings": True},
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "qwen3_next": MOE | HYBRID,
    "qwen3_5_text": HYBRID,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tiny, tmp_path_factory):
    """A model folder of each kind of Qwen that transformers knows, with random weights."""
    folder = tmp_path_factory.mktemp("kind")
    torch.manual_seed(0)
    settings = {"tie_word_embeddings": False} | SIZES | KINDS[request.param]
    config = AutoConfig.for_model(request.param.split()[0], **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def config_for(folder, *, lora=None, strategy=None) -> Config:
    return Config(
        run_dir="unused",
        model=Model(name_or_path=str(folder)),
        data=Data(train="unused"),
        lora=lora or Lora(),
        strategy=strategy or Strategy(),
    )


def adapted(config, recomputed=0):
    base = loading.load_base(config, config.model.name_or_path)
    loading.set_up(base, recomputed)
    return add_lora(base, config.lora)


def train_a_little(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(24).reshape(2, 12) + 300
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), model.eval()(input_ids=ids).logits.detach(), ids


def test_every_kind_of_qwen_is_adapted_trained_saved_and_reloaded_by_plain_peft(kind, tmp_path):
    config = config_for(kind)
    model = adapted(config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert count_parameters(config, str(kind)).trainable == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    first, _, _ = train_a_little(model, 1)
    model.train()
    last, logits, ids = train_a_little(model, 5)
    assert last < first
    model.save_pretrained(tmp_path)
    reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    # not equal where plain peft adds the change of a shared expert to its weights (model/targets.py)
    assert torch.allclose(reloaded(input_ids=ids).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    "lora",
    [
        Lora(use_dora=True),
        Lora(use_rslora=True),
        Lora(target_modules=["q_proj", "v_proj"], r=4),
        Lora(target_modules=r".*self_attn\.(q|k)_proj"),
        Lora(modules_to_save=["embed_tokens"]),
        Lora(modules_to_save=["lm_head"]),
        Lora(modules_to_save=["embed_tokens", "lm_head"]),
    ],
    ids=str,
)
def test_each_way_of_lora_survives_saving(tiny, tmp_path, lora):
    model = adapted(config_for(tiny, lora=lora))
    _, logits, ids = train_a_little(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(
        AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=ids).logits, logits
    )


@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
def test_tied_embeddings_stay_one_matrix(tiny, named):
    config = config_for(tiny, lora=Lora(modules_to_save=[named]))
    model = adapted(config)
    train_a_little(model)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(head, embeddings)
    assert embeddings.requires_grad
    without = count_parameters(config_for(tiny), str(tiny)).trainable
    assert count_parameters(config, str(tiny)).trainable == without + embeddings.numel()


def test_modules_that_are_not_there_are_refused(tiny):
    with pytest.raises(ValueError, match=r"lora\.target_modules=.*c_attn: .*not found"):
        adapted(config_for(tiny, lora=Lora(target_modules=r".*\.c_attn")))


def test_a_name_that_is_mistyped_is_refused_with_the_nearest(tiny):
    with pytest.raises(ValueError, match=r"target_modules: the model has no v_porj; did you mean v_proj\?"):
        adapted(config_for(tiny, lora=Lora(target_modules=["q_proj", "v_porj"])))


@pytest.mark.parametrize("lora", [{"modules_to_save": ["nope"]}, {"target_parameters": ["mlp.nope"]}])
def test_names_that_match_nothing_are_refused(tiny, lora):
    with pytest.raises(ValueError, match=rf"lora\.{next(iter(lora))}: the model has no .*nope; names in it"):
        adapted(config_for(tiny, lora=Lora(**lora)))


def test_experts_are_adapted_by_parameter(tiny, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES | MOE)).save_pretrained(
        tmp_path
    )
    lora = Lora(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    model = adapted(config_for(tmp_path, lora=lora))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("experts" in name for name in trainable)
    first, _, _ = train_a_little(model, 1)
    model.train()
    assert train_a_little(model, 5)[0] < first


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (
            {"lora_dropout": 0.1},
            r"lora\.lora_dropout=0\.1 .* on mlp\.experts\.down_proj and 1 more, .* to 0, or",
        ),
        (
            {"lora_dropout": 0.0, "use_dora": True},
            r"lora\.use_dora=true .* on mlp\.experts.* set it to false, or",
        ),
    ],
)
def test_what_peft_does_not_do_on_experts_is_refused_with_what_to_set(lora, said):
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "moe_intermediate_size": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_attention_heads=2, num_experts=4))
    with pytest.raises(ValueError, match=rf"{said} lora\.experts: none$"):
        add_lora(model, Lora(**lora))


def test_gradient_checkpointing_changes_memory_not_gradients(tiny):
    gradients, kept = [], []
    for recomputed in (0, 1, 4):
        torch.manual_seed(0)
        model = adapted(config_for(tiny), recomputed).train()
        layers = model.get_base_model().model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [
            number < recomputed for number in range(4)
        ]
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.01)
        ids = torch.arange(24).reshape(2, 12) + 300
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t.nbytes) or t, lambda t: t
        ):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        kept.append(sum(saved))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert all(torch.allclose(gradient, other[name], atol=1e-7) for other in gradients[1:]), name
    assert kept[2] < kept[1] < kept[0]


@pytest.fixture
def adapter(tiny, tmp_path):
    model = adapted(config_for(tiny, lora=Lora(r=8)))
    _, logits, ids = train_a_little(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits, ids


def test_training_goes_on_from_an_adapter(tiny, adapter):
    folder, logits, ids = adapter
    model = adapted(config_for(tiny, lora=Lora(r=8, init_from=str(folder))))
    assert torch.equal(model.eval()(input_ids=ids).logits, logits)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 16}, r"init_from=.* has r=8, the config says 16; set lora\.r: 8"),
        ({"r": 8, "lora_alpha": 8}, r"has lora_alpha=32, the config says 8; set lora\.lora_alpha: 32"),
        (
            {"r": 8, "target_modules": ["q_proj"]},
            r"does not fit lora\.target_modules=\['q_proj'\]: the model lacks ",
        ),
        ({"r": 8, "modules_to_save": ["embed_tokens"]}, r"does not fit .*: the adapter lacks .*embed_tokens"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tiny, adapter, lora, message):
    with pytest.raises(ValueError, match=message):
        adapted(config_for(tiny, lora=Lora(init_from=str(adapter[0]), **lora)))


def test_a_folder_that_is_no_adapter_is_refused(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"init_from=.* is no adapter folder: it has no adapter_config\.json"
    ):
        adapted(config_for(tiny, lora=Lora(init_from=str(tmp_path))))


def test_a_folder_with_adapters_in_it_is_refused_with_their_names(tmp_path):
    for name in ("adapter", "checkpoint-20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    with pytest.raises(ValueError, match=r"no adapter_config\.json; in it are adapter, checkpoint-20$"):
        check_init_from(Lora(init_from=str(tmp_path)))


def test_the_dtype_follows_the_hardware_unless_given():
    assert loading.pick_dtype("auto") == (torch.float32 if not torch.cuda.is_available() else torch.bfloat16)
    assert loading.pick_dtype("float16") == torch.float16


@pytest.mark.parametrize("saved", [None, ["embed_tokens"]])
def test_all_that_is_trained_is_float32_whatever_the_base(tiny, saved):
    config = config_for(tiny, lora=Lora(modules_to_save=saved))
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    model = adapted(config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(("how", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_a_quantised_base_is_really_stored_so_and_learns_after_an_evaluation(tiny, how, kind):
    model = adapted(config_for(tiny, strategy=Strategy(quantization=how)))
    layers = [
        m
        for m in model.modules()
        if type(m).__name__ == kind and type(m).__module__.startswith("bitsandbytes")
    ]
    assert len(layers) == 4 * 7
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.dtype in (torch.uint8, torch.int8)
    first, _, _ = train_a_little(model, 1)
    model.train()
    last, _, _ = train_a_little(model, 6)
    assert last < first
    if how == "nf4":
        assert weight.quant_state.nested
        assert not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in layers)


@pytest.mark.parametrize("how", ["none", "nf4", "int8"])
def test_the_estimate_has_the_bytes_of_a_mixture(tmp_path, how):
    more = {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 1}
    more |= {"num_experts": 16, "moe_intermediate_size": 256}
    settings = SIZES | MOE | more | {"shared_expert_intermediate_size": 512}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **settings)).save_pretrained(tmp_path)
    config = config_for(tmp_path, strategy=Strategy(quantization=how))
    base = loading.load_base(config, str(tmp_path))
    counted = sum(p.numel() * p.element_size() for p in base.parameters())
    states = [p.quant_state for p in base.parameters() if hasattr(p, "quant_state")]
    assert len(states) == 2 * 4 * (how == "nf4") + 2 * (how == "nf4")
    counted += sum(s.absmax.numel() + 4 * s.state2.absmax.numel() for s in states)
    estimated = base_bytes(config, Sizes.of(count_parameters(config, str(tmp_path))), Machine(1, 1, 0))
    assert estimated == pytest.approx(counted, rel=0.03)
    found = count_parameters(config, str(tmp_path))
    assert found.active == found.total - found.experts * 14 / 16  # a token meets 2 of 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": None}, "has no chat template; set model.tokenizer"),
        ({"pad_token": "<|im_end|>"}, "its pad token is <|im_end|>, expected one that ends no turn"),
    ],
)
def test_a_tokenizer_that_cannot_train_chat_is_refused(tiny, tmp_path, change, message):
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    if "chat_template" in change:
        (tmp_path / "model" / "chat_template.jinja").unlink()
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"model\.name_or_path=") as caught:
        pretrained.load_tokenizer(config_for(tmp_path / "model"), str(tmp_path / "model"))
    assert message in str(caught.value)


LEFT_BY_CALLS = {
    "truncation": {"direction": "Right", "max_length": 24, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        **{"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    },
}


@pytest.mark.parametrize("kept", [*LEFT_BY_CALLS, "split_special_tokens"])
@pytest.mark.parametrize("key", ["name_or_path", "tokenizer"])
def test_a_tokenizer_is_loaded_and_saved_without_what_earlier_calls_left(tiny, tmp_path, key, kept):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    file = folder / ("tokenizer.json" if kept in LEFT_BY_CALLS else "tokenizer_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {kept: LEFT_BY_CALLS.get(kept, True)}))
    config = config_for(tiny)
    config = config.model_copy(update={"model": config.model.model_copy(update={key: str(folder)})})
    tokenizer = pretrained.load_tokenizer(config, config.model.name_or_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert saved == json.loads((tiny / "tokenizer.json").read_text())
    expected = AutoTokenizer.from_pretrained(tiny).backend_tokenizer
    texts = ["<|im_start|>user\n一二三", "四" * 99]
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        encodings = found.backend_tokenizer.encode_batch(texts)
        assert [one.ids for one in encodings] == [one.ids for one in expected.encode_batch(texts)]


@pytest.mark.parametrize("name", ["./model", "/models/qwen", "~/qwen", "qwen", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(name):
    with pytest.raises(ValueError, match=r"no such folder .*; a hub name has one slash"):
        models.resolve(name, "model.name_or_path")


class TestUntrainedTokens:
    """Rows of the embeddings past the tokenizer were never trained and lie close together, as untrained
    tokens do."""

    @pytest.fixture
    def base(self, tiny):
        model = AutoModelForCausalLM.from_pretrained(tiny)
        model.resize_token_embeddings(2048 + 64)
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        weight = model.get_input_embeddings().weight.data
        generator = torch.Generator().manual_seed(0)
        weight[2048:] = 0.01 + 1e-4 * torch.randn(64, weight.shape[1], generator=generator)
        return model, tokenizer, weight

    def test_tokens_among_the_unused_rows_are_named(self, base):
        model, tokenizer, weight = base
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        weight[end] = weight[2048:].mean(0)
        assert list(untrained_tokens(model, tokenizer, []).values()) == ["<|im_end|>"]

    def test_of_other_tokens_those_that_the_rows_use_are_named(self, base):
        model, tokenizer, weight = base
        weight[[300, 301, 302]] = weight[2050:2053].clone()
        assert list(untrained_tokens(model, tokenizer, [7, 301, 302]).values()) == [
            tokenizer.decode([n]) for n in (301, 302)
        ]
        assert untrained_tokens(model, tokenizer, [7, 8]) == {}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_tokens_that_were_added_and_never_trained_are_named(self, base, dtype):
        """transformers puts them at the mean of the others; no row of the embeddings is left over then."""
        model, tokenizer, weight = base
        weight += 0.05  # a mean that is not 0, as real models have
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|act|>", "<|other|>"]})
        model.resize_token_embeddings(2048)
        model.resize_token_embeddings(len(tokenizer))
        used = [7, tokenizer.convert_tokens_to_ids("<|act|>")]
        assert list(untrained_tokens(model.to(dtype), tokenizer, used).values()) == ["<|act|>"]

    def test_tokens_that_were_learnt_are_not(self, base):
        assert untrained_tokens(*base[:2], range(2048)) == {}

    def test_random_weights_prove_nothing(self, base):
        model, tokenizer, weight = base
        weight.normal_(0, 0.08)
        assert untrained_tokens(model, tokenizer, range(2048)) == {}


def test_a_base_whose_files_lack_a_weight_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"its files lack model\.layers\.1\.self_attn\.q_proj\.weight, which would be"
    ):
        loading.load_base(config_for(folder), str(folder))


def test_an_adapter_keeps_the_revision_of_its_base_for_peft(tiny, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny)
    add_lora(base, Lora(), "e6de91484c29").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "e6de91484c29"
