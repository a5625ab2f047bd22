"""Experts in nf4 compute what peft does over experts that were quantised and dequantised, and are never there
dequantised all at once."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from gradients import apart, losses_and_gradients
from largest import Largest
from made import HYBRIDS, make_with_vision
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qwenlora.adapter.loading import load
from qwenlora.adapter.subject import find
from qwenlora.configs.schema import Config, Data, Lora, Model, Strategy
from qwenlora.trainer.model import fused_experts, loading, nf4_experts, nf4_loading
from qwenlora.trainer.model.fused_experts import fuse_experts, mixtures
from qwenlora.trainer.model.lora import add_lora, count_parameters

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "initializer_range": 0.08,
}
KINDS = {
    kind: HYBRIDS.get(kind, {"num_hidden_layers": 2})
    for kind in ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text")
}
IDS = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))


def made(folder, kind="qwen3_moe", **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **KINDS[kind] | SIZES | more)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return made(tmp_path_factory.mktemp("qwen3_moe"))


def config_of(base, **lora) -> Config:
    return Config(
        run_dir="x",
        model=Model(name_or_path=str(base), dtype="float32"),
        data=Data(train="x"),
        lora=Lora(r=4, **lora),
        strategy=Strategy(quantization="nf4"),
    )


def in_nf4(config):
    model = loading.load_base(config, config.model.name_or_path)
    loading.set_up(model)
    return model


def rounded(base):
    """Return the base whose linear layers and experts have the numbers that nf4 leaves them, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    layers.discard(id(model.lm_head.weight))
    for name, weight in model.named_parameters():
        if id(weight) in layers or ("experts." in name and weight.ndim == 3):
            codes, state = quantize_4bit(weight.data, compress_statistics=True, quant_type="nf4")
            weight.data = numbers_of(codes, state).view(weight.shape)
    return model


def numbers_of(codes, state):
    """Return what codes stand for, by the definition of nf4."""
    scales = (
        state.state2.code[state.absmax.long()]
        * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    )
    codes = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten().long()
    return state.code[codes] * (scales + state.offset).repeat_interleave(64)


def learnt(model):
    torch.manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model


def pair(base, **lora):
    """Return a model in nf4 with its adapter, ready to train, and plain peft's over rounded numbers."""
    config = config_of(base, **lora)
    ours = learnt(add_lora(in_nf4(config), config.lora))
    settings = ours.peft_config["default"]
    theirs = get_peft_model(rounded(base), LoraConfig(**settings.to_dict()))
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert not theirs.load_state_dict(trained, strict=False).unexpected_keys
    fused, left = fuse_experts(ours)
    assert (bool(fused), left) == (config.lora.experts == "all", 0)
    return ours, theirs


def assert_as_in_peft(ours, theirs):
    loss, expected = losses_and_gradients(theirs, IDS)
    our_loss, gradients = losses_and_gradients(ours, IDS)
    assert abs(loss - our_loss) <= 1e-5
    assert gradients.keys() == expected.keys()
    for name, of_name in apart(gradients, expected).items():
        assert of_name <= 1e-5, f"{name} {of_name:.1e}"
    return gradients


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_peft_over_rounded_numbers(kind, tmp_path):
    ours, theirs = pair(made(tmp_path, kind))
    assert sum("experts" in name for name in assert_as_in_peft(ours, theirs)) >= 8


@pytest.mark.parametrize("experts", ["all", "none"])
@pytest.mark.parametrize("at_once", [1, 2**16])
def test_some_at_a_time_with_lora_on_experts_or_without(base, monkeypatch, experts, at_once):
    monkeypatch.setattr(nf4_experts, "AT_ONCE", at_once)
    ours, theirs = pair(base, experts=experts)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert_as_in_peft(ours.train(), theirs)


def test_rows_of_experts_may_have_other_widths_than_whole_blocks(tmp_path):
    assert_as_in_peft(*pair(made(tmp_path, moe_intermediate_size=24), experts="none"))


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_experts_of_a_base_in_the_layout_of_a_vision_model(kind, tmp_path):
    config = config_of(make_with_vision(tmp_path, kind))
    ours, theirs = in_nf4(config), in_nf4(config)
    for _, experts in (found := mixtures(theirs)):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name)
            plain = numbers_of(weight.data, weight.quant_state).view(weight.quant_state.shape)
            setattr(experts, name, torch.nn.Parameter(plain, False))
    assert len(found) == 2
    theirs.config.get_text_config()._experts_implementation = "eager"
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_an_adapter_that_is_off_leaves_the_base(base):
    ours, theirs = pair(base)
    with torch.no_grad(), ours.disable_adapter(), theirs.disable_adapter():
        off = ours(input_ids=IDS).logits
        torch.testing.assert_close(off, theirs(input_ids=IDS).logits, rtol=0, atol=1e-5)
    assert (ours(input_ids=IDS).logits - off).abs().max() > 1e-3


