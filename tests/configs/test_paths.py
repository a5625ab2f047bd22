"""Relative names are found in the folder in which a run was started (also tests/run/test_folder.py)."""

from qwenlora.configs import Config
from qwenlora.configs.paths import located


def test_a_tokenizer_is_found_and_names_that_mean_something_else_stay(tmp_path):
    for name in ("tok", "tiny", "example", "~/rows"):
        (tmp_path / name).mkdir(parents=True)
    config = Config(
        run_dir="runs/x",
        model={"name_or_path": "tiny", "tokenizer": "tok"},
        data={"train": "example", "eval": "~/rows"},
    )
    found = located(config, [tmp_path])
    assert (found.model.name_or_path, found.model.tokenizer) == ("tiny", str(tmp_path / "tok"))
    assert (found.data.train, found.data.eval) == ("example", "~/rows")
