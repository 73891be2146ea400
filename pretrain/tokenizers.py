"""The tokenizers of the pocket models: whole words of the drawn world's grammar, and letters for everything else.

``python -m pretrain tokenizers --out FOLDER`` writes ``tokenizer`` (CLIP's byte-level BPE) and ``tokenizer_2`` (T5's unigram).
"""

import itertools
import json
import re
import string
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from pentimento.pocket import scene as world
from pentimento.pocket.captions import STYLE_PREFIX
from pentimento.pocket.tasks import TASKS, cases

DIPTYCH = "a diptych with two side-by-side images of the same scene . on the left , . on the right , the scene is exactly the same as on the left but"
FREE = """
a about add all also an and any apply at away back be beautiful become becomes before below big bigger black blond blonde blue body bright
brighter brightness but by can cap change changed charcoal child clothes coat color colour coloured contrast convert cool copy cute dark
darker day delete different do does drawing dress dye edit edited else erase every everything exactly eye eyes eyebrows eyeglasses face fat
fill filled first for frame from front get girl give glad go good gray grey ground guy hair hand happy has have he head her here hers hide
high him his i image in ink insert inside instead into is it its just keep lady large larger later left less let light lighter like line
little long longer look looks low made make makes man me middle more move much natural neck negative new next nice night no normal not now
object of off old older on one only onto or original other out outside over paint painting paper pencil people person photo photograph
picture pixels place please portrait print put red redraw remove rid right round sad same scene second see shape shapes she shirt short
shorter should show shown side sketch skin sky slim slimmer small smaller smile so some something spectacles strong style sunglasses swap
take tall than that the their them then there these they thin thing this to tone too top turn two under unchanged up version very vintage
warm was watercolor we wear wearing wears what where which white whole wide wider will with without woman wrinkles year years you young
younger your zero three four five sepia invert inverted colors posterize posterized cartoon ink edges edge glow soft sharp blur
"""


def words() -> list[str]:
    """Every word of the world's tables, captions and instructions, then common words of editing requests."""
    texts = [
        DIPTYCH,
        *STYLE_PREFIX,
        *world.COLOURS,
        *world.CSS,
        *world.CELLS,
        *world.TEXTURES,
        *world.SHAPES,
        *world.HAIR_STYLES,
        *world.EYES,
    ]
    for task in TASKS:
        for split in ("train", "test"):
            for case in itertools.islice(cases(task, split), 300):
                texts += [case.instruction, case.source_prompt, case.target_prompt]
    found = {w for text in texts for w in re.findall(r"[a-z]+", text.lower())}
    return sorted(found | set(FREE.split()))


def t5(vocabulary: list[str]) -> T5Tokenizer:
    """Unigram: a known word (also capitalised) is one piece; other text falls apart into characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{w}", -6.0) for w in vocabulary]
    pieces += [(f"▁{w.capitalize()}", -6.5) for w in vocabulary]
    pieces += [(w, -6.5) for w in ("aged", "by", "side")]  # after a hyphen
    letters = string.ascii_letters + string.digits + ",.;:!?'\"-()/&%+*#"
    return T5Tokenizer(
        vocab=pieces + [(c, -9.0) for c in letters],
        extra_ids=0,
        additional_special_tokens=["<extra_id_0>"],
        model_max_length=64,
    )


def clip(vocabulary: list[str]) -> CLIPTokenizer:
    """Byte-level BPE whose merges build each known word whole."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=20_000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([" ".join(vocabulary)] * 2, trainer)
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *alphabet,
        *(c + "</w>" for c in alphabet),
        *("".join(m) for m in merges),
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocab, merges=[(a, b) for a, b in merges if a in vocab and b in vocab], model_max_length=77
    )


def write(out: Path) -> None:
    vocabulary = words()
    clip(vocabulary).save_pretrained(str(out / "tokenizer"))
    t5(vocabulary).save_pretrained(str(out / "tokenizer_2"))
