"""What native attention is given: steps that can't be are refused, and so is a lack of memory."""

import shutil
import subprocess
import sys

import pytest
import torch

from kvpaged_kernels.cpu.native_attend import NativeLayer

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="native code needs g++")

PAGE, ENTRIES, DIM = 16, 6, 8


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def layer_of(entries=ENTRIES, *, window=None, page=PAGE):
    pages = torch.zeros(entries, 1, page, DIM)
    return NativeLayer(pages, pages.clone(), 2, scale=1.0, window=window, softcap=None)


def plan(layer, table, lengths, cu_q, tokens=None):
    tokens = int(cu_q[-1]) if tokens is None else tokens
    q, k = torch.ones(tokens, 2, DIM), torch.ones(tokens, 1, DIM)
    return layer.plan(q, k, k, table, lengths, cu_q), q, k


ROWS = ints(0, 1), ints(2, 3), ints(4, 5)
ANY = -(2**31)


@pytest.mark.parametrize(
    ("table", "lengths", "cu_q", "tokens", "says"),
    [
        (ROWS, (9, 9, 9), (1, 2, 3, 4), 4, "cu_q begins with 1"),
        (ROWS, (9, 9, 9), (0, 2, 1, 3), 3, "cu_q falls from 2 to 1 at row 1"),
        (ROWS, (9, 9, 9), (0, 2, ANY, 3), 3, f"cu_q falls from 2 to {ANY} at row 1"),
        (ROWS, (9, 9, 9), (0, 1, 2, 3), 4, "cu_q ends with 3, for 4 new tokens"),
        (ROWS, (9, 4, 9), (0, 1, 6, 7), 7, "row 1 has 5 new tokens and 4 in all"),
        (ROWS, (9, 0, 9), (0, 1, 2, 3), 3, "row 1 has 1 new tokens and 0 in all"),
        (ROWS, (9, ANY, 9), (0, 1, 2, 3), 3, f"row 1 has 1 new tokens and {ANY} in all"),
        (ROWS, (9, 9, -1), (0, 1, 2, 2), 2, "row 2 has 0 new tokens and -1 in all"),
        (ROWS, (9, 32, 33), (0, 1, 2, 3), 3, "row 2 has 33 tokens, a table 2 pages of 16"),
        (ROWS, (9, 2**31 - 1, 9), (0, 1, 2, 3), 3, "row 1 has 2147483647 tokens"),
        ((*ROWS[:2], ints(4, 6)), (9, 9, 17), (0, 1, 2, 3), 3, "page 1 of row 2 is entry 6 of 6"),
        ((ints(-1, 0), *ROWS[1:]), (9, 9, 9), (0, 1, 2, 3), 3, "page 0 of row 0 is entry -1 of 6"),
        ((ints(ANY, 0), *ROWS[1:]), (9, 9, 9), (0, 5, 6, 7), 7, f"row 0 is entry {ANY} of 6"),
    ],
)
def test_steps_that_cannot_be_are_refused(table, lengths, cu_q, tokens, says):
    layer = layer_of()
    with pytest.raises(ValueError, match=says):
        plan(layer, torch.stack(table), ints(*lengths), ints(*cu_q), tokens)


def test_entries_that_no_query_sees_may_be_anything():
    table = torch.stack([ints(ANY, 5, 2**30), ints(ANY, 2**30, ANY), ints(0, 1, 2**30)])
    layer = layer_of(window=10)
    # Of the first row positions 21 and up are seen; the second has nothing new.
    step, q, k = plan(layer, table, ints(31, 90, 32), ints(0, 1, 1, 3))
    assert torch.equal(layer(step, q, k, k)[1:].isnan(), torch.zeros(2, 2, DIM, dtype=torch.bool))
    assert step.entries == 6
    with pytest.raises(ValueError, match="page 0 of row 0"):
        plan(layer, table, ints(25, 90, 32), ints(0, 1, 1, 3))  # position 15 is


def test_layers_unlike_the_step_are_refused():
    step, q, k = plan(layer_of(), torch.stack(ROWS), ints(9, 9, 9), ints(0, 1, 2, 3))
    assert step.entries == 5
    layer_of(5)(step, q, k, k)
    with pytest.raises(ValueError, match=r"a step of 5 entries.*a layer of 4"):
        layer_of(4)(step, q, k, k)
    with pytest.raises(ValueError, match="a step of 5 entries"):
        layer_of(window=10)(step, q, k, k)
    with pytest.raises(ValueError, match="a step of 5 entries"):
        layer_of(page=8)(step, q, k, k)


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 1), ()])
def test_sinks_of_other_heads_are_refused_before_anything_is_written(shape):
    pages = torch.zeros(2, 1, PAGE, DIM), torch.zeros(2, 1, PAGE, DIM)
    layer = NativeLayer(*pages, 2, scale=1.0, window=None, softcap=None)
    step, q, k = plan(layer, ints(0)[None], ints(1), ints(0, 1))
    with pytest.raises(ValueError, match="sinks"):
        layer(step, q, k, k, torch.zeros(shape))
    assert not pages[0].any()


# In a process of its own: nothing else may ask for memory while there is none.
WITHOUT_MEMORY = """
import resource, torch
from kvpaged_kernels.cpu.native_attend import NativeLayer

torch.set_num_threads({threads})
rows, new, heads, dim, length = {rows}, {new}, {heads}, {dim}, 320
pages = [torch.randn(60, heads, 16, dim) for _ in "kv"]
layer = NativeLayer(*pages, 8 * heads, scale=0.1, window=None, softcap=None)
table = torch.arange(length // 16, dtype=torch.int32).expand(rows, -1).clone()
table[:, -1] = torch.arange(rows, dtype=torch.int32) % 40 + 20
lengths = torch.full((rows,), length, dtype=torch.int32)
cu_q = torch.arange(0, rows * new + 1, new, dtype=torch.int32)
q, (k, v) = torch.randn(rows * new, 8 * heads, dim), torch.randn(2, rows * new, heads, dim)
before = pages[0].clone()

def limited(run):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), old[1]))
    try:
        run()
    except MemoryError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)

def plan():
    return layer.plan(q, k, v, table, lengths, cu_q)

if rows > 1:
    print(limited(plan))
step = plan()
if new > 1:
    print(limited(lambda: layer(step, q, k, v)))
    assert torch.equal(pages[0], before)
torch.set_num_threads(1)
assert layer(plan(), q, k, v).isfinite().all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of address space is Linux's")
@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (
            {"rows": 900, "new": 1, "heads": 8, "dim": 128, "threads": 1},
            "bytes or more for a plan of 900 rows and 900 new tokens",
        ),
        (
            {"rows": 1, "new": 100, "heads": 1, "dim": 1024, "threads": 64},
            "bytes for native attention to work in",
        ),
    ],
)
def test_a_lack_of_memory_is_told(sizes, says):
    code = WITHOUT_MEMORY.format(**sizes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert int(done.stdout.split()[1]) > 8 << 20
