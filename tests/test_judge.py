"""Judges that answer from afar, in every way that goes wrong, from a model in memory, and by lying."""

import base64
import io
import json
import socket
from pathlib import Path

import pytest
import torch
from endpoint import KEY, Endpoint, drip, hang, hang_up, refuse, say, send
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pentimento.errors import UserError
from pentimento.judges import Unreliable, Verdict, open_judge, wording
from pentimento.judges.http import Http
from pentimento.judges.local import Local

SOURCE, FIRST, SECOND = (Image.new("RGB", (12, 8), colour) for colour in ("white", "red", "blue"))
PNG = b"\x89PNG\r\n\x1a\n and so on"


def judge(endpoint: Endpoint, **settings: float) -> Http:
    """One that does not wait long."""
    quick = {"timeout": 5.0, "pause": 0.01, "longest_pause": 0.05} | settings
    return Http(base=endpoint.url, model="a-model", key=KEY, **quick)  # type: ignore[arg-type]


def ask(endpoint: Endpoint, **settings: float) -> Verdict:
    return judge(endpoint, **settings).compare(SOURCE, FIRST, SECOND, "make it red")


def pictures(message: dict) -> list[Image.Image]:
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    return [
        Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) for url in urls
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1", (1, "1")),
        ("2. It keeps the background.", (2, "It keeps the background.")),
        ("**1** because\nit is red", (1, "because it is red")),
        ("Candidate 2 is better.", (2, "is better.")),
        ("<think>Candidate 1 looks odd, 1 of 2.</think>\n2: sharper", (2, "sharper")),
        ("(1), clearly", (1, "clearly")),
        ("Of 12 points, 2 is ahead", (2, "is ahead")),
        ("it is v1.5 with 10/10, so 1/2 ... 2", (2, "it is v1.5 with 10/10, so 1/2 ... 2")),
        ("both are good", None),
        ("<think>1 or 2? 1", None),
        ("21", None),
        ("", None),
    ],
)
def test_the_first_stand_alone_number_counts(answer: str, expected: tuple[int, str] | None) -> None:
    assert wording.read(answer) == expected


def test_the_question_says_what_the_paper_asks() -> None:
    text = wording.question("make her  hair\ngreen")
    assert '"make her hair green"' in text
    for words in (
        "candidate 1",
        "candidate 2",
        "original",
        "artefacts",
        "exactly as in the original",
        "style",
        "1 or 2",
    ):
        assert words in text


def test_pictures_go_in_the_order_candidates_then_original(endpoint: Endpoint) -> None:
    verdict = ask(endpoint)
    assert (verdict.choice, verdict.reason, verdict.raw) == (1, "it is better", "1: it is better")
    (request,) = endpoint.asked
    assert request["path"] == "/v1/chat/completions"
    assert request["key"] == f"Bearer {KEY}"
    assert (request["model"], request["temperature"]) == ("a-model", 0)
    system, user = request["messages"]
    assert system == {"role": "system", "content": wording.ROLE}
    assert [p.getpixel((0, 0)) for p in pictures(user)] == [
        p.getpixel((0, 0)) for p in (FIRST, SECOND, SOURCE)
    ]
    assert [part["text"] for part in user["content"] if part["type"] == "text"] == [
        *wording.ORDER, wording.question("make it red"),
    ]  # fmt: skip


def test_large_pictures_are_scaled_down_for_the_judge(endpoint: Endpoint) -> None:
    large = Image.new("RGB", (3000, 1500), "red")
    judge(endpoint).compare(large, large, large, "x")
    assert {p.size for p in pictures(endpoint.asked[0]["messages"][1])} == {(1024, 512)}


