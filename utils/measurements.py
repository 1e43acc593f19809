"""Accuracies that were measured once: kept in a file, looked up by what determines them.

An accuracy is determined by the weights evaluated, the images and the arithmetic; its key is a hash
over these, so that one measured for one experiment serves every other and a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from utils import report
from utils.errors import InputError
from utils.lock import hold


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 over all names and bits, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


class Measurements:
    """Accuracies, in percent, in the JSON file `path`.

    Raises InputError where the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, float] = self._read()

    def _read(self) -> dict[str, float]:
        if not self.path.exists():
            return {}
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            if not all(isinstance(value, float) for value in known.values()):
                raise ValueError("not a table of numbers")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{self.path}: {error}; delete it to measure anew") from error
        return known

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """The accuracy under `key`, by `measure` where it is not known yet; kept at once."""
        if key not in self.known:
            self.known[key] = measure()
            with hold(self.path.with_name(f".{self.path.name}.lock")):
                self.known = self._read() | self.known  # another process may have added some
                report.write_json(self.path, self.known)
        return self.known[key]
