"""Says where a set has been made by software or machines that differ, so that its last bits are not of one kind."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rats.schemas.maker import Difference, Software
from rats.schemas.manifest import ShardDone

log = logging.getLogger(__name__)


def say_other_software(driver: Software, finished: Sequence[ShardDone]) -> None:
    """Warns of finished shards that other software than this run's has made."""
    others = [(part.shard, driver.differences(part.maker)) for part in finished if part.maker is not None]
    _say("software", [(shard, found) for shard, found in others if found], len(finished))


def say_other_machines(finished: Sequence[ShardDone]) -> None:
    """Warns of shards that another kind of machine than the first shard's has made."""
    known = [(part.shard, part.maker) for part in finished if part.maker is not None]
    others = [(shard, known[0][1].machine_differences(maker)) for shard, maker in known]
    _say("machines", [(shard, found) for shard, found in others if found], len(finished))


def _say(kind: str, others: Sequence[tuple[str, Sequence[Difference]]], total: int) -> None:
    if others:
        (shard, (found, *_)) = others[0]
        log.warning(
            "%d of %d shards are of other %s, so their last bits may be others: %s of %s is %s, not %s; "
            "`rats shards info` lists them; for a set of one kind, name another store.path",
            *(len(others), total, kind, found.name, shard, found.second, found.first),
        )
