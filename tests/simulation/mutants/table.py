"""The mutants. Texts are looked up, not lines, so that they stay true while code moves; each must be there once.

`needs` names what a world must have for the mutated code to run at all; worlds without it are passed over, since they
would run as if nothing had been changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HALVES = ("scheduler", "worker", "pool")


class MutantError(Exception):
    """The text of a mutant is not in the tree, or not once: code has moved on, and the mutant has to follow it."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `file`, the text `before` becomes `after`. `bug` says what that is."""

    name: str
    half: str
    """One of `HALVES`."""
    bug: str
    file: str
    before: str
    after: str
    needs: str = ""
    """"pool", "unlike", "async" or "async prefill": only such worlds are run."""
    waits_for: str = ""
    """Set while the code that is mutated is not in the tree yet: why. Passed over then with --allow-missing."""

    def apply(self, root: Path) -> str:
        """The file's new text. Raises MutantError."""
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        found = text.count(self.before)
        if found != 1:
            why = f" ({self.waits_for})" if self.waits_for else ""
            raise MutantError(
                f"mutant {self.name}: its text is {found} times in {self.file}, not once{why}; "
                f"write tests/simulation/mutants/table.py anew for it:\n{self.before}"
            )
        return text.replace(self.before, self.after)


SCHEDULER = (
    Mutant(
        "same-step-hits-count-as-cached",
        "scheduler",
        "1.1: a block that another request of the same step computes is sent as if it were there already",
        "lmkv/vllm/steps.py",
        "runs[now].append(run)",
        "runs[0].append(run)",
    ),
    Mutant(
        "preempted-after-prompt-ignored",
        "scheduler",
        "1.2: a request that is preempted after its prompt is done goes on being sent",
        "lmkv/vllm/prefill.py",
        "if preempted is not None and preempted.announced:",
        "if preempted is not None and preempted.announced and not preempted.done:",
        needs="async prefill",
    ),
    Mutant(
        "partial-block-sent",
        "scheduler",
        "the last block of a chunk is sent when only a part of it is computed",
        "lmkv/vllm/prefill.py",
        "min(after // n, total)",
        "min(-(-after // n), total)",
    ),
    Mutant(
        "prefill-blocks-freed-at-once",
        "scheduler",
        "the blocks of a finished prompt are not kept until they have been sent",
        "lmkv/vllm/prefill.py",
        'f"prefill ended as {request.status.name}"))\n        return True',
        'f"prefill ended as {request.status.name}"))\n        return False',
    ),
    Mutant(
        "abort-not-withdrawn",
        "scheduler",
        "workers are not told that a request has ended before its prompt was done",
        "lmkv/vllm/prefill.py",
        "if not prefill.done:\n            meta.withdrawals",
        "if prefill.done:\n            meta.withdrawals",
    ),
    Mutant(
        "landing-off-by-a-block",
        "scheduler",
        "a grant in landing mode begins one block late where the first token is not at a block's start",
        "lmkv/vllm/decode.py",
        "found.append((first_token // theirs,",
        "found.append((-(-first_token // theirs),",
        needs="unlike",
    ),
    Mutant(
        "stored-before-computed",
        "scheduler",
        "chunks of a long prompt are stored with its first step",
        "lmkv/vllm/pooled/side.py",
        "after = min(before + output.num_scheduled_tokens[request_id], pooled.request.num_tokens)",
        "after = pooled.request.num_tokens",
        needs="pool",
    ),
    Mutant(
        "salt-not-in-the-key",
        "scheduler",
        "prompts with different salts share keys in the pool",
        "lmkv/vllm/pooled/side.py",
        'salt = (request.cache_salt or "").encode()',
        'salt = b""',
        needs="pool",
    ),
    Mutant(
        "overwritten-not-told",
        "scheduler",
        "workers are not told that the blocks of stores under way are overwritten",
        "lmkv/vllm/pooled/side.py",
        "if pooled is not None and pooled.stored:",
        "if pooled is not None and not pooled.stored:",
        needs="pool",
    ),
)

