"""In-context examples: what is packed where, what may not leak, what must not change."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mask_keys
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from m4.adaptation.registers import Registers
from m4.config import Config
from m4.data.dataset import Dataset
from m4.data.stream import ApplyMasking
from m4.distributed.mesh import MeshConfig
from m4.in_context import prompting as in_context
from m4.in_context.example_encoder import ExampleEncoder
from m4.in_context.independent_items import IndependentItems
from m4.in_context.prompting import answer, score
from m4.in_context.shots import encode, read_shots
from m4.in_context.similarity_prior import SimilarityPrior, Words, same_text
from m4.inference.parallel import MaskGIT
from m4.inference.prompts import in_buckets, make_prompt
from m4.inference.sampler import Sampler
from m4.inference.scheme import Stage
from m4.masking.dirichlet import Masking, Strategy
from m4.masking.episodes import EpisodeMasking, Shot, inputs_of, pack_shots, question_answer_text, raw_examples
from m4.model.config import ModelConfig
from m4.model.encoder_decoder import Model
from m4.objectives.masked_modeling import MaskedModeling
from m4.objectives.word_prediction import WordPrediction, captioned, words_loss
from m4.tokens.batch import Targets, Tokens, normalized
from m4.tokens.modality import Modalities
from m4.tokens.packing import ANSWER, coarse_to_fine, pack
from m4.training.optimizer import OptimizerConfig
from m4.training.trainer import Trainer
from m4_tokenizers.modalities.answers import AnswerRecipe
from m4_tokenizers.modalities.image import PixelPatchesRecipe
from m4_tokenizers.modalities.text import TextRecipe

WORDS = ("dax", "blicket", "wug", "fep")


@pytest.fixture(scope="module")
def tokenizers():
    pixels, text = PixelPatchesRecipe(image_size=16, patch_size=4), TextRecipe(max_length=24)
    source = [{"rgb": np.zeros((16, 16, 3), np.uint8), "caption": "a red cube"}]
    return {r.modality.name: r.fit(source, seed=0) for r in (pixels, text)}


@pytest.fixture(scope="module")
def own(tokenizers):
    return Modalities([t.modality for t in tokenizers.values()])


@pytest.fixture(scope="module")
def model(own):
    config = ModelConfig(width=16, num_heads=2, encoder_depth=2, decoder_depth=2, hidden=24, embedding_scale=14.0)
    model = Model(config, own, rngs=nnx.Rngs(0))
    model.item_embedding[...] = 30 * model.item_embedding[...]
    return model


@pytest.fixture(scope="module")
def sampler(model, tokenizers):
    return Sampler(model, tokenizers, devices=jax.devices()[:1])


def shot(seed: int, answer: str | None = None, question: str | tuple | None = None, images: int = 1) -> Shot:
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (16, 16, 3)).astype(np.uint8) for _ in range(images)]
    inputs = {"rgb": pictures if images > 1 else pictures[0], **({"caption": question} if question else {})}
    return Shot(inputs=inputs, outputs={"caption": answer} if answer else {})


def shots(count: int, **options) -> list[Shot]:
    return [shot(i, WORDS[i % len(WORDS)], **options) for i in range(count)]


# ---- Packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (14, 14), (5,), (3, 4), (1, 1)])
def test_coarse_to_fine_is_a_permutation_of_nested_grids(shape):
    order = coarse_to_fine(shape)
    assert sorted(order) == list(range(np.prod(shape)))
    if shape == (8, 8):
        for count in (1, 4, 16, 64):
            rows, columns = (np.unique(x) for x in np.unravel_index(order[:count], shape))
            assert len(rows) == len(columns) == count**0.5
            assert len(rows) == 1 or (np.diff(rows) == 8 // len(rows)).all()


def test_every_image_has_an_address_and_texts_refer_to_them(tokenizers, own):
    question = ("is", 1, "like", 2)
    packed, dropped = pack_shots(
        [encode(s, tokenizers, own) for s in shots(2, question=question, images=2)], own, budget=1000
    )
    ids, modality, position, address, example = packed.columns
    text = modality == own.index("caption")
    assert dropped == 0 and {*address[~text]} == {1, 2, 3, 4}
    np.testing.assert_array_equal(example, np.where(address < 3, 1, 2))
    first = own.named("caption").first_declaration
    # The newer example has items 1 and 2: its text the first, its declarations those of the images they mean.
    own_text, declared = text & np.isin(address, (1, 2)), ids - first
    assert address[own_text & (declared == 1)] == 1 and address[own_text & (declared == 2)] == 2
    assert {*address[own_text & ~np.isin(declared, (1, 2))]} == {1}
    assert (np.bincount(address[~text])[1:] == 16).all()
    # Each id of a pixel patch counts the vector of its own image.
    newest = raw_examples(shots(2, question=question, images=2)[-1])
    (expected,) = tokenizers["rgb_pixels"].encode([newest[1]["rgb"]])
    second = (modality == own.index("rgb_pixels")) & (address == 2)
    np.testing.assert_array_equal(packed.features["rgb_pixels"][ids[second]], expected[position[second]])


@given(budget=st.integers(0, 120), num_tokens=st.integers(0, 20), count=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_what_does_not_fit_is_dropped_whole_the_oldest_first(tokenizers, own, budget, num_tokens, count):
    examples = [encode(s, tokenizers, own) for s in shots(count)]
    packed, dropped = pack_shots(examples, own, budget=budget, num_tokens=num_tokens)
    sizes = [pack(e, [1], own, num_tokens=num_tokens).columns.shape[1] for e in examples]
    kept = sizes[dropped:]
    assert packed.columns.shape[1] == sum(kept) <= budget
    assert not dropped or sum(sizes[dropped - 1 :]) > budget
    assert sorted({*packed.columns[3]}) == list(range(1, len(kept) + 1))


def test_the_budget_alone_limits_the_number_of_examples(tokenizers, own):
    examples = [encode(s, tokenizers, own) for s in shots(20)]
    packed, dropped = pack_shots(examples, own, budget=10_000)
    assert dropped == 0 and {*packed.columns[3]} == {*packed.columns[4]} == {*range(1, 21)}


def test_a_question_and_its_answer_are_one_text(tokenizers):
    assert question_answer_text("what colour ?", "red", "caption") == ("what colour ?", ANSWER, "red")
    text = tokenizers["caption"]
    (whole,), (question,) = text.encode([("what colour ?", ANSWER, "red")]), text.encode([("what colour ?", ANSWER)])
    assert list(whole[: len(question) - 1]) == list(question[:-1])
    assert text.decode([whole]) == ["what colour ?red"]  # declarations say nothing
    assert list(text.encode(["[D_0]"])[0]) != list(text.encode([(ANSWER,)])[0])  # nobody types them
    with pytest.raises(ValueError, match="no declaration 32; it has 32"):
        text.encode([("a", 32)])
    with pytest.raises(ValueError, match="rgb is both input and output"):
        question_answer_text(np.zeros(3), "red", "rgb")


# ---- Masking of episodes --------------------------------------------------------------------------------------------


def records(tokenizers, own, seed: int, count: int = 5, **options) -> list:
    made = [shot(100 * seed + i, WORDS[i % len(WORDS)], **options) for i in range(count)]
    return [r for s in made for r in encode(s, tokenizers, own)]


@given(seed=st.integers(0, 10_000), low=st.integers(0, 4), images=st.integers(1, 2), ask_all=st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_is_asked_is_not_shown(tokenizers, own, seed, low, images, ask_all):
    """Labelled examples go in with their outputs, the query is a target without them, and others are too, or are left
    out; another answer changes no input."""
    masking = EpisodeMasking(num_examples=5, num_images=images, labelled=(low, 4), num_tokens=(4, 0), ask_all=ask_all)
    question = ("is", 1, "so") if seed % 2 else None
    episode = records(tokenizers, own, seed, images=images, question=question)
    packed, targets = masking.mask_one(episode, own, np.random.default_rng(seed), 400, 120)
    _, modality, _, address, example = packed.columns
    text = modality == own.index("caption")
    asked = {*targets[4]}
    told = len({*address[text]} - asked)
    assert len({*zip(address, example, strict=True)}) == len({*address}) and (example[address == 0] == 0).all()
    assert 0 in asked and low <= told <= 4 and len(asked) == (5 - told if ask_all else 1)
    assert len({*address[~text]}) == images * len({*address[text]})
    for a in asked:  # of an asked text: the question, if any, and a sentinel
        shown = packed.columns[0][text & (address == a)]
        assert shown[-1] == own.named("caption").first_sentinel and (len(shown) == 1) == (question is None)
    # Other answers: the inputs stay.
    place = {a: targets[0][targets[4] == a] for a in asked}
    last = episode[-images]["caption"].copy()
    np.testing.assert_array_equal(place[0], last[len(last) - len(place[0]) :])
    last[-3:-1] = tokenizers["caption"].encode(["zz"])[0][:2]
    changed = [*episode[:-images], {**episode[-images], "caption": last}, *episode[len(episode) - images + 1 :]]
    again, other = masking.mask_one(changed, own, np.random.default_rng(seed), 400, 120)
    np.testing.assert_array_equal(packed.columns, again.columns)
    assert (targets[0] != other[0]).any()


def test_a_batch_of_episodes_and_ordinary_examples_is_each_alone(tokenizers, own):
    everything = Strategy(inputs={"rgb_pixels": 1.0}, targets={"caption": 1.0})
    masking = Masking(num_inputs=120, num_targets=40, strategies=(everything,))
    datasets = (Dataset(tokens="a"), Dataset(tokens="b", masking=EpisodeMasking(num_examples=5, labelled=(1, 3))))
    mask = ApplyMasking(masking, datasets, own, seed=3)
    batch = [(i, (i % 2, records(tokenizers, own, i) if i % 2 else records(tokenizers, own, i)[0])) for i in range(6)]
    whole = mask(batch)
    for i, item in enumerate(batch):
        alone = mask([item])
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(jax.tree.map(lambda x, i=i: x[i], whole)), strict=True):
            np.testing.assert_array_equal(a[0], b)
    assert (whole.inputs.item[::2] == 0).all() and (whole.inputs.item[1::2] > 0).any()


def test_errors_of_episodes(tokenizers, own):
    with pytest.raises(ValueError, match=r"labelled=\(0, 9\).*within \[0, 8\]"):
        EpisodeMasking(labelled=(0, 9))
    with pytest.raises(ValueError, match="18 items, more than max_items=17"):
        EpisodeMasking(num_images=2)
    with pytest.raises(ValueError, match="unknown modality 'capton'.*caption"):
        EpisodeMasking(outputs=("capton",)).check(own)
    with pytest.raises(ValueError, match="a query of 17 input and 4 target tokens does not fit into num_inputs=10"):
        EpisodeMasking(num_examples=2, labelled=(0, 0)).mask_one(
            records(tokenizers, own, 0, 1) * 2, own, np.random.default_rng(0), 10, 10
        )
    with pytest.raises(ValueError, match="skip_bad must be 0"):
        Dataset(tokens="a", masking=EpisodeMasking(), skip_bad=0.1)


# ---- The model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def episode_batch(tokenizers, own):
    masking = EpisodeMasking(num_examples=5, labelled=(2, 2), num_tokens=(4,))
    episodes = [records(tokenizers, own, i) for i in range(4)]
    batch = masking(episodes, own, mask_keys(4), 96, 40)
    return jax.tree.map(jnp.asarray, normalized(batch, own))


@pytest.mark.parametrize("name", ["model", "by_words"])
def test_padding_changes_nothing(name, request, episode_batch):
    """Whatever slots that are not valid hold: the same bits. More of them: the same within rounding."""
    model, b = request.getfixturevalue(name), episode_batch
    expected = np.asarray(model(b))
    valid = b.inputs.valid
    noise = Tokens(*(jnp.where(valid, x, 1) for x in b.inputs[:-1]), valid)
    kept = np.asarray(b.targets.valid)
    np.testing.assert_array_equal(np.asarray(model(b._replace(inputs=noise)))[kept], expected[kept])
    # In between, behind every token.
    spread = [jnp.stack([x, jnp.zeros_like(x)], -1).reshape(len(x), -1) for x in b.inputs]
    wider = np.asarray(model(b._replace(inputs=Tokens(*spread))))
    np.testing.assert_allclose(wider[kept], expected[kept], atol=2e-6)


def test_the_order_of_slots_carries_no_meaning_and_addresses_do(model, episode_batch):
    b, rng = episode_batch, np.random.default_rng(0)
    expected, kept = np.asarray(model(b)), np.asarray(b.targets.valid)
    order = np.stack([rng.permutation(b.inputs.ids.shape[1]) for _ in range(4)])
    shuffled = Tokens(*(jnp.take_along_axis(x, order, 1) for x in b.inputs))
    np.testing.assert_allclose(np.asarray(model(b._replace(inputs=shuffled)))[kept], expected[kept], atol=3e-6)
    # Examples that change places keep everything else, once all addresses look alike.
    alike = nnx.clone(model)
    alike.item_embedding[...] = jnp.zeros_like(alike.item_embedding[...])
    rename = np.concatenate([[0], 1 + rng.permutation(model.config.max_items - 1)])
    moved = b._replace(
        inputs=b.inputs._replace(item=jnp.asarray(rename)[b.inputs.item]),
        targets=b.targets._replace(item=jnp.asarray(rename)[b.targets.item]),
    )
    np.testing.assert_array_equal(np.asarray(alike(moved))[kept], np.asarray(alike(b))[kept])
    assert np.abs(np.asarray(model(moved)) - expected)[kept].max() > 1e-3


def test_no_gradient_from_one_examples_answer_to_another(model, episode_batch):
    """The decoder's inputs at address a reach its outputs at address a alone (and of a text what comes after them)."""
    b = episode_batch
    twice = Targets(*(jnp.concatenate([t, t], 1) for t in b.targets))
    other = jnp.arange(twice.item.shape[1]) >= b.targets.item.shape[1]
    b = b._replace(targets=twice._replace(item=jnp.where(other[None], 1, twice.item)))
    context = model.encode(b.inputs, b.features)
    visible = model.decoder_visibility(b.targets)
    x = model.decoder_input(b.targets)

    def at(x, address):
        from m4.model.block_inputs import BlockInputs
        from m4.model.visibility import Visible

        info = model.context_info(b.inputs)
        inputs = BlockInputs(visible, model.info(b.targets), context.tokens, info, Visible.keys(info.valid))
        hidden, _ = model.run_blocks(model.decoder, x, inputs)
        return (hidden * (b.targets.valid & (b.targets.item == address))[..., None] ** 2).sum()

    for address in (0, 1):
        gradient = np.abs(np.asarray(jax.grad(at)(x, address))).sum(-1)
        same = np.asarray(b.targets.valid & (b.targets.item == address))
        assert (gradient[same] > 0).any() and (gradient[~same] == 0).all()


