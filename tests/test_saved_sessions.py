"""Sessions saved under names: gone on with by other caches and processes, with the same tokens."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpaged import DiskTier, HostTier, PagedKVCache
from kvpaged.errors import IntegrityError, StorageError, UsageError
from kvpaged.tiers.base import KEPT
from kvpaged.tiers.rows import SavedRow, SavedRows
from tests.hf.test_sharing import windowed
from tests.hf.tiny import generate, ids, tiny
from tests.test_shared_batches import PAGE, compute, serve
from tests.test_shared_batches import make as own_geometry

ROOT = Path(__file__).resolve().parents[1]


def cached(model: Any, path: Path, memory: str = "4MiB", **options: Any) -> PagedKVCache:
    tiers = options.pop("tiers", None) or [HostTier("4MiB"), DiskTier(path, "64MiB")]
    return PagedKVCache.for_model(model, memory, page_size=PAGE, tiers=tiers, **options)


def own_loop(path: Path, **options: Any) -> PagedKVCache:
    geometry = own_geometry().groups[0].geometry
    return PagedKVCache(
        geometry, geometry.page_bytes * 64, namespace=b"weights", tiers=[DiskTier(path, "64MiB")],
        **options,
    )  # fmt: skip


def reply(
    model: Any, past: Any, prompt: torch.Tensor, mask: torch.Tensor | None = None, new: int = 20
) -> torch.Tensor:
    mask = torch.ones_like(prompt) if mask is None else mask
    return generate(model, past, prompt, attention_mask=mask, max_new_tokens=new)


def held(session: Any, row: int = 0) -> torch.Tensor:
    """The tokens of a row, `[1, n]`."""
    return torch.from_numpy(session.tokens(row).copy())[None]


def go_on(model: Any, restored: Any, new: torch.Tensor) -> torch.Tensor:
    session, input_ids, mask = restored
    prompt = torch.cat([input_ids, new], dim=1)
    with session:
        return reply(model, session, prompt, torch.cat([mask, torch.ones_like(new)], dim=1))


def test_another_cache_goes_on_as_if_nothing_had_happened(tmp_path):
    model, prompt, turn = tiny(), ids(1, 50), ids(1, 9, 1)
    with cached(model, tmp_path) as cache, cache.session(prompt) as past:
        reply(model, past, prompt)
        past.save("chat")
        kept = held(past)
        assert kept.shape == (1, 69), "the last token of the reply was not computed"
        uninterrupted = reply(model, past, torch.cat([kept, turn], dim=1))
        cache.check_integrity()
    with cached(model, tmp_path) as cache:
        assert cache.sessions.list() == ("chat",)
        restored = cache.sessions.restore("chat")
        assert torch.equal(restored.input_ids, kept)
        assert restored.attention_mask.all()
        assert restored.session.reused == 64, "four full pages"
        assert torch.equal(go_on(model, restored, turn), uninterrupted)
        cache.check_integrity()


def test_what_was_found_whole_computes_its_last_token(tmp_path):
    model, prompt = tiny(), ids(1, 48)
    with cached(model, tmp_path) as cache, cache.session(prompt) as past:
        with torch.no_grad():
            model(prompt, past_key_values=past)
        past.save("prefix")
        expected = reply(model, past, torch.cat([prompt, ids(1, 3, 3)], dim=1))
    with cached(model, tmp_path) as cache:
        restored = cache.sessions.restore("prefix")
        assert restored.session.reused == 47
        assert torch.equal(go_on(model, restored, ids(1, 3, 3)), expected)


@pytest.mark.parametrize("kind", ["plain", "all", "some"])
def test_padded_rows_and_windows(tmp_path, kind):
    model = tiny() if kind == "plain" else windowed(kind)
    prompt, mask = ids(2, 60), torch.ones(2, 60, dtype=torch.int64)
    prompt[1, :7], mask[1, :7] = 0, 0
    turn = ids(2, 5, 4)
    with cached(model, tmp_path) as cache, cache.session(prompt, mask) as past:
        reply(model, past, prompt, mask)
        cache.sessions.save("two", past)
        columns = past.columns
        both = torch.zeros(2, columns, dtype=torch.int64)
        for row in range(2):
            both[row, past.pads[row] :] = held(past, row)
        long = torch.cat([mask, torch.ones(2, columns + 5 - 60, dtype=torch.int64)], dim=1)
        expected = reply(model, past, torch.cat([both, turn], dim=1), long)
    with cached(model, tmp_path) as cache:
        restored = cache.sessions.restore("two")
        assert torch.equal(restored.input_ids, both)
        assert restored.session.reused >= 64
        assert torch.equal(go_on(model, restored, turn), expected)
        cache.check_integrity()


def test_a_killed_process_has_lost_nothing_of_it(tmp_path):
    program = """
