"""A loop of one's own against dense attention in fp64: every backend, both layouts, any history."""

import gc
import threading

import numpy as np
import pytest
import torch

from kvpaged import LayerGroup, PagedKVCache, PageGeometry
from kvpaged.errors import ConfigError, IntegrityError, OutOfPagesError, UsageError
from tests.dense import DIM, KV_HEADS, LAYERS, Oracle, geometry, make


@pytest.mark.parametrize("layout", ["page-major", "layer-major"])
@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_ragged_prompts_decode_forks_and_rewinds_equal_dense_attention(backend, layout):
    with make(backend, layout) as cache:
        batch = cache.batch([range(5), range(40), range(16), range(1)])
        oracle = Oracle(cache, batch)
        oracle.compute()
        for _ in range(2 if backend == "triton" else 20):
            batch.extend([1] * batch.rows)
            oracle.compute()
        batch.commit_computed()
        oracle.fork(1)
        for tokens in ([[1, 2, 3]] * 5, [[1] * 40, [], [2] * 3, [], [1] * 17], [[7]] * 5):
            batch.extend(tokens)
            oracle.compute()
            cache.check_integrity()
        batch.commit_computed()
        oracle.rewind(0, 33)
        batch.extend([1] * batch.rows)
        oracle.compute()
        batch.close()
        cache.check_integrity()
        assert cache.stats().used == 0


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_a_window_is_exact_and_gives_pages_back(backend):
    groups = [
        LayerGroup(
            geometry=PageGeometry(
                layers=1, kv_heads=KV_HEADS, head_dim=DIM, page_size=16, dtype=torch.float32
            ),
            layers=(layer,),
            window=window,
        )
        for layer, window in enumerate((24, None))
    ]
    with PagedKVCache(groups, "8MiB", backend=backend) as cache:
        batch = cache.batch([range(100), range(3)])
        oracle = Oracle(cache, batch)
        oracle.compute()
        for _ in range(3 if backend == "triton" else 40):
            batch.extend([1, 2])
            oracle.compute()
            cache.check_integrity()
        batch.commit_computed()
        windowed, whole = (len(batch.page_map(group)[0]) for group in range(2))
        assert windowed <= -(-24 // 16) + 2, "the window, the page it begins in, one to rewind"
        assert whole == -(-int(batch.lengths[0]) // 16)
        oracle.rewind(0, int(batch.lengths[0]) - 10)
        batch.extend([[1] * 5, [1]])
        oracle.compute()
        batch.commit_computed()
        with pytest.raises(UsageError, match="cannot rewind to 20: a window of 24"):
            batch.rewind(0, to=20)


def test_one_transfer_a_step_and_only_changed_table_entries():
    with make() as cache:
        batch = cache.batch([range(30)] * 8)
        oracle = Oracle(cache, batch)
        oracle.compute()
        for step in range(5):
            assert batch.transfers() == step + 1
            batch.extend([1] * 8)
            oracle.compute()


def test_out_of_pages_changes_nothing_and_other_batches_go_on():
    with make(memory=geometry().page_bytes * 8) as cache:
        first = cache.batch([range(20)])
        one = Oracle(cache, first, 1)
        one.compute()
        second = cache.batch([range(60)])
        two = Oracle(cache, second, 2)
        two.compute()
        second.commit_computed()
        with pytest.raises(OutOfPagesError, match="40 new tokens in 1 sequences") as caught:
            second.extend([[1] * 40])
        assert (caught.value.needed, caught.value.available) == (3, 2)
        with pytest.raises(OutOfPagesError):
            cache.batch([range(16), range(40)])
        cache.check_integrity()
        second.extend([[1] * 20])
        two.compute()
        first.extend([[1] * 12])
        one.compute()
        second.close()
        first.extend([[1] * 60])
        one.compute()
        cache.check_integrity()


def test_an_unfinished_step_is_forgotten_by_a_rewind():
    with make() as cache:
        batch = cache.batch([range(10)])
        oracle = Oracle(cache, batch)
        oracle.compute()
        batch.extend([[1] * 30])
        q, k, v = torch.randn(3, 30, KV_HEADS, DIM).unbind()
        cache.attend(0, q, k, v, batch)
        with pytest.raises(UsageError, match=r"layers \[1\] have not attended"):
            batch.extend([[1]])
        oracle.rewind(0, 10)
        cache.check_integrity()
        assert len(batch.page_map()[0]) == 1
        batch.extend([[1] * 7])
        oracle.compute()


def test_a_forgotten_steps_page_elsewhere_is_found_by_later_steps():
    """What a step that never counted took stays with its row, and need not be adjacent."""
    with make(memory=geometry().page_bytes * 64) as cache:
        batch = cache.batch([range(250)])
        oracle = Oracle(cache, batch)
        oracle.compute()
        batch.commit_computed()
        blocker = cache.batch([range(16)])  # the extent after the batch's is taken
        other = Oracle(cache, blocker, seed=7)
        other.compute()
        batch.begin(np.array([30]))
        batch.step = None
        assert np.diff(batch.page_map()[0]).max() > 1
        for _ in range(12):
            batch.extend([1])
            oracle.compute()
        assert batch.lengths[0] > 256
        blocker.extend([1])
        other.compute()


def test_forks_share_pages_until_they_write():
    with make() as cache:
        batch = cache.batch([range(40)])
        oracle = Oracle(cache, batch)
        oracle.compute()
        for _ in range(3):
            batch.commit_computed()
            oracle.fork(0)
        assert batch.pages() == 3
        batch.extend([1, 2, 3, 4])
        oracle.compute()
        batch.commit_computed()
        maps = batch.page_map()
        assert batch.pages() == 2 + 4, "two full pages shared, the last one copied for three"
        assert all((m[:2] == maps[0][:2]).all() for m in maps)
        cache.check_integrity()


def test_sealed_bytes_are_verified():
    with make() as cache:
        batch = cache.batch([range(40)])
        Oracle(cache, batch).compute()
        batch.commit_computed()
        assert cache.stats().groups[0].sealed_pages == 2
        cache.check_integrity()
        page = int(batch.page_map()[0][1])
        cache.classes[0].layers[1].k_pages[page, 1, 5, 3] += 1
        with pytest.raises(IntegrityError, match=f"page {page}, layer 1 .* 1 slices are wrong"):
            cache.check_integrity()
        cache.check_integrity(deep=False)


def test_a_page_is_the_same_bytes_for_every_backend_and_layout():
    sums = []
    for backend in ("cpu", "triton", "reference"):
        for layout in ("page-major", "layer-major"):
            with make(backend, layout) as cache:
                batch = cache.batch([range(33)])
                Oracle(cache, batch, seed=5).compute()
                batch.commit_computed()
                kept = cache.classes[0].exact.checksums
                assert kept is not None
                sums.append(kept[batch.page_map()[0][:2].tolist()])
    assert all(torch.equal(each, sums[0]) for each in sums)
    assert len(set(sums[0].flatten().tolist())) == 4


def test_what_a_nan_left_in_a_page_never_reaches_its_next_holder():
    with make(memory=geometry().page_bytes * 3) as cache:
        batch = cache.batch([range(48)])
        for layer in range(LAYERS):
            nan = torch.full((48, KV_HEADS, DIM), torch.nan)
            cache.attend(layer, nan, nan, nan, batch)
        batch.close()
        batch = cache.batch([range(3), range(2), range(7)])
        oracle = Oracle(cache, batch)
        oracle.compute()
        for _ in range(3):
            batch.extend([1, 1, 1])
            oracle.compute()


def test_forgotten_batches_give_their_pages_back():
    cache = make()
    batch = cache.batch([range(40)])
    used = cache.stats().used
    assert used == 3 * geometry().page_bytes
    del batch
    gc.collect()
    assert cache.stats().used == 0
    assert cache.stats().batches == 0
    cache.check_integrity()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.batch([]), "at least one sequence"),
        (lambda c: c.batch([[1.5]]), "flat sequence of ints"),
        (lambda c: c.batch([[-1]]), "lie in 0..2147483647, got -1"),
        (lambda c: c.batch([[1], [1, 2]]).extend([1]), r"layers \[0, 1\] have not attended"),
        (lambda c: c.attend(2, *(torch.zeros(1, 2, 64),) * 3, c.batch([[1]])), "layer 2 is not"),
        (lambda c: c.session(torch.zeros(1, 1, dtype=torch.int64)), "for_model"),
        (lambda c: c.batch([[1]]).attend(0, torch.zeros(1, 2, 64), scale=1), "before its keys"),
        (lambda c: c.batch([[1]]).rewind(3, to=0), "row 3 is not in 0..0"),
    ],
)
def test_misuse_is_named(call, message):
    cache = make()
    with pytest.raises(UsageError, match=message):
        call(cache)
    gc.collect()
    cache.check_integrity()
    assert cache.stats().used == 0


