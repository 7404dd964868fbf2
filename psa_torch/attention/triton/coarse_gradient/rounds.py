"""How the sums of a coarse level are shared out over rounds, so that they fit a workspace."""

from collections.abc import Iterator
from typing import NamedTuple

from shared_specs.geometry import cdiv


class Round(NamedTuple):
    """Key heads with all their query heads, and of each query head some query blocks."""

    first_head: int
    heads: int
    first_query: int
    queries: int


class Rounds(NamedTuple):
    """The rounds of one level.

    Attributes:
        heads: key heads, over the batch.
        query_blocks: of a head.
        heads_per_round: key heads that a round takes with all their query heads.
        queries_per_round: query blocks that it takes of each; all of them, unless one key head
            does not fit the workspace: sums then have to be carried from round to round.
    """

    heads: int
    query_blocks: int
    heads_per_round: int
    queries_per_round: int

    def places(self) -> Iterator[Round]:
        """All rounds, the query blocks of the same heads one after the other."""
        for head in range(0, self.heads, self.heads_per_round):
            for query in range(0, self.query_blocks, self.queries_per_round):
                yield Round(
                    head,
                    min(self.heads_per_round, self.heads - head),
                    query,
                    min(self.queries_per_round, self.query_blocks - query),
                )


def share_out(
    heads: int, group: int, query_blocks: int, block_bytes: int, budget: int, programs: int
) -> Rounds:
    """Rounds of even size.

    Whole key heads, as many as `budget` bytes hold, or one if it takes no more than four times the
    budget; else all heads, and as many query blocks as the budget holds, or as give every
    multiprocessor work, up to four times the budget again. At least one block.

    Args:
        heads: key heads, over the batch.
        group: query heads of each.
        query_blocks: of a head.
        block_bytes: what one query block of one query head writes at most.
        budget: bytes of the workspace.
        programs: as many as work at the same time; each takes a query block of a head.
    """
    some = max(1, heads)
    head_bytes = group * query_blocks * block_bytes
    fit = max(budget // head_bytes, int(head_bytes <= 4 * budget))
    if fit:
        return Rounds(heads, query_blocks, cdiv(some, cdiv(some, fit)), query_blocks)
    block_bytes *= some * group
    to_fill = cdiv(programs, some * group)
    most = max(1, budget // block_bytes, min(to_fill, 4 * budget // block_bytes))
    return Rounds(heads, query_blocks, some, cdiv(query_blocks, cdiv(query_blocks, most)))
