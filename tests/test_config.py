"""Reading a configuration, and the one line for each way to get it wrong."""

from pathlib import Path

import pytest

from fastmum.config import ConfigError, describe_keys, load_config
from fastmum.config.load import find_config, peek_task
from fastmum.config.mum import Config
from fastmum.config.schema import absolute_paths
from fastmum.pretrained.load import absolute_spec
from fastmum.tasks import find_task
from fastmum.tasks.reconstruction.model import ReconstructionConfig
from fastmum.tasks.roma.config import Config as RomaConfig


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_defaults_then_file_then_command_line(file):
    path = file("run: {name: mine, seed: 3}\ntrain: {steps: 10}\n")
    config = load_config(path, ["train.steps=20", "data.views=[2,4]", "data.root=null"])
    assert (config.run.seed, config.train.steps, config.data.views) == (3, 20, [2, 4])
    assert config.run.dir == "runs/mine"
    assert config.train.keep_checkpoints == Config().train.keep_checkpoints


def test_keys_without_a_section_and_what_is_derived_from_keys():
    words = ["precision=fp32", "optimizer=apex", "weights={co3d: 2}", "root=/x", "profile.steps=10-15"]
    config = load_config(None, [*words, "model.preset=mum_tiny", "model.depth=3", "data.views=[30,40]"])
    assert (config.train.precision, config.optim.optimizer, config.data.weights) == ("fp32", "apex", {"co3d": 2})
    assert (config.model_config.embed_dim, config.model_config.depth) == (192, 3)
    assert config.data.views == [30, 40]  # not limited by the embedded scenes, because there is a root
    assert config.profile.window == range(10, 16)
    assert load_config(None, ["profile.steps=7"]).profile.window == range(7, 8)
    assert load_config(None).profile.window == range(0)


def test_weights_are_a_table_of_the_users_own_keys_and_what_is_printed_can_be_read_again(file):
    path = file("data: {weights: {co3d: 2, dl3dv: 1}, manifests: [a.arrow]}\ntrain:\nmodel: {preset: mum_tiny}\n")
    config = load_config(path, ["data.weights.co3d=0.5", "data.weights={imagenet: 3}", "run.name=a"])
    assert config.data.weights == {"co3d": 0.5, "dl3dv": 1, "imagenet": 3}
    assert config.data.manifests == ["a.arrow"]
    assert load_config(file(config.to_yaml())) == config


WORDS = [
    "/data/scene #1", "007", "1e3", "0x10", "1_000", "12:30", "2024-01-01", "yes", "off", "null", "- a", "a:", "a: b",
    " a ", "[1]", "{a: b}", "&a", "!!int 3", "C:\\a", "ä日本",
]  # fmt: skip


def test_words_stay_words_and_quotes_are_removed(file):
    for word in WORDS:
        config = load_config(None, [f"run.name={word}", f"data.root='{word}'"])
        assert (config.run.name, config.data.root) == (word, word)
    words = [word for word in WORDS if word not in ("[1]", "{a: b}", " a ")]
    config = load_config(None, [f"data.manifests=[{','.join(words)}, 'a, b']", "data.root=12:30"])
    assert (config.data.manifests, config.data.root) == ([*words, "a, b"], "12:30")
    config.data.manifests = WORDS
    assert load_config(file(config.to_yaml())) == config


def test_words_of_files_are_not_typed_by_yaml_and_numbers_are_decimal(file):
    text = "run: {name: 007, task: on}\ntrain: {steps: 010, threads: 1e1, checkpoint_async: no}\ndata: {root: ~}\n"
    for path in (file(text), file("\ufeff" + text)):
        words = ["data.views=[02,010]", "data.weights.my.set=2", "data.weights={007: 1}", "clip=010"]
        config = load_config(path, words)
        assert (config.run.name, config.run.task, config.train.checkpoint_async) == ("007", "on", False)
        assert (config.train.steps, config.train.threads, config.data.views) == (10, 10, [2, 10])
        assert (config.data.weights, config.optim.clip, config.data.root) == ({"my.set": 2, "007": 1}, 10.0, None)
    assert load_config(None, ["data.root=~"]).data.root == "~"
    assert load_config(file("data: {root: /a # 1\n}")).data.root == "/a"


