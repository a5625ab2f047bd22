"""What `qwenlora --version` prints."""

from importlib import metadata

from qwenlora.run.code import own_commit


def text() -> str:
    """Return the version, and the commit when the package runs from a clone."""
    commit = own_commit()
    return metadata.version("qwenlora") + (f" (commit {commit})" if commit else "")
