"""A projector as transformers' own class computes it: built, checked, run on sets of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from projaudit.inert import clean
from projaudit.recipe import Blueprint, Recipe, refused, settings

TOKENS = 16
"""Of a set, where the class takes any number."""
MOST_TOKENS = 4096
"""Of a set: an image of 64 × 64 patches."""
BUFFERS = 1 << 26
"""Values in tables that a class computes for itself, at most."""
# Parts of a config that may be of any class: they only tell widths.
_ANY = {"text_config", "vision_config", "audio_config", "high_res_vision_config"}


@dataclass(frozen=True)
class Module:
    """transformers' own class of a projector, in float64, whose weights come with every call."""

    blueprint: Blueprint
    built: nn.Module
    width: int
    """Of a token."""
    tokens: int
    """Of a set."""

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """P(x): (sets × outputs × out), of weights by role and x (sets × tokens × width).

        float64; some classes compute norms in float32 in between. Raises UnsupportedError
        (`unsupported.module`) where the class fails.
        """
        shapes, state = self.blueprint.shapes, {}
        for role, name in self.blueprint.parameters.items():
            turned = role.removesuffix(".weight") in self.blueprint.recipe.transposed
            weight = weights[role].T if turned else weights[role]
            state[name] = weight.reshape(shapes[name])
        with _caught(self.blueprint.recipe), torch.no_grad():
            self.built.load_state_dict(state)
            return FORMS[self.blueprint.recipe.form].call(self.built, x.to(torch.float64))


@dataclass(frozen=True)
class Form:
    """How a kind of class is built and given a set of tokens."""

    call: Callable[[Any, Tensor], Tensor]
    """(module, sets × tokens × width) -> sets × outputs × out."""
    tokens: Callable[[Any], int] = lambda module: TOKENS
    width: Callable[[Any], int] | None = None
    """Of a token; where it is None, what the layer takes that reads them."""
    build: Callable[..., nn.Module] = lambda kind, config, *args: kind(*args)


def build(blueprint: Blueprint, device: torch.device) -> Module:
    """The module of a projector, once its tensors are exactly those that the checkpoint has.

    Only the keys that the recipe names are taken from the config, within bounds; the class is first
    built without memory, and its tensors' names and shapes are compared. No code of a checkpoint is
    run, and no class that it names. Raises UnsupportedError (`unsupported.module`) where
    transformers is not installed, has another class, or the config is not the weights'.
    """
    recipe = blueprint.recipe
    if find_spec("transformers") is None:
        raise refused(recipe, "transformers is not installed; pip install 'projaudit[behaviour]'")
    given = settings(blueprint)
    with _caught(recipe), torch.random.fork_rng(devices=[]):
        config = _config(recipe, given)
        _check_types(blueprint, config)
        with torch.device("meta"):
            outline = _built(blueprint, config)
        _check_tensors(blueprint, outline)
        module = _built(blueprint, config).to(device, torch.float64).eval()
        form = FORMS[recipe.form]
        reads = module.get_parameter(f"{recipe.reads}.weight")
        width = form.width(module) if form.width else reads.shape[1]
        tokens = form.tokens(module)
    if not 0 < tokens <= MOST_TOKENS:
        raise refused(recipe, f"it takes {tokens} tokens at once")
    return Module(blueprint, module.requires_grad_(False), width, tokens)


def _config(recipe: Recipe, given: Mapping[str, Any]) -> Any:
    """An object of transformers' config class, with no other values than those given."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: Any = CONFIG_MAPPING[recipe.config](**given)
    config._attn_implementation = "eager"
    return config


def _check_types(blueprint: Blueprint, config: Any) -> None:
    """None, or UnsupportedError where a part of the config is of another class than is built."""
    for part in blueprint.recipe.keys.keys() - _ANY - {""}:
        named = (blueprint.config.get(part) or {}).get("model_type")
        built = getattr(config, part).model_type
        if named not in (None, "", built, blueprint.recipe.config):
            raise refused(blueprint.recipe, f"its {part} is {clean(repr(named), 40)}, not {built}")


def _built(blueprint: Blueprint, config: Any) -> nn.Module:
    model, _, name = blueprint.recipe.path.partition(".")
    kind = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)
    args = [
        config
        if arg == "."
        else blueprint.number
        if arg == "#"
        else reduce(getattr, arg.split("."), config)
        for arg in blueprint.recipe.args
    ]
    return FORMS[blueprint.recipe.form].build(kind, config, *args)


def _check_tensors(blueprint: Blueprint, outline: nn.Module) -> None:
    """None, or UnsupportedError where the class has other tensors than the checkpoint."""
    has = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    there = blueprint.shapes
    for name in sorted({*has, *there}):
        if has.get(name) != there.get(name):
            of = f"{list(has[name])} in the class" if name in has else "not in the class"
            here = f"{list(there[name])} here" if name in there else "not here"
            raise refused(blueprint.recipe, f"{clean(name, 80)} is {of} and {here}")
    if sum(buffer.numel() for buffer in outline.buffers()) > BUFFERS:
        raise refused(blueprint.recipe, "its tables are larger than any in use")


@contextmanager
def _caught(recipe: Recipe) -> Iterator[None]:
    """Whatever a class does with what a checkpoint gave it is one error in one line."""
    from projaudit.errors import ProjauditError

    try:
        yield
    except ProjauditError:
        raise
    except Exception as error:
        says = str(error).strip().partition("\n")[0]
        raise refused(recipe, f"{type(error).__name__}: {clean(says, 120)}") from None


# --- how each kind is called ----------------------------------------------------------------------


class _QFormer(nn.Module):
    """Queries through a Q-Former, and the linear layer behind it."""

    def __init__(self, kind: Callable[..., nn.Module], config: Any, former: Any) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(
            torch.zeros(1, config.num_query_tokens, former.hidden_size)
        )
        self.qformer = kind(former)
        self.language_projection = nn.Linear(former.hidden_size, config.text_config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.query_tokens.expand(len(x), -1, -1)
        said: dict[str, Any] = {"query_embeds": queries, "encoder_hidden_states": x}
        if hasattr(self.qformer, "embeddings"):  # an instruction goes with the queries
            words = torch.arange(4, device=x.device) + 1
            said["input_ids"] = words.expand(len(x), -1)
        found = self.qformer(**said).last_hidden_state[:, : queries.shape[1]]
        projected: Tensor = self.language_projection(found)
        return projected


class _VisualWords(nn.Module):
    """Ovis2VisionModel's head, and the mean of the embeddings of its words."""

    def __init__(self, kind: Callable[..., nn.Module], config: Any, *_: Any) -> None:
        super().__init__()
        vision = config.vision_config
        words = vision.vocab_size - vision.num_visual_indicator_tokens
        self.head_linear = nn.Linear(
            vision.hidden_size * vision.hidden_stride**2, words, bias=False
        )
        self.head_norm = nn.LayerNorm(words)
        self.table = kind(vision.vocab_size, config.hidden_size)
        self.hard = vision.tokenize_function != "softmax"

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head_norm(self.head_linear(x))
        share = logits.softmax(-1)
        if self.hard:  # the most likely word, of Gumbel's too
            share = torch.zeros_like(share).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        extra = len(self.table.get_parameter("weight")) - share.shape[-1]
        found: Tensor = self.table(nn.functional.pad(share, (0, extra)))
        return found