def test_the_query_reads_its_examples(model, episode_batch):
    """Its outputs depend on labelled examples: their content has a gradient."""
    b = episode_batch
    address = model.input_address(b.inputs)
    content = model.input_content(b.inputs, b.features)

    def query(content):
        context = model.encode_embedded(content + address, address, b.inputs)
        hidden = model.decode(b.targets, context)
        return (hidden * (b.targets.valid & (b.targets.example == 0))[..., None]).std()

    gradient = np.abs(np.asarray(jax.grad(query)(content))).sum(-1)
    labelled = np.asarray(b.inputs.valid & (b.inputs.example > 0))
    assert (gradient[labelled] > 0).all() and (gradient[~np.asarray(b.inputs.valid)] == 0).all()


def digest(params) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p): hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for p, x in leaves}


def test_the_shot_encoder_alone_is_trained(own, tokenizers, episode_batch):
    """The backbone keeps its bytes; without examples the model is the backbone, bit for bit."""
    light = ModelConfig(
        width=16, num_heads=2, encoder_depth=2, decoder_depth=2, hidden=24, extensions=(ExampleEncoder(depth=1),)
    )
    c = Config(
        name="light", datasets=(), tokenizers=tuple(t.recipe for t in tokenizers.values()),
        masking=Masking(num_inputs=96, num_targets=40, strategies=()), model=light, batch_size=4, num_steps=4,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, train=("shot_encoder*",)),
    )  # fmt: skip
    trainer = Trainer(c, MeshConfig().make(jax.devices()[:1]))
    state = trainer.init()
    before, share = digest(state.params), trainer.num_trained / trainer.num_parameters
    assert 0 < share < 0.5
    masking = EpisodeMasking(num_examples=5, labelled=(2, 2), num_tokens=(4,))
    batch = masking([records(tokenizers, own, i) for i in range(4)], own, mask_keys(4), 96, 40)
    for step in range(1, 4):
        state, scalars = trainer.step(state, batch, step)
    after = digest(state.params)
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all("shot_encoder" in name for name in changed)
    tuned = trainer.trained(state)
    plain = Model(light.without(ExampleEncoder), own, rngs=nnx.Rngs(0))
    backbone = [(p, x) for p, x in nnx.to_flat_state(nnx.state(tuned, nnx.Param)) if "shot_encoder" not in p[0]]
    nnx.update(plain, nnx.from_flat_state(backbone))
    b = episode_batch
    is_query = b.inputs.valid & (b.inputs.example == 0)
    alone = b._replace(inputs=b.inputs._replace(valid=is_query))
    np.testing.assert_array_equal(np.asarray(tuned(alone)), np.asarray(plain(alone)))
    assert np.abs(np.asarray(tuned(b)) - np.asarray(plain(b))).max() > 1e-4
    with pytest.raises(ValueError, match="train='shot_encodr\\*' fits no parameter"):
        OptimizerConfig(train=("shot_encodr*",)).is_trained(state.params)


