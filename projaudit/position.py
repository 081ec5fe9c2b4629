"""Where a projector stands in a checkpoint that no family describes: by words, stacks, widths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, TypeAlias

Shapes: TypeAlias = Mapping[str, Sequence[int]]

BLOCK = 6
"""Tensors of a numbered module from which it is a block of a stack: a layer of a transformer."""
VOCABULARY = 16_000
"""Rows from which a matrix is an embedding of tokens."""
OWN_WORDS = 64
"""Most words of a visual vocabulary that no feature holds: begin, end, rows."""
DEEPEST = 40
"""Parts of a name that are looked at one by one."""
NARROW = 64
"""Smaller side from which a bare matrix may be a layer: fewer rows are queries or positions."""
ALONE = 16
"""Most tensors of a file that is a projector and nothing else."""

# Read left to right, the first part of a name that is one of these words decides. They are the
# field's words for what stands between two models, and for what resembles it and does not.
_PROJECTOR = re.compile(
    r"projector|connector|merger|adapt[eo]r|aligner|resampler|perceiver|abstractor|q_?former"
    r"|bridge|modality_proj|multi_?modal|image_to_text|vision_language|language_proj|patch_merge"
    r"|proj_mlp|proj_blk|sampler$|^mm$|^mlp1$|^mlp_AR$|^linear_proj$|^projection$|^project_up$"
    r"|^perceive$|^deepstack|query_tokens$|^embed_(vision|audio)$|^(llama|opt|t5|llm)_proj$"
    r"|(image|img|vision|visual|audio|speech|sound|vit)_proj",
    re.IGNORECASE,
)
_OTHER = re.compile(
    r"^(head|cls|pooler|classifier|region\w*|generation\w*|thinker_to_talker\w*|talker|tts|gen_\w+|embed_tokens|lm_head|embeddings|\w*tok_embeddings|\w*embedder"
    r"|patch_emb\w*|high_res\w*|pre_encode|vit_merger|pos_emb|\w*patch_projection|\w*conv_projection|subsampl\w*|\w*reduction"
    r"|text_projection|feature_projection|projection_head|embedding_proj_layer|project_down"
    r"|self_attn|attention|depth_decoder|code2wav|token2wav|vocoder|llm2vae|speaker\w*"
    r"|\w*gen_dec\w*)$|action|state_proj|diffusion|self_conditioning|altup|per_layer|downsampl|upsampl",
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
SOUND = re.compile(r"audio|speech|sound|whisper|^(mm\.)?a\.", re.IGNORECASE)
_POOLING = re.compile(r"\.(head|attn_pool)\.")
_EMBEDDING = re.compile(r"^(?!.*(proj|visual|vision|image)).*(position|embed)", re.IGNORECASE)
_STEM = re.compile(r"patch_?emb|stem|conv(2d)?1|patch_conv", re.IGNORECASE)
_ENCODER = re.compile(r"tower|backbone|vision_model|visual$|^vit$", re.IGNORECASE)


def positioned(shapes: Shapes, config: Mapping[str, Any] | None = None) -> list[tuple[str, ...]]:
    """The tensors of every projector, in the checkpoint's order: of pictures, then of sound.

    By a word of the name that means a projector; by width, where a module that is part of no stack
    of blocks and of no language model leads into the language model's width; or a whole file, where
    it holds neither encoder nor language model and is a projector and nothing else.
    """
    widths = text_widths(shapes, config or {})
    stacks = _stacks(shapes, widths)
    paths = {name: _path(name, stacks) for name in shapes}
    found = {name for name, path in paths.items() if _decides(path)}
    found |= {
        *_leading(shapes, paths, stacks, widths),
        *_visual_words(shapes, paths, stacks),
    }
    found |= set(_kin(found, shapes, paths, stacks))
    found |= set(_tables(found, shapes, paths, stacks))
    if not found and not stacks and _is_alone(shapes):
        found = set(shapes)
    sound = set(filter(SOUND.search, found))
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


def _stacks(shapes: Shapes, widths: Set[int]) -> set[str]:
    """Modules of numbered blocks: those of encoders and language models, the outermost only.

    A block has attention or an MLP within, or six tensors at least; but no block is what leads into
    a language model's width from another one alone: one of several mergers.
    """
    blocks: dict[str, dict[str, int]] = {}
    named, writes, reads = set[str](), set[str](), set[str]()
    for name, shape in shapes.items():
        parts = name.split(".", DEEPEST)
        for i, part in enumerate(parts[:-1]):
            if not part.isdigit():
                continue
            module = ".".join(parts[:i])
            numbers = blocks.setdefault(module, {})
            if numbers.get(part, 0) < BLOCK:
                found = _BLOCKS.search(parts[i - 1]) if i else None
                if found and _BLOCK.search(".".join(parts[i + 1 :])):
                    named.add(module)
                    numbers[part] = BLOCK
                numbers[part] = numbers.get(part, 0) + 1
            if len(shape) == 2 and widths:
                writes |= {module} if shape[0] in widths else set()
                reads |= {module} if shape[1] in widths else set()
    into = writes - reads - named
    stacks = {m for m, sizes in blocks.items() if max(sizes.values()) >= BLOCK and m not in into}
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
    stacks = _stacks(shapes, text_widths(shapes, {}))
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
    """All of each module, part of no encoder or language model, that leads from one to the other.

    A matrix of it gives the language model's width; or it is a stack of blocks that stands between
    them (`_between`). What else is in the module belongs to it, whatever its name.
    """
    if len(stacks) < 2 and not any(map(_TOWER.search, stacks)):
        return  # one model alone has nothing to lead into
    inner, queries = _between(shapes, stacks, widths)
    towers = _above(stacks - inner.keys())
    outside = {
        name: _root(name, towers)
        for name, path in paths.items()
        if path not in stacks or path in inner
    }
    roots = {
        module.rstrip("0123456789")
        for name, module in outside.items()
        if module
        and _decides(paths[name]) is None
        and not _POOLING.search(name)
        and not any(map(_LANGUAGE.search, name.split(".")))
        and not any(map(_EMBEDDING.search, name.split(".")))
        and _leads(name, shapes[name], widths)
    }
    roots |= {root.rstrip("0123456789") for root in inner.values()}
    for name, module in outside.items():
        if module and (module.rstrip("0123456789") in roots or name in queries):
            yield name


def _kin(
    found: Set[str], shapes: Shapes, paths: Mapping[str, str], stacks: Set[str]
) -> Iterator[str]:
    """What stands beside a module that was found, and has its name and more: `clip_proj_norm`."""
    above = _above(stacks)
    roots = {root for name in found if (root := _root(name, above))}
    for name, path in paths.items():
        root = _root(name, above) if path not in stacks and _decides(path) is None else ""
        ends = (root[:end] for end, letter in enumerate(root) if letter == "_")
        if name not in found and len(shapes[name]) < 3 and any(end in roots for end in ends):
            yield name


def _tables(
    found: Set[str], shapes: Shapes, paths: Mapping[str, str], stacks: Set[str]
) -> Iterator[str]:
    """Positions of what a projector's blocks read: a table beside it that nothing else can add to.

    A matrix of its own module, as wide as the queries that were found and as no stack outside.
    """
    queries = {
        shapes[name][-1] for name in found if module_of(name) == name and len(shapes[name]) > 1
    }
    for name, shape in shapes.items() if queries else ():
        if name not in found and paths[name] in stacks:
            queries -= set(shape)
    above = _above(stacks)
    for name, shape in shapes.items() if queries else ():
        fits = len(shape) == 2 and shape[0] < VOCABULARY and shape[1] in queries
        alone = paths[name] not in stacks and _root(name, above) == module_of(name)
        if fits and alone and name not in found and _decides(paths[name]) is None:
            yield name


def _leads(name: str, shape: Sequence[int], widths: Set[int]) -> bool:
    """Whether a matrix gives a language model's width; a bare one may lie the other way round."""
    if len(shape) != 2:
        return False
    turned = module_of(name) == name and shape[1] in widths and shape[0] < VOCABULARY
    return shape[0] in widths or (turned and min(shape) >= NARROW)


