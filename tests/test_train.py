"""The loop: equal batches, whichever way they are divided, and losses that are back-propagated one by one."""

import json
import math
import signal
import socket
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import load_file

from pentimento import checkpoint, optimizers, train
from pentimento.cache import Samples
from pentimento.errors import UserError
from pentimento.train import Draws, Stage, order

TOLERANCE = 2e-6


def test_draws_of_a_row_depend_on_its_key_alone():
    device = torch.device("cpu")
    keys = [(1, "edit", 3, position) for position in range(4)]
    whole, half = Draws(keys, device), Draws(keys[2:], device)
    x = torch.zeros(4, 2, 3)
    assert torch.equal(whole.normal_like(x)[2:], half.normal_like(x[2:]))
    assert torch.equal(whole.uniform()[2:], half.uniform())
    assert whole.normal_like(x).unique().numel() == x.numel()


@pytest.mark.parametrize(
    "other", [(2, "edit", 3, 0), (1, "prompt", 3, 0), (1, "edit", 4, 0), (1, "edit", 3, 1)]
)
def test_draws_differ_with_any_part_of_their_key(other):
    device = torch.device("cpu")
    a, b = (Draws([key], device).normal_like(torch.zeros(1, 8)) for key in ((1, "edit", 3, 0), other))
    assert not torch.isclose(a, b).any()


