"""What a resumed run must take over; test_resume_refused.py has what it must refuse."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fourbit.config import RunConfig
from fourbit.errors import TrainingError
from fourbit.model.compute import choose_compute_dtype
from fourbit.optim import adamw
from fourbit.training import checkpoint, durable, loop
from fourbit.training import run as training
from fourbit.training.guard import Guard
from fourbit.training.metrics import MetricsWriter, truncate
from tests.training.contents import assert_same, contents
from tests.training.runner import Runner, make_run, write_run


def trained(config: RunConfig, resume: bool = False, overwrite: bool = False) -> tuple[str, str]:
    """(how a run ended, what it printed)."""
    out = io.StringIO()
    stopped = training.run(config, Console(file=out, width=1000), resume, overwrite).stopped
    return stopped, out.getvalue()


def stop_after(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Send Ctrl-C after the so many-th call of a function of the loop."""
    real, calls = getattr(loop, name), []

    def interrupting(*arguments: Any) -> Any:
        result = real(*arguments)
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(loop, name, interrupting)


@pytest.mark.parametrize(
    ("where", "call", "first"),
    [
        ("_optimizer_step", 3, "interrupted"),  # an evaluation is due after it
        ("_evaluate", 1, "interrupted"),
        ("_optimizer_step", 6, "interrupted"),  # the last
        ("_evaluate", 2, "done"),
    ],
)
def test_an_interrupt_around_an_evaluation(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, call: int, first: str
) -> None:
    trained(settings(output=str(tmp_path / "whole"), lora__dropout=0.2))
    config = settings(output=str(tmp_path / "stopped"), lora__dropout=0.2)
    with monkeypatch.context() as patch:
        stop_after(patch, where, call)
        assert trained(config)[0] == first
    assert trained(config, resume=True)[0] == "done"
    assert_same(tmp_path / "whole", config.output)


@pytest.mark.parametrize(
    ("micro_batch", "saved"),
    [
        (1, 0),
        (5, 2),
        (9, 4),
        (8, 4),
    ],  # in the first step, in the third, before and after an evaluation's step
)
def test_an_interrupt_between_micro_batches(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int, saved: int
) -> None:
    changes = {"train__eval_every": 4, "lora__dropout": 0.2}
    trained(settings(output=str(tmp_path / "whole"), **changes))
    config = settings(output=str(tmp_path / "stopped"), **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, "causal_lm_loss", micro_batch)  # two to a step
        assert trained(config)[0] == "interrupted"
    last = tmp_path / "stopped" / "checkpoints" / f"step-{saved:06d}"
    assert sorted((tmp_path / "stopped" / "checkpoints").iterdir())[-1] == last
    assert trained(config, resume=True)[0] == "done"
    whole, stopped = contents(tmp_path / "whole"), contents(config.output)
    assert [name for name in whole if whole[name] != stopped[name]] == []