WORKER = (
    Mutant(
        "ready-without-fence",
        "worker",
        "1.1: cached blocks are sent before the step that computes them has been executed",
        "lmkv/vllm/worker.py",
        "Ready(pushes, self._fence(), ",
        "Ready(pushes, None, ",
        needs="async prefill",
    ),
    Mutant(
        "layers-without-fence",
        "worker",
        "a layer's blocks are sent when it has been launched",
        "lmkv/vllm/worker.py",
        "LayersDone(step.pushes, group, lo, hi, self._fence(), ",
        "LayersDone(step.pushes, group, lo, hi, None, ",
        needs="async prefill",
    ),
    Mutant(
        "loading-without-fence",
        "worker",
        "1.4: pages are loaded into blocks that an earlier step may still write to",
        "lmkv/vllm/worker.py",
        "Loading(tuple(meta.loads), self._fence())",
        "Loading(tuple(meta.loads), None)",
        needs="pool",
    ),
    Mutant(
        "preempted-not-waited-for",
        "worker",
        "1.3: the blocks of preempted requests are overwritten while writes read them",
        "lmkv/vllm/worker.py",
        "if meta.preempted and not self._runtime.wait(preempted.drained, left_s):",
        "if meta.preempted and left_s < 0.0:",
    ),
    Mutant(
        "sent-too-early",
        "worker",
        "a request is reported as sent, so that its blocks are freed, before all has been sent",
        "lmkv/vllm/worker.py",
        "if r not in self._reportable - self._sent and not self._pooled.is_packing(r)",
        "if not self._pooled.is_packing(r)",
    ),
    Mutant(
        "failed-load-counts",
        "worker",
        "a transfer that has failed is reported as loaded",
        "lmkv/vllm/worker.py",
        'failed = {r.request_id for r in taken.reports if r.outcome == "failed"}',
        'failed = {r.request_id for r in taken.reports if r.outcome == "unknown"}',
    ),
    Mutant(
        "slots-given-back-at-cancel",
        "worker",
        "landing slots are lent on when a cancel is sent, not when it is answered",
        "lmkv/vllm/receiving.py",
        "case ev.SendCancel(peer, tid, epoch):\n",
        "case ev.SendCancel(peer, tid, epoch):\n                    self._landing.close(tid)\n",
        needs="unlike",
    ),
    Mutant(
        "slot-lent-twice",
        "worker",
        "a slot that has been taken out is lent to two writers",
        "lmkv/transfer/slots.py",
        "self._free.append(slot)",
        "self._free.extend((slot, slot))",
        needs="unlike",
    ),
    Mutant(
        "sealed-before-the-last-write",
        "worker",
        "the seal is sent while rectangles are still queued",
        "lmkv/transfer/outgoing.py",
        'return None if self.queued else ""',
        'return ""',
    ),
    Mutant(
        "seal-does-not-count",
        "worker",
        "the first seal counts as if all that it names had landed",
        "lmkv/transfer/incoming.py",
        "if self.covered.cells < expected.cells and len(self.rects) < writes:\n            return None",
        'if self.covered.cells < expected.cells and len(self.rects) < writes:\n            return ""',
    ),
    Mutant(
        "preempted-cells-stay-queued",
        "worker",
        "what waits for the peer's window when its request is preempted is posted afterwards",
        "lmkv/transfer/sender.py",
        "dropped = self.lanes.purge(transfer)\n        transfer.begin_life()",
        "dropped: list[Queued] = []\n        transfer.begin_life()",
    ),
    Mutant(
        "report-lost",
        "worker",
        "a transfer that was abandoned is never reported",
        "lmkv/transfer/receiver.py",
        "if not grant.undrained and grant.phase is Phase.CANCELLING:",
        "if not grant.undrained and grant.phase is Phase.CANCELLING and grant.outcome is not ReceiveOutcome.ABANDONED:",
    ),
)

