"""Caches never change what is trained on, and never answer with a damaged or outdated entry."""

import errno
import warnings
from dataclasses import replace

import pytest
import torch
import toy
from PIL import Image

from pentimento import files
from pentimento.cache import Loaded, Samples
from pentimento.errors import UserError
from pentimento.train import Draws

SIZES = [(8, 8), (12, 8), (8, 8), (9, 10), (12, 9)]


def draws(count: int, step: int = 1) -> Draws:
    return Draws([(0, "edit", step, position) for position in range(count)], torch.device("cpu"))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def rows(tmp_path):
    return toy.rows(tmp_path / "data", SIZES)


def test_buckets_are_what_the_method_takes(rows):
    assert Samples(rows, toy.Toy()).buckets() == {(8, 8): [0, 2, 3], (12, 8): [1, 4]}


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_cached_batches_are_the_uncached_ones(tmp_path, cache):
    rows = toy.rows(tmp_path / "data")
    plain = Samples(rows, toy.Toy(), cache="off", caption_dropout=0.3)
    cached = Samples(rows, toy.Toy(), cache=cache, folder=tmp_path / "cache", caption_dropout=0.3)
    for precomputed in (False, True):
        if precomputed:
            cached.precompute()
        for step in range(4):
            assert equal(plain.batch([3, 0, 3], draws(3, step)), cached.batch([3, 0, 3], draws(3, step)))


@pytest.mark.parametrize("cache", ["memory", "disk", "off"])
def test_what_is_encoded_how_often(tmp_path, rows, cache):
    """Each picture and each different prompt once; then the encoders may go."""
    method, seen = toy.Toy(), []
    samples = Samples(rows, method, cache=cache, folder=tmp_path / "cache", caption_dropout=0.5)
    samples.precompute(lambda done, total: seen.append((done, total)))
    if cache == "off":
        assert method.calls == {"encode": 0, "encode_text": 0, "release": 1, "losses": 0} and not seen
        return
    assert (method.calls["encode"], method.calls["encode_text"], method.calls["release"]) == (5, 3, 1)
    assert seen == [(n, 8) for n in range(1, 9)]
    samples.batch([0, 2], draws(2))
    samples.precompute(release=False)
    assert (method.calls["encode"], method.calls["encode_text"], method.calls["release"]) == (5, 3, 1)


def test_the_disk_serves_the_next_run(tmp_path, rows):
    first, second = (Samples(rows, toy.Toy(), cache="disk", folder=tmp_path / "cache") for _ in range(2))
    first.precompute()
    assert equal(first.batch([0, 2], draws(2)), second.batch([0, 2], draws(2)))
    assert second.method.calls["encode"] == second.method.calls["encode_text"] == 0
    assert not list((tmp_path / "cache").glob(f"*{files.PARTIAL}"))


def test_changed_pictures_prompts_and_settings_miss(tmp_path, rows):
    def encoded(rows, fingerprint="toy 1"):
        method = toy.Toy()
        method.fingerprint = lambda: fingerprint
        Samples(rows, method, cache="disk", folder=tmp_path / "cache").precompute()
        return method.calls["encode"], method.calls["encode_text"]

    assert encoded(rows) == (5, 3)
    assert encoded(rows) == (0, 0)
    assert encoded([replace(rows[0], key="renamed"), *rows[1:]]) == (0, 0)
    Image.new("RGB", (8, 8), "red").save(rows[0].target)
    assert encoded([replace(row) for row in rows]) == (1, 0)
    assert encoded([replace(rows[0], prompt="new"), *rows[1:]]) == (1, 1)
    assert encoded([replace(rows[0], extra={"word": "cat"}), *rows[1:]]) == (1, 0)
    assert encoded(rows, "toy 2") == (5, 3)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "rubbish", "foreign"])
def test_damaged_entries_are_computed_again(tmp_path, rows, damage):
    folder = tmp_path / "cache"
    samples = Samples(rows, toy.Toy(), cache="disk", folder=folder)
    samples.precompute()
    expected = samples.batch([0, 2], draws(2))
    for file in folder.iterdir():
        data = bytearray(file.read_bytes())
        if damage == "bit":
            data[-3] ^= 4
        new = {"cut": data[:-2], "bit": data, "empty": b"", "rubbish": b"x" * 99}
        new["foreign"] = files.safetensors_bytes({"source": torch.zeros(12)}, {})
        file.write_bytes(new[damage])
    with pytest.warns(UserWarning, match=r"the cached entry is damaged \(.*\); it is computed again"):
        assert equal(samples.batch([0, 2], draws(2)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(samples.batch([0, 2], draws(2)), expected)


def test_a_full_disk_is_explained(tmp_path, rows, monkeypatch):
    def full(path, data, *, durable=True):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(UserError, match=r"No space left on device.*data\.cache to memory or off"):
        Samples(rows, toy.Toy(), cache="disk", folder=tmp_path / "cache").precompute()


def test_caption_dropout_has_its_rate_and_follows_the_draws(tmp_path):
    rows = [replace(row, prompt="abc") for row in toy.rows(tmp_path / "data")]
    samples = Samples(rows, toy.Toy(), caption_dropout=0.25)
    dropped = torch.cat([samples.batch([0] * 20, draws(20, step))["text"][:, 0] == 0 for step in range(40)])
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.05)
    assert equal(samples.batch([0] * 20, draws(20)), samples.batch([0] * 20, draws(20)))
    never, always = (
        Samples(rows, toy.Toy(), caption_dropout=p).batch([0, 1], draws(2))["text"] for p in (0.0, 1.0)
    )
    assert never.all() and not always.any()


def test_workers_load_the_same_pictures_in_order(tmp_path, rows):
    batches = [[0, 2], [1, 4], [3, 3], [2, 0]]
    plain = Samples(rows, toy.Toy(), cache="off")
    ahead = Samples(rows, toy.Toy(), cache="off", workers=2)
    before = torch.get_rng_state()
    loaded = list(ahead.stream(batches))
    assert torch.equal(torch.get_rng_state(), before)
    assert [one.indices for one in loaded] == batches and all(one.examples for one in loaded)
    for one, other in zip(loaded, plain.stream(batches), strict=True):
        assert equal(ahead.batch(one, draws(2)), plain.batch(other, draws(2)))


def test_a_picture_that_vanished_is_the_users_error(rows):
    rows[2].source.unlink()
    for workers in (0, 1):
        samples = Samples(rows, toy.Toy(), cache="off", workers=workers)
        with pytest.raises(UserError, match="2-source.png") as caught:
            for loaded in samples.stream([[1], [2]]):
                samples.batch(loaded, draws(1))
        assert "Traceback" not in str(caught.value)


def test_training_is_the_same_with_every_cache(tmp_path):
    results = [
        toy.run(tmp_path, str(number), samples=settings)
        for number, settings in enumerate(
            [
                {},
                {"cache": "disk", "folder": tmp_path / "cache"},
                {"cache": "off"},
                {"cache": "off", "workers": 1},
            ]
        )
    ]
    assert all(toy.difference(results[0], other) == 0 for other in results[1:])


def test_no_rows_and_colliding_keys(rows):
    with pytest.raises(UserError, match="no pair"):
        Samples([], toy.Toy())

    class Both(toy.Toy):
        def encode_text(self, prompts):
            return {"source": torch.zeros(len(prompts), 1)}

    with pytest.raises(ValueError, match=r"both give \['source'\]"):
        Samples(rows, Both()).batch(Loaded(indices=[0]), draws(1))
