"""The lines of docs/interoperability.md, run as they stand: stock diffusers gives our picture."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pentimento.flux.dev import AttentionLoRA
from pentimento.method import EditSettings, Example
from pentimento.methods.icedit import DiptychLoRA, ICEdit
from pentimento.methods.influxedit import EditLoRA, InFluxEdit
from pentimento.methods.pairedit import PairEdit

PAGE = Path(__file__).parents[2] / "docs" / "interoperability.md"
PROMPT = "make it rain"


def lines(heading: str) -> str:
    """The Python of one section of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)[0]


@pytest.fixture
def trained(fill_config):
    """A method whose adapter has an effect, as if trained."""

    def build(**config) -> InFluxEdit:
        method = InFluxEdit.load(
            fill_config, InFluxEdit.Config(lora=EditLoRA(rank=3, alpha=5.0), max_sequence_length=24, **config)
        )
        torch.manual_seed(0)
        for parameter in method.adapters.train("edit"):
            torch.nn.init.normal_(parameter, std=0.2)
        return method

    return build


def run(
    text: str, folder: Path, model: Path, source: Image.Image, prompt: str = PROMPT, **more: object
) -> Image.Image:
    settings = {"num_inference_steps": 4, "guidance_scale": 30.0, "max_sequence_length": 24}
    names = {
        "MODEL": model,
        "RUN": folder,
        "PROMPT": prompt,
        "SEED": 7,
        "SETTINGS": settings,
        "source": source,
        **more,
    }
    exec(text, names)  # noqa: S102
    return names["result"]


@pytest.mark.parametrize(
    ("heading", "config"),
    [
        ("influxedit-split", {"mode": "split"}),
        ("influxedit-edit", {"mode": "edit"}),
        ("influxedit-edit", {"mode": "edit", "train_embedder": True}),
    ],
)
def test_stock_diffusers_gives_our_picture(trained, tiny_fill, tmp_path, picture, heading, config):
    method = trained(**config)
    source = picture(2, 64, 48)
    ours = method.edit(Example(source=source, prompt=PROMPT), EditSettings(seed=7, steps=4))
    base = method.edit(Example(source=source, prompt=PROMPT), EditSettings(seed=7, steps=4, scale=0.0))
    method.adapters.save(tmp_path / "weights")
    text = lines(heading)
    if method.config.train_embedder:
        loading = re.search("pipe.load_lora_weights.*\n", text).group()
        text = text.replace(loading, loading + lines("Runs with `train_embedder`"))
    theirs = run(text, tmp_path, tiny_fill, source)
    assert theirs.size == ours.size == (64, 48)
    assert difference(ours, theirs) <= 1, "equal up to one level of 255"
    assert difference(ours, base) > 8, "the adapter has an effect"


def test_stock_diffusers_gives_the_picture_of_icedit(fill_config, tiny_fill, tmp_path, picture):
    lora = DiptychLoRA(rank=3, alpha=5.0)
    method = ICEdit.load(
        fill_config, ICEdit.Config(lora=lora, max_sequence_length=24, resolution=64, sampling_guidance=30.0)
    )
    torch.manual_seed(0)
    for parameter in method.adapters.train("edit"):
        torch.nn.init.normal_(parameter, std=0.2)
    source, instruction = picture(2, 64, 48), PROMPT
    ours = method.edit(Example(source=source, prompt=instruction), EditSettings(seed=7, steps=4))
    base = method.edit(Example(source=source, prompt=instruction), EditSettings(seed=7, steps=4, scale=0.0))
    method.adapters.save(tmp_path / "weights")
    theirs = run(lines("icedit"), tmp_path, tiny_fill, source, prompt=method.text(instruction))
    assert theirs.size == ours.size == (64, 48)
    assert difference(ours, theirs) <= 1, "equal up to one level of 255"
    assert difference(ours, base) > 8, "the adapter has an effect"


def test_stock_diffusers_draws_the_sliders_picture(dev_config, tiny_dev, tmp_path):
    config = PairEdit.Config(lora=AttentionLoRA(rank=3), max_sequence_length=24, resolution=32)
    method = PairEdit.load(dev_config, config)
    torch.manual_seed(0)
    for parameter in method.adapters.train("semantic"):
        torch.nn.init.normal_(parameter, std=0.4)
    settings = EditSettings(seed=7, steps=4, scale=0.6, skip=1, guidance=30.0)
    ours = method.edit(Example(prompt=PROMPT), settings)
    base = method.edit(Example(prompt=PROMPT), replace(settings, scale=0.0))
    method.adapters.save(tmp_path / "weights")
    more = {"SKIP": 1, "SCALE": 0.6, "SIZE": 32}
    theirs = run(lines("pairedit"), tmp_path, tiny_dev, ours, **more)
    assert difference(ours, theirs) <= 1, "equal up to one level of 255"
    assert difference(ours, base) > 8, "the adapter has an effect"


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
