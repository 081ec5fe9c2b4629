"""Where a projector stands in a checkpoint that no family describes: by words, stacks, widths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, TypeAlias

Shapes: TypeAlias = Mapping[str, Sequence[int]]

BLOCK = 6
"""Tensors of a numbered module from which it is a block of a stack: a layer of a transformer."""
VOCABULARY = 16_000
"""Rows from which a matrix is an embedding of tokens."""
DEEPEST = 40
"""Parts of a name that are looked at one by one."""
ALONE = 16
"""Most tensors of a file that is a projector and nothing else."""

# Read left to right, the first part of a name that is one of these words decides. They are the
# field's words for what stands between two models, and for what resembles it and does not.
_PROJECTOR = re.compile(
    r"projector|connector|merger|adapt[eo]r|aligner|resampler|perceiver|abstractor|q_?former"
    r"|bridge|modality|multi_?modal|image_to_text|vision_language|language_proj|patch_merge"
    r"|proj_mlp|proj_blk|sampler$|^mm$|^mlp1$|^mlp_AR$|^linear_proj$|^projection$|^project_up$"
    r"|^perceive$|^deepstack|^query_tokens$|^embed_(vision|audio)$|^(llama|opt|t5|llm)_proj$"
    r"|(image|img|vision|visual|audio|speech|sound|vit)_proj",
    re.IGNORECASE,
)
_OTHER = re.compile(
    r"^(head|cls|pooler|classifier|region\w*|generation\w*|thinker_to_talker\w*|talker|tts|gen_\w+|embed_tokens|lm_head|embeddings|\w*tok_embeddings|\w*embedder"
    r"|patch_emb\w*|high_res\w*|pre_encode|vit_merger|pos_emb|\w*patch_projection|\w*conv_projection|subsampl\w*|\w*reduction"
    r"|text_projection|feature_projection|projection_head|embedding_proj_layer|project_down"
    r"|self_attn|attention|depth_decoder|code2wav|token2wav|vocoder|llm2vae|speaker\w*"
    r"|\w*gen_dec\w*)$|action|state_proj|diffusion|altup|per_layer|downsampl|upsampl",
    re.IGNORECASE,
)
_LANGUAGE = re.compile(
    r"^(language_model|llm|llama_model|lang_encoder|text_model|text_decoder|lm)$"
)
_BLOCKS = re.compile(r"^(layers?|blocks?|blk|h|resblocks)$")
_BLOCK = re.compile(r"att(n|ention)?([._]|$)|mlp|ffn|feed_forward|mixer", re.IGNORECASE)
_TOWER = re.compile(
    r"vision|visual|audio|image|^vit$|speech|whisper|perception|sam|siglip|clip|dino", re.IGNORECASE
)
_SOUND = re.compile(r"audio|speech|sound|whisper|^(mm\.)?a\.", re.IGNORECASE)
_POOLING = re.compile(r"\.(head|attn_pool)\.")
_NORM = re.compile(r"norm|ln|rms", re.IGNORECASE)


def positioned(shapes: Shapes, config: Mapping[str, Any] | None = None) -> list[tuple[str, ...]]:
    """The tensors of every projector, in the checkpoint's order: of pictures, then of sound.

    By a word of the name that means a projector; by width, where a module that is part of no stack
    of blocks and of no language model leads into the language model's width; or a whole file, where
    it holds neither encoder nor language model and is a projector and nothing else.
    """
    stacks, widths = _stacks(shapes), text_widths(shapes, config or {})
    paths = {name: _path(name, stacks) for name in shapes}
    found = {name for name, path in paths.items() if _decides(path)}
    found |= set(_leading(shapes, paths, stacks, widths))
    if not found and not stacks and _is_alone(shapes):
        found = set(shapes)
    sound = set(filter(_SOUND.search, found))
    groups = [[n for n in shapes if n in part] for part in (found - sound, sound)]
    return [tuple(group) for group in groups if group]


def text_widths(shapes: Shapes, config: Mapping[str, Any]) -> set[int]:
    """Widths of language models: of the token embeddings, and as the config says.

    A config's own numbers count where it is no encoder's part of it.
    """
    widths = {
        shape[1]
        for shape in shapes.values()
        if len(shape) == 2 and shape[0] >= VOCABULARY and 2 * shape[1] < shape[0]
    }

    def read(part: Mapping[str, Any]) -> Iterator[int]:
        for key, value in part.items():
            if isinstance(value, Mapping):
                if not _TOWER.search(key):
                    yield from read(value)
            elif key in ("hidden_size", "d_model", "n_embd", "dim") and isinstance(value, int):
                yield value

    return widths | set(read(config))


def _stacks(shapes: Shapes) -> set[str]:
    """Modules of numbered blocks: those of encoders and language models, the outermost only.

    A block has attention or an MLP within, or six tensors at least.
    """
    blocks: dict[str, dict[str, int]] = {}
    for name in shapes:
        parts = name.split(".", DEEPEST)
        for i, part in enumerate(parts[:-1]):
            if not part.isdigit():
                continue
            numbers = blocks.setdefault(".".join(parts[:i]), {})
            if numbers.get(part, 0) < BLOCK:
                named = _BLOCKS.search(parts[i - 1]) if i else None
                block = named and _BLOCK.search(".".join(parts[i + 1 :]))
                numbers[part] = numbers.get(part, 0) + (BLOCK if block else 1)
    stacks = {module for module, sizes in blocks.items() if max(sizes.values()) >= BLOCK}
    return {module for module in stacks if _stack_of(module, stacks) is None}


def _stack_of(name: str, stacks: Set[str]) -> str | None:
    """The outermost stack that a module or tensor stands in."""
    if "" in stacks:
        return "" if name else None
    parts = name.split(".", DEEPEST)
    above = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((module for module in above if module in stacks), None)


def _path(name: str, stacks: Set[str]) -> str:
    """What says by its words what a tensor belongs to: its stack, or its module."""
    stack = _stack_of(name, stacks)
    return module_of(name) if stack is None else stack


def module_of(name: str) -> str:
    """The module that a tensor is the weight or bias of; a bare parameter is one of its own."""
    module, _, leaf = name.rpartition(".")
    return module if module and leaf in ("weight", "bias") else name


def deciding_words(names: Iterable[str], shapes: Shapes, *, projector: bool) -> dict[str, str]:
    """Name -> the word in it that says that it is a projector's, or that it is something else's."""
    stacks = _stacks(shapes)
    words = {name: _word(_path(name, stacks)) for name in names}
    return {name: word for name, (word, means) in words.items() if word and means is projector}


@lru_cache(maxsize=1 << 12)
def _word(path: str) -> tuple[str, bool]:
    """The first word that says what a path belongs to, and whether it means a projector."""
    for part in path.split(".", DEEPEST):
        if _OTHER.search(part):
            return part, False
        if _PROJECTOR.search(part):
            return part, True
    return "", False


def _decides(path: str) -> bool | None:
    """Whether the word that decides means a projector; None where no word does."""
    word, means = _word(path)
    return means if word else None


def _leading(
    shapes: Shapes, paths: Mapping[str, str], stacks: Set[str], widths: set[int]
) -> Iterator[str]:
    """The modules outside every stack of which a matrix gives a language model's width."""
    if len(stacks) < 2 and not any(map(_TOWER.search, stacks)):
        return  # one model alone has nothing to lead into
    above = {
        ".".join(stack.split(".")[:n]) for stack in stacks for n in range(len(stack.split(".")) + 1)
    }

    def root(name: str) -> str:
        """The outermost module of a tensor that holds no stack."""
        parts = module_of(name).split(".", DEEPEST)
        ends = range(1, len(parts) + 1)
        return next((r for n in ends if (r := ".".join(parts[:n])) not in above), "")

    outside = {
        name: root(name)
        for name, path in paths.items()
        if path not in stacks
        and _decides(path) is None
        and not _POOLING.search(name)
        and not any(map(_LANGUAGE.search, name.split(".")))
        and not re.search("position|embed", name, re.IGNORECASE)
    }
    roots = {
        module.rstrip("0123456789")
        for name, module in outside.items()
        if module and len(shapes[name]) == 2 and shapes[name][0] in widths
    }
    for name, module in outside.items():
        if module and module.rstrip("0123456789") in roots:
            yield name


def _is_alone(shapes: Shapes) -> bool:
    """Whether a few matrices and vectors of no other model are all there is."""
    ranks = {len(shape) for shape in shapes.values()}
    parts = {part for name in shapes for part in name.split(".")}
    others = any(_LANGUAGE.search(part) or _OTHER.search(part) for part in parts)
    return len(shapes) <= ALONE and {2} <= ranks <= {1, 2} and not others
