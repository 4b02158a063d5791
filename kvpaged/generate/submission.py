"""A request that was submitted: its events for asyncio, its replies for whoever waits."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import suppress

from kvpaged.generate.params import Completion, TokenEvent
from kvpaged.generate.requests import Request

Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]


class Submission:
    """One submitted request: `async for event in submission`, `await submission`, or `result()`.

    Events may be read once, from one event loop; the replies any number of times, from anywhere.
    """

    of: Request

    def __init__(self, cancel: Callable[[Sequence[Request]], None]) -> None:
        self._cancel = cancel
        self._events: deque[TokenEvent] = deque()
        self._lock = threading.Lock()
        self._for_event: list[Waiter] = []
        self._for_end: list[Waiter] = []
        self._ended = threading.Event()

    @property
    def number(self) -> int:
        """Of its request in the generator: what its events and its replies say."""
        return self.of.number

    def tell(self, event: TokenEvent) -> None:
        """Called with each event, from whichever thread takes the step."""
        with self._lock:
            self._events.append(event)
            waiting, self._for_event = self._for_event, []
            if event.completion is not None and not self.of.open:
                self._ended.set()
                waiting += self._for_end
        for loop, future in waiting:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(_wake, future)

    def cancel(self) -> None:
        """End it as it is."""
        self._cancel([self.of])

    def result(self, timeout: float | None = None) -> list[Completion]:
        """Its replies, once all have ended.

        Raises:
            TimeoutError: they have not within `timeout` seconds.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the request has not ended within {timeout} seconds")
        return [reply.completion for reply in self.of.replies]

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        try:
            while True:
                with self._lock:
                    event = self._events.popleft() if self._events else None
                    if event is None and self._ended.is_set():
                        return
                    news = _promise(self._for_event) if event is None else None
                if news is not None:
                    await news
                elif event is not None:
                    yield event
        finally:
            if not self._ended.is_set():
                await asyncio.to_thread(self.cancel)

    def __await__(self) -> Generator[object, None, list[Completion]]:
        return self._replies().__await__()

    async def _replies(self) -> list[Completion]:
        # Not in a thread: a loop has few of them, and more requests than that are open.
        with self._lock:
            end = None if self._ended.is_set() else _promise(self._for_end)
        if end is not None:
            await end
        return self.result()


def _promise(waiting: list[Waiter]) -> asyncio.Future[None]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    waiting.append((loop, future))
    return future


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
