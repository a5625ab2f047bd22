"""A last check that no path, key or name of user or host leaves the machine; it cannot know every secret."""

import getpass
import netrc
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token

# two folders deep, and not inside a word, an address or a closing tag
_PATH = re.compile(
    r"(?<![\w.:/<~\\-])/(?:[\w.@+-]+/)+[\w.@+=,-]+|(?<![\w/])~[\w.-]*/\w|(?<!\w)[A-Za-z]:\\+Users\\"
)
_HOME = re.compile(r"(?<![\w.:/<~\\-])/(?:root|(?:home|Users)/[\w.@+-]+)(?![\w.@+-])")
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:API|ACCESS|PG|SSH)?(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|PAT|AUTH|WEBHOOK|CREDENTIALS?)"
    r"(?:_|S?$)|_PWD$"
)
_IN_ADDRESS = re.compile(r"://[^\s/:@]*:([^\s/@]+)@")  # a password, in an address such as a database's
_SHORTEST_SECRET = 8
_KEYS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|\bgithub_pat_\w{30,}|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{35}|\bglpat-[\w-]{20,}|-----BEGIN [A-Z"
    r" ]*PRIVATE KEY"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|\bnpm_[A-Za-z0-9]{30,}|\bsk_live_\w{16,}|\bLTAI\w{12,}|\bAKID\w{13,}"
)
# accounts that belong to no person, and words that any card may contain
_COMMON = {
    *("root", "user", "admin", "ubuntu", "debian", "runner", "jovyan", "nobody", "localhost", "guest", "test")
}
_SHORTEST_NAME = 4  # shorter names are searched for in addresses only


@dataclass(frozen=True)
class Private:
    """Private texts. secrets: searched for within words, too; places: paths; names: of user and host."""

    secrets: frozenset[str]
    places: frozenset[str]
    names: frozenset[str]

    @classmethod
    def of_this_machine(cls, places: Iterable[str | Path]) -> "Private":
        """Return the private texts of this machine. places: paths besides the home and the working folder."""
        paths = {os.path.expanduser("~"), os.getcwd(), *map(str, places)}  # noqa: PTH109, PTH111 (texts)
        paths |= {os.path.realpath(path) for path in paths}
        return cls(
            frozenset(_secrets()),
            frozenset(path for path in paths if path.startswith("/") and path.count("/") > 1),
            frozenset(_names()),
        )

    def kinds_in(self, text: str, *, vocabulary: bool = False, ordinary: str = "") -> list[str]:
        """Return the kinds of private texts that a text contains.

        vocabulary: the text is a tokenizer's, in which parts of paths and names are ordinary words; ordinary:
        words that the text may contain though a user or host is called so.
        """
        kinds = []
        # a password that is a word is in every vocabulary
        if self._contains_secret(text, 2 * _SHORTEST_SECRET if vocabulary else 0):
            kinds.append("a key or password of this environment")
        if _KEYS.search(text) or (not vocabulary and _IN_ADDRESS.search(text)):
            kinds.append("what looks like a key")
        if any(re.search(rf"{re.escape(place)}(?![\w.@+-])", text) for place in self.places):
            kinds.append("a path of this machine")
        if vocabulary:
            return kinds
        if not kinds and (_PATH.search(text) or _HOME.search(text)):
            kinds.append("an absolute path")
        if any(_contains_name(text, name, ordinary) for name in self.names):
            kinds.append("the name of the user or the host")
        return kinds

    def _contains_secret(self, text: str, shortest: int) -> bool:
        return any(len(secret) >= shortest and secret in text for secret in self.secrets)


def _contains_name(text: str, name: str, ordinary: str) -> bool:
    word = re.escape(name)
    whole = rf"(?<![\w]){word}(?![\w])"
    is_common = len(name) < _SHORTEST_NAME or name.lower() in _COMMON or re.search(whole, ordinary)
    return bool(re.search(rf"\b{word}@|@{word}\b" if is_common else whole, text))


def _secrets() -> Iterable[str]:
    """Return the values of environment variables that are named like secrets, and stored logins."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())]
    values += [password for value in os.environ.values() for password in _IN_ADDRESS.findall(value)]
    with suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
        values += [password for _, _, password in known.hosts.values() if password]
    with suppress(OSError):
        values.append(get_token() or "")
    return (value for value in values if len(value) >= _SHORTEST_SECRET)


def _names() -> Iterable[str]:
    host = socket.gethostname()
    yield from filter(None, (host, host.partition(".")[0]))
    yield from filter(None, (os.environ.get(name) for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")))
    with suppress(KeyError, OSError):  # in a container, the user may have a number but no name
        yield getpass.getuser()