def test_packed_rows_are_taken_up_too(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt between two packs of a step, then one after a step: rows and dropout are the same."""
    changes = {"train__packing": 150, "lora__dropout": 0.2}
    trained(settings(output=str(tmp_path / "whole"), **changes))
    config = settings(output=str(tmp_path / "stopped"), **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, "batch_of", 3)
        assert trained(config)[0] == "interrupted"
    with monkeypatch.context() as patch:
        stop_after(patch, "_optimizer_step", 2)
        assert trained(config, resume=True)[0] == "interrupted"
    assert trained(config, resume=True)[0] == "done"
    whole, stopped = contents(tmp_path / "whole"), contents(config.output)
    assert [name for name in whole if whole[name] != stopped[name]] == []


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_paged_states_change_nothing_and_are_taken_up_too(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Resumed under other budgets, the run is the same as one whose states never moved."""
    changes = {"train__optimizer": optimizer, "lora__dropout": 0.2}
    monkeypatch.setattr(adamw, "PAGE_WEIGHTS", 1024)
    trained(settings(output=str(tmp_path / "whole"), **changes))
    stopped = {"output": str(tmp_path / "stopped"), **changes}
    with monkeypatch.context() as patch:
        stop_after(patch, "_optimizer_step", 3)
        assert trained(settings(**stopped, train__optimizer_memory=0))[0] == "interrupted"
    assert trained(settings(**stopped), resume=True)[0] == "done"
    assert_same(tmp_path / "whole", stopped["output"])
    states = load_file(tmp_path / "whole" / "checkpoints" / "step-000006" / "optimizer.safetensors")
    assert len([name for name in states if name.endswith("_absmax")]) == (
        len(states) * 2 // 5 if optimizer == "adamw_8bit" else 0
    )


def test_full_fine_tuning_is_taken_up_too(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"lora": "none", "model__quant_type": "none", "train__learning_rate": 0.003}
    trained(settings(output=str(tmp_path / "whole"), **changes))
    config = settings(output=str(tmp_path / "stopped"), **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, "_evaluate", 1)
        assert trained(config)[0] == "interrupted"
    assert trained(config, resume=True)[0] == "done"
    assert_same(tmp_path / "whole", config.output)


def test_a_crash_before_the_first_checkpoint(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(settings(output=str(tmp_path / "whole")))
    config = settings(output=str(tmp_path / "crashed"))
    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trained(config)
    assert not list((tmp_path / "crashed").glob("checkpoints/*"))
    stopped, printed = trained(config, resume=True)
    assert stopped == "done"
    assert "stopped before its first checkpoint: starting at its first step" in printed
    assert_same(tmp_path / "whole", config.output)


def test_dropout_that_is_not_keyed_is_taken_up_too(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under autocast, which modules_to_save asks for in bf16, PEFT's own forward pass draws from torch.
    changes = {
        "lora__dropout": 0.2,
        "lora__modules_to_save": ["embed_tokens"],
        "model__compute_dtype": "bfloat16",
    }
    for name in ("whole", "again"):
        torch.manual_seed(len(name) * ord(name[0]))
        trained(settings(output=str(tmp_path / name), **changes))
    assert_same(tmp_path / "whole", tmp_path / "again")
    config = settings(output=str(tmp_path / "stopped"), **changes)
    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        stop_after(patch, "_optimizer_step", 5)
        assert trained(config)[0] == "interrupted"
    assert torch.equal(torch.get_rng_state(), before)
    trained(config, resume=True)
    (tmp_path / "stopped" / "checkpoints" / "step-000005").rename(tmp_path / "extra")
    whole, stopped = contents(tmp_path / "whole"), contents(config.output)
    assert [name for name in stopped if stopped[name] != whole[name]] == []


def test_an_early_stop_stays(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        loss = 1.0

    monkeypatch.setattr(loop, "heldout_loss", lambda *_, **__: Result())
    config = settings(train__max_steps=8, train__eval_every=1, train__early_stop_patience=2)
    assert trained(config)[0] == "early"
    before = contents(config.output)
    assert trained(config, resume=True)[0] == "early"
    assert contents(config.output) == before
    patient = settings(train__max_steps=8, train__eval_every=1, train__early_stop_patience=4)
    assert trained(patient, resume=True)[0] == "early"
    assert contents(config.output)["summary.json"]["steps"] == 5


def test_steps_that_were_skipped_leave_no_moments(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.causal_lm_loss
    config = settings(train__max_steps=3, train__eval_every=2)
    with monkeypatch.context() as patch:
        stop_after(patch, "_optimizer_step", 2)
        patch.setattr(loop, "causal_lm_loss", lambda m, b, c: (real(m, b, c)[0] * float("nan"), 1))
        assert trained(config)[0] == "interrupted"
    saved = checkpoint.newest(Path(config.output), lambda _: None)
    assert saved is not None
    assert saved.state.guard == {"bad": 2, "losses": []}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "causal_lm_loss", lambda m, b, c: (real(m, b, c)[0] * float("nan"), 1))
        with pytest.raises(TrainingError, match="step 3: loss is not finite, the third step in a row"):
            trained(config, resume=True)
    assert trained(config, resume=True)[0] == "done"


def test_the_guard_goes_on_where_it_was() -> None:
    whole = Guard()
    for step in range(25):
        whole.check(step, 1.0 + step / 100, 1.0, [])
    whole.check(25, float("nan"), 1.0, [])
    taken_up = Guard(json.loads(json.dumps(whole.state())))
    assert taken_up.state() == whole.state()
    for step, loss in ((26, 9.0), (27, float("nan")), (28, float("inf"))):
        assert taken_up.check(step, loss, 1.0, ["a:1"]) == whole.check(step, loss, 1.0, ["a:1"])
    for guard in (whole, taken_up):
        with pytest.raises(TrainingError, match="third step in a row"):
            guard.check(29, float("nan"), 1.0, ["a:1"])


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(settings: Any, tmp_path: Path) -> None:
    trained(settings(output=str(tmp_path / "whole")))
    config = settings(output=str(tmp_path / "damaged"))
    trained(config)
    newest = tmp_path / "damaged/checkpoints/step-000006"
    flip(newest / "optimizer.safetensors")
    stopped, printed = trained(config, resume=True)
    assert stopped == "done"
    assert f"{newest}: damaged (optimizer.safetensors: the checksum is wrong)" in printed
    assert "going on after step 3" in printed
    assert_same(tmp_path / "whole", config.output)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def test_every_damage_is_found(tmp_path: Path) -> None:
    write_run(tmp_path, *make_run(step=1))
    path = tmp_path / "checkpoints" / "step-000001"
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert len(files) == 5
    for file, data in files.items():
        for broken in (data[:-1], b"", None):
            file.unlink() if broken is None else file.write_bytes(broken)
            check_damaged(tmp_path, path)
        file.write_bytes(data)
        flip(file)
        check_damaged(tmp_path, path)
        file.write_bytes(data)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.path == path


def test_a_disk_that_gives_back_something_else_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, *make_run(step=1))
    settle = durable.settle

    def worn(path: Path) -> None:
        settle(path)
        flip(path / "optimizer.safetensors")

    dropped = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, *a: dropped.append((os.readlink(f"/proc/self/fd/{fd}"), a))
    )
    monkeypatch.setattr(durable, "settle", worn)
    second = tmp_path / "checkpoints" / "step-000002"
    with pytest.raises(TrainingError, match=r"step-000002 reads back otherwise .*optimizer\.saf"):
        checkpoint.save(tmp_path, *make_run(step=2), keep=1)
    assert not second.exists()
    assert len(dropped) == 5
    assert (str(second / "optimizer.safetensors"), (0, 0, os.POSIX_FADV_DONTNEED)) in dropped
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.path.name == "step-000001"


def check_damaged(folder: Path, path: Path) -> None:
    notes: list[str] = []
    with pytest.raises(TrainingError, match="all 1 checkpoints are damaged; restore one from a backup"):
        checkpoint.newest(folder, notes.append)
    assert len(notes) == 1
    assert notes[0].startswith(f"{path}: damaged (")
    assert "\n" not in notes[0]


def test_so_many_checkpoints_stay(settings: Any) -> None:
    config = settings(train__eval_every=1, train__keep_checkpoints=3)
    trained(config)
    kept = sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000005", "step-000006"]


def test_one_that_a_crash_left_behind_goes_when_the_run_goes_on(settings: Any, tmp_path: Path) -> None:
    """A kill in the last save, once it was whole: the oldest is still there, and no save comes after."""
    config = settings(train__eval_every=2, output=str(tmp_path / "run"))
    training.run(config, Console(quiet=True))
    folder = tmp_path / "run" / "checkpoints"
    kept = sorted(path.name for path in folder.iterdir())
    shutil.copytree(folder / kept[0], folder / "step-000001")
    training.run(config, Console(quiet=True), resume=True)
    assert sorted(path.name for path in folder.iterdir()) == kept


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    model, optimizer, state = make_run(step=1)
    for step in (999_999, 1_000_000):
        state.progress.step = step
        checkpoint.save(tmp_path, model, optimizer, state, keep=2)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.state.progress.step == 1_000_000


def test_metrics_go_back_to_their_length(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 1.0}, {"seconds": 2.0})
    size = writer.sync()
    writer.write(1, {"heldout_loss": 1.0}, {"heldout_seconds": 0.5})
    writer.write(2, {"loss": 1.0}, {"seconds": 4.0})
    writer.close()
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write('{"step": 3, "sec')
    truncate(tmp_path, 1, size)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    writer = MetricsWriter(tmp_path, tensorboard=False, done=1)
    assert writer.seconds_before == 2.5
    writer.close()
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: holds 25 of the 26 bytes"):
        truncate(tmp_path, 1, size + 1)


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(
        TrainingError, match=r"metrics\.jsonl cannot be written \(No space left on device\); what was saved"
    ):
        writer.write(1, {"loss": 1.0}, {})
    writer.close()


def test_what_was_moved_away_comes_back(tmp_path: Path) -> None:
    for name in ("kept.old", "both", "both.old", "new.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "text.partial").write_text("half")
    assert durable.settled_names(tmp_path) == {"kept", "both", "new", "text"}
    for name in ("kept", "both", "new", "text"):
        durable.recover(tmp_path / name)
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {
        "kept": "kept.old",
        "both": "both",
    }


def test_the_same_command_in_another_process_gives_the_same_bytes(
    runner: Runner, settings: Any, tmp_path: Path
) -> None:
    # A list of modules becomes a set in PEFT, whose order is another in every process.
    changes = {
        "lora__dropout": 0.2,
        "lora__target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    }
    trained(settings(output=str(tmp_path / "one"), **changes))
    ended = runner.run(settings(output=str(tmp_path / "two"), **changes))
    assert ended.status == 0, ended.output
    assert_same(tmp_path / "one", tmp_path / "two")


def test_more_steps_equal_a_longer_run(settings: Any, tmp_path: Path) -> None:
    flat = {"train__warmup_ratio": 0, "lora__dropout": 0.2}
    trained(settings(output=str(tmp_path / "whole"), train__max_steps=9, **flat))
    short = {"output": str(tmp_path / "short"), **flat}
    trained(settings(**short))
    stopped, printed = trained(settings(**short, train__max_steps=9), resume=True)
    assert stopped == "done"
    assert "stays" not in printed
    whole, longer = contents(tmp_path / "whole"), contents(tmp_path / "short")
    assert sorted(whole) == sorted(longer)
    # The checkpoint at the end of the short run says how many steps that had.
    assert [name for name in whole if whole[name] != longer[name]] == ["checkpoints/step-000006/state.json"]


def test_more_steps_after_an_end_between_evaluations(settings: Any, tmp_path: Path) -> None:
    flat = {"train__warmup_ratio": 0, "lora__dropout": 0.2}
    trained(settings(output=str(tmp_path / "whole"), train__max_steps=9, **flat))
    short = {"output": str(tmp_path / "short"), **flat}
    trained(settings(**short, train__max_steps=5))
    _, printed = trained(settings(**short, train__max_steps=9), resume=True)
    assert "going on after step 5, where the run ended before: its evaluation there stays" in printed
    whole, longer = contents(tmp_path / "whole"), contents(tmp_path / "short")
    for name in ("optimizer.safetensors", "adapter/adapter_model.safetensors"):
        assert whole[f"checkpoints/step-000009/{name}"] == longer[f"checkpoints/step-000009/{name}"]
    extra = set(longer["metrics.jsonl"].splitlines()) - set(whole["metrics.jsonl"].splitlines())
    assert [json.loads(line)["step"] for line in extra] == [5]


def test_auto_takes_the_dtype_that_the_run_measured(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model__compute_dtype="auto")
    measured = choose_compute_dtype("auto").dtype
    other = torch.float32 if measured == torch.bfloat16 else torch.bfloat16
    name = str(other).removeprefix("torch.")
    trained(settings(model__compute_dtype=name))
    stopped, printed = trained(config, resume=True)
    assert stopped == "done"
    assert f"compute dtype {name}: as set" in printed
