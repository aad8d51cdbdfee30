"""Models: structure against torchvision and published figures, weights checked key by key, the digits network."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.data import Data, load_data, to_input
from ranksearch.errors import ModelError
from ranksearch.models import MODELS, build_model, digits_weights, find_weights, load_weights, train_digits_cnn
from ranksearch.space import DataSpec, ModelSpec

PUBLISHED = {
    # Parameters and GMACs on 224x224 in the documentation of torchvision's weights.
    "resnet18": (11_689_512, 1.814),
    "resnet34": (21_797_672, 3.664),
    "resnet50": (25_557_032, 4.089),
    "vgg16": (138_357_544, 15.47),
    "vgg16_bn": (138_365_992, 15.47),
    "densenet121": (7_978_856, 2.834),
}
CIFAR_PARAMS_MILLION = {
    # He et al. (2015), table 6.
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet44": 0.66,
    "resnet56": 0.85,
    "resnet110": 1.7,
}


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name](**options).eval()


def counted_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_imagenet_networks_have_the_published_size(name: str) -> None:
    model = on_meta(name)
    params, gmacs = PUBLISHED[name]
    assert parameters(model) == params
    assert counted_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.parametrize("name", CIFAR_PARAMS_MILLION)
def test_cifar_networks_have_the_published_size(name: str) -> None:
    digits = 1 if name == "resnet110" else 2
    assert round(parameters(on_meta(name)) / 1e6, digits) == CIFAR_PARAMS_MILLION[name]


def test_resnet20_macs_on_cifar() -> None:
    assert counted_macs(on_meta("resnet20"), (3, 32, 32)) / 1e6 == pytest.approx(40.55, abs=0.01)


@pytest.fixture(scope="module")
def torchvision_models() -> Iterator[object]:
    try:
        yield importlib.import_module("torchvision.models")
        return
    except ModuleNotFoundError as error:
        pytest.skip(f"torchvision is not installed: {error}")
    except RuntimeError:  # a wheel for another build of torch lacks its compiled operators
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    # The schemas of those operators are all that its models need.
    library = torch.library.Library("torchvision", "DEF")
    for schema in ("nms(Tensor d, Tensor s, float t) -> Tensor", "qnms(Tensor d, Tensor s, float t) -> Tensor"):
        library.define(schema)
    yield importlib.import_module("torchvision.models")


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_equals_torchvisions(name: str, torchvision_models: object) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision_models, name)().state_dict()
    ours = on_meta(name).state_dict()
    assert [(key, x.shape, x.dtype) for key, x in ours.items()] == [(k, x.shape, x.dtype) for k, x in theirs.items()]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16_bn", "densenet121"])
def test_outputs_equal_torchvisions_with_the_same_weights(name: str, torchvision_models: object) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision_models, name)(num_classes=7).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as of a trained network, not 0 and 1
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    ours = MODELS[name](num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))


def test_option_a_shortcut_subsamples_and_pads() -> None:
    model = build_model(ModelSpec(name="resnet20"), weights=None)
    x = torch.randn(2, 16, 8, 8)
    y = model.get_submodule("layer2.0.shortcut")(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_option_b_shortcut_has_weights() -> None:
    model = build_model(ModelSpec(name="resnet20", options={"shortcut": "B", "num_classes": 100}), weights=None)
    keys = model.state_dict()
    assert keys["layer2.0.shortcut.0.weight"].shape == (32, 16, 1, 1)
    assert not any(key.startswith("layer1.0.shortcut") for key in keys)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 100)


def test_build_is_repeatable_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (build_model(ModelSpec(name="resnet20"), weights=None) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, second.state_dict()[key]) for key, x in first.state_dict().items())
    assert not first.training


FACTORIES = """
import torch
from torch import nn
def good(width=2):
    return nn.Sequential(nn.Conv2d(3, width, 1).half())
def nan():
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, float("nan"))
    return layer
def number():
    return 3
def crash():
    raise RuntimeError("the disk is on fire")
value = 5
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)
    return "my_factories"


