"""Accuracies that were measured once: kept in a file, looked up by what determines them.

An accuracy is determined by the weights evaluated, the images and the arithmetic. Its key names
these by hashes, so one measured for one experiment serves every other, and a killed run goes on.
"""

import json
from collections.abc import Callable
from pathlib import Path

from utils import report
from utils.errors import InputError
from utils.files import hold


class Measurements:
    """Accuracies, in percent, in the JSON file `path`; without one, in memory only.

    Raises InputError where the file holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.known = self._read()

    def _read(self) -> dict[str, float]:
        if self.path is None or not self.path.exists():
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
            if self.path is not None:
                with hold(self.path.with_name(f".{self.path.name}.lock")):
                    self.known = self._read() | self.known  # another process may have added some
                    report.write_json(self.path, self.known)
        return self.known[key]