# ---- Answers --------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_each_candidate_alone(sampler, model, tokenizers, own):
    """Mean log-probability under teacher forcing; prompts are encoded once each, whatever their candidates."""
    queries, context = [shot(50 + i) for i in range(3)], shots(4)
    candidates = [WORDS, WORDS[:2], WORDS[1:]]
    counted = []
    encode_ = Model.encode

    def count(self, inputs, *args):
        counted.append(inputs.ids.shape[0])
        return encode_(self, inputs, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "encode", count)
        in_context._score.clear_cache()
        found = score(sampler, queries, "caption", candidates, shots=context, num_tokens=4)
    assert counted == [3]
    for i, query in enumerate(queries):
        for j, word in enumerate(candidates[i]):
            alone = score(sampler, [query], "caption", [[word]], shots=context, num_tokens=4)
            np.testing.assert_allclose(found[i, j], alone[0, 0], atol=1e-5)
    assert np.isneginf(found[1, 2:]).all()
    # By hand, without the sampler.
    row, _ = pack_shots([encode(s, tokenizers, own) for s in context], own, budget=999, num_tokens=4)
    (record,) = encode(queries[0], tokenizers, own)
    query = pack([{**record, "caption": np.array([own.named("caption").first_sentinel])}], [0], own)
    inputs, features = jax.tree.map(jnp.asarray, in_buckets([type(row).join([query, row], own)], own))
    (ids,) = tokenizers["caption"].encode([WORDS[1]])
    n, m = len(ids), own.named("caption")
    zeros = np.zeros((1, n), np.int32)
    targets = Targets(
        ids[None], np.array([[m.first_sentinel, *ids[:-1]]]), zeros + own.index("caption"), np.arange(n)[None], zeros,
        zeros, np.ones((1, n), bool),
    )  # fmt: skip
    hidden = model.decode(jax.tree.map(jnp.asarray, targets), model.encode(inputs, features))
    log = jax.nn.log_softmax(model.logits(hidden, "caption"))[0]
    np.testing.assert_allclose(found[0, 1], float(jnp.mean(log[np.arange(n), ids])), atol=1e-5)


