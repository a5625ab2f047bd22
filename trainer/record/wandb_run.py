"""Weights & Biases: one run, from rank 0, keyed on the trainer's step. The run folder keeps the W&B run's id,
so that every attempt continues the same W&B run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwenlora.configs import Config
from qwenlora.run import checkpoints
from qwenlora.run.disk import write_atomically
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.record.metrics import Line
from qwenlora.trainer.record.trackers import REACH_TIMEOUT_S, Unused, keep_id, named, reach, reason
from qwenlora.trainer.record.wandb_choice import Choice, choose

FINISH_TIMEOUT_S = 10.0


def restore_id(run: RunFolder, checkpoint: Path) -> None:
    """Take a checkpoint's W&B run id where the run folder's wandb/ was lost."""
    if saved := checkpoints.read_state(checkpoint).wandb_id:
        keep_id(run.wandb_id, saved)


class WandbTracker:
    """W&B's run. warn: shows a line to the user."""

    title = "W&B"

    def __init__(self, config: Config, run: RunFolder, warn: Callable[[str], None]) -> None:
        self.config, self.run, self.warn = config, run, warn
        self.session: Any = None  # wandb's Run

    def start(self) -> str:
        """Start W&B, if it is on; return where the run is seen. Without its server it is kept on disk."""
        choice = choose(self.config, self.run)
        if choice.mode == "off":
            raise Unused(choice.why)
        import wandb  # here: it takes a second, and runs with log.wandb=off do without

        logging.getLogger("wandb").setLevel(logging.ERROR)
        keep_id(self.run.wandb_id, choice.id)
        for mode in dict.fromkeys((choice.mode, "offline")):
            try:
                if mode == "online":
                    reach(choice.server)
                self.session = self._session(wandb, mode, choice)
                break
            except Exception as error:  # whatever W&B raises, training goes on
                then = "kept on disk; `wandb sync` sends it" if mode == "online" else "not logged there"
                self.warn(f"W&B cannot be used ({reason(error)}): this attempt is {then}")
                wandb.teardown()  # else the id counts as in use
        if self.session is None:
            raise Unused
        self.session.define_metric("trainer/step")
        self.session.define_metric("*", step_metric="trainer/step")
        url = getattr(self.session, "url", None)
        if url:
            with suppress(OSError):  # a full disk: nothing depends on it
                write_atomically(self.run.wandb_url, url)
        return f"{url or f'offline, in {Path(self.session.dir).parents[1]}'} ({choice.why})"

    def _session(self, wandb: Any, mode: str, choice: Choice) -> Any:
        return wandb.init(
            mode=mode,
            resume="allow",
            project=choice.project,
            entity=self.config.log.wandb_entity,
            name=choice.name,
            id=keep_id(self.run.wandb_id),
            dir=choice.folder,
            config=self.config.model_dump(mode="json", by_alias=True),
            settings=wandb.Settings(
                init_timeout=REACH_TIMEOUT_S,
                login_timeout=REACH_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                silent=True,
                console="off",
            ),
        )

    def go_back_to(self, step: int, lines: Sequence[Line]) -> None:
        """Send these lines once more: W&B forgets nothing, and shows one number for each trainer/step."""
        for line in lines:
            self.log(int(line["step"]), named(line))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers at the trainer's step."""
        self.session.log({**values, "trainer/step": step})

    def summarize(self, values: Mapping[str, object]) -> None:
        """Add values to the summary of the whole run."""
        self.session.summary.update(values)

    def finish(self, *, failed: bool) -> None:
        """Close the run; uploads that are under way get ten seconds."""
        self.session.finish(exit_code=int(failed))
