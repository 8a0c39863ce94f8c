"""Real text: nothing is lost, nothing leaks from the held-out documents, and code is not prose."""

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mechgrok import store
from mechgrok.errors import ConfigError
from mechgrok.store import cached_json
from mechgrok.task_config import TextConfig
from mechgrok.tasks import documents, text
from mechgrok.tasks.documents import Document, held_out_keys, rows_of, without_copies
from mechgrok.tasks.next_token import next_token_examples
from mechgrok.tasks.tokenizer import bos_id, encode, parse_tokenizer, special_ids, token_names, train_tokenizer
from mechgrok.types import Examples, Split

BOS = "<|endoftext|>"
SOME_TEXT = ["The quick brown fox jumps over the lazy dog. " * 20, "def fox(dog):\n    return dog - 1\n" * 20]
TOKENIZER = train_tokenizer(SOME_TEXT, 300, BOS)
SETTINGS = {
    "name": "text", "n_ctx": 16, "n_train": 40, "n_test": 10, "test_fraction": 0.25, "vocabulary": 300,
    "sources": ("code", "prose"), "mixture": (0.5, 0.5),
}  # fmt: skip


def config(**changes: object) -> TextConfig:
    return TextConfig.model_validate(SETTINGS | changes)


def of_path(path: Path, **changes: object) -> TextConfig:
    return config(**({"sources": (str(path),), "mixture": (1.0,)} | changes))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHGROK_CACHE", str(path))
        yield path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MECHGROK_CACHE", str(tmp_path / "own cache"))
    return tmp_path / "own cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty documents, each of a letter of its own."""
    path = tmp_path / "letters"
    (path / "deeper").mkdir(parents=True)
    for i in range(20):
        words = " ".join(chr(ord("a") + i) * (1 + j % 5) for j in range(400))
        (path / ("deeper" if i % 2 else "") / f"{i}.txt").write_text(words)
    return path


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    """Code and prose of five packages of the standard library."""
    root, some = Path(sysconfig.get_path("stdlib")), tmp_path_factory.mktemp("library")
    for name in ("asyncio", "email", "json", "unittest", "pydoc_data"):
        (some / name).mkdir()
        for file in (root / name).glob("*.py"):
            (some / name / file.name).write_bytes(file.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda _: str(some))
        yield text.make_split(config(n_ctx=64, n_train=600, n_test=100, vocabulary=512), 0)


def letters(split: Split, examples: Examples) -> set[str]:
    """The letters that the rows spell, by the names of their tokens."""
    return {c for i in examples.tokens[:, 1:].unique().tolist() if i for c in split.labels[i] if "a" <= c <= "z"}


# ---- tokenizer


@given(st.text())
def test_decoding_gives_every_text_back(written: str) -> None:
    [ids] = encode(TOKENIZER, [written])
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == written
    assert 0 not in ids


def test_a_text_that_spells_the_beginning_of_a_row_is_text() -> None:
    again = parse_tokenizer(TOKENIZER.to_str(), "again")
    for tokenizer in (TOKENIZER, again):
        assert bos_id(tokenizer, BOS) == 0 and special_ids(tokenizer) == {0}
        [ids] = encode(tokenizer, [f"a{BOS}b"])
        assert 0 not in ids and tokenizer.decode(ids) == f"a{BOS}b"


def test_merges_are_learned_and_every_id_has_a_name_of_its_own() -> None:
    names = token_names(TOKENIZER)
    assert len(names) == len(set(names)) == 300
    assert names[0] == BOS and "Ġfox" in names
    assert len(encode(TOKENIZER, [SOME_TEXT[0]])[0]) < len(SOME_TEXT[0]) / 3
    assert all(name.isprintable() for name in names)


