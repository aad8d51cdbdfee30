"""Networks by name: built-in architectures, and any of your own as ``package.module:function``.

To add an architecture: write its family as one file here, a function of keyword options that returns the module, with
the paper and the origin of its state-dict keys on top. Add the function to ``MODELS`` under the name used in YAML.
Add its published parameter count to the table in the tests.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ranksearch.errors import ModelError
from ranksearch.factory import call_factory, call_with_options
from ranksearch.models.cifar_resnet import resnet20, resnet32, resnet44, resnet56, resnet110
from ranksearch.models.densenet import densenet121
from ranksearch.models.digits_cnn import digits_cnn, digits_weights, train_digits_cnn
from ranksearch.models.resnet import resnet18, resnet34, resnet50
from ranksearch.models.vgg import vgg16, vgg16_bn
from ranksearch.models.weights import check_finite, find_weights, load_weights
from ranksearch.space import ModelSpec

__all__ = [
    "MODELS",
    "build_model",
    "digits_weights",
    "find_weights",
    "input_shape_of",
    "load_weights",
    "train_digits_cnn",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits-cnn": digits_cnn,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "vgg16": vgg16,
    "vgg16_bn": vgg16_bn,
    "densenet121": densenet121,
}


def input_shape_of(name: str) -> tuple[int, int, int]:
    """Channels, height and width of the images that a built-in architecture was made for.

    Raises:
        ModelError: it is not built in.
    """
    if name not in MODELS:
        raise ModelError(
            f"the size of an image must be given for {name}, which is not built in. Give it, e.g. --input 3x32x32."
        )
    function = MODELS[name]
    if function is digits_cnn:
        return 1, 8, 8
    return (3, 32, 32) if function.__module__ == resnet20.__module__ else (3, 224, 224)


def build_model(spec: ModelSpec, *, weights: Path | None) -> nn.Module:
    """The network in eval mode, float32, on the CPU.

    Without ``weights`` it has starting values drawn from a fixed seed, so that every process builds the same network;
    torch's global generator is left as it was.

    Raises:
        ModelError: no such architecture, options it does not take, or weights that do not fit or are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _built(spec.name, spec.options)
    model = model.to(device="cpu", dtype=torch.float32)
    if weights is not None:
        load_weights(model, weights)
    else:
        check_finite(model.state_dict(), spec.name)
    return model.eval()


def _built(name: str, options: dict[str, Any]) -> nn.Module:
    if ":" in name:
        model = call_factory(name, options, ModelError)
    elif name in MODELS:
        model = call_with_options(name, MODELS[name], options, ModelError)
    else:
        near = difflib.get_close_matches(name.lower(), MODELS, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Built in: {', '.join(MODELS)}."
        raise ModelError(
            f"model.name must be a built-in architecture or package.module:function, found {name!r}. {hint}"
        )
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a model factory must return a torch.nn.Module, {name} returned {type(model).__name__}. Correct it."
        )
    return model
