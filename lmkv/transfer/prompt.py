"""The prompt that a transfer is bound to, and why KV of one prompt must not be used for another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt that a transfer is bound to, as one engine sees it.

    `digest`: 16 bytes over everything the KV depends on (lmkv.vllm.prompt), or b"" where the engine does not know it;
    two unknown digests are not equal. `tokens`: the prompt's length.
    """

    digest: bytes
    tokens: int

    def differs(self, other: Prompt) -> str:
        """Why KV of `self` (prefill) must not be used for `other` (decode); "" when both are the same prompt."""
        if self.tokens != other.tokens:
            return f"{PROMPT_DIFFERS}: {self.tokens} tokens at prefill, {other.tokens} at decode"
        if not self.digest or not other.digest:
            side = "prefill" if not self.digest else "decode"
            return f"{PROMPT_FAULT}{side} does not know all that its KV depends on ({UNKNOWN})"
        return "" if self.digest == other.digest else f"{PROMPT_DIFFERS} (or its images, adapter or salt differ)"


UNKNOWN = "the content of its LoRA adapter, or of images under ids of the client's own"
PROMPT_FAULT = "prompt: "
"""How each reason begins that means: the two engines do not have the same prompt under this transfer id."""
PROMPT_DIFFERS = f"{PROMPT_FAULT}the engines tokenized it differently"
