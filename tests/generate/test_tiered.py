"""The generator over a cache with tiers: the same tokens, whatever the tiers do."""

import random
import threading

import pytest
import torch

from kvpaged import Generator, HostTier, OffloadOptions, PagedKVCache
from tests.generate.asked import alone, assert_greedy, hybrid, params_of, windowed
from tests.hf.tiny import tiny

MODELS = {"llama": tiny, "hybrid": hybrid, "windowed": windowed}


def conversations(count, turns, seed=0):
    """Prompts that go on from each other, turn by turn, in random order within a turn."""
    rng = random.Random(seed)
    texts = [[rng.randrange(2, 128) for _ in range(rng.randint(40, 90))] for _ in range(count)]
    asked = []
    for _ in range(turns):
        for number in rng.sample(range(count), count):
            texts[number] = texts[number] + [rng.randrange(2, 128) for _ in range(20)]
            asked.append(texts[number])
    return asked


def figures(cache):
    """Of the tiers of a cache."""
    offload = cache.stats().offload
    assert offload is not None
    return offload


def always_loads(cache):
    """Computing so small a model may be quicker, and then is chosen: it is never measured here."""
    cache.mover.note_pass = lambda tokens, seconds: None


def page_bytes(model):
    probe = PagedKVCache.for_model(model, "8MiB", page_size=16)
    with probe:
        return sum(group.page_bytes for group in probe.stats().groups)


class Gated(HostTier):
    """A tier whose reads wait until they may go on."""

    def __init__(self, size):
        super().__init__(size, policy="write-through")
        self.open = threading.Event()
        self.open.set()
        self.reads = 0

    def read(self, keys, room):
        self.reads += 1
        self.open.wait()
        return super().read(keys, room)


class Lying(HostTier):
    """A tier whose bytes are damaged from some layer on."""

    def __init__(self, size):
        super().__init__(size, policy="write-through")
        self.damages = False

    def read(self, keys, room):
        reading = super().read(keys, room)
        if self.damages:
            for record in reading.__enter__():
                if record is not None:
                    record.body[-5] ^= 1
            reading.__exit__(None, None, None)
        return reading


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["write-back", "write-through"])
def test_a_working_set_larger_than_the_pool_is_served_from_host_memory(name, policy):
    model = MODELS[name]()
    asked = conversations(5, 2)
    wanted = [alone(model, prompt, 4) for prompt in asked]
    memory = 16 * page_bytes(model)
    with (
        PagedKVCache.for_model(
            model, memory, page_size=16, tiers=[HostTier("16MiB", policy=policy)]
        ) as cache,
        Generator(model, cache, max_running=2) as generator,
    ):
        always_loads(cache)
        done = []
        for prompt in asked:
            done += generator.generate([prompt], params_of([4])[0])
            cache.check_integrity()
        assert_greedy(model, done, asked, wanted)
        assert cache.flush()
        stats = figures(cache)
        assert stats.tiers[0].promoted + stats.rejoined > 0  # on its way, or there
        assert stats.demoted > 0
        assert sum(one.cached_tokens for one in done) > 0.5 * sum(map(len, asked)) - 5 * 90


def test_pages_land_layer_by_layer_under_a_pass():
    """The pass begins while its pages land: its attention waits, and replies are the same."""
    model = tiny()
    prompt = conversations(1, 1, seed=3)[0]
    wanted = [alone(model, prompt, 5)]
    tier = HostTier("16MiB", policy="write-through")
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16, tiers=[tier]) as cache,
        Generator(model, cache) as generator,
    ):
        generator.generate([prompt], max_new_tokens=1)
        assert cache.flush()
        cache.clear()
        waits: list[tuple[int, int]] = []
        mover = cache.mover
        assert mover is not None
        promote = mover.promote

        def gated(wanted, load_s):
            promotion = promote(wanted, load_s)
            wait_layer, ready = promotion.wait_layer, promotion.ready

            def waiting(group, place):
                waits.append((group, place))
                wait_layer(group, place)

            def early():  # as soon as it was asked for
                return ready() or promotion._turn > 0

            promotion.ready = early  # type: ignore[method-assign]
            promotion.wait_layer = waiting  # type: ignore[method-assign]
            return promotion

        mover.promote = gated  # type: ignore[method-assign]
        done = generator.generate([prompt], max_new_tokens=5)
        assert_greedy(model, done, [prompt], wanted)
        assert waits == [(0, layer) for layer in range(model.config.num_hidden_layers)]
        assert done[0].cached_tokens == (len(prompt) - 1) // 16 * 16
        cache.check_integrity()


