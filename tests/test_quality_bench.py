"""The benchmark of quality runs, tiny, and says what it found; its arithmetic is right."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import quality, quality_systems
from benchmarks import quality_measures as measures
from kvpaged.likeness import Likeness, likeness, mean


def test_it_runs_tiny_and_ends_with_its_document(tmp_path, capsys):
    quality.main(
        ["--quick", "--models", "smollm2", "--formats", "int4", "--no-peers", "--windows", "1",
         "--threads", "1", "--out", str(tmp_path)]
    )  # fmt: skip
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads((tmp_path / "quality.json").read_text())
    found = document["models"]["smollm2"]
    exact, int4 = found["systems"]["exact"], found["systems"]["int4"]
    assert (exact["kl"], exact["change_percent"], exact["agree"]) == (0, 0, 1)
    assert 1e-4 < int4["kl"] < 0.03
    assert int4["bits"]["page"] == 4.5
    # 24 pages, two of which are exact: the first and the open one.
    assert int4["bits"]["1500 tokens"] == pytest.approx((22 * 64 * 4.5 + 2 * 64 * 16) / 1500)
    assert exact["bits"]["1500 tokens"] == pytest.approx(24 * 64 * 16 / 1500)
    assert found["needles"]["exact"]["as_exact"] == found["needles"]["prompts"] == 1
    assert found["divergence"]["exact"] == [None]
    assert "-" in out.splitlines()[-4]  # the table, and a note below it


def test_what_nobody_knows_is_an_error(capsys):
    for option, value in (("--models", "smollm"), ("--formats", "int5")):
        with pytest.raises(SystemExit):
            quality.main([option, value])
        assert value in capsys.readouterr().err


def test_windows_are_even_and_end_with_the_text():
    found = measures.windows(range(100), 4, 10)
    assert found[:, 0].tolist() == [0, 30, 60, 90]
    assert found[-1].tolist() == list(range(90, 100))
    with pytest.raises(ValueError, match="the text 5"):
        measures.windows(range(5), 1, 6)


def test_likeness_of_known_distributions():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    exact, found = p.log().expand(2, 3), torch.stack([q.log() + 3, p.log() - 1])
    same, other = torch.tensor([2, 0]), 0.5 * math.log(2) - 0.25 * math.log(2)
    assert likeness(exact, found, same) == pytest.approx((math.log(2), other / 2, 0.5))


def test_windows_are_compared_chunk_by_chunk_as_if_whole():
    generator = torch.Generator().manual_seed(0)
    exact, found = torch.randn(2, 2, 70, 11, generator=generator)
    rows = torch.randint(0, 11, (2, 91), generator=generator)
    cut, other_cut = (each.split([64, 6], dim=1) for each in (exact, found))
    whole = [likeness(exact[n], found[n], rows[n, 21:]) for n in range(2)]
    for one, other in zip(measures.compare(cut, other_cut, rows), whole, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_changes_are_of_pairs_and_errors_of_windows():
    exact = [Likeness(1.0, 0, 1), Likeness(3.0, 0, 1)]
    found = [Likeness(1.01, 0.2, 0.5), Likeness(3.03, 0.4, 1.0)]
    told = measures.summarise(exact, found)
    assert told["perplexity"] == pytest.approx(math.exp(2.02))
    assert told["change_percent"] == pytest.approx(100 * math.expm1(0.02))
    assert told["change_error"] == pytest.approx(math.exp(0.02))  # in per cent: of 1 and 3, 1
    assert (told["kl"], told["kl_error"]) == pytest.approx((0.3, 0.1))
    assert (told["agree"], told["agree_error"]) == pytest.approx((0.75, 0.25))
    assert math.isnan(mean([1.0])[1])


class Words:
    """A tokenizer of single characters."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_a_needle_lies_at_its_depth_and_is_asked_for_at_the_end():
    made = measures.needles(Words(), [ord(".")] * 5000, tokens=600, count=7)
    assert {len(needle.ids) for needle in made} == {600}
    for needle, depth in zip(made, measures.DEPTHS, strict=False):
        text = Words().decode(needle.ids)
        assert text.endswith(measures.QUESTION)
        said = measures.NEEDLE.format(needle.secret)
        assert text.count(said) == 1
        room = 600 - len(said) - 4 - len(measures.QUESTION)
        assert text.index(said) - 2 == round(depth * room)
    assert made[0].secret != made[5].secret
    assert measures.is_hit(Words(), torch.tensor([ord(c) for c in " 7391."]), "7391")
    assert not measures.is_hit(Words(), torch.tensor([ord(c) for c in " 7319."]), "7391")


class Counting:
    """A model whose next token is the one after the last, and once another."""

    def __init__(self, wrong: int | None) -> None:
        self.wrong = wrong

    def __call__(self, ids, past_key_values, logits_to_keep=0):
        ids = ids[:, -logits_to_keep:]
        following = (ids + 1) * (ids + 1 != (self.wrong or 0))
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 400).float())


@pytest.mark.parametrize(("wrong", "places"), [
    (None, [None, None]), (5, [0, None]), (6, [1, None]), (70, [65, 10]), (259, [None, 199]),
    (204, [199, 144]),
])  # fmt: skip
def test_where_a_greedy_reply_differs(wrong, places):
    prompts = torch.tensor([[3, 4], [58, 59]])
    reply = measures.greedy(Counting(None), None, prompts, 200)
    assert reply[:, -1].tolist() == [204, 259]
    assert measures.diverges(Counting(wrong), None, prompts, reply) == places


def test_bits_of_peers_count_scales_as_16_bits():
    codes = torch.zeros(1536, 64, dtype=torch.uint8)
    scales = torch.zeros(3072, 1)
    hqq = (codes, {"scale": scales, "zero": scales, "shape": (1, 3, 1024, 64)})
    assert quality_systems.coded_bits(hqq) == (1536 * 64 * 8 + 2 * 3072 * 16, 3 * 1024 * 64)
    layer = SimpleNamespace(_quantized_keys=hqq, _quantized_values=hqq, residual_length=129)
    bits = quality_systems.peer_bits(SimpleNamespace(layers=[layer]))
    assert (bits["page"], bits["exact tokens"]) == (4.5, 64)
    assert bits["1280 tokens"] == pytest.approx((4.5 * 1216 + 16 * 64) / 1280)
    fp8 = (codes.to(torch.float8_e4m3fn), torch.ones(()))
    assert quality_systems.coded_bits(fp8) == (1536 * 64 * 8 + 16, 1536 * 64)


def test_a_peer_that_is_missing_says_so(monkeypatch):
    monkeypatch.setitem(quality_systems.PACKAGES, "hqq", "no_such_package.at_all")
    assert "no_such_package.at_all is not installed" in str(quality_systems.peer(None, "hqq-4"))
