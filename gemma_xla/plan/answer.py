"""From a question to a plan: what is known already, or what the compiler or arithmetic says."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field

from gemma_xla.plan.cache import Cache
from gemma_xla.plan.children import Progress
from gemma_xla.plan.figures import figures
from gemma_xla.plan.result import Plan
from gemma_xla.plan.setup import Setup


@dataclass(frozen=True)
class Planner:
    """Answers questions.

    Attributes:
        cache: where answers are kept.
        timeout: seconds that one compilation may take.
        progress: shows what is under way.
    """

    cache: Cache
    timeout: float = 3600.0
    progress: Progress = field(default_factory=lambda: Progress(sys.stderr))

    def plan(self, setup: Setup, name: str, tokens: float | None = None) -> Plan:
        """
        Args:
            setup: what to plan.
            name: of the config.
            tokens: to train on, for days and dollars; None: those of the run.

        Raises:
            UserError: the run would refuse to start, or the compiler failed (`PlanError`).
        """
        plan = self.cache.load(setup)
        if plan is None:
            # It loads PyTorch, which a plan that is known does without.
            from gemma_xla.plan.work import work_out

            plan, programs = work_out(setup, self.progress, self.timeout)
            self.cache.save(setup, plan, programs)
        return complete(plan, setup, name, tokens)

    def glance(self, setup: Setup, name: str, tokens: float | None = None) -> Plan:
        """Return what the compiler has been asked before or, at once too, the bounds that arithmetic gives.

        Args:
            setup: what to plan.
            name: of the config.
            tokens: to train on, for days and dollars; None: those of the run.
        """
        plan = self.cache.load(setup)
        if plan is None:
            # It loads PyTorch, which a plan that is known does without.
            from gemma_xla.plan.work import by_arithmetic

            plan = by_arithmetic(setup)
        return complete(plan, setup, name, tokens)


def complete(plan: Plan, setup: Setup, name: str, tokens: float | None) -> Plan:
    """Return a plan with the config's name and what follows from its time, at today's price and for so many tokens."""
    seconds = plan.figures and (plan.figures.step_seconds, plan.figures.upper_bound_seconds)
    return dataclasses.replace(plan, config=name, figures=seconds and figures(setup, *seconds, tokens))
