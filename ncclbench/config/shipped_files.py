"""TOML files that ncclbench ships: plans, profiles and model presets, found by name."""

from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from ncclbench.config.refusals import unknown
from ncclbench.config.toml_files import read_text
from ncclbench.errors import UsageError


@dataclass(frozen=True)
class ShippedFiles:
    """The ``.toml`` files in a folder of a package, named without the suffix."""

    package: str
    folder: str

    @property
    def kind(self) -> str:
        """The word for one file in messages, such as ``plan``."""
        return self.folder.removesuffix("s")

    def _folder(self) -> Traversable:
        return resources.files(self.package) / self.folder

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(
            file.name.removesuffix(".toml") for file in self._folder().iterdir() if file.name.endswith(".toml")
        )

    def titles(self) -> dict[str, str]:
        """Each name with the first line of its file."""
        return {name: self._text(name).splitlines()[0].lstrip("# ") for name in self.names()}

    def read(self, name: str) -> str:
        """The text of the file `name`.

        Raises:
            UsageError: if there is none; the message has the nearest name and all names.
        """
        if name not in self.names():
            raise UsageError(unknown(self.kind, name, self.names()))
        return self._text(name)

    def read_file_or_name(self, file_or_name: str) -> str:
        """The text of a path that exists or ends in ``.toml``, or else of a shipped file.

        Raises:
            UsageError: if the file cannot be read, or no shipped file has the name.
        """
        path = Path(file_or_name)
        if path.suffix == ".toml" or (_exists(path) and not (path.is_dir() and file_or_name in self.names())):
            return read_text(path, self.kind)
        try:
            return self.read(file_or_name)
        except UsageError as error:
            raise UsageError(f"{error}; or give a .toml file") from None

    def _text(self, name: str) -> str:
        return (self._folder() / f"{name}.toml").read_text(encoding="utf-8")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long, or has a null byte
        return False


PLANS = ShippedFiles("ncclbench_patterns", "plans")
PROFILES = ShippedFiles("ncclbench.accept", "profiles")
MODELS = ShippedFiles("ncclbench_patterns", "models")