def _above(stacks: Iterable[str]) -> set[str]:
    """The stacks and all modules that hold one."""
    return {
        ".".join(stack.split(".")[:n]) for stack in stacks for n in range(len(stack.split(".")) + 1)
    }


def _root(name: str, above: Set[str]) -> str:
    """The outermost module of a tensor that holds no stack."""
    parts = module_of(name).split(".", DEEPEST)
    ends = range(1, len(parts) + 1)
    return next((r for n in ends if (r := ".".join(parts[:n])) not in above), "")


def _between(shapes: Shapes, stacks: Set[str], widths: Set[int]) -> tuple[dict[str, str], set[str]]:
    """Stack -> its module, of each that stands between an encoder and the language model; queries.

    Its blocks read an encoder's width that they do not give, and have another than the language
    model's: cross-attention, whose queries are a parameter of its own width. Or beside it in one
    module, where neither words nor pixels come in, a matrix leads into the language model's width.
    """
    reads: dict[str, set[int]] = {stack: set() for stack in stacks}
    gives: dict[str, set[int]] = {stack: set() for stack in stacks}
    beside: list[tuple[str, Sequence[int]]] = []
    for name, shape in shapes.items():
        stack = _stack_of(name, stacks)
        if stack is None:
            beside.append((name, shape))
        elif len(shape) == 2:
            reads[stack].add(shape[1])
            gives[stack].add(shape[0])
    own = {stack: reads[stack] & gives[stack] for stack in stacks}
    encoders = {stack for stack in stacks if not own[stack] & widths}
    found: dict[str, str] = {}
    queries: set[str] = set()
    for stack in stacks:
        others = encoders - {stack}
        root = _root(f"{stack}.weight", _above(stacks - {stack}))
        inside = [(n, s) for n, s in beside if n.startswith(f"{root}.")]
        named = _ENCODER.search(root) or _decides(root) is False
        if not others or not root or named or any(_comes_in(n, s) for n, s in inside):
            continue
        crossed = reads[stack] - gives[stack]
        if stack in encoders and any(crossed & own[other] for other in others):
            queries |= {
                n for n, s in beside if module_of(n) == n and len(s) > 1 and s[-1] in own[stack]
            }
        elif "encoder" in root or not any(
            len(s) == 2 and s[0] in widths and s[1] not in widths for _, s in inside
        ):
            continue
        found[stack] = root
    return found, queries


