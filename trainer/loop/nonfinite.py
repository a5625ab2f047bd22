"""Steps whose loss or gradient is not finite: which rows they trained, and whether the run may go on."""

from torch import Tensor

from qwenlora.configs import Config
from qwenlora.trainer.loop.batches import Rows
from qwenlora.trainer.ranks import faults
from qwenlora.trainer.spread.sequence import Team


class NonFiniteSteps:
    """Applies train.on_nan. in_a_row: steps left out since the last trained one."""

    def __init__(self, config: Config, rows: Rows, team: Team) -> None:
        self.policy = config.train.on_nan
        self.in_a_row = 0
        self._rows, self._team = rows, team

    def describe(self, step: int, losses: list[Tensor]) -> str:
        """Return what is not finite, in which rows; all ranks call it. step: from 1; losses: of this rank's
        micro-batches. If all are finite, the gradient is not, to which all rows of the step contribute."""
        broken = faults.broken_micro_batches(losses, self._team.number, self._team.teams)
        order = self._rows.order
        of_loss = [unit for number in broken for unit in order.micro_batch(step - 1, number)]
        units = of_loss or order.step(*divmod(step - 1, order.steps_per_epoch))
        rows = sorted(row for unit in units for row in unit)
        return faults.describe(step, "loss" if of_loss else "gradient", rows, self._rows.place)

    def leave_out(self, what: str) -> None:
        """Count a step left out. Raises: TrainingFault when train.on_nan forbids it. what: see describe()."""
        self.in_a_row += 1
        if self.policy == "stop":
            raise faults.TrainingFault(
                f"{what}; it changed no weight, and the checkpoints are from before it: look at these rows,"
                " lower train.learning_rate, or set train.on_nan: skip or rollback"
            )
        if self.in_a_row > faults.IN_A_ROW:
            raise faults.TrainingFault(
                f"{what}; the {faults.IN_A_ROW} steps before were as well: train.on_nan={self.policy}"
                " stops the run"
            )
