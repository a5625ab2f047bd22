"""Kills this process, or its whole run, with SIGKILL at a chosen moment. On PYTHONPATH, Python imports it at
its start; tests/support/forked.py runs it, too.

QWENLORA_CHAOS holds {"process", "inside", "nth", "after_s", "everyone"}: in the process of that name, when a
function of that name is entered for the nth time, after so many seconds; or {"process", "operation",
"everyone"}: before the file operation of that number in its saves. {"process", "count": FILE} lists these
operations instead.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

_FILE_EVENTS = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def _name():
    if "qwenlora.trainer.main" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
        return f"rank-{os.environ.get('RANK', 0)}"
    return Path("/proc/self/comm").read_text().strip()  # of a process that a forkserver has forked


def _kill(everyone):
    import psutil

    me = psutil.Process()
    if everyone:
        for agent in [one for one in me.parents() if "qwenlora.cli.main" in " ".join(one.cmdline())]:
            for one in [agent, *agent.children(recursive=True)]:
                if one.pid != me.pid:
                    one.kill()
    me.kill()
    time.sleep(60)


def _watch(inside, nth, after_s, everyone):
    """Look at what the main thread does every half a millisecond."""
    main, seen, before = threading.main_thread().ident, 0, False
    while True:
        time.sleep(0.0005)
        frame, now = sys._current_frames().get(main), False
        while frame is not None:
            module = frame.f_globals.get("__name__", "")  # not the file: a clone may have any name
            if frame.f_code.co_name == inside and module.startswith("qwenlora."):
                now = True
                break
            frame = frame.f_back
        seen += now and not before
        before = now
        if seen >= nth:
            time.sleep(after_s)
            _kill(everyone)


class _Operations:
    """Counts what the saving thread does with files."""

    def __init__(self, at, everyone, report):
        self.at, self.everyone, self.report, self.count = at, everyone, report, 0
        real = os.fsync
        os.fsync = lambda descriptor: (self.operation("fsync", ""), real(descriptor))[1]
        sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        if event in _FILE_EVENTS:
            self.operation(event, str(arguments[0]))

    def operation(self, event, path):
        if not threading.current_thread().name.startswith("save-") or "/proc/" in path or self.report == path:
            return
        if self.count == self.at:
            self.count += 1
            _kill(self.everyone)
        self.count += 1
        if self.report:
            with Path(self.report).open("a") as file:
                file.write(f"{threading.current_thread().name} {event} {path}\n")


def _begin():
    if _plan and "qwenlora.trainer.forkserver" in sys.orig_argv:
        os.register_at_fork(after_in_child=_begin_when_named)
    elif _plan.get("process") == _name():
        _harm()


def _begin_when_named():
    before = _name()  # a busy machine may begin the thread after the process has its name

    def wait():
        while _name() == before:
            time.sleep(0.0005)
        if _plan["process"] == _name():
            _harm()

    threading.Thread(target=wait, daemon=True).start()


def _harm():
    if "inside" in _plan:
        arguments = (_plan["inside"], _plan["nth"], _plan["after_s"], _plan["everyone"])
        threading.Thread(target=_watch, args=arguments, daemon=True).start()
    else:
        _Operations(_plan.get("operation", -1), _plan.get("everyone"), _plan.get("count"))


_plan = json.loads(os.environ.get("QWENLORA_CHAOS", "{}"))
_begin()
