"""The progress bar has the terminal for itself: what libraries print goes elsewhere."""

import io
import sys
from types import SimpleNamespace

from rich.console import Console

from qwenlora.trainer.record.progress import ProgressCallback


def test_a_library_s_warning_does_not_break_the_bar(capsys):
    terminal = io.StringIO()
    bar = ProgressCallback(Console(file=terminal, force_terminal=True, width=80))
    bar.on_train_begin(SimpleNamespace(), SimpleNamespace(max_steps=3, global_step=0), SimpleNamespace())
    print("FutureWarning: something is deprecated", file=sys.stderr)
    bar.stop()
    assert "step 0/3" in terminal.getvalue()
    assert "FutureWarning" not in terminal.getvalue()
    assert "FutureWarning" in capsys.readouterr().err
