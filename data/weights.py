"""How much the loss of a reply, or of a whole row, counts: 0 or false masks it, 1 or true trains it, another
number weighs it. The loss is sum(weight * loss) / sum(weight) over the trained tokens of a global batch."""

from qwenlora.data.bad_row import BadRow, show
from qwenlora.data.chunks import JsonObject

# names that people use, of which a turn or row has one
OF_TURNS = ("weight", "loss_weight", "loss", "loss_mask", "train", "training", "output_with_loss")
OF_ROWS = ("weight", "loss_weight")
# a row's weight times a turn's is still a float32 without loss of digits
LEAST, MOST = 1e-18, 1e18


def read_weight(values: JsonObject, names: tuple[str, ...], where: str) -> float | None:
    """Return the weight of a turn or row; None when it has none. Raises: BadRow."""
    found = {name: _weight(values[name], name, where) for name in names if values.get(name) not in (None, "")}
    if len(set(found.values())) > 1:
        first, second, *_ = found
        raise BadRow(
            f"{where}has {first} and {second}, which differ; ignore one: data.columns: {{{second}: null}}"
        )
    return next(iter(found.values()), None)


def _weight(value: object, name: str, where: str) -> float:
    if isinstance(value, bool | int | float) and (value == 0 or LEAST <= value <= MOST):
        return abs(float(value))  # not -0.0
    raise BadRow(
        f"{where}has {name} {show(value)}; expected 0 or false (not trained), 1 or true (trained), or a"
        f" number from {LEAST:g} to {MOST:g}; correct it, or ignore it: data.columns: {{{name}: null}}"
    )
