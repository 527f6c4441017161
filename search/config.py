"""The settings of a search, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.checks import check_choice, check_integer, check_range, check_seed
from ..core.schedules import TRAIN_STEPS
from .parsing import check_levels

STRATEGIES = ("auto", "coordinate", "evolution", "published")


@dataclass(frozen=True)
class SearchConfig:
    """Settings of one search.

    What is searched:
        steps: K, the sampler steps of the schedule.
        computed: how many of them call the network; the others reuse its earlier answers. None = all.
        fit: with `computed`, each step's slope is a sum of the last calls' slopes with fitted coefficients (S4S, arXiv 2502.17423),
            which makes the solver part of the schedule. None = where the sampler is euler, which it can stand in for.
        full: descending sigmas of the run to reproduce, as the user samples today; None = `teacher_steps` even steps.
        pin_first: keep the first level at sigma_max. Free first levels look good in distribution scores, but treat pure
            noise as a partly clean image, which breaks image to image and shifts brightness.
        terminal_zero: end at 0. False searches the last level too, and leaves that much noise in the result.
        min_gap: smallest distance between levels in entries of the model's table; None = table / (20 steps).

    How:
        strategy: "auto" = coordinate search from the best starts, then evolution with what is left of the budget;
            "coordinate", "evolution" = either alone; "published" = AutoDiffusion's algorithm (arXiv 2309.10438) with its
            defects corrected.
        restarts: how many of the best starts coordinate search descends from.
        halving: stop a candidate after a quarter or half of the pairs when it is clearly worse.
        margin: how much worse than the incumbent, as a share of its score, is clear at a quarter of the pairs.

    On what:
        pairs: (noise seed, conditioning) pairs per evaluation, the same for all candidates.
        holdout_pairs: other pairs on which the best `finalists` are ranked once more (the winner's curse).
        teacher_steps: steps of the model's own result that paired and self-distribution objectives compare with.

    Budget (any may be None, whichever is reached first ends the search; final ranking comes on top):
        evaluations: candidates. seconds: time spent in evaluations. calls: network calls spent in evaluations.

    Layers:
        layers: also search which blocks to skip at each step.
        max_skip: largest share of a step's blocks that may be skipped.
        cost: cost of a whole schedule in full network calls, None = `steps`. Skipping pays for extra steps.
    """

    steps: int = 4
    computed: int | None = None
    full: tuple[float, ...] | None = None
    pin_first: bool = True
    terminal_zero: bool = True
    min_gap: int | None = None
    strategy: str = "auto"
    restarts: int = 3
    halving: bool = True
    margin: float = 0.15
    pairs: int = 16
    holdout_pairs: int = 32
    finalists: int = 5
    teacher_steps: int = 50
    evaluations: int | None = 120
    seconds: float | None = None
    calls: int | None = None
    layers: bool = False
    max_skip: float = 0.6
    cost: float | None = None
    seed: int = 0
    fit: bool | None = None

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1, TRAIN_STEPS, "A schedule needs at least one step.")
        check_choice("strategy", self.strategy, STRATEGIES)
        if self.computed is not None:
            check_integer("computed", self.computed, 1, self.steps, "The other steps reuse what these have computed.")
            if self.computed < self.steps and (self.layers or self.strategy == "published"):
                raise ValueError(
                    "Expected a `strategy` other than published and `layers` off for a search of call reuse, "
                    f"but got {self.strategy!r} and layers {self.layers}. Change them, or compute every step."
                )
        if self.fit and not self._may_fit:
            raise ValueError(
                f"Expected `computed`, a strategy other than published and no `layers` for `fit`, but got {self.computed}, "
                f"{self.strategy!r} and layers {self.layers}. Set `computed` to the number of network calls."
            )
        if self.full is not None:
            check_levels(self.full)
        if self.min_gap is not None:
            check_integer("min_gap", self.min_gap, 1, TRAIN_STEPS)
        for name in ("restarts", "pairs", "holdout_pairs", "finalists"):
            check_integer(name, getattr(self, name), 1, 100_000)
        check_integer("teacher_steps", self.teacher_steps, 2, TRAIN_STEPS)
        check_range("margin", self.margin, 0, 10)
        check_range("max_skip", self.max_skip, 0, 0.9)
        object.__setattr__(self, "seed", check_seed("seed", self.seed))
        remedy = "Leave it empty for no such limit."
        if self.evaluations is not None:
            check_integer("evaluations", self.evaluations, 1, 10_000_000, remedy)
        if self.seconds is not None:
            check_range("seconds", self.seconds, 1e-3, 1e9, remedy)
        if self.calls is not None:
            check_integer("calls", self.calls, 1, 10**12, remedy)
        if self.evaluations is None and self.seconds is None and self.calls is None:
            raise ValueError("Expected a budget in `evaluations`, `seconds` or `calls`, but got none of them. Set one.")
        if self.cost is not None:
            check_range("cost", self.cost, 0.5, TRAIN_STEPS, "It is measured in full network calls.")

    @property
    def network_steps(self) -> int:
        """Steps that call the network."""
        return self.steps if self.computed is None else self.computed

    @property
    def _may_fit(self) -> bool:
        return self.computed is not None and not self.layers and self.strategy != "published"

    def fits(self, sampler: str) -> bool:
        """Whether coefficients are fitted for `sampler`; raises ValueError where they were asked for and it is another solver."""
        if self.fit and sampler != "euler":
            raise ValueError(
                f"Expected the sampler euler with `fit`, but got {sampler}. Fitted coefficients take the place of a solver's own: "
                "use euler, or search without them."
            )
        return self.fit is not False and self._may_fit and sampler == "euler"

    def identity(self) -> dict[str, object]:
        """Return what makes two searches different jobs: everything but the budget, which may grow between runs."""
        budget = ("evaluations", "seconds", "calls", "finalists", "holdout_pairs")
        # Left out while unset, so that stores of searches without call reuse keep their job.
        unset = {name for name in ("computed", "full", "fit") if getattr(self, name) is None}
        return {k: v for k, v in vars(self).items() if k not in budget and k not in unset}
