"""The messages between agents: frozen models, sent as lines of JSON {"KIND": {fields}}; never as pickles."""

import json
from typing import ClassVar, NamedTuple

from pydantic import BaseModel

from qwenlora.run.handover import Handover
from qwenlora.run.heartbeat import Beat


class AgentMessage(BaseModel, frozen=True):
    """A message. node: the sender; received_at: seconds since 1970. The receiver sets both."""

    KIND: ClassVar[str]

    node: int = 0
    received_at: float = 0.0


class NodeFacts(AgentMessage):
    """What nodes must have in common. config, code: hashes; processes: ranks it runs; time: its clock."""

    KIND = "facts"
    config: str
    code: str
    python: str
    versions: dict[str, str | None]
    processes: int
    time: float


class FileInRunFolder(AgentMessage):
    """The text of a file that this node wrote into the run folder, or why it could not."""

    KIND = "file"
    text: str = ""
    problem: str = ""


class StartRanks(AgentMessage):
    """Start your ranks. port: of the first node, where ranks meet; hosts: of this attempt, by rank; spare:
    the others that are there, and wait."""

    KIND = "start"
    handover: Handover
    port: int
    hosts: tuple[str, ...]
    spare: tuple[str, ...] = ()


class RanksEnded(AgentMessage):
    """This node's ranks have ended. code: their launcher's exit code; gpu_fault: what the driver says,
    if they failed."""

    KIND = "ended"
    code: int
    gpu_fault: str = ""


class EndRanks(AgentMessage):
    """Kill your ranks, unless they end by themselves in time."""

    KIND = "end"
    within_s: float


class WriteStacks(AgentMessage):
    """Ranks hang: have yours write their stacks, and say how far they are."""

    KIND = "stacks"


class RankPosition(NamedTuple):
    """How far a rank is. state: why its process does not run, if so; quiet_s: since its last sign of life."""

    beat: Beat
    state: str
    quiet_s: float


class RankPositions(AgentMessage):
    """How far this node's ranks are."""

    KIND = "stalled"
    ranks: list[RankPosition]


class RunOver(AgentMessage):
    """The run is over: leave."""

    KIND = "over"


class AgentLost(AgentMessage):
    """The connection to that node's agent has ended. Never sent: the receiver makes it."""

    KIND = "lost"


_BY_KIND = {message.KIND: message for message in AgentMessage.__subclasses__()}


def encode(message: AgentMessage) -> str:
    """Return the line that is sent."""
    return json.dumps({message.KIND: message.model_dump(mode="json")}, ensure_ascii=False)


def decode(line: str, node: int, received_at: float) -> AgentMessage:
    """Return a node's message. Raises: ValueError, TypeError, KeyError, AttributeError or RecursionError."""
    ((kind, fields),) = json.loads(line).items()
    return _BY_KIND[kind].model_validate(fields | {"node": node, "received_at": received_at})
