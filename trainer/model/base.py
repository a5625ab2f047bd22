"""The base model: where it is, and its fingerprint. A folder needs no transformers, which takes a second to
import. pretrained.py reads a base's config and tokenizer, loading.py its weights."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qwenlora.configs.schema import Config
from qwenlora.data import hub
from qwenlora.trainer.model import damage
from qwenlora.trainer.model.headers import CONFIG, find_file, stored_in

TINY = "tiny"
SAMPLE_BYTES = 2**12
UNKNOWN = "None"  # the fingerprint that older versions recorded for a base from the hub


def resolve(name: str, key: str) -> str:
    """Return a model folder's absolute path, or a hub name as it is. Raises: ValueError when it is neither,
    or the model is damaged."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if key == "model.name_or_path" and not (folder / "config.json").is_file():
            raise ValueError(f"{key}={name} has no config.json; name the folder that holds the model's files")
        if key == "model.name_or_path":
            damage.check_model(folder.absolute())
        return str(folder.absolute())
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"{key}={name}: no such folder (looked for {folder.absolute()}); a hub name has one slash"
        )
    return name


@contextmanager
def hub_errors(key: str, name: str) -> Iterator[None]:
    """Ask the hub, if the model is there; turn transformers' errors about a missing or broken model into a
    ValueError of one line."""
    on_hub = name.count("/") == 1 and not Path(name).expanduser().is_dir()
    if on_hub:
        hub.ask(name)
    try:
        yield
    except (OSError, ImportError, json.JSONDecodeError) as error:
        why = hub.why_offline() if on_hub else ""
        offline = f" (offline: {why})" if why else ""
        cure = hub.advice(name) if why else "the path of a folder that holds the files will do, too"
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{key}={name} cannot be loaded{offline}: {reason.rstrip('.')}; {cure}") from error


def fingerprint(config: Config, base: str) -> str:
    """Return a hash that changes when the base's weights do: a hub model's commit; for a folder, a hash of
    three samples of each safetensors tensor and 64 of any other weight file (seconds for a 72B model)."""
    if not Path(base).is_dir():
        with hub_errors("model.name_or_path", config.model.name_or_path):
            config_file = find_file(base, CONFIG, revision=config.model.revision)
        from transformers.utils.hub import extract_commit_hash  # which find_file has imported

        # the hub's cache has the commit in its paths; another kind of cache does not
        commit: str | None = extract_commit_hash(str(config_file), None)
        return commit or hashlib.sha256(Path(str(config_file)).read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256((Path(base) / "config.json").read_bytes())
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    for path in sorted(file for file in Path(base).iterdir() if file.suffix in suffixes):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            evenly = range(0, size, max(size // 64, 1))
            for offset in _offsets(file, size) if path.suffix == ".safetensors" else evenly:
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _offsets(file: BinaryIO, size: int) -> Iterator[int]:
    """Yield offsets of samples in a safetensors file: its header; start, middle and end of each tensor."""
    header = int.from_bytes(file.read(8), "little")
    yield from range(0, min(header + 8, size), SAMPLE_BYTES)
    with suppress(ValueError):  # a damaged file that is none of the model's
        for each in stored_in(Path(file.name)):
            yield from (each.start, (each.start + each.stop) // 2, max(each.start, each.stop - SAMPLE_BYTES))