import sys, torch, os, signal
from kvpaged import DiskTier, HostTier, PagedKVCache
from tests.hf.tiny import generate, ids, tiny
model, prompt = tiny(), ids(1, 60)
tiers = [HostTier("4MiB"), DiskTier(sys.argv[1], "64MiB", policy="write-back")]
cache = PagedKVCache.for_model(model, "4MiB", page_size=16, tiers=tiers)
past = cache.session(prompt)
out = generate(model, past, prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40)
past.save("killed")
print(out[0].tolist(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    out = torch.tensor([[int(x) for x in done.stdout.strip("[]\n").split(",")]])
    model = tiny()
    with cached(model, tmp_path) as cache:
        restored = cache.sessions.restore("killed")
        assert torch.equal(restored.input_ids, out[:, :-1])
        assert restored.session.reused == 96, "all full pages of 99 tokens"
        turn = torch.cat([out[:, -1:], ids(1, 4, 2)], dim=1)
        ours = go_on(model, restored, turn)
    theirs = generate(model, None, torch.cat([out, ids(1, 4, 2)], dim=1), max_new_tokens=20)
    assert torch.equal(ours, theirs)


def test_pages_that_have_gone_are_computed_again(tmp_path):
    model, prompt = tiny(), ids(1, 50)
    with cached(model, tmp_path) as cache, cache.session(prompt) as past:
        expected = reply(model, past, prompt)
        past.save("chat")
    with DiskTier(tmp_path, "64MiB").store as store:
        for key in [entry.key for entry in store.entries() if not entry.key.startswith(KEPT)]:
            store.delete(key)
    with cached(model, tmp_path) as cache:
        restored = cache.sessions.restore("chat")
        assert restored.session.reused == 0
        assert torch.equal(go_on(model, restored, expected[:, -1:])[:, :70], expected)


def test_salts_are_not_kept_and_have_to_be_told_again(tmp_path):
    model, prompt = tiny(), ids(2, 50)
    with (
        cached(model, tmp_path) as cache,
        cache.session(prompt, salt=["hush", None], salt_from=16) as past,
    ):
        reply(model, past, prompt)
        past.save("salted")
    assert not any(b"hush" in file.read_bytes() for file in tmp_path.iterdir() if file.is_file())
    with cached(model, tmp_path) as cache:
        for salt, what in (
            (None, "row 0 was saved under a salt, which"),
            (["other", None], "row 0 was saved under another salt"),
            (["hush", "more"], "row 1 was saved without a salt"),
            (["hush"], "one for all rows or a sequence of 2"),
        ):
            with pytest.raises(UsageError, match=what):
                cache.sessions.restore("salted", salt)
        assert cache.stats().batches == 0
        restored = cache.sessions.restore("salted", ["hush", None])
        assert restored.session.reused == 64
        restored.session.close()
        with cache.session(prompt) as past:
            assert past.batch.lengths.tolist() == [16, 16], "everybody's page of the first row"


def test_another_model_sees_no_names(tmp_path):
    model = tiny()
    with cached(model, tmp_path) as cache, cache.session(ids(1, 20)) as past:
        reply(model, past, ids(1, 20))
        past.save("mine")
    other = tiny()
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight[0, 0] += 1
    with cached(other, tmp_path) as cache:
        assert cache.sessions.list() == ()
        with pytest.raises(UsageError, match="no session 'mine' is saved for this model"):
            cache.sessions.restore("mine")
        with pytest.raises(UsageError, match="no session 'mine'"):
            cache.sessions.delete("mine")
    with cached(model, tmp_path) as cache:
        assert cache.sessions.list() == ("mine",)


def test_names_are_overwritten_and_deleted(tmp_path):
    rows = [list(range(40)), [7, 8]]
    with own_loop(tmp_path) as cache:
        for turn in range(4):
            batch = cache.batch([[*row, *range(turn)] for row in rows])
            compute(cache, batch, [[*row, *range(turn)] for row in rows])
            cache.sessions.save("näme / ..", batch)
            cache.sessions.save(f"{turn}", batch)
            batch.close()
        assert cache.sessions.list() == ("0", "1", "2", "3", "näme / ..")
        assert cache.sessions.restore_rows("näme / ..").sequences == [
            [*row, 0, 1, 2] for row in rows
        ]
        cache.sessions.delete("2")
        assert cache.sessions.list() == ("0", "1", "3", "näme / ..")
        assert cache.sessions.restore_rows("1").sequences == [[*row, 0] for row in rows]
        cache.check_integrity()
    with own_loop(tmp_path) as cache:
        found, starts = cache.sessions.restore_rows("3")
        assert (found, starts) == ([[*row, 0, 1, 2] for row in rows], [0, 0])
        assert serve(cache, [[*found[0], 5], found[1]]) == [32, 0]
        assert cache.mover is not None
        kept = [one.key for one in cache.mover.stack.tiers[0].scan() if one.key[:1] == KEPT]
        assert len(kept) == 4, "of each name one record"


def test_a_batch_in_the_middle_of_a_step_saves_what_is_computed(tmp_path):
    with own_loop(tmp_path) as cache:
        batch = cache.batch([list(range(20))])
        with pytest.raises(UsageError, match="nothing is computed yet"):
            cache.sessions.save("x", batch)
        compute(cache, batch, [list(range(20))])
        batch.extend([[1, 2, 3]])
        cache.sessions.save("x", batch)
        assert cache.sessions.restore_rows("x").sequences == [list(range(20))]
        compute(cache, batch, [[*range(20), 1, 2, 3]])
        cache.sessions.save("x", batch)
        assert cache.sessions.restore_rows("x").sequences == [[*range(20), 1, 2, 3]]
        with pytest.raises(UsageError, match="serves no model: restore_rows"):
            cache.sessions.restore("x")


class Stubborn(DiskTier):
    """Fails to delete, or to put."""

    fail = ""

    def delete(self, keys: Sequence[bytes]) -> None:
        if self.fail == "delete":
            raise StorageError("stuck")
        super().delete(keys)

    def put(self, records: Sequence[Any]) -> list[bool]:
        if self.fail == "put" or (self.fail == "names" and records[0].key[:1] == KEPT):
            return [False] * len(records)
        if self.fail == "many":
            return [*super().put(records[:3]), *[False] * (len(records) - 3)]
        return super().put(records)


def test_a_name_stands_for_the_old_or_the_new_whatever_fails(tmp_path):
    model, prompt = tiny(), ids(1, 40)
    tier = Stubborn(tmp_path, "64MiB", policy="write-back")
    with cached(model, tmp_path, tiers=[tier]) as cache, cache.session(prompt) as past:
        reply(model, past, prompt, new=10)
        tier.fail = "put"
        with pytest.raises(StorageError, match="3 of the session's 3 pages are not in tier disk"):
            past.save("a")
        tier.fail = "names"
        with pytest.raises(StorageError, match="does not take the session"):
            past.save("a")
        assert cache.sessions.list() == ()
        tier.fail = ""
        past.save("a")
        old = held(past)[0].tolist()
        reply(model, past, torch.tensor([[*old, 5]]), new=10)
        tier.fail = "names"
        with pytest.raises(StorageError, match="does not take the session"):
            past.save("a")
        assert cache.sessions.restore_rows("a").sequences == [old]
        tier.fail = "delete"
        with pytest.raises(StorageError, match="stuck"):
            past.save("a")
        new = held(past)[0].tolist()
        assert cache.sessions.restore_rows("a").sequences == [new], "of two the later"
        with pytest.raises(StorageError, match="stuck"):
            cache.sessions.delete("a")
        tier.fail = ""
        past.save("a")
        assert len([one for one in tier.scan() if one.key[:1] == KEPT]) == 1
        cache.sessions.delete("a")
        assert cache.sessions.list() == ()


def test_a_tier_that_has_no_room_for_all_is_named(tmp_path):
    model, prompt = tiny(), ids(1, 400)
    tier = Stubborn(tmp_path, "64MiB", policy="second-use")
    with cached(model, tmp_path, tiers=[tier]) as cache, cache.session(prompt) as past:
        reply(model, past, prompt, new=2)
        tier.fail = "many"
        with pytest.raises(StorageError, match="22 of the session's 25 pages are not in tier disk"):
            past.save("large")
        assert cache.sessions.list() == ()


@pytest.mark.parametrize("name", ["", "a\nb", "\0", "x" * 238, "é" * 119, "\ud800", 7, None])
def test_names_that_are_none(tmp_path, name):
    with own_loop(tmp_path) as cache:
        for call in (cache.sessions.restore_rows, cache.sessions.delete):
            with pytest.raises(UsageError, match="name"):
                call(name)
        longest = "x" * 237
        batch = cache.batch([[1, 2]])
        compute(cache, batch, [[1, 2]])
        with pytest.raises(UsageError, match="name"):
            cache.sessions.save(name, batch)
        cache.sessions.save(longest, batch)
        assert cache.sessions.list() == (longest,)


def test_what_cannot_be_saved_is_said_before_anything_changes(tmp_path):
    model, prompt = tiny(), ids(1, 40)
    with PagedKVCache.for_model(model, "4MiB", page_size=PAGE, tiers=[HostTier("4MiB")]) as cache:
        with cache.session(prompt) as past:
            reply(model, past, prompt, new=2)
            with pytest.raises(UsageError, match="persistent tier, and this cache has none"):
                past.save("x")
        with pytest.raises(UsageError, match="persistent tier"):
            cache.sessions.list()
    with cached(model, tmp_path) as cache:
        with (
            cache.session(prompt, private=True) as past,
            pytest.raises(UsageError, match="private, and can't be saved: it was opened so"),
        ):
            past.save("x")
        with cache.session(prompt) as past:
            with pytest.raises(UsageError, match="nothing is computed yet"):
                past.save("x")
            with torch.no_grad():
                model(
                    inputs_embeds=model.get_input_embeddings()(prompt), past_key_values=past,
                    position_ids=torch.arange(40)[None],
                )  # fmt: skip
            with pytest.raises(UsageError, match="saved: a forward pass came without token ids"):
                past.save("x")
        with pytest.raises(UsageError, match="the batch is closed"):
            past.save("x")
        with cache.session(prompt) as past:
            reply(model, past, prompt, new=2)
            with (
                cached(model, tmp_path / "other") as other,
                pytest.raises(UsageError, match="of another cache"),
            ):
                other.sessions.save("x", past)
            with torch.no_grad():
                model.model.layers[0].self_attn.k_proj.weight[0, 0] += 1
            with pytest.raises(UsageError, match="the model has changed"):
                past.save("x")
        assert cache.sessions.list() == ()
        sessions = cache.sessions
    for call in (sessions.list, lambda: sessions.restore("x"), lambda: sessions.delete("x")):
        with pytest.raises(UsageError, match="the cache is closed"):
            call()


def test_without_a_namespace_nothing_is_saved(tmp_path):
    geometry = own_geometry().groups[0].geometry
    tiers = [DiskTier(tmp_path, "64MiB")]
    with PagedKVCache(geometry, geometry.page_bytes * 8, tiers=tiers) as cache:
        batch = cache.batch([[1, 2, 3]])
        compute(cache, batch, [[1, 2, 3]])
        with pytest.raises(UsageError, match="the cache has no namespace"):
            cache.sessions.save("x", batch)


def test_every_damaged_byte_of_a_saved_session_is_found():
    rows = (
        SavedRow(torch.arange(5).numpy(), 2, 16, b"d" * 16),
        SavedRow(torch.arange(7).numpy() + 2**31 - 8, 0, 0, None),
    )
    saved = SavedRows(namespace=b"n" * 16, times=3, random=b"r" * 16, rows=rows)
    head, body = saved.encode()
    again = SavedRows.decode(head, body)
    assert [row.tokens.tolist() for row in again.rows] == [row.tokens.tolist() for row in rows]
    assert [row[1:] for row in again.rows] == [row[1:] for row in rows]
    assert (again.namespace, again.times, again.random) == (b"n" * 16, 3, b"r" * 16)
    for place in range(len(head)):
        wrong = bytearray(head)
        wrong[place] ^= 1 << place % 8
        with pytest.raises(IntegrityError):
            SavedRows.decode(bytes(wrong), body)
    for place in range(len(body)):
        torn = body.clone()
        torn[place] ^= 1 << place % 8
        with pytest.raises(IntegrityError, match="body of a saved session"):
            SavedRows.decode(head, torn)
    with pytest.raises(IntegrityError, match="body of a saved session has 127"):
        SavedRows.decode(head, body[:-1])
    with pytest.raises(IntegrityError, match="begins with"):
        SavedRows.decode(head[:-1], body)


def test_a_damaged_record_is_named(tmp_path):
    class Torn(DiskTier):
        def put(self, records: Sequence[Any]) -> list[bool]:
            one = records[0]
            if one.key[:1] == KEPT:
                return super().put([one._replace(body=one.body.flip(0))])
            return super().put(records)

    model = tiny()
    with cached(model, tmp_path, tiers=[Torn(tmp_path, "64MiB")]) as cache:
        with cache.session(ids(1, 20)) as past:
            reply(model, past, ids(1, 20), new=2)
            past.save("torn")
        assert cache.sessions.list() == ("torn",)
        with pytest.raises(IntegrityError, match="session 'torn': the body of a saved session"):
            cache.sessions.restore("torn")
        cache.sessions.delete("torn")