def test_calibrated_scores_do_not_depend_on_a_candidates_own_likelihood(sampler):
    """A query without content scores zero, candidate by candidate; of a question its words are the content."""
    options = {"candidates": [WORDS], "shots": shots(2)}
    empty, asking = ([Shot(inputs={"caption": text})] for text in ("", "what ?"))
    np.testing.assert_allclose(score(sampler, empty, "caption", **options, calibrate=True), 0, atol=1e-6)
    plain, without = (score(sampler, query, "caption", **options) for query in (asking, empty))
    calibrated = score(sampler, asking, "caption", **options, calibrate=True)
    np.testing.assert_allclose(calibrated, plain - without, atol=1e-6)
    assert np.abs(calibrated).max() > 1e-3


def test_what_cannot_be_asked_is_an_error(sampler):
    query = Shot(inputs={"rgb": shot(1).inputs["rgb"]})
    for message, wrong in {
        "one list for each query; got 'dax'": lambda: score(sampler, [query], "caption", ["dax"]),
        "2 lists of candidates were given for 1": lambda: score(sampler, [query], "caption", [["dax"], ["wug"]]),
        r"at least one answer, one list for each query; got \[\]": lambda: score(sampler, [query], "caption", [[]]),
        "1 indices were given for 2 samples": lambda: answer(sampler, [query, query], "caption", indices=[3]),
        "seed=-1 must": lambda: answer(sampler, query, "caption", seed=-1),
        "num_tokens=-1 must": lambda: answer(sampler, query, "caption", num_tokens=-1),
        "a Sequence, which Autoregressive does": lambda: answer(
            sampler, query, Stage(target="caption", scheme=MaskGIT())
        ),
        "is longer than the allowed 24": lambda: answer(sampler, Shot(inputs={"caption": "is " * 99}), "caption"),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()


def test_answers_with_questions_and_images_of_their_own(sampler):
    context = shots(3, question=("is", 1, "like", 2), images=2)
    queries = [shot(80 + i, question=("is", 1, "like", 2), images=2) for i in range(2)]
    results = answer(sampler, queries, "caption", shots=context, num_tokens=4)
    alone = answer(sampler, queries[1], "caption", shots=context, num_tokens=4)
    assert len(results["caption"]) == 2 and alone["caption"] == results["caption"][1]
    declared = sampler.modalities.named("caption").first_declaration
    assert not any((ids == declared).any() for ids in results.tokens["caption"])  # the question is not repeated
    assert not any(text.startswith("is") for text in results["caption"])
    other = answer(sampler, queries, "caption", shots=[context, context[:1]], num_tokens=4)
    assert other["caption"][0] == results["caption"][0]
    with pytest.raises(ValueError, match="1 lists of shots were given for 2 queries"):
        answer(sampler, queries, "caption", shots=[context])
    with pytest.warns(UserWarning, match="2 of the oldest shots were dropped"):
        answer(sampler, queries[0], "caption", shots=context, budget=90)


def test_shots_from_a_file(tmp_path):
    file = tmp_path / "shots.json"
    (tmp_path / "a.png").write_bytes(b"")
    items = [{"inputs": {"rgb": ["a.png", "a.png"], "caption": ["is", 1, "?"]}, "outputs": {"caption": "dax"}}]
    file.write_text(json.dumps(items))
    (read,) = read_shots(file)
    assert read.inputs == {"rgb": [tmp_path / "a.png"] * 2, "caption": ("is", 1, "?")}
    assert read.outputs == {"caption": "dax"}
    for bad, message in (
        ("[", "cannot be read"),
        ("[]", "must hold a list"),
        ('[{"inputs": {"rgb": "a.png"}}]', "example 1 must have inputs and outputs"),
        ('[{"inputs": {"rgb": 1.5}, "outputs": {"caption": "a"}}]', "1.5 must be text"),
    ):
        file.write_text(bad)
        with pytest.raises(ValueError, match=message):
            read_shots(file)


# ---- Matching -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matching(own):
    config = ModelConfig(
        width=16, num_heads=2, encoder_depth=2, decoder_depth=2, hidden=24, embedding_scale=14.0,
        extensions=(Registers(num=2), IndependentItems(num_blocks=1), SimilarityPrior(size=8)),
    )  # fmt: skip
    return Model(config, own, rngs=nnx.Rngs(0))


def with_words(config, words):
    prior = dataclasses.replace(config.extension(SimilarityPrior), words=words)
    return dataclasses.replace(config, extensions=(*config.without(SimilarityPrior).extensions, prior))


@pytest.fixture(scope="module")
def by_words(own, matching):
    """Compares by words too, of which it has learned something."""
    model = Model(with_words(matching.config, "caption"), own, rngs=nnx.Rngs(0))
    model.matching.words.out_kernel[...] = 0.3 * jax.random.normal(
        jax.random.key(1), model.matching.words.out_kernel.shape
    )
    return model


def test_matches_compare_images_of_labelled_examples(matching, tokenizers, own):
    """All tokens of an example have its cosine, that of a like image is larger; what is not labelled adds nothing,
    nor does a single example."""
    same, other = shot(1, "dax"), shot(2, "wug")
    query = shot(1)
    row = pack(
        [{**encode(query, tokenizers, own)[0], "caption": np.array([own.named("caption").first_sentinel])}], [0], own
    )
    context, _ = pack_shots([encode(s, tokenizers, own) for s in (same, other)], own, budget=999)
    single, _ = pack_shots([encode(same, tokenizers, own)], own, budget=999)
    rows = [type(row).join([row, more], own) for more in (context, single)]
    inputs, features = jax.tree.map(jnp.asarray, in_buckets(rows, own))
    matches = matching.encode(inputs, features).observed["SimilarityPrior"]
    cosine = np.asarray(jnp.einsum("br,bcr->bc", matches.examples[:, 0], matches.keys))
    address, valid = np.asarray(inputs.item), np.asarray(inputs.valid)
    alike, unlike = (np.unique(cosine[0][valid[0] & (address[0] == a)].round(4)) for a in (2, 1))
    assert len(alike) == len(unlike) == 1 and alike > 0.3 > unlike  # the older example shows what the query shows
    assert (cosine[0][~valid[0] | (address[0] == 0)] == 0).all() and (cosine[1] == 0).all()


def test_a_weight_of_zero_is_plain_attention(by_words, episode_batch):
    b, matching = episode_batch, by_words
    plain = nnx.clone(matching)
    plain.matching.weight[...] = plain.matching.words.weight[...] = jnp.zeros(2)
    context = plain.encode(b.inputs, b.features)
    kept = np.asarray(b.targets.valid)
    expected = Model(plain.config.without(SimilarityPrior), plain.modalities, rngs=nnx.Rngs(0)).decode(
        b.targets, context
    )
    np.testing.assert_allclose(np.asarray(plain(b))[kept], np.asarray(expected)[kept], atol=2e-6)
    assert np.abs(np.asarray(matching(b)) - np.asarray(expected))[kept].max() > 1e-3


def test_examples_are_read_separately_at_first(matching, episode_batch):
    """Before the last blocks, no example's tokens depend on another's: gradients are zero."""
    b = episode_batch
    x = matching.encoder_input(b.inputs, b.features)
    address = np.asarray(jnp.pad(b.inputs.item, ((0, 0), (2, 0))))
    valid = np.asarray(matching.context_info(b.inputs).valid)
    one = address[0].max()

    def of_one(x):
        first, _, num = matching._first_blocks(x, matching.context_info(b.inputs), None)
        assert num == 1
        return (first[0] * (address[0] == one)[:, None]).std()

    gradient = np.abs(np.asarray(jax.grad(of_one)(x))).sum(-1)[0]
    assert (gradient[valid[0] & (address[0] == one)] > 0).all() and (gradient[address[0] != one] == 0).all()


def test_answers_with_matching_are_those_of_uncached_decoding(by_words, tokenizers, own):
    """Greedy answers with caches: each id is the likeliest after those before it, teacher-forced."""
    matching = by_words
    tuned = Sampler(matching, tokenizers, devices=jax.devices()[:1])
    queries, context = [shot(60 + i) for i in range(2)], shots(3)
    results = answer(tuned, queries, "caption", shots=context)
    m, name = own.named("caption"), own.index("caption")
    prompts = in_context.build_prompts(tuned, queries, "caption", context, 0, 999)
    records, partial, contexts = zip(*prompts, strict=True)
    prompt = make_prompt(records, partial, m, own, contexts=contexts)
    inputs, features = jax.tree.map(jnp.asarray, prompt.rows())
    for row, ids in enumerate(results.tokens["caption"]):
        previous = np.append(m.first_sentinel, ids[:-1])
        n = len(ids)
        targets = [ids, previous, np.full(n, name), np.arange(n), np.zeros(n, int), np.zeros(n, int), np.ones(n, bool)]
        targets = Targets(*(jnp.asarray(np.stack([t] * 2)) for t in targets))
        hidden = matching.decode(targets, matching.encode(inputs, features))
        likeliest = np.asarray(matching.logits(hidden, "caption").argmax(-1))[row]
        np.testing.assert_array_equal(likeliest[: n - 1], ids[: n - 1])


def test_the_words_that_matter_are_those_by_which_equal_answers_are_alike():
    """Counts of one word decide the answers of a prompt, whichever word it is; others are noise."""
    rng, count = np.random.default_rng(0), 30
    words = rng.integers(0, 3, (count, 10, 40)).astype(np.float32)
    which = np.arange(count)
    answers = words[which, :, which]  # address 0 is the query
    labelled = np.tile(np.arange(10) > 0, (count, 1))
    same = answers[:, :, None] == answers[:, None]
    alike = Words(8, 40, 2, rngs=nnx.Rngs(0)).alike
    found = np.asarray(alike(jnp.asarray(words), jnp.asarray(labelled), jnp.asarray(same)))[:, 0, 1:]
    told = same[:, 0, 1:]
    assert found[told].mean() > 0.9 and found[~told].mean() < 0.4
    # No word is special, nor is an example's place.
    order, places = rng.permutation(40), np.array([0, *(1 + rng.permutation(9))])
    moved = alike(
        jnp.asarray(words[:, places][..., order]), jnp.asarray(labelled), jnp.asarray(same[:, places][:, :, places])
    )
    np.testing.assert_allclose(np.asarray(moved)[:, 0, 1:], found[:, places[1:] - 1], atol=1e-5)
    gradient = jax.grad(lambda w: alike(w, jnp.asarray(labelled), jnp.asarray(same)).sum())(jnp.asarray(words))
    assert not np.asarray(gradient).any()


def test_texts_are_the_same_or_not(tokenizers, own):
    examples = [shot(0, "dax"), shot(1, "dax"), shot(2, "dax wug"), shot(3)]
    context, _ = pack_shots([encode(s, tokenizers, own) for s in examples], own, budget=999)
    inputs, _ = in_buckets([context], own)
    same = np.asarray(same_text(inputs, jnp.asarray(inputs.modality == own.index("caption")), 17))[0]
    assert same[4, 3] and same.diagonal().all() and not same[4, 2] and not same[4, 1] and not same[2, 1]


def test_words_are_learned_from_whole_captions_of_pictures(by_words, tokenizers, own):
    """How often each is said counts, where all of the caption is asked by the picture alone."""
    masking = Masking(
        strategies=(Strategy(inputs={"rgb_pixels": 1.0}, targets={"caption": 1.0}, keep="all"),), num_inputs=20,
        num_targets=12,
    )  # fmt: skip
    texts = ["red red cube", "a red cube and a cube and a cube", "cube"]
    rows = [{**encode(shot(i), tokenizers, own)[0], "caption": tokenizers["caption"].encode([t])[0]}
            for i, t in enumerate(texts)]  # fmt: skip
    batch = jax.tree.map(jnp.asarray, normalized(masking(rows, own, mask_keys(3), [masking.strategies] * 3), own))
    there = np.asarray(captioned(batch, by_words, "caption"))
    fits = np.array([len(r["caption"]) < 12 for r in rows])
    assert fits.tolist() == [True, False, True]
    np.testing.assert_array_equal(there, fits[:, None] & (np.arange(17) == 0))
    words = np.asarray(by_words.encode(batch.inputs, batch.features).observed["SimilarityPrior"].words)
    said = np.stack([np.bincount(r["caption"], minlength=words.shape[-1]) for r in rows])
    expected = ((words[:, 0] - said) ** 2).sum(-1)[fits].sum()
    index = own.index("caption")
    np.testing.assert_allclose(
        words_loss(jnp.asarray(words), batch.targets, index, jnp.asarray(there)), expected, rtol=1e-5
    )
    # A caption that is partly told, that nothing shows, or an answer after examples teaches nothing.
    x, last = batch.inputs, jnp.arange(batch.inputs.ids.shape[1]) == 19
    told = x._replace(modality=jnp.where(last[None], index, x.modality), ids=jnp.where(last[None], 70, x.ids))
    example = x._replace(item=jnp.where(last[None], 3, x.item), example=jnp.where(last[None], 3, x.example))
    for inputs in (
        x._replace(valid=jnp.zeros_like(x.valid)),
        *(y._replace(valid=x.valid | last[None]) for y in (told, example)),
    ):
        assert not captioned(batch._replace(inputs=inputs), by_words, "caption").any()


@pytest.mark.slow  # of words alone; test_meshes has all else
def test_micro_batches_and_meshes_learn_the_same_words(by_words, tokenizers, own):
    strategy = Strategy(inputs={"rgb_pixels": 1.0}, targets={"caption": 1.0}, keep="all")
    masking = Masking(strategies=(strategy,), num_inputs=20, num_targets=12)
    texts = ["a red cube", "a blue cube and a red one", "cube", "red"]
    rows = [{**encode(shot(i), tokenizers, own)[0], "caption": tokenizers["caption"].encode([t])[0]}
            for i, t in enumerate(texts)]  # fmt: skip
    batch = masking(rows, own, mask_keys(4), [masking.strategies] * 4)
    config = Config(
        name="words", datasets=(), tokenizers=tuple(t.recipe for t in tokenizers.values()), masking=masking,
        model=by_words.config, batch_size=4, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        objectives=(MaskedModeling(), WordPrediction()),
    )  # fmt: skip
    results = []
    for micro_batches, devices in ((1, 1), (2, 1), (1, 2)):
        mesh = MeshConfig(fsdp=devices).make(jax.devices()[:devices])
        trainer = Trainer(dataclasses.replace(config, micro_batches=micro_batches), mesh)
        state = trainer.init()
        first = jax.device_get(state.params)
        for number in (1, 2, 3):
            state, scalars = trainer.step(state, batch, number)
        results.append((float(scalars["loss"]), float(scalars["words/loss"]), jax.device_get(state.params)))
    assert results[0][1] > 1
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (first, results[0][2])), strict=True)]
    assert np.mean(np.array(moved) > 1e-3) > 0.5
    for other in results[1:]:
        np.testing.assert_allclose(other[:2], results[0][:2], rtol=1e-4)
        for a, b in zip(jax.tree.leaves(other[2]), jax.tree.leaves(results[0][2]), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)


