"""What the users of replies are told: events as tokens come, completions at the end."""

from kvpaged.generate.params import FinishReason, TokenEvent
from kvpaged.generate.requests import Ints, Reply


def tell(reply: Reply, token: int, *, last: bool) -> bool:
    """A reply has one more token; returns whether a stop text ends it. Its last token is told with
    its end.
    """
    before = reply.tail is not None and reply.tail.stopped
    shown = reply.tail.add([token]) if reply.tail is not None else ""
    stopped = before or (reply.tail is not None and reply.tail.stopped)
    reply.unsent.append(token)
    if reply.request.on_event is not None and not last and not stopped:
        unsent, reply.unsent = reply.unsent, []
        event = TokenEvent(reply.request.number, reply.index, tuple(unsent), shown, None)
        reply.request.on_event(event)
    else:
        reply.pending += shown
    return stopped


def end_reply(
    reply: Reply, ids: Ints, reason: FinishReason, error: Exception | None, now: float
) -> None:
    """A reply has ended with these tokens, its prompt's first."""
    if reply.ended:
        return
    reply.ended = True
    request, completion = reply.request, reply.completion
    completion.tokens = ids[len(request.prompt) :].tolist()
    completion.finish_reason, completion.error = reason, error
    completion.total_s = now - request.submitted
    if request.params.logprobs is not None:
        completion.logprobs = reply.logprobs[: len(completion.tokens)]
    rest = reply.pending
    try:
        if reply.tail is not None:
            rest += reply.tail.end()
            completion.text = reply.tail.text
        elif request.decode is not None:
            completion.text = request.decode(completion.tokens)
    except Exception as failed:  # a tokenizer's: the tokens are told all the same
        if completion.error is None:
            completion.finish_reason, completion.error = "error", failed
    request.open -= 1
    if request.on_end is not None:
        request.on_end(completion)
    if request.on_event is not None:
        unsent = tuple(reply.unsent)
        request.on_event(TokenEvent(request.number, reply.index, unsent, rest, completion))
