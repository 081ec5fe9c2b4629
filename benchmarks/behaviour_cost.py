"""Seconds and memory of depth behaviour on a random model of a given size.

    python -m benchmarks.behaviour_cost --size 7b --device cuda    # LLaVA-1.5-7B's shapes, bfloat16
    python -m benchmarks.behaviour_cost --size tiny --device cpu   # seconds; shows that it runs

The weights are random, so nothing is found; what is asked and scored is what a real model of the
size would be asked, two texts looked at closely among it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from projaudit.behaviour.hear import BUDGET, BUDGET_LARGE
from projaudit.behaviour.probe import study_of, weigh
from projaudit.behaviour.search import universal
from projaudit.behaviour.speaker import Speaker
from projaudit.projector import Linear

TOKENIZER = Path(__file__).parent / "testbed" / "exported" / "base"
# hidden, intermediate, layers, heads of the language model; hidden, layers, heads, image, patch
SIZES = {
    "7b": ((4096, 11008, 32, 32), (1024, 24, 16, 336, 14)),
    "1b": ((2048, 5632, 22, 32), (1024, 24, 16, 336, 14)),
    "tiny": ((64, 128, 2, 4), (48, 2, 4, 64, 16)),
}


def build(size: str, device: torch.device, dtype: torch.dtype) -> Speaker:
    """A model of random weights, made on the device in its dtype, with the testbed's tokenizer."""
    (hidden, inner, layers, heads), (width, depth, eyes, image, patch) = SIZES[size]
    processor: Any = AutoProcessor.from_pretrained(TOKENIZER)  # type: ignore[no-untyped-call]
    processor.patch_size = patch
    for key in ("size", "crop_size"):
        setattr(processor.image_processor, key, {"height": image, "width": image})
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=eyes,
            image_size=image,
            patch_size=patch,
        ),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image // patch) ** 2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.eval()  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return Speaker(model, processor, model.model.multi_modal_projector, device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.behaviour_cost")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    large = args.size == "7b"
    speaker = build(args.size, device, torch.bfloat16 if large else torch.float32)
    base = {n: t.clone() for n, t in speaker.projector.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    tuned = {
        n: t + 0.02 * t.std().cpu().item() * torch.randn(t.shape, generator=generator).to(t)
        for n, t in base.items()
        if t.ndim == 2
    }
    request = {
        "prompts": None,
        "images": None,
        "seed": 1,
        "budget": BUDGET_LARGE if large else BUDGET,
        "dtype": "bfloat16" if large else "float32",
        "notes": [],
    }
    started = time.monotonic()
    shape = (*base["linear_1.weight"].shape,)
    first = Linear("linear_1", "linear_1.weight", "linear_1.bias", shape)
    study, prompts, unread = study_of(request, (speaker, {**base, **tuned}), (speaker, base), first)
    heard = weigh(request, study, prompts, unread, lambda what, done, total: None)
    probed = time.monotonic() - started
    started = time.monotonic()
    for voice in (study.tuned, study.base):
        assert voice is not None
        universal(
            speaker, voice.side, (300, 301, 302), study.plain, study.prompts,
            fit=range(3), test=range(3, 6), steps=24,
        )  # fmt: skip
    searched = time.monotonic() - started
    print(
        json.dumps(
            {
                "size": args.size,
                "parameters": heard["parameters"],
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "probe_seconds": round(probed, 1),
                "probes": heard["probes"],
                "answers": heard["answers"],
                "seconds_per_text_looked_at": round(searched, 1),
                "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 1)
                if device.type == "cuda"
                else None,
            }
        )
    )


if __name__ == "__main__":
    main()
