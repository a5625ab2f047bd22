"""The agent of the first node: makes or reopens the run folder, and leads attempts on all nodes. In a job, an
attempt that failed is followed by the next one at once, on the nodes that are left."""

import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from qwenlora.data.freshness import is_current
from qwenlora.launch import preflight, restarts, ssh, succession
from qwenlora.launch.allocation import free_port
from qwenlora.launch.blame import left_out_next, note_blamed, warn_of_bad
from qwenlora.launch.causes import cause_of_kill
from qwenlora.launch.commands import processes_in_words
from qwenlora.launch.launcher import run_ranks
from qwenlora.launch.meeting import NotMet
from qwenlora.launch.messages import AgentMessage, FileInRunFolder, NodeFacts, StartRanks
from qwenlora.launch.node import Node
from qwenlora.launch.refusals import check_resume, check_same_data, check_start
from qwenlora.launch.verdict import conclude, explain_failure, first_error
from qwenlora.launch.watch import Watch
from qwenlora.run.bad_nodes import BadNodes
from qwenlora.run.folder import PREFLIGHT, RunFolder, step_of
from qwenlora.run.format import count
from qwenlora.run.handover import Handover
from qwenlora.run.hardware import gpu_count
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.snapshots import Snapshots
from qwenlora.slurm import query

# a requeued job may start before the last processes of its previous attempt are gone
WAIT_FOR_FOLDER_S = 120.0
FAREWELL_S = 30.0
NODE_LOSS_S = 30.0  # for Slurm to notice that a node is gone

M = TypeVar("M", bound=AgentMessage)


