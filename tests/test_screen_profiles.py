"""What the attention pass says of samples: beside full maps, other stores, other processes."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import vlms
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from projaudit.errors import FormatError, ProjauditError, UsageError
from projaudit.screen.attention import rows_of
from projaudit.screen.profiles import Profiles, read_profiles
from projaudit.screen.profiling import heat, profile
from projaudit.screen.samples import PLACEHOLDER, Sample
from projaudit.screen.spans import ANSWER, SYSTEM, TEXT, VISION, encode
from projaudit.screen.spread import _Profiler
from projaudit.screen.work import Job, Worker

QUESTION = "What is it?"
ANSWERS = ("red", "a dog and a cat", "no")


def picture(number: int) -> Image.Image:
    """Images of several sizes, so that processors that tile or keep sizes differ by sample."""
    rng = np.random.default_rng(number)
    size = ((24, 40, 3), (40, 24, 3), (32, 32, 3))[number % 3]
    return Image.fromarray(rng.integers(0, 255, size, np.uint8))


def row(number: int, image: object) -> dict[str, Any]:
    return {
        "id": f"s{number}",
        "image": image,
        "conversations": [
            {"from": "human", "value": f"{PLACEHOLDER}\n{QUESTION} {number}"},
            {"from": "gpt", "value": ANSWERS[number % 3]},
        ],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten good samples, as LLaVA writes them."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(10):
        picture(number).save(folder / f"{number}.png")
    rows = [row(number, f"{number}.png") for number in range(10)]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = vlms.save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.fixture(scope="module")
def plain(models: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Profiles:
    return profile(str(models("llava")), str(data), tmp_path_factory.mktemp("plain"), batch=4)


def equal(one: Profiles, other: Profiles, within: float = 0.0) -> None:
    assert one.ids == other.ids
    assert one.statuses == other.statuses
    assert one.answers == other.answers
    np.testing.assert_array_equal(one.image_tokens, other.image_tokens)
    np.testing.assert_allclose(one.entropy, other.entropy, rtol=0, atol=within)
    np.testing.assert_allclose(one.shares, other.shares, rtol=0, atol=within)


def job(model: Path, data: Path, **changes: Any) -> Job:
    asked = {"positions": 16, "batch": 4, "samples": 10, "offline": False}
    return Job(str(model), str(data), None, None, **(asked | changes), part=64, folder="")


# --- the pass beside the papers' own way: whole maps of an eager model ----------------------------


HYBRID = ["llava_qwen3_5", "llava_lfm2"]


@pytest.mark.parametrize("family", [*vlms.FAMILIES, "llava_gemma2", *HYBRID])
def test_the_pass_says_what_whole_maps_say(models, data, tmp_path, family):
    import transformers as hf

    model = models(family)
    found = profile(str(model), str(data), tmp_path / "out", batch=5)
    assert set(found.statuses) == {"ok"}
    eager = hf.AutoModelForImageTextToText.from_pretrained(model, attn_implementation="eager")
    entropies = 0
    with Worker(job(model, data), "cpu") as worker:
        for number in (0, 1, 2):
            batch, _ = worker.prepare([number])
            with torch.no_grad():
                maps = eager(**batch.inputs, output_attentions=True).attentions
            maps = [whole for whole in maps if whole is not None]
            assert len(maps) == len(found.about["layer_numbers"])
            kinds = batch.spans[0].kinds
            for p in range(len(batch.spans[0].targets)):
                at = batch.spans[0].first + p
                for layer, whole in enumerate(maps):
                    line = whole[0, :, at].double().numpy()  # (heads, tokens)
                    seen = kinds[: line.shape[1]]
                    shares = [line[:, seen == kind].sum(1) for kind in (SYSTEM, VISION, TEXT)]
                    ours = found.shares[number, p, layer]
                    np.testing.assert_allclose(ours, np.stack(shares, -1), atol=1e-5)
                    image = line.mean(0)[seen == VISION]
                    if image.sum() == 0:  # out of the layer's window
                        assert np.isnan(found.entropy[number, p, layer])
                        continue
                    image = image[image > 0] / image.sum()
                    wanted = -(image * np.log(image)).sum()
                    assert found.entropy[number, p, layer] == pytest.approx(wanted, abs=1e-5)
                    entropies += 1
    assert entropies > 20
    assert np.nanstd(found.shares[:, 0]) > 0.01  # the control: there is something to compare


def test_a_model_without_sdpa_is_read_by_hooks(models, data, tmp_path, monkeypatch):
    # Gemma 2 caps its scores, which sdpa cannot: were it computed as rows, the cap would be lost.
    monkeypatch.setattr("projaudit.screen.attention.rows_of", None)
    found = profile(str(models("llava_gemma2")), str(data), tmp_path / "out")
    assert set(found.statuses) == {"ok"}
    with pytest.raises(TypeError):
        profile(str(models("llava")), str(data), tmp_path / "other")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(2, 9),
    st.sampled_from(["none", "bool", "float", "not causal"]), st.integers(0, 1000),
)  # fmt: skip
def test_rows_are_rows_of_the_softmax(batch, groups, each, tokens, kind, seed):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, groups * each, tokens, 4, generator=g)
    key = torch.randn(batch, groups, tokens, 4, generator=g)
    allowed = torch.ones(tokens, tokens).tril().bool().expand(batch, 1, -1, -1).clone()
    allowed[:, :, 1:, 0] &= torch.rand(batch, 1, tokens - 1, generator=g) > 0.5
    mask = {
        "bool": allowed,
        "float": torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min),
    }.get(kind)
    scores = query @ key.repeat_interleave(each, 1).transpose(2, 3) * 0.3
    if kind == "none":
        allowed = torch.ones(tokens, tokens).tril().bool()
    whole = scores if kind == "not causal" else scores.masked_fill(~allowed, -torch.inf)
    rows = torch.randint(tokens, (batch, 3), generator=g)
    causal = False if kind == "not causal" else None
    found = rows_of(query, key, mask, rows, scaling=0.3, is_causal=causal)
    for b in range(batch):
        torch.testing.assert_close(found[b], whole.softmax(-1)[b][:, rows[b]])


# --- spans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", vlms.FAMILIES)
@pytest.mark.parametrize(
    ("system", "before", "after", "answer"),
    [
        ("", "", "What is it?", "A dog."),
        ("Be brief.", "", "user", "user"),  # words that the template says too
        ("", "Look:", "and tell.", "A dog. It is a dog."),
        ("Tell.", "Tell.", "", "Tell."),  # the same thrice
        ("", "", "ß 語 <b>", "\N{DOG FACE} ja"),
    ],
)
def test_spans_are_the_parts_of_the_sample(models, data, family, system, before, after, answer):
    sample = Sample(0, "0", image=picture(0), system=system, before=before, after=after)
    sample = Sample(**{**vars(sample), "answer": answer})
    with Worker(job(models(family), data), "cpu") as worker:
        loaded = worker.loaded
        other = Sample(1, "1", image=picture(1), after="Why?", answer="Because of a long story.")
        batch, refused = encode(
            loaded.processor, [sample, other], loaded.image_token, 99, loaded.longest
        )
    assert not refused
    spans, words = batch.spans[0], loaded.processor.tokenizer
    ids = batch.inputs["input_ids"][0, : len(spans.kinds)]
    kinds = torch.from_numpy(spans.kinds[: len(ids)])

    def said(kind: int) -> str:
        return words.decode(ids[kinds == kind])

    assert said(TEXT) == before + after
    assert said(ANSWER)[: len(answer)] == answer
    assert (ids == loaded.image_token).sum() == (kinds == VISION).sum() > 3
    assert QUESTION not in said(SYSTEM)
    if system:
        assert system in said(SYSTEM)
    assert spans.kinds[spans.first] != ANSWER
    assert words.decode(spans.targets).startswith(answer)
    assert len(spans.targets) == (spans.kinds == ANSWER).sum() + 1  # and what ends it


def test_positions_count_from_the_last_token_of_the_prompt(models, data, tmp_path):
    found = profile(str(models("qwen2_vl")), str(data), tmp_path / "out", positions=4, limit=3)
    assert found.answers == (
        ("r", "e", "d", "<|im_end|>"),
        ("a", " ", "d", "o"),
        ("n", "o", "<|im_end|>"),
    )
    assert found.shares.shape == (3, 4, 3, 4, 3)
    rest = 1 - found.shares.sum(-1)
    assert abs(rest[:, 0]).max() < 1e-5  # nothing of the answer has been said yet
    assert (rest[:, 1] > 1e-7).any()
    assert np.isnan(found.shares[2, 3]).all()
    assert np.isnan(found.entropy[2, 3]).all()
    assert found.about["layers"] == 3
    assert found.about["heads"] == 4


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_padding_changes_nothing(models, data, tmp_path, family):
    one = profile(str(models(family)), str(data), tmp_path / "one", batch=1, limit=6)
    many = profile(str(models(family)), str(data), tmp_path / "many", batch=6, limit=6)
    equal(one, many, within=1e-5)


# --- the store ------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr("projaudit.screen.profiling.PART", 4)
    model, out = str(models("llava")), tmp_path / "out"

    class Interrupted(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        profile(model, str(data), out, batch=4, progress=stop)
    first = out / "part-000000000.parquet"
    assert sorted(out.iterdir()) == [first]
    written = first.stat().st_mtime_ns
    (out / "part-000000004.partial").write_bytes(b"half of")
    seen: list[tuple[str, int, int]] = []
    resumed = profile(model, str(data), out, batch=4, progress=lambda *a: seen.append(a))
    assert seen == [("samples", 8, 10), ("samples", 10, 10)]
    assert first.stat().st_mtime_ns == written
    equal(resumed, profile(model, str(data), tmp_path / "whole", batch=4))
    equal(resumed, read_profiles(out))


def test_equal_runs_write_equal_bytes(models, data, tmp_path):
    for name in ("one", "two"):
        profile(str(models("llava")), str(data), tmp_path / name)
    part = "part-000000000.parquet"
    assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "two" / part).read_bytes()


def test_another_run_is_not_mixed_in(models, data, tmp_path):
    model, out = str(models("llava")), tmp_path / "out"
    profile(model, str(data), out, limit=4)
    before = (out / "part-000000000.parquet").read_bytes()
    for changed in ({"limit": 5}, {"positions": 3, "limit": 4}, {"batch": 2, "limit": 4}):
        with pytest.raises(UsageError, match="another model, dataset or setting") as caught:
            profile(model, str(data), out, **changed)
        assert caught.value.code == "usage.profiles"
    with pytest.raises(UsageError):  # although nothing is left to do
        profile(str(models("idefics3")), str(data), out, limit=4)
    assert (out / "part-000000000.parquet").read_bytes() == before


@pytest.mark.parametrize(
    "broken",
    [
        lambda f: f.write_bytes(b"PAR1 is all there is"),
        lambda f: pq.write_table(pa.table({"number": [0]}), f),
        lambda f: pq.write_table(pq.read_table(f).replace_schema_metadata({"projaudit": "[]"}), f),
        lambda f: pq.write_table(pq.read_table(f).drop_columns("shares"), f),
        lambda f: pq.write_table(
            pq.read_table(f).set_column(
                6, "entropy", pa.array([[0.5]] * 4, pa.list_(pa.float32()))
            ),
            f,
        ),
    ],
)
def test_a_broken_store_is_one_line(models, data, tmp_path, broken):
    profile(str(models("llava")), str(data), tmp_path / "out", limit=4)
    broken(tmp_path / "out" / "part-000000000.parquet")
    with pytest.raises(FormatError) as caught:
        read_profiles(tmp_path / "out")
    assert caught.value.code.startswith("format.")
    assert "part-000000000.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_part_that_stands_twice_is_one_line(models, data, tmp_path):
    out = tmp_path / "out"
    profile(str(models("llava")), str(data), out, limit=4)
    (out / "part-000000002.parquet").write_bytes((out / "part-000000000.parquet").read_bytes())
    with pytest.raises(FormatError, match="holds a sample twice"):
        read_profiles(out)


# --- several processes ----------------------------------------------------------------------------


def test_two_processes_say_what_one_does(models, data, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("projaudit.screen.profiling.PART", 4)
    found = profile(
        str(models("llava")), str(data), tmp_path / "out", batch=4, devices=["cpu", "cpu"]
    )
    equal(found, plain)


@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_of_two_workers_says_what_one_process_does(
    models, data, plain, tmp_path, monkeypatch
):
    monkeypatch.setattr("projaudit.screen.profiling.PART", 4)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = profile(
        str(models("llava")), str(data), tmp_path / "out", batch=4, devices=["ray", "ray"]
    )
    equal(found, plain)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_worker_of_ray_takes_as_many_threads_as_one_process(models, data):
    """Ray gives it one, and sums in another order are not the same to the last bit."""
    before = torch.get_num_threads()
    try:
        _Profiler(replace(job(models("llava"), data), threads=before + 1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_an_error_in_another_process_is_what_it_was():
    error = UsageError("is wrong", "option", file="a", field="--batch", remedy="none")
    there = pickle.loads(pickle.dumps(error))
    assert (str(there), there.code) == (str(error), "usage.option")


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_counts_as_if_it_were_merged(models, data, plain, tmp_path):
    import peft
    import transformers as hf

    base = models("llava")
    torch.manual_seed(1)
    tuned = peft.get_peft_model(
        hf.AutoModelForImageTextToText.from_pretrained(base),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "linear_1"]),
    )
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for file in base.iterdir():
        if not (tmp_path / "merged" / file.name).exists():
            (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    adapted = profile(
        str(base), str(data), tmp_path / "a", adapter=str(tmp_path / "adapter"), batch=4
    )
    equal(adapted, profile(str(tmp_path / "merged"), str(data), tmp_path / "m", batch=4), 1e-4)
    assert np.nanmax(abs(adapted.shares - plain.shares)) > 0.05  # the control
    assert adapted.about["adapter_digest"].startswith("sha256:")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["target_modules"] = r"((.*)*)*!|.*\.(q_proj|v_proj|linear_1)"  # would take for ever
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    again = profile(
        str(base), str(data), tmp_path / "c", adapter=str(tmp_path / "adapter"), batch=4
    )
    equal(again, adapted)
    with pytest.raises(UsageError, match="is an adapter"):
        profile(str(tmp_path / "adapter"), str(data), tmp_path / "b")


# --- heat -----------------------------------------------------------------------------------------


def test_heat_is_the_attention_behind_the_shares(models, data, plain):
    model = str(models("llava"))
    head, mean = heat(model, str(data), [(1, 2, 1, 3), (1, 2, 1, None)])
    assert head.grid == (4, 4)
    assert head.weights.sum() == pytest.approx(plain.shares[1, 2, 1, 3, VISION], abs=1e-5)
    seen = mean.weights / mean.weights.sum()
    assert -(seen * np.log(seen)).sum() == pytest.approx(plain.entropy[1, 2, 1], abs=1e-5)
    (wide,) = heat(str(models("qwen2_vl")), str(data), [(0, 0, 0, 0)])
    assert wide.grid[0] < wide.grid[1]  # 24 pixels high, 40 wide
    assert wide.grid[0] * wide.grid[1] == len(wide.weights)
    (tiles,) = heat(str(models("internvl")), str(data), [(0, 0, 0, 0)])
    assert tiles.grid is None
    for nowhere in ((99, 0, 0, 0), (0, 0, 7, 0), (0, 9, 0, 0), (0, 0, 0, 9)):
        with pytest.raises(UsageError):
            heat(model, str(data), [nowhere])


# --- models that cannot be profiled ---------------------------------------------------------------


def test_what_cannot_be_profiled_is_one_line(models, data, tmp_path):
    def refused(change: Any, **options: Any) -> str:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in models("llava").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder)
        with pytest.raises(ProjauditError) as caught:
            profile(str(folder), str(data), tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def config(**changes: Any) -> Any:
        def change(folder: Path) -> None:
            content = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(content | changes))

        return change

    assert "no vision tower" in refused(config(vision_config=None))
    assert "no chat template" in refused(lambda f: (f / "chat_template.jinja").unlink())
    assert "needs code of its own" in refused(config(auto_map={"AutoModel": "evil.Model"}))
    assert "is no adapter" in refused(lambda f: None, adapter=str(models("llava")))
    assert "no tokenizer" in refused(lambda f: (f / "tokenizer.json").unlink())


def test_a_model_without_attention_or_image_tokens_is_said(models, data, tmp_path):
    with pytest.raises(ProjauditError, match="no layer of its language model shows attention"):
        profile(str(models("llava_linear")), str(data), tmp_path / "linear")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in models("llava").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": 7}))
    found = profile(str(folder), str(data), tmp_path / "out")
    assert found.statuses == ("unprocessable",) * 10
    assert set(found.details) == {"its processor makes no image tokens of its image"}


def test_layers_without_attention_are_counted(models, data, tmp_path):
    found = profile(str(models("llava_qwen3_5")), str(data), tmp_path / "out", limit=3)
    assert (found.about["layer_numbers"], found.about["layers_left_out"]) == ([1], 2)
    every = profile(str(models("llava")), str(data), tmp_path / "every", limit=3)
    assert every.about["layers_left_out"] == 0


def test_attention_that_is_not_finite_is_a_status(models, data, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for file in models("llava").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.self_attn.q_proj.weight"))
    tensors[name] = tensors[name] * torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = profile(str(folder), str(data), tmp_path / "out", limit=3)
    assert found.statuses == ("non-finite",) * 3
    assert np.isnan(found.shares).all()
