"""Captions by a tiny BLIP with random weights, written as stock transformers does."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipTextConfig,
    BlipVisionConfig,
)

from pentimento.captioner import Captioner
from pentimento.errors import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "on", "mat"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = BlipTextConfig(
        **small, vocab_size=len(WORDS), bos_token_id=2, sep_token_id=3, eos_token_id=3, pad_token_id=0,
        encoder_hidden_size=16, is_decoder=True,
    )  # fmt: skip
    vision = BlipVisionConfig(**small, image_size=32, patch_size=16)
    torch.manual_seed(0)
    BlipForConditionalGeneration(
        BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    ).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    BertTokenizer({word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def test_a_caption_is_one_line_of_words(blip: Path) -> None:
    said = Captioner(str(blip)).caption(Image.new("RGB", (40, 20), "red"))
    assert said and set(said.split()) <= set(WORDS[5:])
    assert said == Captioner(str(blip)).caption(Image.new("RGB", (40, 20), "red"))


def test_what_is_no_captioner(tmp_path: Path, blip: Path) -> None:
    picture = Image.new("RGB", (40, 20))
    with pytest.raises(UserError, match="cannot be loaded as a captioner"):
        Captioner(str(tmp_path)).caption(picture)
    with pytest.raises(UserError, match="Salesforce/blip-image-captioning-base is not"):
        Captioner("auto").caption(picture)
    with pytest.raises(UserError, match="there is no folder 'no name'"):
        Captioner("no name").caption(picture)
