"""A folder that appears under its name whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from mdnet_dist.errors import InputError
from mdnet_dist.shards import MANIFEST_NAME


class Aside:
    """A folder beside `out` that takes its name when all went well, and disappears otherwise (Ctrl-C included)."""

    def __init__(self, out: Path, force: bool) -> None:
        """Raises: InputError: `out` is a file, or is not empty and may not be replaced."""
        self.out = out.resolve()
        self.folder = self.out.with_name(f".{self.out.name}.{secrets.token_hex(4)}.partial")
        self._replaces = False
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{out}: is a file; --out names a folder")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not force:
                raise InputError(f"{out}: is not empty; choose another folder, or replace the shard set with --force")
            strangers = [path.name for path in self.out.iterdir() if path.suffix != ".tar"]
            if strangers != [MANIFEST_NAME]:
                raise InputError(
                    f"{out}: --force replaces shard sets only, and this folder is not one; remove it first"
                )
            self._replaces = True

    def __enter__(self) -> Aside:
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written ({error.strerror})") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                if self._replaces:
                    old = self.folder.with_suffix(".old")
                    self.out.rename(old)
                    self.folder.rename(self.out)
                    shutil.rmtree(old)
                else:
                    self.folder.rename(self.out)  # an empty folder is replaced
        except OSError as failure:
            raise InputError(f"{self.out}: cannot be written ({failure.strerror})") from failure
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{self.out}: cannot be written ({error.strerror or error})") from error
