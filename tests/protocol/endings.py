"""How a run of the simulated world comes to rest, and what must hold then."""

from __future__ import annotations

from .things import DECODE, RECEIVER_BOUND_S


class Endings:
    """The last part of World, whose attributes it uses."""

    def flush(self) -> None:
        """Everything in the air arrives, until nothing is."""
        for _ in range(10_000):
            if self.net:
                self.deliver(self.net[0])
            elif self.flights:
                flight = self.flights[0]
                if flight.done is None:
                    if not flight.landed:
                        self.land(flight)
                    flight.done = ""
                if self.prefill[flight.rank].alive:
                    self.deliver_done(flight)
                else:
                    self.flights.remove(flight)
            else:
                return
        raise AssertionError("the network does not come to rest")

    def heal(self) -> None:
        """Links come back, deaths become known, engines finish what they began; then time passes."""
        self.deaf_to_decode.clear()
        self.deaf_to_prefill.clear()
        for side in self.prefill:
            if not side.alive and not side.proven_dead:
                self.prove_prefill_dead(side.rank)
        if not self.decode_alive and not self.decode_proven_dead:
            self.prove_decode_dead()
        for region in list(self.regions.values()):
            if not region.expected:
                self.expect(region)
        self.flush()
        for side in self.prefill:
            for job in side.jobs.values():
                while job.offered and not job.told_end:
                    self.compute(side.rank, job.tid)
        for _ in range(RECEIVER_BOUND_S // 2):
            self.flush()
            self.advance(2.0)

    def check_end(self) -> None:
        """Invariant 1: one terminal state on each rank, one Report an Expect, one Finished an Offer, nothing left."""
        for side in self.prefill:
            if not side.alive:
                continue
            for job in side.jobs.values():
                assert not job.offered or job.finished is not None, f"{job.tid} never finished on rank {side.rank}"
            assert side.machine.active == 0 and side.machine.lanes.in_flight_bytes(DECODE) == 0
            assert side.machine.lanes.queued(DECODE) == 0
        if self.decode_alive:
            for region in self.regions.values():
                assert region.report is not None, f"{region.tid} epoch {region.epoch} was never reported"
                assert region.closed, f"{region.tid} epoch {region.epoch} stays in quarantine"
            assert self.decode.active == 0
        self.advance(400.0, step=9.0)
        for side in self.prefill:
            assert not side.alive or not side.machine._transfers, "the sender remembers for ever"
        assert not self.decode_alive or not (self.decode._grants or self.decode._early or self.decode._newest)
