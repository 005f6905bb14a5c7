"""Configs: JSON and back, errors with the closest match, imports in one direction, the README's set-up commands."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

import m4
from m4.checkpoints.hub import packaged
from m4.config import from_cli, load_config
from m4.data.dataset import Dataset
from m4.in_context.independent_items import IndependentItems
from m4.in_context.similarity_prior import SimilarityPrior
from m4.masking.dirichlet import DirichletMasking
from m4.masking.episodes import EpisodeMasking
from m4.objectives.contrastive import Contrast
from m4.objectives.distillation import Distillation
from m4.objectives.masked_modeling import MaskedModeling
from m4.objectives.word_prediction import WordPrediction
from m4.registry import component_class, from_json, to_json
from m4.tokens.modality import Features, Grid, Modalities


@pytest.fixture(scope="module")
def quickstart():
    return load_config(str(ROOT / "configs/quickstart.py"))


def test_config_survives_json(quickstart):
    quickstart.check()
    text = json.dumps(to_json(quickstart))
    assert from_json(json.loads(text)) == quickstart


def test_unknown_field_and_component_are_named(quickstart):
    content = to_json(quickstart)
    with pytest.raises(ValueError, match="Did you mean 'batch_size'"):
        from_json({**content, "batchsize": 1})
    with pytest.raises(ValueError, match="unknown component 'dept'.*Did you mean 'depth'"):
        component_class("dept")
    for name in ("os:system", "m4.registry:write_atomically", "m4.nothing_here"):
        with pytest.raises((ValueError, ModuleNotFoundError)):
            component_class(name)


def test_saved_names_are_those_of_classes(quickstart):
    """Not of modules, so that files may move; what 0.1 wrote is read for good."""
    import m4_tokenizers

    text = json.dumps(to_json(quickstart))
    assert not re.search(r'"component": "[^"]*[.:]', text)
    packages = [m4, m4_tokenizers]
    names = [
        name
        for package in packages
        for file in Path(package.__path__[0]).rglob("*.py")
        for name in re.findall(r"^class ([A-Z]\w*)", file.read_text(), re.MULTILINE)
    ]
    assert len(names) == len(set(names)) > 200, [n for n in names if names.count(n) > 1]
    assert (
        component_class("ModelConfig")
        is component_class("m4.model.encoder_decoder:ModelConfig")
        is type(quickstart.model)
    )
    assert component_class("m4.old.place:ModelConfig") is type(quickstart.model)


def test_a_config_of_0_1_is_told_where_classes_have_gone(tmp_path):
    (tmp_path / "old.py").write_text("import m4\nfrom m4.modality import Grid, Sequence\nconfig = 1\n")
    with pytest.raises(ValueError, match=r"old.py, line 2.*write; from m4.tokens.modality import Grid; from m4.tok"):
        load_config(str(tmp_path / "old.py"))


def test_old_names_of_classes_and_fields(tmp_path):
    """Are read in files, and named in configs."""
    old = {"component": "m4.model:ModelConfig", "separate_depth": 2, "encoder_depth": 3}
    assert from_json(old).extensions == (IndependentItems(num_blocks=2),)
    old = {"component": "m4.model:ModelConfig", "lora": {"component": "m4.lora:LoRA", "rank": 2}, "adapter_size": 3}
    new = from_json({**old, "num_registers": 4, "match_size": 8, "match_words": "caption", "shot_depth": 1})
    assert {type(e).__name__ for e in new.extensions} == {
        "LoRA", "Bottleneck", "Registers", "SimilarityPrior", "ExampleEncoder",
    }  # fmt: skip
    assert component_class("m4.evals.suite:Direction").__name__ == "ConditionalTask"
    task = {"component": "m4.evals.suite:Direction", "name": "one", "inputs": [], "target": "depth", "scheme": 1}
    assert from_json({**task, "measure": 2, "through": []}).metric == 2
    (tmp_path / "a.py").write_text("from m4.evals.suite import Direction\n")
    (tmp_path / "b.py").write_text("from m4.model.config import ModelConfig\nconfig = ModelConfig(separate_depth=2)\n")
    known = "name='a', inputs=(), target='b', scheme=1, metric=1"
    text = (
        f"from m4.evaluation.conditional_generation import ConditionalTask\nconfig = ConditionalTask({known}, {{}}=1)\n"
    )
    for old_name, new_name in (("measure", "metric"), ("through", "intermediate")):
        (tmp_path / "c.py").write_text(text.format(old_name))
        with pytest.raises(ValueError, match=f"since m4 0.2 it is {new_name}"):
            load_config(str(tmp_path / "c.py"))
    with pytest.raises(ValueError, match="import ConditionalTask"):
        load_config(str(tmp_path / "a.py"))
    with pytest.raises(ValueError, match="since m4 0.2 it is extensions=.IndependentItems"):
        load_config(str(tmp_path / "b.py"))


def test_command_line_overrides_fields(quickstart):
    path = str(ROOT / "configs/quickstart.py")
    changed = from_cli("", [path, "--num-steps", "7", "--model.width", "48", "--datasets.0.source.num-train", "99"])
    assert changed == dataclasses.replace(
        quickstart,
        num_steps=7,
        model=dataclasses.replace(quickstart.model, width=48),
        datasets=(Dataset(source=dataclasses.replace(quickstart.datasets[0].source, num_train=99)),),
    )


def test_names_resolve_as_users_say_them(modalities):
    assert modalities.as_input("rgb").name == "rgb_pixels"
    assert modalities.as_input("rgb_tokens").name == "rgb_tokens"
    assert modalities.as_target("rgb").name == "rgb_tokens"
    assert modalities.as_input("depth").name == modalities.as_target("depth").name == "depth_tokens"
    with pytest.raises(ValueError, match="'rgb_pixels' is input only"):
        modalities.as_target("rgb_pixels")
    with pytest.raises(ValueError, match="unknown modality 'dept'.*Did you mean 'depth'"):
        modalities.as_target("dept")
    with pytest.raises(ValueError, match="given twice"):
        Modalities([modalities[1], modalities[1]])


def test_a_new_modality_adds_rows_at_the_end(modalities):
    new = Grid(name="thermal", signal="thermal", vocab_size=13, shape=(2, 2))
    more = Modalities([*modalities, new])
    before, after = (x.offsets(lambda m: m.vocab_size) for x in (modalities, more))
    assert after == (*before, before[-1] + 13)
    assert not any(m.vocab_size for m in modalities if isinstance(m, Features))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_holds_together(path, monkeypatch, tmp_path):
    """Those that go on from the quickstart find a trained model with its modalities in its place."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(packaged()["scenes"])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    load_config(str(path)).check()