@pytest.mark.parametrize(
    "trouble",
    [
        refuse(429, Retry_After="0.02"),
        refuse(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        refuse(503, Retry_After="soon"),
        refuse(500),
        send(b"<html>Bad gateway</html>", status=502, kind="text/html"),
        send(b'{"choices": [{"mess'),
        send(b'{"choices": []}'),
        send(b"[]"),
        send(b""),
        send(b"<html>hello</html>", kind="text/html"),
        send(PNG, kind="image/png"),
        send(b"\xff\xfe\x00", kind="text/plain"),
        send(b'{"choices"', length=500),
        say(None),
        hang_up,
    ],
)  # fmt: skip
def test_one_bad_answer_is_survived(endpoint: Endpoint, trouble) -> None:
    endpoint.answers = [trouble, say("2 it is")]
    verdict = ask(endpoint)
    assert verdict.choice == 2, verdict.reason
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize(
    ("trouble", "words", "times"),
    [
        (refuse(429, "slow down"), "429 Too Many Requests: slow down", 3),
        (refuse(500, "oops"), "500 Internal Server Error: oops", 3),
        (refuse(401, f"Incorrect API key provided: {KEY}"), "Incorrect API key provided: ***", 1),
        (refuse(403), "403 Forbidden", 1),
        (refuse(404, "no model a-model"), "no model a-model", 1),
        (send(b"", status=302, Location="http://elsewhere.test/v1"), "redirects to http://elsewhere.test/v1", 1),
        (send(b'{"choices": [{"mess'), "broken JSON", 3),
        (send(b'{"error": "overloaded"}'), "overloaded", 3),
        (send(b"<!doctype html><p>log in"), "a web page", 3),
        (send(PNG, kind="image/png"), "a picture", 3),
        (send(b'{"choices"', length=500), "broken JSON", 3),
        (send(b" " * (2 << 20)), "bytes", 1),
        (hang_up, "http://127.0.0.1", 3),
    ],
)  # fmt: skip
def test_lasting_trouble_ends_in_a_verdict_that_says_so(
    endpoint: Endpoint, trouble, words: str, times: int
) -> None:
    endpoint.answers = [trouble]
    verdict = ask(endpoint)
    assert verdict.choice is None
    assert words in verdict.reason
    assert KEY not in f"{verdict.reason}{verdict.raw}"
    assert len(endpoint.asked) == times


@pytest.mark.parametrize("slow", [hang(3), drip])
def test_a_request_ends_in_time_whatever_the_endpoint_does(endpoint: Endpoint, slow) -> None:
    endpoint.answers = [slow]
    verdict = ask(endpoint, timeout=0.2, tries=2)
    assert verdict.choice is None
    assert "did not answer within 0.2 s (2 tries)" in verdict.reason


def test_the_pause_grows_and_follows_the_server_up_to_a_limit(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("pentimento.judges.http.sleep", pauses.append)
    endpoint.answers = [refuse(429)]
    ask(endpoint, pause=1.0, longest_pause=30.0, tries=4)
    assert pauses == [1, 2, 4]
    endpoint.answers = [refuse(429, Retry_After="7"), refuse(429, Retry_After="3600"), say("1")]
    assert ask(endpoint, pause=1.0, longest_pause=30.0).choice == 1
    assert pauses[3:] == [7, 30]


def test_an_answer_without_a_number_is_asked_for_again_once(endpoint: Endpoint) -> None:
    endpoint.answers = [say("the red one"), say([{"type": "text", "text": "2 then"}])]
    assert ask(endpoint).choice == 2
    again = endpoint.asked[1]["messages"]
    assert again[:2] == endpoint.asked[0]["messages"]
    assert [m["content"] for m in again[2:]] == ["the red one", wording.AGAIN]
    endpoint.answers = [say("the red one")]
    verdict = ask(endpoint)
    assert (verdict.choice, verdict.raw) == (None, "the red one")
    assert "names neither" in verdict.reason
    assert len(endpoint.asked) == 4


def test_a_model_that_refuses_settings_is_asked_without_them(endpoint: Endpoint) -> None:
    endpoint.answers = [refuse(400, "Unsupported value: 'temperature'"), say("1")]
    assert ask(endpoint).choice == 1
    assert "temperature" not in endpoint.asked[1] and "max_tokens" not in endpoint.asked[1]
    endpoint.answers = [refuse(400, "bad picture")]
    assert "bad picture" in ask(endpoint).reason


def test_opening_asks_first_whether_the_endpoint_is_there(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_judge("http", timeout=5)
    assert opened.name == "http Qwen/Qwen2.5-VL-72B-Instruct"
    assert KEY not in repr(opened)
    assert endpoint.asked == []
    for tolerated in (refuse(404), refuse(405), refuse(500), send(b"<html>"), send(PNG)):
        endpoint.probe = tolerated
        open_judge("http", model="mine", timeout=5)
    for status in (401, 403):
        endpoint.probe = refuse(status, f"key {KEY} is wrong")
        with pytest.raises(UserError, match=r"refuses the key in OPENAI_API_KEY.*key \*\*\* is wrong"):
            open_judge("http", timeout=5)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        open_judge("http", timeout=5)
    for bad in (hang(3), hang_up):
        endpoint.probe = bad
        with pytest.raises(UserError, match="check OPENAI_BASE_URL"):
            open_judge("http", timeout=0.2)


def test_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens on it
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(UserError, match="check OPENAI_BASE_URL"):
            open_judge("http", timeout=2)


@pytest.mark.parametrize(
    ("url", "key", "words"),
    [
        ("", "", "set OPENAI_BASE_URL"),
        ("127.0.0.1:8000", "", "should be an address"),
        ("ftp://host/v1", "", "should be an address"),
        ("http://host:port/v1", "", "should be an address"),
        ("http://user:secret@host/v1", "", "without user"),
        ("http://host/v1?api_key=secret", "", "without user"),
        ("http://host/v1", "two\nlines", "OPENAI_API_KEY holds characters"),
    ],
)
def test_an_address_or_a_key_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, url: str, key: str, words: str
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError) as error:
        open_judge("http")
    assert words in str(error.value)
    assert "secret" not in str(error.value)


class Constant:
    """Always of one opinion, or of none."""

    name = "constant"

    def __init__(self, choice: int | None):
        self.verdict = Verdict(choice=choice, reason="so it is")  # type: ignore[arg-type]

    def compare(self, source, first, second, instruction) -> Verdict:
        return self.verdict


def test_a_judge_that_lies_now_and_then() -> None:
    def answers(probability: float, seed: int = 0, choice: int | None = 1) -> list[int | None]:
        liar = Unreliable(judge=Constant(choice), probability=probability, seed=seed)
        return [liar.compare(SOURCE, FIRST, SECOND, "x").choice for _ in range(400)]

    assert set(answers(0)) == {1} and set(answers(1)) == {2}
    assert answers(0.2).count(2) == pytest.approx(80, abs=20)
    assert answers(0.2) == answers(0.2) != answers(0.2, seed=1)
    assert set(answers(0.5, choice=None)) == {None}
    assert Unreliable(judge=Constant(1), probability=0.2).name == "constant, wrong in 20%"
    with pytest.raises(ValueError, match="between 0 and 1"):
        Unreliable(judge=Constant(1), probability=20)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_vlm(folder: Path, *, allowed: str = "12") -> Path:
    """A LLaVA of random weights that may say nothing but one of the ``allowed`` letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(chr(code) for code in range(33, 127)), "▁"]
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split("", "isolated")]
    )
    letters.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, num_hidden_layers=2, image_size=16, patch_size=8, projection_dim=16)
    text = LlamaConfig(
        **small, vocab_size=len(words), num_hidden_layers=1, num_key_value_heads=2, max_position_embeddings=4096,
        initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=4,
            vision_feature_select_strategy="default",
        )
    )
    spoken = [words.index(letter) for letter in allowed]
    model.generation_config.suppress_tokens = [i for i in range(len(words)) if i not in spoken]
    model.generation_config.eos_token_id = spoken
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny vision model; do not write to it."""
    return write_vlm(tmp_path_factory.mktemp("judges") / "tiny-llava")


def test_a_local_model_is_asked_with_three_pictures_and_the_question(vlm: Path) -> None:
    judge = Local.load(str(vlm), device="cpu")
    assert judge.name == "local tiny-llava"
    verdict = judge.compare(SOURCE, FIRST, SECOND, "make it red")
    assert verdict.choice in (1, 2)
    assert verdict == judge.compare(SOURCE, FIRST, SECOND, "make it red")
    # The same by hand: what stands before the answer, and which of the two digits is likelier.
    shown = "".join(f"{caption}<image>" for caption in wording.ORDER)
    text = f"user: {wording.ROLE}{shown}{wording.question('make it red')}assistant: "
    inputs = judge.processor(text=text, images=[FIRST, SECOND, SOURCE], return_tensors="pt")
    with torch.no_grad():
        logits = judge.model(**inputs).logits[0, -1]
    digits = judge.processor.tokenizer.convert_tokens_to_ids(["1", "2"])
    assert verdict.choice == 1 + int(logits[digits].argmax())
    assert verdict.raw == str(verdict.choice)


def test_a_local_model_sees_candidates_then_original(vlm: Path) -> None:
    judge = Local.load(str(vlm), device="cpu")
    seen: list[torch.Tensor] = []
    tower = judge.model.model.vision_tower
    tower.register_forward_pre_hook(
        lambda module, args, options: seen.append(args[0] if args else options["pixel_values"]),
        with_kwargs=True,
    )
    judge.compare(SOURCE, FIRST, SECOND, "x")
    expected = judge.processor.image_processor([FIRST, SECOND, SOURCE], return_tensors="pt")["pixel_values"]
    assert torch.equal(seen[0], expected)


def test_a_local_model_that_names_neither(tmp_path: Path) -> None:
    judge = open_judge("local", model=str(write_vlm(tmp_path / "mute", allowed="?")), device="cpu")
    verdict = judge.compare(SOURCE, FIRST, SECOND, "make it red")
    assert (verdict.choice, verdict.raw) == (None, "?")
    assert "names neither" in verdict.reason


def _text_model(folder: Path, vlm: Path) -> None:
    folder.mkdir()
    for file in vlm.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )


def _copy(folder: Path, vlm: Path) -> None:
    folder.mkdir()
    for file in vlm.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def _cut(folder: Path, vlm: Path) -> None:
    _copy(folder, vlm)
    (folder / "model.safetensors").write_bytes((vlm / "model.safetensors").read_bytes()[:-100])


def _incomplete(folder: Path, vlm: Path) -> None:
    from safetensors.torch import load_file, save_file

    _copy(folder, vlm)
    tensors = load_file(vlm / "model.safetensors")
    del tensors[next(key for key in tensors if "embed_tokens" in key)]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _silent(folder: Path, vlm: Path) -> None:
    _copy(folder, vlm)
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder, vlm: None, "there is no such folder"),
        (lambda folder, vlm: folder.mkdir(), "cannot be loaded as a vision model"),
        (_text_model, "vision model"),
        (_cut, "cannot be loaded as a vision model"),
        (_incomplete, "the weights lack"),
        (_silent, "lacks a chat template"),
    ],
)
def test_what_is_no_local_judge(tmp_path: Path, vlm: Path, make, words: str) -> None:
    make(tmp_path / "model", vlm)
    with pytest.raises(UserError, match="judge_model=") as error:
        open_judge("local", model=str(tmp_path / "model"), device="cpu")
    assert words in str(error.value)


def test_a_local_judge_needs_a_model_and_a_device(vlm: Path) -> None:
    with pytest.raises(UserError, match="judge=local needs judge_model"):
        open_judge("local")
    with pytest.raises(UserError, match="judge_device=cuda:77"):
        open_judge("local", model=str(vlm), device="cuda:77")
    with pytest.raises(UserError, match="judge_model=nobody/nothing"):  # no test reaches the hub
        open_judge("local", model="nobody/nothing", device="cpu")
