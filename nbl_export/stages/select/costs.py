"""What was measured of a machine and a graph, in ``nbl/costs.json``: the same workload has the same costs later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from nbl_export.errors import InputError
from nbl_export.files import read_sealed, sha256_of_json, write_sealed
from nbl_export.records import from_json, to_json
from nbl_export.stage_record import STAGES

if TYPE_CHECKING:
    from nbl_export.verify.speed.values import Roofline
    from nbl_export.workspace import Workspace

T = TypeVar("T")
_FORMAT = "nbl-export/costs/1"


class KeptCosts:
    """What was measured of the ``exported`` graph on this machine, in ``nbl/costs.json``."""

    def __init__(self, ws: Workspace, exported: str) -> None:
        from nbl_export.report.schema import environment

        here = environment()
        self._path = ws.costs
        self._machine = {"processor": here.processor, "cores": here.cores, "version": STAGES["select"]}
        self._exported = exported
        self._known: dict[str, Any] = {}
        try:
            if self._path.exists():
                raw = read_sealed(self._path, "The file of costs", "")
                self._known = raw["costs"] if raw["format"] == _FORMAT else {}
        except (InputError, KeyError, TypeError):
            pass  # measured again

    def roofline(self) -> Roofline:
        from nbl_export.verify.speed.roofline import measure_roofline
        from nbl_export.verify.speed.values import Roofline

        return self._of({"what": "roofline"}, Roofline, lambda: to_json(measure_roofline()))

    def times(
        self, workload: Sequence[str], rank: int | str | None, measure: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Milliseconds of the ``workload`` by graph, with W of that ``rank`` (None: whole)."""
        asked = {"what": "times", "export": self._exported, "rank": rank}
        return self._of({**asked, "workload": list(workload)}, dict[str, float], measure)

    def _of(self, depends: dict[str, Any], kind: type[T], measure: Callable[[], dict[str, Any]]) -> T:
        """What is known of it, if it is of this ``kind``; or it is measured and kept."""
        key = sha256_of_json({**self._machine, **depends})
        with suppress(InputError):
            return from_json(kind, self._known.get(key), "The file of costs", "")
        self._known[key] = measure()
        write_sealed(self._path, {"format": _FORMAT, "costs": self._known})
        return from_json(kind, self._known[key], "The file of costs", "")
