"""The cache of encodings: the same vectors, computed once, whoever asks and whatever happens to the file."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from router_core.encoder.base import Block
from router_core.encoder.cache import CHUNK, CachedBackbone, content_key
from router_core.encoder.registry import load_backbone
from router_core.encoder.surface import SurfaceBackbone
from router_core.errors import EncoderError

TEXTS = [("What is 2 + 2?", "4"), ("", ""), ("Grüße", "naïve café \ud800"), ("def f():", "    return 1\n")]


class Counting:
    """A backbone that counts what it is asked, with a bias that stands for its weights."""

    spec, dim, blocks = "counting", 3, (Block(3, dense=True),)

    def __init__(self, bias: float = 0.0, identity: str | None = None) -> None:
        self.bias = bias
        self.asked: list[tuple[str, str]] = []
        if identity is not None:
            self.identity = identity

    def embed(self, conversations: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        self.asked += conversations
        rows = [
            (len(prompt) + self.bias, len(response) / 3, 1 / (1 + len(prompt))) for prompt, response in conversations
        ]
        return np.array(rows, dtype=np.float32).reshape(-1, 3)


def test_vectors_are_the_backbones_own_bit_for_bit(tmp_path: Path) -> None:
    plain, cached = SurfaceBackbone(), CachedBackbone(SurfaceBackbone(), tmp_path)
    texts = [text for text in TEXTS if "\ud800" not in text[1]]
    for _ in range(2):
        np.testing.assert_array_equal(cached.embed(texts), plain.embed(texts))
    assert (cached.spec, cached.dim, cached.blocks) == (plain.spec, plain.dim, plain.blocks)


def test_nothing_is_embedded_twice_not_even_by_the_next_process(tmp_path: Path) -> None:
    inner = Counting(identity="w")
    first = CachedBackbone(inner, tmp_path).embed([*TEXTS, *TEXTS])
    assert sorted(inner.asked) == sorted(TEXTS)
    later = Counting(identity="w")
    np.testing.assert_array_equal(CachedBackbone(later, tmp_path).embed(TEXTS[::-1]), first[:4][::-1])
    assert later.asked == []
    more = CachedBackbone(later, tmp_path).embed([("new", "one"), TEXTS[0]])
    assert later.asked == [("new", "one")]
    np.testing.assert_array_equal(more[1], first[0])


def test_no_text_gives_no_row(tmp_path: Path) -> None:
    assert CachedBackbone(Counting(identity="w"), tmp_path).embed([]).shape == (0, 3)


def test_other_weights_have_another_file(tmp_path: Path) -> None:
    one = CachedBackbone(Counting(), tmp_path)
    other = CachedBackbone(Counting(bias=1.0), tmp_path)
    assert one.path != other.path
    assert one.embed(TEXTS)[0, 0] != other.embed(TEXTS)[0, 0]


def test_the_border_between_prompt_and_response_counts() -> None:
    assert len({content_key("ab", "c"), content_key("a", "bc"), content_key("", "abc"), content_key("abc", "")}) == 4


@pytest.mark.parametrize("damage", ["head", "middle", "truncated", "text"])
def test_a_damaged_file_is_put_aside_and_made_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Counting(identity="w")
    cached = CachedBackbone(inner, tmp_path)
    texts = [(f"prompt {i}", "x" * i) for i in range(CHUNK * 3)]
    expected = cached.embed(texts)
    content = bytearray(cached.path.read_bytes())
    if damage == "head":
        content[:100] = b"\xff" * 100
    elif damage == "middle":
        content[4096:] = b"\xff" * (len(content) - 4096)
    elif damage == "truncated":
        del content[5000:]
    else:
        content = bytearray(b"not a database at all\n" * 50)
    cached.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(cached.embed(texts), expected)
    assert "put aside" in caplog.text
    assert cached.path.with_suffix(".corrupt").exists()
    asked = len(inner.asked)
    np.testing.assert_array_equal(cached.embed(texts), expected)
    assert len(inner.asked) == asked, "the new file holds everything again"


def test_a_row_whose_check_sum_is_wrong_is_computed_again(tmp_path: Path) -> None:
    inner = Counting(identity="w")
    cached = CachedBackbone(inner, tmp_path)
    expected = cached.embed(TEXTS)
    with sqlite3.connect(cached.path) as database:
        database.execute("UPDATE encodings SET vector = zeroblob(12) WHERE key = ?", (content_key(*TEXTS[0]),))
        database.execute("UPDATE encodings SET vector = zeroblob(4) WHERE key = ?", (content_key(*TEXTS[1]),))
    database.close()
    inner.asked.clear()
    np.testing.assert_array_equal(cached.embed(TEXTS), expected)
    assert sorted(inner.asked) == sorted(TEXTS[:2])
    inner.asked.clear()
    cached.embed(TEXTS)
    assert inner.asked == []


def test_the_oldest_rows_make_room(tmp_path: Path) -> None:
    inner = Counting(identity="w")
    cached = CachedBackbone(inner, tmp_path, max_bytes=12 * 10)
    for i in range(25):
        cached.embed([(str(i), "")])
    assert len(cached) == 10
    inner.asked.clear()
    cached.embed([(str(i), "") for i in range(15, 25)])
    assert inner.asked == []
    with pytest.raises(EncoderError, match="max_bytes = 11"):
        CachedBackbone(inner, tmp_path, max_bytes=11)


def test_more_texts_at_once_than_the_file_may_hold_are_all_answered(tmp_path: Path) -> None:
    cached = CachedBackbone(Counting(identity="w"), tmp_path, max_bytes=12 * 10)
    texts = [(str(i), "y" * i) for i in range(200)]
    np.testing.assert_array_equal(cached.embed(texts), Counting().embed(texts))
    assert len(cached) == 10


def test_many_writers_of_one_file_agree(tmp_path: Path) -> None:
    texts = [(f"p{i}", "r" * (i % 7)) for i in range(150)]
    start = threading.Barrier(6)

    def work(seed: int) -> NDArray[np.float32]:
        cached = CachedBackbone(Counting(identity="w"), tmp_path)
        order = np.random.default_rng(seed).permutation(len(texts))
        start.wait()
        out = np.empty((len(texts), 3), np.float32)
        for part in np.array_split(order, 10):
            out[part] = cached.embed([texts[i] for i in part])
        return out

    with ThreadPoolExecutor(6) as pool:
        for result in pool.map(work, range(6)):
            np.testing.assert_array_equal(result, Counting().embed(texts))
    assert len(CachedBackbone(Counting(identity="w"), tmp_path)) == len(texts)


def test_many_first_writers_make_one_file(tmp_path: Path) -> None:
    """SQLite refuses at once, without waiting, when two connections change one file to WAL."""
    for i in range(40):
        start = threading.Barrier(8)

        def work(seed: int, directory: Path = tmp_path / str(i), start: threading.Barrier = start) -> None:
            cached = CachedBackbone(Counting(identity="w"), directory)
            start.wait()
            cached.embed([(f"p{seed}", "r"), ("p", "r")])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        cached = CachedBackbone(Counting(identity="w"), tmp_path / str(i))
        assert len(cached) == 9
        assert list(cached.path.parent.glob("*")) == [cached.path]


def test_an_interrupted_run_keeps_the_chunks_that_were_done(tmp_path: Path) -> None:
    def stop_at_two_chunks(done: int, of: int) -> None:
        if done >= 2 * CHUNK:
            raise KeyboardInterrupt

    texts = [("p", "r" * i) for i in range(5 * CHUNK)]
    with pytest.raises(KeyboardInterrupt):
        CachedBackbone(Counting(identity="w"), tmp_path, progress=stop_at_two_chunks).embed(texts)
    again = Counting(identity="w")
    CachedBackbone(again, tmp_path).embed(texts)
    assert len(again.asked) == 3 * CHUNK


def test_a_vector_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    cached = CachedBackbone(Counting(bias=float("nan"), identity="w"), tmp_path)
    assert np.isnan(cached.embed(TEXTS)).any()
    assert len(cached) == 0


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EncoderError, match="cannot be made"):
        CachedBackbone(Counting(identity="w"), tmp_path / "file")
    cached = CachedBackbone(Counting(identity="w"), tmp_path / "cache")
    cached.path.mkdir()
    with pytest.raises(EncoderError, match="work without the cache"):
        cached.embed(TEXTS)


def test_the_registry_caches_transformers_and_leaves_the_quick_ones_alone(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.support.transformers_dirs import save_transformer

    spec = f"torch:{save_transformer(tmp_path / 'model', 'bert')}"
    both = load_backbone(f"surface+{spec}", cache=tmp_path / "cache")
    vectors = both.embed(TEXTS[:2])
    files = list((tmp_path / "cache").glob("*.sqlite"))
    assert len(files) == 1
    np.testing.assert_array_equal(load_backbone(f"surface+{spec}", cache=tmp_path / "cache").embed(TEXTS[:2]), vectors)
    load_backbone(f"{spec}@bf16", cache=tmp_path / "cache").embed(TEXTS[:2])
    assert len(list((tmp_path / "cache").glob("*.sqlite"))) == 2, "another precision, other vectors"
    load_backbone("surface", cache=tmp_path / "none").embed(TEXTS[:1])
    assert not (tmp_path / "none").exists()
