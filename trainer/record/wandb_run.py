"""Weights & Biases: one run, from rank 0, keyed on the trainer's step; it may fail, training never does for
it.

The run's id is kept in the run folder, so that every attempt goes on in the same W&B run.
"""

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from netrc import NetrcParseError, netrc
from typing import Any
from urllib.parse import urlsplit

import requests
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwenlora.configs import Config
from qwenlora.run.disk import write_atomically
from qwenlora.run.folder import RunFolder

REACH_TIMEOUT_S = 5.0
FINISH_TIMEOUT_S = 10.0


def mode_of(config: Config) -> tuple[str, str]:
    """Return (online, offline or off, why)."""
    chosen = config.log.wandb
    if chosen != "auto":
        return chosen, f"log.wandb={chosen}"
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted in ("disabled", "offline", "online"):
        return {"disabled": "off"}.get(wanted, wanted), f"WANDB_MODE={wanted}"
    if os.environ.get("WANDB_API_KEY"):
        return "online", "WANDB_API_KEY is set"
    if _netrc_has_a_key():
        return "online", "logged in"
    return "off", "no W&B key: `wandb login`, or log.wandb=offline"


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _reach() -> None:
    """Ask W&B's server for any answer: wandb.init would try for much longer. Heeds the usual proxy
    variables."""
    requests.head(_server(), timeout=REACH_TIMEOUT_S)


def _reason(error: Exception) -> str:
    if isinstance(error, requests.RequestException):
        return f"no answer from {_server()}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _netrc_has_a_key() -> bool:
    host = urlsplit(_server()).hostname
    try:
        return bool(host and netrc(os.environ.get("NETRC")).authenticators(host))
    except (OSError, NetrcParseError):
        return False


class WandbCallback(TrainerCallback):
    """Sends each log to W&B at the trainer's own step. `warn` shows a line to the user."""

    def __init__(self, config: Config, run: RunFolder, mode: str, warn: Any) -> None:
        self.config, self.run, self.mode, self.warn = config, run, mode, warn
        self.session: Any = None

    def start(self) -> str:
        """Start W&B; return where the run is seen. What fails is a warning, and the run is kept on disk."""
        import wandb  # here: it takes half a second, and most debug runs do without

        logging.getLogger("wandb").setLevel(logging.ERROR)
        run_id = self._run_id()
        log = self.config.log
        arguments: dict[str, Any] = {
            "project": log.wandb_project,
            "entity": log.wandb_entity,
            "name": log.wandb_name or self.run.path.name,
            "id": run_id,
            "dir": str(self.run.path),
            "config": self.config.model_dump(mode="json", by_alias=True),
        }
        settings: dict[str, Any] = {
            "init_timeout": REACH_TIMEOUT_S,
            "login_timeout": REACH_TIMEOUT_S,
            "finish_timeout": FINISH_TIMEOUT_S,
            "silent": True,
            "console": "off",
        }
        modes: list[Any] = ["online", "offline"] if self.mode == "online" else [self.mode]
        for mode in modes:
            try:
                if mode == "online":
                    _reach()
                self.session = wandb.init(
                    mode=mode, resume="allow", settings=wandb.Settings(**settings), **arguments
                )
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
        return str(url or f"offline, in {self.run.path / 'wandb'}")

    def _run_id(self) -> str:
        if not self.run.wandb_id.exists():
            self.run.wandb_id.parent.mkdir(exist_ok=True)
            write_atomically(self.run.wandb_id, uuid.uuid4().hex[:12])
        return self.run.wandb_id.read_text().strip()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Send one log."""
        if logs:
            self._send_log(state.global_step, logs)

    def send_again(self, records: Iterator[dict[str, Any]]) -> None:
        """Send lines of metrics.jsonl: what a killed attempt sent last, W&B may not have written."""
        for record in records:
            self._send_log(
                record["step"], {name: v for name, v in record.items() if name not in ("step", "time")}
            )

    def _send_log(self, step: int, logs: dict[str, Any]) -> None:
        values = {
            f"{'eval' if name.startswith('eval_') else 'train'}/{name.removeprefix('eval_')}": value
            for name, value in logs.items()
        }
        self._try(lambda: self.session.log({**values, "trainer/step": step}))

    def send(self, values: dict[str, float]) -> None:
        """Send numbers as they are named."""
        self._try(lambda: self.session.log(values))

    def summarize(self, values: dict[str, Any]) -> None:
        """Put numbers of the whole run beside it."""
        self._try(lambda: self.session.summary.update(values))

    def finish(self, exit_code: int) -> None:
        """Close the run; uploads still under way get ten seconds."""
        self._try(lambda: self.session.finish(exit_code=exit_code))

    def _try(self, send: Any) -> None:
        if self.session is None:
            return
        try:
            send()
        except Exception as error:  # as above
            self.session = None
            self.warn(f"W&B stopped ({error}): training goes on without; metrics.jsonl has every number")
