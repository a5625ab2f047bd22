"""What a spare node does while it waits."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from qwenlora.configs import load_config
from qwenlora.launch import spare
from qwenlora.launch.refusals import nodes_that_train
from qwenlora.run.folder import RunFolder

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.mark.parametrize("found", [True, False])
def test_it_reads_the_bases_weights(tmp_path, monkeypatch, found):
    base, read = tmp_path / "base", []
    run = RunFolder(tmp_path / "run")
    if found:
        base.mkdir()
        for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
            (base / name).write_bytes(b"1")
    monkeypatch.setattr(run, "read_facts", lambda: SimpleNamespace(base=str(base)))
    monkeypatch.setattr(run, "read_config", lambda: load_config(TINY))
    real = spare._read
    monkeypatch.setattr(spare, "_read", lambda file: (read.append(file.name), real(file)))
    spare._read_base(run)
    assert sorted(read) == ["model-1.safetensors", "model-2.safetensors"] * found


def test_it_waits_where_there_is_nothing_to_read_yet(tmp_path):
    spare._read_base(RunFolder(tmp_path / "run"))


def test_some_nodes_train():
    config = load_config(TINY, ["launch.spare_nodes=2"])
    assert nodes_that_train(config, 5) == 3
    for nodes, of in ((2, "2 nodes"), (1, "1 node")):
        with pytest.raises(ValueError, match=f"spare_nodes=2 leaves none of the job's {of} to train on"):
            nodes_that_train(config, nodes)