def test_what_words_say_is_added_at_labels(by_words, tokenizers, own):
    """The products of a query's vector and keys: `alike` at texts of labelled examples, nothing elsewhere."""
    examples, query = [shot(0, "dax"), shot(1, "wug"), shot(2, "dax")], shot(3)
    sentinel = np.array([own.named("caption").first_sentinel])
    row = pack([{**encode(query, tokenizers, own)[0], "caption": sentinel}], [0], own)
    context, _ = pack_shots([encode(s, tokenizers, own) for s in examples], own, budget=999)
    inputs, features = jax.tree.map(jnp.asarray, in_buckets([type(row).join([row, context], own)], own))
    found, size = (
        by_words.encode(inputs, features).observed["SimilarityPrior"],
        by_words.config.extension(SimilarityPrior).size,
    )
    assert found.weight.shape == (2, size + by_words.config.max_items)
    added = np.asarray(found.examples[0, 0, size:] @ found.keys[0, :, size:].T)
    address, is_label = np.asarray(inputs.item)[0], np.asarray(inputs.modality)[0] == own.index("caption")
    is_label &= np.asarray(inputs.valid)[0] & (address > 0)
    alike = np.asarray(found.examples[0, 0, size:])
    np.testing.assert_allclose(added, np.where(is_label, alike[address], 0), atol=1e-6)
    assert len({*alike[1:4].round(4)}) == 3 and (alike[1:4] > 0).all()


