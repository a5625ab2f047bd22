"""`qwenlora completion`."""

from typing import Annotated, Literal

import typer
from typer._completion_shared import get_completion_script

from qwenlora.cli.main import COMPLETES

IN_ZSH = """\
  local -a no_space=(-S '')
  [[ $said == *'="'* ]] && said=${said/_arguments/_arguments -O no_space}
  eval $said
"""


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="For which shell.")],
) -> int:
    """Print a script with which the shell completes commands, options, runs and keys of a config.

    Example: echo 'source <(qwenlora completion bash)' >> ~/.bashrc
    """
    script = get_completion_script(prog_name="qwenlora", complete_var=COMPLETES, shell=shell)
    if shell == "bash":  # a value follows a key at once
        no_space = "    [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null\n"
        script = script.replace("    return 0\n", f"{no_space}    return 0\n")
    if shell == "zsh":  # the same; typer's own evaluates the answer as it is
        script = script.replace("eval $(", "local said=$(").replace("qwenlora)\n}", f"qwenlora)\n{IN_ZSH}}}")
    print(script)
    return 0