@dataclass
class Leader:
    """Leads the nodes of a run. variables: for the agents that it starts on other machines."""

    node: Node
    variables: dict[str, str] = field(default_factory=dict)
    _agents: list[ssh.RemoteAgent] = field(default_factory=list)
    _missing: bool = False  # not all nodes have come yet
    _met: bool = False  # they have, and are alike

    def lead(self, handover: Handover, *, only_check: bool) -> int:
        """Run an attempt on all nodes; return its exit code. Raises: ValueError when it cannot start."""
        node, resume = self.node, handover.resume
        config, folder = node.config, node.folder
        node.allocation = node.job.among(node.job.hosts[: node.trains_on])
        fresh, wait_s = resume == "none", WAIT_FOR_FOLDER_S if node.allocation.restarts else 0.0
        code: int | None = None
        try:
            with folder.claim(config, fresh=fresh, allowed=handover.allowed, wait_s=wait_s) as changed:
                _lead_exit_codes_to(folder)
                if only_check:
                    code = self._only_check()
                elif folder.done and resume == "auto" and not changed.length:
                    code = self._report_done()
                else:
                    check_resume(config, folder, resume, handover.allowed)
                    warn_of_bad(node)
                    code = self._attempts(handover)
                return code
        finally:  # the other nodes leave first: srun's exit code is then this one's
            self._part(code)

    def _report_done(self) -> int:
        """Say that the run is done already."""
        run_dir, folder = self.node.config.run_dir, self.node.folder
        check_same_data(self.node.config, folder)
        folder.put_back()
        self._print(
            f"{run_dir} is done ({folder.history.last_step()} steps): the adapter is in {run_dir}/adapter;"
            " --fresh trains anew, more train.max_steps or num_train_epochs go on"
        )
        return EXIT_CODES["done"]

    def _attempts(self, handover: Handover) -> int:
        """Run attempts as long as the job is to try again and can do so by itself; return an exit code."""
        code = self._attempt(handover)
        if code == EXIT_CODES["refused"]:
            self.node.folder.put_back()
        return self._more_attempts(handover, code)

    def _more_attempts(self, handover: Handover, code: int) -> int:
        """Run more attempts after one that ended with this code, as above."""
        node = self.node
        while True:
            if node.keeps_snapshots and code == EXIT_CODES["failed"]:
                self._save_from(node.memory)
            if not node.allocation.requeues:  # somebody looks at it: the same command goes on
                return code
            failed, code = code == EXIT_CODES["failed"], self._exit_code_in_job(code)
            if not failed or code != EXIT_CODES["stopped"] or not self._can_go_on():
                return code
            self._regroup()
            if handover.resume == "none" or self._has_trained():
                handover = replace(handover, resume="auto")
            code = self._attempt(handover)

    def take_over(self, handover: Handover, first: str) -> int | None:
        """Lead on in place of the node that began this attempt, whose agent is gone; return the exit code,
        None if this node cannot lead. first: that node's host."""
        node = self.node
        succession.take_screen(node)  # the others come meanwhile
        node.meeting.wait_for_all(node.config.launch.join_timeout_s, lambda: node.stop_requested)
        # who has not come by now does not look for this node
        node.has_taken_over = self._met = self._missing = True
        code: int | None = None
        try:
            with node.folder.claim(node.config, allowed=handover.allowed, wait_s=WAIT_FOR_FOLDER_S):
                if node.folder.done:
                    code = EXIT_CODES["done"]
                    return code
                unfinished = node.folder.history.unfinished
                if not unfinished or unfinished.attempt != handover.attempt:
                    raise ValueError("another node has led since")
                self._print(f"{node.job.host} leads now, with {count(len(self._left()), 'node')}")
                fault = f"the agent of {first} is gone: killed, or its node failed"
                code = self._conclude(Watch(node, handover.attempt), EXIT_CODES["failed"], fault)
                code = self._more_attempts(handover, code)
        except ValueError as error:
            self._print(f"{node.job.host} cannot lead on: {error}")
        finally:
            self._part(code)
        return code

    def _has_trained(self) -> bool:
        """Whether steps of this run are saved: until then a checkpoint that --resume names is the start."""
        history = self.node.folder.history
        last = history.last()
        trained = last is not None and history.progress.read(last.attempt) is not None
        return trained and bool(self.node.folder.checkpoints())

    def _save_from(self, memory: Snapshots) -> None:
        """Make the newest snapshot a checkpoint, from which any attempt can go on."""
        name, problems = memory.save_newest(self.node.folder)
        for problem in problems:
            self.node.warn(problem)
        if name:
            self._print(f"{name} was kept in memory, and is saved now")

    def _left(self) -> list[str]:
        """Return the nodes that are there: first those of the last attempt, then the spare ones."""
        meeting = self.node.meeting
        there = [meeting.allocation.hosts[number] for number in sorted(meeting.connected | {0})]
        return sorted(there, key=lambda host: not self.node.trains(host))

    def _can_go_on(self) -> bool:
        """Whether another attempt can begin now, in this job, on the nodes that are left."""
        node = self.node
        if not self._met or node.stop_requested or node.children.immortal:
            return False
        had = min(node.allocation.nodes, node.trains_on)
        least = node.config.launch.min_nodes or math.ceil(node.trains_on / 2)
        if not self._shun_bad(max(least, math.ceil(had / 2))):
            return False
        left = self._left()[: node.trains_on]
        if len(left) == had:
            return True
        if len(left) < least or 2 * len(left) < had:
            self._print(
                f"requeueing: {len(left)} of {had} nodes left, too few to go on in the job (launch.min_nodes)"
            )
            self._wait_for_slurm(left)
            return False
        try:
            check_start(node.config, len(left))
        except ValueError as error:
            self._print(f"requeueing: on {count(len(left), 'node')} the run cannot go on: {error}")
            self._wait_for_slurm(left)
            return False
        return True

    def _wait_for_slurm(self, left: list[str]) -> None:
        """Wait until Slurm has noticed that nodes are lost: else the requeued job may be given them again."""
        allocation, end = self.node.allocation, time.monotonic() + NODE_LOSS_S
        lost = set(allocation.hosts) - set(left)
        while not self.node.stop_requested and time.monotonic() < end:
            job = query.ask(allocation.job_id) if allocation.job_id else None
            if job is None or job.state != "RUNNING":
                return
            if not lost & set(job.nodes):
                self.node.folder.note_attempt(cause="NODE_FAIL")
                return
            time.sleep(1.0)

    def _shun_bad(self, least: int) -> bool:
        """Let bad nodes go, where at least so many others stay, spare ones among them. Return False where the
        job can be requeued without them instead."""
        node, meeting, left = self.node, self.node.meeting, self._left()
        bad = set(left) & BadNodes.beside(node.folder).bad().keys()
        good, names = len(left) - len(bad), ", ".join(sorted(bad))
        if not bad:
            return True
        if node.allocation.host not in bad and good >= least:
            for number in meeting.connected:
                if meeting.allocation.hosts[number] in bad:
                    meeting.release(number)
        elif bad.intersection(left_out_next(node)):
            self._print(f"requeueing without {names} (qwenlora nodes)")
            return False
        else:
            self._print(f"{names} cannot be left out: too few nodes of the kind would stay; going on with it")
        return True

    def _regroup(self) -> None:
        """Go on with the nodes that are left, and spare ones in place of those that are lost."""
        node, left = self.node, self._left()[: self.node.trains_on]
        if without := [host for host in node.allocation.hosts if host not in left]:
            new = [host for host in left if not node.trains(host)]
            instead = f", with {', '.join(new)} in place of {', '.join(without)}" if new else ""
            self._print(
                f"going on inside the job with {count(len(left), 'node')}"
                + (instead or f", without {', '.join(without)}")
            )
        node.allocation = node.job.among(left)

    def _part(self, code: int | None) -> None:
        """Let the other nodes leave. What does not leave would hold the job: its step is then killed. code:
        of this process, unless it refuses to start."""
        meeting = self.node.meeting
        all_there = len(meeting.connected) == meeting.allocation.nodes - 1
        all_left = meeting.part(FAREWELL_S, of_all=not self._missing)
        exclude = left_out_next(self.node) if code == EXIT_CODES["stopped"] else ()
        if code is not None and (self.node.has_taken_over or not (all_there and all_left) or exclude):
            _tell_batch_shell(self.node.folder, code, exclude)
        if code is not None and self.node.has_taken_over:
            succession.end_job(self.node, code, leads=True)
        if not all_left and self.node.allocation.requeues:
            query.kill_step()

    def _attempt(self, handover: Handover) -> int:
        """Run one attempt: check, prepare, train, conclude."""
        node, attempt = self.node, self._begin_attempt()
        if node.forks_ranks:
            _ = node.forkserver  # imports while the nodes are checked
        watch = Watch(node, attempt)
        code, fault = EXIT_CODES["failed"], ""
        try:
            if not self._met:
                self._check_nodes(attempt)
                self._met = True
            code = self._prepare_and_train(watch, replace(handover, attempt=attempt))
            fault = watch.fault
        except NotMet as missing:
            fault = str(missing)
            watch.absent = missing.absent
        return self._conclude(watch, code, fault)

    def _conclude(self, watch: Watch, code: int, fault: str) -> int:
        """Record how an attempt ended, and without whom; return its exit code."""
        node, cause = self.node, watch.cause_of_the_end()
        code = conclude(
            node.folder, watch.attempt, code, node.children, node.console, fault=fault, cause=cause
        )
        lost = [host for host in node.allocation.hosts if node.trains(host) and host not in self._left()]
        if lost and self._met:  # one that does not come, or refuses, is no loss
            node.folder.note_attempt(lost=lost)
            watch.absent = lost
        watch.fault = fault
        if code == EXIT_CODES["failed"]:
            note_blamed(node, watch)
        return code

    def _begin_attempt(self) -> int:
        allocation, folder = self.node.allocation, self.node.folder
        unfinished = folder.history.unfinished
        return folder.begin_attempt(
            self.node.processes * allocation.nodes,
            killed_by=cause_of_kill(unfinished) if unfinished else "",
            job_id=allocation.job_id,
            nodes=list(allocation.hosts),
            restarts=allocation.restarts,
            saved_before=_newest_step(folder),
        )

    def _prepare_and_train(self, watch: Watch, handover: Handover) -> int:
        node, folder = self.node, self.node.folder
        if not is_current(node.config, folder, on_gpu=gpu_count() > 0):
            node.console.print("preparing model and data ...")
            preparation = node.forkserver.prepare(handover.attempt, handover.environment())
            if code := node.children.run(preparation, watch.while_preparing):
                return code
            if not node.forks_ranks:
                node.forkserver.close()
        if node.stop_requested:
            return 0
        node.warn(preflight.space_warning(node.config, folder))
        return self._train(watch, replace(handover, prepare_s=time.monotonic() - watch.started))

    def _exit_code_in_job(self, code: int) -> int:
        """Return the exit code to leave a Slurm job with: 75, where it is worth another attempt."""
        job_id, history = self.node.allocation.job_id, self.node.folder.history
        saved = _newest_step(self.node.folder)
        if code == EXIT_CODES["failed"]:
            max_restarts = self.node.config.launch.max_restarts
            again, why = restarts.worth_another(history.attempts(), job_id, max_restarts, saved)
            self._print(why)
            return EXIT_CODES["stopped"] if again else code
        if code == EXIT_CODES["stopped"]:
            in_vain = restarts.in_vain(history.attempts(), job_id, saved)
            if in_vain >= restarts.MOST_IN_VAIN:
                self._print(f"not requeued: {in_vain} attempts in a row have saved no step")
                return EXIT_CODES["failed"]
        return code

    def _only_check(self) -> int:
        """Do only the checks before a start, in a folder of their own; it is removed when all pass."""
        node, folder = self.node, self.node.folder
        watch = Watch(node, PREFLIGHT)
        folder.logs(PREFLIGHT).mkdir(parents=True, exist_ok=True)
        self._check_nodes(PREFLIGHT)
        code = self._train(watch, Handover(PREFLIGHT, only_check=True))
        if code or watch.fault:
            error = first_error(folder, PREFLIGHT)
            message = watch.fault or (error.message if error else f"a process ended with exit code {code}")
            explain_failure(folder, PREFLIGHT, message, error, node.console, tail=not watch.fault)
            return EXIT_CODES["failed"]
        shutil.rmtree(folder.path, ignore_errors=True)
        return EXIT_CODES["done"]

    def _check_nodes(self, attempt: int) -> None:
        """Meet the other nodes and compare. Raises: NotMet naming those that do not come, or differ."""
        node, allocation = self.node, self.node.job
        if allocation.nodes == 1:
            return
        if allocation.by_ssh:
            logs = node.folder.logs(attempt)
            agents = ssh.agents_started(node.config, allocation, self.variables, logs)
            self._agents = node.resources.enter_context(agents)
        self._missing = True
        answers = self._gather(NodeFacts, float(node.config.launch.join_timeout_s))
        self._missing = len(answers) < allocation.nodes - 1
        if node.config.launch.preflight == "off":
            return
        theirs = {allocation.hosts[number]: facts for number, facts in answers.items()}
        mine = preflight.facts_of_this_node(node.config, node.processes)
        if differences := preflight.differences(mine, theirs):
            raise NotMet("; ".join(differences))
        for host, facts in theirs.items():
            skew_s = facts.time - facts.received_at
            if abs(skew_s) > preflight.MAX_CLOCK_SKEW_S:
                node.warn(f"the clock of {host} is {skew_s:+.1f} s off this node's")
        try:
            self._check_shared_folder()
        finally:
            preflight.remove_files(node.folder, allocation.nodes)

    def _check_shared_folder(self) -> None:
        """Check that all nodes see each other's files in the run folder. Raises: NotMet."""
        folder, allocation = self.node.folder, self.node.job
        self.node.meeting.send(FileInRunFolder(text=preflight.write_file(folder, 0)))
        for number, file in self._gather(FileInRunFolder, preflight.SEEN_WITHIN_S + 5).items():
            host = allocation.hosts[number]
            if file.problem:
                raise NotMet(f"{host}: {file.problem}")
            if not preflight.sees_file(folder, number, file.text):
                raise NotMet(
                    f"{host} wrote a file to run_dir={folder.path} that {allocation.host} does not see:"
                    " choose a run_dir on a file system that all nodes share"
                )

    def _gather(self, kind: type[M], timeout_s: float) -> dict[int, M]:
        """Return the other nodes' messages. Raises: NotMet; at once when ssh cannot start an agent."""

        def failures() -> str:
            return "; ".join(filter(None, (agent.failure for agent in self._agents)))

        stop: Callable[[], bool] = lambda: self.node.stop_requested or bool(failures())  # noqa: E731
        answers = self.node.meeting.gather(kind, timeout_s, stop)
        if problems := failures():
            raise NotMet(problems)
        return answers

    def _train(self, watch: Watch, handover: Handover) -> int:
        """Make all nodes start their ranks; return this node's exit code when all have ended."""
        node, nodes = self.node, self.node.allocation.nodes
        if not handover.only_check:
            over = f" on {nodes} nodes" * (nodes > 1)
            node.console.print(f"starting {processes_in_words(node.processes * nodes)}{over} ...")
        # each attempt has a port of its own: ranks of an earlier one may still look for theirs
        token = f"{node.meeting.run_id} {handover.attempt}" if nodes > 1 else secrets.token_hex(8)
        port = free_port(token)
        hosts = node.allocation.hosts
        spare = tuple(host for host in self._left() if host not in hosts)
        node.meeting.send(StartRanks(handover=handover, port=port, hosts=hosts, spare=spare))
        return run_ranks(node, watch, handover, port)

    def _print(self, line: str) -> None:
        self.node.console.print(line, soft_wrap=True)


def _lead_exit_codes_to(folder: RunFolder) -> None:
    """Have the file in which slurm/job.sh looks for the exit code be one that all nodes can write."""
    folder.exit_code.unlink(missing_ok=True)
    if file := os.environ.get("QWENLORA_EXIT_CODE_FILE"):
        with suppress(OSError):  # a container may not have it
            Path(file).unlink(missing_ok=True)
            Path(file).symlink_to(folder.exit_code)


def _tell_batch_shell(folder: RunFolder, code: int, exclude: Sequence[str]) -> None:
    """Leave this process's exit code to slurm/job.sh, since srun's is that of an agent that was killed; and
    the nodes that the job is to leave out."""
    with suppress(OSError):
        folder.exit_code.write_text(f"{code} {','.join(exclude)}".strip(), encoding="utf-8")


def _newest_step(folder: RunFolder) -> int:
    return next((step_of(path) for path in folder.checkpoints()), 0)
