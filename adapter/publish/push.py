"""An exported adapter goes to a model hub: `qwenlora export runs/tiny --push ORG/NAME`. Keys are the hub
libraries' own: HF_TOKEN or `hf auth login`, MODELSCOPE_API_TOKEN or `modelscope login`."""

from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, get_token

from qwenlora.adapter.publish.card import hub_name

Hub = Literal["huggingface", "modelscope"]


@dataclass(frozen=True)
class Target:
    """A repository. name: ORG/NAME; private: whether only its owners may see it."""

    name: str
    hub: Hub = "huggingface"
    private: bool = False

    def check(self) -> None:
        """Refuse what cannot work, before any work. Raises: ValueError."""
        if hub_name(self.name) != self.name:
            raise ValueError(f"--push {self.name} is no name on a hub; write it like my-org/my-model")
        if self.hub == "modelscope":
            if not find_spec("modelscope_hub"):
                raise ValueError(
                    "--hub modelscope needs the modelscope_hub package, which is not here: pip install"
                    " 'qwenlora[modelscope]'"
                )
        elif constants.is_offline_mode():
            raise ValueError("--push needs the hub, and HF_HUB_OFFLINE is set; unset it")
        elif not get_token():
            raise ValueError("--push needs a key of the hub: `hf auth login`, or set HF_TOKEN")

    def push(self, folder: Path) -> str:
        """Make the repository if it is not there, and put the folder's files into it as one commit; return
        its address. Raises: ValueError, also for a public one where a private one is asked for."""
        try:
            return self._to_modelscope(folder) if self.hub == "modelscope" else self._to_huggingface(folder)
        except ValueError:
            raise
        except Exception as error:  # whatever the hub's library, or the one below it, raises
            words = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"{self.name} cannot be pushed: {words}") from None

    def _to_huggingface(self, folder: Path) -> str:
        api = HfApi(library_name="qwenlora")
        url = api.create_repo(self.name, private=self.private, exist_ok=True)
        self._refuse_public(private=api.repo_info(self.name).private)
        api.upload_folder(repo_id=self.name, folder_path=folder, commit_message="qwenlora export")
        return str(url)

    def _to_modelscope(self, folder: Path) -> str:
        from modelscope_hub import HubApi
        from modelscope_hub.errors import AlreadyExistsError

        api = HubApi()
        with suppress(AlreadyExistsError):
            api.create_repo(self.name, "model", visibility="private" if self.private else "public")
        self._refuse_public(private=api.get_repo(self.name, "model").private)
        api.upload_folder(self.name, "model", folder, commit_message="qwenlora export", disable_tqdm=True)
        return f"https://modelscope.cn/models/{self.name}"

    def _refuse_public(self, *, private: bool | None) -> None:
        if self.private and not private:
            raise ValueError(
                f"{self.name} is there and public, and --private asks for a private one; nothing was pushed"
            )