def test_draws_do_not_touch_global_random_numbers():
    before = torch.get_rng_state()
    draws = Draws([(0, "edit", 1, 0)], torch.device("cpu"))
    assert draws.normal_like(torch.zeros(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert 0 <= float(draws.uniform()) < 1
    assert torch.equal(torch.get_rng_state(), before)


def test_twins_draw_the_same_from_where_they_are():
    draws, x = (
        Draws([(0, "edit", 1, position) for position in range(2)], torch.device("cpu")),
        torch.zeros(2, 3),
    )
    draws.uniform()
    twin = draws.twin()
    assert torch.equal(draws.normal_like(x), twin.normal_like(x))
    twin.normal_like(x)
    assert not torch.equal(draws.normal_like(x), twin.normal_like(x))


def test_order_takes_batches_of_one_bucket_and_drops_none():
    buckets = [[0, 1, 2], [3], [4, 5, 6, 7, 8]]
    batches = list(islice(order(buckets, 4, seed=1), 450))
    assert all(any(set(batch) <= set(bucket) for bucket in buckets) for batch in batches)
    seen = Counter(sample for batch in batches for sample in batch)
    assert max(seen.values()) - min(seen.values()) <= 4
    assert batches == list(islice(order(buckets, 4, seed=1), 450))
    assert batches != list(islice(order(buckets, 4, seed=2), 450))


def test_order_without_remainder_is_a_permutation_per_epoch():
    batches = order([[0, 1, 2, 3, 4, 5]], 2, seed=0)
    epochs = [sum(islice(batches, 3), []) for _ in range(4)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_accumulation_is_a_bigger_batch(tmp_path, optimizer):
    settings = {"optimizer": optimizer, "lr": 1.0 if optimizer == "prodigy" else 1e-2, "prodigy_d0": 1e-3}
    notes = [toy.Note(), toy.Note(), toy.Note()]
    layouts = [{"batch_size": 4}, {"batch_size": 2, "accumulate": 2}, {"batch_size": 1, "accumulate": 4}]
    results = [
        toy.run(tmp_path, f"{number}", watch=note, **settings, **layout)
        for number, (note, layout) in enumerate(zip(notes, layouts, strict=True))
    ]
    assert toy.difference(results[0], toy.weights(toy.Toy())) > 1e-4, "something is learnt"
    for result, note in zip(results[1:], notes[1:], strict=True):
        assert toy.difference(results[0], result) < TOLERANCE
        for mine, other in zip(notes[0].reports[1:], note.reports[1:], strict=True):
            assert other.losses == pytest.approx(mine.losses, abs=1e-6)
            assert other.grad_norm == pytest.approx(mine.grad_norm, abs=1e-5)


def started_by_torchrun(command: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*torchrun, *command], env=toy.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def started_by_hand(command: list[str]) -> None:
    """With torchrun's variables, without its own start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**toy.environment(), **both, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said[-3000:]


@pytest.mark.parametrize(
    "start", [started_by_hand, pytest.param(started_by_torchrun, marks=pytest.mark.slow)]
)
def test_two_processes_are_a_bigger_batch(tmp_path, start):
    """Real processes on a machine without GPU, with none of accelerate's own variables set."""
    alone = toy.run(tmp_path, "one", batch_size=4, steps=3)
    start([toy.__file__, json.dumps({"folder": str(tmp_path), "out": "two", "batch_size": 2, "steps": 3})])
    saved = checkpoint.at(tmp_path / "two", 3)
    together = torch.load(saved.folder / checkpoint.STATE, weights_only=True)["adapters"]
    assert toy.difference(alone, together) < TOLERANCE


def test_streamed_losses_under_gradient_checkpointing(tmp_path):
    plain = toy.run(tmp_path, "plain")
    checkpointed = toy.run(tmp_path, "checkpointed", toy=toy.Toy(toy.Toy.Config(checkpointing=True)))
    assert toy.difference(plain, checkpointed) == 0


def test_the_loop_back_propagates_a_loss_before_it_asks_for_the_next(tmp_path):
    """The second loss freezes ``content``, whose gradient must be there already, and must not change any more."""
    seen: list[bool] = []

    class Curious(toy.Toy):
        def losses(self, batch, draws):
            for number, named in enumerate(super().losses(batch, draws)):
                gradients = [p.grad for p in self.adapters.parameters("content")]
                seen.append(any(g is not None and bool(g.any()) for g in gradients) == bool(number))
                yield named

    toy.run(tmp_path, toy=Curious(), steps=2)
    assert len(seen) == 4 and all(seen)


def test_stages_follow_each_other(tmp_path):
    stages = {
        "first": Stage(train=("content",), steps=3, lr=1e-2, accumulate=2),
        "second": Stage(train=("semantic",), steps=4, lr=1e-2),
    }
    note, method = toy.Note(), toy.Toy()
    start = toy.weights(method)
    end = toy.run(tmp_path, toy=method, stages=stages, watch=note)
    assert [(r.stage, r.step) for r in note.reports] == [("first", n) for n in range(4)] + [
        ("second", n) for n in range(5)
    ]
    first = torch.load(checkpoint.at(tmp_path / "run", 3).folder / checkpoint.STATE, weights_only=True)[
        "adapters"
    ]
    assert toy.difference({"semantic": first["semantic"]}, {"semantic": start["semantic"]}) == 0
    assert toy.difference({"content": first["content"]}, {"content": end["content"]}) == 0
    assert toy.difference(start, end) > 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup": 2}, [0, 0.5, 1, 1]),
        ({"schedule": "constant_with_warmup", "warmup": 2}, [0, 0.5, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1, 0.853553, 0.5, 0.146447]),
        ({}, [1, 1, 1, 1]),
    ],
)
def test_schedules(tmp_path, settings, expected):
    note = toy.Note()
    toy.run(tmp_path, watch=note, steps=4, **settings)
    assert [report.lr / 1e-2 for report in note.reports[1:]] == pytest.approx(expected, abs=1e-5)


def test_clipping(tmp_path):
    notes = [toy.Note(), toy.Note()]
    free = toy.run(tmp_path, "free", watch=notes[0], max_grad_norm=0, steps=1)
    clipped = toy.run(tmp_path, "clipped", watch=notes[1], max_grad_norm=1e-6, steps=1, eps=1e-3)
    assert notes[0].reports[1].grad_norm == notes[1].reports[1].grad_norm > 1e-3
    start = toy.weights(toy.Toy())
    assert toy.difference(clipped, start) < toy.difference(free, start) / 100


def test_bf16_keeps_adapters_in_float32(tmp_path):
    method = toy.Toy()
    data = Samples(toy.rows(tmp_path / "data"), method)
    stages = {"pair": Stage(**toy.STAGE)}
    train.train(method, stages, data, train.Run(out=tmp_path / "run", precision="bf16"))
    assert {p.dtype for p in method.adapters.parameters("content", "semantic")} == {torch.float32}
    assert 0 < toy.difference(toy.weights(method), toy.run(tmp_path, "fp32", seed=0)) < 0.05


def test_fp16_without_gpu_is_explained(tmp_path):
    method = toy.Toy()
    data = Samples(toy.rows(tmp_path / "data"), method)
    with pytest.raises(UserError, match=r"backbone\.precision: fp16"):
        train.train(
            method, {"pair": Stage(**toy.STAGE)}, data, train.Run(out=tmp_path / "run", precision="fp16")
        )


@pytest.mark.gpu
def test_fp16_learns(tmp_path):
    method = toy.Toy()
    method.host.cuda()
    note = toy.Note()
    data = Samples(toy.rows(tmp_path / "data"), method)
    run = train.Run(out=tmp_path / "run", precision="fp16")
    train.train(method, {"pair": Stage(**{**toy.STAGE, "steps": 30})}, data, run, note)
    assert all(t.isfinite().all() for part in toy.weights(method).values() for t in part.values())
    assert note.reports[-1].losses["semantic"] < note.reports[1].losses["semantic"]


@pytest.fixture
def scaled(monkeypatch):
    """fp16's scaling of losses on a CPU: the arithmetic stays float32, but a scale of 2^127 is too much for it too."""
    make = train.make_accelerator

    def scaling(precision, device):
        accelerator = make(precision, device)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=4)
        monkeypatch.setattr(accelerator, "unscale_gradients", lambda optimizer=None: unscale(accelerator))
        return accelerator

    def unscale(accelerator):
        for optimizer in accelerator._optimizers:
            accelerator.scaler.unscale_(optimizer.optimizer)

    monkeypatch.setattr(train, "make_accelerator", scaling)