def test_training_gives_the_same_tokenizer_with_and_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [file.read_text() for file in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))]
    made = []
    for threads in ("true", "false", "true"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
        made.append(train_tokenizer(texts, 600, BOS).to_str())
    assert made[0] == made[1] == made[2]
    assert made[0] != train_tokenizer(texts[1:], 600, BOS).to_str()


def test_a_vocabulary_that_the_text_does_not_allow_is_refused_with_the_one_that_it_does(folder: Path) -> None:
    with pytest.raises(ConfigError, match="more than the text allows, which gives ([0-9]+) tokens") as error:
        text.make_split(of_path(folder, vocabulary=5000), 0)
    allowed = int(str(error.value).split("gives ")[1].split()[0])
    assert text.make_split(of_path(folder, vocabulary=allowed), 0).n_classes == allowed


# ---- rows


def test_documents_are_joined_and_cut_and_the_rest_is_dropped() -> None:
    rows = rows_of([[1, 2, 3], [4, 5], [6, 7]], bos=0, n_ctx=5)
    assert rows.tolist() == [[0, 1, 2, 3, 0], [0, 4, 5, 0, 6]]
    examples = next_token_examples(rows)
    assert examples.targets.tolist() == [[1, 2, 3, 0, 0], [4, 5, 0, 6, 0]]
    assert examples.weights.tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0]] * 2
    assert rows_of([], 0, 5).shape == (0, 5)


def test_a_split_has_the_rows_that_were_asked_for(library: Split) -> None:
    for examples, n in ((library.train, 600), (library.test, 100), *((e, 100) for e in library.distributions.values())):
        assert examples.tokens.shape == (n, 64)
        assert (examples.tokens[:, 0] == library.bos).all()
        assert torch.equal(examples.targets[:, :-1], examples.tokens[:, 1:])
        assert torch.equal(examples.weights[0], torch.tensor([1.0] * 63 + [0.0]))
        assert examples.tokens.min() >= 0 and examples.tokens.max() < library.n_classes
    assert list(library.distributions) == ["code", "prose"]
    assert library.n_classes == len(library.labels) == 512
    assert library.bos == 0 and library.plain == tuple(range(1, 512))


def test_the_split_depends_on_the_seed_alone(folder: Path) -> None:
    first, again, other = (text.make_split(of_path(folder), seed) for seed in (3, 3, 4))
    assert torch.equal(first.train.tokens, again.train.tokens) and torch.equal(first.test.tokens, again.test.tokens)
    assert letters(first, first.test) != letters(other, other.test)
    assert first.labels == other.labels  # the tokenizer does not depend on it


def test_the_mixture_is_as_stated(folder: Path, tmp_path: Path) -> None:
    digits = tmp_path / "digits.txt"
    digits.write_text("".join(f"{i * i} {i}\n" for i in range(3000)))
    sources = (str(folder), str(digits))
    split = text.make_split(config(sources=sources, mixture=(0.3, 0.7), n_train=51), 0)
    of_digits = [not any("a" <= c <= "z" for i in row[1:] if i for c in split.labels[i]) for row in split.train.tokens]
    assert sum(of_digits[:25]) not in (0, 25)  # in random order
    assert sum(of_digits) == 51 - round(0.3 * 51)
    alone = text.make_split(config(sources=sources, mixture=(0.0, 1.0)), 0)
    assert not letters(alone, alone.train) and letters(alone, alone.distributions["letters"])


# ---- no leak


@pytest.mark.parametrize("side", ["test", "train"])
def test_no_document_is_on_two_sides(folder: Path, side: str) -> None:
    split = text.make_split(of_path(folder, distributions_from=side, n_train=300, n_test=100), 0)
    train, test = letters(split, split.train), letters(split, split.test)
    assert train.isdisjoint(test) and len(train) == 15 and len(test) == 5
    assert letters(split, split.distributions["letters"]) <= (test if side == "test" else train)
    rows = {tuple(row) for row in split.distributions["letters"].tokens.tolist()}
    assert rows <= {tuple(row) for row in getattr(split, side).tokens.tolist()}


def test_copies_of_a_document_would_leak_and_are_dropped() -> None:
    papers = [Document("a", "one"), Document("b", "two"), Document("c", "one"), Document("d", " \n")]
    kept = without_copies({"first": papers, "second": [Document("e", "two"), Document("f", "three")]})
    assert {name: [d.key for d in kept[name]] for name in kept} == {"first": ["a", "b"], "second": ["f"]}


def test_a_modules_code_and_docstrings_are_on_one_side() -> None:
    code = [Document(f"{i}.py", f"code {i}") for i in range(30)]
    prose = [Document(f"{i}.py", f"prose {i}") for i in range(30)] + [Document(f"topic {i}", "") for i in range(10)]
    held_out = held_out_keys({"code": code, "prose": prose}, 0.2, 0)
    assert len(held_out) == 6 + 2
    assert sum(key.startswith("topic") for key in held_out) == 2
    assert held_out != held_out_keys({"code": code, "prose": prose}, 0.2, 1)
    assert len(held_out_keys({"code": code[:2]}, 0.01, 0)) == len(held_out_keys({"code": code[:2]}, 0.99, 0)) == 1


