"""Weights & Biases: one run, from rank 0, keyed on the trainer's step. It may fail; training goes on. The run
folder keeps the W&B run's id, so that every attempt continues the same W&B run."""

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
from transformers import TrainerCallback, TrainerState

from qwenlora.configs import Config
from qwenlora.run import checkpoints
from qwenlora.run.disk import write_atomically
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Facts
from qwenlora.trainer.record.metrics import Logs
from qwenlora.trainer.record.wandb_choice import Choice, choose

REACH_TIMEOUT_S = 5.0
FINISH_TIMEOUT_S = 10.0


def start(
    config: Config, run: RunFolder, facts: Facts, warn: Callable[[str], None]
) -> tuple["WandbCallback | None", str]:
    """Start W&B, if it is on; return its callback, and where the run is seen, for the start-up table."""
    try:
        choice = choose(config, run)
    except Exception as error:  # whatever W&B raises for wrong settings, training goes on
        warn(f"W&B cannot be used ({_reason(error)}): this attempt is not logged")
        return None, "off"
    if choice.mode == "off":
        return None, f"off ({choice.why})"
    wandb = WandbCallback(config, run, choice, warn)
    place = wandb.start()
    sizes = {
        f"data/{side}_{name}": count
        for side, counts in facts.data.items()
        for name, count in (("rows", counts.rows), ("tokens", counts.tokens))
    }
    wandb.summarize({"data/bad_rows": facts.bad_rows, **sizes})
    return wandb, place


def known_id(run: RunFolder) -> str:
    """Return the id of the run's W&B run; empty before it has one."""
    return run.wandb_id.read_text().strip() if run.wandb_id.exists() else ""


def restore_id(run: RunFolder, checkpoint: Path) -> None:
    """Take a checkpoint's W&B run id where the run folder's wandb/ was lost."""
    saved = checkpoints.read_state(checkpoint).wandb_id
    if saved and not run.wandb_id.exists():
        _write_id(run, saved)


def _write_id(run: RunFolder, wandb_id: str) -> None:
    run.wandb_id.parent.mkdir(exist_ok=True)
    write_atomically(run.wandb_id, wandb_id)


def _reach(server: str) -> None:
    """Ask W&B's server for any answer (through proxies, too): wandb.init would try for much longer."""
    try:
        requests.head(server, timeout=REACH_TIMEOUT_S)
    except requests.RequestException as error:
        raise OSError(f"no answer from {server}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class WandbCallback(TrainerCallback):
    """Sends each log to W&B at the trainer's own step. warn: shows a line to the user."""

    def __init__(self, config: Config, run: RunFolder, choice: Choice, warn: Callable[[str], None]) -> None:
        self.config, self.run, self.choice, self.warn = config, run, choice, warn
        self.session: Any = None  # wandb's Run; None when it cannot be used

    def start(self) -> str:
        """Start W&B; return where the run is seen. A failure is a warning, and the run is kept on disk."""
        import wandb  # here: it takes a second, and runs with log.wandb=off do without

        logging.getLogger("wandb").setLevel(logging.ERROR)
        if not known_id(self.run):
            _write_id(self.run, self.choice.id or uuid.uuid4().hex[:12])
        for mode in dict.fromkeys((self.choice.mode, "offline")):
            try:
                if mode == "online":
                    _reach(self.choice.server)
                self.session = self._session(wandb, mode)
                break
            except Exception as error:  # whatever W&B raises, training goes on
                then = "kept on disk; `wandb sync` sends it" if mode == "online" else "not logged"
                self.warn(f"W&B cannot be used ({_reason(error)}): this attempt is {then}")
                wandb.teardown()  # else the id counts as in use
        if self.session is None:
            return "off"
        self.session.define_metric("trainer/step")
        self.session.define_metric("*", step_metric="trainer/step")
        url = getattr(self.session, "url", None)
        if url:
            with suppress(OSError):  # a full disk: nothing depends on it
                write_atomically(self.run.wandb_url, url)
        return f"{url or f'offline, in {Path(self.session.dir).parents[1]}'} ({self.choice.why})"

    def _session(self, wandb: Any, mode: str) -> Any:
        return wandb.init(
            mode=mode,
            resume="allow",
            project=self.choice.project,
            entity=self.config.log.wandb_entity,
            name=self.choice.name,
            id=known_id(self.run),
            dir=self.choice.folder,
            config=self.config.model_dump(mode="json", by_alias=True),
            settings=wandb.Settings(
                init_timeout=REACH_TIMEOUT_S,
                login_timeout=REACH_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                silent=True,
                console="off",
            ),
        )

    def on_log(self, args: object, state: TrainerState, control: object, logs: Logs, **_: object) -> None:
        """Send one log."""
        if logs:
            self._send_log(state.global_step, logs)

    def send_again(self, lines: Iterator[dict[str, float]]) -> None:
        """Send lines of metrics.jsonl once more: the last ones of a killed attempt may be lost."""
        for line in lines:
            logs = {name: value for name, value in line.items() if name not in ("step", "time")}
            self._send_log(int(line["step"]), logs)

    def _send_log(self, step: int, logs: Logs) -> None:
        values = {
            f"{'eval' if name.startswith('eval_') else 'train'}/{name.removeprefix('eval_')}": value
            for name, value in logs.items()
        }
        self.send({**values, "trainer/step": step})

    def send(self, values: dict[str, float]) -> None:
        """Send numbers under these names."""
        self._try(lambda: self.session.log(values))

    def summarize(self, values: Mapping[str, object]) -> None:
        """Add values to the summary of the whole run."""
        self._try(lambda: self.session.summary.update(values))

    def finish(self, exit_code: int) -> None:
        """Close the run; uploads that are under way get ten seconds."""
        self._try(lambda: self.session.finish(exit_code=exit_code))

    def _try(self, send: Callable[[], object]) -> None:
        if self.session is None:
            return
        try:
            send()
        except Exception as error:  # as in start
            self.session = None
            self.warn(f"W&B stopped ({error}): training goes on without; metrics.jsonl has every number")
