"""A prompt that an earlier process computed: this one finds it on disk and starts at its end.

    python examples/restart.py DIRECTORY          twice, to see the difference
    (`make demo` runs it last, on what the demo left)

Only a process with the very same model, dtype and page size finds anything.
"""

import argparse
import time
from pathlib import Path
from typing import Any

PAGE_SIZE = 16


def first_token(model: Any, cache: Any, ids: Any) -> tuple[float, int, int]:
    """Seconds to the first token of a prompt, tokens that were there, and that first token."""
    start = time.perf_counter()
    with cache.session(ids) as past:
        out = model.generate(
            ids, attention_mask=ids.new_ones(ids.shape), past_key_values=past, max_new_tokens=1,
            do_sample=False,
        )  # fmt: skip
        return time.perf_counter() - start, past.reused, int(out[0, -1])


def main() -> None:
    """Ask for the first token of a prompt, with the directory and without."""
    parser = argparse.ArgumentParser(description="Pages that outlive their process.")
    parser.add_argument("directory", type=Path, help="of the disk tier")
    parser.add_argument("--prompt", type=Path, help="token ids, separated by spaces")
    arguments = parser.parse_args()

    import torch

    from kvpaged import DiskTier, PagedKVCache
    from kvpaged.testing import models

    model, tokenizer = models.load("smollm2", dtype=torch.float32)
    if arguments.prompt is None:
        from pydoc_data.topics import topics

        ids = torch.tensor([tokenizer(str(topics["strings"]))["input_ids"][:1000]])
    else:
        ids = torch.tensor([[int(word) for word in arguments.prompt.read_text().split()]])
    with PagedKVCache.for_model(model, memory="256MiB", page_size=PAGE_SIZE) as cold:
        first_token(model, cold, ids[:, :40])  # the first calls of a process choose kernels
        cold_s, _, expected = first_token(model, cold, ids)
    tiers = [DiskTier(arguments.directory, "1GiB")]
    with PagedKVCache.for_model(model, memory="256MiB", page_size=PAGE_SIZE, tiers=tiers) as cache:
        seconds, found, token = first_token(model, cache, ids)
        offload = cache.stats().offload
        assert offload is not None
        held = offload.tiers[0]
    print(
        f"a new process found {found} of {ids.shape[1]} prompt tokens on disk ("
        f"{held.known_records} pages, {held.known_bytes / 1e6:.0f} MB) and gave its first token "
        "after "
        f"{seconds * 1e3:.0f} ms; computed, {cold_s * 1e3:.0f} ms: {cold_s / seconds:.1f} times as "
        f"fast; the same token: {token == expected}"
    )


if __name__ == "__main__":
    main()
