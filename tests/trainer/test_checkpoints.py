"""A checkpoint is whole or it is not used; the newest whole one is chosen, and those passed over are
named."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenlora.configs import load_config
from qwenlora.run import checkpoints
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Cursor, Schedule, State
from qwenlora.run.snapshots import Snapshots
from qwenlora.trainer.loop.keeper import Keeper
from qwenlora.trainer.loop.saver import Saver
from qwenlora.trainer.loop.state import Snapshot
from qwenlora.trainer.loop.trainer import LoraTrainer


def snapshot(value: float = 1.0) -> Snapshot:
    adapter = {f"layer.{n}.lora_{side}.weight": torch.full((4, 8), value) for n in range(2) for side in "AB"}
    return Snapshot(adapter, {"layer.0/exp_avg": torch.ones(4, 8)}, [{}])


def state(moved: bool = True) -> State:
    """Return what a checkpoint's state.json holds, of a first step."""
    return State(
        step=1,
        cursor=Cursor(epoch=0, step_in_epoch=1, steps_per_epoch=9),
        scheduler=Schedule(last_epoch=1),
        optimizer_groups=[{}],
        loss_so_far=[0.0],
        logged_step=1,
        evaluation_due=False,
        eval_losses={},
        moved=moved,
    )


@pytest.fixture
def config(tmp_path):
    (tmp_path / "my.yaml").write_text(
        f"model: {{name_or_path: tiny}}\ndata: {{train: example}}\nrun_dir: {tmp_path}/run\n"
    )
    return lambda *overrides: load_config(tmp_path / "my.yaml", overrides)


@pytest.fixture
def identity(config):
    return checkpoints.identity_of(config(), "rows", "weights")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


@pytest.fixture
def saver(run, identity):
    saver = Saver(run, identity, 2, limit=None, in_background=False, timeout_s=600)
    saver.constant({"adapter_config.json": b"{}"})
    return saver


def save(saver, step, snapshot=None, moved=True, losses=None):
    saver.wait()
    saver.save(step, snapshot or globals()["snapshot"](), {"state.json": state(moved).text()}, losses or {})
    saver.wait()


def names(run) -> list[str]:
    return sorted(path.name for path in run.path.iterdir())


FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "optimizer.safetensors",
    "state.json",
]


def test_a_checkpoint_holds_its_files_and_a_manifest_of_them(run, saver, identity):
    save(saver, 4)
    folder = run.checkpoint(4)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert names(run) == ["checkpoint-4"]
    manifest = checkpoints.read(folder)
    assert (manifest.format, manifest.step, manifest.world_size) == (1, 4, 2)
    assert manifest.identity == identity
    for name, entry in manifest.files.items():
        assert (folder / name).stat().st_size == entry.bytes
    assert set(manifest.files) == set(FILES) - {"manifest.json"}
    assert checkpoints.flaw(folder) == ""
    assert load_file(folder / "adapter_model.safetensors")["layer.0.lora_A.weight"].eq(1).all()
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o044, "a colleague may read it"


