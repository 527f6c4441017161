"""What a strategy asks of the search engine."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from .space import Candidate


@dataclass(frozen=True)
class Ask:
    """Candidates to score, in order.

    With `beat`, scores up to the first one below that candidate's are enough: what lies behind it may be evaluated ahead
    by idle workers, but has no influence. Without, all are needed. A `probe` is a look at the first share of the pairs:
    it may cost more than the budget of a schedule allows, and is never a candidate for the result.
    """

    candidates: Sequence[Candidate]
    beat: Candidate | None = None
    probe: bool = False


Strategy = Generator[Ask, list[float], None]
