"""After training: verify an adapter, chat with it, compare, merge, report, export."""

import contextlib
import io
import logging
import warnings


def quiet() -> contextlib.AbstractContextManager[object]:
    """Silence libraries' warnings from now on, and inside the block their output on import, too."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    return contextlib.redirect_stdout(io.StringIO())
