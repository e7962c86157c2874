"""Which columns of scores the parameters ask for, and whether too many of the scores in them have failed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from rats.pipeline.places import concurrently
from rats.pipeline.registry import reward_fingerprint
from rats.pipeline.store import ShardSet
from rats.schemas.errors import DataError
from rats.schemas.manifest import ScoreRow, Snapshot
from rats.schemas.params import Params
from rats.stages.score_worker import reward_hashes

log = logging.getLogger(__name__)

RETRY = "mend the reward, then `rats stage score --retry-failed`"


def column_hashes(params: Params, vae: str) -> dict[str, dict[str, str]]:
    """What decides each reward's column, by the reward's name. Reads and hashes the rewards, loads none."""
    frames = params.teacher.seen_frames
    return {reward.name: reward_hashes(reward_fingerprint(reward), vae, frames) for reward in params.rewards}


def check_failed(
    shards: ShardSet, columns: Mapping[str, str], snapshot: Snapshot, wanted: Collection[str], max_bad: float
) -> int:
    """How many stored scores of the `wanted` keys have failed, over all columns (reward name -> fingerprint).

    Raises:
        DataError: a reward failed on more than `max_bad` of them, with the first error's text.
    """
    failed = 0
    for name, column in columns.items():
        # of a key that lies in two shards the first one counts
        names = sorted(snapshot.shards, reverse=True)
        tables = concurrently(shards.root, partial(shards.score_rows, column), names)
        rows = {row.key: row for table in tables for row in table}
        bad = [rows[key] for key in sorted(wanted) if rows[key].status == "failed"]
        check_share(name, bad, len(wanted), max_bad)
        failed += len(bad)
    return failed


def check_share(name: str, bad: Sequence[ScoreRow], total: int, max_bad: float) -> None:
    """Warn about failed scores; DataError when they are more than the share `max_bad` of the `total`."""
    if not bad:
        return
    what = f"reward {name!r} failed on {len(bad)} of {total} samples ({100 * len(bad) / total:.3g} %)"
    first = f"first, {bad[0].key}: {bad[0].error}"
    if len(bad) > max_bad * total:
        raise DataError(f"{what}, at most {100 * max_bad:.3g} % may (--max-bad); {first}; {RETRY}")
    log.warning("%s and passes over them; %s; to have them: %s", what, first, RETRY)