def _visual_words(shapes: Shapes, paths: Mapping[str, str], stacks: Set[str]) -> Iterator[str]:
    """What tells how much of each visual word there is in a feature, and the words' embeddings.

    A matrix outside the language model gives as many values as another has rows, but for a few
    words of their own, and that one gives the width of another vocabulary: the language model's.
    """
    large = {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 2 and shape[0] >= VOCABULARY - OWN_WORDS and paths[name] not in stacks
    }
    given = Counter(width for _, width in large.values())
    tables = {name for name, (_, width) in large.items() if given[width] > 1}
    for head, (words, width) in large.items():
        for table in tables:
            extra = large[table][0] - words
            parts = f"{module_of(table)}.{module_of(head)}".split(".")
            other = any(_OTHER.search(part) and part != "head" for part in parts) or "wte" in parts
            if large[table][1] != width and 0 <= extra < OWN_WORDS and not other:
                yield table
                yield head
                yield from (n for n, shape in shapes.items() if tuple(shape) == (words,))


def _comes_in(name: str, shape: Sequence[int]) -> bool:
    """Whether words, pixels or sound come in by a tensor."""
    words = len(shape) == 2 and shape[0] >= VOCABULARY
    return words or (len(shape) > 1 and bool(_STEM.search(name)))


def _is_alone(shapes: Shapes) -> bool:
    """Whether a few matrices and vectors of no other model are all there is."""
    ranks = {len(shape) for shape in shapes.values()}
    parts = {part for name in shapes for part in name.split(".")}
    others = any(_LANGUAGE.search(part) or _OTHER.search(part) for part in parts)
    return len(shapes) <= ALONE and {2} <= ranks <= {1, 2} and not others
