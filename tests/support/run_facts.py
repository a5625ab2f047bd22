"""Facts of a run that was not prepared."""

from qwenlora.run.records import Facts, Parameters, SideCounts


def make_facts(**changes) -> Facts:
    """Return facts with the fields that a test is about. changes: fields of Facts."""
    side = SideCounts(rows=9, read_rows=9, tokens=90, trained_tokens=9, longest=20, sha256="s")
    facts = Facts(
        base="b",
        base_fingerprint="f",
        data_folder="d",
        files_key="k",
        data={"train": side},
        packing=False,
        bad_rows=0,
        notes=[],
        parameters=Parameters(total=1, trainable=1, body=1, head=1, layers=1),
        checkpoint_bytes=1,
    )
    return facts.revised(**changes)