# ---- code and prose


def test_docstrings_are_parted_from_code() -> None:
    method = '    """First.\n\n      Second.\n    Third.\n    """\n    x = "kept"  # é\n'
    source = f'"""Of é."""\nimport os\n\nclass A:\n{method}\ndef f(): "on a line"\n'
    code, docstrings = text.code_and_docstrings(source)
    assert code == 'import os\n\nclass A:\n    x = "kept"  # é\n\ndef f(): "on a line"\n'
    assert docstrings == "Of é.\n\nFirst.\n\n  Second.\nThird.\n\non a line"


def test_sources_are_read_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data/topics.py").write_text("topics = {'if': 'The if statement.'}\nraise SystemExit\n")
    (tmp_path / "harmful.py").write_text('"""Harm."""\nraise SystemExit\n')
    (tmp_path / "broken.py").write_text("def\n")
    (tmp_path / "_sysconfigdata_here.py").write_text('build = "/home/somebody"\n')
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/other.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    both = text.standard_library()
    assert both["code"] == [Document("harmful.py", "raise SystemExit\n")]
    assert both["prose"] == [Document("harmful.py", "Harm."), Document("topic if", "The if statement.")]
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "zipped"))
    with pytest.raises(ConfigError, match="keeps no sources of its standard library"):
        text.standard_library()


