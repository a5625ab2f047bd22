"""Starts that take a part of the base away are peft's, over a base that stays as it is."""

from itertools import islice

import pytest
import torch
from made import NO_IDENTITY, config_of, side_of
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from safetensors.torch import load_file
from spread import make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenlora.adapter.subject import find
from qwenlora.adapter.verify import check_adapter
from qwenlora.configs.load import to_yaml
from qwenlora.configs.schema import Config, Data, Lora, Model
from qwenlora.plan.counts import count
from qwenlora.plan.shape import read_values, shape_of
from qwenlora.run.checkpoints import ADAPTER
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.final_adapter import save_adapter
from qwenlora.trainer.loop.arguments import order_of
from qwenlora.trainer.loop.eva import _Batches, begin
from qwenlora.trainer.loop.saver import Saver
from qwenlora.trainer.loop.state import Snapshot, in_file, restore_adapter
from qwenlora.trainer.model.fused import fuse
from qwenlora.trainer.model.fused_lora import INITIAL
from qwenlora.trainer.model.lora import add_lora

CLOSE = 1e-5
IDS = torch.randint(0, 2048, (3, 24), generator=torch.Generator().manual_seed(1))
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
STARTS = ("pissa", "olora", "pissa_niter_4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    folder = make_base(tmp_path_factory.mktemp("base"), "qwen3", tied=True)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def loaded(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(requires_grad=False)


def adapted(folder, start="pissa", saved=None, dtype=torch.float32, beat=lambda: None, **lora):
    torch.manual_seed(5)
    how = Lora(r=4, init_lora_weights=start, **lora)
    return add_lora(loaded(folder, dtype), how, saved=saved, beat=beat).train()


def plain(folder, like, start, **lora):
    """Return plain peft's model with the same start; of a random one, with that of `like`."""
    more = {"lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(loaded(folder), LoraConfig(r=4, init_lora_weights=start, **more)).train()
    if "niter" in start:
        bases, ours = dict(loaded(folder).named_modules()), dict(like.named_modules())
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                a, b = (ours[name].get_submodule(f"lora_{of}.{INITIAL}").weight.data for of in "AB")
                layer.lora_A["default"].weight.data = a.clone()
                layer.lora_B["default"].weight.data = b.clone()
                whole = bases[name.removeprefix("base_model.model.")].weight
                layer.base_layer.weight.data = whole - layer.scaling["default"] * b @ a
    return model


def trained(model, steps=5):
    """Train row by row; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4, eps=1e-6)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # of dropout
        for row in IDS:
            loss = model(input_ids=row[None], labels=row[None]).loss
            losses.append(loss.item())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def saved_as(model, folder, tiny):
    """Write the final adapter; return its folder."""
    run = RunFolder(folder)
    run.path.mkdir()
    save_adapter(model, AutoTokenizer.from_pretrained(tiny), {}, run)
    return run.adapter


WAYS = [
    *(("", start, {}) for start in STARTS),
    *(("fused", start, {}) for start in STARTS),
    ("fused", "pissa", {"use_rslora": True, "lora_dropout": 0.3}),
    ("fused", "olora", {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"q_proj": 8}}),
]


@pytest.mark.parametrize(("fused", "start", "more"), WAYS, ids=str)
def test_losses_are_plain_peft_s_and_the_adapter_is_for_the_base_as_it_is(
    folder, tiny, tmp_path, fused, start, more
):
    model = adapted(folder, start, lora_alpha=32, **more)
    expected = trained(plain(folder, model, start, **more))
    assert not fused or fuse(model).plain == 0
    before = logits(loaded(folder))
    assert (logits(model) - before).abs().max() <= CLOSE, "it begins as the base"
    losses = trained(model.train())
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= CLOSE
    adapter = saved_as(model, tmp_path / "run", tiny)
    again = logits(PeftModel.from_pretrained(loaded(folder), adapter))
    assert (again - logits(model)).abs().max() <= CLOSE
    assert (again - before).abs().max() > 0.1
    assert check_adapter(find(str(adapter), base=str(folder))).numbers == 2 * sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_nothing_of_the_base_and_of_the_beginning_changes(folder):
    beats = []
    model = adapted(folder, beat=lambda: beats.append(1))
    fuse(model)
    beginning = {name: p.clone() for name, p in model.named_parameters() if f".{INITIAL}." in name}
    assert len(beginning) == 2 * len(beats) == 28, "each layer is a sign of life"
    trained(model)
    assert all(torch.equal(p, beginning[name]) for name, p in model.named_parameters() if name in beginning)
    of_base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    for name, values in loaded(folder).named_parameters():
        assert torch.equal(of_base[f"base_model.model.{name}".replace("proj.", "proj.base_layer.")], values)


def test_a_resume_has_the_beginning_from_the_checkpoint(folder, tmp_path):
    first, run = adapted(folder), RunFolder(tmp_path)
    trained(first)
    with torch.no_grad():
        for name, p in first.named_parameters():
            if f".{INITIAL}." in name:
                p.mul_(0.5)  # as if another machine had made it
    saver = Saver(run, NO_IDENTITY, 1, limit=None, in_background=False, timeout_s=60)
    saver.save(3, Snapshot(in_file(first), {}, []), {}, {})
    saved = run.checkpoint(3)
    again = adapted(folder, saved=saved)
    restore_adapter(again, (saved / ADAPTER).read_bytes(), saved)
    assert torch.equal(logits(again), logits(first))
    for own in ("lora_A", "lora_B"):
        other = adapted(folder, saved=saved)
        other.get_parameter(f"{Q_PROJ}.{own}.{INITIAL}.weight").data[0, 0] += 1
        with pytest.raises(ValueError, match=rf"checkpoint-3 does not .*{own}.weight began there with other"):
            restore_adapter(other, (saved / ADAPTER).read_bytes(), saved)
    with pytest.raises(ValueError, match=r"checkpoint-3 does not fit the model: it has no beginning of"):
        adapted(folder, saved=saved, rank_pattern={"q_proj": 2})
    (saved / ADAPTER).write_bytes((saved / ADAPTER).read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="with other bytes than were written"):
        adapted(folder, saved=saved)


def test_verify_tells_what_was_trained_from_its_beginning(folder, tiny, tmp_path):
    def verified(model, name):
        adapter = saved_as(model, tmp_path / name, tiny)
        lora, named = Lora(r=4, init_lora_weights="pissa"), Model(name_or_path=str(folder))
        config = Config(run_dir=name, model=named, data=Data(train="example"), lora=lora)
        RunFolder(adapter.parent).config.write_text(to_yaml(config))
        return check_adapter(find(str(adapter.parent)))

    model = adapted(folder)
    with pytest.raises(ValueError, match="every lora_B is zero, or as it began, so the adapter"):
        verified(model, "without a step")
    trained(model)
    assert verified(model, "trained").unchanged == ()
    for of in ("lora_A", "lora_B"):
        values = model.get_parameter(f"{Q_PROJ}.{of}.{INITIAL}.weight")
        model.get_parameter(f"{Q_PROJ}.{of}.default.weight").data.copy_(values)
    assert verified(model, "but for one").unchanged == (f"{Q_PROJ}.lora_B.weight",)
    for name, values in model.named_parameters():
        if "lora_B.default" in name:
            values.data.zero_()
    with pytest.raises(ValueError, match="every lora_B is zero, or as it began"):
        verified(model, "zero")


def test_what_else_is_trained_is_in_the_file_too(folder, tiny, tmp_path):
    model = adapted(folder, modules_to_save=["norm"], trainable_token_indices=[7, 9])
    fuse(model)
    trained(model)
    adapter = saved_as(model, tmp_path / "run", tiny)
    names = load_file(adapter / ADAPTER)
    assert sum("lora_" in name for name in names) == 28
    others = [name for name in names if "lora_" not in name]
    assert [sum(end in name for name in others) for end in ("norm.weight", "tokens_delta")] == [9, 1]
    again = logits(PeftModel.from_pretrained(loaded(folder), adapter))
    assert (again - logits(model)).abs().max() <= CLOSE


def test_eva_is_plain_peft_s_over_the_same_rows(folder, tiny, tmp_path):
    config, side = config_of(global_batch_size=2).model_copy(update={"lora": Lora(r=4)}), side_of(30)
    order = order_of(config, side)
    theirs = plain(folder, None, "eva", eva_config=EvaConfig(rho=1.0))
    batches = list(islice(_Batches(config, order, side), 100))
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    expected = trained(theirs)
    beats, model = [], adapted(folder, "eva")
    begin(model, config, order, side, lambda: beats.append(1))
    assert len(beats) > 1
    assert torch.equal(logits(model), logits(loaded(folder))), "it begins as the base"
    fuse(model)
    losses = trained(model.train())
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= CLOSE
    adapter = saved_as(model, tmp_path / "run", tiny)
    again = logits(PeftModel.from_pretrained(loaded(folder), adapter))
    assert (again - logits(model)).abs().max() <= CLOSE


def test_directions_that_never_settle_are_refused(folder, monkeypatch):
    monkeypatch.setattr("qwenlora.trainer.loop.eva.BATCHES", 1)
    config, side = config_of(), side_of(30)
    with pytest.raises(ValueError, match=r"eva: the inputs of the layers have no 16 settled directions aft"):
        begin(adapted(folder, "eva"), config, order_of(config, side), side, lambda: None)


def test_in_bfloat16_the_base_is_not_rounded_again(folder):
    """peft rounds what is left of the base, which changes what the model computes before any step."""
    exact = logits(loaded(folder, torch.bfloat16))
    ours = adapted(folder, dtype=torch.bfloat16)
    fuse(ours)
    settings = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights="pissa")
    theirs = get_peft_model(loaded(folder, torch.bfloat16), settings)
    apart = [(logits(model) - exact).float().abs().mean().item() for model in (ours, theirs)]
    assert apart[0] < 0.2 * apart[1]


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"r": 40}, r"init_lora_weights=pissa: the rank 40 is more than .*k_proj has, 32; set lora\.r"),
        (
            {"target_modules": ["embed_tokens"]},
            "is for linear layers of the decoder, and .*embed_tokens",
        ),
        (
            {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "eva"},
            "init_lora_weights=eva is for linear layers of the decoder, and .*lm_head is none",
        ),
    ],
)
def test_layers_that_cannot_begin_so_are_refused_without_weights(folder, lora, said):
    base = loaded(folder).to("meta")
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        add_lora(base, Lora(**{"init_lora_weights": "pissa"} | lora))


def test_experts_that_cannot_begin_so_are_refused_by_a_plan_too(tmp_path):
    base, lora = make_base(tmp_path, "qwen3_moe", tied=True), Lora(init_lora_weights="olora")
    said = r"is for linear layers of the decoder, and .*experts.* is none; .*set lora\.experts: shared"
    with pytest.raises(ValueError, match=said):
        add_lora(AutoModelForCausalLM.from_pretrained(base), lora)
    with pytest.raises(ValueError, match=said):
        count(shape_of(read_values(base), "base"), lora)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"init_lora_weights": "loftq"}, "makes a new base in 4 bits.*strategy.quantization: nf4.*set pissa"),
        (
            {"init_lora_weights": "eva", "rank_pattern": {"q_proj": 4}},
            "change the ranks of rank_pattern",
        ),
        ({"init_lora_weights": "PiSSA"}, "expected true, gaussian, orthogonal, pissa, olora, eva or pissa_"),
        ({"init_lora_weights": "pissa_niter_0"}, "expected true, gaussian"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "becomes plain LoRA, which use_dora=true is not"),
        ({"init_lora_weights": "olora", "init_from": "runs/one"}, "begins anew, and init_from=runs/one goes"),
        (
            {"init_lora_weights": "pissa", "use_rslora": True, "alpha_pattern": {"q_proj": 4}},
            "no plain adapter for use_rslora=true with rank_pattern or alpha_pattern",
        ),
    ],
)
def test_settings_that_cannot_be_kept_are_refused_by_the_schema(lora, said):
    with pytest.raises(ValidationError, match=said):
        Lora(**lora)