class Loud(toy.Toy):
    def losses(self, batch, draws):
        for key, loss in super().losses(batch, draws):
            yield key, 64 * loss


@pytest.mark.filterwarnings("error::UserWarning")
def test_overflowing_steps_are_skipped(tmp_path, scaled):
    """Neither weights nor schedule move in them; the scale falls until it fits."""
    note = toy.Note()
    result = toy.run(tmp_path, toy=Loud(), watch=note, steps=12, schedule="linear")
    norms = [report.grad_norm for report in note.reports[1:]]
    rates = [report.lr for report in note.reports[1:]]
    skipped = [not math.isfinite(norm) for norm in norms]
    assert skipped[0] and not all(skipped)
    assert [rate == following for rate, following in pairwise(rates)] == skipped[:-1]
    assert all(t.isfinite().all() for part in result.values() for t in part.values())
    assert toy.difference(result, toy.weights(toy.Toy())) > 0


def test_the_scale_is_resumed(tmp_path, scaled):
    whole = toy.run(tmp_path, "whole", toy=Loud(), steps=12)
    with pytest.raises(KeyboardInterrupt):
        toy.run(
            tmp_path, toy=Loud(), steps=12, watch=lambda r: r.step == 7 and signal.raise_signal(signal.SIGINT)
        )
    assert toy.difference(toy.run(tmp_path, toy=Loud(), steps=12), whole) == 0


def test_a_loss_that_is_not_a_number_stops_before_the_weights(tmp_path):
    method = toy.Toy(toy.Toy.Config(break_at=4))
    with pytest.raises(
        UserError, match=r"stages\.pair, step 4: the loss semantic is nan.*Step 2 of pair is saved.*lr"
    ):
        toy.run(tmp_path, toy=method, save_every=2)
    assert all(t.isfinite().all() for part in toy.weights(method).values() for t in part.values())
    assert [saved.step for saved in checkpoint.saved_steps(tmp_path / "run")] == [2]


def test_out_of_memory_is_explained(tmp_path):
    class Hungry(toy.Toy):
        def losses(self, batch, draws):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(
        UserError, match=r"stages\.pair\.batch_size.*config\.resolution.*gradient_checkpointing"
    ):
        toy.run(tmp_path, toy=Hungry())


