"""What outlives a process, with a trained model: saved sessions and exported documents."""

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvpaged import DiskTier, HostTier, PagedKVCache
from tests.hf.tiny import assert_same_tokens, generate

TEXT = " ".join(
    f"Chapter {n}. The lighthouse keeper wrote down the weather, the ships and what he ate."
    for n in range(1, 16)
)


def tiers(path: Path) -> list[Any]:
    return [HostTier("64MiB"), DiskTier(path, "256MiB")]


def test_a_document_and_a_session_about_it(smollm2, tmp_path):
    model, tokenizer = smollm2
    document = tokenizer(TEXT, return_tensors="pt").input_ids
    full = document.shape[1] // 64 * 64
    assert full > 200
    with PagedKVCache.for_model(model, "64MiB", layout="page-major") as cache:
        with cache.session(document) as past, torch.no_grad():
            model(document, past_key_values=past)
        assert cache.export_document(tmp_path / "document", document) == full

    first = tokenizer(" Question: what did he write down?", return_tensors="pt").input_ids
    second = tokenizer(" And what did he eat?", return_tensors="pt").input_ids
    prompt = torch.cat([document, first], dim=1)
    with PagedKVCache.for_model(model, "64MiB", tiers=tiers(tmp_path / "tier")) as cache:
        assert cache.import_document(tmp_path / "document") == full
        with cache.session(prompt) as past:
            assert past.reused == full
            answer = generate(model, past, prompt, max_new_tokens=30)
            past.save("lighthouse")
            cache.check_integrity()
    theirs = generate(model, DynamicCache(config=model.config), prompt, max_new_tokens=30)
    assert_same_tokens(model, answer, theirs, None)

    with PagedKVCache.for_model(model, "64MiB", tiers=tiers(tmp_path / "tier")) as cache:
        session, input_ids, mask = cache.sessions.restore("lighthouse")
        assert torch.equal(input_ids, answer[:, :-1])
        assert session.reused == input_ids.shape[1] // 64 * 64
        prompt = torch.cat([answer, second], dim=1)
        mask = torch.cat([mask, torch.ones_like(second), torch.ones(1, 1, dtype=torch.int64)], 1)
        with session:
            ours = generate(model, session, prompt, attention_mask=mask, max_new_tokens=30)
        cache.check_integrity()
    theirs = generate(model, DynamicCache(config=model.config), prompt, max_new_tokens=30)
    assert_same_tokens(model, ours, theirs, None)
