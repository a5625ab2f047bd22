"""A hub that does not answer costs seconds: then models and data sets come from the cache, or the message
says what to do."""

import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from huggingface_hub import constants

from qwenlora.configs.schema import Config, Data, Model
from qwenlora.data import hub, sources
from qwenlora.trainer.model import base as models
from qwenlora.trainer.model import loading, pretrained

COMMIT = "1" * 40


@pytest.fixture(autouse=True)
def own_hub(monkeypatch, tmp_path):
    """This test's process has not asked yet, and its cache is empty."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_asked", False)
    monkeypatch.setattr(hub, "_silence", "")


@pytest.fixture
def refusing(monkeypatch):
    """The endpoint's port is taken, and nobody listens there."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        yield endpoint


@pytest.fixture
def silent(monkeypatch):
    """The endpoint accepts connections, and never says a word."""
    monkeypatch.setattr(hub, "LIMIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        yield endpoint


@pytest.fixture
def nowhere(monkeypatch):
    """The endpoint's name does not resolve."""

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    return "http://hub.invalid"


ADVICE = (
    "; set HF_ENDPOINT to a mirror of the hub that this machine reaches, or name a folder to which you have"
    " downloaded it: `hf download {name}{repo} --local-dir FOLDER`, `modelscope download --{kind} {name}"
    " --local_dir FOLDER`"
    " (HF_HUB_OFFLINE=1 uses the cache without asking the hub)"
)


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [("refusing", "Connection refused"), ("silent", "no answer within 0 s"), ("nowhere", "not known")],
)
def test_a_hub_that_does_not_answer_is_named_with_what_to_do(request, caplog, endpoint, why):
    address = request.getfixturevalue(endpoint)
    hub.ask("Qwen/Qwen3-8B")
    assert constants.is_offline_mode()
    assert hub.why_offline().startswith(f"{address} cannot be reached (")
    assert why in hub.why_offline()
    assert caplog.messages == [f"{hub.why_offline()}: models and data sets come from the cache"]


def test_a_model_that_is_neither_there_nor_in_the_cache_is_refused(refusing):
    config = Config(run_dir="r", model=Model(name_or_path="Qwen/Qwen3-8B"), data=Data(train="example"))
    with pytest.raises(ValueError, match="cannot be loaded") as refusal:
        pretrained.load_config_of(config, "Qwen/Qwen3-8B")
    message = str(refusal.value)
    assert message.startswith(
        f"model.name_or_path=Qwen/Qwen3-8B cannot be loaded (offline: {refusing} cannot be reached ("
    )
    assert message.endswith(ADVICE.format(name="Qwen/Qwen3-8B", kind="model", repo=""))


def test_a_data_set_that_is_neither_there_nor_in_the_cache_is_refused(refusing):
    with pytest.raises(ValueError, match="no data set of the hub") as refusal:
        sources.find(Data(train="me/rows"))
    message = str(refusal.value)
    assert f"(offline: {refusing} cannot be reached (" in message
    assert message.endswith(ADVICE.format(name="me/rows", kind="dataset", repo=" --repo-type dataset"))


def test_what_is_in_the_cache_is_used_without_the_hub(tiny, refusing, monkeypatch, tmp_path):
    repo = tmp_path / "cache" / "models--me--TinyQ"
    shutil.copytree(tiny, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    limits = []
    why_silent = hub._why_silent
    monkeypatch.setattr(hub, "_why_silent", lambda *asked: limits.append(asked[1]) or why_silent(*asked))
    config = Config(run_dir="r", model=Model(name_or_path="me/TinyQ"), data=Data(train="example"))
    base = models.resolve("me/TinyQ", "model.name_or_path")
    assert pretrained.load_tokenizer(config, base).is_fast
    assert models.fingerprint(config, base) == COMMIT
    assert loading.load_base(config, base).config.model_type == "qwen3"
    assert limits == [hub.CACHED_LIMIT_S], "asked once, and not for long"


def test_a_hub_that_answers_anything_is_used(monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        hub.ask("Qwen/Qwen3-8B")
        hub.ask("Qwen/Qwen3-4B")  # is not asked again: the server has answered its one request
        thread.join()
    assert hub.why_offline() == ""


def test_a_hub_that_must_not_be_used_is_not_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_why_silent", lambda *_: pytest.fail("it was asked"))
    hub.ask("Qwen/Qwen3-8B")
    assert hub.why_offline() == "HF_HUB_OFFLINE is set"


def test_a_folder_asks_nobody(tiny, monkeypatch):
    monkeypatch.setattr(hub, "ask", lambda *_: pytest.fail("it was asked"))
    config = Config(run_dir="r", model=Model(name_or_path=str(tiny)), data=Data(train="example"))
    pretrained.load_config_of(config, str(tiny))