@pytest.mark.parametrize("name", FILES)
def test_a_file_removed_cut_or_changed_in_any_bit_is_never_resumed_from(run, saver, identity, name):
    save(saver, 4)
    save(saver, 8)
    file = run.checkpoint(8) / name
    whole = file.read_bytes()
    size = len(whole)
    harms = [None, *[whole[:end] for end in {0, 1, size // 2, size - 1}]]
    for position in range(size) if size < 3000 else range(0, size, size // 1000):
        bit = 1 << position % 8
        harms.append(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
    for harm in harms:
        if harm is None:
            file.unlink()
        else:
            file.write_bytes(harm)
        chosen = checkpoints.choose(run, "auto", identity)
        assert chosen.folder == run.checkpoint(4)
        (why,) = chosen.passed_over
        assert why.startswith("checkpoint-8 ")
        assert name in why
        with pytest.raises(ValueError, match=rf"--resume checkpoint-8: .*{name}"):
            checkpoints.choose(run, "checkpoint-8", identity)
    file.write_bytes(whole)
    assert checkpoints.choose(run, "auto", identity).folder == run.checkpoint(8)


def test_without_a_whole_one_the_run_stops_and_says_how_to_start_over(run, saver, identity):
    assert checkpoints.choose(run, "auto", identity) == (None, [], "")
    save(saver, 4)
    (run.checkpoint(4) / "state.json").unlink()
    run.checkpoint(6).mkdir()
    for name in ("trainer_state.json", "adapter_config.json"):
        (run.checkpoint(6) / name).touch()
    with pytest.raises(ValueError, match="can be resumed from") as refusal:
        checkpoints.choose(run, "auto", identity)
    assert (
        "checkpoint-6 has no manifest.json: it is an adapter that transformers' Trainer, TRL or an older"
        f" qwenlora saved; lora.init_from={run.checkpoint(6)} and a new run_dir train it further"
        in str(refusal.value)
    )
    (run.checkpoint(6) / "state.json").touch()
    assert checkpoints.flaw(run.checkpoint(6)) == "has no manifest.json", "it is of this version, and damaged"
    (run.checkpoint(6) / "state.json").unlink()
    assert "checkpoint-4 lacks state.json; --fresh sets this run aside and starts anew" in str(refusal.value)


@pytest.mark.parametrize(
    ("files", "how"),
    [
        (["adapter_config.json"], "it is an adapter; lora.init_from={} and a new run_dir train it further"),
        (
            ["config.json", "trainer_state.json"],
            "it is a whole model that transformers' Trainer, TRL or an older qwenlora saved;"
            " model.name_or_path={} and a new run_dir train an adapter on it",
        ),
    ],
)
def test_a_resume_from_what_is_no_checkpoint_names_the_key_that_takes_it(run, tmp_path, files, how):
    folder = tmp_path / "of-others"
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    with pytest.raises(ValueError, match=re.escape(f"{folder} has no manifest.json: {how.format(folder)}")):
        checkpoints.named(run, str(folder), {})


def test_a_format_of_the_future_is_passed_over(run, saver, identity):
    save(saver, 4)
    save(saver, 8)
    manifest = run.checkpoint(8) / "manifest.json"
    record = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "sha256"}
    manifest.write_text(checkpoints._signed(record | {"format": 2}))
    assert checkpoints.choose(run, "auto", identity).passed_over == [
        "checkpoint-8 has format 2, this version of qwenlora reads format 1"
    ]


def test_an_adapter_that_is_all_zero_though_it_was_trained_is_not_gone_on_from(run, saver):
    save(saver, 4, snapshot(0.0), moved=True)
    assert "all zero (every lora_B), though it was trained" in checkpoints.flaw(run.checkpoint(4))
    save(saver, 8, snapshot(0.0), moved=False)
    assert checkpoints.flaw(run.checkpoint(8)) == ""


@pytest.mark.parametrize(("trained", "flaw"), [(0.0, "all zero (every lora_B)"), (1.0, "")])
def test_so_is_one_whose_beginning_alone_is_not_zero(run, saver, config, trained, flaw):
    pissa = config("lora.init_lora_weights=pissa")
    saver.identity = checkpoints.identity_of(pissa, "rows", "weights")
    one = snapshot()
    for name, values in one.adapter.items():
        values[:, :4] = trained if "lora_B" in name else 1.0
    save(saver, 4, one)
    assert flaw in (found := checkpoints.flaw(run.checkpoint(4)))
    assert bool(found) == bool(flaw)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(run, saver, monkeypatch, value):
    saver.limit, saver.warn = 1, Warned()
    save(saver, 4)
    save(saver, 8, snapshot(value))
    assert saver.failure == "checkpoint-8 was not saved: its weights are not finite (layer.0.lora_A.weight)"
    assert names(run) == ["checkpoint-4"]
    monkeypatch.setattr("qwenlora.trainer.loop.saver.not_finite", lambda _: "")
    save(saver, 8, snapshot(value))
    assert "not finite (layer.0.lora_A.weight)" in checkpoints.flaw(run.checkpoint(8))


def test_what_changed_since_is_listed_or_refused_by_name(run, saver, config, identity):
    save(saver, 4)

    def choose(*overrides, data="rows", base="weights", allowed=()):
        return checkpoints.choose(
            run, "auto", checkpoints.identity_of(config(*overrides), data, base), allowed
        )

    changed = choose("train.max_steps=50", "launch.nproc_per_node=4", "run_dir=elsewhere").changed
    assert changed == "train.max_steps was null, now 50, launch.nproc_per_node was null, now 4"
    for overrides, words in (
        (
            ["train.seed=1"],
            "train.seed was 42, now 1; to go on all the same: --allow-config-change train.seed",
        ),
        (["lora.r=8"], "lora.r was 16, now 8"),
    ):
        with pytest.raises(ValueError, match=words):
            choose(*overrides)
    with pytest.raises(ValueError, match="was trained on other data"):
        choose(data="others")
    with pytest.raises(ValueError, match="base model with other weights"):
        choose(base="others")
    assert choose(
        "train.seed=1", data="others", base="o", allowed=["train.seed", "data.train", "model"]
    ).folder
    for allowed in (["data"], ["model.attn_implementation"]):
        with pytest.raises(ValueError, match="base model with other weights"):
            choose(base="others", allowed=allowed)
    for allowed in (["model"], ["data.num_proc"], ["train"]):
        with pytest.raises(ValueError, match="was trained on other data"):
            choose(data="others", allowed=allowed)


def test_a_checkpoint_is_known_by_what_it_is_not_by_its_name(run, saver, identity):
    save(saver, 4)
    save(saver, 8)
    run.checkpoint(8).rename(run.checkpoint(80))
    chosen = checkpoints.choose(run, "auto", identity)
    assert (chosen.folder, chosen.passed_over) == (
        run.checkpoint(4),
        ["checkpoint-80 is checkpoint-8 by another name"],
    )
    aside = run.checkpoint(80).rename(run.path / "abandoned-checkpoint-8")
    assert checkpoints.choose(run, "abandoned-checkpoint-8", identity).folder == aside
    assert checkpoints.read(aside).step == 8
    with pytest.raises(ValueError, match="is a run, not one of its checkpoints: checkpoint-4"):
        checkpoints.choose(run, str(run.path), identity)


def test_a_manifest_of_an_unknown_config_is_refused_in_words(run, saver, identity):
    identity.config["train"]["of_tomorrow"] = 1
    save(saver, 4)
    with pytest.raises(ValueError, match="with a config that this version of qwenlora does not know"):
        checkpoints.choose(run, "checkpoint-4", identity)


def test_sizes_alone_show_a_truncated_file(run, saver):
    save(saver, 4)
    file = run.checkpoint(4) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "optimizer.safetensors of " in checkpoints.flaw(run.checkpoint(4), thorough=False)


def test_everything_is_on_the_disk_before_the_name_is_there(run, saver, monkeypatch):
    """The system's calls, in order: files, manifest, folder, rename, parent, then the removal of an old
    checkpoint."""
    import os

    saver.limit = 1
    save(saver, 4)
    (run.metrics).write_text("{}\n")
    calls = []
    fsync, rename = os.fsync, os.rename

    def record(text: object) -> None:
        calls.append(str(text).replace(str(run.path), ""))

    def file_of(descriptor: int) -> Path:
        return Path(f"/proc/self/fd/{descriptor}").readlink()

    monkeypatch.setattr(os, "fsync", lambda descriptor: (record(file_of(descriptor)), fsync(descriptor))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (record(f"{a} -> {b}"), rename(a, b)))
    save(saver, 8)
    staging = "/.staging-checkpoint-8"
    files = [f"{staging}/{name}" for name in FILES if name != "manifest.json"]
    expected = [
        *files,
        "/metrics.jsonl",
        f"{staging}/manifest.json",
        staging,
        f"{staging} -> /checkpoint-8",
        "",
    ]
    assert calls == [*expected, "/checkpoint-4 -> /.removing-checkpoint-4"]


def test_old_ones_are_dropped_once_the_new_one_is_whole_but_never_the_best(run, saver):
    saver.limit = 2
    (run.checkpoint(99)).mkdir()  # damaged: neither counted nor removed
    losses = {1: 9.0, 2: 1.0, 3: 5.0, 4: 5.0, 5: 2.0}
    for step in range(1, 6):
        save(saver, step, losses={past: loss for past, loss in losses.items() if past <= step} | {77: 0.0})
    assert names(run) == ["checkpoint-2", "checkpoint-5", "checkpoint-99"]
    saver.limit = 1
    save(saver, 6, losses={5: 2.0, 6: 3.0})
    assert names(run) == ["checkpoint-5", "checkpoint-6", "checkpoint-99"]
    saver.limit = None
    save(saver, 7)
    assert len(run.checkpoints()) == 4


def test_a_step_saved_again_is_replaced(run, saver):
    save(saver, 4)
    save(saver, 4, snapshot(2.0))
    assert load_file(run.checkpoint(4) / "adapter_model.safetensors")["layer.0.lora_A.weight"].eq(2).all()
    assert names(run) == ["checkpoint-4"]


def test_leftovers_of_killed_attempts_are_cleared_and_never_taken_for_checkpoints(run, saver):
    save(saver, 4)
    for name in (".staging-checkpoint-8", ".removing-checkpoint-2"):
        shutil.copytree(run.checkpoint(4), run.path / name)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-4"]
    from transformers.trainer_utils import get_last_checkpoint

    assert get_last_checkpoint(str(run.path)) == str(run.checkpoint(4))
    checkpoints.clear_leftovers(run)
    assert names(run) == ["checkpoint-4"], "and checkpoint-4 by the name of 8 is none"


def test_one_that_was_written_but_not_yet_renamed_is_kept(run, saver, identity):
    save(saver, 4)
    run.checkpoint(4).rename(run.path / ".staging-checkpoint-4")
    checkpoints.clear_leftovers(run)
    assert checkpoints.choose(run, "auto", identity).folder == run.checkpoint(4)


def test_any_error_of_the_writer_is_reported(run, saver, monkeypatch):
    saver.warn, saver.in_background = Warned(), True
    monkeypatch.setattr("qwenlora.trainer.loop.saver.save_file", lambda *_, **__: 1 / 0)
    save(saver, 4)
    assert saver.failure == "checkpoint-4 was not saved: division by zero"
    assert names(run) == []


def test_a_rotation_that_fails_is_not_a_save_that_failed(run, saver, monkeypatch):
    saver.warn, saver.limit = Warned(), 1
    save(saver, 4)

    def busy(*_):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(
        checkpoints, "remove", lambda folder: busy() if folder.name == "checkpoint-4" else None
    )
    save(saver, 8)
    assert (saver.failure, saver.warn) == (
        "",
        ["an old checkpoint could not be removed: Directory not empty"],
    )


def test_writing_in_the_background_gives_the_same_bytes(run, identity, saver):
    save(saver, 4)
    expected = {file.name: file.read_bytes() for file in run.checkpoint(4).iterdir()}
    shutil.rmtree(run.checkpoint(4))
    saver.in_background = True
    save(saver, 4)
    assert {file.name: file.read_bytes() for file in run.checkpoint(4).iterdir()} == expected


# ---- what goes wrong


class Warned(list):
    def __call__(self, line: str) -> None:
        self.append(line)


def test_a_full_disk_costs_the_save_and_no_checkpoint(run, saver, identity):
    import resource

    saver.warn = warned = Warned()
    save(saver, 4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        save(saver, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saver.failure.startswith("checkpoint-8 was not saved: File too large")
    assert warned == [f"{saver.failure}; the newest whole one is checkpoint-4"]
    assert names(run) == ["checkpoint-4"]
    save(saver, 12)
    assert saver.failure == ""
    assert checkpoints.choose(run, "auto", identity).folder == run.checkpoint(12)


def test_a_folder_that_was_deleted_is_reported_and_not_made_again(run, saver):
    saver.warn = warned = Warned()
    shutil.rmtree(run.path)
    save(saver, 4)
    assert "checkpoint-4 was not saved: No such file or directory" in warned[0]
    assert not run.path.exists()


@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_that_hangs_ends_by_its_limit(run, identity, monkeypatch, in_background):
    import threading

    given_up, release = threading.Event(), threading.Event()
    messages = []
    monkeypatch.setattr("qwenlora.trainer.loop.saver.sync", lambda _: release.wait(20))

    def give_up(message):
        messages.append(message)
        given_up.set()
        release.set()

    saver = Saver(run, identity, 1, limit=None, in_background=in_background, timeout_s=0.2, give_up=give_up)
    saver.save(4, snapshot(), {"state.json": "{}"}, {})
    assert given_up.wait(10)
    saver.wait()
    assert "checkpoint-4 was not saved in checkpoint.timeout_s=0.2 s: the file system of" in messages[0]


def test_a_slow_file_system_does_not_hold_up_training(run, identity, monkeypatch):
    import threading

    release = threading.Event()
    monkeypatch.setattr("qwenlora.trainer.loop.saver.sync", lambda _: release.wait(20))
    saver = Saver(run, identity, 1, limit=None, in_background=True, timeout_s=600)
    saver.save(4, snapshot(), {"state.json": "{}"}, {})  # comes back although the disk does not
    assert run.checkpoints() == []
    release.set()
    saver.wait()
    assert [path.name for path in run.checkpoints()] == ["checkpoint-4"]


@pytest.fixture
def memory():
    memory = Snapshots()
    yield memory
    memory.close()


@pytest.fixture
def keeper(memory, identity):
    return Keeper(memory.paths, identity, 1, print)


def keep(keeper, step):
    assert keeper.can_keep()
    keeper.keep(step, snapshot(), {"state.json": state(True).revised(step=step).text()})


def test_the_two_newest_snapshots_are_kept_with_all_that_a_checkpoint_has(keeper, memory, run):
    keeper.constant = {"adapter_config.json": b"{}"}
    for step in (3, 4, 5):
        keep(keeper, step)
    keeper.wait()
    assert names(run) == []
    assert memory.save_newest(run) == ("checkpoint-5", [])
    assert sorted(path.name for path in run.checkpoint(5).iterdir()) == FILES
    os.truncate(memory.paths[0], 0)  # 5 went to the first place again
    checkpoints.remove(run.checkpoint(5))
    assert memory.save_newest(run) == ("checkpoint-4", [])


def test_no_snapshot_is_kept_while_a_save_is_under_way(run, identity, keeper, monkeypatch):
    import threading

    release = threading.Event()
    monkeypatch.setattr("qwenlora.trainer.loop.saver.sync", lambda _: release.wait(20))
    saver = Saver(run, identity, 1, limit=None, in_background=True, timeout_s=600)
    rank_0 = SimpleNamespace(saver=saver, keeper=keeper)
    saver.save(4, snapshot(), {"state.json": state().text()}, {})
    assert not LoraTrainer._can_keep(rank_0)
    release.set()
    saver.wait()
    assert LoraTrainer._can_keep(rank_0)


@pytest.mark.parametrize("hinders", ["little memory", "a weight that is not finite"])
def test_what_cannot_be_kept_is_said_once_and_training_goes_on(
    keeper, saver, memory, run, monkeypatch, hinders
):
    warned = []
    monkeypatch.setattr(keeper, "warn", warned.append)
    if hinders == "little memory":
        monkeypatch.setattr("qwenlora.trainer.loop.keeper.free_memory", lambda: 100)
    else:
        monkeypatch.setattr("qwenlora.trainer.loop.keeper.not_finite", lambda _: "lora_A")
    keep(keeper, 4)
    assert not keeper.can_keep(), "and none is tried again"
    (line,) = warned
    assert line.startswith("no more snapshots in memory: ")
    assert memory.save_newest(run) == ("", [])
    monkeypatch.undo()
    save(saver, 5)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-5"]


def test_an_adapter_of_other_shapes_does_not_fit(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qwenlora.trainer.loop.state import adapter_of, restore_adapter

    def model(**lora):
        base = AutoModelForCausalLM.from_pretrained(tiny)
        return get_peft_model(base, LoraConfig(**{"target_modules": "all-linear", "r": 8} | lora))

    save_file({k: v.contiguous() for k, v in adapter_of(model()).items()}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    restore_adapter(model(), content, tmp_path)
    with pytest.raises(ValueError, match=r"lora_A\.weight is \[8, \d+\] there and \[4, \d+\] here"):
        restore_adapter(model(r=4), content, tmp_path)
    with pytest.raises(ValueError, match=r"has base_model.*_proj.*, the model does not"):
        restore_adapter(model(target_modules=["q_proj"]), content, tmp_path)
