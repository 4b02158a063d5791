"""A request that was submitted: its events for asyncio, its replies for whoever waits."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence

from kvpaged.generate.params import Completion, TokenEvent
from kvpaged.generate.requests import Request


class Submission:
    """One submitted request: `async for event in submission`, `await submission`, or `result()`.

    Events may be read once, from one event loop; the replies any number of times, from anywhere.
    """

    of: Request

    def __init__(self, cancel: Callable[[Sequence[Request]], None]) -> None:
        self._cancel = cancel
        self._events: deque[TokenEvent] = deque()
        self._lock = threading.Lock()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._ended = threading.Event()

    def tell(self, event: TokenEvent) -> None:
        """Called with each event, from whichever thread takes the step."""
        with self._lock:
            self._events.append(event)
            if event.completion is not None and not self.of.open:
                self._ended.set()
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            loop, future = waiting
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
                    if event is None:
                        if self._ended.is_set():
                            return
                        loop = asyncio.get_running_loop()
                        future: asyncio.Future[None] = loop.create_future()
                        self._waiting = loop, future
                if event is None:
                    await future
                else:
                    yield event
        finally:
            if not self._ended.is_set():
                await asyncio.to_thread(self.cancel)

    def __await__(self) -> Generator[object, None, list[Completion]]:
        return asyncio.to_thread(self.result).__await__()


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
