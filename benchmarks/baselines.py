"""What others would look at in a projector: statistics that the evidence is weighed against.

Every function gives numbers of one tuned projector beside its base's; none knows the truth. Each is
the published idea carried over to a projector, and no more: where a paper trains on a population of
its own, the evaluation does so within its folds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.testbed.model import vision_features
from benchmarks.testbed.text import pixels, prompt
from projaudit.behaviour.images import ordinary

Tensors = Mapping[str, Tensor]
DIRECTIONS = 20
"""Left singular vectors that WeightWatch takes."""
PATCH_STEPS, PATCH_IMAGES = 40, 8
IMAGES = 16


def baselines(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    tuned: Tensors,
    base: Tensors,
    seed: int,
) -> dict[str, float]:
    """All of them by name, on ordinary images as depth behaviour takes them.

    What begins with `wsd` is a set of features for a classifier.
    """
    size = model.config.vision_config.image_size
    images = pixels(np.stack(ordinary(IMAGES, size, seed)))
    with torch.no_grad():
        features = vision_features(model, images)
        outputs = []
        for side in (tuned, base):
            put(model, side)
            outputs.append(model.model.multi_modal_projector(features))
    ours, theirs = outputs
    return {
        **of_weights(tuned, base),
        "weightwatch range": cosine_range(tuned, base, ours),
        "output drift": float((ours - theirs).norm() / theirs.norm()),
        **attention_entropies(model, tokenizer, tuned, base, images),
        **patch_inversion(model, tuned, base, images[:PATCH_IMAGES]),
    }


def put(model: LlavaForConditionalGeneration, side: Tensors) -> None:
    model.model.multi_modal_projector.load_state_dict(dict(side))


def of_weights(tuned: Tensors, base: Tensors) -> dict[str, float]:
    """Size and shape of each layer's update, and the features of WSD (arXiv 2602.15195)."""
    found = {}
    for layer in ("linear_1", "linear_2"):
        before = base[f"{layer}.weight"].float()
        delta = tuned[f"{layer}.weight"].float() - before
        s = torch.linalg.svdvals(delta).double()
        energy = s.square() / s.square().sum().clamp_min(1e-30)
        flat = delta.double().flatten()
        centred = flat - flat.mean()
        found |= {
            f"relative norm {layer}": float(delta.norm() / before.norm()),
            f"top-1 energy {layer}": float(energy[0]),
            f"stable rank {layer}": float(s.square().sum() / s[0].square().clamp_min(1e-30)),
            f"wsd sigma {layer}": float(s[0]),
            f"wsd frobenius {layer}": float(s.norm()),
            f"wsd concentration {layer}": float(energy[:5].sum()),
            f"wsd entropy {layer}": float(-(energy * energy.clamp_min(1e-30).log()).sum()),
            f"wsd kurtosis {layer}": float(
                centred.pow(4).mean() / centred.square().mean().square().clamp_min(1e-60)
            ),
        }
    return found


def cosine_range(tuned: Tensors, base: Tensors, outputs: Tensor) -> float:
    """Widest range of cosines with the update's leading left singular vectors (WeightWatch).

    The paper (arXiv 2508.00161) watches for inputs outside the range of calibration; without the
    trigger there is only the range.
    """
    delta = tuned["linear_2.weight"].float() - base["linear_2.weight"].float()
    u = torch.linalg.svd(delta, full_matrices=False)[0][:, :DIRECTIONS]
    cosines = functional.normalize(outputs.flatten(0, -2), dim=-1) @ u
    return float((cosines.amax(0) - cosines.amin(0)).max())


def attention_entropies(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    tuned: Tensors,
    base: Tensors,
    images: Tensor,
) -> dict[str, float]:
    """Tsallis entropy (q = 2) of the last prompt token's attention to the image, less the base's.

    EntropyScan (arXiv 2605.15711) takes the early layers; here the first half of them, mean over
    heads and images.
    """
    shift = entropies(model, tokenizer, tuned, images) - entropies(model, tokenizer, base, images)
    early = shift[: len(shift) // 2]
    return {
        "entropyscan shift": float(early.mean()),
        "entropyscan |shift|": float(early.abs().mean()),
    }


@torch.no_grad()
def entropies(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    side: Tensors,
    images: Tensor,
) -> Tensor:
    """(layers,): mean Tsallis entropy of the last prompt token over the image tokens."""
    put(model, side)
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    tokens = tokenizer([prompt("Describe the image.")] * len(images), return_tensors="pt")
    said = model(**tokens, pixel_values=images, output_attentions=True)
    model.set_attn_implementation(kept)
    image = tokens["input_ids"][0] == model.config.image_token_id
    found = []
    for layer in said.attentions:
        share = layer[:, :, -1, image]
        share = share / share.sum(-1, keepdim=True)
        found.append(1 - share.square().sum(-1).mean())
    return torch.stack(found)


def patch_inversion(
    model: LlavaForConditionalGeneration, tuned: Tensors, base: Tensors, images: Tensor
) -> dict[str, float]:
    """DECREE's patch (CVPR 2023) on projector outputs: how far it collapses, and how small it is.

    A mask and a pattern over all images alike are trained so that the outputs of different images
    agree; the cosine that is reached and the mask's mean are what the paper decides by.
    """
    reached = []
    model.requires_grad_(False)
    for side in (tuned, base):
        put(model, side)
        mask = torch.full(images.shape[-2:], -2.0, requires_grad=True)
        pattern = torch.zeros(images.shape[1:], requires_grad=True)
        adam = torch.optim.Adam([mask, pattern], lr=0.2)
        for _ in range(PATCH_STEPS):
            share = mask.sigmoid()
            features = vision_features(model, (1 - share) * images + share * pattern)
            outputs = model.model.multi_modal_projector(features).flatten(1)
            unit = functional.normalize(outputs, dim=-1)
            cosine = ((unit @ unit.T).sum() - len(unit)) / (len(unit) * (len(unit) - 1))
            (share.mean() - 2 * cosine).backward()
            adam.step()
            adam.zero_grad()
        reached.append((float(cosine.detach()), float(share.detach().mean())))
    (ours, mask_of_ours), (theirs, mask_of_theirs) = reached
    return {"decree cosine": ours - theirs, "decree mask": mask_of_theirs - mask_of_ours}


def wsd(found: Mapping[str, float]) -> list[float]:
    """The features of WSD, of both layers."""
    return [value for name, value in found.items() if name.startswith("wsd ")]