def error_of(*arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trian: {steps: 3}", ["'trian.steps'", "nearest valid key is 'train.steps'"]),
        ("train: {stpes: 3}", ["'train.stpes'", "nearest valid key is 'train.steps'"]),
        ("train: {steps: abc}", ["'train.steps'", "'abc'", "int"]),
        ("train: 5", ["'train'", "section"]),
        ("- a", ["sections"]),
        ("a: [b", ["YAML"]),
        ("[" * 1000, ["YAML"]),
        ("train: {steps: 1, steps: 2}", ["'steps' twice"]),
        ("data:\n  root: /data/scene #1\n", ["'data.root'", "'/data/scene #1'", "Quote"]),
        ("data: {weights: [co3d]}", ["'data.weights'"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(file, text, words):
    error = error_of(file(text))
    assert all(word in error for word in [*words, "run.yaml"]), error


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.steps=x", "'train.steps' in the command line is 'x', but must be int"),
        ("train.steps=12:30", "'train.steps' in the command line is '12:30'"),
        ("train.steps=1.5", "'train.steps' in the command line is '1.5'"),
        ("train.steps=1e30", "'train.steps' in the command line is '1e30'"),
        ("run.seed=" + "9" * 400, "'run.seed' in the command line is '9"),
        ("run.seed=9223372036854775808", "'run.seed' in the command line is '9223372036854775808'"),
        ("optim.base_lr=nan", "'optim.base_lr' in the command line is 'nan'"),
        ("run.name=", "'run.name' in the command line is ''"),
        ("run.name=???", "'run.name' in the command line"),
        ("data.root=${x", "'data.root' in the command line"),
        ("train.steps", "not of the form key.sub=value"),
        ("=3", "not of the form key.sub=value"),
        ("train.steps.deep=1", "nearest valid key is 'train.steps'"),
        ("data.views=3", "must be list"),
        ("data.views=[4,2]", "data.views is [4, 2]"),
        ("data.views=[1,2", "must be list[int]"),
        ("data.views=[2,500]", "at most data.frames_per_batch"),
        ("data.image_size=250", "multiple of the patch size 16"),
        ("data.weights={a: -1}", "data.weights.a is -1"),
        ("data.weights=3", "'data.weights' in the command line is '3', but must be dict"),
        ("data.weights=[co3d]", "'data.weights' in the command line is '[co3d]'"),
        ("data.weights={a: {b: 1}}", "'data.weights.a'"),
        ("data.weights={a: b}", "'data.weights.a' in the command line is 'b', but must be a number"),
        ("data.imagenet_share=2", "data.imagenet_share is 2"),
        ("data.crop_scale=[0.2,2]", "data.crop_scale"),
        ("model.preset=huge", "mum_vitl16, mum_vitl16_released, mum_vitb16, mum_tiny"),
        ("model.embed_dim=100", "model.embed_dim is 100"),
        ("model.mask_ratio=1", "model.mask_ratio"),
        ("train.precision=fp16", "train.precision is fp16, but must be one of bf16, fp32, fp8, auto"),
        ("optimizer=adam", "optim.optimizer is adam, but must be one of adamw, muon, apex"),
        ("parallel.strategy=tp", "one of ddp, fsdp2, hsdp"),
        ("parallel.reduce=fp16", "one of fp32, bf16"),
        ("parallel.dead_after_s=0", "at least 1"),
        ("data.frames_per_step=100", "a positive multiple of data.frames_per_batch (96)"),
        ("profile.steps=5-2", "profile.steps is '5-2'"),
        ("profile.steps=x", "profile.steps is 'x'"),
        ("steps=3", "'steps' on the command line may be train.steps or profile.steps"),
        ("train.log_every=0", "train.log_every is 0"),
        ("run.dir=${run.foo}", "run.foo"),
        ("run.seed=-1", "run.seed is -1"),
        ("optim.eps=0", "optim.eps is 0"),
        ("model.mask_ratio=0.999", "model.mask_ratio is 0.999 for frames of 256 patches"),
    ],
)
def test_a_wrong_word_is_one_line_that_names_it(word, message):
    assert message in error_of(None, [word])


def test_a_missing_file_names_the_nearest(file):
    path = file("")
    assert f"did you mean '{path}'" in error_of(path.with_name("runs.yaml"))


def test_a_folder_as_file_is_called_a_folder_and_its_configuration_named(tmp_path, file):
    file("").rename(tmp_path / "config.yaml")
    assert f"is a folder, but a YAML file is expected; did you mean '{tmp_path}/config.yaml'" in error_of(tmp_path)


def test_every_key_has_a_meaning():
    assert all(key.meaning for key in describe_keys())


def test_the_configurations_that_come_with_it():
    names = ("quickstart", "mum_vitl16", "mum_vitb16", "mum_vitl16_muon", "evidence/mum", "evidence/mae")
    quickstart, paper, base, muon, mum, mae = (load_config(find_config(name)) for name in names)
    assert (quickstart.run.name, paper.run.name, base.run.name, muon.run.name) == names[:4]
    assert (muon.optim.optimizer, muon.model, muon.data) == ("muon", paper.model, paper.data)
    assert paper.data.views == [2, 24]
    assert paper.data.frames_per_batch == 96
    assert paper.data.image_size == 256
    assert (paper.optim.base_lr, paper.optim.warmup_steps, paper.train.steps) == (1e-4, 25_000, 500_000)
    assert (paper.optim.betas, paper.optim.weight_decay) == ([0.9, 0.95], 0.05)
    assert (mum.data.views, mae.data.views) == ([1, 8], [1, 1])
    kinds = {"reconstruction": [], "reconstruction_light": [], "reconstruction_quickstart": [],
             "reconstruction_distill": ["distill.teacher=runs/teacher"]}  # fmt: skip
    found = {}
    for name, words in kinds.items():
        file = find_config(name)
        found[name] = load_config(file, ["encoder=runs/mine", *words], find_task(peek_task(file, words)).Config)
        assert (found[name].run.name, found[name].model.encoder) == (name, "runs/mine")
    default, paper = ReconstructionConfig(), found["reconstruction"]  # supplement B
    assert paper.model.sizes(1024, 16) == default
    assert paper.optim == type(paper)().optim
    assert (paper.data.frames_per_batch, paper.data.image_size, paper.train.steps) == (48, 512, 100_000)
    assert (paper.model.finetune, found["reconstruction_distill"].model.finetune) == (False, True)
    mae.data.views, mae.run.name, mae.run.dir = mum.data.views, mum.run.name, mum.run.dir
    assert mae == mum


def test_weights_are_found_from_any_folder(tmp_path, monkeypatch):
    """In a run's configuration the paths of weights are absolute, and names stay names."""
    monkeypatch.chdir(tmp_path)
    for given, expected in {
        "runs/a": f"{tmp_path}/runs/a", "mae:a b.pth": f"mae:{tmp_path}/a b.pth", "~/a.pth": f"{Path.home()}/a.pth",
        "random:mum_tiny": "random:mum_tiny", "timm:vit_small": "timm:vit_small",
    }.items():  # fmt: skip
        config = load_config("roma_quickstart", [f"model.encoder={given}"], RomaConfig)
        model = absolute_paths(config, absolute_spec).model
        assert (model.encoder, model.fine, model.fallback) == (expected, "random", "random:mum_tiny")
