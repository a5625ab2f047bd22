"""Site files: what a cluster needs in every job, as partition, account and how Python runs there.
`qwenlora submit my.yaml --site mycluster` and `sbatch $(qwenlora site mycluster) slurm/train.sh my.yaml` read
them. Their values reach sbatch and a shell, so only a few characters are allowed."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveInt, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

import qwenlora.configs
from qwenlora.configs.schema import NonNegative, Section, Text
from qwenlora.configs.wording import did_you_mean, expected
from qwenlora.configs.yaml_file import Places, read_yaml

VARIABLE = "QWENLORA_SITE"
FOLDER = Path("configs/clusters")
PACKAGED = Path(qwenlora.configs.__file__).parent / "clusters"

# options of sbatch that a submission sets itself or relies on
OURS = (
    *("array", "chdir", "error", "export", "export-file", "input", "job-name", "no-requeue", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "test-only", "wait", "wrap"),
)
_SECRET = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET|CREDENTIALS?)$", re.IGNORECASE)


def _matches(pattern: str, expected: str) -> AfterValidator:
    whole: Callable[[str], re.Match[str] | None] = re.compile(pattern, re.ASCII).fullmatch

    def check(value: str) -> str:
        if not whole(value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("text on one line")
    return value


def _is_free(option: str) -> str:
    if (
        option in Site.model_fields
        or option.replace("-", "_") in Site.model_fields
        or option in ("time", "mem")
    ):
        raise ValueError("an option that has no key of its own here; use the key of the site file")
    if option in OURS:
        raise ValueError("an option that qwenlora does not set itself")
    return option


def _is_no_secret(name: str) -> str:
    if _SECRET.search(name):
        raise ValueError(
            "a name that is no secret's: this file and job scripts can be read by others; export it in the"
            " shell that submits, whose environment the job inherits"
        )
    return name


Word = Annotated[str, _matches(r"[\w.,:/@+-]+", "letters, digits and . , : / @ + - _")]
Expression = Annotated[
    str, _matches(r"[\w.,:/@+=%&|*()\[\]!-]+", "letters, digits and . , : / @ + = % & | * ( ) [ ] ! - _")
]
Hosts = Annotated[str, _matches(r"[\w.,\[\]-]+", "host names, as node[1-4,7]")]
Option = Annotated[
    str, _matches("[a-z][a-z0-9-]*", "a long option of sbatch without its dashes"), AfterValidator(_is_free)
]
Name = Annotated[str, _matches(r"[A-Za-z_]\w*", "a variable's name"), AfterValidator(_is_no_secret)]
Line = Annotated[Text, AfterValidator(_one_line)]


class Site(Section):
    """One site file. For settings that are left out, the cluster's defaults hold."""

    partition: Word | None = Field(
        None, description="Partition, or several: the first that can start the job."
    )
    account: Word | None = Field(None, description="Account that is charged.")
    qos: Word | None = Field(None, description="Quality of service.")
    constraint: Expression | None = Field(None, description="Features that nodes must have, as a100&ib.")
    reservation: Word | None = Field(None, description="Reservation.")
    nodelist: Hosts | None = Field(None, description="Nodes that the job must have.")
    exclude: Hosts | None = Field(None, description="Nodes that the job must not have.")
    nodes: PositiveInt | None = Field(None, description="Nodes, where the command does not say.")
    gpus_per_node: Annotated[int, Field(ge=0)] | None = Field(
        None, description="GPUs a node, where it does not say."
    )
    gpu: Word | None = Field(
        None, description="Kind of GPU, as h100, by which a run that cannot fit is refused."
    )
    cpus_per_task: PositiveInt | None = Field(None, description="CPUs a node. Default: one a process.")
    mem_gb: Annotated[float, Field(gt=0.0)] | None = Field(None, description="Memory a node, in GiB.")
    timeout_min: PositiveInt | None = Field(None, description="Time limit in minutes, where it does not say.")
    exclusive: bool = Field(False, description="Whole nodes, shared with no other job.")
    signal_lead_s: PositiveInt = Field(
        120, description="Seconds before the time limit at which the run saves."
    )
    env_file: Line | None = Field(
        None,
        description="Shell file that loads modules or a venv, relative to this one. Default: slurm/env.sh.",
    )
    python: Annotated[list[Line], Field(min_length=1)] | None = Field(
        None, description="Words that run Python on a node. Default: the Python that submits."
    )
    srun_args: list[Line] = Field(default_factory=list, description="Further words for srun.")
    environment: dict[Name, Line | int | NonNegative] = Field(
        default_factory=dict, description="Variables to export."
    )
    sbatch: dict[Option, Expression | int | bool] = Field(
        default_factory=dict,
        description="Further options of sbatch, as {mail-type: FAIL}; true: one without a value.",
    )
    config: dict[Text, Any] = Field(
        default_factory=dict,
        description="Config keys, as {log.wandb: offline}: below what a run's YAML says.",
    )
    _file: Path | None = PrivateAttr(None)

    @property
    def file(self) -> Path | None:
        """The file that this was read from."""
        return self._file

    def sbatch_options(self) -> dict[str, str | int | bool]:
        """Return {long option: value} for sbatch, without sizes and time; True: an option without a value."""
        named = {key: getattr(self, key) for key in _PASSED_ON}
        options: dict[str, str | int | bool] = {
            key: value for key, value in named.items() if value is not None
        }
        if self.mem_gb:
            options["mem"] = f"{round(self.mem_gb * 1024)}M"
        options |= {"exclusive": True} if self.exclusive else {}
        return options | {option: value for option, value in self.sbatch.items() if value is not False}

    def command_line(self) -> list[str]:
        """Return the site as options on sbatch's command line."""
        options = self.sbatch_options() | {"signal": f"USR1@{self.signal_lead_s}"}
        sizes = {
            "nodes": self.nodes,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
        }
        options |= {key: value for key, value in (sizes | {"time": self.timeout_min}).items() if value}
        if self.env_file and _is_plain(self.env_file):
            options["export"] = f"ALL,QWENLORA_ENV={self.env_file}"  # slurm/train.sh reads it
        return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]

    def unsaid(self) -> list[str]:
        """Return the keys that are set, but that sbatch has no option for."""
        keys = [key for key in ("python", "srun_args", "environment", "config") if getattr(self, key)]
        return [*(["env_file"] if self.env_file and not _is_plain(self.env_file) else []), *keys]


