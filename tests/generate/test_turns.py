"""Threads get their turn in the order in which they asked."""

import threading
import time

import pytest

from kvpaged.generate.turns import Turns


def test_who_has_waited_longest_goes_first():
    turns, order = Turns(), []

    def ask(number):
        with turns, turns:  # twice, as its owner may
            order.append(number)

    with turns:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for number, thread in enumerate(threads):
            thread.start()
            while len(turns._line) <= number:
                time.sleep(0.001)
    with turns:
        order.append("again")
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, "again"]


@pytest.mark.parametrize("late", [False, True])
def test_who_is_interrupted_while_waiting_loses_nothing(monkeypatch, late):
    turns = Turns()

    class Interrupted:
        def __init__(self) -> None:
            self.tries = 0

        def acquire(self):
            self.tries += 1
            if self.tries == 2:
                if late:  # the turn has been given to it already
                    turns.__exit__()
                raise KeyboardInterrupt

        def release(self):
            pass

    turns._owner, turns._depth = -1, 1  # another thread has it
    turns._books = threading.RLock()
    monkeypatch.setattr("kvpaged.generate.turns.threading.Lock", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        turns.__enter__()
    monkeypatch.undo()
    if not late:
        turns.__exit__()
    assert not turns._line
    with turns:
        assert turns._owner == threading.get_ident()
    assert turns._owner is None