POOL = (
    Mutant(
        "stored-without-fence",
        "pool",
        "chunks are packed before the step that computes them has been executed",
        "lmkv/vllm/worker.py",
        "Stored(stores, holds, self._fence())",
        "Stored(stores, holds, None)",
        needs="pool",
    ),
    Mutant(
        "blocks-freed-before-packing",
        "pool",
        "the blocks of a store count as packed as soon as its slots are asked for",
        "lmkv/vllm/pooled/books.py",
        "return self._packing[request_id] > 0",
        "return False",
        needs="pool",
    ),
    Mutant(
        "hold-not-looked-at",
        "pool",
        "1.3: a store whose blocks were overwritten meanwhile is kept",
        "lmkv/vllm/pooled/stores.py",
        "if job.batch.hold.revoked:",
        "if job.batch.hold is None:",
        needs="pool",
    ),
    Mutant(
        "committed-before-written",
        "pool",
        "a page is committed while its bytes are on their way",
        "lmkv/vllm/pooled/stores.py",
        "        job.flying += 1\n        return batch",
        "        job.written += [(c, s, own) for (c, s), own in zip(batch, sums, strict=True)]\n        return batch",
        needs="pool",
    ),
    Mutant(
        "pinned-pages-evicted",
        "pool",
        "a page that a reader holds is evicted",
        "lmkv/pool/room.py",
        "if entry.holds == 0:\n                return entry",
        "if entry.holds >= 0:\n                return entry",
        needs="pool",
    ),
    Mutant(
        "page-visible-with-one-share",
        "pool",
        "a page is visible when one of its ranks has committed",
        "lmkv/pool/index.py",
        "if all(share is not None for share in entry.shares):",
        "if any(share is not None for share in entry.shares):",
        needs="pool",
    ),
    Mutant(
        "two-writers-of-one-share",
        "pool",
        "a page that is being written is given to a second writer",
        "lmkv/pool/index.py",
        "other = entry.owner != writer[0] or entry.page_bytes",
        "other = entry.page_bytes",
        needs="pool",
    ),
    Mutant(
        "checksums-not-compared",
        "pool",
        "what is read of a page counts whatever its checksums are",
        "lmkv/vllm/pooled/loads.py",
        "if found != share.own_sums(page.checksums[group]):",
        "if not found:",
        needs="pool",
    ),
    Mutant(
        "lease-end-ignored",
        "pool",
        "pages count that were unpacked after their lease was over",
        "lmkv/vllm/pooled/loads.py",
        "if now_s > page.until_s:",
        "if now_s < 0.0:",
        needs="pool",
    ),
    Mutant(
        "cut-load-counts-whole",
        "pool",
        "a load that was cut counts up to where it was cut, whatever has landed",
        "lmkv/vllm/pooled/loads.py",
        "if i not in load.right:",
        "if i > len(spec.pages):",
        needs="pool",
    ),
    Mutant(
        "generation-ignored-at-commit",
        "pool",
        "a commit is taken for whatever the slot's page is by now",
        "lmkv/pool/index.py",
        "entry = self._reserved.get(generation)\n        if entry is None or entry.key != key:",
        "entry = self._reserved.get(generation) or next((e for e in self._reserved.values() if e.key == key), None)\n"
        "        if entry is None:",
        needs="pool",
    ),
    Mutant(
        "pages-of-the-next-chunk",
        "pool",
        "a lookup whose first chunks are cached takes each page for the chunk before it",
        "lmkv/vllm/pooled/side.py",
        "lo, hi = pages[0].chunk * chunk // n, -(-tokens[1] // n)",
        "lo, hi = tokens[0] // n, -(-tokens[1] // n)",
        needs="pool",
    ),
)

BINDING = (
    Mutant(
        "prompt-not-compared",
        "worker",
        "1.5: KV is sent though the two engines have tokenized the prompt differently",
        "lmkv/transfer/outgoing.py",
        'return self.prompt.differs(self.grant.prompt) if self.prompt is not None and self.grant is not None else ""',
        'return ""',
        waits_for="transfers are not bound to their prompts yet",
    ),
)

MUTANTS = (*SCHEDULER, *WORKER, *POOL, *BINDING)
