"""vLLM as benchmarks drive it: requests as JSON lines on stdin, answers on stdout.

Run by its path, by an interpreter that has vLLM, and nothing of kvpaged (`vllm_engine` does it):

    python vllm_runner.py MODEL DTYPE LENGTH ROWS BLOCK OPTIONS

OPTIONS is a JSON object of more arguments of `vllm.LLM`. The first line on stdout says what runs.

A request is `{"prompts": [[ids]], "new": n, "reset": true}` (`n`: a number, or one each): greedy,
without an end of sequence, with an empty prefix cache if `reset`. The answer to it is one line:

    {"total_s": ..., "first_s": ..., "cached": prompt tokens found, "tokens": [[ids]]}
"""

import json
import os
import statistics
import sys
import time
from importlib import import_module
from typing import Any, TextIO

MEMORY_GIB = 4


def make_engine(
    folder: str, dtype: str, length: int, rows: int, block: int, options: dict[str, Any]
) -> Any:
    """vLLM's engine in this process, with automatic prefix caching."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its loop runs in `serve`
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(MEMORY_GIB))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    llm = import_module("vllm").LLM(
        model=folder,
        dtype=dtype,
        max_model_len=length,
        max_num_seqs=rows,
        block_size=block,
        enable_prefix_caching=True,
        **options,
    )
    return llm.llm_engine


def serve(engine: Any, number: int, request: dict[str, Any]) -> dict[str, Any]:
    """Compute one request's prompts together."""
    if request["reset"] and not engine.reset_prefix_cache():
        raise RuntimeError("vLLM kept its prefix cache")
    news = request["new"]
    settings = [
        import_module("vllm").SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        for new in (news if isinstance(news, list) else [news] * len(request["prompts"]))
    ]
    names = [f"{number}-{row}" for row in range(len(request["prompts"]))]
    firsts: dict[str, float] = {}
    done: dict[str, Any] = {}
    start = time.perf_counter()
    for name, ids, mine in zip(names, request["prompts"], settings, strict=True):
        engine.add_request(name, {"prompt_token_ids": ids}, mine)
    while engine.has_unfinished_requests():
        for output in engine.step():
            firsts.setdefault(output.request_id, time.perf_counter())
            if output.finished:
                done[output.request_id] = output
    end = time.perf_counter()
    return {
        "total_s": end - start,
        "first_s": statistics.median(firsts.values()) - start,
        "cached": sum(done[name].num_cached_tokens or 0 for name in names),
        "tokens": [list(done[name].outputs[0].token_ids) for name in names],
    }


def main(answers: TextIO) -> None:
    """Say what runs, then answer until stdin ends."""
    folder, dtype, length, rows, block, options = sys.argv[1:]
    engine = make_engine(folder, dtype, int(length), int(rows), int(block), json.loads(options))
    size = engine.vllm_config.cache_config.block_size
    hello = {name: import_module(name).__version__ for name in ("vllm", "torch")}
    print(json.dumps({**hello, "block_size": size}), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        answer = serve(engine, number, json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    # Modules beside this file are not what anything here means by their names.
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(__file__)]
    # vLLM logs to stdout: that goes to stderr, and answers keep what was stdout.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(own)
