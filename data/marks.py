"""Marks in the text of turns that stand for something else: images, sound, or names to be filled in."""

import re
from collections.abc import Iterable

from qwenlora.data.bad_row import BadRow, show_names
from qwenlora.data.chunks import JsonObject
from qwenlora.data.turns import Message

# what a processor puts an image, a video or sound in the place of; no text has these by chance
_MEDIA = re.compile(
    r"<\|(?:vision_start|vision_end|vision_pad|image_pad|video_pad|audio_start|audio_end|audio_bos|audio_eos"
    r"|audio_pad|IMAGE|VIDEO|AUDIO|image_1)\|>|<(?:IMG_CONTEXT|VIDEO_CONTEXT|ImageHere)>|<img>[^<>]*</img>"
)
# tags of HTML, too: where a question begins or ends with one that is not closed, it stands for an image
_TAG = re.compile(r"<(image|video|audio)>")
_AT_AN_EDGE = re.compile(r"\s*<(image|video|audio)>|.*<(image|video|audio)>\s*$", re.DOTALL)
_MEDIA_KEYS = {"images", "videos", "audios", "image", "video", "audio"}
_PLACEHOLDER = re.compile(r"\{\{ ?[A-Za-z_]\w+ ?\}\}")


def refuse_media(row: JsonObject, messages: list[Message]) -> None:
    """Refuse turns whose text holds the mark of an image, a video or sound. row: with its keys, as read."""
    for number, message in enumerate(messages, 1):
        text = message["content"]
        if "<" not in text:
            continue
        found = _MEDIA.search(text)
        if not found and message["role"] == "user" and (tag := _TAG.search(text)):
            is_mark = _AT_AN_EDGE.match(text) and f"</{tag[1]}>" not in text
            found = tag if is_mark or _MEDIA_KEYS & row.keys() else None
        if found:
            mark = found[0] if len(found[0]) < 20 else "<img>...</img>"
            raise BadRow(
                f"turn {number} ({message['role']}) holds {mark}, and only text is learnt here; leave such"
                " rows out: data.on_bad_row: skip, or remove the mark from the text"
            )


def placeholders(messages: Iterable[Message]) -> list[str]:
    """Return the placeholders in the text of some turns, as {{name}}."""
    texts = (message["content"] for message in messages)
    return [found for text in texts if "{{" in text for found in _PLACEHOLDER.findall(text)]


class Unfilled:
    """Counts the rows with placeholders that nobody has filled in."""

    def __init__(self) -> None:
        self._rows = 0
        self._names: dict[str, None] = {}  # in order
        self._first = ""

    def add(self, place: str, names: list[str]) -> None:
        """Count a row. place: of the row, for the note; names: its placeholders."""
        if names:
            self._rows += 1
            self._first = self._first or place
            self._names.update(dict.fromkeys(names))

    def notes(self) -> list[str]:
        """Return a warning, if there is a reason for one."""
        if not self._rows:
            return []
        rows = "1 row holds" if self._rows == 1 else f"{self._rows:,} rows hold"
        return [
            f"{rows} {show_names(self._names)} (the first: {self._first}); if these are placeholders, fill"
            " them in: the model learns them as they stand"
        ]
