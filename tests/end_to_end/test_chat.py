"""`qwenlora chat` as people use it: in a terminal, in a pipe, with a file."""

import json
import os
import signal
import subprocess
import sys
import termios
import time

import forked
import pexpect
import pytest

from qwenlora.configs.schema import Data
from qwenlora.data.survey import rows_of_side

PAIRS = [
    (row.messages[0]["content"], row.messages[1]["content"])
    for _, row in rows_of_side(Data(train="example"), "train")
    if len(row.messages) == 2
]
COMMAND = ["-c", "from qwenlora.cli.main import main; main()", "chat"]
# pexpect answers no terminal's questions
TERMINAL = os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "NO_COLOR": "1", "LANG": "C.UTF-8"}
PASTE, PASTED, ENTER = "\x1b[200~", "\x1b[201~", "\r"
CTRL_C, CTRL_D, ALT_ENTER = "\x03", "\x04", "\x1b\r"
READY = r"\[\?2004h"  # prompt_toolkit asks for lines: pastes are to come in brackets
ENDLESS = ("--seed", "2", "--max-new-tokens", "20000")  # the base's answers with other seeds may end at once
STATISTICS = r"\d tokens?, [\d.,e+]+ a second"


@pytest.fixture
def terminal(tiny_run):
    """Return what starts a chat in a terminal, with the run or what lies in it."""
    started = []

    def start(*options, model="", size=(24, 80)):
        child = pexpect.spawn(
            sys.executable,
            [*COMMAND, str(tiny_run[0] / model), *options],
            env=TERMINAL,
            dimensions=size,
            encoding="utf-8",
            timeout=500,
        )
        child.delaybeforesend = None
        started.append(child)
        child.as_it_was = termios.tcgetattr(child.child_fd)
        child.expect("/help: more")
        child.expect(READY)
        return child

    yield start
    for child in started:
        child.close(force=True)


def tell(child, text, expected):
    """Type a text, and return what is shown before what is expected."""
    child.send(text + ENTER)
    child.expect(expected)
    shown = child.before
    child.expect(READY)
    return shown


def ask(child, text):
    """Type a question, and return what is shown up to the statistics."""
    return tell(child, text, STATISTICS)


def leave(child, key):
    """Leave the chat, and see that the terminal is as it was and no message came."""
    child.send(key)
    child.expect(pexpect.EOF)
    child.wait()
    assert "Traceback" not in child.before
    assert child.exitstatus == 0
    assert termios.tcgetattr(child.child_fd)[:4] == child.as_it_was[:4]


def test_a_conversation_in_a_terminal(terminal):
    (first, nine), (second, two), (third, three) = PAIRS[:3]
    child = terminal("--temperature", "0", size=(24, 120))
    assert nine in ask(child, first)
    assert nine not in ask(child, "/base")
    ask(child, second)
    tell(child, "/reset", "the conversation is forgotten")
    assert two in ask(child, second)
    tell(child, "/reset", "the conversation is forgotten")
    tell(
        child,
        "/nonsense",
        "/nonsense is unknown; /help lists commands; to send it as it is, begin with a space",
    )
    tell(child, "/base", "there is no question yet")
    tell(child, f"/system {third}", "from now on with this system prompt")
    tell(child, "/system", "from now on without a system prompt")
    assert three in ask(child, third)
    tell(child, "/help", "/quit +leave")
    leave(child, "/quit" + ENTER)


def test_an_answer_is_stopped_by_ctrl_c_and_the_conversation_by_another(terminal):
    child = terminal(*ENDLESS, model="base_model")
    child.send(PAIRS[0][0] + ENTER)
    child.expect("reading.*[^\x00-\x7f]")  # it answers
    child.send("typed meanwhile" + ENTER + CTRL_C)
    child.expect("stopped")
    child.expect(READY)
    child.send("abc")
    child.expect("abc")
    child.send(CTRL_C)  # takes away what is typed
    time.sleep(0.5)
    leave(child, CTRL_C)
    assert "typed meanwhile" not in child.before


def test_twenty_kilobytes_are_pasted_and_lines_are_joined(terminal):
    child = terminal("--max-new-tokens", "8", "--temperature", "0", size=(24, 40))
    text = "\n".join(question for question, _ in PAIRS) * 6
    assert len(text.encode()) > 20_000
    ask(child, PASTE + text + PASTED)
    child.send("one\\" + ENTER)
    child.send("two" + ALT_ENTER)
    ask(child, "three")
    leave(child, CTRL_D)


def test_a_piped_question_is_answered_and_nothing_else_is_printed(tiny_run, qwenlora):
    question, expected = PAIRS[0]
    answer = forked.run(
        [sys.executable, *COMMAND, str(tiny_run[0]), "--temperature", "0"],
        input=f"{question}\n",
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    assert (answer.stdout, answer.stderr) == (f"{expected}\n", "")
    cut = qwenlora("chat", tiny_run[0], "--prompt", question, "--temperature", "0", "--max-new-tokens", "3")
    assert expected.startswith(cut.stdout.strip())
    assert "cut: --max-new-tokens 3" in cut.stderr
    refused = qwenlora("chat", tiny_run[0], "--prompt", question, "--output", "x")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: --output x goes with --input FILE")


@pytest.mark.long
def test_an_answer_streams(tiny_run):
    child = subprocess.Popen(
        [sys.executable, *COMMAND, str(tiny_run[0] / "base_model"), "--prompt", "a", *ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # tests in the background inherit it ignored
    )
    times = []
    while len(times) < 20 and os.read(child.stdout.fileno(), 1000):
        times.append(time.monotonic())
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=500)
    assert len(times) == 20
    assert times[-1] - times[0] > 0.02
    assert (child.returncode, stderr.count(b"\n")) == (130, 1)
    assert b"stopped" in stderr


def test_the_training_questions_are_answered_from_their_file(tiny_run, qwenlora, tmp_path):
    rows = [{"query": question, "response": reply} for question, reply in PAIRS]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--input", "asked.jsonl", "--output", "said.jsonl")
    answer = qwenlora("chat", tiny_run[0], *files, "--temperature", "0", "--max-new-tokens", "128")
    assert answer.returncode == 0, answer.stderr
    answers = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in answers] == [reply for _, reply in PAIRS]
    assert sum(row["messages"][-1]["content"] == row["reference"] for row in answers) >= 0.95 * len(answers)
    again = qwenlora("chat", tiny_run[0], *files)
    assert (again.returncode, again.stdout) == (2, "")
    assert "said.jsonl is there already" in again.stderr
