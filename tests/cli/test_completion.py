"""Shells complete what may follow: commands, options, runs, keys of a config, and their values."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
ASK = """
eval "$(qwenlora completion bash)"
[[ $(complete -p qwenlora) == "complete -o default -F _qwenlora_completion qwenlora" ]] || exit 1
ask() {
    COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
    _qwenlora_completion qwenlora; echo "${COMPREPLY[*]}"
}
"""


@pytest.fixture
def folder(tmp_path):
    for run in ("first", "second", "sweep/lr=1e-4"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "config.yaml").touch()
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path


def said(folder: Path, *argv: str, **environment: str) -> list[str]:
    answer = subprocess.run(
        argv, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert not answer.stderr
    return answer.stdout.splitlines()


def test_bash_is_told_what_may_follow(folder):
    asked = {
        "qwenlora st": "status",
        "qwenlora config k": "keys",
        "qwenlora train --res": "--resume",
        "qwenlora status ''": "runs/first runs/second runs/sweep",
        "qwenlora chat runs/se": "runs/second",
        "qwenlora diff runs/first runs/se": "runs/second",
        "qwenlora status runs/sweep/": "runs/sweep/lr=1e-4",
        "qwenlora train my.yaml lora.r": "lora.r= lora.rank_pattern=",
        "qwenlora train my.yaml lora.r = 3 train.on_": "train.on_nan=",
        "qwenlora train my.yaml log.wandb =": "auto online offline off",
        "qwenlora train my.yaml log.wandb = o": "online offline off",
        "qwenlora train my.yaml --allow-config-change lora.r": "lora.r lora.rank_pattern",
        "qwenlora train my": "",  # files, by -o default
    }
    lines = said(folder, "bash", "--norc", "-c", ASK + "\n".join(f"ask {words}" for words in asked))
    assert dict(zip(asked, lines, strict=True)) == asked


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_the_same(folder, shell):
    (script,) = ["\n".join(said(folder, "qwenlora", "completion", shell))]
    assert "_QWENLORA_COMPLETE=complete_" in script
    variables = {
        "_QWENLORA_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_ARGS": "qwenlora train my.yaml log.wandb=of",
    }
    answer = " ".join(said(folder, "qwenlora", **variables))
    assert "log.wandb=offline" in answer
    assert "log.wandb=online" not in answer


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes(folder):
    asked = ["qwenlora stat", "qwenlora status runs/s", "qwenlora train my.yaml log.wandb=of"]
    ask = "; ".join(["qwenlora completion fish | source", *(f"complete -C '{words}'" for words in asked)])
    words = [line.split("\t")[0] for line in said(folder, "fish", "--no-config", "-c", ask)]
    assert words == ["status", "runs/second", "runs/sweep", "log.wandb=off", "log.wandb=offline"]


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_completes_and_a_value_follows_a_key_at_once(folder):
    """Keys are pressed: a tab, an X to see whether a space came before it, in front what prints the line."""
    asked = ["qwenlora stat", "qwenlora train my.yaml lora.ran", "qwenlora train my.yaml train.on_nan=ro"]
    keys = "".join(f"{words}\tX\x01print -r >> said -- \n" for words in asked)
    start = "autoload -Uz compinit; compinit -u -D; source <(qwenlora completion zsh)\n"
    script = ["script", "-qec", "zsh -f -i", "/dev/null"]
    keys = f"{start}{keys}exit\n"
    subprocess.run(script, cwd=folder, env=ENVIRONMENT, input=keys, text=True, timeout=120, check=True)
    assert (folder / "said").read_text().splitlines() == [
        "qwenlora status X",
        "qwenlora train my.yaml lora.rank_pattern=X",
        "qwenlora train my.yaml train.on_nan=rollback X",
    ]
