"""A site file is read or refused in one line a problem, and what it says reaches sbatch as plain words."""

import json
import shlex
from pathlib import Path

import pytest

from qwenlora.configs import load_config
from qwenlora.jobs.submission.site import PACKAGED, Site, load_site

MINIMAL = "model: {name_or_path: tiny}\ndata: {train: example}\n"


@pytest.fixture
def refusal(tmp_path):
    def refusal(text: str) -> str:
        file = tmp_path / "my.yaml"
        file.write_text(text)
        with pytest.raises(ValueError, match="my.yaml") as caught:
            load_site(file)
        return str(caught.value).replace(f"{file}:", "")

    return refusal


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QWENLORA_SITE", raising=False)


@pytest.mark.parametrize("file", sorted(PACKAGED.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_sites_are_sound(file):
    load_site(file)


def test_a_site_is_found_by_name_here_before_the_package_and_by_the_environment(tmp_path, monkeypatch):
    assert load_site() == Site()
    assert load_site("example").file == PACKAGED / "example.yaml"
    (tmp_path / "configs" / "clusters").mkdir(parents=True)
    mine = tmp_path / "configs" / "clusters" / "example.yaml"
    mine.write_text("partition: mine")
    assert load_site("example").partition == "mine"
    monkeypatch.setenv("QWENLORA_SITE", "example")
    assert load_site().file == mine
    assert load_site(mine).partition == "mine"


def test_a_name_that_is_no_site_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"site exampel: no configs/clusters/exampel.yaml .*; did you mean example\?"
    ):
        load_site("exampel")


def test_an_unknown_key_is_refused_with_the_nearest(refusal):
    assert refusal("account: a\npartiton: gpu") == "2: partiton: no such key; did you mean partition?"


@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude"]
)
@pytest.mark.parametrize(
    "value", ["a b", "a\nb", "; rm -rf x", "$(id)", "`id`", "a#b", "'", '"', "a\\b", "", "节点", "a>b"]
)
def test_what_a_shell_or_sbatch_would_read_in_a_value_is_refused(refusal, key, value):
    assert refusal(f"{key}: {json.dumps(value, ensure_ascii=False)}").startswith(f"1: {key}=")


@pytest.mark.parametrize("value", ["a100&ib", "[rack1|rack2]", "gpu*2", "(a|b)&!c", "intel-8468"])
def test_slurm_s_own_expressions_are_taken(tmp_path, value):
    (tmp_path / "my.yaml").write_text(f"constraint: '{value}'")
    assert load_site(tmp_path / "my.yaml").command_line()[0] == f"--constraint={value}"


def test_options_that_are_qwenlora_s_or_have_a_key_are_refused(refusal):
    assert "sbatch.output: expected an option that qwenlora does not set itself" in refusal(
        "sbatch: {output: x}"
    )
    assert "use the key of the site file" in refusal("sbatch: {time: 3}")
    assert "use the key of the site file" in refusal("sbatch: {gpus-per-node: 3}")
    assert "sbatch.x y: expected a long option" in refusal("sbatch: {x y: 1}")
    assert 'sbatch.mail-type="a b": expected letters' in refusal("sbatch: {mail-type: a b}")


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD", "AWS_SECRET"])
def test_secrets_are_kept_out_of_files_and_out_of_the_message(refusal, name):
    line = refusal(f"environment: {{{name}: hunter2}}")
    assert line.startswith(f"1: environment.{name}: expected a name that is no secret's")
    assert "export it in the shell that submits" in line
    assert "hunter2" not in line


def test_names_of_variables_are_checked_and_values_are_one_line(refusal):
    assert "environment.a b: expected a variable's name" in refusal("environment: {a b: 1}")
    assert "environment.A=true: expected a string or an integer or a number" in refusal(
        "environment: {A: true}"
    )
    assert "expected text on one line" in refusal('environment: {A: "a\\nb"}')


def test_the_env_file_lies_beside_the_site_file(tmp_path, refusal):
    (tmp_path / "my.yaml").write_text("env_file: env.sh")
    (tmp_path / "env.sh").touch()
    site = load_site("my.yaml")
    assert site.env_file == str(tmp_path / "env.sh")
    assert site.command_line()[-1] == f"--export=ALL,QWENLORA_ENV={tmp_path}/env.sh"
    assert refusal("env_file: no.sh") == f"1: env_file=no.sh: no such file (looked for {tmp_path}/no.sh)"


def test_the_command_prints_one_line_of_words_for_sbatch(qwenlora, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "partition: gpu,low\nnodes: 2\ngpus_per_node: 8\nmem_gb: 1.5\ntimeout_min: 60\nexclusive: true\n"
        "sbatch: {mail-type: 'END,FAIL', contiguous: true, no-kill: false}\nsrun_args: [--mpi=none]\n"
    )
    answer = qwenlora("site", "my.yaml")
    assert shlex.split(answer.stdout) == [
        *("--partition=gpu,low", "--mem=1536M", "--exclusive", "--mail-type=END,FAIL", "--contiguous"),
        *("--signal=USR1@120", "--nodes=2", "--gpus-per-node=8", "--time=60"),
    ]
    assert answer.stderr == "note: options of sbatch cannot say srun_args; qwenlora submit does\n"


def test_a_site_s_config_lies_below_the_run_s(tmp_path):
    run = Path("run.yaml")
    run.write_text(MINIMAL + "lora: {r: 4}\n")
    defaults = {"lora.r": 8, "lora.lora_alpha": 5, "log.wandb": "offline"}
    config = load_config(run, ["log.wandb=off"], defaults)
    assert (config.lora.r, config.lora.lora_alpha, config.log.wandb) == (4, 5, "off")


def test_a_mistake_in_a_site_s_config_is_said_to_be_there(tmp_path):
    run = Path("run.yaml")
    run.write_text(MINIMAL)
    with pytest.raises(ValueError, match=r"^site\.yaml: lora\.rnk=8: no such key"):
        load_config(run, (), {"lora.rnk": 8}, "site.yaml")
    with pytest.raises(ValueError, match=r'^site\.yaml: lora\.r="x": expected an integer'):
        load_config(run, (), {"lora.r": "x"}, "site.yaml")
    run.write_text(MINIMAL + "lora: 5\n")
    with pytest.raises(ValueError, match=r"run\.yaml:3: lora=5: expected a section"):
        load_config(run, (), {"lora.r": 8}, "site.yaml")