def _tokens(module: Any, x: Tensor) -> Tensor:
    found = module(x)
    first: Tensor = found[0] if isinstance(found, tuple) else found
    return first


def _masked(module: Any, x: Tensor) -> Tensor:
    found: Tensor = module(x, torch.ones(x.shape[:2], dtype=torch.long, device=x.device))
    return found


def _any_patches(module: Any, x: Tensor) -> Tensor:
    """Aria has as many queries as its config says for a number of patches; here it is the most."""
    module.patch_to_query_dict = {x.shape[1]: len(module.query)}
    return _tokens(module, x)


def _side(module: Any, x: Tensor) -> Tensor:
    """Of Granite 4 Vision, an image of one window."""
    module.image_side = module.window_side
    return _tokens(module, x)


def _merged(module: Any, x: Tensor) -> Tensor:
    return _sets(module(x.flatten(0, 1)), x)


def _grid(module: Any, x: Tensor) -> Tensor:
    """Of Ernie, images of one merged token each."""
    side = module.spatial_merge_size
    grids = torch.tensor([[1, side, side]] * len(x))
    return _sets(module(x.reshape(-1, x.shape[-1] // side**2), grids), x)


def _sets(found: Tensor, x: Tensor) -> Tensor:
    """Outputs of all sets, one after the other, set by set."""
    return found.reshape(len(x), -1, found.shape[-1])


def _image(module: Any, x: Tensor) -> Tensor:
    side = math.isqrt(x.shape[1])
    return _tokens(module, x.transpose(1, 2).reshape(len(x), -1, side, side))


def _two_images(module: Any, x: Tensor) -> Tensor:
    widths = [module.vision_proj.in_features, module.high_res_vision_proj.in_features]
    found: Tensor = module(*torch.split(x, widths, dim=-1))
    return found


def _both_routes(module: Any, x: Tensor) -> Tensor:
    """Of Granite Docling the image tokens and the deep ones of the coarse route, then the fine."""
    image, *deep = torch.split(x, len(module.ln_in.weight), dim=-1)
    found: list[Tensor] = []
    for fine in (False, True) if module.fine is not None else (False,):
        tokens, deeper = module(image, deep, fine=fine)
        found += [_sets(part, x) for part in (tokens, *deeper)]
    return torch.cat(found, dim=1)


FORMS: Mapping[str, Form] = {
    "tokens": Form(_tokens),
    "masked": Form(_masked),
    "any-patches": Form(_any_patches),
    "q-former": Form(_tokens, build=_QFormer),
    "visual-words": Form(_tokens, build=_VisualWords),
    "window": Form(_tokens, tokens=lambda module: int(module.window_size)),
    "side": Form(_side, tokens=lambda module: int(module.window_side**2)),
    "merged": Form(_merged, tokens=lambda module: int(module.spatial_merge_size**2)),
    "grid": Form(_grid, tokens=lambda module: 1),
    "image": Form(_image, tokens=lambda module: 64),
    "two-images": Form(
        _two_images,
        width=lambda m: int(m.vision_proj.in_features + m.high_res_vision_proj.in_features),
    ),
    "both-routes": Form(
        _both_routes,
        tokens=lambda m: int((m.coarse.pos_embed.grid_size * m.coarse.scale_factor) ** 2),
        width=lambda m: len(m.ln_in.weight) * (1 + len(m.coarse.deepstack_mergers)),
    ),
}
"""Name in families.yaml -> how it is called."""
