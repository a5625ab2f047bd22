"""slurm/train.sh on a real Slurm: what it passes on, where it works from; two nodes train what one machine
does."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from slurm_runs import QWENLORA, TRAIN, adapter, attempts, locally, sbatch, write_config

import qwenlora
from qwenlora.jobs import submit
from qwenlora.slurm.scripts import copy_scripts

HOSTILE = [
    "a b",
    "it's",
    'say "hi"',
    "$HOME `id` $(id)",
    "; rm -rf x",
    "中文 路径",
    "*",
    "",
    "a\nb",
    "--nodes=9",
]


def test_all_shell_scripts_are_shellcheck_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck; apt-get install shellcheck")
    scripts = sorted(Path(qwenlora.__path__[0], "slurm").glob("*.sh"))
    assert len(scripts) == 3
    answer = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


def test_arguments_arrive_intact_from_any_folder(cluster, tmp_path):
    folder = tmp_path / "a folder; 文"
    folder.mkdir()
    command = folder / "my qwenlora"
    command.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"$ARGUMENTS_FILE"\n')
    command.chmod(0o755)
    output = tmp_path / "output"
    copy_scripts(folder / "my scripts")  # as `qwenlora slurm scripts` does
    train = folder / "my scripts" / "train.sh"
    job = cluster.sbatch(
        train, *HOSTILE, cwd=folder, env={"QWENLORA": str(command), "ARGUMENTS_FILE": str(output)}
    )
    cluster.wait(job, "COMPLETED", timeout=900)
    assert output.read_text().split("\0")[:-1] == ["train", *HOSTILE]


def test_the_site_file_sets_the_environment_and_the_container(cluster, tmp_path):
    site = tmp_path / "my env.sh"
    output = tmp_path / "output"
    site.write_text(
        f"export SITE='a b'\ncontainer=(env 'INSIDE=c d' bash -c 'echo \"$SITE|$INSIDE|$*\" >\"{output}\"'"
        " bash)\n"
    )
    job = cluster.sbatch(
        TRAIN, "my.yaml", cwd=tmp_path, env={"QWENLORA_ENV": str(site), "QWENLORA": "qwenlora"}
    )
    cluster.wait(job, "COMPLETED", timeout=900)
    assert output.read_text() == "a b|c d|qwenlora train my.yaml\n"


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ([], {}, "usage: sbatch"),
        (["no.yaml"], {}, "error: no config file no.yaml"),
        (
            ["my.yaml"],
            {"QWENLORA": "nothing-of-that-name"},
            "error: no command 'nothing-of-that-name' on node",
        ),
        (["my.yaml"], {"QWENLORA_ENV": "/no/env.sh"}, "error: /no/env.sh failed"),
        (["my.yaml", "lora.r=x"], {}, 'error: command line: lora.r="x": expected an integer'),
        (["my.yaml", "strategy.name=ddp", "strategy.shard_group=node"], {}, "error: strategy.name=ddp with"),
    ],
)
def test_a_refusal_is_one_line_and_is_not_requeued(cluster, tmp_path, arguments, env, message):
    write_config(tmp_path, 4)
    job = cluster.sbatch(TRAIN, *arguments, cwd=tmp_path, env={"QWENLORA": QWENLORA} | env)
    cluster.wait(job, "FAILED", timeout=900)
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert message in output
    assert "Traceback" not in output
    assert "requeueing" not in output
    assert " ExitCode=2:0" in cluster.scontrol("show", "job", job)


@pytest.mark.slow
def test_two_nodes_with_two_ranks_each_train_what_one_machine_with_four_does(cluster, tmp_path, monkeypatch):
    config = write_config(tmp_path, 12)
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/nodes", "launch.nproc_per_node=2")
    cluster.wait(job, "COMPLETED", timeout=900)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    overrides = {"run_dir": "runs/python", "launch.nproc_per_node": 2}
    submitted = submit(config, overrides, nodes=2, timeout_min=20)
    cluster.wait(submitted.job_id, "COMPLETED", timeout=900)
    result = submitted.result()
    assert (result["reason"], result["step"]) == ("done", 12)  # submitit's state may lag behind Slurm's
    locally(tmp_path, config, "alone", 4)
    assert (
        adapter(tmp_path / "runs/nodes")
        == adapter(tmp_path / "runs/alone")
        == adapter(tmp_path / "runs/python")
    )
    (attempt,) = attempts(tmp_path / "runs/nodes")
    assert attempt["nodes"] == ["node1", "node2"]
    assert (attempt["processes"], attempt["reason"], attempt["job_id"]) == (4, "done", job)
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert "checked 4 ranks on 2 nodes: they reduce at" in output


@pytest.mark.slow
@pytest.mark.long
def test_zero2_is_the_same_by_slurm_by_torchrun_and_by_deepspeeds_launcher(cluster, tmp_path):
    config = write_config(tmp_path, 6)
    zero2 = ("strategy.name=zero2", "train.eval_strategy=no")
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/slurm", "launch.nproc_per_node=1", *zero2)
    cluster.wait(job, "COMPLETED", timeout=900)
    locally(tmp_path, config, "torchrun", 2, *zero2)
    locally(tmp_path, config, "deepspeed", 2, "launch.launcher=deepspeed", *zero2)
    ways = ("slurm", "torchrun", "deepspeed")
    assert len({adapter(tmp_path / "runs" / way) for way in ways}) == 1
    stages = [
        json.loads((tmp_path / "runs" / way / "deepspeed.json").read_text())["zero_optimization"]
        for way in ways
    ]
    assert {settings["stage"] for settings in stages} == {2}


@pytest.mark.slow
def test_two_jobs_that_share_nodes_do_not_collide(cluster, tmp_path):
    config = write_config(tmp_path, 8)
    jobs = [sbatch(cluster, tmp_path, config, f"run_dir=runs/{name}") for name in ("one", "two")]
    for job in jobs:
        cluster.wait(job, "COMPLETED", timeout=300)
    starts = [attempts(tmp_path / "runs" / name)[0] for name in ("one", "two")]
    assert starts[0]["start"] < starts[1]["end"]
    assert starts[1]["start"] < starts[0]["end"]
    assert adapter(tmp_path / "runs/one") == adapter(tmp_path / "runs/two")
    records = [json.loads((tmp_path / "runs" / name / "facts.json").read_text()) for name in ("one", "two")]
    assert records[0]["data_folder"] == records[1]["data_folder"]


def test_a_signal_before_anything_listens_does_not_cost_the_job(cluster, tmp_path):
    """Python takes its time to start; until then USR1 ends it."""
    command = tmp_path / "slow"
    command.write_text("#!/bin/bash\n((${SLURM_RESTART_COUNT:-0})) && exit 0\nexec sleep 60\n")
    command.chmod(0o755)
    job = cluster.sbatch(TRAIN, "my.yaml", cwd=tmp_path, env={"QWENLORA": str(command)})
    cluster.wait(job, "RUNNING")
    time.sleep(1)
    cluster.scancel("--signal=USR1", job)
    deadline = time.monotonic() + 120
    while "Restarts=1" not in cluster.scontrol("show", "job", job):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    cluster.wait(job, "COMPLETED", timeout=900)


@pytest.mark.slow
def test_a_job_that_is_killed_at_its_time_limit_comes_back(cluster, tmp_path):
    """Its processes hear nothing, and are killed after KillWait."""
    command = tmp_path / "deaf"
    script = (
        "#!/bin/bash",
        "((${SLURM_RESTART_COUNT:-0})) && exit 0",
        "trap '' TERM USR1",
        "sleep 200 & wait",
        "sleep 200",
    )
    command.write_text("\n".join(script))
    command.chmod(0o755)
    job = cluster.sbatch("--time=10", TRAIN, "my.yaml", cwd=tmp_path, env={"QWENLORA": str(command)})
    cluster.wait(job, "RUNNING")
    time.sleep(1)
    cluster.scontrol("update", f"JobId={job}", "EndTime=now+3seconds")
    deadline = time.monotonic() + 180  # Slurm looks every 30 s
    while "Restarts=1" not in cluster.scontrol("show", "job", job):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    cluster.wait(job, "COMPLETED", timeout=900)