@pytest.mark.parametrize("name", MODELS)
def test_pages_that_are_damaged_are_computed(name):
    model = MODELS[name]()
    asked = conversations(2, 2, seed=1)
    wanted = [alone(model, prompt, 5) for prompt in asked]
    tier = Lying("16MiB")
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16, tiers=[tier]) as cache,
        Generator(model, cache) as generator,
    ):
        assert_greedy(model, generator.generate(asked, max_new_tokens=5), asked, wanted)
        assert cache.flush()
        cache.clear()
        tier.damages = True
        assert_greedy(model, generator.generate(asked, max_new_tokens=5), asked, wanted)
        stats = figures(cache)
        assert stats.promotions_failed > 0
        assert stats.tiers[0].missed > 0
        tier.damages = False
        assert cache.flush()
        cache.check_integrity()


def test_a_tier_that_hangs_costs_a_deadline_and_no_reply():
    model = tiny()
    asked = conversations(3, 1, seed=2)
    wanted = [alone(model, prompt, 5) for prompt in asked]
    tier = Gated("16MiB")
    options = OffloadOptions(deadline_s=0.1)
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16, tiers=[tier], offload=options) as cache,
        Generator(model, cache) as generator,
    ):
        generator.generate(asked, max_new_tokens=1)
        assert cache.flush()
        cache.clear()
        tier.open.clear()
        assert_greedy(model, generator.generate(asked, max_new_tokens=5), asked, wanted)
        stats = figures(cache)
        assert stats.tiers[0].parked
        assert tier.reads == 1  # nothing is asked of it until that call returns
        cache.check_integrity()
        tier.open.set()
        assert cache.flush()
        cache.clear()
        done = generator.generate(asked, max_new_tokens=5)
        assert_greedy(model, done, asked, wanted)
        assert not figures(cache).tiers[0].parked
        assert all(one.cached_tokens for one in done)
        cache.check_integrity()


def test_cancelling_while_pages_come_leaves_nothing_behind():
    model = tiny()
    prompt = conversations(1, 1, seed=4)[0]
    tier = Gated("16MiB")
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16, tiers=[tier]) as cache,
        Generator(model, cache) as generator,
    ):
        generator.generate([prompt], max_new_tokens=1)
        assert cache.flush()
        cache.clear()
        tier.open.clear()
        mover = cache.mover
        assert mover is not None
        request = generator._requests([prompt], None, {}, salt=None, priority=0, deadline_s=None)
        generator._add(request)
        generator._engine._admit()
        assert generator._batch.loading
        generator._cancel(request)
        assert not generator._batch.loading
        assert cache.classes[0].allocator.used_pages() == 0  # what comes too late is not copied
        tier.open.set()
        for _ in range(1000):
            if not mover.stack.workers[0].parked:
                break
            threading.Event().wait(0.01)
        assert cache.classes[0].allocator.used_pages() == 0
        assert mover.staging.used == 0
        cache.check_integrity()


def test_what_is_set_back_for_want_of_pages_comes_back_from_a_tier():
    model = tiny()
    torch.manual_seed(0)
    asked = conversations(4, 1, seed=5)
    wanted = [alone(model, prompt, 40) for prompt in asked]
    memory = 20 * page_bytes(model)
    with (
        PagedKVCache.for_model(model, memory, page_size=16, tiers=[HostTier("16MiB")]) as cache,
        Generator(model, cache, max_running=4) as generator,
    ):
        always_loads(cache)
        set_back = generator._engine._set_back

        def written(error):  # a tiny model would be back before the mover has begun
            set_back(error)
            assert cache.flush()

        generator._engine._set_back = written  # type: ignore[method-assign]
        done = generator.generate(asked, max_new_tokens=40, ignore_eos=True)
        assert_greedy(model, done, asked, wanted)
        assert generator.stats().preemptions > 0
        assert figures(cache).tiers[0].promoted > 0
        cache.check_integrity()
