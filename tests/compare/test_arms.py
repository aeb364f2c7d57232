"""What is compared, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourbit.compare.arms import Arm, arm_config, method_arms, split_name, varied_arms, with_own_settings
from fourbit.compare.rows import share_rows
from fourbit.config import DataSettings
from fourbit.data.read import read_rows
from fourbit.errors import ConfigError, DataError
from tests.compare.conftest import write_rows

BASE = ["model.path=model", "data.train=rows.jsonl"]


def test_methods() -> None:
    qlora, lora, full = (arm_config(None, BASE, arm) for arm in method_arms(["qlora", "lora", "full"]))
    assert (qlora.model.quant_type, lora.model.quant_type, full.model.quant_type) == ("nf4", "none", "none")
    assert qlora.lora == lora.lora
    assert full.lora is None


def test_overrides_and_names() -> None:
    two = "lora.r=16, lora.target_modules=[q_proj,v_proj]"
    texts = ["lora.r=4", two, "as is:", "wide: lora.r=64"]
    assert varied_arms(texts) == [
        Arm("lora.r=4", ("lora.r=4",)),
        Arm(two, ("lora.r=16", "lora.target_modules=[q_proj,v_proj]")),
        Arm("as is", ()),
        Arm("wide", ("lora.r=64",)),
    ]
    assert [arm.folder for arm in varied_arms(texts)][1:3] == [
        "lora.r=16-lora.target_modules=-q_proj-v_proj",
        "as-is",
    ]


def test_settings_for_one_arm_come_last() -> None:
    arms = with_own_settings(method_arms(["lora", "full"]), {"full": ["train.learning_rate=5e-5"]})
    rates = [arm_config(None, [*BASE, "train.learning_rate=1e-3"], arm).train.learning_rate for arm in arms]
    assert rates == [1e-3, 5e-5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full: train.epochs=2", ("full", "train.epochs=2")),
        ("train.epochs=2", (None, "train.epochs=2")),
        ("data.prompt={text}: answer", (None, "data.prompt={text}: answer")),
        ("data.train=C:/rows.jsonl", (None, "data.train=C:/rows.jsonl")),
    ],
)
def test_a_name_stands_before_the_setting(text: str, expected: tuple[str | None, str]) -> None:
    assert split_name(text) == expected


def test_mistakes_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"no method 'qlra' \(did you mean 'qlora'\?\)"):
        method_arms(["qlra"])
    with pytest.raises(ConfigError, match="named twice"):
        varied_arms(["lora.r=4", "lora.r=4"])
    with pytest.raises(ConfigError, match="no arm of this name"):
        with_own_settings(method_arms(["lora"]), {"full": []})
    with pytest.raises(ConfigError, match=r"arm 'x': settings: unknown key 'lora\.rank'"):
        arm_config(None, BASE, Arm("x", ("lora.rank=4",)))
    for shared in ("data.max_length=9", "train.seed=1", "output=x"):
        with pytest.raises(ConfigError, match="must be the same for all arms"):
            arm_config(None, BASE, Arm("x", (shared,)))
    with pytest.raises(ConfigError, match=r"arm 'qlora': model\.quant_type is none"):
        arm_config(None, [*BASE, "model.quant_type=none"], method_arms(["qlora"])[0])


class TestRows:
    def test_a_split_that_no_seed_changes(self, tmp_path: Path) -> None:
        data = DataSettings(
            train=(str(write_rows(tmp_path / "rows.jsonl", 40)),), heldout_fraction=0.25, max_rows=20
        )
        rows = share_rows(data, 0, tmp_path / "data")
        assert rows.counts == {"train": 20, "heldout": 10, "score": 10}
        settings = rows.settings(data)
        train, heldout = read_rows(settings.train, settings), read_rows(settings.heldout, settings)
        prompts = [{row.fields["prompt"] for row in part} for part in (train, heldout)]
        assert not prompts[0] & prompts[1]
        assert (len(prompts[0]), settings.max_rows) == (20, None)
        assert share_rows(data, 0, tmp_path / "data") == rows
        with pytest.raises(ConfigError, match=r"train\.jsonl: holds other rows"):
            share_rows(data, 1, tmp_path / "data")

    def test_rows_to_score(self, tmp_path: Path) -> None:
        (tmp_path / "test.csv").write_text("prompt,completion\na,1\nb,2\nc,3\n")
        data = DataSettings(train=(str(write_rows(tmp_path / "rows.jsonl", 4)),), heldout_fraction=0.25)
        rows = share_rows(data, 0, tmp_path / "data", [str(tmp_path / "test.csv")], 2)
        assert rows.score is not None
        scored = [json.loads(line) for line in rows.score.read_text().splitlines()]
        assert len(scored) == 2
        assert all(
            row in [{"prompt": p, "completion": c} for p, c in zip("abc", "123", strict=True)]
            for row in scored
        )
        assert share_rows(data, 0, tmp_path / "none", eval_rows=0).score is None

    def test_plain_text_is_not_scored(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"text": "a b c"}\n' * 4)
        rows = share_rows(DataSettings(train=(str(tmp_path / "rows.jsonl"),)), 0, tmp_path / "data")
        assert (rows.score, rows.counts["heldout"]) == (None, 1)

    def test_without_held_out_rows(self, tmp_path: Path) -> None:
        path = str(write_rows(tmp_path / "rows.jsonl", 4))
        with pytest.raises(ConfigError, match="needs held-out rows"):
            share_rows(DataSettings(train=(path,), heldout_fraction=0), 0, tmp_path / "data")
        write_rows(tmp_path / "rows.jsonl", 1)
        with pytest.raises(DataError, match="one row cannot be split"):
            share_rows(DataSettings(train=(path,)), 0, tmp_path / "data")
