"""The auxiliary loss of routers: each row's is transformers', and a step's does not depend on batches."""

import pytest
import torch
from gradients import apart
from made import HYBRIDS, config_of, make_with_vision, parameters_of, side_of, trainer_of
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qwenlora.configs.schema import Config, Data, Model, Strategy, Train
from qwenlora.data.chat import Tokens
from qwenlora.run.records import OfKind
from qwenlora.trainer.loop.batches import collate, collate_packs
from qwenlora.trainer.model import router_loss
from qwenlora.trainer.model.architecture import class_of
from qwenlora.trainer.model.router_loss import own_the_router_loss

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "initializer_range": 0.3,
}
KINDS = {kind: HYBRIDS.get(kind, {}) for kind in ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text")}
SHARE = 0.5


def base_of(kind="qwen3_moe", **more):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "use_cache": False} | KINDS[kind] | SIZES
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | more))


def model_of(kind="qwen3_moe", **more):
    model = get_peft_model(base_of(kind, **more), LoraConfig(r=4, target_modules=["o_proj", "out_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def rows(*lengths):
    numbers = torch.Generator().manual_seed(0)
    ids = [torch.randint(100, (length,), generator=numbers).numpy() for length in lengths]
    return [Tokens(row, torch.arange(len(row)).numpy() > 1) for row in ids]


def gradients_of(model, batches, **more):
    """Return the gradients of the losses of batches."""
    model.zero_grad()
    for batch in batches:
        model(**batch, **more).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one, other):
    assert one.keys() == other.keys()
    assert max(apart(one, other).values()) <= 1e-5


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_s_loss_is_transformers(kind, recomputed):
    asks = {"output_router_logits": True, "router_aux_loss_coef": SHARE}
    batch = collate(rows(9), 0)
    theirs, plain, ours = model_of(kind, **asks), model_of(kind), model_of(kind, **asks)
    if recomputed:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    loss = own_the_router_loss(ours, "model")
    loss.begin(9)
    found = theirs(**batch)
    assert ours(**batch).loss.item() == pytest.approx((found.loss - SHARE * found.aux_loss).item(), abs=1e-6)
    assert loss.value.item() == pytest.approx(found.aux_loss.item(), abs=1e-5)
    expected = gradients_of(theirs, [batch])
    assert_close(gradients_of(ours, [batch]), expected)
    assert max(apart(gradients_of(plain, [batch]), expected).values()) > 0.01


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_a_base_in_the_layout_of_a_vision_model_has_it(kind, tmp_path):
    folder = str(make_with_vision(tmp_path, kind))
    model = class_of(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    model.config.get_text_config().output_router_logits = True
    batch = collate(rows(9), 0)
    expected = model(**batch).aux_loss
    loss = own_the_router_loss(model.train(), SHARE)
    loss.begin(9)
    model(**batch)
    assert loss.value.item() == pytest.approx(expected.item(), abs=1e-5)


SPLITS = {
    "padded": lambda some: [collate(some, 0)],
    "padded by two": lambda some: [collate(some[:2], 0), collate(some[2:], 0), collate([], 0)],
    "a pack": lambda some: [collate_packs([some], 0)],
    "packs of two": lambda some: [collate_packs([some[:1], some[1:]], 0)],
}


@pytest.mark.parametrize("how", SPLITS)
def test_the_gradient_does_not_depend_on_batches(how):
    """Padding and blank batches add nothing."""
    some = rows(9, 4, 6, 2)
    trained, tokens = sum(int(row.trained[1:].sum()) for row in some), sum(len(row.ids) for row in some)
    found = []
    for batches in ([collate([row], 0) for row in some], SPLITS[how](some)):
        model = model_of()
        loss = own_the_router_loss(model, SHARE)
        loss.begin(tokens)
        found.append((gradients_of(model, batches, num_items_in_batch=trained), loss.value.item()))
    assert_close(found[1][0], found[0][0])
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-5)
    assert 1 < found[0][1] < 8


def test_it_is_not_part_of_an_evaluation():
    model, batch = model_of(), collate(rows(9), 0)
    loss = own_the_router_loss(model, SHARE)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            model.eval()(**batch)
    assert loss.value == 0


def test_a_router_that_is_trained_learns_from_it():
    model = get_peft_model(base_of(), LoraConfig(r=4, target_parameters=["mlp.gate.weight"]))
    batch, found = collate(rows(9), 0), []
    for wanted in ("off", SHARE):
        if loss := own_the_router_loss(model, wanted):
            loss.begin(9)
        found.append(gradients_of(model.train(), [batch]))
    assert max(apart(found[0], found[1]).values()) > 0.01


def test_a_run_has_it_by_itself_and_the_same_in_any_micro_batches(tiny, tmp_path):
    base_of(vocab_size=2048).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "base")

    def trained(size, wanted):
        chosen = config_of(per_device_train_batch_size=size, max_steps=3, router_aux_loss=wanted)
        made = trainer_of(tmp_path / "base", tmp_path / f"{size} {wanted}", side_of(12), chosen)
        made.args.logging_steps = made.state.logging_steps = 1
        made.train()
        return [entry for entry in made.state.log_history if "loss" in entry]

    without, one, other = trained(4, "off"), trained(4, 2.0), trained(1, 2.0)
    assert "router_aux_loss" not in without[0]
    assert one[0]["loss"] == without[0]["loss"]
    assert one[2]["loss"] != pytest.approx(without[2]["loss"], abs=1e-4)
    for name in ("loss", "router_aux_loss", "grad_norm"):
        assert [entry[name] for entry in one] == pytest.approx([entry[name] for entry in other], rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "wanted", "share"),
    [
        (False, "model", 0),
        (True, "model", 0.001),
        (True, "off", 0),
        (False, 0.02, 0.02),
        (True, 0.02, 0.02),
    ],
)
def test_what_it_is_multiplied_with(asked, wanted, share):
    base = AutoConfig.for_model("qwen3_moe", output_router_logits=asked)
    assert router_loss.coefficient(wanted, base) == share
    model = base_of(output_router_logits=asked)
    assert bool(own_the_router_loss(model, wanted)) == bool(share)
    assert model(**collate(rows(9), 0)).aux_loss is None, "transformers adds none of its own"