def test_words_of_no_text_are_refused(own, by_words, tokenizers):
    masking = Masking(strategies=(Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0}),))
    config = Config(
        name="words", datasets=(), tokenizers=tuple(t.recipe for t in tokenizers.values()), masking=masking,
        model=by_words.config, objectives=(WordPrediction(text="captions"),),
    )  # fmt: skip
    with pytest.raises(ValueError, match="unknown text modality 'captions'; allowed: caption. Did you"):
        config.check()
    with pytest.raises(ValueError, match="by words of"):
        other = with_words(by_words.config, "")
        dataclasses.replace(config, model=other, objectives=(WordPrediction(),)).check()


def test_structured_answers_of_several_images(tokenizers):
    """A list of images is several images, a list of the parts of an answer is one answer."""
    parts = [{"concept": "red cube", "kind": "point", "target": np.array([0.25, 0.75], np.float32)}]
    answers = AnswerRecipe(max_length=96).fit([{"answer": parts}], seed=0)
    both = {"rgb_pixels": tokenizers["rgb_pixels"], answers.modality.name: answers}
    modalities = Modalities([t.modality for t in both.values()])
    images = [shot(i).inputs["rgb"] for i in range(2)]
    labelled = Shot(inputs={"rgb": images}, outputs={"answer": parts * 2})
    first, second = encode(labelled, both, modalities)
    assert {*first} == {"rgb_pixels", answers.modality.name} and {*second} == {"rgb_pixels"}
    (decoded,) = answers.decode([first[answers.modality.name]])
    assert [part["concept"] for part in decoded] == ["red cube"] * 2
    assert inputs_of([labelled])["rgb"][0] is images[0]
    config = ModelConfig(width=16, num_heads=2, encoder_depth=1, decoder_depth=1, hidden=16)
    sampler = Sampler(Model(config, modalities, rngs=nnx.Rngs(0)), both, devices=jax.devices()[:1])
    (out,) = answer(sampler, [Shot(inputs={"rgb": images})], "answer", shots=[labelled])["answer"]
    assert all({*part} == {"concept", "kind", "target"} for part in out)
