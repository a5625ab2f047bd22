"""Whether the model hub answers. A process asks it once, before it needs anything from there: the hub's own
client would try for minutes. Without an answer, models and data sets come from the cache alone, at once."""

import logging
import threading
from pathlib import Path
from typing import Literal

LIMIT_S = 10.0  # that the hub has to answer
CACHED_LIMIT_S = 3.0  # the same, where the cache has what is asked for
Kind = Literal["model", "dataset"]

log = logging.getLogger("qwenlora")
_asked, _silence = False, ""  # whether this process has asked, and why there was no answer


def ask(name: str, kind: Kind = "model") -> None:
    """Let this process take models and data sets from the cache alone, unless the hub answers in time."""
    global _asked, _silence
    from huggingface_hub import constants  # takes a moment, and local files do without

    if _asked or constants.HF_HUB_OFFLINE:
        return
    limit_s = CACHED_LIMIT_S if _cached(name, kind) else LIMIT_S
    _asked, _silence = True, _why_silent(constants.ENDPOINT, limit_s)
    if _silence:
        constants.HF_HUB_OFFLINE = True
        log.warning("%s: models and data sets come from the cache", _silence)


def why_offline() -> str:
    """Return why this process does not use the hub, for messages; an empty text if it does."""
    from huggingface_hub import constants

    return (_silence or "HF_HUB_OFFLINE is set") if constants.HF_HUB_OFFLINE else ""


def advice(name: str, kind: Kind = "model") -> str:
    """Return what to do where the hub cannot be used and the cache lacks something."""
    repo_type = " --repo-type dataset" if kind == "dataset" else ""
    return (
        "set HF_ENDPOINT to a mirror of the hub that this machine reaches, or name a folder to which you have"
        f" downloaded it: `hf download {name}{repo_type} --local-dir FOLDER`, `modelscope download --{kind}"
        f" {name} --local_dir FOLDER` (HF_HUB_OFFLINE=1 uses the cache without asking the hub)"
    )


def _cached(name: str, kind: Kind) -> bool:
    """Whether the hub's cache has weights of a model, or files of a data set."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    return any(folder.glob("*/*.safetensors" if kind == "model" else "*/*"))


def _why_silent(endpoint: str, limit_s: float) -> str:
    """Return why an endpoint gives no answer within some seconds; an empty text when it gives any."""
    from huggingface_hub import get_session

    why = [f"no answer within {limit_s:.0f} s"]

    def knock() -> None:
        try:
            get_session().head(endpoint, timeout=2 * limit_s)
            why[0] = ""
        except Exception as error:  # of names, connections, proxies, certificates
            why[0] = " ".join(str(error).split()) or type(error).__name__

    # a thread: names are looked up, and addresses tried one after the other, for longer than any timeout says
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(limit_s)
    return f"{endpoint} cannot be reached ({why[0]})" if why[0] else ""
