"""Run folders, made without training."""

import json

import pytest

from qwenlora.configs import load_config
from qwenlora.configs.load import to_yaml
from qwenlora.run.folder import RunFolder

ROWS = {"rows": 1200, "read_rows": 1200, "longest": 99}
FACTS = {
    "base": "tiny",
    "base_fingerprint": "463e2ba55616a862",
    "data_folder": "",
    "files_key": "",
    "data": {"train": {**ROWS, "tokens": 58190, "trained_tokens": 29060, "sha256": "c3a49d8e" * 8}},
    "packing": False,
    "bad_rows": 0,
    "notes": [],
    "parameters": dict.fromkeys(("total", "trainable", "body", "head", "layers"), 1),
    "checkpoint_bytes": 1,
}


@pytest.fixture
def make(tmp_path):
    """Return what makes a run folder as a finished run leaves it. said: more keys of the config."""
    file = tmp_path / "my.yaml"
    file.write_text("model: {name_or_path: tiny}\ndata: {train: rows/my.jsonl}\n")

    def make(
        name: str, *said: str, loss: float = 0.25, evaluated: float | None = 1.5, step: int = 40
    ) -> RunFolder:
        run = RunFolder(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.config.write_text(to_yaml(load_config(file, [*said, f"run_dir=runs/{name}"])))
        run.code.write_text(
            json.dumps({"git": "a" * 40, "versions": {"torch": "2.13.0"}, "python": "3.11.7"})
        )
        run.facts.write_text(json.dumps(FACTS))
        lines = [{"step": step, "eval_loss": evaluated, "eval_perplexity": 4.48}] * (evaluated is not None)
        lines += [{"step": at, "loss": loss} for at in range(1, step + 1)]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        run.adapter.mkdir()
        (run.adapter / "adapter_model.safetensors").write_bytes(b"0" * 2_500_000)
        run.begin_attempt(1)
        run.history.note(first_step=1)
        run.history.progress.write(1, step, 20.0, 0.1)
        run.end_attempt("done")
        return run

    return make
