"""From prompts to the token ids that an executor understands."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace
from typing import Any

from pagedlab.engine.request import Request
from pagedlab.errors import ConfigError
from pagedlab.policies.prompt import HashedPrompt


def tokenise(requests: list[Request], executor: Any, *, content_ids: bool) -> list[Request]:
    """Give every request the token ids that ``executor`` understands.

    An executor that knows no text at all (a stub) takes a stand-in id for every word. Content ids are mapped into the
    vocabulary; ids that were given as they are must lie in it, or `ConfigError` names the first that does not.
    """
    encode = getattr(executor, "tokenize", None) or stand_in_tokens
    model, size = getattr(executor, "model", None), vocab_size(executor)
    ready = []
    for request in requests:
        if isinstance(request.prompt, HashedPrompt):
            if model is not None or size:
                raise ConfigError(
                    f"request {request.request_id!r} is known by hashes, not by tokens: simulate or replay it"
                )
            ready.append(request)
            continue
        prompt = list(request.prompt)
        if request.text is not None and not prompt:
            prompt = encode(request.text)
            if encode is stand_in_tokens and size:
                prompt = [t % size for t in prompt]
        elif content_ids and size:
            prompt = [t % size for t in prompt]
        elif model is not None and size and prompt and not (min(prompt) >= 0 and max(prompt) < size):
            at = next(i for i, t in enumerate(prompt) if not 0 <= t < size)
            raise ConfigError(
                f"request {request.request_id!r}: token id {prompt[at]} at position {at} is outside the model's "
                f"vocabulary of {size}"
            )
        ready.append(replace(request, prompt=prompt))
    return ready


def stand_in_tokens(text: str) -> list[int]:
    """Return one id for every word, mark and run of blanks: equal pieces get equal ids, in every process."""
    return [zlib.crc32(piece.encode()) for piece in re.findall(r"\w+|[^\w\s]|\s+", text)]


def vocab_size(executor: Any) -> int | None:
    """Return how many token ids there are, or None if ``executor`` takes any."""
    model = getattr(executor, "model", None)
    if model is None:
        return getattr(executor, "vocab_size", None)
    size: int = model.config.get_text_config().vocab_size
    return size