def config(wanted, **strategy) -> Config:
    return Config(
        run_dir="run",
        model=Model(name_or_path="base"),
        data=Data(train="x"),
        train=Train(router_aux_loss=wanted),
        strategy=Strategy(**strategy),
    )


def test_where_it_cannot_be_made_it_is_refused():
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SIZES, num_hidden_layers=1))
    router_loss.check(config("model"), dense)
    with pytest.raises(ValueError, match="router_aux_loss=0.1: model.name_or_path=base has no routers"):
        router_loss.check(config(0.1), dense)
    asks = base_of(output_router_logits=True)
    router_loss.check(config("off", sequence_parallel=2), asks)
    router_loss.check(config("model"), asks)
    with pytest.raises(
        ValueError, match=r"router_aux_loss=model .* with strategy.sequence_parallel=2: it is"
    ):
        router_loss.check(config("model", sequence_parallel=2), asks)


@pytest.mark.parametrize("trained", [0, 8])
def test_it_is_said(trained):
    parameters = parameters_of(990, 10, 900, 90, 2, 8, 16, 4)
    parameters = parameters.model_copy(
        update={"kinds": {"router": OfKind(total=8, matrices=1, trained=trained)}}
    )
    assert not router_loss.notes_on(config("model"), base_of().config, parameters)
    (note,) = router_loss.notes_on(config(0.01), base_of().config, parameters)
    assert "auxiliary loss, each row's own, is added, times 0.01" in note
    assert ("routers are frozen" in note) == (not trained)
