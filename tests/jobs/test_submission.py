"""What is submitted is known to be sound, reaches sbatch as it was meant, and ends with the run's summary."""

import configparser
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import submitit

from qwenlora.configs import load_config
from qwenlora.jobs import submit, submit_sweep
from qwenlora.jobs.ledger import submissions
from qwenlora.jobs.submission.options import JobOptions, job_spec
from qwenlora.jobs.submission.site import Site
from qwenlora.jobs.submission.submit import prepare, prepare_sweep
from qwenlora.jobs.submission.sweeps import parse_grid
from qwenlora.jobs.task import RunTask
from qwenlora.launch import agent
from qwenlora.run import bad_nodes
from qwenlora.run.bad_nodes import BadNodes
from qwenlora.run.folder import RunFolder
from qwenlora.run.package import package, snapshot
from qwenlora.run.signals import STOP_SIGNALS
from qwenlora.slurm.query import ClusterNode

GOLDEN = Path(__file__).parent / "golden"
CONFIG = """
model: {name_or_path: tiny}
data: {train: example, eval: example}
train: {max_steps: 2, save_strategy: 'no', per_device_train_batch_size: 4, per_device_eval_batch_size: 20}
log: {wandb: off}
"""
SITE = """
partition: gpu,preempt
account: myproject
constraint: a100&ib
mem_gb: 100
cpus_per_task: 32
exclusive: true
signal_lead_s: 120
python: [apptainer, exec, --nv, /images/my image.sif, python]
srun_args: [--mpi=none]
environment: {NCCL_SOCKET_IFNAME: ib0, GREETING: "it's $(id) 你好"}
sbatch: {mail-type: "END,FAIL"}
"""
HOSTILE = [
    "; rm -rf x",
    "$(touch x)",
    "`touch x`",
    "a'b\"c",
    "#x",
    "你好 世界",
    "-x",
    "*",
    "&& touch x",
    "{a,b}",
    "!x",
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("QWENLORA_SITE", "QWENLORA_ENV"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "my.yaml").write_text(CONFIG)
    return tmp_path


def options(**more) -> JobOptions:
    return {"timeout_min": 60} | more


def with_placeholders(text: str, folder: Path) -> str:
    for path, name in ((str(folder), "/folder"), (sys.executable, "/python"), (str(package()), "/package")):
        text = text.replace(path, name)
    return text + "\n"


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- the text that sbatch reads


def test_the_text_of_a_job_as_a_whole(folder):
    (folder / "site.yaml").write_text(SITE)
    ready = prepare(
        "my.yaml", {"lora.r": 32}, options(nodes=2, gpus_per_node=2, snapshot=True, site="site.yaml")
    )
    assert with_placeholders(ready.text(), folder) == (GOLDEN / "job.sbatch").read_text()
    assert ready.gpu_hours == 4


@pytest.mark.parametrize("nodes", ["2-4", (2, 4)])
def test_a_job_may_take_what_nodes_there_are(folder, monkeypatch, nodes):
    ready = prepare("my.yaml", {}, options(nodes=nodes, gpus_per_node=1))
    assert "\n#SBATCH --nodes=2-4\n" in ready.text()
    assert ready.gpu_hours == 4, "at most"
    bin = folder / "bin"
    bin.mkdir()
    (bin / "sbatch").write_text("#!/bin/bash\necho Submitted batch job 7\n")
    (bin / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    (job,) = ready.submit()
    assert job.job_id == "7"
    assert "ntasks-per-node" not in ready.text(), "Slurm would take the fewest"
    sweep = prepare_sweep("my.yaml", {"lora.r": [8, 16]}, {"run_dir": "s"}, options(nodes=nodes))
    assert [job.job_id for job in sweep.submit()] == ["7_0", "7_1"]
    (noted,) = submissions(ready.target)
    assert (noted.min_nodes, noted.nodes) == (2, 4)
    assert job_spec(options(nodes="3"), Site(), 1, "").nodes == (3, 3)


def excluded(ready) -> str | None:
    found = re.search("^#SBATCH --exclude=(.*)$", ready.text(), re.MULTILINE)
    return found and found[1].strip("'")


def test_a_job_leaves_out_bad_nodes_besides_those_of_the_site_while_enough_stay(folder, monkeypatch):
    names = [f"n{number}" for number in range(1, 7)]
    monkeypatch.setattr(bad_nodes, "cluster_nodes", lambda _: [ClusterNode(name, "", True) for name in names])
    (folder / "site.yaml").write_text("exclude: n[1-2]\n")
    site = options(site="site.yaml")
    assert excluded(prepare("my.yaml", {}, site)) == "n[1-2]"
    for host in ("n3", "n1", "gone"):
        BadNodes(folder / "runs").add("driver", host, "Xid")
    assert excluded(prepare("my.yaml", {}, site)) == "n[1-2],n3"
    assert excluded(prepare("my.yaml", {}, site | {"nodes": 4})) == "n[1-2]", "three would be left"
    assert excluded(prepare("my.yaml", {}, options())) == "n1,n3"
    assert excluded(prepare("my.yaml", {"run_dir": "others/my"}, options())) is None
    (folder / "site.yaml").write_text("nodelist: n[4-5]\n")
    assert excluded(prepare("my.yaml", {}, site)) is None
    BadNodes(folder / "s").add("driver", "n6", "Xid")
    assert excluded(prepare_sweep("my.yaml", {"lora.r": [8, 16]}, {"run_dir": "s"}, options())) == "n6"


def test_the_text_of_a_sweep_as_a_whole(folder):
    ready = prepare_sweep("my.yaml", {"lora.r": [8, 16], "train.seed": [1, 2]}, (), options(), 2)
    assert with_placeholders(ready.text(), folder) == (GOLDEN / "sweep.sbatch").read_text()


@pytest.fixture
def what_arrives(folder, tmp_path_factory):
    """Return what runs a text in bash, and returns what srun was called with."""
    bin = tmp_path_factory.mktemp("bin")
    (bin / "srun").write_text(
        '#!/bin/bash\nprintf "%s\\0" "$@" >"$ARRIVED"\nenv -0 >"$ARRIVED.env"\nexit 3\n'
    )
    (bin / "srun").chmod(0o755)

    def what_arrives(text: str) -> tuple[list[str], dict[str, str]]:
        script = bin / "script"
        script.write_text(text)
        environment = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "ARRIVED": str(bin / "arrived")}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "5"}
        answer = subprocess.run(
            ["bash", script], env=environment, capture_output=True, text=True, check=False
        )
        assert (answer.returncode, answer.stderr) == (3, "")
        pairs = (pair.partition("=") for pair in (bin / "arrived.env").read_text().split("\0") if pair)
        return (bin / "arrived").read_text().split("\0")[:-1], {name: value for name, _, value in pairs}

    return what_arrives


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_arrive_as_they_are_or_harmless(folder, what_arrives, hostile):
    (folder / "site.yaml").write_text(
        json.dumps({"environment": {"MINE": hostile}, "srun_args": [f"--x={hostile}"]})
    )
    ready = prepare(
        "my.yaml",
        {"run_dir": f"runs/{hostile}", "log.wandb_name": hostile},
        options(name=hostile, site="site.yaml"),
    )
    before = left(folder)
    arguments, environment = what_arrives(ready.text())
    assert left(folder) == before
    assert arguments[-1] == str(folder / "runs" / ".submitted" / hostile / "1")
    assert f"--x={hostile}" in arguments
    assert environment["MINE"] == hostile
    assert environment["SRUN_CPUS_PER_TASK"] == "5"
    assert ready.configs[0].log.wandb_name == hostile
    (name,) = (line for line in ready.text().splitlines() if "--job-name" in line)
    assert name.removeprefix("#SBATCH --job-name=").replace("_", "").replace("-", "").isalnum()


