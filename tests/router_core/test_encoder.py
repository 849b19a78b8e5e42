"""Text to context: invariance to order, batch and thread, exact two-branch arithmetic, clear refusals."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.encoder.base import Backbone, Block, ConcatBackbone
from router_core.encoder.fuse import Fuse, Kernel, PairEncoder, two_branch
from router_core.encoder.registry import load_backbone
from router_core.encoder.relation import RelationBackbone
from router_core.encoder.surface import FEATURES, LAYOUT, SurfaceBackbone, layout
from router_core.errors import EncoderError, ShapeMismatchError
from router_core.records import Instance

TEXTS = [
    "def f(x):\n    return x + 1",
    "Paris is the capital of France.",
    "∫ x² dx = x³/3",
    "",
    "word " * 400,
    "A\tB\n",
]


@pytest.fixture(scope="module")
def static() -> Backbone:
    pytest.importorskip("tokenizers")
    try:
        return load_backbone("static")
    except EncoderError as error:
        pytest.skip(str(error))


def test_for_two_responses_the_second_branch_is_the_absolute_difference() -> None:
    h = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    z = two_branch(h, [2, 2, 2])
    np.testing.assert_allclose(z[:, :5], (h[0::2] + h[1::2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(z[:, 5:], np.abs(h[0::2] - h[1::2]), rtol=1e-6)


def test_groups_of_any_size_agree_with_the_definition() -> None:
    h = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    z = two_branch(h, [3, 5])
    for row, part in zip(z, (h[:3], h[3:]), strict=True):
        mean = part.mean(axis=0)
        np.testing.assert_allclose(row[:3], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(row[3:], 2 * np.abs(part - mean).mean(axis=0), rtol=1e-5, atol=1e-6)


def test_the_deviation_of_a_single_response_is_unknown() -> None:
    z = two_branch(np.ones((3, 2), dtype=np.float32), [1, 2])
    np.testing.assert_array_equal(z, [[1, 1, np.nan, np.nan], [1, 1, 0, 0]])


def test_a_single_response_lies_where_a_usual_pair_would() -> None:
    rng = np.random.default_rng(0)
    shift, projection = rng.standard_normal(6).astype(np.float32), rng.standard_normal((6, 4)).astype(np.float32)
    fuse = replace(Fuse.identity(3, 4), shift=shift, projection=projection)
    z = two_branch(rng.standard_normal((3, 3)).astype(np.float32), [1, 2])
    usual = np.concatenate([z[:1, :3], shift[None, 3:]], axis=1)
    np.testing.assert_array_equal(fuse.apply(z), fuse.apply(np.concatenate([usual, z[1:]])))


@pytest.mark.parametrize("sizes", [[2], [0, 3], [2, 2], [-1, 4]])
def test_sizes_that_do_not_cut_the_rows_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ShapeMismatchError):
        two_branch(np.zeros((3, 2), dtype=np.float32), sizes)


def test_no_groups_give_no_rows() -> None:
    assert two_branch(np.zeros((0, 3), dtype=np.float32), []).shape == (0, 6)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5), st.randoms())
def test_the_context_does_not_depend_on_the_order_of_responses(responses: list[str], random: object) -> None:
    backbone = SurfaceBackbone()
    encoder = PairEncoder(backbone, Fuse.identity(backbone.dim, 8))
    shuffled = list(responses)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    x = encoder.encode([Instance("p", tuple(responses)), Instance("p", tuple(shuffled))])
    np.testing.assert_allclose(x[0], x[1], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-5)


def test_a_batch_of_mixed_group_sizes_equals_one_by_one(static: Backbone) -> None:
    encoder = PairEncoder(static, Fuse.identity(static.dim))
    instances = [Instance("p", ("a b", "c")), Instance("q", ("x",)), Instance("p", ("1", "2 3", "four"))]
    batch = encoder.encode(instances)
    assert batch.dtype == np.float32
    assert batch.shape == (3, encoder.d)
    np.testing.assert_allclose(batch, np.concatenate([encoder.encode([one]) for one in instances]), atol=1e-6)
    assert encoder.encode([]).shape == (0, encoder.d)


def test_an_instance_without_response_is_named() -> None:
    backbone = SurfaceBackbone()
    with pytest.raises(EncoderError, match=r"instances\[1\]\.responses is empty"):
        PairEncoder(backbone, Fuse.identity(backbone.dim)).encode([Instance("p", ("a",)), Instance("p", ())])


def test_a_fuse_for_another_width_is_refused() -> None:
    with pytest.raises(EncoderError, match="train again"):
        PairEncoder(SurfaceBackbone(), Fuse.identity(7))


def test_a_backbone_that_gives_nan_is_refused() -> None:
    class Broken(SurfaceBackbone):
        def embed(self, conversations):  # type: ignore[no-untyped-def]
            return np.full((len(conversations), self.dim), np.nan, dtype=np.float32)

    with pytest.raises(EncoderError, match="NaN or infinity"):
        PairEncoder(Broken(), Fuse.identity(Broken().dim)).encode([Instance("p", ("a", "b"))])


def test_fuse_computes_its_equation_by_hand() -> None:
    fuse = Fuse(
        shift=np.array([1, 0], dtype=np.float32),
        projection=np.array([[1], [100]], dtype=np.float32),
        w1=np.array([[1]], dtype=np.float32),
        b1=np.array([0], dtype=np.float32),
        w2=np.array([[3, 0]], dtype=np.float32),
        b2=np.array([0, 1], dtype=np.float32),
    )
    h = np.tanh(0.5)
    expected = np.array([3 * h, 1]) / np.hypot(3 * h, 1)
    np.testing.assert_allclose(fuse.apply(np.array([[1.5, 0.0]], dtype=np.float32))[0], expected, rtol=1e-6)
    clipped = fuse.apply(np.array([[1.0, 9.0], [1.0, 90.0]], dtype=np.float32))
    np.testing.assert_array_equal(clipped[0], clipped[1])


def test_members_features_and_context_by_hand() -> None:
    one = np.ones((1, 1), dtype=np.float32)
    fuse = Fuse(
        shift=np.zeros(2, dtype=np.float32),
        projection=np.array([[1], [0]], dtype=np.float32),
        w1=np.array([[1, 2]], dtype=np.float32),
        b1=np.zeros(2, dtype=np.float32),
        w2=np.array([[1, 0], [0, 1]], dtype=np.float32),
        b2=np.array([0, 1, 0, 0], dtype=np.float32),
        rotation=np.eye(4, 3, dtype=np.float32),
        context=2 * one,
    )
    assert (fuse.members, fuse.features, fuse.d) == (2, 3, 5)
    x = fuse.apply(np.array([[0.5, 7.0]], dtype=np.float32))[0]
    h = np.tanh(0.5)
    # The first member is normalise([h, 1]), the second normalise([0, tanh 1]) = [0, 1]; the rotation drops the last.
    members = np.array([h, 1]) / np.hypot(h, 1)
    np.testing.assert_allclose(x[:3], [*members, 0.0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(x[3:], np.array([1, 1]) / np.sqrt(2), rtol=1e-6)
    far = fuse.apply(np.array([[50.0, 0.0]], dtype=np.float32))[0]
    np.testing.assert_allclose(far[3:], np.array([1, 3]) / np.sqrt(10), rtol=1e-6)


def test_what_a_kernel_says_stands_between_features_and_context() -> None:
    plain = replace(Fuse.identity(1, 2), context=np.eye(2, 1, dtype=np.float32))
    anchors = np.array([[0, 0], [3, 4]], dtype=np.float32)
    kernel = Kernel(np.ones(2, dtype=np.float32), anchors, np.array([[1, 0, 2], [0, 1, 0]], dtype=np.float32))
    fuse = replace(plain, projection=np.eye(2, dtype=np.float32), kernel=kernel)
    assert (fuse.learned, fuse.features, fuse.d) == (2, 5, 7)
    z = np.array([[3, 4], [0, 0]], dtype=np.float32)
    x = fuse.apply(z)
    near, far = 1.0, np.exp(-5.0)
    np.testing.assert_allclose(x[:, 2:5], [[far, near, 2 * far], [near, far, 2 * near]], rtol=1e-3)
    without = replace(fuse, kernel=None).apply(z)
    np.testing.assert_array_equal(x[:, [0, 1, 5, 6]], without)


def test_a_kernel_that_does_not_fit_is_named() -> None:
    kernel = Kernel(np.ones(3, dtype=np.float32), np.ones((4, 3), dtype=np.float32), np.ones((4, 2), dtype=np.float32))
    with pytest.raises(ShapeMismatchError, match="kernel reads 3 inputs"):
        replace(Fuse.identity(1, 2), kernel=kernel)
    with pytest.raises(ShapeMismatchError, match=r"\(L, p\)"):
        replace(kernel, anchors=np.ones((5, 3), dtype=np.float32))


def test_a_zero_vector_becomes_a_unit_vector_instead_of_nan() -> None:
    x = Fuse.identity(2, 3).apply(np.zeros((1, 4), dtype=np.float32))
    np.testing.assert_array_equal(x, [[1, 0, 0]])


def test_layers_that_do_not_fit_are_named() -> None:
    good = Fuse.identity(2, 3)
    with pytest.raises(ShapeMismatchError, match=r"fuse\.w1"):
        Fuse(good.shift, good.projection, np.zeros((4, 3), dtype=np.float32), good.b1, good.w2, good.b2)


def test_the_same_seed_gives_the_same_untrained_fuse() -> None:
    np.testing.assert_array_equal(Fuse.identity(4, 8).projection, Fuse.identity(4, 8).projection)
    assert (Fuse.identity(4, 8).projection != Fuse.identity(4, 8, seed=1).projection).any()


def test_surface_counts_by_hand() -> None:
    values = dict(zip(FEATURES, SurfaceBackbone().measure("Ab 12\nab;é").tolist(), strict=True))
    assert values["log characters"] == pytest.approx(np.log1p(10))
    assert values["log words"] == pytest.approx(np.log1p(3))
    assert values["log lines"] == pytest.approx(np.log1p(1))
    assert values["share of digits"] == pytest.approx(0.2)
    assert values["share of capitals"] == pytest.approx(0.1)
    assert values["share of code punctuation"] == pytest.approx(0.1)
    assert values["share of white space"] == pytest.approx(0.2)
    assert values["is ASCII"] == 0
    assert values["distinct words per word"] == 1


@given(st.text(max_size=200))
def test_surface_counts_are_finite_for_any_text(text: str) -> None:
    assert np.isfinite(SurfaceBackbone().measure(text)).all()


def test_static_vectors_do_not_depend_on_what_was_read_before(static: Backbone) -> None:
    conversations = [(p, r) for p in TEXTS for r in TEXTS]
    fresh = load_backbone("static")
    np.testing.assert_array_equal(static.embed(conversations), fresh.embed(conversations[::-1])[::-1])
    np.testing.assert_array_equal(static.embed(conversations), static.embed(conversations))


def test_static_vectors_are_the_same_when_the_word_cache_is_full() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from router_core.encoder.static import WordVectors

    vocabulary = {letter: i for i, letter in enumerate("abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    embedding = np.eye(8, dtype=np.float32)
    small, large = WordVectors(tokenizer, embedding, capacity=2), WordVectors(tokenizer, embedding, capacity=100)
    for text in ("ab cd ef ab", "gh ab ab", "ef cd", ""):
        np.testing.assert_array_equal(small.mean(text), large.mean(text))
    np.testing.assert_allclose(large.mean("ab ab cc"), [1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0, 0], rtol=1e-6)


def test_many_threads_read_the_same_vectors_as_one(static: Backbone) -> None:
    words = [f"alpha{chr(97 + i % 26)}{chr(97 + i // 26)} beta{chr(97 + i % 7)}" for i in range(400)]
    expected = load_backbone("static").embed([("p", text) for text in words])
    cold = load_backbone("static")
    with ThreadPoolExecutor(8) as threads:
        rows = list(threads.map(lambda text: cold.embed([("p", text)])[0], words * 3))
    np.testing.assert_array_equal(rows, np.concatenate([expected] * 3))


def test_like_texts_are_nearer_than_unlike_ones(static: Backbone) -> None:
    words = load_backbone("words")
    algebra, calculus = "solve the equation and simplify the fraction", "compute the integral of the polynomial"
    h = words.embed([("", algebra), ("", calculus), ("", "bake the cake with flour and sugar")])
    unit = h[:, words.dim // 2 :] / np.linalg.norm(h[:, words.dim // 2 :], axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2]


def test_blocks_cover_the_columns(static: Backbone) -> None:
    assert sum(block.width for block in static.blocks) == static.dim == static.embed([("p", "r")]).shape[1]
    assert static.embed([]).shape == (0, static.dim)
    assert Block(28, dense=False) in static.blocks


def test_specs_can_be_joined() -> None:
    joined = load_backbone("surface+surface")
    single = SurfaceBackbone().embed([("p", "Hi")])
    assert joined.spec == "surface+surface"
    np.testing.assert_array_equal(joined.embed([("p", "Hi")]), np.concatenate([single, single], axis=1))
    with pytest.raises(EncoderError, match="at least one"):
        ConcatBackbone([])


@pytest.mark.parametrize("spec", ["", "bert", "static+nope", "torch"])
def test_an_unknown_spec_lists_the_choices(spec: str) -> None:
    with pytest.raises(EncoderError, match="choose one of static, surface, relation, words, minilm"):
        load_backbone(spec)


def test_a_missing_package_says_what_to_install() -> None:
    from router_core.encoder.static import package_directory

    with pytest.raises(EncoderError, match="'no_such_package' is not installed; pip install that"):
        package_directory("no_such_package", "pip install that")


def test_the_static_encoder_loads_neither_torch_nor_the_wordllama_package(static: Backbone) -> None:
    program = (
        "import sys; from router_core.encoder.registry import load_backbone;"
        "load_backbone('static').embed([('p','r')]);"
        "sys.exit(str([m for m in ('torch', 'transformers', 'wordllama', 'requests') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr.strip() in ("", "[]"), done.stderr


def test_relation_by_hand() -> None:
    rows = RelationBackbone().embed(
        [("Name two big rivers", "Two BIG rivers: Rhine, Rhine"), ("", "word"), ("word", "")]
    )
    # Content words: name, rivers | rivers, rhine. Pairs: name two, two big, big rivers.
    np.testing.assert_allclose(rows[0], [1 / 2, 1 / 2, 2 / 3])
    assert not rows[1:].any()


def test_layout_by_hand() -> None:
    text = "Sorry, I cannot. My list:\n\n- **one**\n2) two me\n```\n"
    named = dict(zip(LAYOUT, layout(text), strict=True))
    assert named["log list items"] == pytest.approx(np.log(3))
    assert named["log bold marks"] == pytest.approx(np.log(3))
    assert named["first person per word"] == pytest.approx(2 / 11)
    assert (named["declines or apologises"], named["has a code block"]) == (1.0, 1.0)
    assert not any(layout("  "))
