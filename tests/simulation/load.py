"""The requests of a world: bursts with shared prefixes (drawn as a tree), chats, agents and unique prompts."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass

from .plan import WorldPlan

TOKENS = 900
DIFFERENT = 0.03 if importlib.util.find_spec("lmkv.vllm.prompt") else 0.0
"""Share of prompts that the prefill engine tokenizes differently (another date in its chat template): none as long as
transfers are not bound to their prompts."""


@dataclass(slots=True)
class RequestPlan:
    """One request of a client. Delays count from its arrival; `abort_s` < 0: the client stays."""

    at_s: float
    prompt: list[int]
    max_tokens: int
    route: str
    """"pd": prefill and decode; "decode" or "prefill": at one engine alone, as on plain vLLM."""
    prefill_delay_s: float = 0.0
    decode_delay_s: float = 0.0
    abort_s: float = -1.0
    siblings: int = 1
    salt: str | None = None
    prefill_prompt: list[int] | None = None
    """What the prefill engine has in place of `prompt`."""
    counts: bool = True
    """What it could load has to be loaded, where nothing goes wrong."""
    stays: bool = False
    """Its client does not go away, whatever is drawn."""
    turns: int = 0
    """Further turns of a chat that follow its answer."""


class Load:
    """Draws the requests of a plan."""

    def __init__(self, rnd: random.Random, plan: WorldPlan) -> None:
        self._rnd = rnd
        self.seed = plan.seed
        self.odd = plan.odd
        self.stops = plan.stops
        self.impatient = plan.impatient
        self._fresh = 0.3 if plan.nodes else 0.7
        """Share of bursts whose prefix nobody has computed. Where there is a pool, others have computed most."""
        self._bursts, self._chats = (0.35, 0.9) if plan.nodes else (0.55, 0.8)
        self._turns = 6 if plan.nodes else 3
        """Each turn of a chat comes to any engine: what another has computed is in the pool."""
        self.unpooled = 0.3 if plan.nodes else 0.0
        """Share of requests at one engine that ask not to be pooled. vLLM frees their blocks as soon as they end."""
        self._count = plan.requests
        self._gentle_s = plan.gentle_s
        self._pd = plan.pd
        self._abort = plan.abort
        self._late = plan.late
        self._outputs = plan.outputs
        self.longest = plan.longest
        self._tree: list[list[int]] = [[]]

    def fresh(self, length: int) -> list[int]:
        return [self._rnd.randrange(TOKENS) for _ in range(length)]

    def requests(self) -> list[RequestPlan]:
        """In the order of their arrival."""
        rnd, plans, now_s = self._rnd, list[RequestPlan](), 0.0
        while len(plans) < self._count:
            now_s += rnd.expovariate(1 / self._gentle_s)
            kind = rnd.random()
            if kind < self._bursts:
                plans += self._burst(now_s)
            elif kind < self._chats:
                prompt = self._prefix() + self.fresh(rnd.randrange(3, 60))
                plans.append(self._one(now_s, prompt, rnd.randrange(self._turns)))
            else:
                plans.append(self._one(now_s, self.fresh(rnd.randrange(1, 200))))
        return sorted(plans[: self._count], key=lambda plan: plan.at_s)

    def _burst(self, at_s: float) -> list[RequestPlan]:
        """Simultaneous requests that share a prefix, often one that nobody has computed yet."""
        rnd = self._rnd
        prefix = self._prefix(fresh=rnd.random() < self._fresh)
        salt = f"salt-{rnd.randrange(4)}" if rnd.random() < 0.1 else None
        plans = []
        for _ in range(rnd.randrange(2, 9)):
            spread_s = 0.0 if rnd.random() < 0.8 else rnd.random() * 0.03
            plan = self._one(at_s + spread_s, prefix + self.fresh(rnd.choice([1, 2, 5, 17, 40, 90])))
            plan.salt = salt
            plans.append(plan)
        return plans

    def _prefix(self, fresh: bool = False) -> list[int]:
        """A node of the tree: what others had before, or a new one on top of one."""
        rnd = self._rnd
        base = rnd.choice(self._tree)
        if not fresh and rnd.random() < 0.6:
            return base
        node = base + self.fresh(rnd.choice([15, 16, 17, 32, 48, 64, 96, 130]))
        if len(node) > self.longest * 2 // 3:
            node = node[-rnd.randrange(16, 130) :]
        self._tree.append(node)
        if len(self._tree) > 40:
            self._tree.pop(rnd.randrange(1, 20))
        return node

    def _one(self, at_s: float, prompt: list[int], turns: int = 0) -> RequestPlan:
        rnd = self._rnd
        route = "pd" if rnd.random() < self._pd else rnd.choice(["decode", "prefill"])
        plan = RequestPlan(at_s, prompt[: self.longest], rnd.choice(self._outputs), route, turns=turns)
        lag = rnd.random()
        if lag < self._late:
            plan.decode_delay_s = rnd.choice([0.05, 0.3, 1.0, 3.0]) * rnd.random()
        elif lag < 0.25 + self._late:
            plan.prefill_delay_s = rnd.choice([0.02, 0.1, 0.5]) * rnd.random()
        else:
            plan.decode_delay_s = rnd.random() * 0.005
        if rnd.random() < self._abort:
            plan.abort_s = rnd.random() * rnd.choice([0.002, 0.02, 0.1, 0.5, 2.0])
        if DIFFERENT and rnd.random() < DIFFERENT:
            plan.prefill_prompt = self._mistaken(plan.prompt)
        if rnd.random() < 0.04:
            plan.siblings = rnd.randrange(2, 4)
        return plan

    def _mistaken(self, prompt: list[int]) -> list[int]:
        """Another token somewhere, or one more or fewer."""
        place = self._rnd.randrange(len(prompt))
        return prompt[:place] + self.fresh(self._rnd.choice([0, 1, 1, 1, 2]) if place else 1) + prompt[place + 1 :]