_PASSED_ON = ("partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude")


def _is_plain(path: str) -> bool:
    """Whether a path is one word to a shell, and one variable's value to sbatch --export."""
    return bool(re.fullmatch(r"[\w./+@=:-]+", path, re.ASCII))


def load_site(site: str | Path | None = None) -> Site:
    """Return a site, from a path or the name of a file in configs/clusters/, here or in the package. None:
    the one that QWENLORA_SITE names, else one without settings. Raises: ValueError, a line per problem."""
    site = site or os.environ.get(VARIABLE)
    if not site:
        return Site()
    path = _find(str(site))
    values, places = read_yaml(path)
    try:
        loaded = Site.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ValueError("\n".join(_explain(error, places, path))) from None
    loaded._file = path
    if loaded.env_file is None:
        return loaded
    env_file = path.parent / Path(loaded.env_file).expanduser()
    if not env_file.is_file():
        raise ValueError(
            f"{places['env_file']}: env_file={loaded.env_file}: no such file (looked for {env_file})"
        )
    return loaded.model_copy(update={"env_file": str(env_file)})


def _find(site: str) -> Path:
    if "/" in site or site.endswith((".yaml", ".yml")):
        return Path(site).expanduser().absolute()
    for folder in (FOLDER, PACKAGED):
        if (file := folder / f"{site}.yaml").is_file():
            return file.absolute()
    known = sorted({file.stem for folder in (FOLDER, PACKAGED) for file in folder.glob("*.yaml")})
    hint = did_you_mean(site, known, f"there are: {', '.join(known)}")
    raise ValueError(f"site {site}: no {FOLDER}/{site}.yaml here or in the package; {hint}")


def _explain(error: ValidationError, places: Places, path: Path) -> list[str]:
    """Return a line for each problem."""
    groups: dict[tuple[str, str, bool], list[ErrorDetails]] = {}
    for item in error.errors():
        key, *inside = (str(part) for part in item["loc"])
        if inside and f"{key}.{inside[0]}" in places:
            key = f"{key}.{inside[0]}"
        groups.setdefault((places.get(key, str(path)), key, "[key]" in inside), []).append(item)
    return [f"{place}: {_problem(key, on_key, items)}" for (place, key, on_key), items in groups.items()]


def _problem(key: str, on_key: bool, errors: list[ErrorDetails]) -> str:
    """Return what is wrong with a key's value, or (on_key) with the key itself."""
    if errors[0]["type"] == "extra_forbidden":
        hint = did_you_mean(key, Site.model_fields, f"a site has: {', '.join(Site.model_fields)}")
        return f"{key}: no such key; {hint}"
    value = "" if on_key else "=" + json.dumps(errors[0]["input"], ensure_ascii=False)
    return f"{key}{value}: expected {expected(errors)}"
