"""Shared ground of the tests: real tokenizers where they are, the tiny model, and whole runs made once a
session."""

import fcntl
import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
ASSETS = ROOT.parent / "shared" / "assets"

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the hub; the processes that tests start inherit this
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # model.dtype: auto is float32 on any CPU then
for name in ("COLUMNS", "LINES", *(name for name in os.environ if name.startswith("WANDB_"))):
    os.environ.pop(name, None)  # pytest-xdist sets the first two
os.environ["NETRC"] = os.devnull
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also if the tests run under nohup

settings.load_profile("ci")  # the same examples each time; others: --hypothesis-profile default


def pytest_collection_modifyitems(items):
    """Call slow what waits for a whole training run. pytest-xdist's processes begin with the files that have
    such: one makes `tiny_run` at once, the others take files that need it last."""
    needs = {item.path: None for item in items if "tiny_run" in item.fixturenames}
    for item in items:
        if "tiny_run" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    if "PYTEST_XDIST_WORKER" in os.environ:
        maker = next(iter(needs), None)
        items.sort(key=lambda item: (item.path != maker, item.path not in slow, item.path in needs))


def pytest_collection_finish():
    """Leave what the test files have imported out of later collections of garbage: each would take 0.7 s, and
    accelerate asks for one at the start of every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_measured(tmp_path_factory) -> None:
    """Keep tests from what the user has measured (plan/measured.py), and from writing to it."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def assets() -> Path:
    if not ASSETS.is_dir():
        pytest.skip(f"the real tokenizers and data are not at {ASSETS}")
    return ASSETS


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Return what makes a folder once, whichever of pytest-xdist's processes comes first: name, how ->
    path."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (base / f"{name}.made").exists():
                shutil.rmtree(base / name, ignore_errors=True)  # of a failure
                make(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return folder


@pytest.fixture(scope="session")
def tiny(shared) -> Path:
    from qwenlora.trainer.model.tiny import build_tiny

    return shared("tiny", build_tiny)


@pytest.fixture(scope="session")
def tokenizers(tiny, request) -> dict:
    """Return the tokenizers at hand by name: tiny always, qwen2.5 and qwen3 where the assets are."""
    from transformers import AutoTokenizer

    folders = {"tiny": tiny}
    if ASSETS.is_dir():
        folders |= {name: ASSETS / "tokenizers" / name for name in ("qwen2.5", "qwen3")}
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


class Command:
    """Runs `qwenlora ...` in a folder, as a user does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, *arguments: object, timeout: float = 500, **environment: str
    ) -> subprocess.CompletedProcess:
        return forked.run(
            [*forked.COMMAND, *map(str, arguments)],
            cwd=self.folder,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture
def qwenlora(tmp_path) -> Command:
    return Command(tmp_path)


@pytest.fixture(scope="session")
def tiny_run(shared) -> tuple[Path, subprocess.CompletedProcess]:
    """Return the run folder and the output of `qwenlora train configs/tiny.yaml`, as `make train` runs it.
    Other processes read it at the same time: a test that writes into it does so in a copy."""
    folder = shared("tiny run", _train_tiny)
    said = {name: (folder / name).read_text() for name in ("stdout", "stderr")}
    return folder / "runs" / "tiny", subprocess.CompletedProcess([], 0, **said)


def _train_tiny(folder: Path) -> None:
    folder.mkdir()
    answer = subprocess.run(  # by new interpreters, as users run it
        [*forked.COMMAND, "train", str(ROOT / "configs" / "tiny.yaml")],
        cwd=folder,
        env=os.environ | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (folder / "stdout").write_text(answer.stdout)
    (folder / "stderr").write_text(answer.stderr)


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
    """Return what opens a page in Chromium: browse(page, option ..., dark=False) -> (lines of its console, a
    picture of it)."""
    from PIL import Image

    chromium = shutil.which("chromium")
    if chromium is None:
        assert os.environ.get("QWENLORA_REQUIRE_CHROMIUM") != "1", "Chromium is not installed"
        pytest.skip("Chromium is not installed")
    folder = tmp_path_factory.mktemp("chromium")

    def browse(page: Path, *more: str, dark: bool = False) -> tuple[list[str], object]:
        picture = folder / "page.png"
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
        ]
        options += [
            f"--user-data-dir={folder / 'data'}",
            f"--screenshot={picture}",
            "--window-size=1280,1600",
        ]
        options += more
        options += ["--blink-settings=preferredColorScheme=0"] * dark
        answer = subprocess.run(
            [chromium, *options, page.as_uri()], capture_output=True, text=True, timeout=500, check=True
        )
        lines = [line for line in answer.stderr.splitlines() if ":CONSOLE:" in line]
        return lines, Image.open(picture).convert("RGB")

    return browse


@pytest.fixture
def read_wandb():
    """Return what reads the records of a .wandb file: a 7-byte header, then LevelDB's log format in 32 KiB
    blocks."""
    from wandb.proto import wandb_internal_pb2

    def read_wandb(file):
        data, position, parts = file.read_bytes(), 7, []
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
            parts.append(data[position + 7 : position + 7 + length])
            position += 7 + length
            if kind in (1, 4):  # full, last
                record = wandb_internal_pb2.Record()
                record.ParseFromString(b"".join(parts))
                parts = []
                yield record

    return read_wandb
