"""The screen's side of a chat (conversation.py is the model's): typed lines, commands, answers, Ctrl-C."""

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
from qwenlora.adapter.chat.conversation import ChatReply, Conversation, ShowPiece
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
_COMMAND = re.compile(r"/([^\s/]*)(?:\s+(.*))?", re.DOTALL)  # /usr/bin is a path, not a command


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
            if text.strip() and not _handle(text, conversation, console):
                break
        except ValueError as error:
            console.print(clean(str(error)), style="red")
        except KeyboardInterrupt:
            _note(console, "stopped")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not disturb torch's shutdown
    return 0


def _handle(text: str, conversation: Conversation, console: Console) -> bool:
    """Answer a text, or run a command; return whether to go on."""
    command = _COMMAND.fullmatch(text)
    if not command:
        _answer(partial(conversation.ask, text.strip()), conversation, console)
        return True
    name, argument = command[1].lower(), (command[2] or "").strip()
    if argument and name in ("reset", "base", "help", "quit", "exit"):
        raise ValueError(f"/{name} takes no text; to send it as it is, begin with a space")
    if name in ("quit", "exit"):
        return False
    if name == "reset":
        conversation.reset()
        _note(console, "the conversation is forgotten")
    elif name == "base":
        _answer(conversation.ask_base, conversation, console, who="the base: ")
    elif name == "system":
        _change_system_prompt(argument, conversation, console)
    elif name == "help":
        table = Table.grid(padding=(0, 2))
        for usage, meaning in COMMANDS.items():
            table.add_row(usage, meaning)
        console.print(table)
    else:
        raise ValueError(f"/{name} is unknown; /help lists commands; to send it as it is, begin with a space")
    return True


def _change_system_prompt(text: str, conversation: Conversation, console: Console) -> None:
    if text:
        check_text(text, "the system prompt")
    conversation.system = text or None
    _note(console, f"from now on {'with this' if text else 'without a'} system prompt")


def _answer(
    ask: Callable[[ShowPiece], ChatReply], conversation: Conversation, console: Console, who: str = ""
) -> None:
    print_piece = piece_printer(console, console)
    with (
        console.status("reading", spinner_style="dim") as status,
        _stopped_by_ctrl_c(conversation.stop),
        _keyboard_off(),
    ):

        def show(text: str, is_thought: bool) -> None:
            status.stop()
            print_piece(text, is_thought)

        reply = ask(show)
    if reply.thought or reply.answer:
        console.print()
    _note(console, who + describe_reply(reply))


def describe_reply(reply: ChatReply) -> str:
    """Return a line on a reply: its length, speed, and why it was cut."""
    facts = [f"{reply.tokens:,} tokens" if reply.tokens != 1 else "1 token"]
    facts += [f"{reply.speed:.3g} a second"] if reply.speed else []
    facts += [] if reply.answer else ["nothing was answered, and nothing is kept"]
    facts += [reply.cut] if reply.cut else []
    if reply.forgotten:
        oldest = "oldest question" if reply.forgotten == 1 else f"{reply.forgotten} oldest questions"
        facts.append(f"the {oldest} no longer fit the model's context and are left out")
    return ", ".join(facts)


def piece_printer(answers: Console, thoughts: Console) -> ShowPiece:
    """Return a function that prints pieces of an answer (of a thought dimly), without terminal controls."""
    in_thought = False

    def print_piece(text: str, is_thought: bool) -> None:
        nonlocal in_thought
        text = "\t".join(map(clean, text.split("\t")))
        if in_thought and not is_thought:
            thoughts.print("\n")
        in_thought = is_thought
        if is_thought:
            thoughts.out(text, end="", style="dim")
        else:  # not through rich, which would change tabs
            answers.file.write(text)
            answers.file.flush()

    return print_piece


def _note(console: Console, text: str) -> None:
    console.print(clean(text), style="dim")


@contextmanager
def _stopped_by_ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Make the first Ctrl-C call stop, and the next raise KeyboardInterrupt."""

    def first(*_: object) -> None:
        stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _keyboard_off() -> Iterator[None]:
    """Drop keys typed meanwhile, but for Ctrl-C and Ctrl-Z: a pasted text would be sent line by line."""
    before = termios.tcgetattr(sys.stdin)
    during = list(before)
    during[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, during)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)


def _keys() -> KeyBindings:
    """Return the key bindings for texts of several lines: Enter sends them."""
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