def test_gradients_are_refused():
    with make() as cache:
        batch = cache.batch([[1]])
        k = torch.zeros(1, KV_HEADS, DIM, requires_grad=True)
        with pytest.raises(UsageError, match="gradients"):
            cache.attend(0, k, k, k, batch)
        with torch.no_grad():
            cache.attend(0, k, k, k, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "1KiB"}, "smaller than one page"),
        ({"memory": "100TiB"}, r"100.0 TiB was asked for and cpu has .* free"),
        ({"memory": "much"}, "'much' is not a size"),
        ({"memory": 0}, "must be positive"),
        ({"backend": "cuda"}, "backend must be"),
        ({"layout": "rows"}, "layout must be"),
    ],
)
def test_impossible_options_are_named_before_anything_is_allocated(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_after_close_everything_says_so():
    cache = make()
    batch = cache.batch([[1, 2]])
    cache.close()
    cache.close()
    with pytest.raises(UsageError, match="the cache is closed"):
        cache.batch([[1]])
    with pytest.raises(UsageError, match="the cache is closed"):
        cache.attend(0, *(torch.zeros(2, 2, 64),) * 3, batch)
    batch.close()
    with pytest.raises(UsageError, match="closed"):
        batch.extend([1])


def test_threads_with_batches_of_their_own_share_one_cache():
    failures: list[BaseException] = []
    with make(memory="16MiB") as cache:

        def work(seed: int) -> None:
            try:
                for turn in range(5):
                    batch = cache.batch([range(10 + seed), range(30 + turn)])
                    oracle = Oracle(cache, batch, seed)
                    oracle.compute()
                    for _ in range(10):
                        batch.extend([1, 2])
                        oracle.compute()
                    batch.close()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        cache.check_integrity()
        assert cache.stats().used == 0


def test_statistics_and_integrity_while_others_open_and_close():
    failures: list[BaseException] = []
    done = threading.Event()
    with make(memory="8MiB") as cache:

        def churn() -> None:
            while not done.is_set():
                cache.batch([[1, 2, 3]]).close()

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(300):
                cache.stats()
                cache.check_integrity(deep=False)
        except BaseException as error:
            failures.append(error)
        done.set()
        thread.join()
    assert not failures, failures[0]


@pytest.mark.parametrize(
    "shape", [(1, 6, 64), (3, 6, 64), (2, 5, 64), (2, 0, 64), (2, 6, 32)], ids=str
)
def test_queries_that_do_not_fit_are_named(shape):
    with make() as cache:
        batch = cache.batch([[1], [1]])
        k = torch.zeros(2, KV_HEADS, DIM)
        with pytest.raises(ValueError, match=r"queries must be \[2 tokens, a multiple"):
            cache.attend(0, torch.zeros(shape), k, k, batch)
        with pytest.raises(ValueError, match=r"got .* of torch\.float64"):
            cache.attend(0, torch.zeros(2, 6, 64).double(), k, k, batch)
