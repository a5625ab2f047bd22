"""Each family of Qwens by the command line: packed rows on one rank and on two, a resume, plain peft, a
merged model, compare and chat."""

import json

import forked
import pytest
import torch
from made import HYBRIDS, WITH_VISION, make_with_vision
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from qwenlora.configs.schema import Data
from qwenlora.data.chat import Encoder
from qwenlora.data.survey import rows_of_side

pytestmark = [pytest.mark.slow, pytest.mark.long]

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    "qwen3_moe": EXPERTS | {"head_dim": 16},
    **{kind: {"head_dim": 16} | sizes for kind, sizes in HYBRIDS.items()},
}
CONFIG = """
model: {name_or_path: BASE}
data: {train: example, eval: example, packing: 'on', max_length: 256}
train: {global_batch_size: 4, per_device_train_batch_size: 1, max_steps: 6, learning_rate: 3e-3,
        warmup_steps: 0, lr_scheduler_type: constant,
        eval_strategy: steps, eval_steps: 3, save_strategy: steps, save_steps: 3}
log: {logging_steps: 1, wandb: off}
"""
WAYS = {name: f"strategy.name={name}" for name in ("ddp", "zero2", "zero3", "fsdp")}


EACH = [(kind, tied) for kind in FAMILIES for tied in (True, False)]
EACH += [(kind, kind.endswith("_vl")) for kind in WITH_VISION]


@pytest.fixture(scope="module", params=EACH, ids=str)
def folder(request, tmp_path_factory, tiny):
    kind, tied = request.param
    folder = tmp_path_factory.mktemp(kind)
    if kind in WITH_VISION:
        make_with_vision(folder / "base", kind, tiny, tied=tied)
    else:
        words = AutoTokenizer.from_pretrained(tiny)
        torch.manual_seed(3)
        sizes = SIZES | FAMILIES[kind] | {"vocab_size": len(words), "tie_word_embeddings": tied}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder / "base")
        words.save_pretrained(folder / "base")
    (folder / "my.yaml").write_text(CONFIG.replace("BASE", str(folder / "base")))
    command(folder, "train", "my.yaml", "run_dir=one")
    return folder


def command(folder, *arguments, **more) -> str:
    answer = forked.run(
        [*forked.COMMAND, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        **more,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def loaded(base):
    """Return a base as transformers loads all of it."""
    has_vision = "vision_config" in json.loads((base / "config.json").read_text())
    return (AutoModelForImageTextToText if has_vision else AutoModelForCausalLM).from_pretrained(base)


def losses(run, name="loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def logits(model) -> torch.Tensor:
    ids = torch.arange(300, 364).view(2, 32)
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def test_ranks_and_strategies_have_the_losses_of_one(folder):
    one = losses(folder / "one")
    assert len(one) == 6
    mixture = "num_experts_per_tok" in (folder / "base" / "config.json").read_text()
    for name, setting in (WAYS | {"experts": "strategy.expert_parallel=2"} if mixture else WAYS).items():
        command(folder, "train", "my.yaml", f"run_dir={name}", setting, "--nproc", 2)
        for what in ("loss", "eval_loss"):
            pairs = zip(losses(folder / "one", what), losses(folder / name, what), strict=True)
            assert max(abs(a - b) for a, b in pairs) <= 1e-5, name
        assert min(losses(folder / name, "rank_forward_s")) > 0, "who is slow can be seen"


def test_the_loss_is_that_of_rows_alone_in_plain_peft(folder):
    words = AutoTokenizer.from_pretrained(folder / "base")
    rows = [row for _, row in rows_of_side(Data(train="example", eval="example"), "eval")]
    base = loaded(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "one" / "adapter").eval()
    total, count = 0.0, 0
    for row in Encoder(words).encode(rows):
        ids, trained = torch.from_numpy(row.ids.astype("int64")), torch.from_numpy(row.trained[1:])
        with torch.no_grad():
            of_tokens = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        every = torch.nn.functional.cross_entropy(of_tokens, ids[1:], reduction="none").double()
        total, count = total + every[trained].sum().item(), count + int(trained.sum())
    assert losses(folder / "one", "eval_loss")[-1] == pytest.approx(total / count, abs=1e-5)


def test_it_is_verified_and_compared(folder):
    command(folder, "verify", "one")
    said = command(folder, "compare", "one", "--limit", 4, "--show", 0, "--samples", 0, "--max-new-tokens", 4)
    assert "exact answers to training questions" in said


def test_a_resume_ends_with_the_same_bits(folder):
    command(folder, "train", "my.yaml", "run_dir=cut", "train.max_steps=3")
    command(folder, "train", "my.yaml", "run_dir=cut")
    names = [folder / run / "adapter" / "adapter_model.safetensors" for run in ("one", "cut")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_damaged_checkpoint_is_passed_over(folder):
    command(folder, "train", "my.yaml", "run_dir=damaged", "train.save_total_limit=null")
    (folder / "damaged" / "checkpoint-6" / "adapter_config.json").write_text("{")
    said = command(folder, "train", "my.yaml", "run_dir=damaged", "train.max_steps=7")
    assert "passed over: checkpoint-6" in said
    assert "resuming from checkpoint-3" in said


def test_plain_peft_and_the_merged_model_have_the_same_logits(folder):
    base = loaded(folder / "base")
    before = logits(base)
    tuned = logits(PeftModel.from_pretrained(base, folder / "one" / "adapter"))
    assert (tuned - before).abs().max() > 0.05
    command(folder, "merge", "one", "merged", "--dtype", "fp32")
    merged = logits(loaded(folder / "merged"))
    assert (merged - tuned).abs().max() < 1e-4


def test_chat_answers(folder):
    once, again = (
        command(folder, "chat", "one", "--temperature", 0, "--max-new-tokens", 4, input="hello\n")
        for _ in range(2)
    )
    assert once == again
