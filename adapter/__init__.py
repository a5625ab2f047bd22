"""After training: an adapter is verified, asked, compared, merged, written up and handed on."""

import contextlib
import io
import logging
import warnings


def quiet() -> contextlib.AbstractContextManager[object]:
    """Keep libraries' warnings off a person's screen from now on, and in the block also what they print (on
    import)."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    return contextlib.redirect_stdout(io.StringIO())