def test_neither_pass_has_all_experts_dequantised_and_nothing_so_is_kept(base, monkeypatch):
    one = 2 * 64 * 64  # numbers of an expert's gate and up
    monkeypatch.setattr(nf4_experts, "AT_ONCE", 2 * 4 * one)
    ours, _ = pair(base)
    kept = []
    with (
        Largest(torch.float32) as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        ours.base_model.model.model(input_ids=IDS).last_hidden_state.sum().backward()
    assert largest.numbers == 2 * one
    assert max(t.numel() for t in kept if t.dtype == torch.float32) < one


def test_experts_are_quantised_one_after_the_other(base, monkeypatch):
    """While a base is read, no parameter waits for that in full precision, and no more than an expert is made
    into codes at a time."""
    real, waiting, quantised = nf4_loading._Quantise.convert, [], []

    def convert(self, input_dict, full_layer_name=None, model=None, **options):
        weights = [getattr(m, name) for _, m in mixtures(model) for name in ("gate_up_proj", "down_proj")]
        waiting.append(sum(w.device.type != "meta" and not nf4_experts.is_quantised(w) for w in weights))
        return real(self, input_dict, full_layer_name, model, **options)

    def quantise(weight, *args, **options):
        quantised.append(weight.numel())
        return quantize_4bit(weight, *args, **options)

    monkeypatch.setattr(nf4_loading._Quantise, "convert", convert)
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", quantise)
    model = in_nf4(config_of(base))
    assert waiting == [0] * 2 * (4 + 2)
    assert max(quantised) == 2 * 64 * 64  # an expert's gate and up
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, Params4bit)


def test_only_experts_with_rows_are_dequantised():
    weight = nf4_experts.quantise(torch.randn(4, 8, 64))
    (part,) = nf4_experts.parts(weight, [0, 3, 3, 5])
    assert part.matrices.shape == (2, 8, 64)
    assert (part.first, part.last, part.ends.tolist()) == (0, 5, [3, 5])


def test_the_bytes_are_those_that_bitsandbytes_makes_of_the_whole():
    weight = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))
    ours = nf4_experts.quantise(weight)
    theirs = Params4bit(weight.clone(), quant_type="nf4").to("cpu")
    assert torch.equal(ours.data, theirs.data)
    assert ours.quant_state == theirs.quant_state


def test_the_adapter_is_peft_s_and_answers_over_nf4(base, tmp_path):
    ours, _ = pair(base)
    ours.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    logits = ours(input_ids=IDS).logits
    plain = PeftModel.from_pretrained(rounded(base), tmp_path / "adapter")
    torch.testing.assert_close(plain(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)
    subject = find(str(tmp_path / "adapter"))
    loaded = load(subject, dtype="fp32", quantization="nf4", tokenizer=object()).model
    torch.testing.assert_close(loaded(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_in_bfloat16(base):
    config = config_of(base)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    model = learnt(add_lora(in_nf4(config), config.lora))
    assert fuse_experts(model) == (2, 0)
    expected, _ = losses_and_gradients(pair(base)[1].cuda(), IDS.cuda())
    loss, gradients = losses_and_gradients(model, IDS.cuda(), autocast=False)
    assert abs(loss - expected) < 0.05
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_experts_that_cannot_be_computed_so_are_refused_before_a_weight_is_read(tmp_path):
    base = made(tmp_path, hidden_act="gelu")
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.experts.gate_up_proj .*set strategy.quantization: none"
    ):
        count_parameters(config_of(base), str(base))


def test_a_gpu_that_cannot_multiply_rows_in_groups_is_refused(monkeypatch):
    """A mock of the GPU, which is not here."""
    config = AutoConfig.for_model("qwen3_moe", **SIZES, num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    nf4_loading.check(config_of("base"), model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused_experts, "has_grouped_mm", lambda _: True)
    nf4_loading.check(config_of("base"), model)
    monkeypatch.setattr(fused_experts, "has_grouped_mm", lambda _: False)
    with pytest.raises(
        ValueError, match=r"need a GPU of compute capability 8.0 .*set strategy.quantization: none"
    ):
        nf4_loading.check(config_of("base"), model)
    del model.model.layers[0].mlp.experts
    nf4_loading.check(config_of("base"), model)


def test_scales_of_another_expert_are_seen(base, monkeypatch):
    """What these tests would say if experts were mixed up."""
    real = nf4_experts.parts

    def broken(weight, ends):
        for part in real(weight, ends):
            yield part._replace(matrices=part.matrices.roll(1, 0))

    ours, theirs = pair(base)
    monkeypatch.setattr(fused_experts, "parts", broken)
    with pytest.raises(AssertionError):
        assert_as_in_peft(ours, theirs)