@pytest.mark.parametrize("letter", ["\n", "%", "\\", "\t", "\x1b"])
def test_letters_that_slurm_s_file_names_cannot_hold_are_refused(letter):
    with pytest.raises(
        ValueError, match="run_dir=.* means something else in Slurm's file names; choose another"
    ):
        prepare("my.yaml", {"run_dir": f"runs/a{letter}b"}, options())


# ---- refusals


@pytest.mark.parametrize(
    ("overrides", "more", "message"),
    [
        ({"data.train": "no.jsonl"}, {}, r"data\.train=no\.jsonl: no such file"),
        ({"lora.rnk": 3}, {}, r"lora\.rnk=3: no such key"),
        ({}, {"nodes": 5}, r"global_batch_size=16 makes 4 micro-batches .*=4, fewer than 5 .*batch_size: 3"),
        (
            {"train.per_device_train_batch_size": 16},
            {"gpus_per_node": 2},
            r"makes 1 micro-batch of .*=16, fewer than 2 processes",
        ),
        ({}, {"nodes": 2, "cluster": "local"}, "nodes=2: cluster=local is this machine alone"),
        ({}, {"cluster": "cloud"}, "cluster=cloud: expected slurm, local or debug"),
        ({}, {"timeout_min": 0}, "timeout_min=0: expected a whole number, 1 or more"),
        (
            {},
            {"timeout_min": None},
            "timeout_min is missing: minutes, as --timeout-min 600; or set it in a site file",
        ),
        ({}, {"gpus_per_node": -1}, "gpus_per_node=-1: expected a whole number, 0 or more"),
        ({}, {"nodes": True}, "nodes=True: expected a whole number"),
        *(
            ({}, {"nodes": nodes}, rf"nodes={re.escape(str(nodes))}: expected a whole number, 1 or more, or")
            for nodes in ("0", "4-2", "2-", "x", (0, 2), (1, 2, 3), (2, True))
        ),
        ({}, {"nodes": "2-5"}, r"fewer than 5"),
        ({}, {"cluster": "debug", "snapshot": True}, "snapshot has no effect with cluster=debug"),
        ({"run_dir": "a:b/c"}, {"snapshot": True}, "PYTHONPATH, which leads to a snapshot, ends at a colon"),
        ({}, {"gpu": "h101"}, "gpu h101 is unknown; did you mean H100"),
        (
            {"model.name_or_path": "Qwen/Qwen2.5-14B"},
            {"gpu": "4090", "gpus_per_node": 1},
            "needs at least .* what would fit: strategy.quantization: nf4",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(folder, overrides, more, message):
    before = left(folder)
    with pytest.raises(ValueError, match=message) as caught:
        prepare("my.yaml", overrides, options(**more)).submit()
    assert "\n" not in str(caught.value)
    assert left(folder) == before


def test_a_site_s_kind_of_gpu_refuses_what_cannot_fit_unless_the_config_lets_it(folder, capsys):
    (folder / "site.yaml").write_text("gpu: rtx4090\ngpus_per_node: 1\n")
    base = {"model.name_or_path": "Qwen/Qwen2.5-14B"}
    with pytest.raises(ValueError, match="needs at least"):
        prepare("my.yaml", base, options(site="site.yaml"))
    prepare("my.yaml", base | {"launch.plan": "warn"}, options(site="site.yaml"))
    assert capsys.readouterr().err.startswith("warning: strategy.name=auto")


def test_a_run_folder_with_another_config_is_refused(folder):
    run = RunFolder("runs/my")
    with run.claim(load_config("my.yaml")):
        run.metrics.touch()
    with pytest.raises(ValueError, match=r"holds a run with another config: lora\.r was 16, now 32"):
        prepare("my.yaml", {"lora.r": 32}, options())
    prepare("my.yaml", {"train.max_steps": 9}, options())


def test_without_sbatch_that_is_said(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    before = left(folder)
    with pytest.raises(ValueError, match="there is no sbatch on this machine; submit from a login node"):
        submit("my.yaml", timeout_min=3)
    assert left(folder) == before


def test_what_sbatch_says_is_the_refusal_and_nothing_is_left(folder, tmp_path_factory, monkeypatch, capsys):
    bin = tmp_path_factory.mktemp("bin")
    (bin / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition\nsbatch: error: no' >&2\nexit 1\n"
    )
    (bin / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="sbatch refused") as caught:
        submit("my.yaml", timeout_min=3)
    assert str(caught.value) == "sbatch refused the job: sbatch: error: invalid partition sbatch: error: no"
    assert capsys.readouterr().err == ""
    assert not [path for path in left(folder) if "1" in path]


# ---- sweeps


def test_a_sweep_names_its_runs_by_their_values():
    grid = parse_grid(["lora.r=16,32", "train.learning_rate=1e-4,3e-4"])
    ready = prepare_sweep("my.yaml", grid, ["train.seed=1"], options())
    assert [config.run_dir for config in ready.configs] == [
        "runs/my/lora.r=16,train.learning_rate=0.0001",
        "runs/my/lora.r=16,train.learning_rate=0.0003",
        "runs/my/lora.r=32,train.learning_rate=0.0001",
        "runs/my/lora.r=32,train.learning_rate=0.0003",
    ]
    assert [config.lora.r for config in ready.configs] == [16, 16, 32, 32]
    assert {config.train.seed for config in ready.configs} == {1}
    assert {RunFolder(config.run_dir).cache(config) for config in ready.configs} == {
        Path("runs/my/.prepared").absolute()
    }


@pytest.mark.parametrize("value", HOSTILE)
def test_names_of_a_sweep_s_runs_are_harmless(value):
    (config,) = prepare_sweep("my.yaml", {"log.wandb_name": [value]}, (), options()).configs
    assert config.log.wandb_name == value
    name = config.run_dir.removeprefix("runs/my/log.wandb_name=")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz_-,")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "the grid is empty"),
        ({"lora.r": []}, r"grid lora\.r=\[\]: expected a list of values"),
        ({"lora.r": "16"}, r"grid lora\.r='16': expected a list of values"),
        ({"lora.r": [16, 16]}, r"two runs would be called lora\.r=16"),
        ({"data.columns": [{"a": "b"}, {"a b": "x"}], "lora.r": [1, 1]}, "two runs would be called"),
        ({"run_dir": ["a", "b"]}, "take it out of the grid"),
        ({"lora.rnk": [16]}, r"lora\.rnk=16: no such key"),
        ({"lora.r": [16, 0]}, r"lora\.r=0: expected greater than 0"),
        ({"train.per_device_train_batch_size": [4, 0]}, "expected"),
        ({"log.wandb_name": ["x" * 300]}, "has 315 characters, 200 is the most"),
    ],
)
def test_a_sweep_with_one_bad_run_is_refused_as_a_whole(folder, grid, message):
    before = left(folder)
    with pytest.raises(ValueError, match=message):
        submit_sweep("my.yaml", grid, timeout_min=3)
    assert left(folder) == before


def test_a_sweep_is_not_for_one_machine():
    with pytest.raises(ValueError, match="would start all runs of a sweep at once"):
        submit_sweep("my.yaml", {"lora.r": [1, 2]}, cluster="local")


# ---- what a job does with the agent's exit code


@pytest.fixture
def attempt(folder, monkeypatch):
    """Return what calls a RunTask whose agent ends with a code."""
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def attempt(code: int, message: str = "", *, brought_back: bool = True):
        def run(config, **_):
            folder = RunFolder(config.run_dir)
            folder.path.mkdir(parents=True)
            folder.begin_attempt(1)
            time.sleep(0.002)  # an attempt of less than a millisecond has no goodput
            folder.end_attempt({0: "done", 75: "stopped", 2: "refused"}.get(code, "failed"), message)
            return code

        monkeypatch.setattr(agent, "run", run)
        return RunTask("my.yaml", brought_back)()

    yield attempt
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_run_that_is_done_returns_its_summary(folder, attempt):
    assert attempt(0) == {
        "run_dir": str(folder / "runs/my"),
        "adapter": None,
        "reason": "done",
        "state": "done",
        "step": 0,
        "attempts": 1,
        "goodput": 0.0,
    }


def test_other_nodes_than_the_first_return_nothing(attempt, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert attempt(0) is None


def test_who_leads_in_place_of_the_first_node_writes_its_result(tmp_path, folder, attempt, monkeypatch):
    variables = {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path), "SLURM_JOB_ID": "41"}
    for name, value in (variables | {"SLURM_PROCID": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(RunFolder, "holder", os.getpid())
    assert attempt(0) is None
    outcome, result = submitit.SlurmJob(tmp_path, "41", tasks=(0,))._get_outcome_and_result()
    assert (outcome, result["reason"], result["run_dir"]) == ("success", "done", str(folder / "runs/my"))


def test_a_stopped_run_leaves_with_75_where_it_is_brought_back(attempt):
    with pytest.raises(SystemExit) as caught:
        attempt(75)
    assert caught.value.code == 75


def test_a_stopped_run_is_a_result_where_nobody_brings_it_back(attempt):
    assert attempt(75, brought_back=False)["reason"] == "stopped"


def test_a_refused_run_raises_value_error_and_a_failed_one_runtime_error(attempt):
    with pytest.raises(ValueError, match="the data is bad"):
        attempt(2, "the data is bad")


def test_a_failed_run_says_why_and_where_its_logs_are(folder, attempt):
    with pytest.raises(RuntimeError, match=rf"the GPU is full; logs: {folder}/runs/my/logs/attempt-1"):
        attempt(1, "the GPU is full")


def test_a_request_before_anything_runs_stops_at_once(attempt, monkeypatch):
    monkeypatch.setattr(RunFolder, "begin_attempt", lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
    with pytest.raises(SystemExit) as caught:
        attempt(0)
    assert caught.value.code == 75


def test_a_pickle_of_version_0_1_is_read(folder):
    """Jobs that wait hold pickles that name the class as it was called then."""
    task = RunTask("my.yaml", brought_back=True, allowed=("lora.r",))
    old = pickle.dumps(task, protocol=0).replace(b"RunTask", b"Attempt")
    assert b"qwenlora.jobs.task" in old
    assert pickle.loads(old) == task
    assert list(vars(task)) == ["config_file", "brought_back", "fresh", "allowed"]


def test_a_ledger_of_version_0_1_is_read(folder):
    line = {"job_id": "12", "time": "2026-01-01T00:00:00.000+00:00", "cluster": "slurm", "nodes": 2}
    line |= {"gpus_per_node": 8, "cpus_per_task": 16, "timeout_min": 60, "site": None, "snapshot": True}
    line |= {"name": "my", "folder": "/f", "work_dir": "/w", "config": "/f/config.yaml"}
    run = RunFolder("runs/my")
    run.submitted.mkdir(parents=True)
    (run.submitted / "jobs.jsonl").write_text(json.dumps(line) + "\n")
    (job,) = submissions(run)
    assert (job.job_id, job.nodes, job.site, job.snapshot, job.folder) == ("12", 2, None, True, "/f")
    assert job.time.isoformat(timespec="milliseconds") == line["time"]


# ---- the real executors


def test_a_local_job_that_fails_says_why(folder):
    (folder / "my.jsonl").write_text('{"messages": 3}\n')
    job = submit("my.yaml", ["data.train=my.jsonl"], cluster="local")
    assert "ValueError" in str(job.exception())
    assert "my.jsonl:1: " in str(job.exception())


EDITED = """
import json, pathlib, sys, qwenlora
from qwenlora.jobs import submit
edited = pathlib.Path(sys.argv[1], "qwenlora")
assert pathlib.Path(qwenlora.__file__).parent == edited
two = {"launch.nproc_per_node": 2, "run_dir": "runs/我的 run"}
copied = submit("my.yaml", two, cluster="local", snapshot=True)
said = {"job": copied.job_id, "states": [copied.state]}
other = submit("my.yaml", {"run_dir": "runs/other"}, cluster="local", snapshot=False)
(edited / "trainer" / "attempt.py").write_text("raise OSError('edited')")
pathlib.Path("my.yaml").write_text("edited")
said["result"], said["screen"], said["other"] = copied.result(), copied.stdout(), str(other.exception())
said["states"].append(copied.state)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_local_job_ends_with_the_summary_and_edits_after_submitting_change_nothing(folder):
    snapshot(folder / "edited")
    answer = subprocess.run(
        [sys.executable, "-c", EDITED, folder / "edited"],
        env=os.environ | {"PYTHONPATH": str(folder / "edited")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    said = json.loads(answer.stdout.splitlines()[-1])
    result = said["result"]
    assert (result["reason"], result["step"], result["attempts"]) == ("done", 2, 1)
    assert Path(result["adapter"], "adapter_model.safetensors").exists()
    assert result["loss"] > 0
    assert result["eval_loss"] > 0
    assert said["states"] == ["RUNNING", "FINISHED"]
    assert "2 processes x" in said["screen"]
    (line,) = submissions(RunFolder("runs/我的 run"))
    assert (line.job_id, line.cluster, line.work_dir) == (said["job"], "local", str(folder))
    assert "edited" in said["other"]


def test_a_snapshot_holds_what_is_installed(folder):
    snapshot(folder / "code")
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    patterns = {"qwenlora": "", **setup["options.package_data"]}
    for room in setup["options"]["packages"].split():
        source, copy = package() / "/".join(room.split(".")[1:]), folder / "code" / room.replace(".", "/")
        for pattern in ("*.py", *setup["options.package_data"].get(room, "").replace(" ", "").split(",")):
            names = {path.relative_to(source) for path in source.glob(pattern or "*.py")}
            assert {path for path in names if not (copy / path).exists()} == set()
    assert patterns
    assert not list((folder / "code").rglob("__pycache__"))


def test_a_debug_job_runs_in_this_process_with_the_user_s_frames(folder):
    code = (
        "import os\n"
        "from qwenlora.jobs import submit\n"
        "from qwenlora.trainer import attempt\n"
        "def mine(*_): raise LookupError(os.getpid())\n"
        "attempt.train = mine\n"
        "job = submit('my.yaml', cluster='debug')\n"
        "print(job.state, os.getpid(), flush=True)\n"
        "job.result()\n"
    )
    Path("mine.py").write_text(code)
    answer = forked.run(
        [sys.executable, "mine.py"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    state, pid = answer.stdout.splitlines()[0].split()
    assert state == "QUEUED"
    assert answer.stderr.splitlines()[-1] == f"LookupError: {pid}"
    assert 'mine.py", line 4, in mine' in answer.stderr
    assert "(Pdb)" in answer.stdout  # and submitit opens a debugger there


def test_a_debug_job_ends_with_the_summary_too(folder):
    code = "from qwenlora.jobs import submit; print(submit('my.yaml', cluster='debug').result()['reason'])"
    Path("mine.py").write_text(code)
    answer = forked.run([sys.executable, "mine.py"], capture_output=True, text=True, check=False)
    assert answer.stdout.splitlines()[-1:] == ["done"], answer.stdout + answer.stderr


# ---- the command


def test_a_dry_run_shows_all_and_writes_nothing(qwenlora, folder):
    before = left(folder)
    answer = qwenlora(
        "submit", "my.yaml", "lora.r=32", "--nodes", 2, "--gpus-per-node", 2, "--timeout-min", 90, "--dry-run"
    )
    assert answer.returncode == 0, answer.stderr
    assert "\n#SBATCH --gpus-per-node=2\n" in answer.stdout
    assert "\n  r: 32\n" in answer.stdout
    assert "# GPU-hours           6 = 2 x 2 GPUs x 90 min\n" in answer.stdout
    assert f"# run folder          {folder}/runs/my\n" in answer.stdout
    assert left(folder) == before


def test_submitting_imports_no_torch():
    code = "import sys; from qwenlora.jobs import submit, submit_sweep; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


def test_the_room_itself_imports_no_submitit():
    code = "import sys, qwenlora.run.folder; print('submitit' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
    assert shutil.which("env")