def told_apart(first: torch.Tensor, second: torch.Tensor, held: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The share of held-out rows that the likelier of two unigram models, of `first` and `second`, calls right."""
    counts = [np.bincount(rows[:, 1:].flatten(), minlength=512) + 1.0 for rows in (first, second)]
    ratio = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
    right = [ratio[rows[:, 1:]].sum(1) > 0 for rows in held]
    return float(np.concatenate([right[0], ~right[1]]).mean())


def test_held_out_code_and_prose_are_told_apart_by_single_tokens_and_halves_of_code_are_not(library: Split) -> None:
    trained = text.make_split(config(n_ctx=64, n_train=10, n_test=200, vocabulary=512, distributions_from="train"), 0)
    code, prose = (trained.distributions[name].tokens for name in ("code", "prose"))
    held = (library.distributions["code"].tokens, library.distributions["prose"].tokens)
    assert told_apart(code, prose, held) > 0.9
    assert 0.3 < told_apart(code[::2], code[1::2], (held[0][::2], held[0][1::2])) < 0.7


# ---- cache


def test_the_cache_gives_the_same_bits_and_makes_nothing_twice(
    folder: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    monkeypatch.setattr(documents, "encode", lambda *a: calls.update(["encode"]) or encode(*a))
    cold = text.make_split(of_path(folder), 0)
    warm = text.make_split(of_path(folder, n_train=20), 0)
    assert calls["encode"] == 1
    assert torch.equal(warm.test.tokens, cold.test.tokens) and warm.labels == cold.labels
    [file] = empty_cache.iterdir()
    for damage in (file.read_bytes()[:-7], file.read_bytes().replace(b"tokens", b"tokans"), b""):
        file.write_bytes(damage)
        again = text.make_split(of_path(folder), 0)
        assert torch.equal(again.train.tokens, cold.train.tokens)
        assert [path.name for path in empty_cache.iterdir()] == [file.name]
    assert calls["encode"] == 4
    (folder / "0.txt").write_text("the text has changed " * 40)
    assert text.make_split(of_path(folder), 0).labels != cold.labels


def test_cached_values_are_json_named_by_digest_and_private(empty_cache: Path) -> None:
    assert cached_json(["../../etc", 1], lambda: (1, "é")) == [1, "é"] == cached_json(["../../etc", 1], lambda: None)
    assert cached_json(["../../etc", 2], lambda: 2) == 2
    names = [path.name for path in empty_cache.iterdir()]
    assert len(names) == 2 and all(len(name) == 64 + len(".json") and int(name[:64], 16) for name in names)
    assert os.name == "nt" or empty_cache.stat().st_mode & 0o077 == 0
    assert os.name == "nt" or all(path.stat().st_mode & 0o077 == 0 for path in empty_cache.iterdir())


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MECHGROK_CACHE", str(tmp_path / "file" / "cache"))
    made = iter([1, 2])
    assert [cached_json("key", lambda: next(made)) for _ in range(2)] == [1, 2]
    monkeypatch.delenv("MECHGROK_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.cache_folder() == tmp_path / "home" / ".cache" / "mechgrok"


def test_a_mistake_is_not_cached(empty_cache: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        cached_json("key", lambda: 1 // 0)
    assert cached_json("key", lambda: 1) == 1


# ---- paths


def test_a_single_file_is_cut_into_documents_that_hold_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "one long.file.txt"
    file.write_text("".join(f"line {i} of é\r\n" for i in range(4000)), newline="")
    pieces = text.read_path(str(file))
    assert "".join(piece.text for piece in pieces) == file.read_bytes().decode()
    assert 5 < len(pieces) == len({piece.key for piece in pieces})
    assert all(piece.text.endswith("\r\n") for piece in pieces)
    assert list(text.make_split(of_path(file), 0).distributions) == ["one-long.file"]


def test_of_too_much_text_a_part_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = text.read_path(str(folder))
    assert len(every) == 20
    monkeypatch.setattr(text, "MOST", 2000)
    some = text.read_path(str(folder))
    assert 1 < len(some) < 10 and set(some) < set(every) and some == text.read_path(str(folder))


def test_a_tokenizer_learns_from_a_part_of_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {name: [Document(f"{name}{i}", f"{name} {i} ".zfill(10)) for i in range(50)] for name in ("a", "b")}
    monkeypatch.setattr(documents, "SAMPLE", 100)
    sample = list(documents._sample(sources))
    assert len(sample) == 20 and sum("a" in one for one in sample) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is neither a file nor a folder; correct the path"),
        ({}, "is a folder without files"),
        ({".hidden": b"text"}, "is a folder without files"),
        ({"a.txt": b"text", "b.png": b"\x89PNG\r\n"}, r"b\.png is no UTF-8 text \(byte 0 is 0x89\)"),
        ({"a.txt": b"text", "b.bin": b"t\0ext"}, r"b\.bin is no text, as it holds zero bytes"),
        ({"a.txt": b"one document"}, "holds 1 documents, and both sides of the split need one"),
        ({"a.txt": b"   ", "b.txt": b""}, "holds 0 documents"),
        ({"a.txt": b"abc " * 90, "b.txt": b"abd " * 90}, "rows of 16 tokens for train, and 40 are asked for; lower"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, content: dict[str, bytes] | None, message: str) -> None:
    path = tmp_path / "some"
    for name, data in (content or {}).items():
        path.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
    if content == {}:
        path.mkdir()
    with pytest.raises(ConfigError, match=message) as error:
        text.make_split(of_path(path, vocabulary=258), 0)
    assert "some" in str(error.value)


def test_an_unreadable_file_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*\.txt \(Permission denied\); make it readable"):
        text.read_path(str(folder))


# ---- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": (1.0,)}, "mixture has 1 shares for 2 sources"),
        ({"sources": (), "mixture": ()}, "give at least one source"),
        ({"mixture": (0.5, 0.6)}, "must add up to 1, got 1.1"),
        ({"mixture": (1.5, -0.5)}, "greater than or equal to 0"),
        ({"sources": ("a/x.txt", "b/x.txt")}, "different names, got x, x"),
        ({"sources": ("code", "./code")}, "different names, got code, code"),
        ({"vocabulary": 200}, "vocabulary must be at least 257"),
        ({"vocabulary": None}, "give either vocabulary, to train a tokenizer, or tokenizer"),
        ({"tokenizer": "tokenizer.json"}, "give either vocabulary"),
        ({"n_ctx": 1}, "n_ctx"),
        ({"n_ctx": 16.0}, "n_ctx"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"distributions_from": "both"}, "distributions_from"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_bad_setting_is_refused_with_one_sentence(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        config(**changes)
    assert message in str(error.value)
    assert error.value.error_count() == 1


def test_paths_mean_the_same_from_every_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/anna")
    found = config(sources=("code", "../x.txt", "~/y"), mixture=(0.5, 0.25, 0.25))
    assert found.sources == ("code", str(tmp_path.parent / "x.txt"), "/home/anna/y")
    assert found.names == ("code", "x", "y")
    assert TextConfig.model_validate(found.model_dump()) == found