def test_a_factory_of_your_own(factories: str) -> None:
    model = build_model(ModelSpec(name=f"{factories}:good", options={"width": 5}), weights=None)
    weight = model.state_dict()["0.weight"]
    assert weight.shape[0] == 5
    assert weight.dtype == torch.float32
    assert not model.training


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "resnet2"}, ["'resnet2'", "Did you mean", "resnet20"]),
        ({"name": "zzz"}, ["Built in", "vgg16"]),
        ({"name": "resnet20", "options": {"width": 3}}, ["width", "num_classes", "shortcut"]),
        ({"name": "resnet20", "options": {"shortcut": "C"}}, ["A or B", "'C'"]),
        ({"name": "resnet20", "options": {"num_classes": "ten"}}, ["resnet20", "'ten'"]),
        ({"name": "my_factories:good", "options": {"depth": 3}}, ["depth", "width"]),
        ({"name": "my_factories:number"}, ["torch.nn.Module", "int"]),
        ({"name": "my_factories:value"}, ["callable", "int"]),
        ({"name": "my_factories:nothing"}, ["cannot import", "nothing"]),
        ({"name": "no_such_module:f"}, ["cannot import", "no_such_module"]),
        ({"name": "my_factories:"}, ["package.module:function"]),
        ({"name": "my_factories:crash"}, ["the disk is on fire"]),
        ({"name": "my_factories:nan"}, ["finite", "weight"]),
    ],
)
def test_models_that_cannot_be_built_say_why(factories: str, spec: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(ModelSpec.model_validate(spec), weights=None)
    for word in words:
        assert word in str(caught.value)


def pretrained() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return MODELS["resnet20"]().state_dict()


@pytest.mark.parametrize("kind", ["safetensors", "plain", "state_dict", "model", "module", "no counts"])
def test_weights_are_read_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    tensors = pretrained()
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    content: object = tensors
    if kind in ("state_dict", "model"):
        content = {kind: tensors, "epoch": 3}
    elif kind == "module":
        content = {"state_dict": {f"module.{key}": x for key, x in tensors.items()}}
    elif kind == "no counts":
        content = {key: x for key, x in tensors.items() if "num_batches" not in key}
    save_file(tensors, file) if kind == "safetensors" else torch.save(content, file)
    model = build_model(ModelSpec(name="resnet20"), weights=file)
    assert all(torch.equal(x, tensors[key]) for key, x in model.state_dict().items())


def test_old_densenet_names(tmp_path: Path) -> None:
    torch.manual_seed(2)
    tensors = MODELS["densenet121"](num_classes=2).state_dict()
    old = {key.replace("norm1.", "norm.1.").replace("norm2.", "norm.2."): x for key, x in tensors.items()}
    old = {k.replace("conv1.", "conv.1.").replace("conv2.", "conv.2."): x for k, x in old.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "old.pth")
    spec = ModelSpec(name="densenet121", options={"num_classes": 2})
    model = build_model(spec, weights=tmp_path / "old.pth")
    assert all(torch.equal(x, tensors[key]) for key, x in model.state_dict().items())


def broken(kind: str, file: Path) -> None:
    tensors = pretrained()
    if kind == "keys":
        tensors["fc.weight"] = tensors.pop("linear.weight")
    elif kind == "shape":
        tensors["linear.weight"] = torch.zeros(3, 64)
    elif kind == "nan":
        tensors["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    elif kind == "inf":
        tensors["bn1.running_var"][0] = float("inf")
    if kind == "garbage":
        file.write_bytes(b"not a checkpoint at all")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "whole model":
        torch.save(nn.Linear(2, 2), file)
    elif kind == "list":
        torch.save([1, 2], file)
    elif kind != "missing":
        torch.save(tensors, file) if file.suffix == ".pth" else save_file(tensors, file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["must exist"]),
        ("garbage", ["cannot read"]),
        ("empty", ["cannot read"]),
        ("keys", ["missing keys: linear.weight", "unexpected keys: fc.weight"]),
        ("shape", ["linear.weight (3, 64) for (10, 64)"]),
        ("nan", ["finite", "layer1.0.conv1.weight"]),
        ("inf", ["finite", "bn1.running_var"]),
    ],
)
def test_unfit_weights_say_why_and_change_nothing(tmp_path: Path, kind: str, words: list[str], suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    broken(kind, file)
    model = build_model(ModelSpec(name="resnet20"), weights=None)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(model, file)
    for word in [*words, str(file)]:
        assert word in str(caught.value)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("kind", ["whole model", "list"])
def test_only_state_dicts_are_weights(tmp_path: Path, kind: str) -> None:
    broken(kind, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"torch\.save"):
        build_model(ModelSpec(name="resnet20"), weights=tmp_path / "w.pth")


def test_many_wrong_keys_are_counted(tmp_path: Path) -> None:
    deeper = build_model(ModelSpec(name="resnet56"), weights=None).state_dict()
    save_file(deeper, tmp_path / "w.safetensors")
    own = MODELS["resnet20"]().state_dict()
    surplus = sum(key not in own for key in deeper)
    with pytest.raises(ModelError, match=rf"unexpected keys: .*\.\.\. \({surplus} in all\)"):
        build_model(ModelSpec(name="resnet20"), weights=tmp_path / "w.safetensors")


def test_find_weights_takes_the_first_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
    (second / "w.pth").touch()
    assert find_weights("w.pth", [first, second]) == second / "w.pth"
    (first / "w.pth").touch()
    assert find_weights("w.pth", [first, second]) == first / "w.pth"
    assert find_weights(str(second / "w.pth"), [first]) == second / "w.pth"
    with pytest.raises(ModelError) as caught:
        find_weights("x.pth", [first, second])
    assert str(first / "x.pth") in str(caught.value)
    assert str(second / "x.pth") in str(caught.value)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Data:
    spec = DataSpec(source="digits", mean=[0.3053], std=[0.3763])
    return load_data(spec, cache=tmp_path_factory.mktemp("cache"), seed=0)


def test_digits_cnn_learns_and_its_weights_are_cached(tmp_path: Path, digits: Data) -> None:
    epochs: list[tuple[int, int]] = []
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    file = digits_weights(tmp_path / "new", digits, progress=lambda done, total: epochs.append((done, total)))
    assert epochs[-1][0] == epochs[-1][1] == len(epochs)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)

    written = file.stat().st_mtime_ns
    assert digits_weights(tmp_path / "new", digits) == file
    assert file.stat().st_mtime_ns == written
    assert list(file.parent.iterdir()) == [file]

    model = build_model(ModelSpec(name="digits-cnn"), weights=file)
    for split in (digits.search, digits.report):
        with torch.inference_mode():
            correct = model(to_input(split.images, digits)).argmax(1) == torch.from_numpy(split.labels)
        assert correct.float().mean() >= 0.97