def test_the_readme_has_exactly_the_two_set_up_commands():
    text = (ROOT / "README.md").read_text()
    installs = [line.strip() for line in text.splitlines() if "pip install -e" in line]
    assert installs == [
        "pip install -e . && python train.py configs/quickstart.py",
        'pip install -e ".[test]" && pytest',
    ]


def test_every_field_of_a_config_of_0_1_is_read():
    """Methods that had fields of their own are today's objectives, extensions, maskings and evaluators."""
    old = json.loads((ROOT / "tests/data/runs_0.1/run/config.json").read_text())
    plain = from_json(old)
    assert plain.objectives == (MaskedModeling(),) and plain.model.extensions == plain.evaluators == ()
    mixture = old["masking"]["strategies"]
    shots = {"component": "m4.shots:ShotMasking", "num_examples": 3, "labelled": [1, 2]}
    datasets = [
        {**old["datasets"][0], "strategies": mixture, "name": "own"},
        {**old["datasets"][0], "shots": shots, "name": "episodes"},
    ]
    contrast = {"component": "m4.contrast:Contrast", "a": ["rgb_pixels"], "b": ["caption"]}
    retrieval = {"component": "m4.evals.retrieval:Retrieval", "b": ["caption"]}
    new = from_json({
        **old, "loss": "token", "z_loss": 1e-3, "teacher": "scenes", "distill": 0.5, "contrast": contrast,
        "retrieval": [retrieval, {**retrieval, "label": "caption"}], "datasets": datasets,
        "fewshot": {"component": "m4.evals.fewshot:FewShot"},
        "model": {**old["model"], "match_size": 8, "match_words": "caption", "norm_bias": True},
    })  # fmt: skip
    distillation, words, contrastive = new.objectives
    assert distillation == Distillation(weighting="token", z_loss=1e-3, teacher="scenes", share=0.5)
    assert words == WordPrediction(text="caption") and contrastive == Contrast(a=("rgb_pixels",), b=("caption",))
    assert [e.name for e in new.evaluators] == ["fewshot", "retrieval", "retrieval"]
    assert new.datasets[0].masking == DirichletMasking(strategies=plain.masking.strategies)
    assert new.datasets[1].masking == EpisodeMasking(num_examples=3, labelled=(1, 2))
    assert new.model.extensions == (SimilarityPrior(size=8, words="caption"),) and new.model.biases == ("norm",)
    assert from_json(json.loads(json.dumps(to_json(new)))) == new
