"""Few-shot tasks are pure, balanced and true; what tests ask for was never shown in training."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m4.data.sources.rendering import NAMES, VARIANTS
from m4.data.sources.scenes import Scenes
from m4.data.sources.stamps import Stamps
from m4.in_context.tasks import counting, operators
from m4.in_context.tasks.captioning import Captioning, Grounding, overlap
from m4.in_context.tasks.counting import TEST_VALUES, Counting
from m4.in_context.tasks.fast_binding import HELD_OUT, FastBinding, FastBindingRgb, SceneKinds, StampKinds
from m4.in_context.tasks.image_cache import image_cache
from m4.in_context.tasks.matching import PairMatching
from m4.in_context.tasks.nonce_words import made_up_words, same_text
from m4.in_context.tasks.operators import OPERATORS, OperatorInduction
from m4.in_context.tasks.questions import Entailment, Questions, ask
from m4.in_context.tasks.renamed_signal import Renamed
from m4.in_context.tasks.source import EpisodeSource
from m4.in_context.tasks.text_recognition import BOXES, Reading
from m4.in_context.tasks.vl_icl import VLICL
from m4.masking.episodes import Shot, raw_examples
from m4.registry import from_json, to_json

KINDS = SceneKinds(scenes=Scenes(variant="kinds", num_train=240, num_validation=1, num_test=1, num_heldout=240))
SCENES = Scenes(variant="simple", num_train=240, num_validation=1, num_test=240, num_heldout=120)
TASKS = [
    FastBinding(kinds=KINDS),
    FastBinding(kinds=KINDS, ways=5),
    FastBindingRgb(kinds=KINDS),
    PairMatching(kinds=KINDS),
    *(OperatorInduction(form=form) for form in operators.FORMS),
    Reading(),
    *(cls(scenes=SCENES) for cls in (Counting, Questions, Entailment, Captioning, Grounding)),
]
BY_NAME = {task.name: task for task in TASKS}
every_task = pytest.mark.parametrize("task", TASKS, ids=list(BY_NAME))
CORPUS = Stamps().path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("episodes")
    for task in TASKS:
        task.prepare(data_dir)
    return data_dir


def examples(task, split, data, count=40) -> list[list[Shot]]:
    """Shots and query of the first episodes."""
    episodes = [task.draw(split, i, data) for i in range(count)]
    return [[*episode.shots, episode.query] for episode in episodes]


def captions(task, split, data) -> set:
    return {shot.outputs["caption"] for episode in examples(task, split, data) for shot in episode}


class Known:
    """The annotations of the scenes that an episode shows, found by their pixels."""

    def __init__(self, scenes, data):
        banks = [image_cache(scenes, split, data) for split in ("train", "test", "heldout")]
        self.annotations = {p.tobytes(): a for b in banks for p, a in zip(b.rgb, b.annotations, strict=True)}

    def __call__(self, rgb):
        return self.annotations[rgb.tobytes()]


@every_task
def test_an_episode_is_a_function_of_its_arguments(task, data):
    """Whatever was drawn before; splits, numbers and tasks have different ones, and every episode has its shape."""
    first = pickle.dumps(task.draw("test", 3, data))
    others = [pickle.dumps(task.draw(*arguments, data)) for arguments in (("train", 3), ("test", 4), ("test", 2**40))]
    assert first == pickle.dumps(task.draw("test", 3, str(data))) and first not in others
    for episode in (task.draw("train", i, data) for i in range(20)):
        assert len(episode.shots) == task.max_shots == 8
        for shot in (*episode.shots, episode.query):
            images = {**shot.inputs, **shot.outputs}.get("rgb", [])
            images = images if isinstance(images, list) else [images]
            assert [(i.dtype, i.shape) for i in images] == [(np.uint8, (64, 64, 3))] * task.images
            assert list(shot.outputs) == [task.output]
    with pytest.raises(ValueError, match="'tset'.*Did you mean 'test'"):
        task.draw("tset", 0, data)


@every_task
def test_truth_is_right_and_other_answers_are_wrong(task, data):
    for i in range(30):
        episode = task.draw("test", i, data)
        truth = episode.query.outputs[task.output]
        assert task.correct(truth, episode) == 1
        if task.output == "caption":
            assert task.correct(f" {truth.upper()}.\nand more", episode) == 1
            assert task.correct("", episode) == 0
        if episode.candidates:
            assert episode.candidates.count(truth) == 1
            assert len(set(episode.candidates)) == len(episode.candidates) > 1
            assert [task.correct(c, episode) for c in episode.candidates].count(True) == 1


def test_pictures_boxes_and_captions_are_judged(data):
    """Pictures by colour, boxes by overlap, captions by share of what they should say."""
    for i in range(20):
        episode = BY_NAME["fast_binding_rgb"].draw("test", i, data)
        name = episode.query.inputs["caption"]
        for shot in episode.shots:
            judged = BY_NAME["fast_binding_rgb"].correct(shot.outputs["rgb"], episode)
            assert judged == (shot.inputs["caption"] == name)
    grounding = BY_NAME["grounding"]
    episode = grounding.draw("test", 0, data)
    (box,) = episode.query.outputs["boxes"]["bbox"]
    wide = box + [0, 0, 0, 0.9 * (box[3] - box[1])]
    assert grounding.correct({"bbox": [wide]}, episode) and not grounding.correct(
        {"bbox": [wide + [0, 0, 0, 1]]}, episode
    )
    assert not grounding.correct({"bbox": np.zeros((0, 4))}, episode)
    assert overlap([0, 0, 1, 1], [0.5, 0, 1.5, 1]) == pytest.approx(1 / 3)
    assert overlap([0, 0, 1, 1], [2, 2, 3, 3]) == 0
    scores = {
        BY_NAME["captioning"].correct("a large red cube", BY_NAME["captioning"].draw("test", i, data))
        for i in range(99)
    }
    assert min(scores) == 0 and any(0 < score < 1 for score in scores)


@pytest.mark.parametrize("name", ["fast_binding_2way", "fast_binding_5way", "pair_matching", "questions", "entailment"])
def test_every_prefix_is_balanced(name, data):
    """No label was shown two times more often than another; each is asked for."""
    places = Counter()
    for i in range(200):
        episode = BY_NAME[name].draw("train", i, data)
        answers = [shot.outputs["caption"] for shot in episode.shots]
        for length in range(9):
            counts = [answers[:length].count(label) for label in episode.candidates]
            assert max(counts) - min(counts) <= 1
        places[episode.candidates.index(episode.query.outputs["caption"]), len(episode.candidates)] += 1
    for (_, ways), count in places.items():  # the truth may be in any place
        assert count > 0.3 * sum(c for (_, w), c in places.items() if w == ways) / ways


def test_counts_are_balanced_and_of_one_attribute(data):
    """Counts are about equally frequent, and one value of an attribute explains all answers of an episode."""
    known, task = Known(SCENES, data), BY_NAME["counting"]
    values = [(name, value) for name in ("colour", "shape", "size") for value in NAMES[name]]
    answered = Counter()
    for split in ("train", "test"):
        for episode in examples(task, split, data, 60):
            answers = [int(shot.outputs["caption"]) for shot in episode]
            explained = [
                (name, value)
                for name, value in values
                if answers == [sum(o[name] == value for o in known(s.inputs["rgb"])["objects"]) for s in episode]
            ]
            assert any((value in TEST_VALUES) == (split == "test") for value in explained)
            shown = Counter(answers[:8]).values()
            assert max(shown) - min(shown) <= 1
            answered[answers[-1]] += 1
    assert max(answered.values()) < 0.6 * answered.total()


@pytest.mark.parametrize("name", ["fast_binding_2way", "fast_binding_5way", "reading", "pair_matching"])
def test_made_up_words_of_tests_are_new(name, data):
    assert not captions(BY_NAME[name], "train", data) & captions(BY_NAME[name], "test", data)


def test_made_up_words():
    train, test = made_up_words("train"), made_up_words("test")
    assert len({*train, *test}) == len(train) + len(test) and len(test) == 4000
    assert {len(word) for word in (*train, *test)} == {3, 4, 5}
    assert not {"red", "cube", "cone"} & {*train, *test}
    assert same_text("Dax. ", "dax") and not same_text("da x", "dax")


def test_kinds_of_tests_are_new(data):
    """Training shows the pairs that the simple scenes show in training, tests all others."""
    kinds = {split: set(KINDS.read(split, data)[1]) for split in ("train", "test")}
    simple = VARIANTS["simple"]
    assert kinds["train"] == {(c, s) for c in simple.colours for s in simple.shapes} - set(simple.heldout)
    assert len(kinds["train"]) == 15 and len(kinds["test"]) == 17 and not kinds["train"] & kinds["test"]
    for split, own in kinds.items():
        known = Known(KINDS.scenes, data)
        for task in (BY_NAME["fast_binding_5way"], BY_NAME["fast_binding_rgb"]):
            for episode in examples(task, split, data):
                objects = [known({**s.inputs, **s.outputs}["rgb"])["objects"][0] for s in episode]
                names = [s.outputs["caption"] if task.output == "caption" else s.inputs["caption"] for s in episode]
                bound = {(name, (o["colour"], o["shape"])) for name, o in zip(names, objects, strict=True)}
                assert len(bound) == len(dict(bound)) == len(set(dict(bound).values())) == task.ways
                assert set(dict(bound).values()) <= own
                if task.output == "rgb":
                    assert len({colour for colour, _ in dict(bound).values()}) == task.ways


def test_scenes_of_tests_have_held_out_kinds(data):
    known, heldout = Known(SCENES, data), set(VARIANTS["simple"].heldout)
    for name in ("questions", "entailment", "captioning", "grounding"):
        for split in ("train", "test"):
            for shot in (shot for episode in examples(BY_NAME[name], split, data) for shot in episode):
                shown = {(o["colour"], o["shape"]) for o in known(shot.inputs["rgb"])["objects"]}
                assert bool(shown & heldout) == (split == "test")
                words = tuple(shot.inputs.get("caption", "").split())[-2:]
                assert split == "test" or words not in heldout


def test_number_pairs_of_tests_are_new(data):
    """None is in training, but its mirror image is, and so is each of its results by each operator."""
    train, test = operators.PAIRS["train"], operators.PAIRS["test"]
    assert len(test) == 20 and len({*train, *test}) == 100 == len(train) + len(test)
    assert {(b, a) for a, b in test} <= set(train)
    for operator in OPERATORS.values():
        assert {operator(*pair) for pair in test} <= {operator(*pair) for pair in train}
    asked = {
        split: {s.inputs["caption"] for e in examples(BY_NAME["operator_induction_text"], split, data, 200) for s in e}
        for split in ("train", "test")
    }
    assert len(asked["test"]) == 20 and not asked["train"] & asked["test"]


def test_one_operator_explains_an_episode(data):
    for i in range(50):
        episode = BY_NAME["operator_induction_text"].draw("train", i, data)
        shots = [*episode.shots, episode.query]
        pairs = [tuple(int(x) for x in shot.inputs["caption"].split(" ? ")) for shot in shots]
        answers = [int(shot.outputs["caption"]) for shot in shots]
        assert any(answers == [operator(*pair) for pair in pairs] for operator in OPERATORS.values())
        assert len(set(pairs)) == 9 and len(episode.candidates) == 3


def test_one_attribute_explains_matches(data):
    known, task = Known(KINDS.scenes, data), BY_NAME["pair_matching"]
    for episode in examples(task, "test", data):
        pairs = [[known(image)["objects"][0] for image in shot.inputs["rgb"]] for shot in episode]
        answers = [shot.outputs["caption"] for shot in episode]
        meanings = [
            {(a[name] == b[name], answer) for (a, b), answer in zip(pairs, answers, strict=True)}
            for name in ("colour", "shape")
        ]
        assert any(len(meaning) == 2 for meaning in meanings)
        assert all((shot.inputs["rgb"][0] != shot.inputs["rgb"][1]).any() for shot in episode)


def test_questions_statements_and_phrases_are_answered_truly(data):
    known = Known(SCENES, data)
    for split in ("train", "test"):
        for shot in (shot for episode in examples(BY_NAME["questions"], split, data) for shot in episode):
            asked = {(q, a) for _, q, a in ask(known(shot.inputs["rgb"])["objects"])}
            assert (shot.inputs["caption"], shot.outputs["caption"]) in asked
            assert len({q for q, _ in asked}) == len(asked)
        for shot in (shot for episode in examples(BY_NAME["entailment"], split, data) for shot in episode):
            shown = {(o["colour"], o["shape"]) for o in known(shot.inputs["rgb"])["objects"]}
            *start, colour, shape = shot.inputs["caption"].split()
            assert start == ["there", "is", "a"]
            assert ((colour, shape) in shown) == (shot.outputs["caption"] == "yes")
        for shot in (shot for episode in examples(BY_NAME["grounding"], split, data) for shot in episode):
            scene, boxes = known(shot.inputs["rgb"]), shot.outputs["boxes"]
            said = [f"{o['colour']} {o['shape']}" for o in scene["objects"]]
            assert said.count(shot.inputs["caption"]) == 1
            place = said.index(shot.inputs["caption"])
            np.testing.assert_array_equal(boxes["bbox"], scene["boxes"]["bbox"][place][None])
            assert boxes["label"] == [scene["objects"][place]["shape"]]


def test_words_are_drawn_in_boxes(data):
    """The box around the answer has the same colour in all images of an episode; no other box has."""
    for episode in examples(BY_NAME["reading"], "train", data):
        colours = [{c for c, rgb in BOXES.items() if (s.inputs["rgb"] == rgb).all(-1).any()} for s in episode]
        assert all(len(found) == 3 for found in colours) and set.intersection(*colours)


@every_task
def test_source_round_trip(task, data):
    """Records are the examples in order, and a seed gives other episodes; the recipe survives JSON and pickle."""
    source = EpisodeSource(task=task, num_train=3, num_test=2)
    assert from_json(json.loads(json.dumps(to_json(source)))) == source
    for name, count in (("train", 3), ("test", 2)):
        split = pickle.loads(pickle.dumps(source.split(name, data)))
        assert len(split) == count * source.records == count * 9 * max(1, task.images)
        for i in range(count):
            episode = task.draw(name, i, data)
            wanted = [record for shot in (*episode.shots, episode.query) for record in raw_examples(shot)]
            found = [split[i * source.records + k] for k in range(source.records)]
            assert pickle.dumps(wanted) == pickle.dumps(found)
        with pytest.raises(IndexError, match=task.name):
            split[len(split)]
    other = replace(source, seed=1).split("train", data)
    assert pickle.dumps(other[0]) != pickle.dumps(source.split("train", data)[0])
    with pytest.raises(ValueError, match="'validation'.*train, test"):
        source.split("validation", data)


def test_raw_examples():
    """The wording of records that tokenizers and packing rely on."""
    one, two = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    asked = Shot(inputs={"rgb": [one, two], "caption": (1, " ? ", 2)}, outputs={"caption": "7"})
    first, second = raw_examples(asked)
    assert first["rgb"] is one and first["caption"] == (1, " ? ", 2, 0, "7") and list(second) == ["rgb"]
    assert second["rgb"] is two
    assert raw_examples(Shot(inputs={"caption": "3 ? 4"}, outputs={"caption": "7"})) == [{"caption": ("3 ? 4", 0, "7")}]
    assert raw_examples(Shot(inputs={"rgb": one}, outputs={"caption": "dax"})) == [{"rgb": one, "caption": "dax"}]
    assert raw_examples(Shot(inputs={"caption": "dax"}, outputs={"rgb": one})) == [{"caption": "dax", "rgb": one}]


def test_errors_name_what_is_wrong(data, tmp_path):
    with pytest.raises(ValueError, match="ways=16.*only 15 kinds"):
        FastBinding(kinds=KINDS, ways=16).draw("train", 0, data)
    with pytest.raises(ValueError, match="'pictures'.*image, text, interleaved"):
        OperatorInduction(form="pictures")
    with pytest.raises(ValueError, match="apt-get install tuxpaint-stamps-default"):
        FastBinding(kinds=StampKinds(stamps=Stamps(path=str(tmp_path)))).prepare(tmp_path)
    with pytest.raises(ValueError, match="prepare"):
        BY_NAME["counting"].draw("train", 0, tmp_path)
    assert counting.FEWEST > 9  # else an episode could need more scenes of one count than there are


@pytest.mark.skipif(not Path(CORPUS).is_dir(), reason="apt-get install tuxpaint-stamps-default")
def test_categories_of_tests_are_new(tmp_path):
    kinds = StampKinds(stamps=Stamps(max_objects=1, num_train=250, num_validation=1, num_test=250))
    task = FastBinding(kinds=kinds, ways=5)
    task.prepare(tmp_path)
    shown = {split: set(kinds.read(split, tmp_path)[1]) for split in ("train", "test")}
    assert shown["test"] == set(HELD_OUT) and not shown["train"] & shown["test"] and len(shown["train"]) >= 5
    episode = task.draw("test", 0, tmp_path)
    assert task.name == "fast_binding_5way_stamps" and task.correct(episode.query.outputs["caption"], episode)


# ---- VL-ICL Bench as it is released ---------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path) -> Path:
    """Two or more entries of several of its data sets; image k is plain, of brightness k."""
    numbers = iter(range(256))

    def image(dataset: str, part: str) -> str:
        k = next(numbers)
        path = tmp_path / dataset / part / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (k, k, k)).save(path)
        return path.relative_to(tmp_path).as_posix()

    def save(dataset: str, part: str, entries: list):
        (tmp_path / dataset / f"{part}.json").write_text(json.dumps(entries))

    result = "What is the result of the following mathematical expression?"
    for name, count in (("operator_induction", 1), ("operator_induction_interleaved", 2)):
        entry = lambda part: {"image": [image(name, part) for _ in range(count)], "question": result}  # noqa: B023, E731
        save(name, "support", [{**entry("support"), "answer": [a + 1, a - 1, a]} for a in range(10, 20)])
        save(name, "query", [{**entry("query"), "operator": "x", "answer": 42, "id": "0"}])

    classes = ["dax", "blicket", "wug"]
    support = {name: {"images": [image("open_mi", "support") for _ in range(5)], "caption": name} for name in classes}
    query = {"image": [image("open_mi", "query")], "question": "This is a", "classes": classes, "support": support}
    save("open_mi", "support", [{"image": ["unused"]}])
    save("open_mi", "query", [{**query, "answer": "wug"}])
    drawn = {"id": "0", "question": "Generate a wug", "classes": classes, "support": support}
    (tmp_path / "open_t2i_mi").mkdir()
    save("open_t2i_mi", "support", [{"image": "unused"}])
    save("open_t2i_mi", "query", [{**drawn, "task_label": "wug", "answer": "lion"}])

    def pair(part: str, answer: str) -> dict:
        images = [image("matching_mi", part) for _ in range(2)]
        return {"image": images, "question": "Do the two images satisfy the induced relationship?", "answer": answer}

    save("matching_mi", "support", [{"same": pair("support", "Yes"), "diff": pair("support", "No")} for _ in range(9)])
    save("matching_mi", "query", [pair("query", "No")])

    def latent(value: str, part: str) -> dict:
        where = {"task": "colour", "latent": "object", "object": value, "attribute": "red"}
        return {**where, "question": "red", "answer": [value, "red"], "image": image("cobsat", part)}

    save("cobsat", "support", [latent(value, "support") for value in ["car"] * 8 + ["box"] * 8])
    save("cobsat", "query", [latent("box", "query")])
    return tmp_path


def brightness(rgb: np.ndarray) -> int:
    return int(rgb[0, 0, 0])


def test_released_operators(bench):
    task = VLICL(folder=str(bench), dataset="operator_induction", size=8)
    task.prepare(bench)
    episode = task.draw("test", 0, bench)
    assert task.num_queries == 1 and episode.query.outputs["caption"] == "42" and task.correct("42", episode)
    for shot in episode.shots:  # image k of the support has the products 10 + k
        assert shot.inputs["rgb"].shape == (8, 8, 3)
        assert shot.outputs["caption"] == str(10 + brightness(shot.inputs["rgb"]))
    assert len({shot.outputs["caption"] for shot in episode.shots}) == 8
    episode = VLICL(folder=str(bench), dataset="operator_induction_interleaved", size=8).draw("test", 0, bench)
    assert [len(shot.inputs["rgb"]) for shot in (*episode.shots, episode.query)] == [2] * 9


def test_released_classes(bench):
    task = VLICL(folder=str(bench), dataset="open_mi", size=8)
    support = json.loads((bench / "open_mi" / "query.json").read_text())[0]["support"]
    number = {name: {int(Path(path).stem) for path in s["images"]} for name, s in support.items()}
    others = set()
    for i in range(20):
        episode = task.draw("test", i, bench)
        answers = [shot.outputs["caption"] for shot in episode.shots]
        assert sorted(Counter(answers).values()) == [4, 4] and set(answers) == set(episode.candidates)
        assert all(brightness(s.inputs["rgb"]) in number[s.outputs["caption"]] for s in episode.shots)
        assert len({brightness(s.inputs["rgb"]) for s in episode.shots}) == 8
        assert episode.query.outputs["caption"] == "wug" and task.correct("Wug", episode)
        others |= set(answers)
    assert others == {"dax", "blicket", "wug"}


def test_released_pairs_and_pictures(bench):
    task = VLICL(folder=str(bench), dataset="matching_mi", size=8)
    episode = task.draw("test", 0, bench)
    answers = [shot.outputs["caption"] for shot in episode.shots]
    assert all({answers[i], answers[i + 1]} == {"Yes", "No"} for i in range(0, 8, 2))
    assert sorted(episode.candidates) == ["No", "Yes"] and task.correct("no", episode)

    task = VLICL(folder=str(bench), dataset="cobsat", size=8)
    support = json.loads((bench / "cobsat" / "support.json").read_text())
    boxes = {int(Path(e["image"]).stem) for e in support if e["object"] == "box"}
    episode = task.draw("test", 0, bench)
    assert {brightness(shot.outputs["rgb"]) for shot in episode.shots} == boxes
    with pytest.raises(ValueError, match="model judge"):
        task.correct(episode.query.outputs["rgb"], episode)

    episode = VLICL(folder=str(bench), dataset="open_t2i_mi", size=8).draw("test", 0, bench)
    assert episode.query.inputs == {"caption": "Generate a wug"} and not episode.query.outputs
    assert {shot.inputs["caption"] for shot in episode.shots} > {"Generate a wug"}


def test_errors_name_the_released_file(bench):
    task = VLICL(folder=str(bench), dataset="operator_induction", size=8)
    with pytest.raises(ValueError, match="tests alone.*allowed: test"):
        task.draw("train", 0, bench)
    with pytest.raises(ValueError, match="'operator'.*operator_induction, "):
        replace(task, dataset="operator")
    with pytest.raises(ValueError, match=r"clevr/support.json.*git clone"):
        replace(task, dataset="clevr").prepare(bench)
    (bench / "operator_induction" / "support" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"support/0.png: cannot be read.*unzip.sh"):
        [task.draw("test", i, bench) for i in range(20)]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[{", "query.json: not JSON"),
        ('[{"operator": "+", "operator": "x"}]', "query.json: .*'operator' is there twice"),
        ("[" * 5000, "query.json: .*nested too deeply"),
        ('[{"image": [3], "operator": "+", "question": "?", "answer": 4}]', "query 0 of .*the names of 1 images"),
        ('[{"image": ["0.png"], "operator": "+", "question": 3, "answer": 4}]', "query 0 of .*3 instead of a question"),
        ("{}", "query.json must hold a list of objects"),
        ('[{"image": ["0.png"], "answer": "4"}]', "query 0 of .*query.json.*KeyError 'operator'"),
        ('[{"image": ["0.png"], "operator": "+", "question": "?"}]', "query 0 of .*query.json.*KeyError 'answer'"),
        (
            '[{"image": [], "operator": "+", "question": "?", "answer": 4}]',
            "query 0 of .*instead of the names of 1 images",
        ),
    ],
)
def test_broken_released_files_are_named(bench, content, match):
    (bench / "operator_induction" / "query.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        VLICL(folder=str(bench), dataset="operator_induction").draw("test", 0, bench)


def test_a_signal_under_another_name(data):
    """Inputs, outputs and what is asked for; answers are judged as they were."""
    task = OperatorInduction(form="interleaved")
    renamed = Renamed(task=task, old="caption", new="text")
    assert (renamed.name, renamed.output, renamed.images, renamed.max_shots) == (task.name, "text", 2, 8)
    plain, other = task.draw("test", 5, data), renamed.draw("test", 5, data)
    for a, b in zip((*plain.shots, plain.query), (*other.shots, other.query), strict=True):
        assert b.inputs["text"] == a.inputs["caption"] and b.outputs == {"text": a.outputs["caption"]}
        assert all(np.array_equal(x, y) for x, y in zip(a.inputs["rgb"], b.inputs["rgb"], strict=True))
    answer = plain.query.outputs["caption"]
    assert renamed.correct(answer, other) and not renamed.correct(answer + "1", other)
    assert Renamed(task=FastBindingRgb(), old="caption", new="text").output == "rgb"