def test_other_runtime_errors_pass(tmp_path):
    class Broken(toy.Toy):
        def losses(self, batch, draws):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        toy.run(tmp_path, toy=Broken())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_saves_and_says_how_to_continue(tmp_path, number):
    def interrupt(report):
        if report.step == 3:
            signal.raise_signal(number)

    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background
    whole = toy.run(tmp_path, "whole")
    with pytest.raises(KeyboardInterrupt, match=r"after step 3.*--resume"):
        toy.run(tmp_path, watch=interrupt)
    assert [saved.step for saved in checkpoint.saved_steps(tmp_path / "run")] == [3]
    assert signal.getsignal(signal.SIGINT) is before
    assert toy.difference(toy.run(tmp_path), whole) == 0


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    def impatient(report):
        if report.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        toy.run(tmp_path, watch=impatient)
    assert not isinstance(caught.value, checkpoint.Interrupted)
    assert not checkpoint.saved_steps(tmp_path / "run")


def test_torchrun_may_pass_ctrl_c_on():
    with checkpoint.deferred_signals(patient=True) as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
    assert stop.requested


def test_prodigy_gets_its_options_and_is_silent(capsys):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    stage = Stage(
        train=("x",), steps=1, optimizer="prodigy", lr=0.5, prodigy_beta3=0.9, prodigy_decouple=False, prodigy_d0=1e-5,
        prodigy_bias_correction=False, prodigy_safeguard_warmup=False, prodigy_d_coef=2.0, weight_decay=0.1, betas=(0.5, 0.6),
    )  # fmt: skip
    group = optimizers.make_optimizer(stage, parameters).param_groups[0]
    expected = {
        "lr": 0.5,
        "beta3": 0.9,
        "decouple": False,
        "use_bias_correction": False,
        "safeguard_warmup": False,
    }
    expected |= {"d": 1e-5, "d_coef": 2.0, "weight_decay": 0.1, "betas": (0.5, 0.6)}
    assert expected.items() <= group.items()
    assert optimizers.current_lr(optimizers.make_optimizer(stage, parameters)) == pytest.approx(5e-6)
    assert capsys.readouterr().out == ""


def test_eight_bit_adam_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"pip install 'pentimento\[bnb\]'"):
        optimizers.make_optimizer(Stage(train=("x",), steps=1, optimizer="adamw8bit"), [])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"train": ()}, "train"),
        ({"warmup": 7}, "warmup"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"keep_last": 0}, "keep_last"),
        ({"keep_steps": (0,)}, "keep_steps"),
        ({"keep_steps": (6, 7)}, "keep_steps.*1 to 6.*7"),
        ({"train": ("content", "content")}, "twice"),
        ({"lr": 1.0}, "adamw does not learn"),
        ({"optimizer": "prodigy", "lr": 1e-4}, "its own estimate"),
    ],
)
def test_impossible_stages(wrong, named):
    with pytest.raises(ValueError, match=named):
        Stage(**{**toy.STAGE, **wrong})


def test_the_device_is_that_of_what_is_trained(tmp_path, monkeypatch):
    """With one process accelerate knows the first GPU only, whatever backbone.device says."""

    class Elsewhere:
        device = torch.device("meta")

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

    whole = toy.run(tmp_path, "whole")
    make = train.make_accelerator
    monkeypatch.setattr(train, "make_accelerator", lambda *arguments: Elsewhere(make(*arguments)))
    assert toy.difference(toy.run(tmp_path), whole) == 0


def test_an_unknown_adapter_is_named(tmp_path):
    with pytest.raises(UserError, match="'sementic'.*content, semantic"):
        toy.run(tmp_path, train=("sementic",))


def test_processes_that_do_not_join_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, but 1"):
        train.processes()


def test_equal_runs_write_equal_files(tmp_path):
    toy.run(tmp_path, "a")
    toy.run(tmp_path, "b")
    files = [Path(p) for p in sorted((tmp_path / "a" / "weights").rglob("*.safetensors"))]
    assert len(files) == 2
    for file in files:
        twin = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == twin.read_bytes()
        assert load_file(file)
