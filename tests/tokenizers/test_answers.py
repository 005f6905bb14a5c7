"""Answers: round trips, a strict parser, a grammar that allows exactly what it takes, and what models write by it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from m4.inference.autoregressive import Autoregressive
from m4.inference.prompts import make_prompt
from m4.inference.sampler import Sampler, run_stage
from m4.model.encoder_decoder import Model
from m4.registry import from_json, to_json
from m4.tokens.modality import Modalities
from m4.tokens.tokenizer import Recipe, Tokenizer, load_tokenizer, save_tokenizer
from m4_tokenizers.modalities.answers import KINDS, AnswerRecipe, AnswerTokenizer, utf8_steps
from m4_tokenizers.modalities.text import EOS

GRID = np.indices((8, 8)).sum(axis=0) % 3 == 0
EXAMPLES = [
    {
        "answer": [
            {"concept": "red cube", "kind": "box", "target": np.array([0.1, 0.2, 0.5, 0.9], np.float32)},
            {"concept": "cone", "kind": "point", "target": np.array([0.25, 0.75], np.float32)},
        ]
    },
    {"answer": [{"concept": "red cone", "kind": "mask", "target": GRID}]},
    {"answer": [{"concept": "Löwe", "kind": "depth", "target": 3.5}]},
    {"boxes": {"bbox": np.array([[0, 0, 0.5, 1]], np.float32), "label": ["green cube"]}},
]
RECIPE: Recipe = AnswerRecipe(max_length=96)
TOKENIZER = RECIPE.fit(EXAMPLES, seed=3)
LAYOUT = TOKENIZER.layout
COORDINATE, DECLARATION = LAYOUT.first_coordinate, {k: LAYOUT.names.index(f"[D_{28 + i}]") for i, k in enumerate(KINDS)}


def restricted(**fields) -> AnswerTokenizer:
    recipe = dataclasses.replace(RECIPE, **fields)
    return AnswerTokenizer(recipe=recipe, text=TOKENIZER.text, card={})


def text(concept: str) -> list[int]:
    return TOKENIZER.text.encode_unbounded([concept])[0][:-1].tolist()


def v(axis: int, index: int) -> int:
    return LAYOUT.names.index(f"v{axis}={index}")


unit = st.floats(0, 1, width=32)
targets = {
    "box": st.tuples(unit, unit, unit, unit).map(
        lambda b: np.float32([*np.minimum(b[:2], b[2:]), *np.maximum(b[:2], b[2:])])
    ),
    "point": st.tuples(unit, unit).map(np.float32),
    "mask": st.lists(st.booleans(), min_size=64, max_size=64).map(lambda cells: np.array(cells).reshape(8, 8)),
    "depth": st.floats(0.5, 30),
}
concepts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
items = st.sampled_from(KINDS).flatmap(
    lambda kind: st.fixed_dictionaries({"concept": concepts, "kind": st.just(kind), "target": targets[kind]})
)


@settings(deadline=None, max_examples=200)
@given(st.lists(items, max_size=2))
def test_answers_come_back_within_half_a_bin(answer):
    (ids,) = restricted(max_length=512).encode([answer])
    parsed = TOKENIZER.parse(ids)
    assert [(i["concept"], i["kind"]) for i in parsed] == [(i["concept"], i["kind"]) for i in answer]
    for given_item, item in zip(answer, parsed, strict=True):
        if item["kind"] == "mask":
            np.testing.assert_array_equal(item["target"], given_item["target"])
        elif item["kind"] == "depth":
            assert abs(np.log(item["target"] / given_item["target"])) <= np.log(60) / 64 / 2 + 1e-9
        else:
            np.testing.assert_allclose(item["target"], given_item["target"], atol=0.5 / 64 + 1e-6)
    np.testing.assert_array_equal(restricted(max_length=512).encode([parsed])[0], ids)
    np.testing.assert_equal(TOKENIZER.decode([ids])[0], parsed)


def test_what_tokens_stand_for():
    first, second, third, fourth = TOKENIZER.encode([TOKENIZER.signal_of(e) for e in EXAMPLES])
    box = [DECLARATION["box"], v(0, 12), v(1, 6), v(2, 57), v(3, 32)]
    point = [DECLARATION["point"], v(0, 48), v(1, 16)]
    assert first.tolist() == [*text("red cube"), *box, *text("cone"), *point, EOS]
    assert [len(text(concept)) for concept in ("red cube", "green cone", "cone", "cube")] == [2, 2, 1, 4]
    halves = [int("".join(map(str, row[i : i + 4])), 2) for row in GRID.astype(int).tolist() for i in (0, 4)]
    assert second.tolist() == [*text("red cone"), DECLARATION["mask"], *(v(0, i) for i in halves), EOS]
    assert third.tolist() == [*text("Löwe"), DECLARATION["depth"], v(0, int(np.log(7) / np.log(60) * 64)), EOS]
    assert fourth.tolist() == [*text("green cube"), DECLARATION["box"], v(0, 0), v(1, 0), v(2, 63), v(3, 32), EOS]


def test_edges_of_bins():
    def bins(kind, target):
        (ids,) = TOKENIZER.encode([[{"concept": "a", "kind": kind, "target": target}]])
        return ((ids[len(text("a")) + 1 : -1] - COORDINATE) % 64).tolist()

    below = np.nextafter(np.float32(0.5), np.float32(0))
    assert bins("point", np.float32([0, 1])) == [63, 0]
    assert bins("point", np.float32([below, 0.5])) == [32, 31]
    near, far, ratio = RECIPE.near, RECIPE.far, 60 ** (1 / 64)
    for metres, index in ((1e-9, 0), (near, 0), (near * ratio * 0.999, 0), (near * ratio * 1.001, 1)):
        assert bins("depth", metres) == [index]
    assert bins("depth", far) == bins("depth", 1e9) == bins("depth", far / ratio * 1.001) == [63]
    assert bins("depth", far / ratio * 0.999) == [62]
    for size, num_bins, strip in ((8, 64, 4), (8, 256, 8), (7, 64, 1), (6, 64, 6), (9, 64, 3), (1, 2, 1)):
        recipe = AnswerRecipe(mask_size=size, num_bins=num_bins, vocab_size=2048, max_length=100)
        assert recipe.strip == strip and len(recipe.places("mask")) == size**2 // strip
        mask = np.random.default_rng(size).random((size, size)) < 0.5
        tokenizer = recipe.fit([], seed=0)
        (ids,) = tokenizer.encode([[{"concept": "獅子", "kind": "mask", "target": mask}]])
        np.testing.assert_array_equal(tokenizer.parse(ids)[0]["target"], mask)


def test_either_corner_of_a_box_may_come_first():
    ids = [*text("cube"), DECLARATION["box"], v(0, 60), v(1, 3), v(2, 9), v(3, 40), EOS]
    expected = (np.array([3, 9, 40, 60]) + 0.5) / 64
    np.testing.assert_allclose(TOKENIZER.parse(ids)[0]["target"], expected)


# ---- The strict parser ----------------------------------------------------------------------------------------------

CUBE = text("cube")
BOX = [*CUBE, DECLARATION["box"], v(0, 1), v(1, 2), v(2, 3), v(3, 4)]
BYTE = {b: LAYOUT.first_text + TOKENIZER._bytes.index(bytes([b])) for b in range(256)}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"the 0 tokens end too early; allowed here: text, \[EOS\]"),
        (BOX, r"the 9 tokens end too early; allowed here: text, \[EOS\]"),
        ([*BOX[:-2], EOS], r"token 7 is \[EOS\]; allowed here: v2=0 to v2=63, of a box"),
        (BOX[:-2], r"the 7 tokens end too early; allowed here: v2=0 to v2=63"),
        ([*BOX[:-2], v(3, 1), v(2, 1), EOS], r"token 7 is v3=1; allowed here: v2=0"),
        ([*BOX, EOS, EOS], r"token 10 is \[EOS\]; allowed here: nothing after \[EOS\]"),
        ([*BOX[4:], EOS], r"token 0 is \[D_28\]; allowed here: text, \[EOS\]"),
        ([*BOX, v(0, 1), EOS], r"token 9 is v0=1; allowed here: text, \[EOS\]"),
        ([*CUBE, EOS], r"token 4 is \[EOS\]; allowed here: more text, \[D_28\] \(box\), \[D_29\] \(point\)"),
        ([*CUBE, DECLARATION["box"] - 1, EOS], r"token 4 is \[D_27\]; allowed here: more text"),
        ([*CUBE, DECLARATION["mask"], v(0, 16)], r"token 5 is v0=16; allowed here: v0=0 to v0=15, of a mask"),
        ([*CUBE, DECLARATION["depth"], *CUBE, EOS], r"token 5 is b'c'; allowed here: v0=0 to v0=63, of a depth"),
        ([BYTE[0xE7], BYTE[0x8D], *BOX, EOS], r"tokens 0 to 5 spell b'\\xe7\\x8dcube'; allowed: UTF-8"),
        ([767, EOS], r"token 0 is the unused id 767; allowed here: text"),
        ([-1, EOS], r"token 0 is the unused id -1"),
        ([100_000, EOS], r"token 0 is the unused id 100000"),
    ],
)
def test_the_parser_tells_what_is_wrong(ids, message):
    with pytest.raises(ValueError, match=message):
        TOKENIZER.parse(np.array(ids, np.int64))


def test_decode_drops_what_is_broken():
    whole = TOKENIZER.parse([*BOX, EOS])
    for torn in (BOX[:-1], BOX[4:], [v(0, 3), 767, -4], [*CUBE, DECLARATION["mask"], v(0, 3)], [BYTE[0xE7]]):
        np.testing.assert_equal(TOKENIZER.decode([[*torn, *BOX]])[0], whole)
        np.testing.assert_equal(TOKENIZER.decode([[*BOX, *torn, EOS, *BOX]])[0], whole)
    assert restricted(kinds=("depth",)).decode([BOX])[0] == []


junk = st.integers(-2, 800) | st.integers(0, 80) | st.sampled_from([*BOX, *DECLARATION.values(), EOS])


@settings(deadline=None, max_examples=200)
@given(st.lists(junk, max_size=40))
def test_junk_decodes_to_whole_items_alone(ids):
    for item in TOKENIZER.decode([np.array(ids, np.int32)])[0]:
        np.testing.assert_equal(TOKENIZER.checked(item), item)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=6))
def test_bytes_are_followed_as_utf8(data):
    def valid(data):
        try:
            return bool(data.decode() or True)
        except UnicodeDecodeError:
            return False

    assert (utf8_steps(data)[0] == 0) == valid(data)


def test_every_short_sequence_of_bytes_is_followed_as_utf8():
    """One and two bytes in full, and the ends of each range behind all leads of three and four."""
    ends = [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF]
    cases = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    cases += [bytes([a, b, c]) for a in range(0xE0, 0xF0) for b in ends for c in ends]
    cases += [bytes([a, b, c, 0x80]) for a in range(0xF0, 0x100) for b in ends for c in ends]
    for case in cases:
        assert (utf8_steps(case)[0] == 0) == (case.decode(errors="ignore").encode() == case), case


# ---- The grammar ----------------------------------------------------------------------------------------------------


def accepts(grammar, ids) -> bool:
    state = 0
    for token in ids:
        state = grammar.next_state[state, grammar.token_class[token]] if 0 <= token < len(grammar.token_class) else -1
        if state < 0:
            return False
    return state == len(grammar.next_state) - 1 and list(ids).index(EOS) == len(ids) - 1


MERGED = AnswerRecipe(vocab_size=308 + 256 + 2, max_length=96).fit(
    [{"answer": [{"concept": c, "kind": "depth", "target": 1.0}]} for c in ["獅子 獅", "獅子座"] * 3], seed=0
)


@pytest.mark.parametrize(
    "tokenizer", [TOKENIZER, restricted(kinds=("mask", "depth")), MERGED], ids=["all", "two", "merged"]
)
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_the_grammar_allows_exactly_what_the_parser_takes(tokenizer, data):
    """Also of answers with a token changed, dropped or doubled, and of pieces that end within a character."""
    answer = data.draw(st.lists(items.filter(lambda item: item["kind"] in tokenizer.recipe.kinds), max_size=2))
    long = AnswerTokenizer(recipe=dataclasses.replace(tokenizer.recipe, max_length=512), text=tokenizer.text, card={})
    ids = long.encode([answer])[0].tolist()
    assert accepts(tokenizer.grammar, ids)
    at, what = data.draw(st.integers(0, len(ids) - 1)), data.draw(st.integers(0, tokenizer.modality.vocab_size - 1))
    ids[at : at + 1] = data.draw(st.sampled_from([[], [what], [what, ids[at]], [ids[at]] * 2]))
    try:
        tokenizer.parse(ids)
        parses = True
    except ValueError:
        parses = False
    assert parses == accepts(tokenizer.grammar, ids)


def test_pieces_that_merge_parts_of_characters():
    assert any(len(piece) > 1 and utf8_steps(piece)[0] != 0 for piece in MERGED._bytes)  # what the test above needs


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([*KINDS, None]), st.integers(1, 60), st.integers(0, 2**32))
def test_whatever_the_grammar_allows_parses_within_any_limit(kind, limit, seed):
    """Walks that choose among classes, so that answers are short and many."""
    tokenizer = TOKENIZER if kind is None else restricted(kinds=(kind,))
    grammar, rng, state, ids = tokenizer.grammar, np.random.default_rng(seed), 0, []
    members = [np.flatnonzero(grammar.token_class == k) for k in range(grammar.next_state.shape[1])]
    while state < len(grammar.next_state) - 1:
        after, room = grammar.next_state[state], limit - len(ids)
        open_classes = [k for k, to in enumerate(after) if to >= 0 and grammar.distance[to] < room and len(members[k])]
        choice = rng.choice(open_classes)
        ids.append(int(rng.choice(members[choice])))
        state = after[choice]
    assert len(ids) <= limit
    assert all(kind in (None, item["kind"]) for item in tokenizer.parse(ids))


@pytest.mark.parametrize("kind", [*KINDS, "any"])
def test_a_thousand_answers_of_an_untrained_model_parse(kind, small_model, modalities):
    tokenizer = restricted(kinds=KINDS if kind == "any" else (kind,), max_length=32)
    m, count = tokenizer.modality, 1000
    together = Modalities([modalities.named("depth_tokens"), m])
    graph, params = nnx.split(Model(small_model, together, rngs=nnx.Rngs(0)))
    sampler = Sampler(nnx.merge(graph, params), {m.name: tokenizer}, devices=jax.devices()[:1])
    prompt = make_prompt(
        [{"depth_tokens": np.zeros(12, int)}] * count, [None] * count, m, together, grammar=tokenizer.grammar
    )
    generated = jax.device_get(
        run_stage(graph, params, Autoregressive(temperature=1.0), m, prompt, np.arange(count)[:, None])
    )
    ids, _, _ = sampler._finish(m, generated, [None] * count)
    answers = [tokenizer.parse(row) for row in ids]
    assert len({tuple(row) for row in ids}) > 0.9 * count and max(map(len, ids)) <= m.max_length
    assert sum(map(bool, answers)) > 0.9 * count
    assert {item["kind"] for answer in answers for item in answer} == {*tokenizer.recipe.kinds}


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_files_come_back_byte_equal(tmp_path):
    assert isinstance(TOKENIZER, Tokenizer) and TOKENIZER.modality == RECIPE.modality
    save_tokenizer(TOKENIZER, tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    save_tokenizer(loaded, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert loaded.recipe == RECIPE == from_json(to_json(RECIPE)) and loaded.card["longest"] == 20
    for example in EXAMPLES:
        answer = TOKENIZER.signal_of(example)
        np.testing.assert_array_equal(loaded.encode([answer])[0], TOKENIZER.encode([answer])[0])
    assert TOKENIZER.signal_of({"caption": "a"}) is None
    assert restricted(kinds=("point",)).signal_of(EXAMPLES[3]) is None


def test_answers_are_written_read_and_drawn(tmp_path):
    answer = [item for example in EXAMPLES for item in TOKENIZER.signal_of(example)]
    TOKENIZER.write(answer, tmp_path / "bare", image=None)
    TOKENIZER.write(answer, tmp_path, image=np.full((64, 96, 3), 90, np.uint8))
    assert {p.name for p in tmp_path.iterdir()} == {"bare", "answer.json", "answer.png"}
    for value in (str(tmp_path / "bare/answer.json"), (tmp_path / "answer.json").read_text()):
        np.testing.assert_equal(TOKENIZER.read(value), answer)
    assert TOKENIZER.read("[]") == []
    blank = TOKENIZER.draw([], image=None)
    pictures = [TOKENIZER.draw([item], image=None) for item in answer] + [TOKENIZER.draw(answer, image=None)]
    assert all(p.shape == blank.shape == (256, 256, 3) and (p != blank).any() for p in pictures)
    assert len({p.tobytes() for p in pictures}) == len(pictures)
    mask = pictures[2][20:].any(axis=-1) & (pictures[2][20:] != blank[20:]).any(axis=-1)  # below its name
    np.testing.assert_array_equal(mask.reshape(-1, 256)[44::32, 16::32], GRID[2:])


def wrong(**fields) -> list[dict]:
    return [{"concept": "cube", "kind": "box", "target": [0, 0, 1, 1], **fields}]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (wrong(concept=""), "a concept must be text of at least one character, not ''"),
        (wrong(concept=3), "not 3"),
        (wrong(concept="\ud800"), "surrogates not allowed"),
        (wrong(kind="boxes"), "unknown kind 'boxes' of 'cube'; allowed: box, point, mask, depth. Did you mean 'box'"),
        (wrong(kind=["box"]), "unknown kind"),
        (wrong(target=[0, 0, 1]), r"the box of 'cube' is \[0, 0, 1\]; allowed: 4 numbers .ymin"),
        (wrong(target=[0, 0.5, 1, 0.4]), "minima first"),
        (wrong(target=[0, 0, 1, 1.01]), r"in \[0, 1\]"),
        (wrong(target=[0, 0, 1, float("nan")]), r"in \[0, 1\]"),
        (wrong(target="left"), "the box of 'cube' is left"),
        (wrong(kind="point"), r"allowed: 2 numbers \(y, x\)"),
        (wrong(kind="mask", target=np.ones((4, 4), bool).tolist()), "each of 8 x 8 cells"),
        (wrong(kind="mask", target=np.full((8, 8), 2).tolist()), "False or True"),
        (wrong(kind="depth", target=0), "metres, above 0"),
        (wrong(kind="depth", target=float("inf")), "metres, above 0"),
        ([{"concept": "cube", "kind": "box"}], "needs concept, kind and target, but one is {'concept'"),
        (["cube"], "but one is cube"),
    ],
)
def test_wrong_answers_are_named(answer, message):
    with pytest.raises(ValueError, match=message):
        TOKENIZER.encode([answer])
    with pytest.raises(ValueError, match="an answer must be JSON like .*"):
        TOKENIZER.read(json.dumps(answer))


def test_wrong_recipes_and_lengths_are_named():
    for fields, message in (
        ({"kinds": ("boxes",)}, "unknown kind 'boxes' of answer; .*Did you mean 'box'"),
        ({"kinds": ()}, "one kind or more"),
        ({"num_bins": 1}, "num_bins > 1"),
        ({"near": 3.0, "far": 2.0}, "0 < near < far"),
    ):
        with pytest.raises(ValueError, match=message):
            AnswerRecipe(**fields)
    with pytest.raises(ValueError, match="an answer of 1 items needs 8 tokens, but answer has at most 7"):
        restricted(max_length=7).encode([wrong(concept="red cube")])
    with pytest.raises(ValueError, match="allowed: depth"):
        restricted(kinds=("depth",)).encode([wrong()])
    for value in ("{}", "[", "none.json", '{"concept": "a"}'):
        with pytest.raises(ValueError, match="an answer must be JSON like"):
            TOKENIZER.read(value)
