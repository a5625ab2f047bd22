"""The screen's side of a chat: lines that are typed, commands, answers as they come, Ctrl-C.

`talk(conversation, console)`. What the model does is conversation.py's.
"""

import re
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.table import Table

from qwenlora.adapter.answers import check_text
from qwenlora.adapter.chat.conversation import Conversation, Reply, Show
from qwenlora.adapter.compare.side_by_side import clean

KEYS = "Alt-Enter, or a backslash at a line's end: a new line. Ctrl-C: stop an answer, or leave. /help: more."
COMMANDS = {
    "/reset": "forget the conversation; the system prompt stays",
    "/base": "ask the base model the last question, as the conversation stood; its answer is not kept",
    "/system TEXT": "set the system prompt; without TEXT: remove it",
    "/help": "this",
    "/quit": "leave; so do Ctrl-D, and Ctrl-C when nothing is typed",
    " /text": "send a text that begins with a slash: with a space before it",
}
_COMMAND = re.compile(r"/([^\s/]*)(?:\s+(.*))?", re.DOTALL)  # and no path, as /usr/bin is


def talk(conversation: Conversation, console: Console) -> int:
    """Ask for lines and answer them until the user leaves; return the exit code."""
    session: PromptSession[str] = PromptSession(
        [("bold", "> ")], multiline=True, key_bindings=_keys(), prompt_continuation="  ", enable_suspend=True
    )
    while True:
        try:
            text = session.prompt()
        except (KeyboardInterrupt, EOFError):
            break
        try:
            if text.strip() and not _heed(text, conversation, console):
                break
        except ValueError as error:
            console.print(clean(str(error)), style="red")
        except KeyboardInterrupt:
            _note(console, "stopped")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C, while torch takes its leave
    return 0


def _heed(text: str, conversation: Conversation, console: Console) -> bool:
    """Answer a text, or do what a command says; return whether to go on."""
    command = _COMMAND.fullmatch(text)
    if not command:
        _answer(partial(conversation.ask, text.strip()), conversation, console)
        return True
    name, text = command[1].lower(), (command[2] or "").strip()
    if text and name in ("reset", "base", "help", "quit", "exit"):
        raise ValueError(f"/{name} takes no text; to send it as it is, begin with a space")
    if name in ("quit", "exit"):
        return False
    if name == "reset":
        conversation.reset()
        _note(console, "the conversation is forgotten")
    elif name == "base":
        _answer(conversation.ask_base, conversation, console, who="the base: ")
    elif name == "system":
        if text:
            check_text(text, "the system prompt")
        conversation.system = text or None
        _note(
            console, "from now on with this system prompt" if text else "from now on without a system prompt"
        )
    elif name == "help":
        table = Table.grid(padding=(0, 2))
        for usage, meaning in COMMANDS.items():
            table.add_row(usage, meaning)
        console.print(table)
    else:
        raise ValueError(f"/{name} is unknown; /help lists commands; to send it as it is, begin with a space")
    return True


def _answer(
    ask: Callable[[Show], Reply], conversation: Conversation, console: Console, who: str = ""
) -> None:
    write = shower(console, console)
    with (
        console.status("reading", spinner_style="dim") as status,
        _stopped_by_ctrl_c(conversation.stop),
        _deaf(),
    ):

        def show(text: str, thought: bool) -> None:
            status.stop()
            write(text, thought)

        reply = ask(show)
    if reply.thought or reply.answer:
        console.print()
    _note(console, who + said_of(reply))


def said_of(reply: Reply) -> str:
    """Return what there is to know of an answer besides itself."""
    facts = [f"{reply.tokens:,} tokens" if reply.tokens != 1 else "1 token"]
    facts += [f"{reply.speed:.3g} a second"] if reply.speed else []
    facts += [] if reply.answer else ["nothing was answered, and nothing is kept"]
    facts += [reply.cut] if reply.cut else []
    if reply.forgotten:
        oldest = "oldest question" if reply.forgotten == 1 else f"{reply.forgotten} oldest questions"
        facts.append(f"the {oldest} no longer fit the model's context and are left out")
    return ", ".join(facts)


def shower(answers: Console, thoughts: Console) -> Show:
    """Return what writes pieces of an answer as they come, and of thoughts, dimly, without what a terminal
    obeys."""
    before = ""  # what was written last: a thought, or of the answer

    def show(text: str, thought: bool) -> None:
        nonlocal before
        text = "\t".join(clean(part) for part in text.split("\t"))
        if before == "thought" and not thought:
            thoughts.print("\n")
        before = "thought" if thought else "answer"
        if thought:
            thoughts.out(text, end="", style="dim")
        else:  # as it is: rich would change tabs
            answers.file.write(text)
            answers.file.flush()

    return show


def _note(console: Console, text: str) -> None:
    console.print(clean(text), style="dim")


@contextmanager
def _stopped_by_ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C call stop, and the next ones raise KeyboardInterrupt."""

    def first(*_: object) -> None:
        stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _deaf() -> Iterator[None]:
    """Show and keep nothing of what is typed meanwhile, but Ctrl-C and Ctrl-Z: a paste would be sent line by
    line."""
    before = termios.tcgetattr(sys.stdin)
    during = list(before)
    during[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, during)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)


def _keys() -> KeyBindings:
    """Return what keys do in a text of several lines: Enter sends it."""
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _clear_or_leave(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys
