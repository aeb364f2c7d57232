"""`fourbit init` writes a file that loads, explains every setting, and is never overwritten by accident."""

from __future__ import annotations

import json

import pytest

from fourbit.cli.main import main
from fourbit.config import RunConfig
from fourbit.config_file import load_config, resolve, section_class


def written(tmp_path, *options):
    path = tmp_path / "run.yaml"
    assert main(["init", str(path), *options]) == 0
    return path


def test_the_file_loads_to_the_defaults(tmp_path):
    path = written(tmp_path, "--model", "models/a: b #c", "--data", "rows.jsonl")
    assert load_config(path) == resolve(
        {"model": {"path": "models/a: b #c"}, "data": {"train": "rows.jsonl"}}
    )


def test_without_model_and_data_it_loads_and_marks_what_is_missing(tmp_path, capsys):
    path = written(tmp_path)
    assert load_config(path).model.path == "path/to/path"
    assert path.read_text().count("# REQUIRED: ") == 2
    assert "fill in model.path and data.train, then " in capsys.readouterr().out


def test_every_setting_stands_there_below_its_description(tmp_path):
    lines = [line.strip() for line in written(tmp_path).read_text().splitlines()]
    for name in RunConfig.model_fields:
        section = section_class([name])
        for key, field in section.model_fields.items() if section else ():
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}: "))
            comment = "REQUIRED: " + field.description if field.is_required() else field.description
            above = at - 1
            while not lines[above].startswith("# ") or lines[above].startswith("#   "):
                above -= 1
            shown = " ".join(line.removeprefix("#").strip() for line in lines[above:at])
            assert shown == comment


def test_an_existing_file_is_kept_unless_forced(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert main(["init", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"fourbit init: error: {path}: exists already; choose another name, or --force to replace it\n"
    )
    assert path.read_text() == "mine"
    assert main(["init", str(path), "--force"]) == 0
    assert load_config(path)


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    path = tmp_path / "missing" / "run.yaml"
    assert main(["init", str(path)]) == 2
    assert (
        capsys.readouterr().err
        == f"fourbit init: error: {path}: cannot be written: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("options", "missing"), [([], ["model.path", "data.train"]), (["--model", "m"], ["data.train"])]
)
def test_json_names_the_file_and_what_is_missing(tmp_path, capsys, options, missing):
    path = written(tmp_path, "--json", *options)
    assert json.loads(capsys.readouterr().out) == {"config": str(path), "missing": missing}
