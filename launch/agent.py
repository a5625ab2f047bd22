"""One agent a node, from a config to an exit code: 0 done, 75 run it again, 2 refused, 1 failed. It imports
no torch.

`qwenlora train configs/tiny.yaml lora.r=32` runs it, on this machine or as srun's one task on each node of a
job; with a hostfile it starts its like on the other machines (elsewhere.py). The first node's agent makes or
reopens the run folder, has the data prepared once, and speaks for all; the others do as it says and leave
with 0. Each runs torchrun, or DeepSpeed's launcher, on `qwenlora.trainer.main` for its ranks.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from rich.console import Console

from qwenlora.configs import Config
from qwenlora.data.freshness import is_current
from qwenlora.launch import elsewhere, hosts, preflight, restarts
from qwenlora.launch.allocation import Allocation, allocation, free_port
from qwenlora.launch.children import Children
from qwenlora.launch.deaths import Deaths
from qwenlora.launch.hardware import gpu_count
from qwenlora.launch.meeting import Meeting, NotMet
from qwenlora.launch.plan import (
    check,
    check_keys,
    check_resume,
    deepspeed_argv,
    preparing_argv,
    processes_of,
    refuse_other_data,
    rendezvous_options,
    say_processes,
    static_options,
    torchrun_argv,
)
from qwenlora.launch.verdict import conclude, explain, first_error
from qwenlora.launch.watch import Watch
from qwenlora.run import heartbeat
from qwenlora.run.folder import PREFLIGHT, RunFolder, step_of
from qwenlora.run.handover import Handover
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.lent_screen import lend

# a requeued job may start before the last processes of the one before are gone
WAIT_FOR_THE_FOLDER_S = 120.0
FAREWELL_S = 30.0
JOIN_LATER_S = 3.0
MOST_IN_VAIN = 10  # attempts that were stopped before they saved a step: the time they get is too short


def run(
    config: Config,
    *,
    fresh: bool = False,
    resume: str = "auto",
    allowed: Sequence[str] = (),
    only_check: bool = False,
) -> int:
    """Run this node's part of a config to its end; return the exit code.

    fresh: set an earlier run aside; resume: auto (the newest whole checkpoint), none (as fresh), a name or
    path of one;
    allowed: config keys or sections that may differ from the run's earlier attempts; only_check: end after
    the checks before the start. Raises: ValueError when it cannot start.
    """
    where = allocation()
    if where.job_id is not None:
        hosts.refuse_in_slurm(config)
    told: dict[str, str] = {}
    if named := hosts.of(config):
        where, config = hosts.allocation_of(named), hosts.with_slots(config, named)
        besides = hosts.add_deepspeed_env(os.environ) if config.launch.launcher == "deepspeed" else set()
        told = hosts.carried(os.environ, besides)
    if only_check:
        run_dir = RunFolder(config.run_dir).path
        config = config.model_copy(update={"run_dir": str(run_dir.with_name(f".preflight-{run_dir.name}"))})
    check(config, where.nodes)
    check_keys(allowed)
    if fresh and resume not in ("auto", "none"):
        raise ValueError(f"--fresh starts anew, --resume {resume} goes on; leave one of them out")
    console = Console(markup=False, highlight=False)
    if (fresh or resume != "auto") and where.restarts:
        if where.first:
            console.print(
                "requeued by Slurm: going on from the newest checkpoint, without --fresh and --resume"
            )
        fresh, resume = False, "auto"
    handover = Handover(0, "none" if fresh else resume, tuple(allowed))
    if not where.first:
        return follow(config, where)
    return _take_part(config, where, lambda node: node.lead(handover, told, only_check=only_check))


def follow(config: Config, where: Allocation) -> int:
    """Run the part of a node that is not the first; return its exit code."""
    return _take_part(config, where, Node.follow)


def _take_part(config: Config, where: Allocation, part: "Callable[[Node], int]") -> int:
    console = Console(markup=False, highlight=False)
    with ExitStack() as held:
        children = held.enter_context(Children())
        try:
            meeting = held.enter_context(Meeting(where))
            return part(Node(config, where, children, meeting, console, held))
        except NotMet as missing:
            if not children.asked:
                prefix = "failed: " * where.first  # the others' word is not the last
                console.print(f"{prefix}{missing}", style="red", soft_wrap=True)
            return EXIT_CODES["failed"]


class Node:
    """One node's part of an attempt. held: what is given back when it is over."""

    def __init__(
        self,
        config: Config,
        where: Allocation,
        children: Children,
        meeting: Meeting,
        console: Console,
        held: ExitStack,
    ) -> None:
        self.config, self.where, self.children, self.meeting, self.console = (
            config,
            where,
            children,
            meeting,
            console,
        )
        self._held = held
        self._agents: list[elsewhere.Started] = []
        self.processes = processes_of(config)
        self.folder = RunFolder(config.run_dir)
        self._missing = False

    # ---- the first node

    def lead(self, handover: Handover, told: dict[str, str], *, only_check: bool) -> int:
        """Run an attempt on all nodes; return its exit code. Raises: ValueError when it cannot start.

        told: variables for the agents that this one starts on other machines.
        """
        config, folder, resume = self.config, self.folder, handover.resume
        wait_s = WAIT_FOR_THE_FOLDER_S if self.where.restarts else 0.0
        try:
            with folder.claim(
                config, fresh=resume == "none", allowed=handover.allowed, wait_s=wait_s
            ) as changed:
                if only_check:
                    return self._only_check(told)
                if folder.done and resume == "auto" and not changed.length:
                    refuse_other_data(config, folder)
                    folder.put_back()
                    self.console.print(
                        f"{config.run_dir} is done ({folder.history.last_step()} steps): the adapter is in"
                        f" {config.run_dir}/adapter; --fresh trains anew, more train.max_steps or"
                        " num_train_epochs go on",
                        soft_wrap=True,
                    )
                    return EXIT_CODES["done"]
                check_resume(config, folder, resume, handover.allowed)
                return self._attempt(handover, told)
        finally:  # the other nodes leave first: srun's exit code is then this one's
            self.meeting.part(FAREWELL_S, of_all=not self._missing)

    def _attempt(self, handover: Handover, told: dict[str, str]) -> int:
        folder, where = self.folder, self.where
        last = folder.history.unfinished
        attempt = folder.begin_attempt(
            self.processes * where.nodes,
            killed_by=restarts.end_of(last) if last else "",
            job_id=where.job_id,
            nodes=list(where.hosts),
            restarts=where.restarts,
            saved_before=_newest_step(folder),
        )
        watch = Watch(self.config, where, self.meeting, self.children, folder, attempt)
        code, fault, start = EXIT_CODES["failed"], "", time.monotonic()
        handover = replace(handover, attempt=attempt)
        try:
            self._check_nodes(attempt, told)
            with folder.log(attempt, "launch").open("ab") as log:
                code = 0
                if not is_current(self.config, folder, on_gpu=gpu_count() > 0):
                    self.console.print("preparing model and data ...")
                    environment = _environment(handover)
                    code = self.children.run(preparing_argv(folder), environment, log, watch.while_preparing)
                if not code and not self.children.asked:
                    self._warn(preflight.space(self.config, folder))
                    handover = replace(handover, prepare_s=time.monotonic() - start)
                    code = self._train(watch, handover)
            fault = watch.fault
        except NotMet as missing:
            fault = str(missing)
        code = conclude(
            folder, attempt, code, self.children, self.console, fault=fault, cause=watch.cause_of_the_end()
        )
        if code == EXIT_CODES["refused"]:
            folder.put_back()
        if code == EXIT_CODES["failed"] and where.requeues:
            again, why = restarts.worth_another(
                folder.history.attempts(), where.job_id, self.config.launch.max_restarts, _newest_step(folder)
            )
            self.console.print(why, soft_wrap=True)
            return EXIT_CODES["stopped"] if again else code
        if code == EXIT_CODES["stopped"] and where.requeues:
            count = restarts.in_vain(folder.history.attempts(), where.job_id, _newest_step(folder))
            if count >= MOST_IN_VAIN:
                self.console.print(
                    f"not requeued: {count} attempts in a row have saved no step", soft_wrap=True
                )
                return EXIT_CODES["failed"]
        return code

    def _only_check(self, told: dict[str, str]) -> int:
        """Do all checks before the start and nothing else, in a folder of its own, which is removed if all is
        well."""
        watch = Watch(self.config, self.where, self.meeting, self.children, self.folder, PREFLIGHT)
        self.folder.logs(PREFLIGHT).mkdir(parents=True, exist_ok=True)
        self._check_nodes(PREFLIGHT, told)
        code = self._train(watch, Handover(PREFLIGHT, only_check=True))
        if code or watch.fault:
            error = first_error(self.folder, PREFLIGHT)
            message = watch.fault or (error.message if error else f"a process ended with exit code {code}")
            explain(self.folder, PREFLIGHT, message, error, self.console, tail=not watch.fault)
            return EXIT_CODES["failed"]
        shutil.rmtree(self.folder.path, ignore_errors=True)
        return EXIT_CODES["done"]

    def _check_nodes(self, attempt: int, told: dict[str, str]) -> None:
        """Meet the other nodes and compare. Raises: NotMet naming those that do not come, or are not
        alike."""
        where, timeout_s = self.where, float(self.config.launch.join_timeout_s)
        if where.nodes == 1:
            return
        if where.name:  # nobody else starts agents there
            logs = self.folder.logs(attempt)
            self._agents = self._held.enter_context(elsewhere.started(self.config, where, told, logs))
        self._missing = True  # until they have come
        answers = self._gather("facts", timeout_s)
        self._missing = len(answers) < where.nodes - 1
        if self.config.launch.preflight == "off":
            return
        mine = preflight.facts(self.config, self.processes)
        if found := preflight.problems(
            mine, {where.hosts[node]: said["facts"] for node, said in answers.items()}
        ):
            raise NotMet("; ".join(found))
        for node, said in answers.items():
            off = said["facts"]["time"] - said["received"]
            if abs(off) > preflight.MOST_SKEW_S:
                self._warn(f"the clock of {where.hosts[node]} is {off:+.1f} s off this node's")
        try:
            self.meeting.send(look=preflight.show(self.folder, 0))
            for node, said in self._gather("showed", preflight.SEEN_WITHIN_S + 5).items():
                host = where.hosts[node]
                if problem := said["showed"].get("problem"):
                    raise NotMet(f"{host}: {problem}")
                if not preflight.sees(self.folder, node, said["showed"]["text"]):
                    raise NotMet(
                        f"{host} wrote a file to run_dir={self.folder.path} that {where.host} does not see:"
                        " choose a run_dir on a file system that all nodes share"
                    )
        finally:
            preflight.clear(self.folder, where.nodes)

    def _gather(self, what: str, timeout_s: float) -> dict[int, Any]:
        def failed() -> str:
            return "; ".join(filter(None, (agent.failed for agent in self._agents)))

        answers = self.meeting.gather(what, timeout_s, lambda: self.children.asked or bool(failed()))
        if problem := failed():
            raise NotMet(problem)
        return answers

    def _train(self, watch: Watch, handover: Handover) -> int:
        """Have all nodes start their ranks; return this node's exit code when they have all ended."""
        where = self.where
        over = f" on {where.nodes} nodes" * (where.nodes > 1)
        if not handover.only_check:
            self.console.print(f"starting {say_processes(self.processes * where.nodes)}{over} ...")
        port = 0
        if where.nodes > 1:
            port = free_port(self.meeting.run_id)
        elif self.config.launch.launcher == "deepspeed":  # torchrun finds one by itself
            port = free_port(secrets.token_hex(8))
        self.meeting.send(start=handover.as_json(), port=port)
        return self._run_ranks(watch, handover, port)

    def _warn(self, line: str) -> None:
        if line:
            self.console.print(f"warning: {line}", style="yellow", soft_wrap=True)

    # ---- the other nodes

    def follow(self) -> int:
        """Do as the first node says. Return 0: what came of it is for the first node to say; 1 when it is
        gone."""
        asked: Callable[[], bool] = lambda: self.children.asked  # noqa: E731
        # longer than the first node waits: it names all that are missing
        self.meeting.join(self.config.launch.join_timeout_s + JOIN_LATER_S, asked)
        self.meeting.send(facts=preflight.facts(self.config, self.processes))
        while True:
            message = self.meeting.hear(1.0)
            if message is None:
                continue
            if "look" in message:
                self.meeting.send(showed=self._look(message["look"]))
            elif "start" in message:
                watch = self._start(Handover.of_json(message["start"]), message["port"])
                if watch.over or watch.lost:
                    self.meeting.stay_until_exit()
                    return EXIT_CODES["failed" if watch.lost else "done"]
            elif "over" in message:
                self.meeting.stay_until_exit()
                return EXIT_CODES["done"]
            elif "lost" in message:
                self.console.print(
                    f"{self.where.host}: the agent of {self.where.hosts[0]} is gone", soft_wrap=True
                )
                return EXIT_CODES["failed"]

    def _look(self, text: str) -> dict[str, str]:
        """Look for the first node's file, and show one of this node's."""
        if not preflight.sees(self.folder, 0, text):
            return {
                "problem": f"run_dir={self.folder.path} is not the folder that {self.where.hosts[0]} writes"
                f" to; choose"
                " a run_dir on a file system that all nodes share"
            }
        try:
            return {"text": preflight.show(self.folder, self.where.node)}
        except OSError as error:
            return {"problem": f"cannot write to run_dir={self.folder.path}: {error.strerror}"}

    def _start(self, handover: Handover, port: int) -> Watch:
        watch = Watch(self.config, self.where, self.meeting, self.children, self.folder, handover.attempt)
        code = self._run_ranks(watch, handover, port)
        self.meeting.send(ended=code)
        return watch

    # ---- all nodes

    def _run_ranks(self, watch: Watch, handover: Handover, port: int) -> int:
        where = self.where
        deepspeed = self.config.launch.launcher == "deepspeed"
        rendezvous = ["--standalone"]
        if where.name and where.nodes > 1:
            rendezvous = static_options(where.node, where.nodes, where.hosts[0], port)
        elif where.nodes > 1:
            run_id = f"{self.meeting.run_id}.{handover.attempt}"
            timeout_s = max(60, self.config.launch.join_timeout_s)
            rendezvous = rendezvous_options(run_id, where.nodes, where.first, where.hosts[0], port, timeout_s)
        argv = torchrun_argv([str(self.folder.config)], self.processes, rendezvous)
        if deepspeed:
            host = where.hosts[0] if where.nodes > 1 else "127.0.0.1"
            argv = deepspeed_argv(
                [str(self.folder.config)], self.processes, where.node, where.nodes, host, port
            )
        name = f"launch-{where.node}" if where.node else "launch"
        with ExitStack() as held:
            beats = held.enter_context(heartbeat.make_folder())
            log = held.enter_context(self.folder.log(handover.attempt, name).open("ab"))
            watch.beats = beats
            handover = replace(handover, beats=beats)
            pause: Callable[[float], None] = time.sleep
            if deepspeed:
                watch.deaths = held.enter_context(Deaths(beats, log, self.processes))
                pause = watch.deaths.pause
                handover = replace(handover, screen=held.enter_context(lend(beats)) if where.first else "")
            environment = _environment(handover) | self._flight_recorder(handover.attempt)
            if deepspeed and self.processes > 1:  # as torchrun does: each would take all cores
                environment.setdefault("OMP_NUM_THREADS", "1")
            code = self.children.run(
                argv, environment, log, watch.while_training, pause=pause, apart=deepspeed
            )
            if watch.deaths:
                watch.deaths.told(code)
            watch.after(code)
        return code

    def _flight_recorder(self, attempt: int) -> dict[str, str]:
        """Return what makes NCCL keep its last collectives, and write them when one hangs, unless the user
        says else.

        Source: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
        """
        prefix = self.folder.flight_recorder(attempt)
        wanted = {
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
            "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": prefix,
        }
        return {name: value for name, value in wanted.items() if name not in os.environ}


def _newest_step(folder: RunFolder) -> int:
    return next((step_of(path) for path in folder.checkpoints()), 0)


def _environment(handover: Handover) -> dict[str, str]:
    # without PYTHONSAFEPATH, `python -m` takes a random.py of the working folder for Python's own
    return os.environ | handover.environment() | {"PYTHONSAFEPATH": "1"}
