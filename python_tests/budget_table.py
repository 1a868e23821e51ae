"""What the tests of committed budgets share: a count now beside the table's."""

from __future__ import annotations

from collections.abc import Mapping

MORE = 1.005
"""What a count may exceed the table by: it is exact for one compiler version."""


def compare(name: str, now: Mapping[str, float], limits: Mapping[str, float], script: str) -> None:
    """Nothing is worse than the table says: no more of anything, but of blocks no fewer."""
    worse = {key: (now[key], limit) for key, limit in limits.items() if key != "blocks" and now[key] > limit * MORE}
    assert not worse, f"{name} (now, table): {worse}; if that is meant: python python_tests/{script} --write"
    assert now.get("blocks", 0) >= limits.get("blocks", 0)
