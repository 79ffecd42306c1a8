"""Nodes change, are lost and come back; their events are lost, doubled and reordered, their answers late. Whenever
the view says EXACT and nothing is under way, it holds what the nodes hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmkv.control.follow import DEGRADED, EXACT, ViewSettings
from lmkv.control.view import Ask, HangUp, Subscribe, Unsubscribe, View
from lmkv.poolwire import Events, Snapshot, SnapshotPart

from .model import ModelNode, make_card

NAMESPACES = (b"a" * 16, b"b" * 16)
KEYS = [bytes((i,)) * 16 + b"\0" for i in range(4)]
SETTINGS = ViewSettings(
    lease_s=3, forget_s=10, lag_s=1, part_s=2, retry_s=0.1, retry_most_s=0.5, buffer_bytes=2000, snapshots=2
)
changes = st.lists(
    st.tuples(st.sampled_from([n + k for n in NAMESPACES for k in KEYS]), st.sampled_from((0, 0, 1, 2, 3, 5))),
    min_size=1,
    max_size=6,
)
places = st.integers(0, 2)


class Storm(RuleBasedStateMachine):
    """Three addresses; at each at most one node lives. A link holds what is on its way, in order, until it is
    delivered."""

    @initialize()
    def begin(self) -> None:
        self.view = View(SETTINGS)
        self.now_s = 100.0
        self.nodes: dict[int, ModelNode] = {}
        self.made = 0
        self.subscribed: set[str] = set()
        self.on_the_way: dict[int, list[Events]] = {place: [] for place in range(3)}
        self.questions: list[tuple[str, Snapshot]] = []
        self.parts: list[SnapshotPart] = []

    # --- what nodes do ---

    @rule(place=places, what=changes)
    def start(self, place: int, what: list[tuple[bytes, int]]) -> None:
        """With pages from the disk, say."""
        self.made += 1
        node = ModelNode(make_card(f"{self.made:016x}", f"tcp://node{place}:1"), part_records=1)
        self.nodes[place] = node
        node.change(what)
        self.on_the_way[place].clear()
        self._beat(node)

    @rule(place=places, what=changes, clear=st.sampled_from((False, False, False, True)), all_arrive=st.booleans())
    def change(self, place: int, what: list[tuple[bytes, int]], clear: bool, all_arrive: bool) -> None:
        if node := self.nodes.get(place):
            events = node.change(what, clear=clear)
            if node.card.incarnation in self.subscribed:
                self.on_the_way[place].append(events)
            while all_arrive and self.on_the_way[place]:
                self.view.events(self.on_the_way[place].pop(0), self.now_s)
                self._act()

    @rule(place=places, leaving=st.booleans())
    def stop(self, place: int, leaving: bool) -> None:
        if node := self.nodes.pop(place, None):
            self.on_the_way[place].clear()
            if leaving:
                self.view.beat(node.beat(leaving=True), self.now_s)
                self._act()

    @rule(place=places)
    def beat(self, place: int) -> None:
        if node := self.nodes.get(place):
            self._beat(node)

    @rule(place=places)
    def sign_of_life(self, place: int) -> None:
        if (node := self.nodes.get(place)) and node.card.incarnation in self.subscribed:
            self.on_the_way[place].append(node.sign_of_life())

    # --- what happens on the way ---

    @rule(place=places, how=st.sampled_from(("arrive", "arrive", "arrive", "lose", "double", "swap")))
    def deliver(self, place: int, how: str) -> None:
        waiting = self.on_the_way[place]
        if not waiting:
            return
        if how == "swap":
            waiting.append(waiting.pop(0))
            return
        message = waiting.pop(0) if how != "double" else waiting[0]
        if how != "lose":
            self.view.events(message, self.now_s)
            self._act()

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        if self.questions:
            address, question = self.questions.pop(data.draw(st.integers(0, len(self.questions) - 1)))
            for node in self.nodes.values():
                if node.card.address == address:
                    self.parts.append(node.answer(question))

    @rule(data=st.data(), how=st.sampled_from(("arrive", "arrive", "arrive", "lose", "double")))
    def part(self, data: st.DataObject, how: str) -> None:
        if self.parts:
            at = data.draw(st.integers(0, len(self.parts) - 1))
            part = self.parts[at] if how == "double" else self.parts.pop(at)
            if how != "lose":
                self.view.part(part, self.now_s)
                self._act()

    @rule()
    def next_part(self) -> None:
        """The way it mostly goes: a question is answered, and the answer read."""
        if self.questions:
            self.answer_all()
            while self.parts:
                self.view.part(self.parts.pop(0), self.now_s)
                self._act()

    @rule(seconds=st.sampled_from((0.05, 0.3, 1.0, 2.5)))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.view.tick(self.now_s)
        self._act()

    @rule()
    def settle(self) -> None:
        """A time without faults: everything arrives, and everything becomes EXACT."""
        for node in list(self.nodes.values()):
            node.change([(NAMESPACES[0] + KEYS[0], 1)])  # lost
        for _ in range(60):
            self.now_s += 0.2
            for place, node in self.nodes.items():
                self._beat(node)
                if node.card.incarnation in self.subscribed:
                    self.on_the_way[place].append(node.sign_of_life())
                while self.on_the_way[place]:
                    self.view.events(self.on_the_way[place].pop(0), self.now_s)
                    self._act()
            while self.questions or self.parts:
                while self.questions:
                    self.answer_all()
                while self.parts:
                    self.view.part(self.parts.pop(0), self.now_s)
                    self._act()
            self.view.tick(self.now_s)
            self._act()
        living = {node.card.incarnation for node in self.nodes.values()}
        found = {member.card.incarnation: member.state for member in self.view.members(self.now_s)}
        assert {i: s for i, s in found.items() if i in living} == dict.fromkeys(living, EXACT)
        assert found.keys() == living
        while self.view.tick(self.now_s):
            pass
        assert self.view.table.pages == len({key for node in self.nodes.values() for key in node.pages})

    def answer_all(self) -> None:
        address, question = self.questions.pop(0)
        self.parts += [n.answer(question) for n in self.nodes.values() if n.card.address == address]

    def _beat(self, node: ModelNode) -> None:
        self.view.beat(node.beat(), self.now_s)
        self._act()

    def _act(self) -> None:
        for action in self.view.take_actions():
            match action:
                case Subscribe(card):
                    self.subscribed.add(card.incarnation)
                case Unsubscribe(card):
                    self.subscribed.discard(card.incarnation)
                case Ask(card, question):
                    self.questions.append((card.address, question))
                case HangUp(card):
                    self.questions = [(a, q) for a, q in self.questions if a != card.address]

    # --- what has to be true ---

    @invariant()
    def exact_is_exact(self) -> None:
        for member in self.view.members(self.now_s):
            place = int(member.card.address.removeprefix("tcp://node")[0])
            node = self.nodes.get(place)
            if node is None or node.card.incarnation != member.card.incarnation or member.state != EXACT:
                continue
            if self.on_the_way[place] or self._last_told(member.card.incarnation) != node.seq:
                continue  # not everything is consumed
            seen = {key: tiers for key, tiers in self._listed(member.card.incarnation).items() if tiers}
            assert seen == node.pages
            assert member.pages == len(node.pages)

    def _last_told(self, incarnation: str) -> int:
        follower = self.view._followers[incarnation]  # type: ignore[index]
        assert follower._next is not None
        return follower._next - 1

    def _listed(self, incarnation: str) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for namespace in NAMESPACES:
            for holder in self.view.lookup(namespace, b"".join(KEYS), least=0):
                if holder.incarnation == incarnation:
                    found |= {namespace + key: tiers for key, tiers in zip(KEYS, holder.tiers, strict=True)}
        return found

    @invariant()
    def one_node_an_address(self) -> None:
        addresses = [member.card.address for member in self.view.members(self.now_s)]
        assert len(addresses) == len(set(addresses))

    @invariant()
    def the_silent_are_degraded(self) -> None:
        states = [member.state for member in self.view.members(self.now_s) if member.heard_s > SETTINGS.lease_s]
        assert set(states) <= {DEGRADED}
        assert self.view.exact(self.now_s) is ({member.state for member in self.view.members(self.now_s)} == {EXACT})

    @invariant()
    def snapshots_are_few(self) -> None:
        assert len(self.view._asking) <= SETTINGS.snapshots


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
