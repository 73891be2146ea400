"""What benchmarks reuse and compare with."""

import argparse
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from benchmarks import photographs, quality
from pentimento.flux.backbone import Flux
from pentimento.methods.influxedit import InFluxEdit


def test_drawn_pairs_are_reused_for_the_same_settings_only() -> None:
    folders = {
        quality.pairs_folder(task, argparse.Namespace(out=Path("out"), pairs=pairs, captions=captions))
        for task in ("add-hat", "remove")
        for pairs in (64, 8)
        for captions in (False, True)
    }
    assert len(folders) == 8


def test_photographs_are_measured_beside_doing_nothing_and_the_autoencoder(fill: Flux, picture) -> None:
    sources = [picture(seed, 70, 45) for seed in (0, 1)]
    pairs = [(source, photographs.duotone(source)) for source in sources]
    editors = {
        "perfect": lambda image, words: photographs.duotone(image),
        "inverted": lambda image, words: ImageOps.invert(image),
        "nothing_done": lambda image, words: image,
        "encode_and_decode": photographs.round_trip(InFluxEdit(fill, InFluxEdit.Config()), fill),
    }
    gains, made = photographs.measure(pairs, editors)
    assert gains["perfect"] == pytest.approx([1, 1])
    assert gains["nothing_done"] == pytest.approx([0, 0], abs=1e-6)
    assert gains.keys() == made.keys() == editors.keys()
    assert all(
        isinstance(result, Image.Image) and result.size == (70, 45) for result in made["encode_and_decode"]
    )
    assert all(gain != 0 for gain in gains["encode_and_decode"])
