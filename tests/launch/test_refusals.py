"""What is refused before anything is started."""

import re
from pathlib import Path

import pytest

from qwenlora.configs import load_config
from qwenlora.launch import agent, refusals
from qwenlora.launch.refusals import check_start

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["strategy.name=fsdp", "strategy.quantization=nf4"],
            "strategy.name=fsdp with strategy.quantization=nf4: ",
        ),
        (
            ["strategy.name=ddp", "strategy.offload=params"],
            "strategy.name=ddp with strategy.offload=params: ",
        ),
        (["strategy.sequence_parallel=3"], "strategy.sequence_parallel=3 on 2 processes"),
    ],
)
def test_what_cannot_run_is_refused_before_the_start(overrides, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        check_start(load_config(TINY, overrides), 1, 2)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lora.target_modules=[q_proj, k_porj]", "the base has no k_porj; did you mean k_proj?"),
        ("lora.modules_to_save=[lm_heads]", "the base has no lm_heads; did you mean lm_head?"),
    ],
)
def test_names_that_the_base_lacks_are_refused_before_the_start(override, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        check_start(load_config(TINY, [override]), 1, 2)
    check_start(load_config(TINY, [override, "model.name_or_path=someone/unknown-9B"]), 1, 2)


def test_a_deepspeed_config_that_contradicts_is_refused_before_the_start(tmp_path):
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 3}')
    config = load_config(TINY, ["strategy.name=zero2", f"strategy.deepspeed_config={tmp_path}/ds.json"])
    with pytest.raises(
        ValueError, match=r"ds\.json: gradient_clipping=3, but train\.max_grad_norm=1: expected 1\.0;"
    ):
        check_start(config, 1, 1)


@pytest.mark.parametrize(
    ("key", "size"), [("train_micro_batch_size_per_gpu", 2), ("gradient_accumulation_steps", 1)]
)
def test_a_deepspeed_config_does_not_fix_what_auto_finds(tmp_path, key, size):
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text(f'{{"{key}": {size}}}')
    plan = ["strategy.name=zero2", "train.per_device_train_batch_size=auto", "train.global_batch_size=1"]
    check_start(load_config(TINY, plan), 1, 1)
    with pytest.raises(ValueError, match=f'{key}={size}, but .*: expected "auto"; change one of them'):
        check_start(load_config(TINY, [*plan, f"strategy.deepspeed_config={tmp_path}/ds.json"]), 1, 1)


def test_a_gpu_is_taken_for_granted_on_a_job_s_nodes(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = load_config(TINY, ["strategy.name=fsdp", "strategy.offload=params"])
    check_start(config, 1, 1)
    with pytest.raises(ValueError, match="on a machine without GPUs"):
        check_start(config)


def test_without_deepspeed_its_launcher_is_refused(monkeypatch):
    monkeypatch.setattr(refusals, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="^launch.launcher=deepspeed needs the deepspeed package, .*: pip install"
    ):
        check_start(load_config(TINY, ["launch.launcher=deepspeed"]))


def test_more_slots_than_micro_batches_are_refused():
    Path("hosts").write_text("127.0.0.1 slots=3\n127.0.0.2 slots=3\n")
    with pytest.raises(ValueError, match="=20 makes 2 micro-batches .* fewer than 6 processes"):
        agent.run(load_config(TINY, ["launch.launcher=deepspeed", "launch.hostfile=hosts"]))


@pytest.mark.parametrize("launch", [{"launcher": "deepspeed"}, {"hostfile": "hosts"}], ids=str)
def test_in_a_slurm_job_both_are_refused(monkeypatch, launch):
    from qwenlora.jobs import submit

    (key,) = launch
    with pytest.raises(
        ValueError, match=f"^launch.{key}=.* is for machines without Slurm: .*; leave --{key} out$"
    ):
        submit(TINY, {f"launch.{key}": launch[key]}, timeout_min=1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(
        ValueError, match=f"^launch.{key}=.* is for machines without Slurm: .*; leave --{key} out$"
    ):
        agent.run(load_config(TINY, {f"launch.{key}": launch[key]}))
