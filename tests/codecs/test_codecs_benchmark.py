"""The benchmark of codecs runs, tiny, on real K and V, and ends with its document."""

import json

import pytest
import torch

from benchmarks import codecs


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_codecs_run_tiny_and_end_with_their_document(tmp_path, capsys):
    codecs.main(["--quick", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads((tmp_path / "codecs.json").read_text())
    assert out.index("ceiling") < out.index("decode GB/s") < out.index("KV bf16, 65,536 bytes")
    ratios = {row["way"]: row["ratio"] for row in document["rows"]}
    assert set(ratios) == set(codecs.WAYS)
    assert ratios["copy"] == 1
    assert ratios["lossless"] >= 1.40
    assert ratios["lossless"] > ratios["zstd-3"] > 1
    for row in document["rows"]:
        assert row["values"] == 45
        assert row["gb_per_second"]["decode"]["median"] > 0


def test_values_are_whole():
    numbers = torch.arange(100_000, dtype=torch.int32)
    values = codecs.values_of(numbers, 4096)
    assert all(len(value) == 4096 for value in values)
    assert [int(value.view("i4")[0]) for value in values[:3]] == [0, 1024, 2048]
    assert len(values) == 97