@pytest.mark.slow
def test_digits_training_is_deterministic(digits: Data) -> None:
    first, second = (train_digits_cnn(digits, seed=3).state_dict() for _ in range(2))
    other = train_digits_cnn(digits, seed=4).state_dict()
    assert all(torch.equal(x, second[key]) for key, x in first.items())
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_digits_cnn_has_ranks_worth_searching() -> None:
    convolutions = [m for m in on_meta("digits-cnn").modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert 6 <= len(convolutions) <= 8
    assert all(32 <= m.out_channels <= 64 for m in convolutions)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "accuracy"), [("resnet20", 0.9162), ("resnet56", 0.9352)])
def test_pretrained_networks_have_their_accuracy(real_data: Path, tmp_path: Path, name: str, accuracy: float) -> None:
    spec = DataSpec(
        source="npz",
        root=str(real_data),
        train=["cifar10-train-0.npz"],
        validation=["cifar10-val.npz"],
        train_images=64,
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
    )
    data = load_data(spec, cache=tmp_path, seed=0)
    model = build_model(ModelSpec(name=name), weights=find_weights(f"{name}-cifar10.safetensors", [real_data]))
    model = model.to(memory_format=torch.channels_last)
    correct = 0
    with torch.inference_mode():
        for split in (data.search, data.report):
            for start in range(0, len(split), 500):
                part = split[start : start + 500]
                logits = model(to_input(part.images, data))
                correct += int((logits.argmax(1) == torch.from_numpy(part.labels)).sum())
    assert correct / 5000 == pytest.approx(accuracy, abs=1e-9)
